"""Reopold: relaxed on-policy distillation. The teacher's log-ratio as a fixed, floored reward for selected tokens.

Paper: "Scaling Reasoning Efficiently via Relaxed On-Policy Distillation", arXiv:2603.11137.

    python reopold.py                                            a laptop: small real models on real handwriting
    torchrun --nproc-per-node 8 reopold.py --preset visual-3b    one node: Qwen2.5-VL-3B from Qwen2.5-VL-32B
    torchrun --nproc-per-node 8 reopold.py --preset math-1.5b    text alone: R1-Distill-Qwen-1.5B from Skywork-OR1-Math
    torchrun --nproc-per-node 8 reopold.py --preset agentic-3b   image tools: 3B from Pixel-Reasoner-7B (see 7)

Student p and teacher q read the same prompt x. The student samples y; p_old is the student that did. No answer is
checked. With --calls the student may look closer: y then has several turns, and what a tool returns between them is
context, not a part of y.

    rho   p(y_t) / p_old(y_t)                  Eq. 1     clipped as in PPO, pessimistically
    R     log q(y_t) - log p(y_t)              Eq. 2     positive: the teacher likes the token more
    J     sum of M rho R^ / sum of M           Eq. 4     maximised; M: the tokens that are kept

    (1) --stop-gradient   R is a fixed reward: no gradient through it                             Remark 3.1
    (2) --floor           R^ = max(R, log(lambda) / (1 - lambda))                                 Eq. 5, 7
    (3) --select          M = [H >= tau]: the share beta of the tokens with the largest
                          entropy H of the student                                                Eq. 8, 10
    (4) --explore         in the first part of the run M = [R >= log(lambda) / (1 - lambda)]      Eq. 6, 9

    Reopold has all four, which is the default; --no-floor and the like leave one out. Without any it is RKL, Eq. 3, the
    gradient of KL(p || q) over the student's samples. lambda is --lam.

    --method skew      mean over tokens of KL(p || lambda p + (1 - lambda) q), student first
             gkd       mean over tokens of KL(p || q) over the vocabulary;  gkd-top: on both Top-5 sets and a tail
             sft       negative log-likelihood of the teacher's own answers
             grpo      rewards for right answers, no teacher

Where this differs from the paper, or fills in what its surviving copies lack:
 1. The masks' H and R are those of the policy that sampled (which in the first update is the current one), so that they
    cost one pass for all updates of a rollout batch; R^ is the current policy's. The threshold tau is taken over the
    response tokens of one update, on all ranks; tokens equal to it are kept.
 2. Lost in the copies of the paper, and ours: learning rates, responses a question (8), lambda 0.3, beta 0.2, the
    switch after half of the steps, clip 0.2, a frozen vision tower, the longest prompt. The group is for more samples
    alone: nothing compares its responses, but for grpo. Evaluation is greedy, with training's limits (paper:
    temperature 0.6, top-p 0.95, longer).
 3. The teacher of the visual presets is the 32B instruct model (the paper's was trained by NoisyRollout; we did
    not find its name).
 4. Top-5 GKD: the paper does not say whose five tokens, nor what becomes of the others; ours is the union of both, and
    a tail.
 5. The wording of the prompts and of error messages is ours, and boxes are asked for in fractions (pixels are taken as
    well). Names and arguments of the tools, and what precedes an image, are Pixel-Reasoner's (arXiv:2505.15966); a crop
    is the box that was asked for, without its margin of a tenth of the image; a box outside of the image is an error;
    frames are numbered on from the last image.
 6. A response in its last allowed turn may still call, and then ends there. Evaluation allows as many calls as training
    (the paper: 2 and 5).
 7. The agentic student is the one that VerlTool's training script names (spelled so), and so are its 10 updates of
    warm-up. Its data come as two archives: unpack both beside release.parquet, and name that with --data. Rows longer
    than --max-prompt are left out.
 8. The math data nest their answers: --method grpo and evaluation need them in a column of their own.
"""

import dataclasses
import functools
import json
import math
import re
from dataclasses import dataclass
from typing import Literal

import common
from kernels import topk_tail_divergence

import torch
from torch import Tensor

