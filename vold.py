"""VOLD: a text-only teacher for a student that sees.

Paper: "VOLD: Reasoning Transfer from LLMs to Vision-Language Models via On-Policy Distillation", arXiv:2510.23497.

    python vold.py                                      a laptop: small real models on real handwriting
    torchrun --nproc-per-node 8 vold.py --preset 3b     one node: Qwen2.5-VL-3B from Qwen3-8B, the three stages in turn
    torchrun --nproc-per-node 8 vold.py --preset 3b --stage rl --student runs/my-run/sft/final       one of them

Training is text alone; images come only with the evaluation. Each stage has a folder of its own in --output. The same
command with the same --output goes on with the stage that is not finished. The stages:

    traces   the teacher answers text questions
    sft      the student learns to write these answers, its vision tower frozen:   - sum log pi(y*_t | q, y*_<t)   Eq. 4
    rl       the student answers text questions itself, K times each, and two signals come from the same answers:

    pi_theta   student, question
    pi_phi     teacher, the same question in the teacher's own chat template
    r          1 for a right answer, else 0;   A = (r - mean) / (std + delta) within the K answers
    GRPO       min(rho A, clip(rho, 1 - 0.2, 1 + 0.3) A), without a reference KL           Eq. 2
    k2         (log pi_theta - log pi_phi)^2 / 2 at the sampled token                      Eq. 3

    loss = - GRPO + beta * (1 - r) k2          --mask none: without (1 - r)                Eq. 6, 5

Where this differs from the paper, or fills in what it leaves open:
 1. Eq. 3 is called the reverse KL and printed as KL(pi_phi || pi_theta). The gradient of k2, over the student's own
    samples at given prefixes, is that of KL(pi_theta || pi_phi): the reverse one, student first. That is what is here.
    It is so with --mask none; in Eq. 6 r depends on the sampled token as well, and what is left is no KL's gradient.
 2. beta is 1e-3 in the paper's Table 4 and 0.1 in its text. The presets take 1e-3; --beta 0.1 is the other.
    --measure-share shows what each does to the gradient; the toy takes 0.1.
 3. Both means are over all response tokens of an update. Eq. 2 has the ratio of a whole response (--ratio sequence),
    and Eq. 5 sums the divergence over a response's tokens (--kl-tokens sum): the two together are the paper's letter.
    One alone makes its part count for more by the length of a response. Eq. 1 averages the entropy within a response
    first; the one that is logged is over all tokens.
 4. The mask of Eq. 6 multiplies: masked tokens still count in the mean, so distillation fades as the student improves.
 5. The batch of 256 is read as questions, with 5 answers each. With one update a rollout batch, as in every preset, rho
    is 1 and nothing is clipped; k2 carries no rho.
 6. Eq. 4 sums over tokens; sft averages over all tokens of an update.
 7. Traces and rollouts are sampled at temperature 1 (not given). Traces that reach --max-response are dropped, wrong
    ones are kept.
 8. A tag that the teacher's tokenizer holds as one token and the student's does not (<think>, in Qwen3 against Qwen2.5)
    is read by the teacher as its one token, and its pieces carry no distillation. Any other difference of the
    tokenizers is refused.
 9. The wording of the instruction is ours. An answer is found and right as in common.extract_answer and is_correct; in
    the paper by an exact match.
10. Questions above --max-prompt tokens are left out; the 8192 are a response's tokens. An answer that was cut off is
    wrong, and distilled. Images in --data and --trace-data are not looked at. The merger is frozen with the tower.
    Advantages over the unbiased standard deviation; gradients clipped at norm 1; weight decay spares norms and biases;
    each model's softmax is over its own tokenizer's ids. The presets evaluate nothing without --eval-data.
11. --mask group and a falling beta (--beta 5e-3 --beta-decay 5e-5 --beta-min 1e-3) are those of KDRL
    (arXiv:2506.02208), which also compares the estimators (--estimator).
"""

import dataclasses
import functools
import gc
import itertools
import json
import math
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import common

import torch
from torch import Tensor

