"""PALR, the Privileged Answer Leakage Rate: how much of the answer that teachers were told is in their marks.

ViGOS (arXiv:2606.19120), Appendix A. No training: it reads one response to each held-out question.

    python -m tools.palr                        the initial model's own answers
    python -m tools.palr --student runs/my-run/final --teacher Qwen/Qwen2.5-VL-3B-Instruct --eval-data rows.parquet

The student p answers. At every token of the answer, on the same prefix, the frozen initial model q gives the token's
probability: as its teacher, with each of K wrong answers in the place of the right one, and beside another image.

    s   = |log q - log p|                               how strongly the teacher corrects the student
    c_A = max(0, log q - log mean_k q_wrong_k)          what the answer has to do with it; 0 for one that knows none
    c_I = max(0, log q - log q_other_image)             what the image has

    PALR = 100 * sum s c_A / (sum s (c_A + c_I) + 1e-8)

Both methods' teachers are measured on the same answers: OPSD's privileged one for all tokens, ViGOS's perception
teacher for the description d and its reasoning teacher for the reasoning and the answer, r and a. palr.json holds the
result. "both" is a ratio of sums over d, r and a, no mean of the two.

What the paper leaves open: its wrong answers are a language model's, their number not given. Here there are 4: those
of --column-wrong, or else the student's own, then other questions' answers. Sums go over all tokens of all answers;
</think> and \\boxed{} belong to r and a as in vigos.py; answers out of form, or without any wrong answer, are left out.
"""

import dataclasses
import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import common
import vigos

import torch
from torch import Tensor

# method -> who marks d, and who marks r and a
TEACHERS = {"opsd": ("reasoning", "reasoning"), "vigos": ("perception", "reasoning")}
PARTS = ("description", "reasoning")
RANGES = {"wrong_answers": (1, 100), "wrong_samples": (1, 1000)}


@dataclass
class Args(vigos.Args):
    wrong_answers: int = 4  # wrong answers a question (K)
    column_wrong: str = ""  # column with a list of them; empty: other responses of the student
    wrong_samples: int = 8  # such responses a question; then other questions' answers


# =============================================================================================== contexts
def informed(row: dict, answer) -> common.Context:
    """The reasoning teacher, and OPSD's, when this answer is its reference."""
    return vigos.privileged(row | {"reference": answer})


def views(s: common.Sample) -> dict[str, common.Context]:
    """Every context that a response is read in, by name: the student's, and all others the initial model's."""
    row, other = s.row, s.row | {"images": s.other_images}
    found = {
        "student": vigos.question(row),
        "perception": vigos.image_alone(row),
        "perception, other image": vigos.image_alone(other),
        "reasoning": informed(row, row["answer"]),
        "reasoning, other image": informed(other, row["answer"]),
    }
    for k, answer in enumerate(s.wrong):
        found[f"wrong answer {k}"] = informed(row, answer)
    return found


# =============================================================================================== answers
def choose_wrong(candidates: list, answer, count: int) -> list[str]:
    """The first `count` different candidates that are wrong, as texts. ["7", "3", None, "7", "9"], 3 -> ["7", "9"]."""
    found = {}
    for candidate in candidates:
        if len(found) == count:
            break
        if common.is_empty(candidate):
            continue
        text = common.all_answers(candidate)[0]
        if not common.is_correct(text, answer):
            found.setdefault(common.plain(text), text)
    return list(found.values())


def respond(rows, run: common.Run, args: Args) -> list[common.Sample]:
    """One response to each of this rank's questions, with its spans, its wrong answers and the next row's images."""
    tries = 0 if args.column_wrong else args.wrong_samples
    mine = range(common.rank(), len(rows), common.world_size())
    asked = dataclasses.replace(args, group=1 + tries)
    questions = {"student": vigos.question}
    samples = common.sample_responses(run.engine, [rows[i] for i in mine], questions, asked)
    run.engine.sleep()
    answers = rows.with_format(None)[args.column_answer]
    measured = samples[:: 1 + tries]
    common.reward_answers(measured, 1)
    for n, (i, s) in enumerate(zip(mine, measured)):
        pieces = run.processor.tokenizer.convert_ids_to_tokens(s.response.ids)
        s.spans = vigos.find_spans(pieces)
        s.other_images = rows[(i + 1) % len(rows)]["images"]
        if args.column_wrong:
            candidates = s.row["wrong"] or []
        else:
            others = samples[n * (1 + tries) + 1 : (n + 1) * (1 + tries)]
            candidates = [common.extract_answer(other.response.text) for other in others]
            candidates += [*answers[i + 1 :], *answers[:i]]
        s.wrong = choose_wrong(candidates, s.row["answer"], args.wrong_answers)
    return measured


# =============================================================================================== leakage
def leakage(student: Tensor, teacher: Tensor, wrong: Tensor, other: Tensor) -> Tensor:
    """[sum of s c_A, sum of s (c_A + c_I)] from log-probs [n] of the observed tokens; see the top.

    wrong [K, n]: with each wrong answer; K = 0: this teacher knows no answer. other: beside another image.
    """
    s = (teacher - student).abs()
    by_answer = torch.zeros_like(teacher)
    if len(wrong):
        mean = wrong.logsumexp(0) - math.log(len(wrong))
        by_answer = (teacher - mean).clamp(min=0)
    by_image = (teacher - other).clamp(min=0)
    return torch.stack([(s * by_answer).sum(), (s * (by_answer + by_image)).sum()])


