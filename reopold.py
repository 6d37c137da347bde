"""Reopold: relaxed on-policy distillation. The teacher's log-ratio as a fixed token reward, floored, and given to selected tokens.

Paper: "Scaling Reasoning Efficiently via Relaxed On-Policy Distillation", arXiv:2603.11137.

    python reopold.py                                                a laptop: small real models on real handwriting
    torchrun --nproc-per-node 8 reopold.py --preset visual-3b        one node: Qwen2.5-VL-3B from Qwen2.5-VL-32B on Geometry3K
    torchrun --nproc-per-node 8 reopold.py --preset math-1.5b        text alone: R1-Distill-Qwen-1.5B from Skywork-OR1-Math-7B
    torchrun --nproc-per-node 8 reopold.py --preset agentic-3b       image tools: a 3B student from Pixel-Reasoner-7B

Student p and teacher q read the same prompt x. The student samples y; p_old is the student that did. No answer is checked.
With --calls the student may look closer: y then has several turns, and what a tool returns between them is context, not a part of y.

    rho   p(y_t) / p_old(y_t)                                        Eq. 1     clipped as in PPO, pessimistically
    R     log q(y_t) - log p(y_t)                                    Eq. 2     positive: the teacher likes the token more
    J     sum of M rho R^ / sum of M, maximised                      Eq. 4     M: the tokens that are kept

    (1) --stop-gradient   R is a fixed reward: no gradient through it                                           Remark 3.1
    (2) --floor           R^ = max(R, log(lambda) / (1 - lambda))                                               Eq. 5, 7
    (3) --select          M = [H >= tau]: the share beta of the tokens with the largest entropy H of the student    Eq. 8, 10
    (4) --explore         in the first part of the run M = [R >= log(lambda) / (1 - lambda)] instead             Eq. 6, 9

    Reopold has all four. Without any it is RKL, Eq. 3, the gradient of KL(p || q) over the student's samples.

    --method skew      mean over tokens of KL(p || lambda p + (1 - lambda) q), student first
             gkd       mean over tokens of KL(p || q) over the whole vocabulary;  gkd-top: on both Top-5 sets and a tail
             sft       negative log-likelihood of the teacher's own answers
             grpo      rewards for right answers, no teacher

Where this differs from the paper, or fills in what its surviving copies lack:
 1. The masks' H and R are those of the policy that sampled (which in the first update is the current one), so that they cost one pass for all
    updates of a rollout batch; R^ is the current policy's.
    The threshold tau is taken over the response tokens of one update, on all ranks; tokens equal to it are kept.
 2. Lost in the copies of the paper, and ours: learning rates, responses a question (8), lambda 0.3, beta 0.2, the switch after half of the
    steps, clip 0.2, a frozen vision tower, the longest prompt. The group is for more samples alone: nothing compares its responses, but for
    grpo. Evaluation is greedy, and --eval-samples at temperature 1, with training's limits (paper: temperature 0.6, top-p 0.95, longer).
 3. The teacher of the visual presets is the 32B instruct model (the paper's was trained by NoisyRollout, and is not published).
 4. Top-5 GKD: the paper does not say whose five tokens, nor what becomes of the others; ours is the union of both, and a tail.
 5. The wording of the prompts and of error messages is ours, and boxes are asked for in fractions (pixels are taken as well). Names and
    arguments of the tools, and what precedes an image, are Pixel-Reasoner's (arXiv:2505.15966); a crop is the box that was asked for, without
    its margin of a tenth of the image; a box outside of the image is an error; frames are numbered on from the last image.
 6. A response in its last allowed turn may still call, and then ends there. Evaluation allows as many calls as training (the paper: 2 and 5).
 7. The agentic student is the one that VerlTool's training script names (spelled so), and so are its 10 updates of warm-up. Its data come as
    two archives: unpack both beside release.parquet, and name that with --data. Rows longer than --max-prompt are left out.
 8. The math data nest their answers: --method grpo and evaluation need them in a column of their own.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

import common
from kernels import topk_tail_divergence

# ====================================================================================================== settings
HUB = dict(prompts=128, group=8, lr=1e-6, micro_tokens=16384, gradient_checkpointing=True)
VISUAL = dict(teacher="Qwen/Qwen2.5-VL-32B-Instruct", data="xyliu6/geometry3k", updates=2, max_prompt=2048, max_response=2048, max_steps=60,
              freeze_vision=True, save_every=20, **HUB)
MATH = dict(data="Elliott/Openr1-Math-46k-8192", column_problem="prompt", updates=4, max_prompt=2048, max_response=8192, max_steps=300, save_every=50, **HUB)
AGENTIC = dict(teacher="TIGER-Lab/PixelReasoner-RL-v1", data="TIGER-Lab/PixelReasoner-RL-Data", column_problem="question", column_images="image",
               calls=2, updates=2, max_prompt=8192, max_response=8192, max_steps=40, warmup=10, skip_bad_rows=True, freeze_vision=True, save_every=20, **HUB)
PRESETS = {
    "toy": dict(student="toy/student", teacher="toy/teacher", data="toy/train", eval_data="toy/test", prompts=64, updates=2, max_steps=150, lr=1e-3,
                warmup=10, schedule="linear", dtype="float32", eval_every=25, eval_rows=400),
    "toy-math": dict(student="toy/math/student", teacher="toy/math/teacher", data="toy/math/train", eval_data="toy/math/test", prompts=64, group=4,
                     updates=2, rollout_batch=256, max_steps=100, lr=1e-3, warmup=10, schedule="linear", dtype="float32",
                     eval_every=25, eval_rows=400),
    "toy-agentic": dict(student="toy/zoom/student", teacher="toy/zoom/teacher", data="toy/zoom/train", eval_data="toy/zoom/test", calls=2, prompts=64,
                        updates=2, max_response=192, max_steps=120, lr=5e-4, warmup=10, schedule="linear", dtype="float32",
                        eval_every=25, eval_rows=200),
    "visual-3b": dict(student="Qwen/Qwen2.5-VL-3B-Instruct", **VISUAL),
    "visual-7b": dict(student="Qwen/Qwen2.5-VL-7B-Instruct", **VISUAL),
    "math-1.5b": dict(student="deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", teacher="Skywork/Skywork-OR1-Math-7B", **MATH),
    "math-7b": dict(student="deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", teacher="Skywork/Skywork-OR1-32B-Preview", **MATH),
    "agentic-3b": dict(student="VerlTool/pixel-reaoner-qwen2-5vl-3b-sft", **AGENTIC),
}


@dataclass
class Args(common.Args):
    method: Literal["reopold", "skew", "gkd", "gkd-top", "sft", "grpo"] = "reopold"  # objective, see the top of reopold.py
    stop_gradient: bool = True  # part 1: the reward is fixed, no gradient flows through it
    floor: bool = True  # part 2: no reward is below log(lambda) / (1 - lambda)
    select: bool = True  # part 3: only the share beta of the tokens with the largest entropy is trained
    explore: bool = True  # part 4: first all tokens above the floor are trained, and only after the switch the selected ones
    calls: int = 0  # calls of image tools (crop_image, select_frames) that a response may make; 0 = no tools are offered
    lam: float = 0.3  # lambda of the floor; with skew the student's share of the mixture
    beta: float = 0.2  # share of the tokens that part 3 keeps
    switch: float = 0.5  # share of the steps that part 4 explores
    clip_low: float = 0.2  # the probability ratio is clipped below 1 - clip_low
    clip_high: float = 0.2  # and above 1 + clip_high


TOP = 5  # tokens of each side that gkd-top keeps
FULL = ("skew", "gkd", "gkd-top")  # these read the teacher's whole distribution


# ====================================================================================================== contexts
INSTRUCTION = "Think inside <think></think>. Then put the final answer in \\boxed{}."


def question(row: dict) -> common.Context:
    """x, with its images if the row has any: what both student and teacher see."""
    images = row.get("images", [])
    return common.Context([common.user_message(f"{row['problem']}\n\n{INSTRUCTION}", len(images))], images)


TOOLS = {"role": "system", "content": (
    "You may look closer before you answer, with one call in a turn. Zoom into a box, in fractions of the sides:\n"
    '<tool_call>{"name": "crop_image", "arguments": {"bbox_2d": [left, top, right, bottom], "target_image": 1}}</tool_call>\n'
    'Frames of a video again:\n<tool_call>{"name": "select_frames", "arguments": {"target_frames": [1, 2]}}</tool_call>')}


def with_tools(row: dict) -> common.Context:
    """The same, with the image tools offered."""
    context = question(row)
    return common.Context([TOOLS, *context.messages], context.images)


# ====================================================================================================== losses
TERMS = ("objective", "reward", "clipped", "log_p", "entropy")  # per token; the first carries weight


def lowest_reward(lam: float) -> float:
    """Eq. 7: what log(lambda + (1 - lambda) q / p) / (1 - lambda), an upper bound of R, tends to for q -> 0. 0.3 -> -1.72."""
    return math.log(lam) / (1 - lam)


def reward_of(log_p: Tensor, log_q: Tensor, args: Args) -> Tensor:
    """R^ of the sampled tokens, [n], from log-probs [n] of student and teacher (Eq. 2, 5; Remark 3.1)."""
    reward = log_q - (log_p.detach() if args.stop_gradient else log_p)
    return reward.clamp(min=lowest_reward(args.lam)) if args.floor else reward


def terms(z: Tensor, *tensors: Tensor, args: Args) -> tuple[Tensor, ...]:
    """TERMS per token, [n] each; the objective is to be maximised. z [n, V] student; [y [n, V] teacher]; ids, old, log_q, advantage [n]."""
    *teacher, ids, old, log_q, advantage = tensors
    log_p = z.log_softmax(-1)
    chosen, clipped = common.gather(log_p, ids), torch.zeros_like(advantage)
    old = torch.where(old.isnan(), chosen.detach(), old)
    reward = log_q - chosen.detach()
    if args.method == "sft":
        objective = chosen
    elif args.method == "gkd":
        objective = -common.kl(log_p, teacher[0].log_softmax(-1))
    elif args.method == "gkd-top":
        objective = -topk_tail_divergence(z, teacher[0], TOP, "reverse_kl")  # KL(student || teacher)
    elif args.method == "skew":
        mixture = torch.logaddexp(log_p + math.log(args.lam), teacher[0].log_softmax(-1) + math.log(1 - args.lam))
        objective = -common.kl(log_p, mixture)
    else:
        gain = advantage if args.method == "grpo" else reward_of(chosen, log_q, args)
        objective = common.clipped_surrogate(chosen, old, gain, args.clip_low, args.clip_high)
        ratio, fixed = (chosen.detach() - old).exp(), gain.detach()
        clipped = torch.where(fixed > 0, ratio > 1 + args.clip_high, (ratio < 1 - args.clip_low) & (fixed < 0)).to(z.dtype)
    return objective, reward, clipped, chosen, common.entropy(log_p.detach())


# ====================================================================================================== rollout
def rollout(rows: list[dict], models: common.Models, writer, args: Args) -> list[common.Sample]:
    """The student answers this rank's questions; with sft the teacher does (writer: its engine)."""
    samples = common.sample_responses(writer or models.engine, rows, {"question": with_tools if args.calls else question}, args)
    if args.method == "grpo":
        common.reward_answers(samples, args.group)
    return samples


