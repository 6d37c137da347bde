"""Privileged Tutoring Distillation (PTD-PO): a tutor that knows a hint corrects the answers that failed.

Paper: "Teaching the Way, Not the Answer: Privileged Tutoring Distillation for Multimodal Policy Optimization",
arXiv:2606.07000.

    python ptdpo.py                                    a laptop: small real models on real handwriting
    torchrun --nproc-per-node 8 ptdpo.py --preset 2b --data runs/hints/rows.parquet    Qwen3-VL-2B-Thinking, one node
    python -m tools.hints                              writes the hint column with a model of yours
    python -m tools.figures ptdpo                      what each kind of knowledge does to a tutor (Figures 3, 5)

The student answers from the question alone, G times. A frozen copy of the initial model reads the answers too:

    p      student,  question x                what samples, and what is trained
    q^h    tutor,    question and hint [x; h]  the frozen model; it sees the image as well                     Eq. 9
    ref    frozen,   question x                the same model, for the KL term of GRPO

    rbar   the share of right answers in the group                                                           Eq. 7
    F      the tokens of wrong answers in groups with rbar < tau                                             Eq. 8
    D      JSD(q~^h, p~) on the union of both Top-K sets and a tail bucket: kernels.topk_tail_divergence     Eq. 13-17

    loss = -J_GRPO + lambda * sum over F of D / |F|                                                          Eq. 11, 12

    J_GRPO, --optimizer    grpo    min(rho A, clip(rho) A) - beta KL(p || ref), k3 on the sampled tokens     Eq. 3
                           dapo    the same with clip 0.28 above and no KL; with --draws questions are drawn anew
                                   for groups that are all right or all wrong
                           gspo    rho of the whole response, exp of its tokens' mean log-ratio; no KL     2507.18071

Where this differs from the paper, or from the code released with it:
 1. The released JSD detaches p as the weight and not in the mixture: its gradient is zero. Here it is Eq. 42's.
 2. The released support is the student's Top-K alone, with a uniform guess of the teacher's values. Here it is Eq. 14's
    union.
 3. The released tutor is given no image. Here it sees it (Eq. 9); --blind-tutor takes it away.
 4. The released code drops the reference KL on every answer of a group below tau. Here it stays (Eq. 3);
    --drop-reference-kl.
 5. |F| counts the whole optimizer update, on all ranks. The released code averages within each micro-batch, and with
    GSPO within each response first.
 6. GRPO averages over all tokens of the update, as the released code; Eq. 3 averages within each response first:
    average="response" in OPTIMIZERS.
 7. r in Eq. 7 and 8 is the answer alone; the reward of the policy gradient is 0.9 answer + 0.1 format (Table 3).
 8. The released code adds a dual clip at 3; neither the paper nor this file has it. Clip 0.2 / 0.3 is the code's. Where
    --updates is 1, as on the toy, rho is 1 and nothing is clipped.
 9. k3 has the value of KL(p || ref), Eq. 3, and on the policy's own samples the gradient of KL(ref || p). The released
    one is clamped, and the released scripts differ in its direction.
10. lambda is 0.05 for 2B and 8B and 0.5 for 4B, as in the released scripts (the paper: "5e-2, 5e-1").
11. The hints are not released. tools/hints.py has them written, with our wording of the paper's three rules. A row
    without one is answered and not tutored; the log counts them (without_hint). One that is too long for the prompt
    stops the run (the code cuts it off).
12. DAPO draws once, as the released scripts do with a tutor: groups that are all wrong are what it is for. The paper's
    baseline without one needs --draws 4 or so. Every rank fills its own share of the batch; groups are dropped for
    their answers alone (the code: for their rewards), and are not tutored then. The penalty for long responses is left
    out. An epoch counts steps, not draws.
13. The wording of the instruction and of the contexts is ours. Evaluation is greedy (paper: temperature 1). The losses
    are at temperature 1 whatever --temperature the rollouts have. Trained weights are float32, and weight decay spares
    norms and biases. Images keep the checkpoint's own limits of pixels (the released scripts: 200,704 to 1,003,520:
    change preprocessor_config.json for those).
"""

import functools
import math
from dataclasses import dataclass
from typing import Literal

import common
from kernels import topk_tail_divergence

import torch
from torch import Tensor