# =============================================================================================== settings
HUB = dict(prompts=128, group=8, micro_tokens=16384, gradient_checkpointing=True)
VISUAL = HUB | dict(
    teacher="Qwen/Qwen2.5-VL-32B-Instruct",
    data="xyliu6/geometry3k",
    min_pixels=262_144,
    max_pixels=1_000_000,
    updates=2,
    max_prompt=2048,
    max_response=2048,
    max_steps=60,
    freeze_vision=True,
    save_every=20,
)
MATH = HUB | dict(
    data="Elliott/Openr1-Math-46k-8192",
    column_problem="prompt",
    updates=4,
    max_prompt=2048,
    max_response=8192,
    max_steps=300,
    save_every=50,
)
AGENTIC = HUB | dict(
    teacher="TIGER-Lab/PixelReasoner-RL-v1",
    data="TIGER-Lab/PixelReasoner-RL-Data",
    column_problem="question",
    column_images="image",
    calls=2,
    updates=2,
    max_prompt=8192,
    max_response=8192,
    max_steps=40,
    warmup=10,
    skip_bad_rows=True,
    freeze_vision=True,
    save_every=20,
)
TOY = dict(
    prompts=64,
    updates=2,
    lr=1e-3,
    warmup=10,
    schedule="linear",
    dtype="float32",
    eval_every=25,
    eval_rows=400,
)
PRESETS = {
    "toy": TOY
    | dict(
        student="toy/student",
        teacher="toy/teacher",
        data="toy/train",
        eval_data=["toy/test"],
        max_steps=150,
    ),
    "toy-math": TOY
    | dict(
        student="toy/math/student",
        teacher="toy/math/teacher",
        data="toy/math/train",
        eval_data=["toy/math/test"],
        group=4,
        rollout_batch=256,
        max_steps=100,
    ),
    "toy-agentic": TOY
    | dict(
        student="toy/zoom/student",
        teacher="toy/zoom/teacher",
        data="toy/zoom/train",
        eval_data=["toy/zoom/test"],
        calls=2,
        max_response=192,
        max_steps=120,
        lr=5e-4,
        eval_rows=200,
    ),
    "visual-3b": VISUAL | dict(student="Qwen/Qwen2.5-VL-3B-Instruct"),
    "visual-7b": VISUAL | dict(student="Qwen/Qwen2.5-VL-7B-Instruct"),
    "math-1.5b": MATH
    | dict(
        student="deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", teacher="Skywork/Skywork-OR1-Math-7B"
    ),
    "math-7b": MATH
    | dict(
        student="deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", teacher="Skywork/Skywork-OR1-32B-Preview"
    ),
    "agentic-3b": AGENTIC | dict(student="VerlTool/pixel-reaoner-qwen2-5vl-3b-sft"),
}
RANGES = {"lam": (1e-6, 1 - 1e-6), "beta": (1e-6, 1), "switch": (0, 1), "clip": (0, 1)}


@dataclass
class Args(common.Args):
    method: Literal["reopold", "skew", "gkd", "gkd-top", "sft", "grpo"] = "reopold"  # see the top
    stop_gradient: bool = True  # part 1: the reward is fixed, no gradient flows through it
    floor: bool = True  # part 2: no reward is below log(lambda) / (1 - lambda)
    select: bool = True  # part 3: only the most uncertain share beta of the tokens is trained
    explore: bool = True  # part 4: first all tokens above the floor are trained
    calls: int = 0  # calls of image tools that a response may make; 0 = no tools are offered
    lam: float = 0.3  # lambda of the floor; with skew the student's share of the mixture
    beta: float = 0.2  # share of the tokens that part 3 keeps
    switch: float = 0.5  # share of the steps that part 4 explores
    clip: float = 0.2  # the probability ratio is clipped to 1 - clip .. 1 + clip


TOP = 5  # tokens of each side that gkd-top keeps
FULL = ("skew", "gkd", "gkd-top")  # these read the teacher's whole distribution


# =============================================================================================== contexts
INSTRUCTION = "Think inside <think></think>. Then put the final answer in \\boxed{}."
CROP = '{"name": "crop_image", "arguments": {"bbox_2d": [left, top, right, bottom], "target_image": 1}}'
SELECT = '{"name": "select_frames", "arguments": {"target_frames": [1, 2]}}'
TOOLS = common.message(
    "system",
    "You may look closer before you answer, with one call in a turn. Zoom into a box, in fractions of "
    f"the sides:\n<tool_call>{CROP}</tool_call>\nFrames of a video again:\n<tool_call>{SELECT}</tool_call>",
)


def question(row: dict) -> common.Context:
    """x, with its images if the row has any: what both student and teacher see."""
    images = row.get("images", [])
    text = f"{row['problem']}\n\n{INSTRUCTION}"
    return common.Context([common.message("user", text, len(images))], images)