def tool_use(samples: list[common.Sample]) -> dict[str, float]:
    """Answered calls a response, those of them that were answered with an error, and the share of responses that ended in a refused call."""
    seen = [sample.response for sample in samples]
    return common.mean_over_ranks({"tool_calls": [len(r.observations) for r in seen], "tool_errors": [sum(o.failed for o in r.observations) for r in seen],
                                   "tool_refused": [r.refused for r in seen]})


# ====================================================================================================== score
@dataclass
class Micro(common.Micro):
    log_q: Tensor | None = None  # [n] the teacher's log-prob of the token
    entropy: Tensor | None = None  # [n] entropy of the policy that sampled, where a mask needs it


def score(samples: list[common.Sample], models: common.Models, args: Args) -> list[Micro]:
    """The teacher reads every response once: its log-probs are kept, or its hidden states where its whole distribution is needed."""
    micros = common.make_micros(Micro, samples, ["question"], models.processor, args.micro_tokens, images=models.processor.image_id is not None)
    for m in micros:
        m.log_q = torch.zeros_like(m.old)
        if models.teacher is not None:
            with torch.no_grad():
                hidden = models.teacher(m.batch)
                m.log_q = common.response_log_probs(hidden, models.head, m.ids, models.vocab, args.loss_chunk)
            m.teacher = [hidden] if args.method in FULL else []
    return micros