# =============================================================================================== settings
HUB = dict(
    min_pixels=200_704,
    max_pixels=1_003_520,
    data="PAPOGalaxy/PAPO_ViRL39K_train",
    epochs=2,
    prompts=384,
    group=8,
    updates=3,
    top_p=0.99,
    max_prompt=8192,
    max_response=4096,
    micro_tokens=16384,
    gradient_checkpointing=True,
    save_every=50,
)  # Table 3
PRESETS = {
    "toy": dict(
        student="toy/student",
        data="toy/train",
        eval_data=["toy/test"],
        prompts=32,
        group=8,
        max_steps=200,
        lambda_ptd=0.5,
        lr=1e-3,
        warmup=5,
        schedule="linear",
        dtype="float32",
        rollout_batch=256,
        eval_every=25,
        eval_rows=400,
    ),
    "2b": HUB | dict(student="Qwen/Qwen3-VL-2B-Thinking"),
    "4b": HUB | dict(student="Qwen/Qwen3-VL-4B-Thinking", lambda_ptd=0.5),
    "8b": HUB | dict(student="Qwen/Qwen3-VL-8B-Thinking", max_prompt=4096),
    "ablation": HUB
    | dict(student="Qwen/Qwen3-VL-4B-Thinking", lambda_ptd=0.5, group=5, max_response=2048),
}
RANGES = {
    "group": (2, math.inf),  # the responses to one question are compared with each other
    "tau": (1e-6, 1),
    "support": (1, 1024),
    "draws": (1, math.inf),
}


@dataclass(frozen=True)
class Optimizer:
    """What --optimizer stands for, as in the released scripts."""

    clip_low: float  # the probability ratio is clipped below 1 - clip_low
    clip_high: float  # and above 1 + clip_high
    kl: float  # beta: weight of KL(student || frozen initial model) (Eq. 3)
    average: str  # over the "token"s of an update, or within each "response" first


OPTIMIZERS = {
    "grpo": Optimizer(clip_low=0.2, clip_high=0.3, kl=0.01, average="token"),
    "dapo": Optimizer(clip_low=0.2, clip_high=0.28, kl=0.0, average="token"),
    "gspo": Optimizer(clip_low=3e-4, clip_high=4e-4, kl=0.0, average="response"),
}


@dataclass
class Args(common.Args):
    optimizer: Literal["grpo", "dapo", "gspo"] = "grpo"  # policy gradient, a row of OPTIMIZERS
    lambda_ptd: float = 0.05  # lambda: weight of the tutoring loss (Eq. 12); 0 = no tutor
    # groups whose share of right answers is below this are tutored (Eq. 8)
    tau: float = 1.0
    tutor_all: bool = False  # tutor every answer of every group
    tutor_context: Literal["question", "answer", "hint", "solution"] = "hint"  # see KNOWLEDGE
    divergence: Literal["jsd", "forward_kl", "reverse_kl"] = "jsd"  # forward: KL(tutor || student)
    support: int = 100  # K: tokens of each Top-K set (Eq. 14); all, if there are fewer
    draws: int = 1  # dapo draws at most so often to fill a batch with informative groups (see 12)
    blind_tutor: bool = False  # the released code's tutor: the image left out
    drop_reference_kl: bool = False  # the released code's habit: no KL on groups below tau
    column_hint: str = "hint"  # column with the hint
    column_solution: str = "solution"  # column with the worked solution


# =============================================================================================== contexts
INSTRUCTION = "Think inside <think></think>. Then put the final answer in \\boxed{}."
KNOWLEDGE = {  # --tutor-context -> what stands behind the tutor's question
    "question": "",
    "answer": "\n\nThe answer is {answer}.",
    "hint": "\n\nHint: {hint}",
    "solution": "\n\nReference solution: {solution}\nThe answer is {answer}.",
}


def question(row: dict, knowledge: str = "", blind: bool = False) -> common.Context:
    """x: what the student samples under and is trained in; knowledge: what stands behind it for the tutor."""
    images = [] if blind else row["images"]
    text = f"{row['problem']}{knowledge}\n\n{INSTRUCTION}"
    return common.Context([common.message("user", text, len(images))], images)


def tutored(row: dict, knows: str, blind: bool = False) -> common.Context | None:
    """[x; h]: the question with what the tutor knows behind it; None where the row does not have it."""
    if knows != "question" and common.is_empty(row.get(knows)):
        return None
    answer = common.all_answers(row["answer"])[0]
    knowledge = KNOWLEDGE[knows].format_map(row | {"answer": answer})
    return question(row, knowledge, blind)


