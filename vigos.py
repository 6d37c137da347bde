"""ViGOS: see first, then reason. Self-distillation from three frozen views of the initial model.

Paper: Liu et al., "ViGOS: Visually Grounded On-Policy Self-Distillation", arXiv:2606.19120.

    python vigos.py                                            a laptop: small real models on real handwriting
    torchrun --nproc-per-node 8 vigos.py --preset 3b           one node: Qwen2.5-VL-3B, its own teacher
    python vigos.py --method opsd                              the baseline: one privileged teacher for every token
    python vigos.py --palr                                     no training: how much of the answer the teachers leak into their marks

The student writes <description> d </description> <think> r </think> \\boxed{a}; the first tag is given to it. The frozen initial
model p_0 reads the answer in three contexts, on the same prefix h_t:

    p       student,    image, question, format                   what samples, and what is trained
    q_img   perception, image                                     marks d: nothing but the image can tell it what to describe
    q_rea   reasoning,  image, question, reference, format        marks r and a
    q_ref   reference,  image, question, reference, format        marks every token of an answer that is out of form

    L_perc  mean over the tokens of d       KL(q_img || p)        of answers in form: teacher first, forward KL     Eq. 13-14, 18
    L_rea   mean over those of r and a      KL(q_rea || p)        the same                                          Eq. 15, 19
    L_ref   mean over all tokens            KL(p || q_ref)        of the others: student first, reverse KL          Eq. 16, 20

    loss = 1 L_perc + 1 L_rea + 2 L_ref,  each token's KL clipped at 0.05                                           Eq. 17, 21

    --method opsd: KL(q_ref || p) on every token of every answer                                                    Eq. 4-6
    --palr: the Privileged Answer Leakage Rate                                                                      Appendix A

Where this differs from the paper, or from the code released with it:
 1. q_rea reads the student's description before r, as the paper says. The released code leaves it out: --reasoning-prefix slice.
    With the description in its prefix the reasoning teacher's prompt has to ask for one: it is the reference teacher's.
 2. The clip is taken after the sum over the vocabulary, as in the code: a token above it gets no gradient (the log counts them).
    --clip-entries clips each vocabulary entry before the sum instead.
 3. </think> and \\boxed{} are marked with r and a, as in the code (the paper: no delimiters); otherwise nothing would teach to close and
    to box. The end token is not, unless --mark-end says so.
 4. An answer is in form if the tags come in order and d, r and a are not blank. The code lets blank ones pass.
 5. The means are over one update and all ranks. The code averages each micro-step by itself.
 6. The perception teacher's prompt ends in <description> as the student's does; the code has no tag there.
 7. Advantages, rewards and answers play no part; accuracy is logged.
 8. LoRA as in the paper (rank 64, scale 2, p_0 is the model with the adapters off), without its dropout of 0.05; full training with
    a frozen copy as p_0 at --lora 0.
 9. PALR takes 4 wrong answers a question: --column-wrong's, or else the student's own, then other questions' answers (the paper: a language
    model's, their number not given). It is a ratio of sums over all tokens; </think> and \\boxed{} count as in 3; responses without any
    wrong answer are left out.
10. OPSD answers in the same form, from the same prompt (the paper's same-prompt table; its main table has a plain one).
11. All images of a row are shown (the code: the first), and the reference as its column holds it (the code strips tags and boxes).
12. The wording of the prompts is ours.
"""

import copy
import dataclasses
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import common
from kernels import topk_tail_divergence

# ====================================================================================================== settings
HUB = dict(data="LMMs-Lab-Turtle/Vision-SR1-47K", prompts=32, temperature=1.1, top_p=0.95, top_k=20, max_prompt=32768, max_response=4096,
           lr=5e-6, schedule="linear", grad_clip=0.1, lora=64, micro_tokens=16384, gradient_checkpointing=True, save_every=500)
PRESETS = {
    "toy": dict(student="toy/captions/student", data="toy/captions/train", eval_data="toy/captions/test", conflict_data="toy/captions/conflict",
                prompts=64, max_steps=150, lr=3e-4, warmup=10, schedule="linear", dtype="float32", eval_every=25, eval_rows=400, clip=5.0),
    "3b": dict(student="Qwen/Qwen2.5-VL-3B-Instruct", **HUB),
    "7b": dict(student="Qwen/Qwen2.5-VL-7B-Instruct", **HUB),
    "opsd": dict(student="Qwen/Qwen2.5-VL-3B-Instruct", method="opsd", **HUB),
}