# =============================================================================================== settings
HUB = dict(
    student="Qwen/Qwen2.5-VL-3B-Instruct",
    teacher="Qwen/Qwen3-8B",
    trace_data="open-r1/Mixture-of-Thoughts:all",
    trace_column="messages",
    data="axon-rl/ORZ-57k",
    skip_bad_rows=True,
    prompts=256,
    group=5,
    rollout_batch=16,
    max_steps=60,
    max_prompt=2048,
    max_response=8192,
    lr=6e-6,
    warmup=5,
    schedule="cosine",
    micro_tokens=16384,
    gradient_checkpointing=True,
    save_every=20,
)  # Table 4; its sft_*, beta and clip are the defaults of Args
PRESETS = {
    "toy": dict(
        student="toy/student",
        teacher="toy/text-teacher",
        data="toy/train",
        column_text="text_problem",
        trace_data="toy/train",
        trace_column="text_problem",
        trace_rows=2000,
        eval_data=["toy/test"],
        sft_steps=200,
        sft_batch=64,
        sft_warmup=10,
        prompts=32,
        group=8,
        max_steps=60,
        lr=5e-5,
        warmup=5,
        schedule="cosine",
        beta=0.1,
        measure_share=20,
        dtype="float32",
        rollout_batch=256,
        eval_every=20,
        eval_rows=400,
        instruction="Think first, inside <reason></reason>. Then put the final answer in \\boxed{}.",
    ),
    "3b": HUB,
    "3b-teacher4b": HUB | dict(teacher="Qwen/Qwen3-4B"),
    "3b-teacher14b": HUB | dict(teacher="Qwen/Qwen3-14B"),
}
RANGES = {
    "sft_batch": (1, math.inf),
    "sft_steps": (1, math.inf),
    "group": (2, math.inf),  # GRPO compares the responses to a question with each other
    "clip_low": (0, 1),
    "freeze_vision": (1, 1),  # training sees no images
}


@dataclass
class Args(common.Args):
    freeze_vision: bool = True  # as in the paper
    stage: Literal["all", "traces", "sft", "rl"] = (
        "all"  # the three in turn, or one; rl alone begins as --student is
    )
    instruction: str = "Reason step by step, and put the final answer in \\boxed{}."  # system text
    # column of --data with the text question; --column-problem is of --eval-data
    column_text: str = "problem"
    trace_data: str = ""  # questions that the teacher writes traces for; no answers needed
    trace_split: str = "train"  # which split of it
    trace_column: str = "problem"  # its column with the question, or a chat that begins with it
    trace_rows: int = 0  # how many of them, a fixed random choice; 0 = all
    traces: str = ""  # folder of the traces; default: traces/ in --output
    sft_batch: int = 256  # traces an update of sft
    sft_steps: int = 4000  # updates of sft
    sft_lr: float = 5e-5  # learning rate of sft
    sft_warmup: int = 150  # updates of sft with a linearly rising learning rate
    sft_save_every: int = 500  # updates between checkpoints of sft, as --save-every is for rl
    beta: float = 1e-3  # weight of the distillation (Eq. 5, 6); 0 = GRPO alone
    beta_decay: float = 0.0  # beta falls by this much a step (KDRL: 5e-5)
    beta_min: float = 0.0  # but not below this (KDRL: 1e-3)
    # distil wrong responses (Eq. 6), all (Eq. 5), or groups without a right one (KDRL)
    mask: Literal["response", "none", "group"] = "response"
    # of the divergence at a sampled token; k1 has no gradient in expectation
    estimator: Literal["k1", "k2", "k3"] = "k2"
    # the divergence's mean over all tokens; or its sum over a response's, then the mean
    kl_tokens: Literal["mean", "sum"] = "mean"
    # rho of the token, then the mean over all tokens; or of the whole response (Eq. 2)
    ratio: Literal["token", "sequence"] = "token"
    clip_low: float = 0.2  # rho is clipped below 1 - clip_low
    clip_high: float = 0.3  # and above 1 + clip_high
    measure_share: int = 0  # measure both parts' gradients every so many steps, 0 = never


