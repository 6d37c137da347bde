"""VOLD: a text-only teacher for a student that sees.

Paper: "VOLD: Reasoning Transfer from LLMs to Vision-Language Models via On-Policy Distillation", arXiv:2510.23497.

    python vold.py                                             a laptop: small real models on real handwriting
    torchrun --nproc-per-node 8 vold.py --preset 3b            one node: Qwen2.5-VL-3B from Qwen3-8B, the three stages in turn
    torchrun --nproc-per-node 8 vold.py --preset 3b --stage rl --student runs/my-run/sft/final       one of them

Training is text alone; images come only with the evaluation. Started again with the same --output, a run goes on with the traces that
are missing, or with stage 2 where stage 1 is done. The stages:

    traces   the teacher answers text questions
    sft      the student learns to write these answers, its vision tower frozen:   - sum log pi(y*_t | q, y*_<t)       Eq. 4
    rl       the student answers text questions itself, K times each, and two signals come from the same answers:

    pi_theta   student, question
    pi_phi     teacher, the same question in the teacher's own chat template
    r          1 for a right answer, else 0;   A = (r - mean) / (std + delta) within the K answers
    GRPO       min(rho A, clip(rho, 1 - 0.2, 1 + 0.3) A), without a reference KL                                       Eq. 2
    k2         (log pi_theta - log pi_phi)^2 / 2 at the sampled token                                                  Eq. 3

    loss = - GRPO + beta * (1 - r) k2          --mask none: without (1 - r)                                            Eq. 6, 5

Where this differs from the paper, or fills in what it leaves open:
 1. Eq. 3 is called the reverse KL and printed as KL(pi_phi || pi_theta). The gradient of k2, over the student's own samples, is that
    of KL(pi_theta || pi_phi): the reverse one, student first. That is what is here.
 2. beta is 1e-3 in the paper's Table 4 and 0.1 in its text. The presets take 1e-3; --beta 0.1 is the other. --measure-share shows
    what each does to the gradient; the toy takes 0.1.
 3. Both means are over all response tokens of an update. Eq. 2 has the ratio of a whole response (--ratio sequence), and Eq. 5
    sums the divergence over a response's tokens (--kl-tokens sum; beta then counts for more by the length of a response).
 4. The mask of Eq. 6 multiplies: masked tokens still count in the mean, so distillation fades as the student improves.
 5. The batch of 256 is read as questions, with 5 answers each. k2 carries no rho: with one update a rollout batch it needs none.
 6. Eq. 4 sums over tokens; stage 1 averages over all tokens of an update.
 7. Traces and rollouts are sampled at temperature 1 (not given). Traces that reach --max-response are dropped, wrong ones are kept.
 8. A tag that the teacher's tokenizer holds as one token and the student's does not (<think>, in Qwen3 against Qwen2.5) is read by
    the teacher as its one token, and its pieces carry no distillation. Any other difference of the tokenizers is refused.
 9. The wording of the instruction is ours. An answer is right as in common.is_correct; the paper: an exact match.
10. Questions above --max-prompt tokens are left out; the 8192 are a response's tokens. An answer that was cut off is wrong, and distilled.
    The merger is frozen with the tower. Advantages over the unbiased standard deviation; gradients clipped at norm 1; weight decay
    spares norms and biases; each model's softmax is over its own tokenizer's ids. The presets evaluate nothing without --eval-data.
11. --mask group and a falling beta (--beta 5e-3 --beta-decay 5e-5 --beta-min 1e-3) are those of KDRL (arXiv:2506.02208).
"""

import dataclasses
import gc
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import common

# ====================================================================================================== settings
HUB = dict(student="Qwen/Qwen2.5-VL-3B-Instruct", teacher="Qwen/Qwen3-8B", trace_data="open-r1/Mixture-of-Thoughts:all", trace_column="messages",
           data="axon-rl/ORZ-57k", skip_bad_rows=True, prompts=256, group=5, rollout_batch=16, max_steps=60, max_prompt=2048, max_response=8192,
           lr=6e-6, warmup=5, schedule="cosine", micro_tokens=16384, gradient_checkpointing=True, save_every=20)  # Table 4
