"""Visual Gradient Steering (VGS): steer on-policy distillation toward what only the image can tell.

Paper: Yoon et al., "Decomposed On-Policy Distillation for Vision-Language Reasoning: Steering Gradients for Visual Grounding",
ICML 2026, arXiv:2606.00564.

    python vgs.py                                             a laptop: small real models on real handwriting
    torchrun --nproc-per-node 8 vgs.py --preset 2b            one node: Qwen3-VL-2B from an 8B teacher
    python vgs.py --analyze                                   the angles between the gradients (Figure 3)

The student answers with the image. At every token of its answer there are four next-token distributions over the vocabulary:

    pI  student, image and question        qI  teacher, image and question
    pL  student, question alone            qL  teacher, question alone          all on the same sampled prefix

    Std   KL(pI || qI)                       Eq. 2-4    student first: reverse KL
    Lang  KL(pL || qL)                       Eq. 6-7
    q*    sg(pL) qI / qL, normalised         Eq. 9-10   the student's language prior, the teacher's visual evidence
    Vis   KL(pI || q*)                       Eq. 11
    VDS   KL(qI || qL)                       Eq. 12     how much the teacher needs the image here; Q0.7 is its 70th percentile

    per token, --method        standard      Std
                               vgs           Std + gamma Vis                                           Eq. 13
                               vgs-lp        Std + gamma Vis + lambda [VDS > Q0.7] Lang                Eq. 16-17
                               adaptive      Std + gamma_t Vis + lambda [VDS > Q0.7] Lang              Eq. 24-25
                               lang-steer    Std + gamma Lang + lambda [VDS > Q0.7] Vis                Eq. 19, 21
                               grpo          no distillation; with --alpha < 1 any of the above is mixed with it (Eq. 22)

    loss = eta * mean over responses of the mean over a response's tokens              Eq. 14, 18; eta: Eq. 15, 20

Where this differs from the paper, or fills in what it leaves open:
 1. No gradient flows through pL inside q* (the paper calls q* a target and does not say).
 2. Q0.7 and Q0.4 are taken over all response tokens of one optimizer update, on all ranks (the paper: "of the VDS distribution").
 3. Eq. 21 prints p(.|x) against q*, a distribution with the image; lang-steer uses p(.|I, x), as the text around it says.
 4. Eq. 24 puts a response's losses inside a sum over its tokens; adaptive reads them as the token's terms.
 5. Eq. 22 has no eta: with --alpha < 1 it is 1.
 6. The question alone is the same chat without the image (the paper does not describe it).
 7. The batch of 512 is read as 128 questions with 4 responses (the paper does not say). Eq. 3 does not depend on it.
 8. GRPO's reward is 1 for a right answer, else 0; clip 0.2; advantages over the unbiased standard deviation (not given).
 9. The wording of the system prompt is ours; it asks for the same: reason inside <reason></reason>, the answer in \\boxed{}.
10. Gradients are clipped at norm 1 (TRL's default; the paper, which uses TRL, does not say).
"""

import json
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

import common

# ====================================================================================================== settings
HUB = dict(data="LMMs-Lab-Turtle/Vision-SR1-47K", prompts=128, group=4, max_prompt=16384, max_response=2048, lr=1e-6, micro_batch=1,
           gradient_checkpointing=True)  # Table 4
PRESETS = {
    "toy": dict(student="toy/student", teacher="toy/teacher", data="toy/train", eval_data="toy/test", dtype="float32", lr=1e-3,
                warmup=10, schedule="linear",
                lambda_lp=0.3, micro_batch=32, max_steps=150, eval_every=25, eval_rows=400),
    "2b": dict(student="Qwen/Qwen3-VL-2B-Instruct", teacher="runs/teacher/final", eta=0.41, **HUB),
    "4b": dict(student="Qwen/Qwen3-VL-4B-Instruct", teacher="runs/teacher/final", eta=0.36, **HUB),
    "teacher": HUB | dict(student="Qwen/Qwen3-VL-8B-Instruct", method="grpo", output="runs/teacher", epochs=2, prompts=512, group=8,
                          updates=4, top_p=0.99, max_prompt=12800),  # Table 3: 512 questions rolled out, 128 an update
}