# =============================================================================================== contexts
def question(row: dict, args: Args) -> common.Context:
    """q: what the student samples under and is trained in, and what the teacher reads. No image."""
    return with_image(row | {"images": []}, args)


def with_image(row: dict, args: Args) -> common.Context:
    """The same chat with its images, for the evaluation."""
    system = common.message("system", args.instruction)
    user = common.message("user", row["problem"], len(row["images"]))
    return common.Context([system, user], row["images"])


def contexts(args: Args) -> dict:
    """What every response is read in, by name; the first is what it is sampled under."""
    return {"question": functools.partial(question, args=args)}


# =============================================================================================== losses
def distance(log_p: Tensor, log_q: Tensor, estimator: str) -> Tensor:
    """An estimate [n] of KL(student || teacher) from the log-probs [n] of tokens that the student sampled. Eq. 3: k2.

    The mean gradient over the student's samples: k1 zero, k2 that of KL(student || teacher), k3 that of
    KL(teacher || student).
    """
    if estimator == "k3":
        return common.k3(log_p, log_q)
    k1 = common.upcast(log_p) - log_q
    return k1 if estimator == "k1" else k1**2 / 2


def distilled(correct: list[bool], group: int, mask: str) -> Tensor:
    """1 - r of Eq. 6, [B]: which responses are distilled; `group` consecutive ones a question.

    group 2, correct = [1, 0, 0, 0]  ->  response [0, 1, 1, 1] (Eq. 6), group [0, 0, 1, 1], none [1, 1, 1, 1] (Eq. 5)
    """
    r = torch.tensor(correct, dtype=torch.float32)
    if mask == "none":
        return torch.ones_like(r)
    if mask == "group":  # right as soon as one of the group is
        r = r.view(-1, group).amax(-1).repeat_interleave(group)
    return 1 - r


def beta(args: Args, step: int) -> float:
    """The weight of the distillation at a step, counted from 1."""
    return max(args.beta - args.beta_decay * (step - 1), args.beta_min)


TERMS = ("surrogate", "distance", "k1", "clipped", "log_p", "entropy")  # per token


def terms(
    z: Tensor, ids: Tensor, old: Tensor | None, log_q: Tensor | None, advantage: Tensor, args: Args
) -> tuple[Tensor, ...]:
    """TERMS, [n] each. z [n, V]: the student's logits. [n]: the tokens, their log-probs when sampled (None: as now),
    the teacher's log-probs (None: no teacher), and the advantages.
    """
    log_p = common.log_softmax(z)
    chosen = common.gather(log_p, ids)
    old = chosen.detach() if old is None else old
    low, high = args.clip_low, args.clip_high
    surrogate, clipped = common.clipped_surrogate(chosen, old, advantage, low, high)  # Eq. 2
    log_q = chosen.detach() if log_q is None else log_q
    k = distance(chosen, log_q, args.estimator)  # Eq. 3
    return surrogate, k, chosen - log_q, clipped, chosen, common.entropy(log_p.detach())


# =============================================================================================== rollout
def rollout(rows: list[dict], run: common.Run, args: Args) -> list[common.Sample]:
    """The student answers this rank's questions; right answers are rewarded, and the mask says which are distilled."""
    samples = common.sample_responses(run.engine, rows, contexts(args), args)
    common.reward_answers(samples, args.group)
    kept = distilled([s.correct for s in samples], args.group, args.mask).tolist()
    for s, keep in zip(samples, kept):
        s.distilled = keep
    run.log(common.mean_over_ranks({"distilled_responses": kept}) | {"beta": beta(args, run.step)})
    return samples