@dataclass
class Args(common.Args):
    method: Literal["vigos", "opsd"] = "vigos"  # three views, or one privileged teacher for every token
    column_reference: str = ""  # name of the column that the privileged teachers are shown: an answer or a worked solution; default: --column-answer
    weight_perception: float = 1.0  # weight of L_perc (0 = the paper's ablation)
    weight_reasoning: float = 1.0  # weight of L_rea (0 = the paper's ablation)
    weight_reference: float = 2.0  # weight of L_ref, on answers that are out of form (0 = they are left out)
    fallback: Literal["reverse_kl", "forward_kl"] = "reverse_kl"  # L_ref: KL(student || teacher), or the ablation KL(teacher || student)
    divergence: Literal["forward_kl", "jsd", "top_k", "sampled"] = "forward_kl"  # opsd: of every token; top_k: JSD on both Top-K sets and a tail
    support: int = 100  # opsd with top_k: tokens of each Top-K set
    clip: float = 0.05  # largest KL of a token; above it there is no gradient; 0 = no limit
    clip_entries: bool = False  # limit each vocabulary entry's share instead, before the sum
    reasoning_prefix: Literal["full", "slice"] = "full"  # what the reasoning teacher reads: the whole answer, or (released code) r and a alone
    mark_end: bool = False  # mark the end token of an answer in form as part of its reasoning
    conflict_data: str = ""  # (split: --eval-split) held-out questions whose text suggests an answer: position 1 shows it, 2 and 3 show another; gives score and prior
    column_position: str = "position"  # name of their column with the position
    palr: bool = False  # measure the leakage of both methods' teachers on the held-out questions instead of training
    wrong_answers: int = 4  # palr: wrong answers a question
    column_wrong: str = ""  # palr: name of the column with a list of them; empty: from --wrong-samples other responses of the student
    wrong_samples: int = 8  # palr: responses a question that wrong answers are taken from; where they hold too few, other questions' answers


READ_BY_PALR = ("palr", "wrong_answers", "column_wrong", "wrong_samples", "column_reference", "preset", "student", "teacher", "eval_data", "eval_split", "eval_rows",
                "column_problem", "column_images", "column_answer", "skip_bad_rows", "timeout", "engine", "tensor_parallel", "vllm_memory",
                "rollout_batch", "temperature", "top_p", "top_k", "max_prompt", "max_response", "micro_tokens", "loss_chunk", "dtype", "output", "seed")


# ====================================================================================================== contexts
OPENING = "<description>"
FORMAT = ("\nDescribe the image inside <description></description>, reason inside <think></think>, and put the final answer in \\boxed{}.")
FORMAT_SLICE = "\nReason inside <think></think>, and put the final answer in \\boxed{}."


def ask(row: dict, text: str, prefill: str = OPENING) -> common.Context:
    return common.Context([common.user_message(text, len(row["images"]))], row["images"], prefill)


def question(row: dict) -> common.Context:
    """I, x, format: what the student samples under and is trained in."""
    return ask(row, row["problem"] + FORMAT)


def image_alone(row: dict) -> common.Context:
    """I: what the perception teacher sees. No question, no reference, no format."""
    return ask(row, "")


def privileged(row: dict) -> common.Context:
    """I, x, a*, format: the reasoning teacher and the reference teacher."""
    return ask(row, f"{row['problem']}\nReference solution: {common.one_answer(row['reference'])}{FORMAT}")


def privileged_slice(row: dict) -> common.Context:
    """The released code's reasoning teacher: no description before its reasoning."""
    return ask(row, f"{row['problem']}\nReference solution: {common.one_answer(row['reference'])}{FORMAT_SLICE}", "<think>")


def contexts(args: Args) -> dict:
    """The contexts that this run reads responses in, by name; the first is the one they are sampled under."""
    if args.method == "opsd":
        return {"question": question, "reference": privileged}
    reasoning = privileged if args.reasoning_prefix == "full" else privileged_slice
    return {"question": question, "perception": image_alone, "reasoning": reasoning, "reference": privileged}


# ====================================================================================================== spans
@dataclass
class Spans:
    """Tokens of a response, as half-open ranges; None where the response is out of form."""

    description: tuple[int, int]
    reasoning: tuple[int, int]  # r, </think> and the boxed answer


