"""Visual Gradient Steering (VGS): steer on-policy distillation toward what only the image can tell.

Paper: Yoon et al., "Decomposed On-Policy Distillation for Vision-Language Reasoning: Steering Gradients for Visual
Grounding", ICML 2026, arXiv:2606.00564.

    python vgs.py                                      a laptop: small real models on real handwriting
    torchrun --nproc-per-node 8 vgs.py --preset teacher     one node: first the 8B teacher, by GRPO
    torchrun --nproc-per-node 8 vgs.py --preset 2b     then Qwen3-VL-2B from it
    python -m tools.figures vgs                        the angles between the gradients (Figure 3)

The student answers with the image. At every token of its answer there are four next-token distributions over the
vocabulary, all on the same sampled prefix:

    pI  student, image and question          qI  teacher, image and question
    pL  student, question alone              qL  teacher, question alone

    Std   KL(pI || qI)                       Eq. 2-4    student first: reverse KL
    Lang  KL(pL || qL)                       Eq. 6-7
    q*    sg(pL) qI / qL, normalised         Eq. 9-10   the student's language prior, the teacher's visual evidence
    Vis   KL(pI || q*)                       Eq. 11
    VDS   KL(qI || qL)                       Eq. 12     how much the teacher needs the image here; Q0.7: 70th percentile

    a token's loss, --steer    image         Std + gamma Vis + lambda [VDS > Q0.7] Lang       Eq. 13, 16-17
                               adaptive      Std + gamma_t Vis + lambda [VDS > Q0.7] Lang     Eq. 24-25
                               language      Std + gamma Lang + lambda [VDS > Q0.7] Vis       Eq. 19, 21

    loss = eta * mean over responses of the mean over a response's tokens      Eq. 14, 18; eta: Eq. 15, 20

Lambda is --lambda-lp: 0 in Eq. 13, 0.01 in the paper's tables, which is the default; the toy needs 0.3. Standard is
--gamma 0 --lambda-lp 0. --alpha below 1 mixes any of them with GRPO (Eq. 22); --alpha 0 is GRPO alone.

Where this differs from the paper, or fills in what it leaves open:
 1. No gradient flows through pL inside q* (the paper calls q* a target and does not say).
 2. Q0.7 and Q0.4 are taken over all response tokens of one update, on all ranks (the paper: "of the VDS distribution").
 3. Eq. 21 prints p(.|x) against q*, a distribution with the image; here it is p(.|I, x), as the text around it says.
 4. Eq. 24 puts a response's losses inside a sum over its tokens; adaptive reads them as the token's terms.
 5. eta: the presets hold the paper's constants, of gamma 2 and --steer image; for other settings it gives none, so give
    --eta or --measure-eta. Eq. 22 has none. The toy leaves it at 1: AdamW undoes a constant, clipping apart.
 6. The question alone is the same chat without the image (the paper does not describe it).
 7. The batch of 512 is read as 128 questions with 4 responses, and Table 3's 512 and 128 as questions (the paper does
    not say); the group size of Eq. 22 is not given either.
 8. GRPO's reward is 1 for a right answer, else 0; clip 0.2; mean over a response's tokens; advantages over the unbiased
    standard deviation (none of it is given).
 9. The wording of the system prompt is ours; it asks for the same: reason inside <reason></reason>, the answer in
    \\boxed{}.
10. Distributions are over the tokenizer's ids; the padding rows of the heads are left out. Image placeholders and
    padding are never sampled. Weight decay spares norms and biases, and gradients are clipped at norm 1, as TRL does,
    which the paper uses.
"""

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import common

import torch
from torch import Tensor

