"""The papers' figures that need no training: what they show of a student and its teacher, on held-out questions.

    python -m tools.figures vgs            VGS Figure 3: the angles between the gradients of Lang, Vis and Std
    python -m tools.figures ptdpo          PTD-PO Figures 3 and 5: what each kind of knowledge does to a tutor

The method's own flags follow the first word; its --group is the responses a question. The table is printed, and written
to angles.json or contexts.json in the run folder.
"""

import functools
import json
import math
import sys

import common
import ptdpo
import vgs
from tools import scores

import torch
from torch import Tensor


def my_rows(data) -> list[dict]:
    """This rank's part of the held-out rows."""
    mine = range(common.rank(), len(data), common.world_size())
    return [data[i] for i in mine]


def finish(run, name, table):
    if common.rank() == 0:
        (run.path / name).write_text(json.dumps(table, indent=2) + "\n")
        print(f"written to {run.path / name}")


# =============================================================================================== VGS, Figure 3
def gradient_of(term, micros, tenths, b, run, args) -> list[Tensor]:
    """This rank's shards of the gradient of a term, summed over the tokens in tenth b."""
    for m, tenth in zip(micros, tenths):
        m.weights = {term: (tenth == b).float()}

    run.backward(micros, vgs.TERMS, functools.partial(vgs.terms, args=args), vgs.extras)
    kept = []
    for p in run.student.parameters():
        if p.grad is None:
            continue
        shard = p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad
        kept.append(shard.clone())
    run.student.zero_grad()
    return kept


def dot(one: list[Tensor], other: list[Tensor]) -> float:
    """Scalar product of two gradients over all ranks."""
    total = 0.0
    for g, h in zip(one, other):
        total = total + (g * h).sum().double()
    return common.all_sum(total).item()


def angle(one: list[Tensor], other: list[Tensor]) -> float | None:
    """In degrees; None where one of them is zero: no token fell into the bin."""
    norms = math.sqrt(dot(one, one) * dot(other, other))
    if norms == 0:
        return None
    cosine = dot(one, other) / norms
    return math.degrees(math.acos(max(-1.0, min(1.0, cosine))))


def show(line):
    """Print a line of the table."""
    shown = {}
    for key, x in line.items():
        shown[key] = round(x, 4) if isinstance(x, float) else x
    common.say(str(shown))


def angles(run, data, args) -> list[dict]:
    """For each tenth of the visual dependency: the gradients' norms, and the angles between them in degrees."""
    samples = vgs.rollout(my_rows(data), run, args)
    run.engine.sleep()
    micros = vgs.score(samples, run, args)
    vds = torch.cat([m.vds for m in micros])
    deciles = common.quantile(vds, [i / 10 for i in range(1, 10)])
    tenths = [torch.bucketize(m.vds, deciles) for m in micros]
    table = []
    for b in range(10):
        gradients = {}
        line = {"bin": b}
        for term in ("std", "vis", "lang"):
            gradients[term] = gradient_of(term, micros, tenths, b, run, args)
            line[f"norm_{term}"] = math.sqrt(dot(gradients[term], gradients[term]))
        for one, other in (("lang", "vis"), ("std", "vis"), ("std", "lang")):
            line[f"{one}_{other}"] = angle(gradients[one], gradients[other])
        table.append(line)
        show(line)
    return table


def figure_vgs(argv):
    args = common.parse_args(vgs.Args, vgs.PRESETS, vgs.RANGES, argv)
    if not args.alpha or not max(args.gamma, args.lambda_lp):
        raise common.UserError("all four distributions are needed: --alpha 1 and --gamma above 0")
    args.prompts = 0  # nothing is drawn
    run = common.Run("figures-vgs", args)
    processor = common.Processor(args.student, args)
    common.check_same_inputs(processor, common.Processor(args.teacher, args))
    data = held_out(args, processor, vgs.contexts(args), "problem images")
    run.load(processor, args.teacher)
    finish(run, "angles.json", angles(run, data, args))