# =============================================================================================== score
def score(samples: list[common.Sample], run: common.Run, args: Args) -> list[common.Micro]:
    """The teacher reads every response once, and with several updates the student too.

    Of the teacher's distributions only m.log_q [n] is kept: the log-prob of the sampled token, or 0 where m.known [n]
    is 0. With the mask of Eq. 6 right responses are read for the log alone: kl_right.
    """
    limit = args.micro_tokens
    micros = common.make_micros(samples, ["question"], run.processor, limit, images=False)
    with torch.no_grad():
        for m in micros:
            m.correct = m.spread([s.correct for s in m.samples])
            m.distilled = m.spread([s.distilled for s in m.samples])
            m.known, m.log_q = torch.zeros_like(m.length), None
            if run.teacher is not None:
                m.known, m.log_q = teacher_log_probs(m.samples, run, args)
            if args.updates > 1:  # later updates need the policy that sampled, not their own
                m.old = run.student(m.batch, functools.partial(run.log_probs, m))
    return micros


def teacher_log_probs(
    samples: list[common.Sample], run: common.Run, args: Args
) -> tuple[Tensor, Tensor]:
    """(1 where the teacher has the token [n], its log-prob of it or 0 [n]), in the order of the samples' tokens.

    Without gradient: sg(pi_phi) of Eq. 3.
    """

    def sampled(y, ids):
        return (common.gather(common.log_softmax(y), ids),)

    theirs, places, start = [], [], 0
    for s in samples:
        ids, found = reread(s.response.ids, run.processor, run.reader, run.tags)
        prompt = run.reader.encode(question(s.row, args))  # in its own chat template
        theirs.append(common.Sample(s.row, {"question": prompt}, common.Response(ids)))
        places += [start + place if place >= 0 else -1 for place in found]
        start += len(ids)
    m = common.Micro(theirs, ["question"], run.reader, images=False)
    pairs = [(run.teacher(m.batch), run.head)]
    vocab = min(run.reader.vocab, len(run.head))
    log_q = common.vocab_terms(sampled, pairs, [m.ids], vocab, args.loss_chunk)[0]
    padded = torch.cat([log_q, log_q.new_zeros(1)])  # what has no place, -1, finds the zero
    place = torch.tensor(places, dtype=torch.long, device=log_q.device)
    return (place >= 0).float(), padded[place]


def reread(
    ids: list[int], student: common.Processor, teacher: common.Processor, tags: list[str]
) -> tuple[list[int], list[int]]:
    """A response as the teacher tokenizes it, and for each of its tokens the place there, or -1 in and around a tag.

    ids of [12, <, think, >.newline, 9]  ->  those of [12, <think>, newline, 9], [0, -1, -1, -1, 3]
    """
    pieces = student.tokenizer.convert_ids_to_tokens(ids)
    owner = [i for i, piece in enumerate(pieces) for _ in piece]  # token of each character
    inside = set()
    for tag in tags:
        for match in re.finditer(re.escape(tag), "".join(pieces)):
            inside.update(owner[match.start() : match.end()])
    theirs, places = [], []
    for in_tag, tokens in itertools.groupby(range(len(ids)), inside.__contains__):
        tokens = list(tokens)
        if in_tag:
            text = student.tokenizer.convert_tokens_to_string([pieces[i] for i in tokens])
            places += [-1] * len(tokens)
            theirs += teacher.tokenize(text)
        else:
            places += range(len(theirs), len(theirs) + len(tokens))
            theirs += [ids[i] for i in tokens]
    return theirs, places


def tags_of(student: common.Processor, teacher: common.Processor) -> list[str]:
    """The teacher's added tokens that the student has to write in pieces.

    Raises UserError unless every other token that the student can sample is the same token to the teacher.
    """
    ours, theirs = student.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    extra = set(theirs) - set(ours)
    # A teacher's token that is no added one would split the text otherwise.
    different = extra - set(teacher.tokenizer.added_tokens_encoder)
    for token, i in ours.items():
        if theirs.get(token) != i and i not in student.banned:
            different.add(token)
    if different:
        raise common.UserError(
            f"the tokenizers of student {student.name!r} and teacher {teacher.name!r} differ in {len(different)} "
            f"tokens: {sorted(different)[:5]}. Choose models of one family"
        )
    return sorted(extra)