PRESETS = {
    "toy": dict(student="toy/student", teacher="toy/text-teacher", data="toy/train", column_text="text_problem", trace_data="toy/train",
                trace_column="text_problem", ignore_images=True, eval_data="toy/test", trace_rows=2000, sft_steps=200, sft_batch=64, sft_lr=5e-5,
                sft_warmup=10, prompts=32, group=8, max_steps=60, lr=5e-5, warmup=5, schedule="cosine", beta=0.1, measure_share=20,
                dtype="float32", rollout_batch=256, eval_every=20, eval_rows=400,
                instruction="Think first, inside <reason></reason>. Then put the final answer in \\boxed{}."),
    "3b": HUB,
    "3b-teacher4b": HUB | dict(teacher="Qwen/Qwen3-4B"),
    "3b-teacher14b": HUB | dict(teacher="Qwen/Qwen3-14B"),
}


@dataclass
class Args(common.Args):
    stage: Literal["all", "traces", "sft", "rl"] = "all"  # what to run: the three stages in turn, or one of them
    instruction: str = "Reason step by step, and put the final answer in \\boxed{}."  # system text of the student and of the teacher
    column_text: str = "problem"  # name of the column with the text question in --data (--column-problem: in --eval-data)
    ignore_images: bool = False  # use the questions of data that has images, and leave the images out
    trace_data: str = ""  # questions that the teacher writes traces for; no answers needed
    trace_split: str = "train"  # which split of it
    trace_column: str = "problem"  # name of its column with the question, or with a chat that begins with it
    trace_rows: int = 0  # how many of them, a fixed random choice; 0 = all
    right_traces_only: bool = False  # keep a trace only if its answer is right (the paper keeps them all)
    traces: str = ""  # folder with the traces of an earlier run, for --stage sft
    sft_batch: int = 256  # traces an update of stage 1
    sft_steps: int = 4000  # updates of stage 1
    sft_lr: float = 5e-5  # learning rate of stage 1
    sft_warmup: int = 150  # updates of stage 1 with a linearly rising learning rate
    beta: float = 1e-3  # weight of the distillation (Eq. 5, 6; the paper's text: 0.1); 0 = GRPO alone
    beta_decay: float = 0.0  # beta falls by this much a step (KDRL: 5e-5)
    beta_min: float = 0.0  # but not below this (KDRL: 1e-3)
    mask: Literal["response", "none", "group"] = "response"  # distil wrong responses (Eq. 6), all (Eq. 5), or groups without a right one (KDRL)
    estimator: Literal["k1", "k2", "k3"] = "k2"  # of the divergence at the sampled token; k1 has no gradient in expectation
    kl_tokens: Literal["mean", "sum"] = "mean"  # the divergence's mean over all tokens, or its sum over a response's, then the mean
    ratio: Literal["token", "sequence"] = "token"  # rho of the token, mean over tokens; or of the whole response (Eq. 2)
    clip_low: float = 0.2  # rho is clipped below 1 - clip_low
    clip_high: float = 0.3  # and above 1 + clip_high
    measure_share: int = 0  # every so many steps measure the gradients of both parts by themselves: two more passes; 0 = never


STAGE_1 = ("student", "teacher", "instruction", "trace_data", "trace_split", "trace_column", "trace_rows", "right_traces_only", "sft_batch", "sft_steps",
           "sft_lr", "sft_warmup", "schedule", "weight_decay", "grad_clip", "dtype", "lora", "lora_targets", "seed")  # what its result depends on


def distils(args: Args) -> bool:
    return args.beta > 0


def beta(args: Args, step: int) -> float:
    """The weight of the distillation at a step, counted from 1."""
    return max(args.beta - args.beta_decay * (step - 1), args.beta_min)


# ====================================================================================================== contexts
def question(row: dict, args: Args) -> common.Context:
    """q: what the student samples under and is trained in, and what the teacher reads. No image."""
    return common.Context([{"role": "system", "content": args.instruction}, common.user_message(row["problem"], 0)])


def with_image(row: dict, args: Args) -> common.Context:
    """The same chat with an image, for the evaluation."""
    return common.Context([{"role": "system", "content": args.instruction}, common.user_message(row["problem"], len(row["images"]))], row["images"])


def contexts(args: Args) -> dict:
    """The contexts that this run reads responses in, by name; the first is the one they are sampled under."""
    return {"question": lambda row: question(row, args)}


# ====================================================================================================== losses
def distance(log_p: Tensor, log_q: Tensor, estimator: str) -> Tensor:
    """An estimate [n] of KL(student || teacher) from the log-probs [n] of tokens that the student sampled. Eq. 3: k2.

    The mean gradient over the student's samples: k1 zero, k2 that of KL(student || teacher), k3 that of KL(teacher || student).
    """
    difference = log_p - log_q
    return {"k1": lambda: difference, "k2": lambda: difference**2 / 2, "k3": lambda: common.k3(log_p, log_q)}[estimator]()