BLANK = "\u0120\u010a\u0109\u010d"  # how byte-level tokens write space, newline, tab and carriage return


def closing_brace(text: str, start: int) -> int:
    """Where the brace is that closes the one opened just before `start`; -1 without it. ("{a{b}c}", 1) -> 6."""
    depth = 1
    for i in range(start, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return i
    return -1


def find_spans(pieces: list[str]) -> Spans | None:
    """Where d and r, a are in a response whose tokens are written as `pieces`; the opening <description> is not part of it.

    A token that holds a part of a tag before r, or of the one behind d, belongs to neither.
    A 3 . </ description > <think> 3 </ think > \\boxed{ 3 } END  ->  description (0, 3), reasoning (7, 14)
    """
    text, starts = "".join(pieces), [0]
    for piece in pieces:
        starts.append(starts[-1] + len(piece))
    close = text.find("</description>")
    think = text.find("<think>", close)
    end = text.find("</think>", think)
    box = text.find("\\boxed{", end)
    if min(close, think, end, box) < 0:
        return None
    inside, opened = think + len("<think>"), box + len("\\boxed{")
    last = closing_brace(text, opened)
    if last < 0 or not all(part.strip(BLANK + " ") for part in (text[:close], text[inside:end], text[opened:last])):
        return None
    first = next(i for i, start in enumerate(starts) if start >= inside)
    return Spans((0, max(i for i, start in enumerate(starts) if start <= close)), (first, next(i for i, start in enumerate(starts) if start > last)))


# ====================================================================================================== losses
TERMS = ("forward", "reverse", "clipped", "log_p", "entropy")  # per token; the first two carry weight


def limited(shares: Tensor, args: Args) -> tuple[Tensor, Tensor]:
    """A divergence from its shares [n, V] by vocabulary entry -> (the clipped divergence [n], whether a limit cut it [n])."""
    if not args.clip:
        return shares.sum(-1), torch.zeros_like(shares[:, 0])
    if args.clip_entries:
        return shares.clamp(max=args.clip).sum(-1), (shares.detach() > args.clip).any(-1).to(shares.dtype)
    total = shares.sum(-1)
    return total.clamp(max=args.clip), (total.detach() > args.clip).to(shares.dtype)


def shares_of(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) by vocabulary entry: a (log a - log b), [n, V]."""
    return log_a.exp() * (log_a - log_b).masked_fill(log_a == -torch.inf, 0.0)


def terms(z: Tensor, y: Tensor, ids: Tensor, reverse: Tensor, args: Args) -> tuple[Tensor, ...]:
    """TERMS per token, [n] each, from the student's logits z and the token's own teacher's y, [n, V]; reverse [n]: which KL it gets."""
    log_p, log_q = z.log_softmax(-1), y.log_softmax(-1)
    chosen = common.gather(log_p, ids)
    if args.method == "opsd" and args.divergence == "sampled":  # its gradient is that of KL(student || teacher), over the student's samples
        forward, forward_clipped = limited(((chosen - common.gather(log_q, ids)) ** 2 / 2)[:, None], args)
    elif args.method == "opsd" and args.divergence == "top_k":
        forward, forward_clipped = limited(topk_tail_divergence(z, y, args.support)[:, None], args)
    elif args.method == "opsd" and args.divergence == "jsd":
        log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0, device=z.device))
        forward, forward_clipped = limited((shares_of(log_p, log_m) + shares_of(log_q, log_m)) / 2, args)
    else:
        forward, forward_clipped = limited(shares_of(log_q, log_p), args)  # Eq. 14, 15: KL(teacher || student)
    backward, backward_clipped = limited(shares_of(log_p, log_q), args)  # Eq. 16: KL(student || teacher)
    clipped = torch.where(reverse, backward_clipped, forward_clipped)
    return forward, backward, clipped, chosen, common.entropy(log_p.detach())


# ====================================================================================================== rollout
@dataclass
class Sample(common.Sample):
    spans: Spans | None = None  # None: out of form
    read: dict[str, Tensor] = field(default_factory=dict)  # palr: context -> log-prob of each token, [T]


def rollout(rows: list[dict], models: common.Models, args: Args) -> list[Sample]:
    """The student answers this rank's questions, from <description> on; its answers are parted into d and r, a."""
    samples = common.sample_responses(models.engine, rows, contexts(args), args, Sample)
    common.reward_answers(samples, args.group)  # for the log alone
    for s in samples:
        s.spans = find_spans(models.processor.tokenizer.convert_ids_to_tokens(s.response.ids))
    return samples