# =============================================================================================== weigh
def weigh(micros: list[common.Micro], run: common.Run, args: Args):
    """One weight per token and term: means over all tokens (or responses) of the update, on all ranks."""
    length = torch.cat([m.length for m in micros])
    tokens = common.all_sum(torch.ones_like(length).sum())
    responses = common.all_sum((1 / length).sum())  # T tokens of 1 / T: each response counts 1
    # The gradient of a response's ratio is a sum over its tokens; the logged loss then has the ratio once a token.
    policy = tokens if args.ratio == "token" else responses  # Eq. 2
    distillation = tokens if args.kl_tokens == "mean" else responses
    for m in micros:
        mask = m.distilled * m.known  # [n]: 1 - r of Eq. 6, without the pieces of a tag
        m.weights = {
            "surrogate": -torch.ones_like(m.length) / policy,
            "distance": beta(args, run.step) * mask / distillation,  # Eq. 5, 6
        }


# =============================================================================================== update
def update(micros: list[common.Micro], run: common.Run, args: Args) -> dict:
    """One optimizer step, and the mean of log pi_theta - log pi_phi apart for right and wrong responses."""
    log = run.update(micros, *objective(run, args))
    found = common.all_terms(micros)
    for name in ("correct", "distilled", "known"):
        found[name] = torch.cat([getattr(m, name) for m in micros])
    log |= common.token_means({"clipped": found["clipped"]})
    if run.teacher is not None:
        mask, right = found["distilled"] * found["known"], found["correct"]
        log |= common.token_means({"distilled_tokens": mask, "distance": mask * found["distance"]})
        log |= common.token_means({"kl_right": found["k1"]}, right * found["known"])
        log |= common.token_means({"kl_wrong": found["k1"]}, (1 - right) * found["known"])
    return log


def objective(run: common.Run, args: Args) -> tuple:
    """What Run.update and Run.backward take: TERMS, terms, and extras(m, hidden, head)."""

    def extras(m, hidden, head):
        old = m.old
        if args.ratio == "sequence" and old is not None:  # needs all tokens before any gradient
            now = run.log_probs(m, hidden, head)
            old = common.sequence_old(now, old, 1.0, m.response)
        return [m.ids, old, m.log_q, m.advantage]

    return TERMS, functools.partial(terms, args=args), extras


def measure_share(micros: list[common.Micro], run: common.Run, args: Args) -> dict:
    """The gradient's norm from each of the two parts by itself, and the distillation's share of their sum."""
    whole, norms = [m.weights for m in micros], []
    for name in ("surrogate", "distance"):
        for m, weights in zip(micros, whole):
            m.weights = {name: weights[name]}
        run.backward(micros, *objective(run, args))
        norms.append(common.grad_norm(run.student).item())
        run.student.zero_grad()
    for m, weights in zip(micros, whole):
        m.weights = weights
    grpo, distillation = norms
    return {
        "grad_norm_grpo": grpo,
        "grad_norm_distillation": distillation,
        "distillation_share": distillation / (grpo + distillation or 1),
    }


# =============================================================================================== traces, sft
TRACES = """teacher trace_data trace_split trace_column trace_rows instruction
max_prompt max_response temperature top_p top_k seed""".split()  # what the traces depend on
SFT = """student traces sft_batch sft_steps sft_lr sft_warmup schedule weight_decay grad_clip dtype""".split()


def check_same(file: Path, names: list[str], args: Args):
    """Stop if the folder's settings, which the file holds, are not those of args."""
    known = json.loads(file.read_text()) if file.exists() else vars(args)
    pairs = [(name, known.get(name), getattr(args, name)) for name in names]
    changed = [f"{name} {old!r} -> {new!r}" for name, old, new in pairs if old != new]
    if changed:
        raise common.UserError(
            f"{file.parent} was made with other settings ({', '.join(changed)}): give the same, or another folder"
        )