@dataclass
class Args(common.Args):
    method: Literal["standard", "vgs", "vgs-lp", "adaptive", "lang-steer", "grpo"] = "vgs-lp"  # objective, see the top of vgs.py
    gamma: float = 2.0  # steering coefficient of Eq. 13 (of Eq. 19 with lang-steer)
    lambda_lp: float = 0.01  # lambda: weight of the preserving term on the 30 % most visual tokens (Eq. 16, 21)
    eta: float = 1.0  # constant factor on the loss that undoes the change of the gradient's norm (Eq. 15)
    measure_eta: int = 0  # measure eta every so many updates and use that; costs two more backward passes; 0 = the constant
    alpha: float = 1.0  # weight of distillation against GRPO (Eq. 22; the paper's mix: 0.3); 1 = distillation alone
    clip_low: float = 0.2  # GRPO clips the probability ratio below 1 - clip_low
    clip_high: float = 0.2  # and above 1 + clip_high
    log_all_terms: bool = False  # also read the question alone where the method does not need it, to log Vis and Lang
    analyze: bool = False  # no training: the angles between the gradients of Lang, Vis and Std (Figure 3)
    analyze_rows: int = 128  # held-out questions for --analyze


def reads_text(args: Args) -> bool:
    """Whether the question is also read without its image."""
    return args.method in ("vgs", "vgs-lp", "adaptive", "lang-steer") or args.log_all_terms


def preserves(args: Args) -> bool:
    """Whether tokens are told apart by their visual dependency, so that its percentiles are needed before the update."""
    return args.method in ("vgs-lp", "adaptive", "lang-steer")


def steers(args: Args) -> bool:
    """Whether the gradient's norm changes against Std, so that eta has something to undo."""
    return args.method in ("vgs", "vgs-lp", "adaptive", "lang-steer") and args.alpha == 1


def uses_rewards(args: Args) -> bool:
    return args.method == "grpo" or args.alpha < 1


# ====================================================================================================== contexts
SYSTEM = {"role": "system", "content": "Think first, inside <reason></reason>. Then put the final answer in \\boxed{}."}


def with_image(row: dict) -> common.Context:
    """I, x: what the student samples under, and the teacher's pI-side context."""
    return common.Context([SYSTEM, common.user_message(row["problem"], len(row["images"]))], row["images"])


def without_image(row: dict) -> common.Context:
    """x alone: the same chat, the image left out (not blanked)."""
    return common.Context([SYSTEM, common.user_message(row["problem"], 0)])


def contexts(args: Args) -> dict:
    """The contexts that this run reads every response in, by name; the first is the one it was sampled under."""
    return {"image": with_image} | ({"text": without_image} if reads_text(args) else {})


# ====================================================================================================== losses
def visual_target(pL: Tensor, qI: Tensor, qL: Tensor) -> Tensor:
    """log q* of Eq. 10 from log-probabilities [n, V]: the softmax divides by Z at every token. No gradient reaches pL."""
    gain = (qI - qL).masked_fill(qI == -math.inf, -math.inf)  # a token that both rule out stays ruled out
    return (pL.detach() + gain).log_softmax(-1)