# ====================================================================================================== score
PARTS = ("perception", "reasoning", "reference")  # who marks a token


@dataclass
class Micro(common.Micro):
    part: Tensor | None = None  # [n] number in PARTS of the teacher that marks the token; -1: nobody


def gets_reverse_kl(part: Tensor, args: Args) -> Tensor:
    """Which tokens [n] get KL(student || teacher): those that the reference teacher marks, by default."""
    return (part == PARTS.index("reference")) & (args.method == "vigos" and args.fallback == "reverse_kl")


def marked(sample: Sample, args: Args) -> dict[str, list[int]]:
    """Teacher -> the numbers of the response's tokens that it marks."""
    n = len(sample.response.ids)
    if args.method == "opsd" or sample.spans is None:
        return {"reference": list(range(n))}
    end = [n - 1] if args.mark_end and sample.response.finished else []
    return {"perception": list(range(*sample.spans.description)), "reasoning": [*range(*sample.spans.reasoning), *end]}


def score(samples: list[Sample], models: common.Models, args: Args) -> list[Micro]:
    """The frozen model reads every response as each of the teachers that mark a part of it. Hidden states are kept, never logits."""
    micros = common.make_micros(Micro, samples, ["question"], models.processor, args.micro_tokens)
    for m in micros:
        prompts, responses, to, places = [], [], [], []  # one job a teacher and response; where its hidden states go
        m.part, start, row = torch.full((len(m.ids),), -1, device=m.ids.device), 0, 0
        for s in m.samples:
            for name, tokens in marked(s, args).items():
                skipped = s.spans.reasoning[0] if name == "reasoning" and args.reasoning_prefix == "slice" else 0
                prompts.append(s.prompts[name])
                responses.append(s.response.ids[skipped:])
                to += [start + t for t in tokens]
                places += [row + t - skipped for t in tokens]
                m.part[[start + t for t in tokens]] = PARTS.index(name)
                row += len(responses[-1])
            start += len(s.response.ids)
        with torch.no_grad():
            hidden = models.teacher(models.processor.batch(prompts or [models.processor.blank()], responses or [[]]))
            active = hidden.new_zeros(len(m.ids), hidden.shape[-1])
            active[torch.tensor(to, dtype=torch.long, device=hidden.device)] = hidden[torch.tensor(places, dtype=torch.long, device=hidden.device)]
        m.teacher = [active]  # [n, H]: each token's own teacher
    return micros


# ====================================================================================================== weigh
def weigh(micros: list[Micro], args: Args) -> None:
    """One weight per token and term: each part's weight over the tokens of that part, in the whole update on all ranks."""
    part = torch.cat([m.part for m in micros])
    counts = common.all_sum(torch.stack([(part == i).sum() for i in range(3)]).float()).clamp(min=1)
    factors = torch.tensor([args.weight_perception, args.weight_reasoning, 1.0 if args.method == "opsd" else args.weight_reference], device=part.device)
    for m in micros:
        weight = torch.cat([factors / counts, torch.zeros(1, device=part.device)])[m.part]  # -1, nobody: the zero at the end
        reverse = gets_reverse_kl(m.part, args)
        m.weights = torch.zeros(len(TERMS), len(m.ids), device=part.device)
        m.weights[0], m.weights[1] = weight * ~reverse, weight * reverse  # Eq. 17, 21


# ====================================================================================================== update
def accumulate(micros: list[Micro], models: common.Models, args: Args) -> None:
    """student.grad += gradient of the sum over micro-batches, terms and tokens of weight * term. One forward pass each."""
    for m in micros:

        def loss_fn(hidden, head):
            return common.vocab_loss(lambda *tensors: terms(*tensors, args=args), m.weights, [hidden], head, [(h, models.head) for h in m.teacher],
                                     [m.ids, gets_reverse_kl(m.part, args)], models.vocab, args.loss_chunk)

        loss, m.terms = models.student(m.batch, loss_fn)
        (loss * common.world_size()).backward()  # FSDP2 averages over ranks; the weights already hold the divisor


def update(micros: list[Micro], models: common.Models, args: Args) -> dict:
    """One optimizer step, and what it is worth knowing about it."""
    accumulate(micros, models, args)
    return common.clip_and_step(models, micros, TERMS, args.grad_clip) | statistics(micros, args)


