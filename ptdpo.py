"""Privileged Tutoring Distillation (PTD-PO): a tutor that knows a hint corrects the answers that failed.

Paper: "Teaching the Way, Not the Answer: Privileged Tutoring Distillation for Multimodal Policy Optimization", arXiv:2606.07000.

    python ptdpo.py                                             a laptop: small real models on real handwriting
    torchrun --nproc-per-node 8 ptdpo.py --preset 2b --data rows-with-hints     one node: Qwen3-VL-2B-Thinking
    python ptdpo.py --make-hints --hint-model Qwen/Qwen3-VL-8B-Thinking --data rows.parquet     writes the hint column
    python ptdpo.py --analyze                                   what each kind of knowledge does to a tutor (Figures 3, 5)

The student answers from the question alone, G times. A frozen copy of the initial model reads the answers in two contexts:

    p      student,  question x                         what samples, and what is trained
    q^h    tutor,    question and hint [x; h]           the frozen model; it sees the image as well                Eq. 9
    ref    frozen,   question x                         the same model, for the KL term of GRPO

    rbar   the share of right answers in the group                                                                Eq. 7
    F      the tokens of wrong answers in groups with rbar < tau                                                  Eq. 8
    D      JSD(q~^h, p~) on the union of both Top-K sets and a tail bucket: kernels.topk_tail_divergence          Eq. 13-17

    loss = -J_GRPO + lambda * sum over F of D / |F|                                                               Eq. 11, 12

    J_GRPO, --optimizer    grpo     min(rho A, clip(rho) A) - beta KL(p || ref), k3 on the sampled tokens         Eq. 3
                           dapo     a wider upper clip, no KL, mean over tokens, groups that are all right or all wrong drawn anew
                           gspo     rho of the whole response (the mean of its tokens' log-ratios), no KL          Table 4

Where this differs from the paper, or from the code released with it:
 1. The released JSD detaches p as the weight and not in the mixture: its gradient is zero. Here it is Eq. 42's.
 2. The released support is the student's Top-K alone, with a uniform guess of the teacher's values. Here it is Eq. 14's union.
 3. The released tutor is given no image. Here it sees it (Eq. 9); --blind-tutor takes it away.
 4. The released code drops the reference KL on every answer of a failing group. Here it stays (Eq. 3); --drop-reference-kl.
 5. |F| counts the whole optimizer update, on all ranks. The released code averages within each micro-batch.
 6. GRPO averages over all tokens of the update, as the released code; Eq. 3 averages within each response first: --average response.
 7. r in Eq. 7 and 8 is the answer alone; the reward of the policy gradient is 0.9 answer + 0.1 format (Table 3).
 8. The released code adds a dual clip at 3; the paper does not have it, nor does this file. Clip 0.2 / 0.3 is the code's.
 9. beta of the KL estimates KL(p || ref) as in Eq. 3; the released scripts differ among themselves.
10. lambda is 0.05 for 2B and 8B and 0.5 for 4B, as in the released scripts (the paper: "5e-2, 5e-1").
11. The hints are not released. --make-hints is hints made by a model of yours, with our wording of the paper's three rules.
12. DAPO: every rank fills its own share of the batch. Where --draws draws do not, groups without an advantage do. Groups that it drops are
    not tutored either, as in the released code; its penalty for long responses is left out. An epoch counts steps, not draws.
13. Figure 3's KL is KL(context || question alone), in nats (the paper does not say which way).
14. The wording of the instruction and of the contexts is ours. Evaluation is greedy (paper: temperature 1: --eval-samples). Trained
    weights are float32, and weight decay spares norms and biases. Images keep the checkpoint's own limits of pixels (the released
    scripts: 200,704 to 1,003,520: change the checkpoint's preprocessor_config.json for those).
"""

import json
import math
import re
from dataclasses import dataclass, fields
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import common
from kernels import topk_tail_divergence

# ====================================================================================================== settings
HUB = dict(data="PAPOGalaxy/PAPO_ViRL39K_train", eval_data="", epochs=2, prompts=384, updates=3, group=8, top_p=0.99, max_prompt=8192,
           max_response=4096, lr=1e-6, micro_tokens=16384, gradient_checkpointing=True, save_every=50)  # Table 3
PRESETS = {
    "toy": dict(student="toy/student", data="toy/train", eval_data="toy/test", prompts=32, group=8, max_steps=200, lambda_ptd=0.5, lr=1e-3,
                warmup=5, schedule="linear", dtype="float32", rollout_batch=256, eval_every=25, eval_rows=400),
    "2b": dict(student="Qwen/Qwen3-VL-2B-Thinking", **HUB),
    "4b": dict(student="Qwen/Qwen3-VL-4B-Thinking", lambda_ptd=0.5, **HUB),
    "8b": dict(student="Qwen/Qwen3-VL-8B-Thinking", **HUB | dict(max_prompt=4096)),
    "ablation": dict(student="Qwen/Qwen3-VL-4B-Thinking", lambda_ptd=0.5, **HUB | dict(group=5, max_response=2048)),
}
OPTIMIZERS = {  # what each of them sets, where no flag does
    "grpo": dict(clip_low=0.2, clip_high=0.3, kl=1e-2, average="token"),
    "dapo": dict(clip_low=0.2, clip_high=0.28, kl=0.0, average="token"),
    "gspo": dict(clip_low=3e-4, clip_high=4e-4, kl=0.0, average="response"),
}