def with_tools(row: dict) -> common.Context:
    """The same, with the image tools offered."""
    context = question(row)
    return common.Context([TOOLS, *context.messages], context.images)


def contexts(args: Args) -> dict:
    """What every response is sampled under and read in, by name."""
    return {"question": with_tools if args.calls else question}


# =============================================================================================== losses
def lowest_reward(lam: float) -> float:
    """Eq. 7: what log(lambda + (1 - lambda) q / p) / (1 - lambda), a bound of R, tends to for q -> 0. 0.3 -> -1.72."""
    return math.log(lam) / (1 - lam)


def reward_of(log_p: Tensor, log_q: Tensor, args: Args) -> Tensor:
    """R^ of the sampled tokens, [n], from log-probs [n] of student and teacher (Eq. 2, 5; Remark 3.1)."""
    reward = common.upcast(log_q) - (log_p.detach() if args.stop_gradient else log_p)
    return reward.clamp(min=lowest_reward(args.lam)) if args.floor else reward


# per token; the objective is maximised
TERMS = ("objective", "log_ratio", "clipped", "log_p", "entropy")


def terms(z: Tensor, *tensors: Tensor, args: Args) -> tuple[Tensor, ...]:
    """TERMS, [n] each, from the student's logits z [n, V] and what follows them.

    y [n, V], the teacher's, for the methods in FULL; then [n] each: ids, log-probs when sampled (None: as now), the
    teacher's log-probs, advantages.
    """
    *teacher, ids, old, chosen_q, advantage = tensors
    log_p = common.log_softmax(z)
    chosen = common.gather(log_p, ids)
    old = chosen.detach() if old is None else old
    log_q = common.log_softmax(teacher[0]) if teacher else None
    clipped = torch.zeros_like(chosen)
    if args.method == "sft":
        objective = chosen
    elif args.method == "gkd":
        objective = -common.kl(log_p, log_q)
    elif args.method == "gkd-top":
        objective = -topk_tail_divergence(z, teacher[0], TOP, "reverse_kl")  # student first
    elif args.method == "skew":
        mixture = torch.logaddexp(log_p + math.log(args.lam), log_q + math.log(1 - args.lam))
        objective = -common.kl(log_p, mixture)
    else:
        advantage = advantage if args.method == "grpo" else reward_of(chosen, chosen_q, args)
        objective, clipped = common.clipped_surrogate(chosen, old, advantage, args.clip, args.clip)
    log_ratio = chosen_q - chosen.detach()
    return objective, log_ratio, clipped, chosen, common.entropy(log_p.detach())


# =============================================================================================== rollout
def rollout(rows: list[dict], run: common.Run, args: Args) -> list[common.Sample]:
    """The student answers this rank's questions, with tools if it has any; with sft the teacher does."""
    samples = common.sample_responses(run.writer, rows, contexts(args), args)
    if args.method == "grpo":
        common.reward_answers(samples, args.group)
    if args.calls:
        for s in samples:  # the tools' images stand behind the question's own
            seen = s.response.conversation
            s.prompts["question"] = dataclasses.replace(seen, ids=s.prompts["question"].ids)
        run.log(tool_use([s.response for s in samples]))
    return samples


def tool_use(responses: list) -> dict[str, float]:
    """Answered calls a response, those of them that got an error, and the share that ended in a refused call."""
    calls = [len(r.errors) for r in responses]
    errors = [sum(r.errors) for r in responses]
    refused = [r.refused for r in responses]
    found = {"tool_calls": calls, "tool_errors": errors, "tool_refused": refused}
    return common.mean_over_ranks(found)