def remember(micros: list[Micro], models: common.Models, args: Args) -> None:
    """The policy that sampled, before any update changes it: its log-probs and entropies, where the ratio or a mask needs them."""
    if args.method in (*FULL, "sft") or not (args.updates > 1 or args.method == "reopold" and (args.select or args.explore)):
        return

    def policy(z, ids):
        log_p = z.log_softmax(-1)
        return common.gather(log_p, ids), common.entropy(log_p)

    for m in micros:
        with torch.no_grad():
            m.old, m.entropy = models.student(m.batch, lambda hidden, head: common.vocab_terms(
                policy, [(hidden, head)], [m.ids], models.vocab, args.loss_chunk))


# ====================================================================================================== weigh
def explores(args: Args, progress: float) -> bool:
    """Eq. 6: whether this step is one of the first phase. progress: the share of the run's steps that is done before it."""
    return args.method == "reopold" and args.explore and progress < args.switch


def kept(micros: list[Micro], args: Args, progress: float) -> list[Tensor]:
    """M of each micro-batch, [n]: Eq. 9 in the first phase, Eq. 10 after it."""
    if explores(args, progress):
        return [m.log_q - m.old >= lowest_reward(args.lam) for m in micros]
    if args.method == "reopold" and args.select:
        tau = common.quantile(torch.cat([m.entropy for m in micros]), torch.tensor([1 - args.beta]))
        return [m.entropy >= tau for m in micros]
    return [torch.ones_like(m.old, dtype=torch.bool) for m in micros]