def stages(args: Args) -> tuple[Args, Args]:
    """The settings of the runs of sft and rl, each with its folder in --output. rl goes on with the weights of sft.

    Joins the ranks, which share one --output; stops where batches cannot be shared out.
    """
    common.start_ranks(args)
    ranks = common.world_size()
    if args.sft_batch % ranks:  # said before the first stage spends its hours
        raise common.UserError(
            f"--sft-batch {args.sft_batch} has to be a multiple of the {ranks} ranks"
        )
    name = (
        args.output
        or f"runs/vold-{args.preset}-{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(3).hex()}"
    )
    base = Path(common.all_gather_object(name)[0])
    of_sft = dataclasses.replace(
        args,
        stage="sft",
        output=str(base / "sft"),
        prompts=args.sft_batch,
        max_steps=args.sft_steps,
        lr=args.sft_lr,
        warmup=args.sft_warmup,
        save_every=args.sft_save_every,
        group=1,
        updates=1,
    )
    of_rl = dataclasses.replace(args, stage="rl", output=str(base / "rl"))
    if args.stage == "all":
        of_rl.student = str((base / "sft" / "final").resolve())
    return of_sft, of_rl


def cold_start(args: Args, of_sft: Args):
    """Stages traces and sft, as far as --stage asks for them and they are not finished."""
    folder = Path(of_sft.output)
    if (folder / "final").exists():
        check_same(folder / "args.json", TRACES + SFT, of_sft)
        return common.say(f"{folder}/final is there: traces and sft are finished")
    traces = Path(args.traces or folder.parent / "traces")
    if args.stage != "sft":
        write_traces(traces, args)
        free_memory()
    if args.stage != "traces":
        sft(read_traces(traces, args), of_sft)
        free_memory()


def load_held_out(args: Args, processor: common.Processor):
    """The rows of --eval-data, which have images."""
    views = {"image": functools.partial(with_image, args=args)}
    return common.load_held_out(args, processor, views, "problem images answer")


def free_memory():
    """The models of a stage go before those of the next come."""
    gc.collect()
    torch.cuda.empty_cache()


def write_traces(folder: Path, args: Args):
    """The teacher's answers to text questions, one a row, in a file a rank; goes on where an earlier start stopped."""
    from tqdm import tqdm

    if common.rank() == 0:
        _lock = common.claim(folder)  # until this function ends
    check_same(folder / "made_from.json", TRACES, args)
    teacher = common.Processor(args.teacher)
    asked = dataclasses.replace(
        args, data=args.trace_data, data_split=args.trace_split, column_problem=args.trace_column
    )
    rows = common.load_rows(asked, teacher, contexts(args), "problem", pick=args.trace_rows)
    done = {record["index"] for record in read_records(folder)}
    mine = range(common.rank(), len(rows), common.world_size())
    numbers = rows.with_format(None)[" row"]
    pending = [i for i in mine if numbers[i] not in done]
    size = args.rollout_batch
    batches = max(common.all_gather_object(math.ceil(len(pending) / size)))
    if not batches:
        return common.say(f"{folder}: all {len(rows)} traces are there")
    common.say(f"traces of {len(rows)} questions, {len(done)} written before; to {folder}")
    if common.rank() == 0:
        made_from = {name: getattr(args, name) for name in TRACES}
        common.replace_text(folder / "made_from.json", json.dumps(made_from))
    file = folder / f"records-{common.rank()}.jsonl"
    if file.exists():  # the half line of a start that was killed
        os.truncate(file, file.read_bytes().rfind(b"\n") + 1)
    engine = common.ENGINES[args.engine](args.teacher, teacher, args)
    for i in tqdm(range(batches), "traces", disable=common.rank() > 0):
        part = [rows[j] for j in pending[i * size : (i + 1) * size]]
        prompts = [teacher.encode(question(row, args)) for row in part]
        seeds = [common.seed_of(args.seed, row["index"]) for row in part]
        responses = engine.generate(prompts, seeds)
        with open(file, "a") as f:
            for row, response in zip(part, responses):
                record = row | {"response": response.text, "finished": response.finished}
                f.write(json.dumps(record, ensure_ascii=False) + "\n")
        common.all_gather_object(None)  # nobody waits at the end for longer than --timeout
    engine.close()