# =============================================================================================== PTD-PO, Figures 3, 5
def shifts(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Logits [n, V] of each context, the question's first, and ids [n] -> NLL in each, then KL(context || question)."""
    *logits, ids = tensors
    log_q = [common.log_softmax(z) for z in logits]
    nll = [-common.gather(x, ids) for x in log_q]
    return *nll, *(common.kl(x, log_q[0]) for x in log_q)


def mean_shifts(samples, run, args) -> dict[str, tuple[float, float]]:
    """Context -> (change of the NLL, KL from the question alone), means over the tokens of the question's answers."""
    names = list(ptdpo.KNOWLEDGE)
    found = []
    for m in common.make_micros(samples, names, run.processor, args.micro_tokens):
        with torch.no_grad():
            pairs = [(hidden, run.head) for hidden in run.teacher(m.batch).chunk(m.contexts)]
        found.append(common.vocab_terms(shifts, pairs, [m.ids], run.vocab, args.loss_chunk))
    terms = torch.cat(found, dim=-1)
    means = common.token_means(dict(enumerate(terms)))
    shifted = {}
    for i, name in enumerate(names):
        change = means[i] - means[0]
        shifted[name] = (change, means[i + len(names)])
    return shifted


def right_answers(samples, group) -> list[int]:
    """How many of each question's answers are right, over all ranks."""
    counts = []
    for start in range(0, len(samples), group):
        part = samples[start : start + group]
        counts.append(sum(s.correct for s in part))
    return sum(common.all_gather_object(counts), [])


def contexts_table(run, data, args) -> list[dict]:
    """What each tutor context does to the initial model: how it reads the student's answers, and its own answers."""
    views = {}
    for name in ptdpo.KNOWLEDGE:
        blind = args.blind_tutor and name != "question"
        views[name] = lambda row, name=name, blind=blind: ptdpo.tutored(row, name, blind)
    rows = [row for row in my_rows(data) if all(view(row) for view in views.values())]
    count = sum(common.all_gather_object(len(rows)))
    if count == 0:
        raise common.UserError("no held-out row has a hint, a solution and an answer")
    common.say(f"{count} of {len(data)} questions have a hint and a solution")
    answers = {}
    for name in ptdpo.KNOWLEDGE:  # the answers to the question alone are read in every context
        seen = views if name == "question" else {name: views[name]}
        answers[name] = common.sample_responses(run.engine, rows, seen, args)
        common.reward_answers(answers[name], args.group)
    run.engine.sleep()
    shifted = mean_shifts(answers["question"], run, args)
    table, failed = [], []
    for name, samples in answers.items():
        right = right_answers(samples, args.group)
        failed = failed or [number == 0 for number in right]
        hard = [number for number, fails in zip(right, failed) if fails]
        change, kl = shifted[name]
        line = {"context": name, "delta_nll": change, "kl": kl}
        lengths = [len(s.response.ids) for s in samples]
        line |= common.mean_over_ranks({"length": lengths})
        for n in (1, 2, 4, 8, 16, 32):
            if n > args.group:
                break
            chances = [scores.pass_at(args.group, number, n) for number in right]
            line[f"pass@{n}"] = sum(chances) / len(chances)
        line["hard"] = len(hard)
        line["hard_none"] = hard.count(0)
        line["hard_all"] = hard.count(args.group)
        line["hard_some"] = len(hard) - line["hard_none"] - line["hard_all"]
        table.append(line)
        show(line)
    return table


def figure_ptdpo(argv):
    args = common.parse_args(ptdpo.Args, ptdpo.PRESETS, ptdpo.RANGES, argv)
    args.prompts = 0  # nothing is drawn
    run = common.Run("figures-ptdpo", args)
    processor = common.Processor(args.student, args)
    wanted = "problem images answer hint solution"
    data = held_out(args, processor, {"question": ptdpo.question}, wanted)
    run.load(processor, args.student)
    finish(run, "contexts.json", contexts_table(run, data, args))


def held_out(args, processor, contexts, names):
    load = functools.partial(common.load_rows, optional="hint solution")
    found = common.load_held_out(args, processor, contexts, names, load)
    if len(found) != 1:
        raise common.UserError("figures need one set of held-out questions: --eval-data")
    return next(iter(found.values()))


def main():
    figures = {"vgs": figure_vgs, "ptdpo": figure_ptdpo}
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in figures:
        raise common.UserError(f"name a method first: python -m tools.figures {'|'.join(figures)}")
    figures[name](sys.argv[2:])


if __name__ == "__main__":
    common.launch(main)