def distilled(correct: list[bool], group: int, mask: str) -> list[bool]:
    """Which responses are distilled; `group` consecutive ones a question.

    group 2, correct = [1, 0, 0, 0]  ->  response [0, 1, 1, 1] (Eq. 6: 1 - r), group [0, 0, 1, 1], none [1, 1, 1, 1]
    """
    if mask == "none":
        return [True] * len(correct)
    if mask == "response":
        return [not right for right in correct]
    return [not any(correct[i - i % group : i - i % group + group]) for i in range(len(correct))]


TERMS = ("surrogate", "distance", "k1", "clipped", "log_p", "entropy")  # per token; the first two carry weight


def terms(z: Tensor, ids: Tensor, old: Tensor, teacher: Tensor, advantage: Tensor, args: Args) -> tuple[Tensor, ...]:
    """TERMS per token, [n] each. z [n, V] student's logits; ids, log-probs when sampled, the teacher's log-probs, advantages [n]."""
    log_p = z.log_softmax(-1)
    chosen = common.gather(log_p, ids)
    old = torch.where(old.isnan(), chosen.detach(), old)
    ratio = (chosen.detach() - old).exp()
    clipped = torch.where(advantage > 0, ratio > 1 + args.clip_high, ratio < 1 - args.clip_low) & (advantage != 0)
    surrogate = common.clipped_surrogate(chosen, old, advantage, args.clip_low, args.clip_high)  # Eq. 2
    return (surrogate, distance(chosen, teacher, args.estimator), (chosen - teacher).detach(), clipped.to(z.dtype), chosen,
            common.entropy(log_p.detach()))


# ====================================================================================================== the teacher's tokens
def tags_of(student: common.Processor, teacher: common.Processor) -> dict[str, int]:
    """The teacher's added tokens that the student has to write in pieces, text -> id.

    Raises UserError unless every other token that the student can sample is the same token to the teacher.
    """
    ours, theirs = ({i: token for token, i in p.tokenizer.get_vocab().items()} for p in (student, teacher))
    wrong = sorted(i for i in ours if ours[i] != theirs.get(i) and i not in student.banned)
    if wrong:
        first = ", ".join(f"{i} is {ours[i]!r} and {theirs.get(i)!r}" for i in wrong[:5])
        raise common.UserError(f"the tokenizers of student {student.name!r} and teacher {teacher.name!r} differ in {len(wrong)} tokens: {first}. "
                               "Choose models of one family")
    extra = {theirs[i]: i for i in set(theirs) - set(ours)}
    unknown = sorted(set(extra) - set(teacher.tokenizer.added_tokens_encoder))
    if unknown:
        raise common.UserError(f"teacher {teacher.name!r} has {len(unknown)} tokens that student {student.name!r} has not, and would read its text in "
                               f"other pieces: {unknown[:5]}. Choose models of one family")
    return extra


def reread(ids: list[int], student: common.Processor, teacher: common.Processor, tags: dict[str, int]) -> tuple[list[int], list[int]]:
    """A response as the teacher tokenizes it, and for each of its tokens the place there, or -1 in and around a tag.

    ids of [12, <, think, >.newline, 9]  ->  those of [12, <think>, newline, 9], [0, -1, -1, -1, 3]
    """
    pieces = student.tokenizer.convert_ids_to_tokens(ids)
    owner = [i for i, piece in enumerate(pieces) for _ in piece]  # token of each character
    inside = {i for tag in tags for match in re.finditer(re.escape(tag), "".join(pieces)) for i in owner[match.start() : match.end()]}
    theirs, places, run = [], [], []
    for i, token in enumerate([*ids, None]):
        if i in inside:
            run.append(pieces[i])
            places.append(-1)
            continue
        if run:
            theirs += teacher.tokenizer(student.tokenizer.convert_tokens_to_string(run), add_special_tokens=False)["input_ids"]
            run = []
        if token is not None:
            places.append(len(theirs))
            theirs.append(token)
    return theirs, places


# ====================================================================================================== rollout
@dataclass
class Sample(common.Sample):
    distilled: bool = False


@dataclass
class Reader:
    """What the teacher reads with."""

    processor: common.Processor
    tags: dict[str, int]