def statistics(micros: list[Micro], args: Args) -> dict:
    """The three losses, each as the mean of its own tokens; shares of clipped tokens; over one update on all ranks."""
    named = dict(zip(TERMS, torch.cat([m.terms for m in micros], dim=-1)))  # [N] each
    length, part = torch.cat([m.length for m in micros]), torch.cat([m.part for m in micros])
    loss = torch.where(gets_reverse_kl(part, args), named["reverse"], named["forward"])
    sums = [torch.ones_like(length).sum(), (1 / length).sum(), named["entropy"].sum(), common.sampler_gap(micros, named["log_p"]).sum()]
    for i in range(3):
        mine = (part == i).float()
        sums += [mine.sum(), (mine * loss).sum(), (mine * named["clipped"]).sum()]
    tokens, responses, entropy, gap, *rest = common.all_sum(torch.stack(sums)).tolist()
    log = {"response_length": tokens / responses, "entropy": entropy / tokens, "sampler_gap": gap / tokens}
    for name, count, total, clipped in zip(PARTS, rest[0::3], rest[1::3], rest[2::3]):
        log |= {name: total / count, f"clipped_{name}": clipped / count, f"tokens_{name}": count / tokens} if count else {}
    return log


def span_statistics(samples: list[Sample]) -> dict[str, list]:
    """Whether each response is out of form, and the lengths of d and of r, a in tokens of those that are not."""
    spans = [s.spans for s in samples if s.spans]
    return {"out_of_form": [s.spans is None for s in samples], "description_length": [last - first for first, last in (s.description for s in spans)],
            "reasoning_length": [last - first for first, last in (s.reasoning for s in spans)]}


# ====================================================================================================== leakage (Appendix A)
def leakage(student: Tensor, teacher: Tensor, wrong: Tensor, mismatched: Tensor) -> Tensor:
    """What PALR is made of, [sum of s c_A, sum of s (c_A + c_I)], from log-probs [n] of the observed tokens.

    teacher: q; mismatched: q beside another image; wrong [K, n]: q with each wrong answer in the place of the right one (K = 0: it knows none).
    s = |log q - log p|, c_A = max(0, log q - log mean_k q_wrong), c_I = max(0, log q - log q_mismatched).
    """
    s, by_answer = (teacher - student).abs(), torch.zeros_like(teacher)
    if len(wrong):
        by_answer = (teacher - wrong.logsumexp(0) + math.log(len(wrong))).clamp(min=0)
    by_image = (teacher - mismatched).clamp(min=0)
    return torch.stack([(s * by_answer).sum(), (s * (by_answer + by_image)).sum()])


def find_wrong(rows: common.Rows, mine: list[int], models: common.Models, args: Args) -> list[list[str]]:
    """Up to --wrong-answers different wrong answers to each of the questions `mine`: the column's, or the student's own, then other questions' answers."""
    found, picked, answers = [], [rows[i] for i in mine], rows.column("answer")
    sampled = [[]] * len(mine)
    if not args.column_wrong:
        tries = common.sample_responses(models.engine, picked, {"question": question}, dataclasses.replace(args, group=args.wrong_samples))
        texts = [common.extract_answer(s.response.text) for s in tries]
        sampled = [texts[k : k + args.wrong_samples] for k in range(0, len(texts), args.wrong_samples)]
    for i, row, own in zip(mine, picked, sampled):
        kept = {}
        for answer in row["wrong"] or [] if args.column_wrong else [*own, *answers[i + 1 :], *answers[:i]]:
            text = "" if answer in (None, []) else common.one_answer(answer).strip()
            if len(kept) < args.wrong_answers and text and not common.is_correct(text, row["answer"]):
                kept.setdefault(common.plain(text), text)
        found.append(list(kept.values()))
    return found


def palr_views(rows: common.Rows, i: int, wrong: list[str]) -> dict:
    """The teachers' contexts for row i, as it is, beside the next row's image, and with each wrong answer in the place of the right one."""
    row = rows[i]
    other = row | {"images": rows[(i + 1) % len(rows)]["images"]}
    views = {"perception": image_alone(row), "reasoning": privileged(row), "perception, next image": image_alone(other), "reasoning, next image": privileged(other)}
    return views | {f"reasoning, wrong answer {k}": privileged(row | {"reference": answer}) for k, answer in enumerate(wrong)}


