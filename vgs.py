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
 5. eta: the presets hold the paper's constants for gamma 2; for other settings, for adaptive and for lang-steer the paper gives
    none, so give --eta or --measure-eta. Eq. 22 has none. The toy leaves it at 1: AdamW undoes a constant, clipping apart.
 6. The question alone is the same chat without the image (the paper does not describe it).
 7. The batch of 512 is read as 128 questions with 4 responses, and Table 3's 512 and 128 as questions (the paper does not say);
    the group size of Eq. 22 is not given either.
 8. GRPO's reward is 1 for a right answer, else 0; clip 0.2; mean over a response's tokens; advantages over the unbiased
    standard deviation (none of it is given).
 9. The wording of the system prompt is ours; it asks for the same: reason inside <reason></reason>, the answer in \\boxed{}.
10. Distributions are over the tokenizer's ids; the padding rows of the heads are left out. Image placeholders and padding are
    never sampled. Weight decay spares norms and biases, and gradients are clipped at norm 1, as TRL does, which the paper uses.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import common

# ====================================================================================================== settings
HUB = dict(data="LMMs-Lab-Turtle/Vision-SR1-47K", prompts=128, group=4, max_prompt=16384, max_response=2048, lr=1e-6, micro_tokens=16384,
           gradient_checkpointing=True, save_every=50)  # Table 4