# =============================================================================================== score
def log_prob_and_entropy(z: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Of the tokens ids [n], [n] each, from logits [n, V]."""
    log_p = common.log_softmax(z)
    return common.gather(log_p, ids), common.entropy(log_p)


def score(samples: list[common.Sample], run: common.Run, args: Args) -> list[common.Micro]:
    """The teacher reads every response once, and where a ratio or a mask needs it the policy that sampled does too.

    Adds m.log_q [n], the teacher's log-prob of the token, m.old, and m.entropy [n] of the policy that sampled.
    """

    def as_sampled(m, hidden, head):
        read, pair = log_prob_and_entropy, (hidden, head)
        return common.vocab_terms(read, [pair], [m.ids], run.vocab, args.loss_chunk)

    sees = run.processor.image_id is not None
    micros = common.make_micros(samples, ["question"], run.processor, args.micro_tokens, sees)
    has_mask = args.method == "reopold" and (args.select or args.explore)
    has_ratio = args.method in ("reopold", "grpo") and args.updates > 1
    with torch.no_grad():
        for m in micros:
            m.log_q = torch.zeros_like(m.length)
            if run.teacher is not None:
                hidden = run.teacher(m.batch)
                m.log_q = run.log_probs(m, hidden, run.head)
                if args.method in FULL:
                    m.teacher = [hidden]
            if has_mask or has_ratio:
                m.old, m.entropy = run.student(m.batch, functools.partial(as_sampled, m))
    return micros


# =============================================================================================== weigh
def explores(step: int, run: common.Run, args: Args) -> bool:
    """Eq. 6: whether the step is one of the first phase. 10 steps, --switch 0.5 -> steps 1 to 5."""
    return args.method == "reopold" and args.explore and (step - 1) / run.total < args.switch


def weigh(micros: list[common.Micro], run: common.Run, args: Args):
    """M of every token, m.kept [n], and its weight: 1 / the sum of M over the update on all ranks (Eq. 4)."""
    exploring = explores(run.step, run, args)
    if explores(run.total, run, args):
        run.note(f"--switch {args.switch} lies behind the last step: the run only explores")
    selects = args.method == "reopold" and args.select and not exploring
    if selects:
        (tau,) = common.quantile(torch.cat([m.entropy for m in micros]), [1 - args.beta])
    for m in micros:
        m.kept = torch.ones_like(m.length, dtype=torch.bool)
        if exploring:
            m.kept = m.log_q - m.old >= lowest_reward(args.lam)  # Eq. 9
        elif selects:
            m.kept = m.entropy >= tau  # Eq. 10
    count = common.all_sum(torch.cat([m.kept for m in micros]).sum()).clamp(min=1)
    for m in micros:
        m.weights = {"objective": -m.kept.float() / count}


# =============================================================================================== update
EDGES = [-16.0, -8.0, -4.0, -2.0, -1.0, -0.5, -0.1, 0.1, 0.5, 1.0, 2.0, 4.0]  # of the histogram


def update(micros: list[common.Micro], run: common.Run, args: Args) -> dict:
    """One optimizer step, and the paper's curves: rewards, their histogram (Figure 4), and by entropy (Figure 5)."""
    log = run.update(micros, TERMS, functools.partial(terms, args=args), extras)
    found = common.all_terms(micros)
    kept = torch.cat([m.kept for m in micros]).float()
    log |= common.token_means({"clipped": found["clipped"], "kept": kept})
    if log.get("kept") == 0:
        run.note("no token was kept: the gradient is zero")
    if args.method == "sft":
        del log["sampler_gap"]  # there the teacher samples
    if args.method == "grpo":
        return log
    log_ratio = found["log_ratio"]
    below = (log_ratio < lowest_reward(args.lam)).float()
    log |= common.token_means({"log_ratio": log_ratio, "below_floor": below})
    place = torch.bucketize(log_ratio, torch.tensor(EDGES, device=log_ratio.device))
    shares = common.token_means({b: (place == b).float() for b in range(len(EDGES) + 1)})
    log["log_ratio_histogram"] = [shares[b] for b in range(len(EDGES) + 1)]
    deciles = common.quantile(found["entropy"], [i / 10 for i in range(1, 10)])
    tenth = torch.bucketize(found["entropy"], deciles)  # 0: the surest tokens
    means = [common.token_means({"size": log_ratio.abs()}, tenth == b) for b in range(10)]
    log["log_ratio_by_entropy"] = [mean.get("size", 0.0) for mean in means]
    return log


def extras(m: common.Micro, hidden: Tensor, head: Tensor) -> list:
    """What terms needs besides logits."""
    return [m.ids, m.old, m.log_q, m.advantage]


# =============================================================================================== tools
CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|$)", re.S)
FRAMES = 8  # that select_frames shows at most


class ToolError(ValueError):
    """A call that cannot be answered; the message is for the model. It repeats nothing that the model wrote."""


def numbers(value, most: int) -> list:
    """A list of 1 to `most` JSON numbers below a billion, as it is (true, NaN and infinity are none)."""
    right = isinstance(value, list) and 0 < len(value) <= most
    if not right or not all(type(x) in (int, float) and abs(x) < 1e9 for x in value):
        raise ToolError(f"the arguments must be lists of at most {most} numbers")
    return value


def image_of(number, images: list):
    """Image by its number, from 1 on. Numbers are all that can be named: a call reaches no file."""
    if type(number) not in (int, float) or number not in range(1, len(images) + 1):
        raise ToolError(f"images are numbered from 1 to {len(images)}")
    return images[int(number) - 1]