@torch.no_grad()
def read(name: str, samples: list[common.Sample], run: common.Run, args: Args):
    """s.read[name] = the log-probs [T] of the response's tokens in this context. One context at a time: pixels."""
    having = []
    for s in samples:
        view = views(s).get(name)
        if view is not None:
            s.prompts = {name: run.processor.encode(view)}
            having.append(s)
    for m in common.make_micros(having, [name], run.processor, args.micro_tokens):
        if name == "student":
            found = run.student(m.batch, functools.partial(run.log_probs, m))
        else:
            found = run.log_probs(m, run.teacher(m.batch), run.head)
        for s, values in zip(m.samples, found.split(m.lengths)):
            s.read[name] = values


def leakage_sums(samples: list[common.Sample], run: common.Run, args: Args) -> Tensor:
    """What leakage returns, [methods, parts, 2], summed over all responses of all ranks."""
    names = [
        "student",
        "perception",
        "perception, other image",
        "reasoning",
        "reasoning, other image",
    ]
    wrong_names = [f"wrong answer {k}" for k in range(args.wrong_answers)]
    for s in samples:
        s.read = {}
    for name in names + wrong_names:
        read(name, samples, run, args)
    sums = torch.zeros(2, 2, 2, dtype=torch.float64, device=common.device())
    for s in samples:
        found = {name: values.double() for name, values in s.read.items()}
        wrong = torch.stack([found[name] for name in wrong_names if name in found])  # [K, T]
        for i, teachers in enumerate(TEACHERS.values()):
            for j, (name, span) in enumerate(zip(teachers, s.spans)):
                mask = torch.tensor(span, device=wrong.device)
                known = wrong if name == "reasoning" else wrong[:0]
                student, teacher = found["student"][mask], found[name][mask]
                other = found[f"{name}, other image"][mask]
                sums[i, j] += leakage(student, teacher, known[:, mask], other)
    return common.all_sum(sums)


def rate(sums: Tensor) -> float | None:
    """PALR in percent; None where there is no token, or nothing that the answer or the image explains."""
    by_answer, by_both = sums.tolist()
    return 100 * by_answer / (by_both + 1e-8) if by_both else None


def measure(samples: list[common.Sample], run: common.Run, args: Args) -> dict:
    """The counts, over all ranks, and PALR by method and part of the answer."""
    used = [s for s in samples if s.spans and s.wrong]
    counts = {
        "responses": len(samples),
        "used": len(used),
        "out_of_form": sum(s.spans is None for s in samples),
        "accuracy": sum(s.correct for s in samples),
        "wrong_answers": sum(len(s.wrong) for s in used),
    }
    totals = common.all_sum(torch.tensor(list(counts.values()), device=common.device()))
    result = dict(zip(counts, totals.tolist()))
    if result["used"] == 0:
        raise common.UserError(
            f"none of the {result['responses']} responses can be used: {result['out_of_form']} are out of "
            "form, and the others have no wrong answer beside them"
        )
    result["accuracy"] /= result["responses"]
    result["wrong_answers"] /= result["used"]
    result["palr"] = {}
    for method, sums in zip(TEACHERS, leakage_sums(used, run, args)):
        rates = {part: rate(x) for part, x in zip(PARTS, sums)}
        result["palr"][method] = rates | {"both": rate(sums.sum(0))}
    return result


# =============================================================================================== main
def load_rows(args: Args, processor: common.Processor):
    """The held-out rows, with their lists of wrong answers if they bring some."""
    contexts = {
        "student": vigos.question,
        "reasoning": lambda row: informed(row, row["answer"]),
    }
    names = "problem images answer"
    names = f"{names} wrong" if args.column_wrong else names
    load = functools.partial(common.load_rows, optional="wrong")
    found = common.load_held_out(args, processor, contexts, names, load)
    if len(found) != 1:
        raise common.UserError(
            "PALR is measured on one set of held-out questions: name it with --eval-data"
        )
    (rows,) = found.values()
    if args.column_wrong:
        lists = rows.with_format(None)[args.column_wrong]
        if not all(isinstance(wrong, list | None) for wrong in lists) or not any(lists):
            raise common.UserError(
                f"column {args.column_wrong!r} of {args.eval_data!r} has to hold lists of wrong answers. "
                "Without --column-wrong the student's own are used"
            )
    return rows


def main():
    args = common.parse_args(Args, vigos.PRESETS, RANGES)
    args.lora = args.prompts = 0  # nothing is trained
    trained = Path(args.student).parent / "args.json"
    if not args.teacher and trained.exists():
        raise common.UserError(
            f"{args.student!r} was trained from {json.loads(trained.read_text())['student']!r}: name that "
            "with --teacher, whose marks are measured"
        )
    run = common.Run("palr", args)
    processor, initial = common.Processor(args.student, args), args.teacher or args.student
    common.check_same_inputs(processor, common.Processor(initial, args))
    rows = load_rows(args, processor)
    run.load(processor, initial)
    samples = respond(rows, run, args)
    result = {"student": args.student, "teacher": initial} | measure(samples, run, args)
    text = json.dumps(result, indent=2)
    if common.rank() == 0:
        (run.path / "palr.json").write_text(f"{text}\n")
    common.say(f"{text}\nPALR is in %; written to {run.path / 'palr.json'}")


if __name__ == "__main__":
    common.launch(main)