def read(name: str, samples: list[Sample], models: common.Models, args: Args) -> None:
    """Note the log-probs of the samples' tokens in this context: the student's in "question", in all others the initial model's."""
    for m in common.make_micros(Micro, samples, [name], models.processor, args.micro_tokens):
        with torch.no_grad():
            if name == "question":
                found = models.student(m.batch, lambda hidden, head: common.response_log_probs(hidden, head, m.ids, models.vocab, args.loss_chunk))
            else:
                found = common.response_log_probs(models.teacher(m.batch), models.head, m.ids, models.vocab, args.loss_chunk)
        start = 0
        for s in m.samples:
            s.read[name] = found[start : start + len(s.response.ids)]
            start += len(s.response.ids)


def palr(models: common.Models, rows: common.Rows, args: Args, run: common.Run) -> None:
    """100 * sum s c_A / sum s (c_A + c_I) over one response a question, for the teachers of either method, by part of the answer."""
    initial = args.teacher or args.student
    run.begin(f"leakage into the marks that {initial} gives the answers of {args.student}: {len(rows)} held-out questions, one response each")
    mine = list(range(common.rank(), len(rows), common.world_size()))
    wrong_answers = find_wrong(rows, mine, models, args)
    samples = common.sample_responses(models.engine, [rows[i] for i in mine], {"question": question}, args, Sample)
    common.reward_answers(samples, 1)
    for s in samples:
        s.spans = find_spans(models.processor.tokenizer.convert_ids_to_tokens(s.response.ids))
    used_rows = [(i, s, answers) for i, s, answers in zip(mine, samples, wrong_answers) if s.spans and answers]
    read("question", [s for _, s, _ in used_rows], models, args)
    names = ["perception", "reasoning", "perception, next image", "reasoning, next image"]
    for name in [*names, *(f"reasoning, wrong answer {k}" for k in range(args.wrong_answers))]:
        having = []
        for i, s, answers in used_rows:  # one context at a time: their images are most of the memory
            view = palr_views(rows, i, answers).get(name)
            if view is not None:
                s.prompts = {name: models.processor.encode(view)}
                having.append(s)
        read(name, having, models, args)
    valid = [s for _, s, _ in used_rows]
    sums = torch.zeros(2, 2, 2, dtype=torch.float64, device=common.device())  # method, part of the answer, what leakage returns
    for s in valid:
        wrong = torch.stack([values for name, values in s.read.items() if "wrong" in name])  # [K, T]
        for part, span in enumerate((s.spans.description, s.spans.reasoning)):
            for method, role in enumerate(("reasoning", ("perception", "reasoning")[part])):  # OPSD: the privileged teacher for both parts
                views = s.read["question"], s.read[role], wrong if role == "reasoning" else wrong[:0], s.read[f"{role}, next image"]
                sums[method, part] += leakage(*(x[..., slice(*span)] for x in views))
    counts = [len(samples), len(valid), sum(s.spans is None for s in samples), sum(s.correct for s in samples), sum(len(a) for _, _, a in used_rows)]
    total, used, out_of_form, correct, answers = common.all_sum(torch.tensor(counts, device=common.device())).tolist()
    if not used:
        raise common.UserError(f"none of the {total} responses can be used: {out_of_form} are out of form, and the others have no wrong answer beside them")
    result = {"student": args.student, "teacher": initial, "responses": total, "used": used, "out_of_form": out_of_form, "accuracy": correct / total,
              "wrong_answers": answers / used, "palr": {}}
    common.say(f"\n{total} responses, {used} used, {out_of_form} out of form, {total - used - out_of_form} in form without a wrong answer beside them; "
               f"{answers / used:.1f} wrong answers a question\n"
               f"{'PALR in %':12}{'description':>12}{'reasoning':>12}{'both':>12}")
    for method, parts in zip(("opsd", "vigos"), common.all_sum(sums)):
        shares = [100 * by_answer / (both + 1e-8) if both else None for by_answer, both in (*parts.tolist(), parts.sum(0).tolist())]
        result["palr"][method] = dict(zip(("description", "reasoning", "both"), shares))
        common.say(f"{method:12}" + "".join("-".rjust(12) if share is None else f"{share:12.2f}" for share in shares))
    if common.rank() == 0:
        (run.path / "palr.json").write_text(json.dumps(result, indent=2) + "\n")
        print(f"written to {run.path / 'palr.json'}")