def read_records(folder: Path):
    """What all ranks have written, in the order of the rows."""
    records = []
    for file in folder.glob("records-*.jsonl"):
        records += [json.loads(line) for line in common.whole_lines(file)]
    return sorted(records, key=lambda record: record["index"])


def read_traces(folder: Path, args: Args) -> list[dict]:
    """The traces that sft learns from: those that ended."""
    check_same(folder / "made_from.json", ["instruction"], args)
    records = read_records(folder)
    kept = [record for record in records if record["finished"]]
    counted = f"{folder}: {len(kept)} of {len(records)} traces ended within --max-response"
    if not kept:
        raise common.UserError(f"{counted}. Raise it, or write traces with --stage traces")
    common.say(counted)
    return kept


def sft(traces: list[dict], args: Args):
    """The student learns to write the traces: Eq. 4."""
    run = common.Run("vold", args)
    processor = common.Processor(args.student, args)
    held_out = load_held_out(args, processor)
    run.load(processor, None)
    for _ in run.steps(traces, held_out, functools.partial(with_image, args=args)):
        run.engine.sleep()  # it has nothing to sample before the next evaluation
        samples = [imitated(trace, processor, args) for trace in run.draw()]
        limit = args.micro_tokens
        micros = common.make_micros(samples, ["question"], processor, limit, images=False)
        weigh_imitation(micros)
        log = run.update(micros, *objective(run, args))
        del log["sampler_gap"]  # the student has sampled nothing
        run.log(log)


def imitated(trace: dict, processor: common.Processor, args: Args) -> common.Sample:
    """A trace in the student's tokens, as if it had answered so and ended."""
    text = processor.escape(trace["response"])
    ids = processor.tokenize(text) + [processor.tokenizer.eos_token_id]
    response = common.Response(ids, log_probs=[0.0] * len(ids))
    return common.Sample(trace, {"question": processor.encode(question(trace, args))}, response)


def weigh_imitation(micros: list[common.Micro]):
    """Eq. 4 as the mean over all tokens of the update on all ranks."""
    length = torch.cat([m.length for m in micros])
    tokens = common.all_sum(torch.ones_like(length).sum())
    for m in micros:
        m.log_q = None  # which extras hands on
        m.weights = {"log_p": -torch.ones_like(m.length) / tokens}


# =============================================================================================== main
def load(run: common.Run, args: Args, of_sft: Args):
    """Rows, all checked before stages traces and sft spend their hours; these stages; then the models of rl."""
    processor = common.Processor(args.student, args)
    teacher = args.teacher if beta(args, 1) else None
    if teacher is not None:
        run.reader = common.Processor(teacher, args)
        if not run.reader.tokenizer.chat_template:
            raise common.UserError(f"the teacher {teacher!r} has no chat template")
        run.tags = tags_of(processor, run.reader)
    text = dataclasses.replace(args, column_problem=args.column_text)
    train = common.load_rows(text, processor, contexts(args), "problem answer")
    held_out = load_held_out(args, processor)
    if args.stage == "all":
        cold_start(args, of_sft)
    run.load(processor, teacher)
    return train, held_out


def main():
    args = common.parse_args(Args, PRESETS, RANGES)
    of_sft, of_rl = stages(args)
    if args.stage in ("traces", "sft"):
        return cold_start(args, of_sft)
    run = common.Run("vold", of_rl)
    train, held_out = load(run, args, of_sft)
    for _ in run.steps(train, held_out, functools.partial(with_image, args=args)):
        samples = rollout(run.draw(), run, args)
        run.log_samples(samples)
        parts = [score(part, run, args) for part in common.split(samples, args.updates)]
        run.phase("score")
        for micros in parts:
            weigh(micros, run, args)
            if args.measure_share and (run.step - 1) % args.measure_share == 0:
                run.log(measure_share(micros, run, args))
            run.log(update(micros, run, args))


if __name__ == "__main__":
    common.launch(main)