PRESETS = {
    "toy": dict(student="toy/student", teacher="toy/teacher", data="toy/train", eval_data="toy/test", max_steps=150, lambda_lp=0.3,
                lr=1e-3, warmup=10, schedule="linear", dtype="float32", eval_every=25, eval_rows=400),
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
    measure_eta: int = 0  # measure eta every so many updates and use that; each time two more forward and backward passes; 0 = the constant
    alpha: float = 1.0  # weight of distillation against GRPO (Eq. 22; the paper's mix: 0.3); 1 = distillation alone
    clip_low: float = 0.2  # GRPO clips the probability ratio below 1 - clip_low
    clip_high: float = 0.2  # and above 1 + clip_high
    log_all_terms: bool = False  # also read the question alone where the method does not need it, to log Vis and Lang
    analyze: bool = False  # no training: the angles between the gradients of Lang, Vis and Std on --eval-rows questions (Figure 3)


STEERED = ("vgs", "vgs-lp", "adaptive", "lang-steer")  # these read the question alone


def reads_text(args: Args) -> bool:
    return args.method in STEERED or args.log_all_terms


def uses_percentiles(args: Args) -> bool:
    return args.method in ("vgs-lp", "adaptive", "lang-steer")


def uses_eta(args: Args) -> bool:
    return args.method in STEERED and args.alpha == 1


def uses_rewards(args: Args) -> bool:
    return args.method == "grpo" or args.alpha < 1


# ====================================================================================================== contexts
SYSTEM = {"role": "system", "content": "Think first, inside <reason></reason>. Then put the final answer in \\boxed{}."}


def with_image(row: dict) -> common.Context:
    """I, x: what the student samples under; behind pI and qI."""
    return common.Context([SYSTEM, common.user_message(row["problem"], len(row["images"]))], row["images"])


def without_image(row: dict) -> common.Context:
    """x alone: the same chat, the image left out (not blanked); behind pL and qL."""
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
    if method != "lang-steer":
        raise ValueError(f"there is no method {method!r}; choose one of: {', '.join(('standard', *STEERED))}")
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
    """The teacher reads every sequence once, and with several updates the student too. Hidden states are kept, never logits."""
    micros = common.make_micros(Micro, samples, list(contexts(args)), models.processor, args.micro_tokens)
    for m in micros:
        with torch.no_grad():
            if models.teacher is not None:
                m.teacher = m.by_context(models.teacher(m.batch))  # the batch with the image, then without: [n, H] each
            if uses_rewards(args) and args.updates > 1:  # later updates need the policy that sampled, not their own
                m.old = models.student(m.batch, lambda hidden, head: common.response_log_probs(
                    m.by_context(hidden)[0], head, m.ids, models.vocab, args.loss_chunk))
        if uses_percentiles(args):  # needed before any update: the price is the teacher's head product a second time
            pairs = [(hidden, models.head) for hidden in m.teacher]
            m.vds = common.vocab_terms(visual_dependency, pairs, (), models.vocab, args.loss_chunk)[0]
    return micros


# ====================================================================================================== weigh
TERMS = ("std", "vis", "lang", "surrogate", "vds", "log_p", "entropy")  # per token; the first four can carry weight
DECILES = torch.linspace(0.1, 0.9, 9)


def weigh(micros: list[Micro], args: Args, eta: float) -> None:
    """One weight per token and term, divisors included: mean over a response's tokens, then over all responses of all ranks."""
    responses = common.all_sum(torch.cat([1 / m.length for m in micros]).sum()).round()  # T tokens of 1 / T: each response counts 1
    q40 = q70 = torch.tensor(math.inf, device=common.device())
    if uses_percentiles(args):
        q40, q70 = common.quantile(torch.cat([m.vds for m in micros]), torch.tensor([0.4, 0.7]))
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
        log_p = logits[0].log_softmax(-1)
        chosen = common.gather(log_p, ids)
        old = torch.where(old.isnan(), chosen.detach(), old)
        surrogate = common.clipped_surrogate(chosen, old, advantage, args.clip_low, args.clip_high)
        std = vis = lang = vds = torch.zeros_like(advantage)
        if len(logits) == 4:
            std, vis, lang, vds = divergences(*logits)
        elif len(logits) == 2:
            std = common.kl(log_p, logits[1].log_softmax(-1))  # Eq. 3
        return std, vis, lang, surrogate, vds, chosen, common.entropy(log_p.detach())

    for m in micros:

        def loss_fn(hidden, head):
            return common.vocab_loss(terms, m.weights, m.by_context(hidden), head, [(h, models.head) for h in m.teacher],
                                     [m.ids, m.old, m.advantage], models.vocab, args.loss_chunk)

        loss, m.terms = models.student(m.batch, loss_fn)
        (loss * common.world_size()).backward()  # FSDP2 averages over ranks; the weights already hold the divisor


def update(micros: list[Micro], models: common.Models, args: Args) -> dict:
    """One optimizer step, and what it is worth knowing about it."""
    accumulate(micros, models, args)
    stepped = common.clip_and_step(models, micros, TERMS, args.grad_clip)
    return stepped | statistics(micros)


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
    usable = norms[1] and math.isfinite(sum(norms))  # where it is not the update will say what is not finite
    return {"eta": norms[0] / norms[1] if usable else 1.0, "grad_norm_std": norms[0], "grad_norm_steered": norms[1]}


def statistics(micros: list[Micro]) -> dict:
    """The paper's curves over one update's tokens on all ranks: Std, Vis, Lang as the loss averages them, and by VDS decile."""
    terms = dict(zip(TERMS, torch.cat([m.terms for m in micros], dim=-1)))  # [N] each
    length = torch.cat([m.length for m in micros])
    known = ("std", "vis", "lang") if len(micros[0].teacher) == 2 else ("std",) * len(micros[0].teacher)  # what a teacher was read for
    one, gap = torch.ones_like(length), common.sampler_gap(micros, terms["log_p"])
    sums = common.all_sum(torch.stack([1 / length, one, terms["entropy"], gap, *(terms[name] / length for name in known)]).sum(-1))
    responses, tokens, entropy, gap, *means = sums.tolist()
    log = {"response_length": tokens / responses, "entropy": entropy / tokens, "sampler_gap": gap / tokens}
    log |= {name: mean / responses for name, mean in zip(known, means)}
    if len(known) == 3:
        bins = torch.bucketize(terms["vds"], common.quantile(terms["vds"], DECILES))  # bin 0: the least visual tenth
        sums = torch.zeros(4, 10, device=bins.device).index_add_(1, bins, torch.stack([one, *(terms[name] for name in known)]))
        counts, *sums = common.all_sum(sums)
        log |= {f"{name}_by_vds": (total / counts.clamp(min=1)).tolist() for name, total in zip(known, sums)}
    return log


# ====================================================================================================== analysis (Figure 3)
def analyze(models: common.Models, rows: common.Rows, args: Args, run: common.Run) -> None:
    """Angles between the gradients of Lang, Vis and Std, each summed over the tokens of one tenth of the visual dependency."""
    run.begin(f"gradient angles on {len(rows)} held-out questions x {args.group} responses")
    picked = range(common.rank(), len(rows), common.world_size())
    micros = score(rollout([rows[i] for i in picked], models, args), models, args)
    edges = common.quantile(torch.cat([m.vds for m in micros]), DECILES)
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
    if args.analyze and not (uses_percentiles(args) and args.eval_data):
        raise common.UserError("--analyze needs all four distributions and held-out questions: --method vgs-lp and --eval-data")
    if uses_eta(args) and args.eta != 1 and "eta" not in given and (args.method not in ("vgs", "vgs-lp") or args.gamma != 2):
        raise common.UserError(f"the preset's eta {args.eta} holds for vgs and vgs-lp with gamma 2; give --eta, or --measure-eta 10")
    if args.method != "grpo" and not args.plan and args.teacher.startswith("runs/") and not Path(args.teacher).exists():
        raise common.UserError(f"the teacher {args.teacher!r} is not there yet: train it with --preset teacher, or name another with --teacher")
    ignored = {}
    if not uses_percentiles(args):
        ignored["lambda_lp"] = f"--method {args.method} has no preserving term"
    if args.method in STEERED:
        ignored["log_all_terms"] = f"--method {args.method} logs them anyway"
    else:
        ignored["gamma"] = f"--method {args.method} does not steer"
    if not uses_eta(args):
        ignored |= dict.fromkeys(("eta", "measure_eta"), "only steering without GRPO has an eta")
    elif args.measure_eta:
        ignored["eta"] = "it is measured (--measure-eta)"
    if args.method == "grpo":
        ignored |= dict.fromkeys(("teacher", "alpha", "log_all_terms"), "--method grpo has no teacher")
    if not uses_rewards(args):
        ignored |= dict.fromkeys(("clip_low", "clip_high"), "there is no GRPO without --alpha below 1")
    elif args.updates == 1:
        ignored |= common.CLIPS
    if args.analyze:
        ignored |= dict.fromkeys((*common.TRAINING, "eta", "measure_eta", "alpha", "gamma", "lambda_lp"), "--analyze does not train")
    common.refuse_ignored(args, given, ignored)


def main() -> None:
    args, given = common.parse_args(Args, PRESETS)
    check_settings(args, given)
    if args.plan:
        teacher = args.teacher if Path(args.teacher).exists() or not args.teacher.startswith("runs/") else PRESETS["teacher"]["student"]
        return common.print_plan(args, None if args.method == "grpo" else teacher, len(contexts(args)), kept=len(contexts(args)))
    common.start_distributed(args)
    run = common.Run("vgs", args)
    processor, teacher = common.Processor(args.student), None if args.method == "grpo" else args.teacher
    if teacher is not None:
        common.check_same_inputs(processor, common.Processor(teacher))
    held_out = common.load_rows(args, processor, contexts(args), held_out=True, answers=not args.analyze)
    train = None if args.analyze else common.load_rows(args, processor, contexts(args), answers=uses_rewards(args))
    steps = common.count_steps(args, train)
    models = common.load_models(args, processor, teacher, steps * args.updates)
    if args.analyze:
        return analyze(models, held_out, args, run)

    run.begin(f"{args.method}, {steps} steps of {args.prompts} questions x {args.group} responses in {args.updates} updates, "
              f"{args.prompts * args.group // args.updates} responses an update, on {common.world_size()} ranks")
    questions = common.Questions(train, args.prompts, args.seed, args.updates)
    with common.Progress(run, steps, models, questions) as progress:
        progress.evaluate(models.engine, held_out, with_image, args)
        for step in progress:
            samples = rollout(questions.draw(), models, args)
            progress.samples(samples, args, rewarded=uses_rewards(args))
            progress.phase("rollout")
            parts = [score(part, models, args) for part in common.split(samples, args.updates)]
            progress.phase("score")
            for updates, micros in enumerate(parts, (step - 1) * args.updates):
                if uses_eta(args) and args.measure_eta and updates % args.measure_eta == 0:
                    measured = measure_eta(micros, models, args)
                    progress.own["eta"] = measured["eta"]
                    progress.log(measured)
                weigh(micros, args, progress.own.get("eta", args.eta) if uses_eta(args) else 1.0)
                progress.log(update(micros, models, args))
            progress.phase("update")
            models.engine.sync(models.student.weights())
            progress.phase("sync")
            progress.evaluate(models.engine, held_out, with_image, args)


if __name__ == "__main__":
    common.launch(main)