def weigh(micros: list[Micro], args: Args, progress: float) -> None:
    """One weight per token: 1 / the number of kept tokens of the whole update on all ranks (Eq. 4), or 0."""
    masks = kept(micros, args, progress)
    count = common.all_sum(torch.stack([mask.sum() for mask in masks]).sum()).clamp(min=1)
    for m, mask in zip(micros, masks):
        m.weights = torch.zeros(len(TERMS), len(m.ids), device=mask.device)
        m.weights[0] = -mask.float() / count  # Eq. 4 is maximised


# ====================================================================================================== update
def accumulate(micros: list[Micro], models: common.Models, args: Args) -> None:
    """student.grad += gradient of the sum over micro-batches, terms and tokens of weight * term. One forward pass each."""
    for m in micros:

        def loss_fn(hidden, head):
            return common.vocab_loss(lambda *tensors: terms(*tensors, args=args), m.weights, [hidden], head, [(h, models.head) for h in m.teacher],
                                     [m.ids, m.old, m.log_q, m.advantage], models.vocab, args.loss_chunk)

        loss, m.terms = models.student(m.batch, loss_fn)
        (loss * common.world_size()).backward()  # FSDP2 averages over ranks; the weights already hold the divisor


def update(micros: list[Micro], models: common.Models, args: Args) -> dict:
    """One optimizer step, and what it is worth knowing about it."""
    accumulate(micros, models, args)
    return common.clip_and_step(models, micros, TERMS, args.grad_clip) | statistics(micros, args)


EDGES = torch.tensor([-16.0, -8.0, -4.0, -2.0, -1.0, -0.5, -0.1, 0.1, 0.5, 1.0, 2.0, 4.0])  # of the reward's histogram, in nats


def statistics(micros: list[Micro], args: Args) -> dict:
    """The paper's curves over one update's tokens on all ranks: rewards, their histogram (Figure 4), and by entropy (Figure 5)."""
    named = dict(zip(TERMS, torch.cat([m.terms for m in micros], dim=-1)))  # [N] each
    length, weight = torch.cat([m.length for m in micros]), torch.cat([m.weights[0] for m in micros])
    one, gap = torch.ones_like(length), common.sampler_gap(micros, named["log_p"])
    reward, floored = named["reward"], (named["reward"] < lowest_reward(args.lam)).float()
    sums = [one, 1 / length, (weight != 0).float(), named["entropy"], gap, named["clipped"], reward, floored]
    tokens, responses, *rest = common.all_sum(torch.stack(sums).sum(-1)).tolist()
    log = {"response_length": tokens / responses} | {name: x / tokens for name, x in zip(("kept", "entropy", "sampler_gap", "clipped"), rest)}
    if args.method == "sft":
        del log["sampler_gap"]  # there the teacher samples
    if args.method == "grpo":
        return log
    log |= {"log_ratio": rest[4] / tokens, "below_floor": rest[5] / tokens}
    counts = common.all_sum(torch.bincount(torch.bucketize(reward, EDGES.to(reward.device)), minlength=len(EDGES) + 1).float())
    bins = torch.bucketize(named["entropy"], common.quantile(named["entropy"], torch.linspace(0.1, 0.9, 9)))  # bin 0: the surest tenth
    values = torch.stack([one, reward.abs()])
    count, total = common.all_sum(values.new_zeros(2, 10).index_add_(1, bins, values))
    return log | {"log_ratio_histogram": (counts / tokens).tolist(), "log_ratio_by_entropy": (total / count.clamp(min=1)).tolist()}