# =============================================================================================== settings
# Table 4: of all presets of hub models; its AdamW is the default (common.py)
HUB = dict(
    data="LMMs-Lab-Turtle/Vision-SR1-47K",
    teacher="runs/teacher/final",
    prompts=128,
    group=4,
    max_prompt=16384,
    max_response=2048,
    micro_tokens=16384,
    gradient_checkpointing=True,
    save_every=50,
)
PRESETS = {
    "toy": dict(
        student="toy/student",
        teacher="toy/teacher",
        data="toy/train",
        eval_data=["toy/test"],
        max_steps=150,
        lambda_lp=0.3,
        lr=1e-3,
        warmup=10,
        schedule="linear",
        dtype="float32",
        eval_every=25,
        eval_rows=400,
    ),
    "2b": HUB | dict(student="Qwen/Qwen3-VL-2B-Instruct", eta=0.41),
    "4b": HUB | dict(student="Qwen/Qwen3-VL-4B-Instruct", eta=0.36),
    # Table 3: 512 questions rolled out, 128 an update
    "teacher": HUB
    | dict(
        student="Qwen/Qwen3-VL-8B-Instruct",
        alpha=0.0,
        output="runs/teacher",
        epochs=2,
        prompts=512,
        group=8,
        updates=4,
        top_p=0.99,
        max_prompt=12800,
    ),
}
RANGES = {"alpha": (0, 1), "eta": (1e-6, 1e6), "clip": (0, 1)}


@dataclass
class Args(common.Args):
    steer: Literal["image", "adaptive", "language"] = "image"  # see the top of vgs.py
    gamma: float = 2.0  # steering coefficient (Eq. 13, 19); 0, with lambda 0 too: Standard
    lambda_lp: float = 0.01  # lambda: weight of the preserving term on visual tokens (Eq. 16, 21)
    eta: float = (
        1.0  # constant factor on the loss, against the change of its gradient's norm (Eq. 15)
    )
    measure_eta: int = 0  # measure it every so many steps instead, by two more passes; 0 = never
    alpha: float = 1.0  # weight of distillation against GRPO (Eq. 22: 0.3); 0 = GRPO, no teacher
    clip: float = 0.2  # GRPO's ratio is clipped to 1 - clip .. 1 + clip


# =============================================================================================== contexts
SYSTEM = common.message(
    "system", "Think first, inside <reason></reason>. Then put the final answer in \\boxed{}."
)


def with_image(row: dict) -> common.Context:
    """I, x: what the student samples under; behind pI and qI."""
    return common.Context(
        [SYSTEM, common.message("user", row["problem"], len(row["images"]))], row["images"]
    )


def without_image(row: dict) -> common.Context:
    """x alone: the same chat, the image left out (not blanked); behind pL and qL."""
    return common.Context([SYSTEM, common.message("user", row["problem"])])


def contexts(args: Args) -> dict:
    """What every response is read in, by name; the first is what it is sampled under."""
    both = args.alpha > 0 and max(args.gamma, args.lambda_lp) > 0
    return {"image": with_image, "text": without_image} if both else {"image": with_image}


# =============================================================================================== losses
def visual_target(log_pL: Tensor, log_qI: Tensor, log_qL: Tensor) -> Tensor:
    """log q* of Eq. 10, [n, V]: the softmax divides by Z at every token. No gradient to pL."""
    # a token that both rule out stays ruled out
    evidence = (common.upcast(log_qI) - log_qL).masked_fill(log_qI == -math.inf, -math.inf)
    return (log_pL.detach() + evidence).log_softmax(-1)