def rollout(rows: list[dict], models: common.Models, reader: Reader | None, args: Args) -> list[Sample]:
    """The student answers this rank's questions; right answers are rewarded, and those that the mask leaves are marked for the teacher."""
    samples = common.sample_responses(models.engine, rows, contexts(args), args, Sample)
    common.reward_answers(samples, args.group)
    for s, kept in zip(samples, distilled([s.correct for s in samples], args.group, args.mask)):
        s.distilled = kept
        if reader is not None:
            s.prompts["teacher"] = reader.processor.encode(question(s.row, args))
    return samples


# ====================================================================================================== score
@dataclass
class Micro(common.Micro):
    response: Tensor | None = None  # [n] number of the response within the micro-batch
    correct: Tensor | None = None  # [n] r of the response
    distilled: Tensor | None = None  # [n] whether the response is
    known: Tensor | None = None  # [n] whether the teacher has the token: it is no part of a tag
    log_q: Tensor | None = None  # [n] the teacher's log-prob of the token; 0 where it has none


def score(samples: list[Sample], models: common.Models, reader: Reader | None, args: Args) -> list[Micro]:
    """The teacher reads every response once. Of its distributions only the log-prob of the sampled token is kept."""
    micros = common.make_micros(Micro, samples, ["question"], models.processor, args.micro_tokens, images=False)
    for m in micros:

        def log_probs(hidden, head):
            return common.response_log_probs(hidden, head, m.ids, models.vocab, args.loss_chunk)

        lengths = [len(s.response.ids) for s in m.samples]
        m.response = common.per_token(lengths, list(range(len(lengths))), torch.long)
        m.correct = common.per_token(lengths, [float(s.correct) for s in m.samples])
        m.distilled = common.per_token(lengths, [float(s.distilled) for s in m.samples])
        m.known, m.log_q = torch.zeros_like(m.old), torch.zeros_like(m.old)
        with torch.no_grad():
            if models.teacher is not None:  # also of right responses: the log shows how far the student is from the teacher there
                m.known, m.log_q = teacher_log_probs(m.samples, models, reader, args)
            if args.updates > 1:  # later updates need the policy that sampled, not their own
                m.old = models.student(m.batch, log_probs)
    return micros


def teacher_log_probs(samples: list[Sample], models: common.Models, reader: Reader, args: Args) -> tuple[Tensor, Tensor]:
    """(whether the teacher has the token [n], its log-prob of it [n] or 0), in the order of the samples' tokens."""
    read = [reread(s.response.ids, models.processor, reader.processor, reader.tags) for s in samples]
    prompts = [s.prompts["teacher"] for s in samples] or [reader.processor.blank(image=False)]
    batch = reader.processor.batch(prompts, [theirs for theirs, _ in read] or [[]])
    ids = common.per_token([len(theirs) for theirs, _ in read], [theirs for theirs, _ in read], torch.long)
    vocab = min(reader.processor.vocab, models.teacher.vocab)
    log_q = common.response_log_probs(models.teacher(batch), models.head, ids, vocab, args.loss_chunk)
    start, places = 0, []
    for theirs, of_response in read:
        places += [start + place if place >= 0 else -1 for place in of_response]
        start += len(theirs)
    place = torch.tensor(places, dtype=torch.long, device=log_q.device)
    padded = torch.cat([log_q, log_q.new_zeros(1)])  # -1: the zero
    return (place >= 0).float(), padded[place]


# ====================================================================================================== weigh
def weigh(micros: list[Micro], args: Args, step: int) -> None:
    """One weight per token and term, divisors over all ranks included."""
    length = torch.cat([m.length for m in micros])
    tokens, responses = common.all_sum(torch.stack([torch.ones_like(length).sum(), (1 / length).sum()]))  # T tokens of 1 / T
    for m in micros:
        m.weights = torch.zeros(len(TERMS), len(m.ids), device=length.device)
        m.weights[0] = -1 / (tokens if args.ratio == "token" else responses)  # rho of a response: its gradient is a sum over tokens
        m.weights[1] = beta(args, step) * m.distilled * m.known / (tokens if args.kl_tokens == "mean" else responses)  # Eq. 5, 6


