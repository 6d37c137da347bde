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
                lambda_lp=0.3, micro_batch=32, max_steps=120, eval_every=20),
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


def check_settings(args: Args, given: set[str]) -> None:
    """Stop at contradictions, and at flags that this run would ignore."""
    if uses_rewards(args) and args.group < 2:
        raise common.UserError("GRPO compares the responses to one question with each other: set --group to at least 2")
    if not 0 <= args.alpha <= 1:
        raise common.UserError(f"--alpha is {args.alpha}; it must lie in [0, 1]")
    if min(args.gamma, args.lambda_lp, args.measure_eta) < 0 or args.eta <= 0:
        raise common.UserError("--gamma, --lambda-lp and --measure-eta must not be negative, and --eta must be positive")
    if args.analyze and not preserves(args):
        raise common.UserError("--analyze needs all four distributions: use it with --method vgs-lp")
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
    if args.max_steps:
        ignored["epochs"] = "--max-steps decides"
    if not args.eval_data:
        ignored |= dict.fromkeys(("eval_every", "eval_rows", "eval_samples", "eval_split"), "there is no --eval-data")
    common.refuse_ignored(given, ignored)


# ====================================================================================================== contexts
SYSTEM = {"role": "system", "content": "Think first, inside <reason></reason>. Then put the final answer in \\boxed{}."}


def with_image(row: dict) -> common.Context:
    """I, x: what the student samples under, and the teacher's pI-side context."""
    return common.Context([SYSTEM, common.user_message(row["problem"], len(row["images"]))], row["images"])


def without_image(row: dict) -> common.Context:
    """x alone: the same chat, the image left out (not blanked)."""
    return common.Context([SYSTEM, common.user_message(row["problem"], 0)])


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
@dataclass
class Models:
    processor: common.Processor
    student: common.Model
    teacher: common.Model | None
    engine: common.HFEngine
    head: Tensor | None = None  # the teacher's output matrix [V, H], whole on every rank
    vocab: int = 0  # columns that student, teacher and tokenizer share
    optimizer: torch.optim.Optimizer | None = None
    schedule: object = None


@dataclass
class Sample:
    """One response with the contexts it is read in."""

    row: dict
    image: common.Prompt  # I, x
    text: common.Prompt | None  # x
    response: common.Response
    reward: float = 0.0
    advantage: float = 0.0