# ====================================================================================================== main
def check_settings(args: Args, given: set[str]) -> None:
    """Stop at contradictions, and at flags that this run would ignore."""
    if not 0 < args.lam < 1:
        raise common.UserError(f"--lam is {args.lam}; it must lie in (0, 1), ends excluded")
    if not 0 < args.beta <= 1:
        raise common.UserError(f"--beta is {args.beta}; it must lie in (0, 1]: 1 keeps every token")
    if args.calls < 0:
        raise common.UserError(f"--calls is {args.calls}; it must not be negative")
    if args.switch < 0 or args.clip_high < 0 or not 0 <= args.clip_low < 1:
        raise common.UserError("--switch and --clip-high must not be negative, and --clip-low must lie in [0, 1)")
    if args.method == "grpo" and args.group < 2:
        raise common.UserError("GRPO compares the responses to one question with each other: set --group to at least 2")
    if args.updates > 1 and args.method in FULL:
        raise common.UserError(f"--updates above 1 is not for --method {args.method}: a divergence on old samples has no ratio that would mend it")
    ignored = {}
    if args.method != "reopold":
        ignored |= dict.fromkeys(("stop_gradient", "floor", "select", "explore", "beta", "switch"), f"--method {args.method} has none of Reopold's parts")
    if args.method in (*FULL, "sft"):
        ignored |= dict.fromkeys(("clip_low", "clip_high"), f"--method {args.method} has no ratio")
    elif args.updates == 1:
        ignored |= common.CLIPS
    if not (args.method == "reopold" and (args.floor or args.explore) or args.method == "skew"):
        ignored["lam"] = "there is no floor and no mixture"
    if not args.select:
        ignored["beta"] = "--no-select keeps every token"
    if not args.explore:
        ignored["switch"] = "--no-explore has one phase"
    if args.method == "grpo":
        ignored["teacher"] = "--method grpo has no teacher"
    common.refuse_ignored(args, given, ignored)


def main() -> None:
    args, given = common.parse_args(Args, PRESETS)
    check_settings(args, given)
    if args.plan:
        return common.print_plan(args, None if args.method == "grpo" else args.teacher, 1, kept=int(args.method in FULL))
    common.start_distributed(args)
    run = common.Run("reopold", args)
    processor, teacher, writer = common.Processor(args.student), None if args.method == "grpo" else args.teacher, None
    if teacher is not None:
        reader = common.Processor(teacher)
        common.check_same_inputs(processor, reader)
    if args.calls and processor.image_id is None:
        raise common.UserError(f"--calls offers image tools, and {args.student!r} is a text-only model")
    if args.calls:
        processor.next_turn(common.user_message("?", 0), [])  # stops here where the chat template cannot do it
    context, seen = with_tools if args.calls else question, dict(images=processor.image_id is not None)
    held_out = common.load_rows(args, processor, {"question": context}, held_out=True, **seen)
    train = common.load_rows(args, processor, {"question": context}, answers=args.method == "grpo", **seen)
    steps = common.count_steps(args, train)
    models = common.load_models(args, processor, teacher, steps * args.updates)
    if args.method == "sft":
        writer = common.make_engine(teacher, reader, args, sleeps=False)
    if args.calls:
        models.engine, writer = (engine and common.WithTools(engine, args.calls, args) for engine in (models.engine, writer))

    parts = [name for name in ("stop_gradient", "floor", "select", "explore") if getattr(args, name)] if args.method == "reopold" else []
    run.begin(f"{args.method}{' (' + ', '.join(parts) + ')' if parts else ''}, {steps} steps of {args.prompts} questions x {args.group} responses in "
              f"{args.updates} updates, {args.prompts * args.group // args.updates} responses an update, on {common.world_size()} ranks")
    if explores(args, (steps - 1) / steps):
        common.say(f"warning: --switch {args.switch} lies behind the last step: the run only explores")
    questions = common.Questions(train, args.prompts, args.seed, args.updates)
    with common.Progress(run, steps, models, questions) as progress:
        progress.evaluate(models.engine, held_out, context, args)
        for step in progress:
            samples = rollout(questions.draw(), models, writer, args)
            progress.samples(samples, args, rewarded=args.method == "grpo")
            if args.calls:
                progress.log(tool_use(samples))
            progress.phase("rollout")
            parts = [score(part, models, args) for part in common.split(samples, args.updates)]
            progress.phase("score")  # the teacher's share of the step (Figure 14)
            for micros in parts:
                remember(micros, models, args)
            progress.phase("remember")
            for micros in parts:
                weigh(micros, args, (step - 1) / steps)
                progress.log(update(micros, models, args))
            progress.phase("update")
            if progress.means()["kept"] == 0:
                progress.note("no token was kept: the gradient is zero")
            models.engine.sync(models.student.weights())
            progress.phase("sync")
            progress.evaluate(models.engine, held_out, context, args)


if __name__ == "__main__":
    common.launch(main)