# ====================================================================================================== update
def accumulate(micros: list[Micro], models: common.Models, args: Args) -> None:
    """student.grad += gradient of the sum over micro-batches, terms and tokens of weight * term. One forward pass each."""
    for m in micros:

        def loss_fn(hidden, head):
            old = m.old
            if args.ratio == "sequence" and args.updates > 1:  # a response's ratio needs all its tokens before any gradient
                now = common.response_log_probs(hidden, head, m.ids, models.vocab, args.loss_chunk)
                old = common.sequence_old(now, old, 1.0, m.response)
            return common.vocab_loss(lambda *tensors: terms(*tensors, args=args), m.weights, [hidden], head, [], [m.ids, old, m.log_q, m.advantage],
                                     models.vocab, args.loss_chunk)

        loss, m.terms = models.student(m.batch, loss_fn)
        (loss * common.world_size()).backward()  # FSDP2 averages over ranks; the weights already hold the divisor


def update(micros: list[Micro], models: common.Models, args: Args) -> dict:
    """One optimizer step, and what it is worth knowing about it."""
    accumulate(micros, models, args)
    stepped = common.clip_and_step(models, micros, TERMS, args.grad_clip)
    return stepped | statistics(micros, args)


def measure_share(micros: list[Micro], models: common.Models, args: Args) -> dict:
    """The gradient's norm from each of the two parts by itself, and the distillation's share of their sum."""
    norms, weights = [], [m.weights for m in micros]
    for part in range(2):
        for m, whole in zip(micros, weights):
            m.weights = torch.zeros_like(whole)
            m.weights[part] = whole[part]
        accumulate(micros, models, args)
        norms.append(common.grad_norm(models.student).item())
        models.student.zero_grad()
    for m, whole in zip(micros, weights):
        m.weights = whole
    return {"grad_norm_grpo": norms[0], "grad_norm_distillation": norms[1], "distillation_share": norms[1] / (sum(norms) or 1)}


def statistics(micros: list[Micro], args: Args) -> dict:
    """Means over one update's tokens on all ranks; the estimate of KL(student || teacher) apart for right and wrong responses."""
    named = dict(zip(TERMS, torch.cat([m.terms for m in micros], dim=-1)))  # [N] each
    length, right, kept, known = (torch.cat([getattr(m, name) for m in micros]) for name in ("length", "correct", "distilled", "known"))
    kept = kept * known
    everywhere = {"entropy": named["entropy"], "clipped": named["clipped"], "sampler_gap": common.sampler_gap(micros, named["log_p"])}
    everywhere |= {"distilled_tokens": kept, "distance": named["distance"] * kept} if distils(args) else {}
    apart = [x for side in (right, 1 - right) for x in ((side * known).sum(), (side * known * named["k1"]).sum())]
    sums = [torch.ones_like(length).sum(), (1 / length).sum(), *apart, *(x.sum() for x in everywhere.values())]
    tokens, responses, rights, kl_right, wrongs, kl_wrong, *rest = common.all_sum(torch.stack(sums)).tolist()
    log = {"response_length": tokens / responses} | {key: x / tokens for key, x in zip(everywhere, rest)}
    log |= {"kl_right": kl_right / rights} if rights else {}
    return log | ({"kl_wrong": kl_wrong / wrongs} if wrongs else {})


# ====================================================================================================== stage 1
def write_traces(rows: common.Rows, args: Args, folder: Path) -> None:
    """The teacher's answers to text questions, one a row, in `folder`; goes on where an earlier start stopped."""
    made_from = {key: getattr(args, key) for key in ("teacher", "trace_data", "trace_split", "trace_column", "trace_rows", "instruction", "max_response",
                                                     "temperature", "top_p", "top_k", "seed")}
    store = common.Records(str(folder), made_from)
    pending = [i for i in range(common.rank(), len(rows), common.world_size()) if rows.kept[i] not in store.done]
    common.say(f"traces for {len(rows)} questions by {args.teacher}, {len(store.done)} of them written before; to {folder}")
    engine = None
    if any(common.all_gather_object(bool(pending))):
        engine = common.make_engine(args.teacher, common.Processor(args.teacher), args)
    for picked in store.batches(pending, args.rollout_batch, "traces"):
        batch = [rows[i] for i in picked]
        prompts = [engine.processor.encode(question(row, args)) for row in batch]
        responses = engine.generate(prompts, args.temperature, args.top_p, args.top_k, seeds=[common.seed_of(args.seed, row["index"]) for row in batch])
        store.add([{"row": row["index"], "problem": row["problem"], "answer": row.get(args.column_answer), "response": r.text, "finished": r.finished}
                   for row, r in zip(batch, responses)])
    if engine is not None:
        engine.close()