@dataclass
class Args(common.Args):
    optimizer: Literal["grpo", "dapo", "gspo"] = "grpo"  # policy gradient, see the top of ptdpo.py
    lambda_ptd: float = 0.05  # lambda: weight of the tutoring loss (Eq. 12); 0 = the policy gradient alone
    tau: float = 1.0  # groups whose share of right answers is below this are tutored (Eq. 8); the paper also tries 0.2 and 0.4
    tutor_all: bool = False  # tutor every answer, not only the wrong ones of such groups (the paper's "all trajectories")
    tutor_context: Literal["hint", "question", "answer", "solution"] = "hint"  # what the tutor knows; solution: and the answer
    divergence: Literal["jsd", "forward_kl", "reverse_kl"] = "jsd"  # forward: KL(tutor || student), reverse: KL(student || tutor)
    support: int = 100  # K: tokens of each Top-K set (Eq. 14)
    average: Literal["token", "response"] | None = None  # the policy gradient's mean: over tokens, or within each response first; None: gspo response, else token
    clip_low: float | None = None  # the probability ratio is clipped below 1 - clip_low; None: gspo 3e-4, else 0.2
    clip_high: float | None = None  # and above 1 + clip_high; None: grpo 0.3, dapo 0.28, gspo 4e-4
    kl: float | None = None  # beta: weight of KL(student || frozen initial model) (Eq. 3); None: grpo 0.01, else 0
    draws: int = 4  # dapo draws questions at most so often to fill a batch with groups that are neither all right nor all wrong
    blind_tutor: bool = False  # the released code's tutor: the image left out
    drop_reference_kl: bool = False  # the released code's habit: no KL on the answers of groups below tau
    column_hint: str = "hint"  # name of the column with the hint
    column_solution: str = "solution"  # name of the column with the worked solution, for --tutor-context solution
    analyze: bool = False  # no training: what each tutor context does to the initial model on --eval-rows questions (Figures 3, 5)
    make_hints: bool = False  # no training: write --data with a hint column to --output (runs/hints); goes on where it stopped
    hint_model: str = ""  # checkpoint that writes the hints
    hint_endpoint: str = ""  # or the URL of an OpenAI-compatible endpoint (.../v1; key in OPENAI_API_KEY) that serves --hint-model
    hint_attempts: int = 3  # times a hint is written anew after the check rejected it


DATA = ("preset", "output", "seed", "timeout", "engine", "tensor_parallel", "vllm_memory", "dtype", "rollout_batch", "max_response",
        "temperature", "skip_bad_rows", "column_problem", "column_images", "column_answer", "column_hint", "column_solution")
READ_BY_HINTS = (*DATA, "make_hints", "hint_model", "hint_endpoint", "hint_attempts", "data", "data_split", "max_prompt")
READ_BY_ANALYSIS = (*DATA, "analyze", "student", "eval_data", "eval_split", "eval_rows", "group", "blind_tutor", "top_p", "top_k", "micro_tokens",
                    "loss_chunk", "max_prompt")


def uses_tutor(args: Args) -> bool:
    return args.lambda_ptd > 0


# ====================================================================================================== contexts
KNOWLEDGE = {"question": (), "answer": ("answer",), "hint": ("hint",), "solution": ("solution", "answer")}  # what a tutor knows
INSTRUCTION = "Think inside <think></think>. Then put the final answer in \\boxed{}."


def ask(row: dict, knowledge: str = "", blind: bool = False) -> common.Context:
    images = [] if blind else row["images"]
    return common.Context([common.user_message(f"{row['problem']}{knowledge}\n\n{INSTRUCTION}", len(images))], images)


def question(row: dict) -> common.Context:
    """x: what the student samples under and is trained in."""
    return ask(row)


def tutored(row: dict, knows: str, blind: bool = False) -> common.Context | None:
    """[x; h]: the question with what the tutor knows behind it; None where the row does not have it."""
    needed = KNOWLEDGE[knows]
    if not all(str(row.get(key) or "").strip() for key in needed):
        return None
    knowledge = {"question": "", "hint": "\n\nHint: {hint}", "answer": "\n\nThe answer is {answer}.",
                 "solution": "\n\nReference solution: {solution}\nThe answer is {answer}."}[knows]
    return ask(row, knowledge.format(**{key: common.one_answer(row[key]).strip() for key in needed}), blind)


def contexts(args: Args) -> dict:
    """The contexts that this run reads responses in, by name; the first is the one they are sampled under."""
    views = {"question": question}
    return views | ({"tutor": lambda row: tutored(row, args.tutor_context, args.blind_tutor)} if uses_tutor(args) else {})


# ====================================================================================================== losses
def well_formed(text: str) -> bool:
    """One thought, then a boxed answer. Thinking templates open <think> themselves, so it may be missing.

    "<think>2 + 2</think> \\boxed{4}" -> True   "2 + 2</think> \\boxed{4}" -> True   "\\boxed{4}" -> False
    """
    thought, closed, rest = text.partition("</think>")
    tags = ("<think>", "</think>")
    nested = any(tag in part for tag in tags for part in (thought.lstrip().removeprefix("<think>"), rest))
    return bool(closed) and not nested and common.boxed(rest) is not None