# ====================================================================================================== main
def check_tags(processor: common.Processor) -> None:
    """Stop if the tokenizer cannot write the tags: no answer would ever be in form."""
    tags = "<description></description><think></think>\\boxed{}"
    written = "".join(processor.tokenizer.convert_ids_to_tokens(processor.tokenizer(tags, add_special_tokens=False)["input_ids"]))
    if written != tags:
        raise common.UserError(f"the tokenizer of {processor.name!r} cannot write the tags of this method: {tags} becomes {written}. Choose another student")


def load_conflicts(args: Args, processor: common.Processor) -> dict[str, common.Rows]:
    """Held-out questions whose text suggests an answer: {"prior": those where it is right, "score": those where it is not}, as in ViLP."""
    if not args.conflict_data:
        return {}
    asked = dataclasses.replace(args, eval_data=args.conflict_data, eval_rows=0)
    rows = common.load_rows(asked, processor, {"question": question}, held_out=True, columns={"position": args.column_position},
                            flags={"position": "--column-position"}, flag="--conflict-data")
    found = [common.as_number(str(position)) for position in rows.column("position")]
    if set(found) != {1, 2, 3}:
        raise common.UserError(f"every row of {args.conflict_data!r} needs a position of 1, 2 or 3, and all of them have to occur; column "
                               f"{args.column_position!r} holds {', '.join(sorted({str(x) for x in rows.column('position')})[:8])}")
    parts = {"prior": copy.copy(rows), "score": copy.copy(rows)}
    for name, positions in (("prior", (1,)), ("score", (2, 3))):
        parts[name].kept = [k for k, position in zip(rows.kept, found) if position in positions]
    return parts


def load_leakage_rows(args: Args, processor: common.Processor, told: dict, shown: dict) -> common.Rows:
    """The held-out rows of --palr, with their lists of wrong answers if they bring some."""
    told = told | ({"wrong": args.column_wrong} if args.column_wrong else {})
    rows = common.load_rows(args, processor, contexts(args), held_out=True, columns=told, flag="", **shown)
    for k, wrong in zip(rows.kept, rows.column("wrong") if args.column_wrong else ()):
        if wrong is not None and not isinstance(wrong, list):
            raise common.UserError(f"row {k} of {args.eval_data!r}: column {args.column_wrong!r} has to hold a list of wrong answers, not {wrong!r:.60}")
    if args.column_wrong and not any(rows.column("wrong")):
        raise common.UserError(f"no row of {args.eval_data!r} has a wrong answer in column {args.column_wrong!r}; without --column-wrong the student's own are used")
    return rows


def count_given_away(rows: common.Rows) -> int:
    """Questions that hold their own answer as a word: in them the student's prompt is not free of it."""
    pairs = zip(rows.column("problem"), rows.column("answer"))
    return sum(re.search(rf"(?<!\w){re.escape(str(answer).strip())}(?!\w)", str(problem)) is not None for problem, answer in pairs)