def read_traces(folder: Path, processor: common.Processor, args: Args) -> list[dict]:
    """The traces that stage 1 learns from: those that ended, and, if asked for, are right."""
    records = common.read_records(folder)
    if not records:
        raise common.UserError(f"{folder} holds no traces (records-*.jsonl): write them with --stage traces, or name their folder with --traces")
    if args.right_traces_only and not all(str(r["answer"] or "").strip() for r in records):
        raise common.UserError(f"--right-traces-only needs answers, and traces in {folder} have none: write them anew with --column-answer NAME")
    written_for = json.loads((folder / "made_from.json").read_text())["instruction"]
    if written_for != args.instruction:
        raise common.UserError(f"{folder} was written for another --instruction ({written_for!r}): stage 1 has to show the same")
    ended = [r for r in records if r["finished"]]
    kept = [r for r in ended if not args.right_traces_only or common.is_correct(common.extract_answer(r["response"]), r["answer"])]
    say = f"{len(records)} traces, {len(records) - len(ended)} reached --max-response, {len(ended) - len(kept)} left out as wrong"
    if not kept:
        raise common.UserError(f"{folder}: {say}: nothing is left to learn from. Raise --max-response, or look at the traces")
    common.say(f"{folder}: {say}, {len(kept)} kept")
    for r in kept:
        if wrong := processor.complaint(question(r, args), args.max_prompt):
            raise common.UserError(f"{folder}: the student cannot read the question of row {r['row']}: {wrong}")
    return [r | {"index": r["row"]} for r in kept]