def crop_image(arguments: dict, images: list) -> tuple[str, list]:
    """Zoom into bbox_2d [left, top, right, bottom], in fractions of the sides or in pixels, of target_image."""
    image = image_of(arguments.get("target_image", 1), images)
    box = numbers(arguments.get("bbox_2d"), 4)
    if len(box) != 4 or max(box) > 1 and any(0 < x < 1 for x in box):
        raise ToolError("bbox_2d must be four fractions of the sides, from 0 to 1, or four pixels")
    width, height = image.size
    if max(box) <= 1:
        box = [x * side for x, side in zip(box, (width, height, width, height))]
    left, top, right, bottom = box
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise ToolError(f"the box is empty or outside of the image of {width} x {height} pixels")
    part = image.crop((math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)))
    return f"Here is the cropped image (Image Size: {part.width}x{part.height}):<image>", [part]


def select_frames(arguments: dict, images: list) -> tuple[str, list]:
    """Show some of the images again: target_frames, their numbers from 1 on."""
    chosen = numbers(arguments.get("target_frames"), FRAMES)
    frames = [image_of(number, images) for number in chosen]
    first = len(images) + 1
    size = f"{frames[0].width}x{frames[0].height}, Numbered {first} to {first + len(frames) - 1}"
    return f"Here are the selected frames (Frame Size: {size}):{'<image>' * len(frames)}", frames


# Name in a call -> fn(arguments, images so far) -> (text with <image> marks, images), or raises ToolError.
FUNCTIONS = {
    "crop_image": crop_image,
    "crop_image_normalized": crop_image,
    "select_frames": select_frames,
}


def answer_call(call: str, images: list) -> tuple[str, list, bool]:
    """What a tool says to the JSON of a call: (text, images, whether it is an error message)."""
    try:
        try:
            wanted = json.loads(call)
            function, arguments = FUNCTIONS[wanted["name"]], wanted["arguments"]
        except (ValueError, RecursionError, LookupError, TypeError):
            names = ", ".join(FUNCTIONS)
            raise ToolError(
                f'a call is {{"name": ..., "arguments": {{...}}}}, with one of: {names}'
            )
        if not isinstance(arguments, dict):
            raise ToolError("arguments must be a JSON object")
        return *function(arguments, images), False
    except ToolError as e:
        return f"Error: {e}.", [], True


def next_turn(processor, text: str, images: list) -> common.Prompt:
    """A tool's answer as a user turn: from behind the end of the model's turn to the beginning of its next one."""
    said = [common.message("user", "?"), common.message("assistant", "!")]
    show = processor.tokenizer.apply_chat_template
    before = show(said, tokenize=False)
    turn = common.message("user", text, len(images))
    after = show([*said, turn], tokenize=False, add_generation_prompt=True)
    eos = processor.tokenizer.eos_token
    end = before.rfind(eos) + len(eos)
    if eos not in before or after[:end] != before[:end]:
        raise common.UserError(
            f"the chat template of {processor.name!r} cannot go on after an answer: it rewrites "
            f"earlier turns, or does not end them in {eos}. --calls needs one that does"
        )
    return processor.encode_text(after[end:], images)


def join(prompt: common.Prompt, turn: common.Prompt) -> common.Prompt:
    """A conversation with a turn behind it."""
    both = [p for p in (prompt, turn) if p.pixels is not None]
    pixels = torch.cat([p.pixels for p in both]) if both else None
    grid = torch.cat([p.grid for p in both]) if both else None
    return common.Prompt(prompt.ids + turn.ids, pixels, grid, prompt.images + turn.images)