def check_settings(args: Args, given: set[str]) -> None:
    """Stop at contradictions, and at flags that this run would ignore."""
    args.column_reference = args.column_reference or args.column_answer
    if not (args.weight_perception or args.weight_reasoning or args.weight_reference):
        raise common.UserError("--weight-perception, --weight-reasoning and --weight-reference are all 0: nothing would be learned")
    if min(args.weight_perception, args.weight_reasoning, args.weight_reference, args.clip) < 0:
        raise common.UserError("--weight-perception, --weight-reasoning, --weight-reference and --clip must not be negative")
    if args.updates > 1:
        raise common.UserError("--updates above 1 is not for this method: a divergence on old samples has no ratio that would mend it")
    if not 1 <= args.support <= 1024:
        raise common.UserError("--support must lie in [1, 1024]")
    if min(args.wrong_answers, args.wrong_samples) < 1:
        raise common.UserError("--wrong-answers and --wrong-samples must be at least 1")
    if args.palr and not args.eval_data:
        raise common.UserError("--palr measures on held-out questions: name them with --eval-data")
    if args.palr and args.column_reference != args.column_answer:
        raise common.UserError("--palr puts wrong answers in the place of the right one: --column-reference has to be --column-answer")
    trained = Path(args.student).parent / "args.json"
    if args.palr and not args.teacher and trained.exists():
        raise common.UserError(f"{args.student!r} was trained from {json.loads(trained.read_text())['student']!r}: name that with --teacher, "
                               "whose marks are measured")
    if args.conflict_data and not args.eval_data and not args.palr:
        if "conflict_data" in given:
            raise common.UserError("--conflict-data is evaluated whenever --eval-data is: name that as well")
        args.conflict_data = ""  # the preset's
    ignored = {"teacher": "the teachers are the frozen initial student (with --palr it names that, where --student is a trained one)"}
    if args.method == "opsd":
        ignored |= dict.fromkeys(("weight_perception", "weight_reasoning", "weight_reference", "fallback", "reasoning_prefix", "mark_end"),
                                 "--method opsd has one teacher for every token")
    else:
        ignored["divergence"] = "--method vigos has a forward and a reverse KL"
    if args.method != "opsd" or args.divergence != "top_k":
        ignored["support"] = "only --method opsd --divergence top_k has one"
    if not args.clip:
        ignored["clip_entries"] = "--clip is 0"
    elif args.method == "opsd" and args.divergence in ("top_k", "sampled"):
        ignored["clip_entries"] = f"--divergence {args.divergence} has no entries of the vocabulary"
    if args.method == "vigos" and not args.weight_reference:
        ignored["fallback"] = "--weight-reference is 0"
    if args.method == "vigos" and not args.weight_reasoning:
        ignored |= dict.fromkeys(("reasoning_prefix", "mark_end"), "--weight-reasoning is 0")
    if not args.conflict_data:
        ignored["column_position"] = "there is no --conflict-data"
    if args.palr:
        why = "--palr does not train, and reads the teachers of both methods in the paper's contexts"
        ignored = {f.name: why for f in dataclasses.fields(args) if f.name not in READ_BY_PALR}
    else:
        ignored |= dict.fromkeys(("wrong_answers", "column_wrong", "wrong_samples"), "only --palr needs wrong answers")
    if args.palr and args.column_wrong:
        ignored["wrong_samples"] = "--column-wrong holds the wrong answers"
    common.refuse_ignored(args, given, ignored)


def main() -> None:
    args, given = common.parse_args(Args, PRESETS)
    check_settings(args, given)
    if args.plan:
        return common.print_plan(args, args.student, 1, kept=1)
    common.start_distributed(args)
    run = common.Run("vigos", args)
    processor, told = common.Processor(args.student), {"reference": args.column_reference}
    check_tags(processor)
    shown = dict(flags={"reference": "--column-reference", "wrong": "--column-wrong"}, needed=("reference",))
    if args.palr:
        held_out, initial = load_leakage_rows(args, processor, told, shown), args.teacher or args.student
        common.check_same_inputs(processor, common.Processor(initial))
        return palr(common.load_models(dataclasses.replace(args, lora=0), processor, initial, 0), held_out, args, run)
    held_out, conflicts = common.load_rows(args, processor, {"question": question}, held_out=True), load_conflicts(args, processor)
    train = common.load_rows(args, processor, contexts(args), columns=told, **shown)
    steps = common.count_steps(args, train)
    models = common.load_models(args, processor, args.student, steps)

    run.begin(f"{args.method}, {steps} steps of {args.prompts} questions x {args.group} responses, on {common.world_size()} ranks; "
              f"{count_given_away(train)} of {len(train)} questions hold their own answer as a word")
    questions = common.Questions(train, args.prompts, args.seed)
    with common.Progress(run, steps, models, questions) as progress:
        progress.evaluate(models.engine, held_out, question, args, conflicts)
        for _ in progress:
            samples = rollout(questions.draw(), models, args)
            progress.samples(samples, args, rewarded=True)
            spans = common.mean_over_ranks(span_statistics(samples))
            progress.log(spans)
            if spans["out_of_form"] > 0.9:
                progress.note(f"{spans['out_of_form']:.0%} of the answers are out of form: almost nothing is learned of seeing and reasoning (see samples.jsonl)")
            progress.phase("rollout")
            micros = score(samples, models, args)
            progress.phase("score")
            weigh(micros, args)
            progress.log(update(micros, models, args))
            progress.phase("update")
            models.engine.sync(models.student.weights())
            progress.phase("sync")
            progress.evaluate(models.engine, held_out, question, args, conflicts)


if __name__ == "__main__":
    common.launch(main)