def next_token(z: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 4 per token: - log pi(y*), [n]; and the entropy."""
    log_p = z.log_softmax(-1)
    return -common.gather(log_p, ids), common.entropy(log_p.detach())


def imitate(micros: list[common.Micro], models: common.Models, args: Args) -> Tensor:
    """Gradient of Eq. 4, the mean over all tokens of the update on all ranks; returns their number."""
    tokens = common.all_sum(torch.tensor(float(sum(len(m.ids) for m in micros)), device=common.device()))
    for m in micros:
        m.weights = torch.stack([torch.ones_like(m.length) / tokens, torch.zeros_like(m.length)])
        loss, m.terms = models.student(m.batch, lambda hidden, head: common.vocab_loss(
            next_token, m.weights, [hidden], head, extras=[m.ids], vocab=models.vocab, chunk=args.loss_chunk))
        (loss * common.world_size()).backward()
    return tokens


def sft(traces: list[dict], held_out, processor: common.Processor, args: Args, run: common.Run) -> None:
    """Stage 1: the student learns to write the teacher's traces; the mean over all tokens of an update."""
    args = dataclasses.replace(args, lr=args.sft_lr, warmup=args.sft_warmup, freeze_vision=True)
    models = common.load_models(args, processor, None, args.sft_steps)
    run.begin(f"stage 1, {args.sft_steps} steps of {args.sft_batch} traces, {args.sft_steps * args.sft_batch / len(traces):.1f} passes over "
              f"{len(traces)}, on {common.world_size()} ranks")
    questions = common.Questions(traces, args.sft_batch, args.seed)
    end = processor.tokenizer.eos_token_id
    with common.Progress(run, args.sft_steps, models, questions) as progress:
        progress.evaluate(models.engine, held_out, lambda row: with_image(row, args), args)
        for _ in progress:
            models.engine.rest()
            samples = []
            for trace in questions.draw():
                ids = processor.spell(processor.quote(trace["response"])) + [end]
                response = common.Response(ids, [0.0] * len(ids), True, trace["response"])
                samples.append(common.Sample(trace, {"question": processor.encode(question(trace, args))}, response))
            micros = common.make_micros(common.Micro, samples, ["question"], processor, args.micro_tokens, images=False)
            tokens = imitate(micros, models, args)
            progress.log(common.clip_and_step(models, micros, ("nll", "entropy"), args.grad_clip))
            nll, entropy = (common.all_sum(torch.cat([m.terms for m in micros], dim=-1).sum(-1)) / tokens).tolist()
            progress.log({"nll": nll, "entropy": entropy})
            progress.phase("update")
            models.engine.sync(models.student.weights())
            progress.phase("sync")
            progress.evaluate(models.engine, held_out, lambda row: with_image(row, args), args)
    models.engine.close()


# ====================================================================================================== stage 2
def rl(train: common.Rows, held_out, processor: common.Processor, reader: Reader | None, args: Args, run: common.Run) -> None:
    """Stage 2: GRPO and distillation from the same rollouts."""
    args = dataclasses.replace(args, freeze_vision=True)
    steps = common.count_steps(args, train)
    models = common.load_models(args, processor, args.teacher if distils(args) else None, steps * args.updates)
    run.begin(f"stage 2, beta {args.beta}, mask {args.mask}, {steps} steps of {args.prompts} questions x {args.group} responses in {args.updates} "
              f"updates, {args.prompts * args.group // args.updates} responses an update, on {common.world_size()} ranks")
    questions = common.Questions(train, args.prompts, args.seed, args.updates)
    with common.Progress(run, steps, models, questions) as progress:
        progress.evaluate(models.engine, held_out, lambda row: with_image(row, args), args)
        for step in progress:
            samples = rollout(questions.draw(), models, reader, args)
            progress.samples(samples, args, rewarded=True)
            if distils(args):
                progress.log(common.mean_over_ranks({"distilled_responses": [s.distilled for s in samples]}) | {"beta": beta(args, step)})
            progress.phase("rollout")
            parts = [score(part, models, reader, args) for part in common.split(samples, args.updates)]
            progress.phase("score")
            for micros in parts:
                weigh(micros, args, step)
                if args.measure_share and distils(args) and step % args.measure_share == 1 % args.measure_share:
                    progress.log(measure_share(micros, models, args))
                progress.log(update(micros, models, args))
            progress.phase("update")
            models.engine.sync(models.student.weights())
            progress.phase("sync")
            progress.evaluate(models.engine, held_out, lambda row: with_image(row, args), args)


# ====================================================================================================== main
def check_settings(args: Args, given: set[str]) -> None:
    """Stop at contradictions, and at flags that this run would ignore."""
    if args.group < 2 and args.stage in ("all", "rl"):
        raise common.UserError("GRPO compares the responses to one question with each other: set --group to at least 2")
    if min(args.beta, args.beta_decay, args.beta_min, args.clip_low, args.clip_high) < 0 or args.clip_low >= 1:
        raise common.UserError("--beta, --beta-decay, --beta-min, --clip-low and --clip-high must not be negative, and --clip-low must be below 1")
    if min(args.sft_batch, args.sft_steps) < 1 or args.trace_rows < 0:
        raise common.UserError("--sft-batch and --sft-steps must be at least 1, and --trace-rows must not be negative")
    if args.stage == "sft" and not args.traces:
        raise common.UserError("--stage sft needs the folder of traces that --stage traces wrote: --traces runs/.../traces")
    of_traces = ("trace_data", "trace_split", "trace_column", "trace_rows")
    of_sft = ("sft_batch", "sft_steps", "sft_lr", "sft_warmup", "right_traces_only")
    of_rl = ("data", "data_split", "column_text", "prompts", "group", "updates", "epochs", "max_steps", "lr", "warmup", "beta", "beta_decay",
             "beta_min", "mask", "estimator", "kl_tokens", "ratio", "clip_low", "clip_high", "measure_share")
    ignored = {"freeze_vision": "the vision tower is always frozen"}
    for names, stages in ((of_traces, ("all", "traces")), (of_sft, ("all", "sft")), (of_rl, ("all", "rl")), (("traces",), ("sft",)),
                          (("ignore_images",), ("all", "traces", "rl"))):
        if args.stage not in stages:
            ignored |= dict.fromkeys(names, f"--stage {args.stage} has no use for it")
    if args.stage == "traces":
        ignored |= dict.fromkeys({*common.TRAINING, "eval_data", "eval_split", "eval_rows", "student", "micro_tokens", "gradient_checkpointing", "loss_chunk"},
                                 "--stage traces does not train")
    if args.stage == "sft":
        ignored |= dict.fromkeys(("teacher", "temperature", "top_p", "top_k", "log_samples"), "--stage sft samples nothing and has no teacher")
    if args.stage == "traces" or not args.eval_data:
        ignored["column_problem"] = "nothing is evaluated; --column-text and --trace-column name the columns of text questions"
    if not distils(args):
        ignored |= dict.fromkeys(("beta_decay", "beta_min", "mask", "estimator", "kl_tokens", "measure_share"), "--beta is 0")
        if args.stage == "rl":
            ignored["teacher"] = "--beta is 0"
    elif not args.beta_decay:
        ignored["beta_min"] = "--beta-decay is 0"
    if args.updates == 1:
        ignored |= common.CLIPS
    common.refuse_ignored(args, given, ignored)


def load_text(args: Args, processor: common.Processor, traces: bool) -> common.Rows:
    """The text questions of the traces or of stage 2, checked; stops where the data has images, unless they are to be ignored."""
    data, split, column, flag = args.data, args.data_split, args.column_text, "--column-text"
    if traces:
        data, split, column, flag = args.trace_data, args.trace_split, args.trace_column, "--trace-column"
        if not data:
            raise common.UserError("there are no questions for the traces: name them with --trace-data, or start with --stage rl")
    found = common.load_rows(dataclasses.replace(args, data=data, data_split=split), processor, contexts(args), images=False,
                             answers=args.right_traces_only if traces else True, columns={"problem": column}, flags={"problem": flag},
                             pick=args.trace_rows if traces else 0)
    pictures = [name for name, feature in found.data.features.items() if "Image(" in str(feature) or name == args.column_images]
    if pictures and not args.ignore_images:
        raise common.UserError(f"{data!r} has images (column {pictures[0]!r}), and this method trains on text: a question may make no sense without "
                               "its image. Choose other data, or use the questions alone with --ignore-images")
    return found


def main() -> None:
    args, given = common.parse_args(Args, PRESETS)
    check_settings(args, given)
    if args.plan:  # of stage 2, which needs most
        return common.print_plan(dataclasses.replace(args, freeze_vision=True), args.teacher if distils(args) else None, 1)
    common.start_distributed(args)
    going_on = args.resume not in ("", "auto")
    base = Path(common.all_gather_object(args.resume if going_on else args.output or f"runs/vold-{args.preset}-{time.strftime('%Y%m%d-%H%M%S')}")[0])
    traces_at = Path(args.traces) if args.traces else base / "traces"

    if args.stage in ("all", "sft") and args.sft_batch % common.world_size():
        raise common.UserError(f"{common.world_size()} ranks cannot share --sft-batch {args.sft_batch} evenly: choose a multiple of {common.world_size()}")

    # Everything that a later stage needs is looked at before the first one spends its hours.
    held_out = reader = train = asked = None
    trained = (base / "sft" / "final").exists() and args.stage == "all"
    of_stage = {"sft": dataclasses.replace(args, updates=1), "rl": dataclasses.replace(args, student=str((base / "sft" / "final").resolve()) if args.stage == "all" else args.student)}
    if trained:
        before = json.loads((base / "sft" / "args.json").read_text())
        changed = [name for name in STAGE_1 if before[name] != getattr(args, name)]
        if changed:
            raise common.UserError(f"{base / 'sft'} was trained with other settings ({', '.join(changed)}): choose another --output, or go on from it "
                                   f"with --stage rl --student {base / 'sft' / 'final'}")
    if args.resume == "auto" and not args.output or going_on and args.output not in ("", args.resume):
        raise common.UserError("--resume takes a run folder, or auto and the folder in --output")
    if going_on and not base.is_dir():
        raise common.UserError(f"{base} holds nothing to resume from")
    try:
        runs = {stage: common.Run("vold", dataclasses.replace(of_stage[stage], output=str(base / stage), resume="auto" * bool(args.resume)))
                for stage in ("sft", "rl") if args.stage in ("all", stage) and not (stage == "sft" and trained)}
    except common.UserError as e:
        if "already holds a run" not in e.message:
            raise
        raise common.UserError(f"{e.message}. Once it is removed, the traces in {base}, and stage 1 if it is done, are used again") from None
    if args.stage in ("all", "traces") and not trained:
        asked = load_text(args, common.Processor(args.teacher), traces=True)
    if args.stage != "traces":
        processor = common.Processor(args.student)
        held_out = common.load_rows(args, processor, {"image": lambda row: with_image(row, args)}, held_out=True)
    if args.stage in ("all", "rl"):
        if distils(args):
            teacher = common.Processor(args.teacher)
            reader = Reader(teacher, tags_of(processor, teacher))
        train = load_text(args, processor, traces=False)
        common.count_steps(args, train)

    if trained:
        common.say(f"{base / 'sft' / 'final'} is there: going on with stage 2")
    elif args.stage in ("all", "traces"):
        write_traces(asked, args, traces_at)
    if "sft" in runs:
        sft(read_traces(traces_at, processor, args), held_out, processor, of_stage["sft"], runs["sft"])
    gc.collect()  # the models of a stage go before those of the next come
    torch.cuda.empty_cache()
    if "rl" in runs:
        rl(train, held_out, processor, reader, of_stage["rl"], runs["rl"])


if __name__ == "__main__":
    common.launch(main)