def rollout(rows: list[dict], models: Models, args: Args) -> list[Sample]:
    """The student answers this rank's questions with the image: `group` consecutive samples a question."""
    encode = models.processor.encode
    prompts = [(row, encode(with_image(row)), encode(without_image(row)) if reads_text(args) else None) for row in rows]
    responses = models.engine.generate([image for _, image, _ in prompts for _ in range(args.group)], args.temperature, args.top_p, args.top_k)
    samples = [Sample(*prompts[i // args.group], response) for i, response in enumerate(responses)]
    if uses_rewards(args):
        for sample in samples:
            answer = common.extract_answer(sample.response.text)
            sample.reward = float(common.is_correct(answer, str(sample.row["answer"])))
        rewards = torch.tensor([sample.reward for sample in samples])
        for sample, advantage in zip(samples, common.group_advantages(rewards, args.group).tolist()):
            sample.advantage = advantage
    return samples


# ====================================================================================================== score
@dataclass
class Micro:
    """A micro-batch and all that is known of it before the update. n response tokens, sequence after sequence."""

    batch: dict[str, Tensor]  # the sequences with the image, then the same ones without (if the method reads them)
    ids: Tensor  # [n] response tokens
    length: Tensor  # [n] length of the response that a token belongs to
    sampled: Tensor  # [n] the sampler's log-prob of the token
    advantage: Tensor  # [n]
    teacher: list[Tensor]  # hidden states [n, H] behind qI and qL
    old: Tensor  # [n] the policy's log-prob at rollout time; NaN: the current policy is that policy
    vds: Tensor | None = None  # [n]
    weights: Tensor | None = None  # [4, n] of the first four TERMS
    terms: Tensor | None = None  # [7, n]


def score(samples: list[Sample], models: Models, args: Args) -> list[Micro]:
    """Group samples into micro-batches and let the frozen models read each once. Hidden states are kept, never logits."""
    micros = []
    for picked in common.micro_batches([len(s.image.ids) + len(s.response.ids) for s in samples], args.micro_batch):
        part = [samples[i] for i in picked]
        responses = [s.response.ids for s in part]
        views = [[s.image for s in part]] + ([[s.text for s in part]] if reads_text(args) else [])
        if not part:  # this rank has run out of work, and the others wait for it in every layer: an empty response
            responses, views = [[]], [[models.processor.blank()] for _ in views]
        batch = models.processor.batch([prompt for view in views for prompt in view], responses * len(views))
        batch = {key: value.to(common.device()) for key, value in batch.items()}
        lengths = [len(r) for r in responses]
        micro = Micro(
            batch, common.per_token(lengths, responses, torch.long), common.per_token(lengths, lengths),
            common.per_token(lengths, [s.response.log_probs for s in part]), common.per_token(lengths, [s.advantage for s in part]),
            teacher=[], old=torch.full((sum(lengths),), math.nan, device=common.device()),
        )
        n = len(micro.ids)
        with torch.no_grad():
            if models.teacher is not None:
                hidden = models.teacher(batch)  # [n, H], or [2n, H]: with the image, then without
                micro.teacher = [hidden[:n], hidden[n:]][: len(views)]
            if uses_rewards(args) and args.updates > 1:
                pairs = [(models.student(batch)[:n], models.student.head())]
                micro.old = common.vocab_terms(lambda z, ids: (common.gather(z.log_softmax(-1), ids),), pairs, [micro.ids], models.vocab, args.loss_chunk)[0]
        if preserves(args):
            pairs = [(hidden, models.head) for hidden in micro.teacher]
            micro.vds = common.vocab_terms(lambda yI, yL: (common.kl(yI.log_softmax(-1), yL.log_softmax(-1)),), pairs, (), models.vocab, args.loss_chunk)[0]
        micros.append(micro)
    return micros


# ====================================================================================================== weigh
TERMS = ("std", "vis", "lang", "surrogate", "vds", "log_p", "entropy")  # per token; the first four can carry weight


def weigh(micros: list[Micro], args: Args, eta: float) -> None:
    """One weight per token and term, divisors included: mean over a response's tokens, then over all responses of all ranks."""
    responses = common.all_sum(sum(((1 / m.length).sum() for m in micros), torch.zeros((), device=common.device())))
    q40 = q70 = torch.tensor(math.inf, device=common.device())
    if preserves(args):
        q40, q70 = common.all_gather(torch.cat([m.vds for m in micros])).quantile(torch.tensor([0.4, 0.7], device=common.device()))
    for m in micros:
        mean = 1 / (m.length * responses)  # [n]
        m.weights = torch.zeros(4, len(m.ids), device=mean.device)
        if args.method != "grpo":
            scores = m.vds if m.vds is not None else torch.zeros_like(mean)
            m.weights[:3] = args.alpha * eta * steering(args.method, scores, q40, q70, args.gamma, args.lambda_lp) * mean
        if uses_rewards(args):
            m.weights[3] = -(1 if args.method == "grpo" else 1 - args.alpha) * mean  # Eq. 22 maximises the surrogate


# ====================================================================================================== update
def accumulate(micros: list[Micro], models: Models, args: Args) -> None:
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
        n = len(m.ids)

        def loss_fn(hidden, head):
            ours = [hidden[:n], hidden[n:]] if reads_text(args) else [hidden]
            teacher = [(h, models.head) for h in m.teacher]
            weights = torch.cat([m.weights, m.weights.new_zeros(len(TERMS) - 4, n)])
            return common.vocab_loss(terms, weights, ours, head, teacher, [m.ids, m.old, m.advantage], models.vocab, args.loss_chunk)

        loss, m.terms = models.student(m.batch, loss_fn)
        (loss * common.world_size()).backward()  # FSDP2 averages over ranks; the weights already hold the divisor


def update(micros: list[Micro], models: Models, args: Args) -> dict:
    """One optimizer step, and what it is worth knowing about it."""
    accumulate(micros, models, args)
    norm = common.clip_and_step(models.student, models.optimizer, models.schedule, args.grad_clip)
    return {"grad_norm": norm, "lr": models.schedule.get_last_lr()[0]} | statistics(micros)


def measure_eta(micros: list[Micro], models: Models, args: Args) -> dict:
    """Eq. 15 (Eq. 20 for lang-steer): |g_Std| / |g_Std + gamma g_Vis|. The preserving term is not part of it."""
    kept, norms = [m.weights for m in micros], {}
    steered = 2 if args.method == "lang-steer" else 1
    for name, rows in (("std", [0]), ("steered", [0, steered])):
        for m, weights in zip(micros, kept):
            m.weights = torch.zeros_like(weights)
            m.weights[rows] = weights[rows]
        accumulate(micros, models, args)
        norms[name] = common.grad_norm(models.student).item()
        models.student.zero_grad()
    for m, weights in zip(micros, kept):
        m.weights = weights
    return {"eta": norms["std"] / norms["steered"], "grad_norm_std": norms["std"], "grad_norm_steered": norms["steered"]}


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
        deciles = torch.linspace(0.1, 0.9, 9, device=vds.device)
        bins = torch.bucketize(vds, common.all_gather(vds).quantile(deciles))  # bin 0: the least visual tenth of the tokens
        sums = torch.zeros(4, 10, device=vds.device).index_add_(1, bins, torch.stack([torch.ones_like(std), std, vis, lang]))
        counts, *sums = common.all_sum(sums)
        log |= {f"{name}_by_vds": (total / counts.clamp(min=1)).tolist() for name, total in zip(("std", "vis", "lang"), sums)}
    return log


# ====================================================================================================== analysis (Figure 3)
def analyze(models: Models, rows, args: Args, run) -> None:
    """Angles between the gradients of Lang, Vis and Std, each summed over the tokens of one tenth of the visual dependency."""
    picked = list(range(min(args.analyze_rows, len(rows))))[common.rank() :: common.world_size()]
    micros = score(rollout([rows[i] for i in picked], models, args), models, args)
    edges = common.all_gather(torch.cat([m.vds for m in micros])).quantile(torch.linspace(0.1, 0.9, 9, device=common.device()))
    table = []
    for b in range(10):
        gradients = []
        for k in range(3):  # Std, Vis, Lang
            for m in micros:
                m.weights = torch.zeros(4, len(m.ids), device=common.device())
                m.weights[k] = (torch.bucketize(m.vds, edges) == b).float()
            accumulate(micros, models, args)
            gradients.append([common.shard(p.grad).clone() for p in models.student.parameters() if p.grad is not None])
            models.student.zero_grad()
        product = torch.stack([torch.stack([sum((a * c).sum() for a, c in zip(g, h)) for h in gradients]) for g in gradients])
        product = common.all_sum(product).double()  # [3, 3] inner products
        cosine = (product / product.diag().sqrt().outer(product.diag().sqrt())).clamp(-1, 1)
        std_vis, std_lang, vis_lang = (math.degrees(math.acos(c)) for c in (cosine[0, 1], cosine[0, 2], cosine[1, 2]))
        norms = product.diag().sqrt().tolist()
        table.append({"bin": b, "lang_vis": vis_lang, "std_vis": std_vis, "std_lang": std_lang, "norms": dict(zip(("std", "vis", "lang"), norms))})
    common.say("\nangles between gradients, in degrees; bin 9: the most visual tenth of the tokens\n bin   Lang-Vis   Std-Vis   Std-Lang")
    for row in table:
        common.say(f"{row['bin']:4d} {row['lang_vis']:10.1f} {row['std_vis']:9.1f} {row['std_lang']:10.1f}")
    if common.rank() == 0:
        (run.path / "angles.json").write_text(json.dumps(table, indent=2) + "\n")
        print(f"written to {run.path / 'angles.json'}")


# ====================================================================================================== main
def load_models(args: Args, texts: list[str], updates: int) -> Models:
    """Student, teacher and rollout engine. Stops before any weights are loaded if student and teacher cannot work together."""
    processor = common.Processor(args.student)
    if args.method != "grpo":
        common.check_same_inputs(processor, common.Processor(args.teacher), texts)
    student = common.load_model(args.student, args.dtype, True, args.freeze_vision, args.gradient_checkpointing)
    teacher = common.load_model(args.teacher, args.dtype, False) if args.method != "grpo" else None
    heads = [model.head() for model in (student, teacher) if model is not None]
    vocab = min(processor.vocab, *(len(head) for head in heads), len(heads[0]))
    engine = common.HFEngine(args.student, processor, args)
    return Models(processor, student, teacher, engine, heads[-1], vocab, *common.make_optimizer(student, args, updates))


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
    models = load_models(args, texts, steps * args.updates)
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
                weigh(micros, args, eta)
                if steers(args) and args.measure_eta and updates % args.measure_eta == 0:
                    measured = measure_eta(micros, models, args)
                    eta = measured["eta"]
                    weigh(micros, args, eta)
                    progress.log(measured)
                progress.log(update(micros, models, args))
                updates += 1
            progress.phase("update")
            models.engine.sync(models.student.named_parameters())
            progress.phase("sync")
            progress.log(common.mean_over_ranks({"finished": [s.response.finished for s in samples], "reward": [s.reward for s in samples]}))
            for s in samples[: args.log_samples]:
                run.write("samples.jsonl", {"step": step, "row": s.row["index"], "problem": s.row["problem"], "response": s.response.text,
                                            "ids": s.response.ids, "answer": s.row.get("answer"), "reward": s.reward})
            progress.evaluate(models.engine, held_out, with_image, args)
    run.save("final", models.student, models.processor)


if __name__ == "__main__":
    main()