def divergences(zI: Tensor, zL: Tensor, yI: Tensor, yL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(Std, Vis, Lang) per token, [n] each, from logits [n, V]: student zI, zL; teacher yI, yL."""
    log_pI, log_pL, log_qI, log_qL = map(common.log_softmax, (zI, zL, yI, yL))
    std = common.kl(log_pI, log_qI)  # Eq. 3
    vis = common.kl(log_pI, visual_target(log_pL, log_qI, log_qL))  # Eq. 11
    lang = common.kl(log_pL, log_qL)  # Eq. 6
    return std, vis, lang


def visual_dependency(yI: Tensor, yL: Tensor) -> Tensor:
    """VDS of Eq. 12, [n], from the teacher's logits [n, V] with the image and without."""
    return common.kl(common.log_softmax(yI), common.log_softmax(yL))


def steering(vds: Tensor, q40: Tensor, q70: Tensor, args: Args) -> dict[str, Tensor]:
    """Coefficients [n] of Std, Vis and Lang at every token, from its VDS [n] and the percentiles.

    adaptive, gamma 2, lambda 0.1, vds [.1, .5, .9], q40 .4, q70 .7 -> std [1, 1, 1], vis [0, 1, 2], lang [0, 0, .1]
    """
    one, top = torch.ones_like(vds), (vds > q70).float()
    preserved = args.lambda_lp * top
    if args.steer == "image":
        return {"std": one, "vis": args.gamma * one, "lang": preserved}  # Eq. 13; 16, 17
    if args.steer == "adaptive":
        gamma_t = args.gamma / 2 * (vds > q40) + args.gamma / 2 * top  # Eq. 25
        return {"std": one, "vis": gamma_t, "lang": preserved}  # Eq. 24
    return {"std": one, "vis": preserved, "lang": args.gamma * one}  # Eq. 19, 21


TERMS = ("std", "vis", "lang", "surrogate", "clipped", "log_p", "entropy")  # per token


def terms(zI: Tensor, *tensors: Tensor, args: Args) -> tuple[Tensor, ...]:
    """TERMS, [n] each, from the student's logits zI [n, V] and what follows them.

    zL, yI, yL [n, V] (Standard: yI alone; GRPO: none); then [n] each: ids, log-probs when sampled (None: as now),
    advantages.
    """
    *others, ids, old, advantage = tensors
    log_pI = common.log_softmax(zI)
    chosen = common.gather(log_pI, ids)
    old = chosen.detach() if old is None else old
    surrogate, clipped = common.clipped_surrogate(chosen, old, advantage, args.clip, args.clip)
    std = vis = lang = torch.zeros_like(advantage)
    if len(others) == 3:
        std, vis, lang = divergences(zI, *others)
    elif len(others) == 1:
        std = common.kl(log_pI, common.log_softmax(others[0]))  # Eq. 3
    return std, vis, lang, surrogate, clipped, chosen, common.entropy(log_pI.detach())


# =============================================================================================== rollout
def rollout(rows: list[dict], run: common.Run, args: Args) -> list[common.Sample]:
    """The student answers this rank's questions with the image; the question alone is encoded beside it."""
    samples = common.sample_responses(run.engine, rows, contexts(args), args)
    if args.alpha < 1:
        common.reward_answers(samples, args.group)
    return samples


# =============================================================================================== score
def score(samples: list[common.Sample], run: common.Run, args: Args) -> list[common.Micro]:
    """The teacher reads every sequence once; where GRPO has several updates, so does the student.

    Keeps hidden states, never logits, and m.vds [n]: an update's percentiles are needed before its backward pass.
    """

    def vds(*logits):
        return (visual_dependency(*logits),)

    micros = common.make_micros(samples, list(contexts(args)), run.processor, args.micro_tokens)
    with torch.no_grad():
        for m in micros:
            if run.teacher is not None:
                # with the image, then without: [n, H] each
                m.teacher = run.teacher(m.batch).chunk(m.contexts)
            if len(m.teacher) == 2:
                pairs = [(hidden, run.head) for hidden in m.teacher]
                (m.vds,) = common.vocab_terms(vds, pairs, (), run.vocab, args.loss_chunk)
            # later updates need the policy that sampled, not their own
            if args.alpha < 1 and args.updates > 1:
                m.old = run.student(m.batch, functools.partial(run.log_probs, m))
    return micros


# =============================================================================================== weigh
def has_eta(args: Args) -> bool:
    """Eq. 15: where there is steering, and no GRPO (Eq. 22)."""
    return args.alpha == 1 and args.gamma > 0


def weigh(micros: list[common.Micro], run: common.Run, args: Args):
    """One weight per token and term: mean over a response's tokens, then over all responses of all ranks."""
    length = torch.cat([m.length for m in micros])
    responses = common.all_sum((1 / length).sum())  # T tokens of 1 / T: each response counts 1
    both = len(micros[0].teacher) == 2
    if both:
        q40, q70 = common.quantile(torch.cat([m.vds for m in micros]), [0.4, 0.7])
    eta = run.own.get("eta", args.eta) if has_eta(args) else 1.0
    for m in micros:
        mean = 1 / (m.length * responses)  # [n]
        # Eq. 22 maximises the surrogate.
        m.weights = {"std": args.alpha * mean, "surrogate": -(1 - args.alpha) * mean}
        if both:
            coefficients = steering(m.vds, q40, q70, args)
            m.weights |= {name: args.alpha * eta * c * mean for name, c in coefficients.items()}


# =============================================================================================== update
def update(micros: list[common.Micro], run: common.Run, args: Args) -> dict:
    """One optimizer step, and the paper's curves: Std, Vis, Lang as the loss averages them, and by VDS decile."""
    log = run.update(micros, TERMS, functools.partial(terms, args=args), extras)
    found = common.all_terms(micros)
    if args.alpha < 1:
        log |= common.token_means({"clipped": found["clipped"]})
    # by what the teacher has read: nothing, the image's context alone, or both
    names = [(), ("std",), ("std", "vis", "lang")][len(micros[0].teacher)]
    divergences = {name: found[name] for name in names}
    length = torch.cat([m.length for m in micros])
    log |= common.token_means(divergences, 1 / length)
    if len(names) == 3:
        vds = torch.cat([m.vds for m in micros])
        deciles = common.quantile(vds, [i / 10 for i in range(1, 10)])
        tenth = torch.bucketize(vds, deciles)  # 0: the least visual tokens
        means = [common.token_means(divergences, tenth == b) for b in range(10)]
        log |= {f"{name}_by_vds": [mean.get(name, 0.0) for mean in means] for name in names}
    return log


def extras(m: common.Micro, hidden: Tensor, head: Tensor) -> list:
    """What terms needs besides logits."""
    return [m.ids, m.old, m.advantage]


def measure_eta(micros: list[common.Micro], run: common.Run, args: Args) -> dict:
    """Eq. 15 (Eq. 20 for language): |g_Std| / |g_Std + gamma g_Vis|. The preserving term is not part of it."""
    weigh(micros, run, args)
    steering_term = "lang" if args.steer == "language" else "vis"
    whole, norms = [m.weights for m in micros], []
    for kept in (("std",), ("std", steering_term)):
        for m, weights in zip(micros, whole):
            m.weights = {name: weights[name] for name in kept}
        run.backward(micros, TERMS, functools.partial(terms, args=args), extras)
        norms.append(common.grad_norm(run.student).item())
        run.student.zero_grad()
    # Where it is not finite the update will say what is not.
    usable = norms[1] > 0 and math.isfinite(norms[0] + norms[1])
    run.own["eta"] = norms[0] / norms[1] if usable else 1.0
    return {"eta": run.own["eta"], "grad_norm_std": norms[0], "grad_norm_steered": norms[1]}


# =============================================================================================== main
def check(args: Args):
    """Refuse settings that contradict each other."""
    if args.alpha < 1 and args.group < 2:
        raise common.UserError("GRPO compares a question's responses: set --group to at least 2")
    of_preset = args.eta == PRESETS[args.preset].get("eta") and not args.measure_eta
    if has_eta(args) and of_preset and (args.gamma != 2 or args.steer != "image"):
        raise common.UserError(
            f"the preset's eta {args.eta} holds for --gamma 2 --steer image: give another --eta, or --measure-eta 10"
        )
    if args.alpha and args.teacher == HUB["teacher"] and not Path(args.teacher).exists():
        raise common.UserError(
            f"the teacher {args.teacher} is not there yet: train it with --preset teacher, or name "
            "another with --teacher"
        )


def load(run: common.Run, args: Args):
    """Training rows and held-out rows, all checked; then the models."""
    processor = common.Processor(args.student, args)
    teacher = args.teacher if args.alpha else None
    if teacher is not None:
        common.check_same_inputs(processor, common.Processor(teacher, args))
    names = "problem images answer" if args.alpha < 1 else "problem images"
    train = common.load_rows(args, processor, contexts(args), names)
    asked = {"image": with_image}
    held_out = common.load_held_out(args, processor, asked, "problem images answer")
    run.load(processor, teacher)
    return train, held_out


def main():
    args = common.parse_args(Args, PRESETS, RANGES)
    check(args)
    run = common.Run("vgs", args)
    train, held_out = load(run, args)
    for _ in run.steps(train, held_out, with_image):
        samples = rollout(run.draw(), run, args)
        run.log_samples(samples)
        parts = [score(part, run, args) for part in common.split(samples, args.updates)]
        run.phase("score")
        for micros in parts:
            if args.measure_eta and has_eta(args) and (run.step - 1) % args.measure_eta == 0:
                run.log(measure_eta(micros, run, args))
            weigh(micros, run, args)
            run.log(update(micros, run, args))


if __name__ == "__main__":
    common.launch(main)