def divergences(zI: Tensor, zL: Tensor, yI: Tensor, yL: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(Std, Vis, Lang, VDS) per token, [n] each, from logits [n, V]: student zI, zL; teacher yI, yL (image, question alone)."""
    pI, pL, qI, qL = (z.log_softmax(-1) for z in (zI, zL, yI, yL))
    q_star = visual_target(pL, qI, qL)
    return common.kl(pI, qI), common.kl(pI, q_star), common.kl(pL, qL), common.kl(qI, qL)  # Eq. 3, 11, 6, 12


def visual_dependency(yI: Tensor, yL: Tensor) -> tuple[Tensor]:
    """VDS of Eq. 12, [n], from the teacher's logits [n, V] with the image and without."""
    return (common.kl(yI.log_softmax(-1), yL.log_softmax(-1)),)


def chosen_log_prob(z: Tensor, ids: Tensor) -> tuple[Tensor]:
    """log p of the tokens ids [n] under logits [n, V]."""
    return (common.gather(z.log_softmax(-1), ids),)


def steering(method: str, vds: Tensor, q40: Tensor, q70: Tensor, gamma: float, lam: float) -> Tensor:
    """Coefficients [3, N] of Std, Vis and Lang at every token, given the visual dependency scores vds [N] and their percentiles.

    adaptive, gamma 2, lambda 0.1, vds = [.1, .5, .9], q40 = .4, q70 = .7  ->  [[1, 1, 1], [0, 1, 2], [0, 0, 0.1]]
    """
    one, zero, top = torch.ones_like(vds), torch.zeros_like(vds), (vds > q70).to(vds.dtype)
    if method == "standard":
        return torch.stack([one, zero, zero])
    if method == "vgs":
        return torch.stack([one, gamma * one, zero])  # Eq. 13
    if method == "vgs-lp":
        return torch.stack([one, gamma * one, lam * top])  # Eq. 16, 17
    if method == "adaptive":
        return torch.stack([one, gamma / 2 * (vds > q40) + gamma / 2 * top, lam * top])  # Eq. 24, 25
    assert method == "lang-steer", method
    return torch.stack([one, lam * top, gamma * one])  # Eq. 19, 21


# ====================================================================================================== rollout
def rollout(rows: list[dict], models: common.Models, args: Args) -> list[common.Sample]:
    """The student answers this rank's questions with the image; the question alone is encoded beside it."""
    samples = common.sample_responses(models.engine, rows, contexts(args), args)
    if uses_rewards(args):
        common.reward_answers(samples, args.group)
    return samples


# ====================================================================================================== score
@dataclass
class Micro(common.Micro):
    vds: Tensor | None = None  # [n] visual dependency scores, where the method needs their percentiles


def score(samples: list[common.Sample], models: common.Models, args: Args) -> list[Micro]:
    """The frozen models read every sequence once. Hidden states are kept, never logits."""
    micros = common.make_micros(Micro, samples, list(contexts(args)), models.processor, args.micro_batch)
    for m in micros:
        with torch.no_grad():
            if models.teacher is not None:
                m.teacher = m.by_context(models.teacher(m.batch))  # behind qI, and qL: [n, H] each
            if uses_rewards(args) and args.updates > 1:  # later updates need the policy that sampled, not their own
                m.old = models.student(m.batch, lambda hidden, head: common.vocab_terms(
                    chosen_log_prob, [(m.by_context(hidden)[0], head)], [m.ids], models.vocab, args.loss_chunk))[0]
        if preserves(args):
            pairs = [(hidden, models.head) for hidden in m.teacher]
            m.vds = common.vocab_terms(visual_dependency, pairs, (), models.vocab, args.loss_chunk)[0]
    return micros


# ====================================================================================================== weigh
TERMS = ("std", "vis", "lang", "surrogate", "vds", "log_p", "entropy")  # per token; the first four can carry weight
DECILES = torch.linspace(0.1, 0.9, 9)


def weigh(micros: list[Micro], args: Args, eta: float) -> None:
    """One weight per token and term, divisors included: mean over a response's tokens, then over all responses of all ranks."""
    responses = common.all_sum(torch.cat([1 / m.length for m in micros]).sum()).round()  # a response's tokens add up to 1
    q40 = q70 = torch.tensor(math.inf, device=common.device())
    if preserves(args):
        q40, q70 = common.all_gather(torch.cat([m.vds for m in micros])).quantile(torch.tensor([0.4, 0.7], device=common.device()))
    for m in micros:
        mean = 1 / (m.length * responses)  # [n]
        m.weights = torch.zeros(len(TERMS), len(m.ids), device=mean.device)
        if args.method != "grpo":
            scores = m.vds if m.vds is not None else torch.zeros_like(mean)
            m.weights[:3] = args.alpha * eta * steering(args.method, scores, q40, q70, args.gamma, args.lambda_lp) * mean
        if uses_rewards(args):
            m.weights[3] = -(1 if args.method == "grpo" else 1 - args.alpha) * mean  # Eq. 22 maximises the surrogate


# ====================================================================================================== update
def accumulate(micros: list[Micro], models: common.Models, args: Args) -> None:
    """student.grad += gradient of the sum over micro-batches, terms and tokens of weight * term. One forward pass each."""

    def terms(*tensors):
        """Logits [n, V] (student's, then teacher's), ids [n], old log-probs [n], advantages [n] -> TERMS."""
        *logits, ids, old, advantage = tensors
        zero = torch.zeros_like(advantage)
        log_p = logits[0].log_softmax(-1)
        chosen = common.gather(log_p, ids)
        old = torch.where(old.isnan(), chosen.detach(), old)
        surrogate = common.clipped_surrogate(chosen, old, advantage, args.clip_low, args.clip_high)
        std, vis, lang, vds = zero, zero, zero, zero
        if len(logits) == 4:
            std, vis, lang, vds = divergences(*logits)
        elif len(logits) == 2:
            std = common.kl(log_p, logits[1].log_softmax(-1))  # Eq. 3
        return std, vis, lang, surrogate, vds, chosen, common.entropy(log_p.detach())

    for m in micros:

        def loss_fn(hidden, head):
            teacher = [(h, models.head) for h in m.teacher]
            extras = [m.ids, m.old, m.advantage]
            return common.vocab_loss(terms, m.weights, m.by_context(hidden), head, teacher, extras, models.vocab, args.loss_chunk)

        loss, m.terms = models.student(m.batch, loss_fn)
        (loss * common.world_size()).backward()  # FSDP2 averages over ranks; the weights already hold the divisor


def update(micros: list[Micro], models: common.Models, args: Args) -> dict:
    """One optimizer step, and what it is worth knowing about it."""
    accumulate(micros, models, args)
    norm = common.clip_and_step(models.student, models.optimizer, models.schedule, args.grad_clip)
    return {"grad_norm": norm, "lr": models.schedule.get_last_lr()[0]} | statistics(micros)


def measure_eta(micros: list[Micro], models: common.Models, args: Args) -> dict:
    """Eq. 15 (Eq. 20 for lang-steer): |g_Std| / |g_Std + gamma g_Vis|. The preserving term is not part of it."""
    norms = []
    for kept in (["std"], ["std", "lang" if args.method == "lang-steer" else "vis"]):
        weigh(micros, args, eta=1.0)
        for m in micros:
            m.weights[[i for i, name in enumerate(TERMS) if name not in kept]] = 0
        accumulate(micros, models, args)
        norms.append(common.grad_norm(models.student).item())
        models.student.zero_grad()
    return {"eta": norms[0] / norms[1], "grad_norm_std": norms[0], "grad_norm_steered": norms[1]}


def statistics(micros: list[Micro]) -> dict:
    """The paper's curves over one update's tokens on all ranks: Std, Vis, Lang as the loss averages them, and by VDS decile."""
    terms = torch.cat([m.terms for m in micros], dim=-1)  # [7, N]
    length, sampled = torch.cat([m.length for m in micros]), torch.cat([m.sampled for m in micros])
    std, vis, lang, _, vds, log_p, entropy = terms
    text = bool(vds.any())  # without the question alone there is nothing to say about Vis and Lang
    gap = (log_p - sampled).abs()
    sums = torch.stack([1 / length, std / length, vis / length, lang / length, torch.ones_like(std), entropy, gap]).sum(-1)
    responses, *means, tokens, entropy, gap = common.all_sum(sums).tolist()
    log = dict(zip(("std", "vis", "lang")[: 3 if text else 1], [m / responses for m in means]))
    log |= {"response_length": tokens / responses, "entropy": entropy / tokens, "sampler_gap": gap / tokens}
    if text:
        bins = torch.bucketize(vds, common.all_gather(vds).quantile(DECILES.to(vds.device)))  # bin 0: the least visual tenth
        sums = torch.zeros(4, 10, device=vds.device).index_add_(1, bins, torch.stack([torch.ones_like(std), std, vis, lang]))
        counts, *sums = common.all_sum(sums)
        log |= {f"{name}_by_vds": (total / counts.clamp(min=1)).tolist() for name, total in zip(("std", "vis", "lang"), sums)}
    return log


# ====================================================================================================== analysis (Figure 3)
def analyze(models: common.Models, rows: common.Rows, args: Args, run: common.Run) -> None:
    """Angles between the gradients of Lang, Vis and Std, each summed over the tokens of one tenth of the visual dependency."""
    picked = range(common.rank(), min(args.analyze_rows, len(rows)), common.world_size())
    micros = score(rollout([rows[i] for i in picked], models, args), models, args)
    edges = common.all_gather(torch.cat([m.vds for m in micros])).quantile(DECILES.to(common.device()))
    table = []
    common.say("\nangles between gradients in degrees; bin 9 is the most visual tenth of the tokens\n bin   Lang-Vis   Std-Vis   Std-Lang")
    for b in range(10):
        gradients = {}
        for name in ("std", "vis", "lang"):
            for m in micros:
                m.weights = torch.zeros(len(TERMS), len(m.ids), device=common.device())
                m.weights[TERMS.index(name)] = (torch.bucketize(m.vds, edges) == b).float()
            accumulate(micros, models, args)
            gradients[name] = [common.shard(p.grad).clone() for p in models.student.parameters() if p.grad is not None]
            models.student.zero_grad()

        def dot(one: str, other: str) -> float:
            return common.all_sum(sum((g * h).sum().double() for g, h in zip(gradients[one], gradients[other]))).item()

        norms = {name: math.sqrt(dot(name, name)) for name in gradients}
        row = {"bin": b} | {f"norm_{name}": norm for name, norm in norms.items()}
        for one, other in (("lang", "vis"), ("std", "vis"), ("std", "lang")):
            product = norms[one] * norms[other]  # zero if no token fell into the bin
            row[f"{one}_{other}"] = math.degrees(math.acos(max(-1, min(1, dot(one, other) / product)))) if product else None
        table.append(row)
        common.say(f"{b:4d}", *(f"{row[key]:{width}.1f}" if row[key] is not None else "-".rjust(width)
                                for key, width in (("lang_vis", 10), ("std_vis", 9), ("std_lang", 10))))
    if common.rank() == 0:
        (run.path / "angles.json").write_text(json.dumps(table, indent=2) + "\n")
        print(f"written to {run.path / 'angles.json'}")


# ====================================================================================================== main
def check_settings(args: Args, given: set[str]) -> None:
    """Stop at contradictions, and at flags that this run would ignore."""
    if uses_rewards(args) and args.group < 2:
        raise common.UserError("GRPO compares the responses to one question with each other: set --group to at least 2")
    if not 0 <= args.alpha <= 1:
        raise common.UserError(f"--alpha is {args.alpha}; it must lie in [0, 1]")
    if min(args.gamma, args.lambda_lp, args.measure_eta) < 0 or args.eta <= 0:
        raise common.UserError("--gamma, --lambda-lp and --measure-eta must not be negative, and --eta must be positive")
    if args.analyze and not (preserves(args) and args.eval_data):
        raise common.UserError("--analyze needs all four distributions and held-out questions: --method vgs-lp and --eval-data")
    ignored = {}
    if args.method in ("standard", "grpo"):
        ignored |= dict.fromkeys(("gamma", "eta", "measure_eta"), f"--method {args.method} does not steer")
    if not preserves(args):
        ignored["lambda_lp"] = f"--method {args.method} has no preserving term"
    if args.method == "grpo":
        ignored |= dict.fromkeys(("teacher", "alpha", "log_all_terms"), "--method grpo has no teacher")
    elif args.alpha < 1:
        ignored |= dict.fromkeys(("eta", "measure_eta"), "Eq. 22, with --alpha below 1, has no eta")
    else:
        ignored |= dict.fromkeys(("clip_low", "clip_high"), "there is no GRPO without --alpha below 1")
    if args.measure_eta:
        ignored["eta"] = "it is measured (--measure-eta)"
    if reads_text(args) and args.method not in ("standard", "grpo"):
        ignored["log_all_terms"] = f"--method {args.method} logs them anyway"
    if args.analyze:
        ignored |= dict.fromkeys(("max_steps", "epochs", "lr", "schedule", "warmup", "weight_decay", "grad_clip", "prompts", "group",
                                  "updates", "eval_every", "eval_rows", "eval_samples", "eta", "measure_eta", "alpha"), "--analyze does not train")
    else:
        ignored["analyze_rows"] = "it is for --analyze"
    common.refuse_ignored(args, given, ignored)


def main() -> None:
    args, given = common.parse_args(Args, PRESETS)
    check_settings(args, given)
    common.start_distributed(args)
    processor = common.Processor(args.student)
    held_out = common.load_rows(args, processor, [with_image, without_image], held_out=True, answers=not args.analyze)
    train = None if args.analyze else common.load_rows(args, processor, [with_image, without_image], answers=uses_rewards(args))
    steps = common.count_steps(args, train)
    run = common.Run("vgs", args)
    texts = [processor.render(with_image((train or held_out)[i])) for i in range(min(32, len(train or held_out)))]
    models = common.load_models(args, processor, None if args.method == "grpo" else args.teacher, texts, steps * args.updates)
    if args.analyze:
        return analyze(models, held_out, args, run)

    eta = args.eta if steers(args) else 1.0
    order, updates = common.data_order(len(train), args.prompts, args.seed), 0
    with common.Progress(run, steps) as progress:
        progress.evaluate(models.engine, held_out, with_image, args)
        for step in progress:
            samples = rollout([train[i] for i in common.my_share(next(order))], models, args)
            progress.phase("rollout")
            parts = [score(part, models, args) for part in common.split(samples, args.updates)]
            progress.phase("score")
            for micros in parts:
                if steers(args) and args.measure_eta and updates % args.measure_eta == 0:
                    measured = measure_eta(micros, models, args)
                    eta = measured["eta"]
                    progress.log(measured)
                weigh(micros, args, eta)
                progress.log(update(micros, models, args))
                updates += 1
            progress.phase("update")
            models.engine.sync(models.student.named_parameters())
            progress.phase("sync")
            progress.samples(samples, args, rewarded=uses_rewards(args))
            progress.evaluate(models.engine, held_out, with_image, args)
    run.save("final", models.student, models.processor)


if __name__ == "__main__":
    main()