def route(correct: list[bool], group: int, tau: float) -> tuple[list[bool], list[bool]]:
    """Eq. 7, 8: which responses are in a group below tau, and which of those failed. `group` consecutive responses a question.

    group 2, tau 1, correct = [1, 1, 0, 1, 0, 0]  ->  [0, 0, 1, 1, 1, 1], [0, 0, 1, 0, 1, 1]     tau 0.5: the last group alone
    """
    means = [sum(correct[i : i + group]) / group for i in range(0, len(correct), group)]
    below = [mean < tau for mean in means for _ in range(group)]
    return below, [b and not right for b, right in zip(below, correct)]


def terms(z: Tensor, *tensors: Tensor, args: Args) -> tuple[Tensor, ...]:
    """TERMS per token, [n] each. z [n, V] student; [y [m, V] tutor, of the first m <= n tokens]; ids, old, reference, advantage [n]."""
    *tutor, ids, old, reference, advantage = tensors
    log_p = z.log_softmax(-1)
    chosen, zero = common.gather(log_p, ids), torch.zeros_like(advantage)
    old = torch.where(old.isnan(), chosen.detach(), old)
    ratio = (chosen.detach() - old).exp()
    clipped = torch.where(advantage > 0, ratio > 1 + args.clip_high, ratio < 1 - args.clip_low) & (advantage != 0)
    surrogate = common.clipped_surrogate(chosen, old, advantage, args.clip_low, args.clip_high)  # Eq. 3
    drift = common.k3(chosen, reference) if args.kl else zero
    tutoring = student_tail = tutor_tail = gap = zero
    if tutor:
        m = len(tutor[0])
        value, metrics = topk_tail_divergence(z[:m], tutor[0], args.support, args.divergence, return_metrics=True)  # Eq. 13-17
        fill = (0, len(z) - m)
        tutoring, student_tail, tutor_tail, gap = (F.pad(x, fill) for x in (
            value, metrics["student_tail"], metrics["teacher_tail"], metrics["gap_bound"]))  # fmt: skip
    return surrogate, drift, tutoring, student_tail, tutor_tail, gap, clipped.to(z.dtype), chosen, common.entropy(log_p.detach())


TERMS = ("surrogate", "kl", "ptd", "student_tail", "tutor_tail", "gap", "clipped", "log_p", "entropy")  # the first three carry weight


# ====================================================================================================== rollout
@dataclass
class Sample(common.Sample):
    failing: bool = False  # in a group below tau
    tutored: bool = False  # its tokens are in F