def contexts(args: Args) -> dict:
    """What every response is read in, by name; the first is what it is sampled under."""

    def tutor(row: dict) -> common.Context | None:
        return tutored(row, args.tutor_context, args.blind_tutor)

    return {"question": question, "tutor": tutor} if args.lambda_ptd else {"question": question}


def columns(args: Args) -> str:
    """What a row has to have, the tutor's knowledge included. Raises UserError where no row has that."""
    knows = args.tutor_context if args.lambda_ptd else "question"
    if knows not in ("hint", "solution"):
        return "problem images answer"
    column = getattr(args, f"column_{knows}")
    data = common.load_data(args.data, args.data_split)
    values = data[column] if column in data.column_names else []
    if all(common.is_empty(value) for value in values):
        raise common.UserError(
            f"no row of {args.data!r} has a {knows} in a column {column!r}; there are: {', '.join(data.column_names)}. "
            f"Say which one holds it with --column-{knows} NAME; write hints with python -m tools.hints; or go without "
            "(--tutor-context answer, or --lambda-ptd 0)"
        )
    return f"problem images answer {knows}"


# =============================================================================================== losses
def well_formed(text: str) -> bool:
    """One thought, then a boxed answer. Thinking templates open <think> themselves, so it may be missing.

    "<think>2 + 2</think> \\boxed{4}" -> True   "2 + 2</think> \\boxed{4}" -> True   "\\boxed{4}" -> False
    """
    thought, closed, rest = text.partition("</think>")
    if not closed or "<think>" in thought.lstrip().removeprefix("<think>"):
        return False
    # a box is asked for: tags are none, though the answer in them counts
    boxed = common.extract_answer(rest.replace("<answer>", "")) is not None
    return "<think>" not in rest and "</think>" not in rest and boxed