class Turns:
    """An engine whose responses may have several turns: the model calls a tool, reads what comes back, and goes on.

    A turn that calls nothing ends the response. So do a call beyond the allowed number and a tool's answer that no
    longer fits into --max-response, which counts everything after the prompt: the response then has no answer. Its ids
    hold the tools' turns too, its mask says which tokens the model sampled, and `conversation` is prompt and response
    as one Prompt, with the tools' images.
    """

    def __init__(self, engine, args: Args):
        self.engine, self.args, self.processor = engine, args, engine.processor
        self.sync, self.sleep, self.close = engine.sync, engine.sleep, engine.close

    def generate(self, prompts, seeds=None) -> list[common.Response]:
        """See HFEngine.generate."""
        responses = [common.Response([]) for _ in prompts]
        for response, prompt in zip(responses, prompts):
            response.conversation, response.errors, response.refused = prompt, [], False
        going = list(range(len(prompts)))
        for turn in range(self.args.calls + 1):
            if not going:
                break
            asked = [responses[i].conversation for i in going]
            drawn = seeds and [common.seed_of(seeds[i], turn) for i in going]
            answers = self.engine.generate(asked, drawn)
            last = turn == self.args.calls
            going = [i for i, a in zip(going, answers) if self.extend(responses[i], a, last)]
        return responses

    def extend(self, response, answer, last: bool) -> bool:
        """Add a turn of the model's, and a tool's if it called one; whether the model is to go on."""
        room = self.args.max_response - len(response.ids)
        ids, said = answer.ids[:room], answer.text
        cut = len(answer.ids) > room
        if cut:  # what lies behind the limit was not said
            said = self.processor.tokenizer.decode(ids, skip_special_tokens=True)
        self.add(response, common.Prompt(ids), sampled=True)
        response.log_probs += answer.log_probs[: len(ids)]
        response.text += said
        call = CALL.search(said)
        ended = answer.finished and not cut
        response.finished = ended and not call
        if not ended or not call:
            return False
        text, images, failed = answer_call(call[1].strip(), response.conversation.images)
        try:
            turn = next_turn(self.processor, text, images)
        except ValueError:  # a strip so narrow that the image processor refuses it
            text, failed = "Error: that part is too narrow to be shown.", True
            turn = next_turn(self.processor, text, [])
        shown = len(response.conversation.images) + len(turn.images)
        if last or len(turn.ids) >= room - len(ids) or shown > common.IMAGES:
            response.refused = True
            response.text = ""  # whatever stands before the call is no answer
            return False
        self.add(response, turn, sampled=False)
        response.text += f"\n(tool: {text})\n"
        response.errors.append(failed)
        return True

    def add(self, response, turn: common.Prompt, sampled: bool):
        response.ids = response.ids + turn.ids
        response.mask = response.mask + [sampled] * len(turn.ids)
        response.conversation = join(response.conversation, turn)


# =============================================================================================== main
def check(args: Args):
    """Refuse settings that contradict each other."""
    if args.method == "grpo" and args.group < 2:
        raise common.UserError("GRPO compares a question's responses: set --group to at least 2")
    if args.method == "sft" and args.engine == "vllm":
        raise common.UserError("--method sft samples from the teacher: set --engine hf")


def check_tools(processor, args: Args):
    """Refuse a student to which no image, or no second turn, can be shown."""
    if processor.image_id is None:
        raise common.UserError(f"--calls offers image tools, and {args.student!r} sees no images")
    next_turn(processor, "?", [])


def load_questions(args: Args, processor, asked: dict, names: str, pick: int = 0):
    """Rows that the student can read. A text-only one is refused rows with images: it would answer without them."""
    columns = common.load_data(args.data, args.data_split).column_names
    if processor.image_id is not None or args.column_images in columns:
        names += " images"
    return common.load_rows(args, processor, asked, names, pick)


def load(run: common.Run, args: Args):
    """Training rows and held-out rows, all checked; then the models, and who samples."""
    processor = common.Processor(args.student, args)
    teacher = None if args.method == "grpo" else args.teacher
    if teacher is not None:
        reader = common.Processor(teacher, args)
        common.check_same_inputs(processor, reader)
    if args.calls:
        check_tools(processor, args)
    names = "problem answer" if args.method == "grpo" else "problem"
    train = load_questions(args, processor, contexts(args), names)
    asked = (processor, contexts(args), "problem answer")
    held_out = common.load_held_out(args, *asked, load=load_questions)
    run.load(processor, teacher)
    run.writer = run.engine
    if args.method == "sft":
        run.writer = common.HFEngine(teacher, reader, args)
    if args.calls:
        run.engine, run.writer = Turns(run.engine, args), Turns(run.writer, args)
    return train, held_out


def main():
    args = common.parse_args(Args, PRESETS, RANGES)
    check(args)
    run = common.Run("reopold", args)
    train, held_out = load(run, args)
    for _ in run.steps(train, held_out, contexts(args)["question"]):
        samples = rollout(run.draw(), run, args)
        run.log_samples(samples)
        parts = [score(part, run, args) for part in common.split(samples, args.updates)]
        run.phase("score")
        for micros in parts:
            weigh(micros, run, args)
            run.log(update(micros, run, args))


if __name__ == "__main__":
    common.launch(main)