def rollout(draw, models: common.Models, args: Args) -> tuple[list[Sample], dict]:
    """The student answers this rank's questions (draw() gives the next ones) from the question alone; failures are routed.

    Returns the responses, and what is worth knowing of all groups that were drawn.
    """
    wanted, groups, dapo = args.prompts // common.world_size(), [], args.optimizer == "dapo"
    for draws in range(1, args.draws + 1 if dapo else 2):
        new = common.sample_responses(models.engine, draw(), contexts(args), args, Sample)
        common.reward_answers(new, args.group, well_formed, 0.1)
        below, failed = route([s.correct for s in new], args.group, args.tau)
        for s, in_failing_group, fails in zip(new, below, failed):
            s.failing = in_failing_group
            s.tutored = (fails or args.tutor_all) and "tutor" in s.prompts
        groups += common.split(new, len(new) // args.group)
        informative = [i for i, group in enumerate(groups) if 0 < sum(s.correct for s in group) < args.group]
        if min(common.all_gather_object(len(informative))) >= wanted:  # every rank draws equally often
            break
    log = group_statistics([s for group in groups for s in group], args) | ({"draws": draws} if dapo else {})
    chosen = informative + [i for i in range(len(groups)) if i not in set(informative)] if dapo else range(len(groups))
    return [s for i in sorted(chosen[:wanted]) for s in groups[i]], log  # as drawn, so that every update gets some of both


# ====================================================================================================== score
@dataclass
class Micro(common.Micro):
    response: Tensor | None = None  # [n] number of the response within the micro-batch
    reference: Tensor | None = None  # [n] the frozen model's log-prob of the token, in the student's context
    failing: Tensor | None = None  # [n] whether the token's group is below tau


def score(samples: list[Sample], models: common.Models, args: Args) -> list[Micro]:
    """The frozen model reads every response once, and the failed ones a second time as the tutor. Hidden states, never logits."""
    micros = common.make_micros(Micro, samples, ["question"], models.processor, args.micro_tokens, first=lambda s: s.tutored)
    for m in micros:

        def log_probs(hidden, head):
            return common.response_log_probs(hidden, head, m.ids, models.vocab, args.loss_chunk)

        lengths = [len(s.response.ids) for s in m.samples]
        m.response = common.per_token(lengths, list(range(len(lengths))), torch.long)
        m.failing = common.per_token(lengths, [float(s.failing) for s in m.samples])
        m.reference = torch.full_like(m.old, math.nan)
        part = [s for s in m.samples if s.tutored]
        with torch.no_grad():
            if args.kl:
                m.reference = log_probs(models.teacher(m.batch), models.head)
            if uses_tutor(args):  # a rank without failures takes part all the same: the model is sharded
                prompts = [s.prompts["tutor"] for s in part] or [models.processor.blank(not args.blind_tutor)]
                m.teacher = [models.teacher(models.processor.batch(prompts, [s.response.ids for s in part] or [[]]))]  # [m, H]
            if args.updates > 1:  # later updates need the policy that sampled, not their own
                m.old = models.student(m.batch, log_probs)
    return micros


# ====================================================================================================== weigh
def weigh(micros: list[Micro], args: Args) -> None:
    """One weight per token and term; tokens, responses and |F| are counted over the whole update and all ranks."""
    counts = torch.stack([torch.stack([torch.ones_like(m.length).sum(), (1 / m.length).sum(), m.length.new_tensor(tutored_tokens(m))])
                          for m in micros]).sum(0)
    tokens, responses, failed = common.all_sum(counts)  # T tokens of 1 / T: each response counts 1
    for m in micros:
        mean = 1 / tokens.expand(len(m.ids)) if args.average == "token" else 1 / (m.length * responses.round())  # [n]
        m.weights = torch.zeros(len(TERMS), len(m.ids), device=mean.device)
        m.weights[0] = -mean  # Eq. 12 minimises what Eq. 3 maximises
        m.weights[1] = args.kl * mean * (1 - m.failing if args.drop_reference_kl else 1)
        m.weights[2, : tutored_tokens(m)] = args.lambda_ptd / failed.clamp(min=1)  # Eq. 11; 0 / 0 is 0


def tutored_tokens(m: Micro) -> int:
    """How many tokens of the micro-batch are in F: its first ones."""
    return sum(len(s.response.ids) for s in m.samples if s.tutored)


# ====================================================================================================== update
def accumulate(micros: list[Micro], models: common.Models, args: Args) -> None:
    """student.grad += gradient of the sum over micro-batches, terms and tokens of weight * term. One forward pass each."""
    for m in micros:

        def loss_fn(hidden, head):
            old = m.old
            if args.optimizer == "gspo" and args.updates > 1:  # a response's ratio needs all its tokens before any gradient
                now = common.response_log_probs(hidden, head, m.ids, models.vocab, args.loss_chunk)
                old = common.sequence_old(now, old, m.length, m.response)
            return common.vocab_loss(lambda *tensors: terms(*tensors, args=args), m.weights, [hidden], head, [(h, models.head) for h in m.teacher],
                                     [m.ids, old, m.reference, m.advantage], models.vocab, args.loss_chunk)

        loss, m.terms = models.student(m.batch, loss_fn)
        (loss * common.world_size()).backward()  # FSDP2 averages over ranks; the weights already hold the divisor


def update(micros: list[Micro], models: common.Models, args: Args) -> dict:
    """One optimizer step, and what it is worth knowing about it."""
    accumulate(micros, models, args)
    stepped = common.clip_and_step(models, micros, TERMS, args.grad_clip)
    return stepped | statistics(micros, args)


def statistics(micros: list[Micro], args: Args) -> dict:
    """Means over one update's tokens on all ranks; those of the tutor over F."""
    named = dict(zip(TERMS, torch.cat([m.terms for m in micros], dim=-1)))  # [N] each
    length = torch.cat([m.length for m in micros])
    gap = common.sampler_gap(micros, named["log_p"])
    everywhere = {"entropy": named["entropy"], "clipped": named["clipped"], "sampler_gap": gap} | ({"kl": named["kl"]} if args.kl else {})
    in_f = {"ptd": "ptd", "student_tail": "student_tail", "tutor_tail": "tutor_tail", "ptd_gap_bound": "gap"} if uses_tutor(args) else {}
    failed = length.new_tensor(sum(tutored_tokens(m) for m in micros))
    sums = [torch.ones_like(length).sum(), (1 / length).sum(), failed, *(x.sum() for x in everywhere.values()), *(named[key].sum() for key in in_f.values())]
    tokens, responses, failed, *rest = common.all_sum(torch.stack(sums)).tolist()
    log = {"response_length": tokens / responses} | {key: x / tokens for key, x in zip(everywhere, rest)}
    tutoring = {key: x / max(failed, 1) for key, x in zip(in_f, rest[len(everywhere) :])}
    return log | ({"tutored_tokens": failed / tokens} | tutoring if in_f else {})


def group_statistics(samples: list[Sample], args: Args) -> dict:
    """Figure 2: the shares of groups that are all wrong, informative and all right; and of responses without a hint."""
    right = [sum(s.correct for s in group) for group in common.split(samples, len(samples) // args.group)]
    values = {"all_fail": [m == 0 for m in right], "informative": [0 < m < args.group for m in right], "all_pass": [m == args.group for m in right],
              "correct": [s.correct for s in samples], "well_formed": [well_formed(s.response.text) for s in samples],
              "with_advantage": [s.advantage != 0 for s in samples]}
    if uses_tutor(args):
        values["without_" + args.tutor_context] = ["tutor" not in s.prompts for s in samples]
    return common.mean_over_ranks(values)


# ====================================================================================================== analysis (Figures 3, 5)
def shifts(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Logits [n, V] of each context, the question's first, and ids [n] -> the token's NLL in each, then KL(context || question)."""
    *logits, ids = tensors
    log_q = [z.log_softmax(-1) for z in logits]
    return *(-common.gather(x, ids) for x in log_q), *(common.kl(x, log_q[0]) for x in log_q)


def pass_at(n: int, right: int, group: int) -> float:
    """The chance that n of the `group` answers, drawn without putting back, hold one of the `right` right ones."""
    return 1 - math.comb(group - right, n) / math.comb(group, n)


def analyze(models: common.Models, rows: common.Rows, args: Args, run: common.Run) -> None:
    """What each tutor context does to the initial model: how it reads the student's answers (Figure 3), and its own answers (5)."""
    views = {name: lambda row, name=name: tutored(row, name, args.blind_tutor and name != "question") for name in KNOWLEDGE}
    mine = [rows[i] for i in range(common.rank(), len(rows), common.world_size())]
    mine = [row for row in mine if all(view(row) for view in views.values())]
    count = sum(common.all_gather_object(len(mine)))
    if count == 0:
        raise common.UserError(f"no row of {rows.name!r} has a hint, a solution and an answer")
    run.begin(f"{len(KNOWLEDGE)} tutor contexts on {count} held-out questions x {args.group} responses ({len(rows) - count} without hint or solution)")
    answers = {}
    for name in KNOWLEDGE:
        seen = views if name == "question" else {name: views[name]}  # the answers to the question alone are read in every context
        answers[name] = common.sample_responses(models.engine, mine, seen, args)
        common.reward_answers(answers[name], args.group)
    sums = torch.zeros(2 * len(KNOWLEDGE) + 1, device=common.device())
    for m in common.make_micros(Micro, answers["question"], list(KNOWLEDGE), models.processor, args.micro_tokens):
        with torch.no_grad():
            pairs = [(hidden, models.head) for hidden in m.by_context(models.teacher(m.batch))]
        sums[:-1] += common.vocab_terms(shifts, pairs, [m.ids], models.vocab, args.loss_chunk).sum(-1)
        sums[-1] += len(m.ids)
    *means, tokens = common.all_sum(sums).tolist()
    ns = [n for n in (1, 2, 4, 8, 16, 32) if n <= args.group]
    table, failed = [], []
    for i, name in enumerate(KNOWLEDGE):
        mean = common.mean_over_ranks({"length": [len(s.response.ids) for s in answers[name]]})
        right = [sum(s.correct for s in answers[name][j : j + args.group]) for j in range(0, len(answers[name]), args.group)]
        right = [count for part in common.all_gather_object(right) for count in part]
        failed = failed or [count == 0 for count in right]
        hard = [count for count, f in zip(right, failed) if f]
        table.append({"context": name, "delta_nll": (means[i] - means[0]) / tokens, "kl": means[len(KNOWLEDGE) + i] / tokens, **mean,
                      **{f"pass@{n}": sum(pass_at(n, count, args.group) for count in right) / len(right) for n in ns},
                      "hard": len(hard), "hard_none": sum(c == 0 for c in hard), "hard_some": sum(0 < c < args.group for c in hard),
                      "hard_all": sum(c == args.group for c in hard)})
    common.say("\n" + " ".join(key.rjust(9) for key in table[0]))
    for line in table:
        common.say(" ".join((f"{x:.3f}" if isinstance(x, float) else str(x)).rjust(9) for x in line.values()))
    if common.rank() == 0:
        (run.path / "contexts.json").write_text(json.dumps(table, indent=2) + "\n")
        print(f"hard: questions that the initial model never answers; written to {run.path / 'contexts.json'}")


# ====================================================================================================== hints (--make-hints)
RULES = """You write a hint for a student who sees the image and the question, and does not know the answer. You know it.
Two lines, in this form, 20 to 120 words in all, as short commands:
Look: where in the image the evidence is, what belongs together, and what there is a distraction to be ignored.
Think: the steps from that evidence to the answer, in order, and the trap in them.
Be right: following the hint leads to the given answer. Give nothing away: not the answer, not its letter or its name, no number that has to
be read off or worked out. Do not solve the question."""


def hint_prompt(row: dict, fault: str | None) -> common.Context:
    """(I, q, a*): what the writer of a hint is shown; fault: why its last hint for this row was rejected."""
    again = f"\n\nYour last hint was rejected: {FAULTS[fault]}." if fault else ""
    text = f"{row['problem']}\n\nThe answer, for you alone: {row['answer']}{again}"
    return common.Context([{"role": "system", "content": RULES}, common.user_message(text, len(row["images"]))], row["images"])


FAULTS = {
    "refused": "the endpoint refused the request",
    "cut off": "it was too long to be finished",
    "form": "it has to be a line 'Look: ...' and a line 'Think: ...'",
    "evidence": "the 'Look' part has to name the visual evidence",
    "solution": "it was a whole solution",
    "answer": "it contained the answer",
    "option": "it named the right option",
    "number": "it contained a number that has to be read off or worked out",
}
UNITS = "zero _ two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
TENS = "_ _ twenty thirty forty fifty sixty seventy eighty ninety".split()
SPELLED = {word: i for i, word in enumerate(UNITS)} | {word: 10 * i for i, word in enumerate(TENS)}  # not "one": it is a pronoun as well
SPELLED |= {f"{ten}-{one}": 10 * i + j for i, ten in enumerate(TENS) for j, one in enumerate(["", "one", *UNITS[2:10]])}
FIGURE = r"\d+(?:\.\d+)?(?:/\d+)?"


def words(text: str) -> list[str]:
    r"""Words and numbers, without case and markup: "$\frac{1}{2}$ of Forty-seven, 0.5" -> ["1/2", "of", "47", "1/2"]."""
    text = re.sub(r"\\[dt]?frac\s*\{(\w+)\}\s*\{(\w+)\}", r"\1/\2", re.sub(r"(?<=\d),(?=\d{3}\b)", "", text))
    text = re.sub(r"\\(?:text|mathrm|boxed)\b", " ", re.sub(r"\\sqrt\b", "√", text))
    found = re.findall(rf"{FIGURE}|[^\W\d_]+(?:-[^\W\d_]+)?|√", text.casefold())
    return [part for word in found for part in ([str(SPELLED[word])] if word in SPELLED else [str(common.as_number(word) or 0)] if word[0].isdigit()
                                                else word.split("-"))]


def occurs(part: list[str], whole: list[str]) -> bool:
    return bool(part) and any(whole[i : i + len(part)] == part for i in range(len(whole) - len(part) + 1))


def gives(part: list[str], said: list[str], asked: list[str]) -> bool:
    """Whether `part` is said otherwise than in a phrase of the question: "2" in "the 2 rows" is no spoiler if "2 rows" is asked about."""
    n = len(part)

    def quoted(i: int) -> bool:  # with the word before it, or the one behind it
        before, behind = said[i - 1 : i + n] if i else [], said[i : i + n + 1] if i + n < len(said) else []
        return occurs(before, asked) or occurs(behind, asked)

    return bool(part) and any(said[i : i + n] == part and not quoted(i) for i in range(len(said) - n + 1))


def options_of(problem: str) -> tuple[str, dict[str, str]]:
    """The question before its options, and the text of each: "How far? (A) 5 (B) 6" -> "How far? ", {"A": "5", "B": "6"}."""
    labels = list(re.finditer(r"(?:(?<=\s)|(?<=^))\(?([A-J])[).:]\s+", problem))
    first = max((i for i, label in enumerate(labels) if label[1] == "A"), default=len(labels))
    ends = [label.start() for label in labels[first + 1 :]] + [len(problem)]
    found = {label[1]: problem[label.end() : end].strip().split("\n")[0] for label, end in zip(labels[first:], ends)}
    return problem[: labels[first].start()] if found else problem, found


def names_option(letter: str, hint: str) -> bool:
    either = letter if letter in "AI" else f"[{letter}{letter.lower()}]"  # "choose a point" does not choose A
    cue = r"(?i:\b(?:options?|choices?|letters?|answers?|choose|pick|select|correct)\b(?:[^\w.\n]+(?:is|one|be|must|the|answer|choice|option|letter|to)\b)*)"
    return re.search(rf"{cue}[^\w.\n]+{either}\b|\({either}\)", hint) is not None


def numbered_steps_removed(hint: str) -> str:
    """ "1. count 2. add" -> " count  add": the marks of steps 1, 2, 3, ... in order are no numbers of the solution."""
    for step in range(1, 10):
        hint, found = re.subn(rf"(?<![\w.]){step}[.)]\s", " ", hint, count=1)
        if not found:
            break
    return hint


def hint_fault(hint: str, row: dict, finished: bool = True) -> str | None:
    """The first of FAULTS that a hint has, or None. Phrases and numbers of the question are no spoilers.

    answer 47: "Think: 47 remain" -> answer;   solution "40 + 7 = 47": "Think: add 7" -> number;   answer B: "Look at (B)" -> option
    """
    if isinstance(row["answer"], list):  # each of them is a spoiler
        return next((fault for one in row["answer"] if (fault := hint_fault(hint, row | {"answer": one}, finished))), None)
    hint = numbered_steps_removed(hint)
    if not finished:
        return "cut off"
    look, _, think = hint.partition("Think:")
    if not (look.lstrip().startswith("Look:") and look.strip() != "Look:" and think.strip()):
        return "form"
    said, asked = words(hint), words(row["problem"])
    if len(words(look)) - 1 < 4:  # without the word "look"
        return "evidence"
    solution, answer = str(row.get("solution") or ""), str(row["answer"])
    steps = words(solution)
    copied = any(occurs(steps[i : i + 8], said) and not occurs(steps[i : i + 8], asked) for i in range(len(steps) - 7))
    if len(said) > 200 or "\\boxed" in hint or copied:
        return "solution"
    gold = common.plain(common.extract_answer(answer) or answer)
    if letter := common.as_option(gold):
        stem, options = options_of(row["problem"])
        if names_option(letter, hint) or gives(words(options.get(letter, "")), said, words(stem)):
            return "option"
    else:
        target = words(gold)
        figures = [x for x in target if x[0].isdigit()]
        if target in (["yes"], ["no"], ["true"], ["false"]):  # ordinary words, until they are called the answer
            if occurs(["answer", "is", *target], said) or occurs(["answer", *target], said):
                return "answer"
        elif gives(target, said, asked) or len(figures) == 1 and gives(figures, said, asked):  # "8 cm" is told by 8
            return "answer"
    numbers = {str(common.as_number(x)) for x in re.findall(FIGURE, hint)} - set(asked)
    if numbers & set(steps) or any(len(x) > 1 for x in numbers):  # without a solution at hand: single digits count things
        return "number"
    return None


def make_hints(args: Args) -> None:
    """Writes a hint for every row, checks it, asks again where it is rejected; rows that never get one keep an empty hint.

    A start that finds hints goes on with the rows that have none, also with another model (the paper has one for hard rows).
    """
    columns = {"problem": args.column_problem, "images": args.column_images, "answer": args.column_answer}
    columns |= {"solution": args.column_solution} if args.column_solution != Args.column_solution else {}  # "solution" is read where it is there
    rows = common.Rows(args.data, args.data_split, columns)
    reader = None if args.hint_endpoint else common.Processor(args.hint_model)
    rows.check(args.skip_bad_rows, reader.patch if reader else 1, True, lambda row: reader.complaint(hint_prompt(row, None), args.max_prompt) if reader else None)
    store = common.Records(args.output or "runs/hints", {"data": args.data, "data_split": args.data_split} | columns)
    before = {record["row"]: record["hint"] for record in sorted(store.all(), key=lambda record: bool(record["hint"]))}
    pending = [i for i in range(len(rows)) if not before.get(rows.kept[i])][common.rank() :: common.world_size()]
    common.say(f"hints for {len(rows)} rows, {sum(map(bool, before.values()))} of them written before, up to {args.max_response} tokens each; to {store.folder}")
    write = common.writer(args.hint_model, args.hint_endpoint, args)
    for picked in store.batches(pending, args.rollout_batch, "hints"):
        batch = [rows[i] for i in picked]
        records = [{"row": row["index"], "hint": "", "model": args.hint_model, "faults": []} for row in batch]
        for _ in range(1 + args.hint_attempts):
            todo = [i for i, record in enumerate(records) if not record["hint"]]
            answers = write([hint_prompt(batch[i], records[i]["faults"][-1] if records[i]["faults"] else None) for i in todo])
            for i, (text, finished) in zip(todo, answers):
                hint = (text or "").rpartition("</think>")[2].strip()
                fault = "refused" if text is None else hint_fault(hint, batch[i], finished)
                records[i] |= {"faults": [*records[i]["faults"], fault]} if fault else {"hint": hint}
        store.add(records)
    done = {record["row"]: record for record in sorted(store.all(), key=lambda record: bool(record["hint"]))}  # a row with a hint keeps it
    if common.rank() == 0:
        data = rows.data.select(rows.kept)
        column = [done[k]["hint"] for k in rows.kept]
        data = data.remove_columns([args.column_hint] if args.column_hint in data.column_names else []).add_column(args.column_hint, column)
        data.to_parquet(store.folder / "rows.parquet")
        kept, regenerated = (sum(bool(r["hint"]) and bool(r["faults"]) == again for r in done.values()) for again in (False, True))
        rejected = {name: sum(r["faults"].count(name) for r in done.values()) for name in FAULTS}
        if not kept + regenerated:
            print("no hint was kept: look at the rejections, and at what the model writes")
        print(f"{kept} kept at once, {regenerated} after writing anew, {len(done) - kept - regenerated} dropped (empty hint); rejections: "
              + ", ".join(f"{name} {count}" for name, count in rejected.items()) + f"\nwritten to {store.folder / 'rows.parquet'}")


# ====================================================================================================== main
def check_settings(args: Args, given: set[str]) -> None:
    """Fill in what the optimizer decides; stop at contradictions, and at flags that this run would ignore."""
    for name, value in OPTIMIZERS[args.optimizer].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.group < 2:
        raise common.UserError("GRPO compares the responses to one question with each other: set --group to at least 2")
    if min(args.lambda_ptd, args.kl, args.clip_low, args.clip_high) < 0 or args.clip_low >= 1:
        raise common.UserError("--lambda-ptd, --kl, --clip-low and --clip-high must not be negative, and --clip-low must be below 1")
    if not 0 < args.tau <= 1:
        raise common.UserError(f"--tau is {args.tau}; it must lie in (0, 1]: 1 tutors every failed answer")
    if not 1 <= args.support <= 1024 or args.draws < 1:
        raise common.UserError("--support must lie in [1, 1024], and --draws must be at least 1")
    if args.average != OPTIMIZERS[args.optimizer]["average"] and args.optimizer != "grpo":
        mean = OPTIMIZERS[args.optimizer]["average"]
        raise common.UserError(f"--average {args.average} contradicts --optimizer {args.optimizer}, whose mean is over {mean}s")
    if args.make_hints and not args.hint_model:
        raise common.UserError("--make-hints needs a model that writes them: --hint-model, and --hint-endpoint where another process serves it")
    if args.hint_endpoint and not args.hint_endpoint.startswith(("http://", "https://")):
        raise common.UserError(f"--hint-endpoint is {args.hint_endpoint!r}; it has to begin with http:// or https://")
    if args.hint_attempts < 0:
        raise common.UserError("--hint-attempts must not be negative")
    if args.analyze and (args.make_hints or not args.eval_data):
        raise common.UserError("--analyze needs held-out questions (--eval-data), and goes without --make-hints")
    if args.make_hints and "max_response" not in given:
        args.max_response = 16384  # the paper's budget for a hint, thinking included; a preset's is for the student's answers
    ignored = {"teacher": "the tutor is the frozen initial student"}
    if not args.make_hints:
        ignored |= dict.fromkeys(("hint_model", "hint_endpoint", "hint_attempts"), "only --make-hints writes hints")
    if args.make_hints or args.analyze:
        mode, read = ("--make-hints", READ_BY_HINTS) if args.make_hints else ("--analyze", READ_BY_ANALYSIS)
        ignored |= {f.name: f"{mode} does not read it" for f in fields(args) if f.name not in read}
        if args.hint_endpoint:
            ignored |= dict.fromkeys(("max_prompt", "engine", "tensor_parallel", "vllm_memory"), "--hint-endpoint has an engine of its own")
        return common.refuse_ignored(args, given, ignored)
    if args.optimizer != "dapo":
        ignored["draws"] = f"--optimizer {args.optimizer} draws once"
    if not uses_tutor(args):
        ignored |= dict.fromkeys(("tutor_all", "tutor_context", "divergence", "support", "blind_tutor", "column_hint"), "--lambda-ptd is 0")
    elif args.tutor_context != "hint":
        ignored["column_hint"] = f"--tutor-context {args.tutor_context} shows no hint"
    if args.tutor_context != "solution":
        ignored["column_solution"] = "only --tutor-context solution shows it"
    if not args.kl:
        ignored["drop_reference_kl"] = "--kl is 0"
    if not (args.kl and args.drop_reference_kl) and (args.tutor_all or not uses_tutor(args)):
        ignored["tau"] = "--tutor-all tutors every answer" if args.tutor_all else "--lambda-ptd is 0"
    if args.updates == 1:
        ignored |= common.CLIPS
    common.refuse_ignored(args, given, ignored)


def main() -> None:
    args, given = common.parse_args(Args, PRESETS)
    check_settings(args, given)
    if args.plan:
        return common.print_plan(args, args.student if uses_tutor(args) or args.kl else None, 1, kept=1)
    common.start_distributed(args)
    if args.make_hints:
        return make_hints(args)
    run = common.Run("ptdpo", args)
    processor = common.Processor(args.student)
    columns = {"hint": args.column_hint, "solution": args.column_solution}
    if args.analyze:
        views = {name: lambda row, name=name: tutored(row, name) for name in KNOWLEDGE}
        held_out = common.load_rows(args, processor, views, held_out=True, columns=columns)
        return analyze(common.load_models(args, processor, args.student, 0), held_out, args, run)
    extra = {name: columns[name] for name in columns if uses_tutor(args) and args.tutor_context == name}
    held_out = common.load_rows(args, processor, {"question": question}, held_out=True)
    try:
        train = common.load_rows(args, processor, contexts(args), columns=extra)
    except common.UserError as e:
        if "hint" not in extra or f"no column {args.column_hint!r}" not in e.message:
            raise
        raise common.UserError(f"{e.message}; write hints with --make-hints; or go without: --tutor-context answer, or --lambda-ptd 0") from None
    hints = sum(bool(str(hint or "").strip()) for hint in train.data.select(train.kept)[args.column_hint]) if "hint" in extra else 0
    if "hint" in extra and not hints:
        raise common.UserError(f"none of the {len(train)} rows of {args.data!r} has a hint in column {args.column_hint!r}: there is nothing to tutor with")
    steps = common.count_steps(args, train)
    models = common.load_models(args, processor, args.student if uses_tutor(args) or args.kl else None, steps * args.updates)
    if args.support > models.vocab:
        raise common.UserError(f"--support {args.support} is more than the {models.vocab} tokens of the vocabulary")

    run.begin(f"{args.optimizer} (clip {args.clip_low}/{args.clip_high}, kl {args.kl}, mean over {args.average}s), lambda {args.lambda_ptd}{f', hints for {hints} of {len(train)} rows' * ('hint' in extra)}, {steps} steps of "
              f"{args.prompts} questions x {args.group} responses in {args.updates} updates, "
              f"{args.prompts * args.group // args.updates} responses an update, on {common.world_size()} ranks")
    questions = common.Questions(train, args.prompts, args.seed, args.updates)
    with common.Progress(run, steps, models, questions) as progress:
        progress.evaluate(models.engine, held_out, question, args)
        for step in progress:
            samples, groups = rollout(questions.draw, models, args)
            progress.samples(samples, args, rewarded=True)
            progress.log(groups)
            if groups["with_advantage"] == 0:
                progress.note("in every group all rewards are equal: the policy gradient is zero" + ", only the tutor teaches" * uses_tutor(args))
            progress.phase("rollout")
            parts = [score(part, models, args) for part in common.split(samples, args.updates)]
            progress.phase("score")
            for micros in parts:
                weigh(micros, args)
                progress.log(update(micros, models, args))
            progress.phase("update")
            models.engine.sync(models.student.weights())
            progress.phase("sync")
            progress.evaluate(models.engine, held_out, question, args)


if __name__ == "__main__":
    common.launch(main)