def route(correct: list[bool], group: int, tau: float) -> tuple[list[bool], list[bool]]:
    """Eq. 7, 8: which responses are in a group below tau, and which of those failed. `group` in a row to a question.

    group 2, tau 1, correct = [1, 1, 0, 1, 0, 0]  ->  [0, 0, 1, 1, 1, 1], [0, 0, 1, 0, 1, 1]   tau 0.5: the last group
    """
    below = []
    for answers in common.split(correct, len(correct) // group):
        below += [sum(answers) / group < tau] * group
    failed = [is_below and not right for is_below, right in zip(below, correct)]
    return below, failed


TERMS = (  # per token; the first three carry weight
    "surrogate",
    "kl",
    "ptd",
    "student_tail",
    "tutor_tail",
    "ptd_gap_bound",
    "clipped",
    "log_p",
    "entropy",
)


def terms(z: Tensor, *tensors: Tensor, args: Args) -> tuple[Tensor, ...]:
    """TERMS, [n] each, from the student's logits z [n, V] and what follows them.

    In a micro-batch of F the tutor's logits y [n, V]; then [n] each: ids, log-probs when sampled (None: as now),
    log-probs of the frozen model (None: no KL), advantages.
    """
    *tutor, ids, old, reference, advantage = tensors
    policy = OPTIMIZERS[args.optimizer]
    log_p = common.log_softmax(z)
    chosen = common.gather(log_p, ids)
    old = chosen.detach() if old is None else old
    surrogate, clipped = common.clipped_surrogate(
        chosen, old, advantage, policy.clip_low, policy.clip_high
    )  # Eq. 3
    kl = ptd = student_tail = tutor_tail = gap_bound = torch.zeros_like(chosen)
    if reference is not None:
        kl = common.k3(chosen, reference)  # Eq. 3
    if tutor:
        support = min(args.support, z.shape[-1])
        ptd, found = topk_tail_divergence(
            z, tutor[0], support, args.divergence, return_metrics=True
        )  # Eq. 13-17
        student_tail, tutor_tail = found["student_tail"], found["teacher_tail"]
        if args.divergence == "jsd":  # of the others there is no bound
            gap_bound = found["gap_bound"]
    entropy = common.entropy(log_p.detach())
    return surrogate, kl, ptd, student_tail, tutor_tail, gap_bound, clipped, chosen, entropy


# =============================================================================================== rollout
def rollout(rows: list[dict], run: common.Run, args: Args) -> list[common.Sample]:
    """The student answers this rank's questions; dapo draws more, where too few groups have something to compare."""
    groups = sample_groups(rows, run, args)
    if args.optimizer == "dapo":
        draws = 1
        while draws < args.draws and fewest_informative(groups) < len(rows):
            groups += sample_groups(run.draw(), run, args)
            draws += 1
        run.log({"draws": draws})
    found = group_statistics(groups, args)
    run.log(found)
    if found["with_advantage"] == 0:
        teaches = ", only the tutor teaches" if args.lambda_ptd else ""
        run.note(f"in every group all rewards are equal: the policy gradient is zero{teaches}")
    return [s for group in choose(groups, len(rows)) for s in group]


def sample_groups(rows: list[dict], run: common.Run, args: Args) -> list[list[common.Sample]]:
    """Groups of responses to the question alone, rewarded; failures are routed to the tutor (s.tutored)."""
    samples = common.sample_responses(run.engine, rows, contexts(args), args)
    common.reward_answers(samples, args.group, reward)
    below, failed = route([s.correct for s in samples], args.group, args.tau)
    for s, is_below, fails in zip(samples, below, failed):
        s.below_tau = is_below
        s.tutored = (fails or args.tutor_all) and "tutor" in s.prompts
    return common.split(samples, len(rows))


def reward(s: common.Sample) -> float:
    """Table 3."""
    return 0.9 * s.correct + 0.1 * well_formed(s.response.text)


def informative(group: list[common.Sample]) -> bool:
    """Whether a group is neither all right nor all wrong."""
    return 0 < sum(s.correct for s in group) < len(group)


def fewest_informative(groups: list[list[common.Sample]]) -> int:
    """Of the rank that has fewest: every rank draws equally often."""
    return min(common.all_gather_object(sum(map(informative, groups))))


def choose(groups: list[list[common.Sample]], wanted: int) -> list[list[common.Sample]]:
    """`wanted` groups, informative ones first; in the order of drawing, so that every update gets some of both."""
    ranked = sorted(range(len(groups)), key=lambda i: not informative(groups[i]))
    return [groups[i] for i in sorted(ranked[:wanted])]


def group_statistics(groups: list[list[common.Sample]], args: Args) -> dict:
    """Figure 2: shares of groups that are all wrong, informative and all right; and of responses, on all ranks."""
    right = [sum(s.correct for s in group) for group in groups]
    samples = [s for group in groups for s in group]
    values = {
        "all_fail": [n == 0 for n in right],
        "informative": [0 < n < args.group for n in right],
        "all_pass": [n == args.group for n in right],
        "correct": [s.correct for s in samples],
        "well_formed": [well_formed(s.response.text) for s in samples],
        "with_advantage": [s.advantage != 0 for s in samples],
    }
    if args.lambda_ptd:
        values[f"without_{args.tutor_context}"] = ["tutor" not in s.prompts for s in samples]
    return common.mean_over_ranks(values)


# =============================================================================================== score
def score(samples: list[common.Sample], run: common.Run, args: Args) -> list[common.Micro]:
    """The frozen model reads every response once, and those in F a second time, as the tutor.

    F has micro-batches of its own, on all ranks equally many. Keeps hidden states, never logits; and m.in_f (1 in F,
    else 0), m.below_tau (1 in such a group) and m.reference (the frozen model's log-prob; None: no KL), [n] each. A
    micro-batch is sized by the question; the tutor's is longer by its hint.
    """
    limit = args.micro_tokens
    tutored = [s for s in samples if s.tutored]
    others = [s for s in samples if not s.tutored]
    of_f = common.make_micros(tutored, ["question"], run.processor, limit)
    micros = of_f + common.make_micros(others, ["question"], run.processor, limit)
    with torch.no_grad():
        for m in of_f:
            m.teacher = [run.teacher(tutor_batch(m, run.processor, args))]  # [n, H]
        for m in micros:
            m.in_f = m.spread([s.tutored for s in m.samples])
            m.below_tau = m.spread([s.below_tau for s in m.samples])
            m.reference = None
            if OPTIMIZERS[args.optimizer].kl:
                m.reference = run.log_probs(m, run.teacher(m.batch), run.head)
            if args.updates > 1:  # later updates need the policy that sampled, not their own
                m.old = run.student(m.batch, functools.partial(run.log_probs, m))
    return micros


def tutor_batch(m: common.Micro, processor: common.Processor, args: Args) -> dict[str, Tensor]:
    """The responses of a micro-batch behind what the tutor knows. A rank without failures takes part all the same."""
    prompts = [s.prompts["tutor"] for s in m.samples]
    return processor.batch(prompts, [s.response for s in m.samples], not args.blind_tutor)


# =============================================================================================== weigh
def weigh(micros: list[common.Micro], run: common.Run, args: Args):
    """One weight per token and term; tokens, responses and |F| are counted over the whole update and all ranks."""
    policy = OPTIMIZERS[args.optimizer]
    length = torch.cat([m.length for m in micros])
    in_f = torch.cat([m.in_f for m in micros])
    # A response has T tokens of 1 / T: together they count 1.
    counts = torch.stack([torch.ones_like(length).sum(), (1 / length).sum(), in_f.sum()])
    tokens, responses, size_of_f = common.all_sum(counts)
    for m in micros:
        mean = torch.ones_like(m.length) / tokens  # [n]
        if policy.average == "response":
            mean = 1 / (m.length * responses)
        m.weights = {
            "surrogate": -mean,  # Eq. 12 minimises what Eq. 3 maximises
            "kl": policy.kl * mean,
            "ptd": args.lambda_ptd * m.in_f / size_of_f.clamp(min=1),  # Eq. 11, 12; 0 / 0 is 0
        }
        if args.drop_reference_kl:
            m.weights["kl"] = m.weights["kl"] * (1 - m.below_tau)


# =============================================================================================== update
def update(micros: list[common.Micro], run: common.Run, args: Args) -> dict:
    """One optimizer step, and the means of the tutor's terms over F."""

    def extras(m: common.Micro, hidden: Tensor, head: Tensor) -> list:
        """What terms needs besides logits."""
        return [m.ids, old_log_probs(m, hidden, head, run, args), m.reference, m.advantage]

    log = run.update(micros, TERMS, functools.partial(terms, args=args), extras)
    found = common.all_terms(micros)
    in_f = torch.cat([m.in_f for m in micros])
    everywhere = {"clipped": found["clipped"]}
    if OPTIMIZERS[args.optimizer].kl:
        everywhere["kl"] = found["kl"]
    if args.lambda_ptd:
        everywhere["tutored_tokens"] = in_f
    tutoring = {name: found[name] for name in ("ptd", "student_tail", "tutor_tail")}
    if args.divergence == "jsd":
        tutoring["ptd_gap_bound"] = found["ptd_gap_bound"]
    return log | common.token_means(everywhere) | common.token_means(tutoring, in_f)


def old_log_probs(
    m: common.Micro, hidden: Tensor, head: Tensor, run: common.Run, args: Args
) -> Tensor | None:
    """Log-probs [n] when sampled; for gspo those that give every token its response's ratio."""
    if m.old is None or args.optimizer != "gspo":
        return m.old
    now = run.log_probs(m, hidden, head)  # a ratio needs all its tokens before any gradient
    return common.sequence_old(now, m.old, m.length, m.response)


# =============================================================================================== main
def load(run: common.Run, args: Args):
    """Training rows and held-out rows, all checked; then the models."""
    processor = common.Processor(args.student, args)
    if args.teacher:
        raise common.UserError(
            "--teacher is not for this method: its tutor is --student, before it is trained"
        )
    train = common.load_rows(
        args, processor, contexts(args), columns(args), optional="hint solution"
    )
    asked = {"question": question}
    held_out = common.load_held_out(args, processor, asked, "problem images answer")
    frozen = args.lambda_ptd or OPTIMIZERS[args.optimizer].kl
    run.load(processor, args.student if frozen else None)
    return train, held_out


def main():
    args = common.parse_args(Args, PRESETS, RANGES)
    run = common.Run("ptdpo", args)
    train, held_out = load(run, args)
    for _ in run.steps(train, held_out, question):
        samples = rollout(run.draw(), run, args)
        run.log_samples(samples)
        parts = [score(part, run, args) for part in common.split(samples, args.updates)]
        run.phase("score")
        for micros in parts:
            weigh(micros, run, args)
            run.log(update(micros, run, args))


if __name__ == "__main__":
    common.launch(main)
