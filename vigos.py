"""ViGOS: see first, then reason. Self-distillation from three frozen views of the initial model.

Paper: "Seeing Before Reasoning: Decoupling Perception and Reasoning for Shortcut-Resilient Multimodal On-Policy
Self-Distillation", arXiv:2606.19120.

    python vigos.py                                    a laptop: small real models on real handwriting
    torchrun --nproc-per-node 8 vigos.py --preset 3b   one node: Qwen2.5-VL-3B, its own teacher
    python vigos.py --method opsd                      the baseline: one privileged teacher for every token
    python -m tools.palr                               how much of the answer the teachers leak (Appendix A)

The student writes <description> d </description> <think> r </think> \\boxed{a}; the first tag is given to it. The
frozen initial model p_0 reads the answer in three contexts, on the same prefix h_t:

    p       student      image, question, format              question()      what samples, and what is trained
    q_img   perception   image                                image_alone()   marks d: only the image can tell it what
    q_rea   reasoning    image, question, reference, format   privileged()    marks r and a
    q_ref   reference    the same                             privileged()    marks all of an answer out of form

    L_perc  mean over the tokens of d     KL(q_img || p)        of answers in form: forward KL     Eq. 13-14, 18
    L_rea   mean over those of r and a    KL(q_rea || p)        the same                           Eq. 15, 19
    L_ref   mean over all tokens          KL(p || q_ref)        of the others: reverse KL          Eq. 16, 20

    loss = 1 L_perc + 1 L_rea + 2 L_ref,  each token's KL clipped at 0.05                          Eq. 17, 21

    --method opsd: KL(q_ref || p) on every token of every answer                                   Eq. 4-6

Where this differs from the paper, or from the code released with it:
 1. q_rea reads the student's description before r, as the paper says. The released code leaves it out:
    --reasoning-prefix slice. With the description in its prefix the reasoning teacher's prompt has to ask for one: it
    is the reference teacher's, and the two differ in the tokens that they mark and in the KL's direction.
 2. The clip is taken after the sum over the vocabulary, as in the code: a token above it gets no gradient (the log
    counts them). --clip-entries clips each vocabulary entry before the sum instead, from above: the sum may then be
    negative, and the log counts tokens with any clipped entry. The toy clips at 5.
 3. </think>, \\boxed{} and what stands between them are marked with r and a, as in the code (the paper: no
    delimiters); otherwise nothing would teach to close and to box. The end token is not, unless --mark-end says so.
 4. An answer is in form if the tags come in order and d, r and a are not blank. The code lets blank ones pass. Of
    several boxes the first holds a; accuracy reads the last.
 5. The means are over one update and all ranks. The code averages each micro-step by itself.
 6. The perception teacher's prompt ends in <description> as the student's does; the code has no tag there.
 7. Accuracy is logged, greedily (the paper: Pass@5 and Avg@5), and plays no part. A row without its reference is
    refused (the code puts a sentence in its place).
 8. LoRA as in the paper (rank 64, scale 2, p_0 is the model with the adapters off), without its dropout of 0.05; full
    training with a frozen copy as p_0 at --lora 0.
 9. PALR: see tools/palr.py.
10. OPSD answers in the same form, from the same prompt (the paper's same-prompt table; its main table has a plain one).
    Its KL is clipped as ViGOS's is, and no temperature bends it.
11. All images of a row are shown (the code: the first), and the reference as its column holds it (the code strips tags
    and boxes).
12. The wording of the prompts is ours.
"""

import dataclasses
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
    data="LMMs-Lab-Turtle/Vision-SR1-47K",
    prompts=32,
    temperature=1.1,
    top_p=0.95,
    top_k=20,
    max_prompt=32768,
    max_response=4096,
    lr=5e-6,
    schedule="linear",
    grad_clip=0.1,
    lora=64,
    micro_tokens=16384,
    gradient_checkpointing=True,
    save_every=500,
)
PRESETS = {
    "toy": dict(
        student="toy/captions/student",
        data="toy/captions/train",
        eval_data=["toy/captions/test"],
        conflict_data="toy/captions/conflict",
        max_steps=150,
        lr=3e-4,
        warmup=10,
        schedule="linear",
        dtype="float32",
        eval_every=25,
        eval_rows=400,
        clip=5.0,
    ),
    "3b": HUB | dict(student="Qwen/Qwen2.5-VL-3B-Instruct"),
    "7b": HUB | dict(student="Qwen/Qwen2.5-VL-7B-Instruct"),
    "opsd": HUB | dict(student="Qwen/Qwen2.5-VL-3B-Instruct", method="opsd"),
}
# a divergence on old samples has no ratio that would mend it
RANGES = {"updates": (1, 1), "support": (1, 1024)}


@dataclass
class Args(common.Args):
    method: Literal["vigos", "opsd"] = "vigos"  # three views, or one teacher for every token
    lora: int = 0  # rank of LoRA adapters, whose scale is 2; 0 = train all weights
    column_reference: str = ""  # column that privileged teachers are shown; empty: the answer's
    weight_perception: float = 1.0  # of L_perc (0 = the paper's ablation); the weights are vigos's
    weight_reasoning: float = 1.0  # of L_rea (0 = the paper's ablation)
    weight_reference: float = 2.0  # of L_ref, on answers that are out of form
    # of the tokens that the reference teacher marks: paper is reverse_kl, with opsd forward_kl;
    # top_k is the JSD on both Top-K sets and a tail
    divergence: Literal["paper", "forward_kl", "reverse_kl", "jsd", "top_k", "sampled"] = "paper"
    support: int = 100  # tokens of each Top-K set of --divergence top_k; all, if there are fewer
    clip: float = 0.05  # largest KL of a token; above it there is no gradient; 0 = no limit
    clip_entries: bool = False  # limit each vocabulary entry's share instead, before the sum
    # what vigos's reasoning teacher reads: the whole answer, or (released code) r and a alone
    reasoning_prefix: Literal["full", "slice"] = "full"
    mark_end: bool = (
        False  # vigos: mark the end token of an answer in form as part of its reasoning
    )
    # held-out questions whose text suggests an answer, the right one at position 1: score and prior
    conflict_data: str = ""
    column_position: str = "position"  # column of conflict_data with the position: 1, 2 or 3


# =============================================================================================== contexts
OPENING = "<description>"
FORMAT = (
    "\nDescribe the image inside <description></description>, reason inside <think></think>, "
    "and put the final answer in \\boxed{}."
)
FORMAT_SLICE = "\nReason inside <think></think>, and put the final answer in \\boxed{}."


def ask(row: dict, text: str, prefill: str = OPENING) -> common.Context:
    turn = common.message("user", text, len(row["images"]))
    return common.Context([turn], row["images"], prefill)


def question(row: dict) -> common.Context:
    """I, x, format: what the student samples under and is trained in."""
    return ask(row, row["problem"] + FORMAT)


def image_alone(row: dict) -> common.Context:
    """I: what the perception teacher sees. No question, no reference, no format."""
    return ask(row, "")


def with_reference(row: dict) -> str:
    return f"{row['problem']}\nReference solution: {common.all_answers(row['reference'])[0]}"


def privileged(row: dict) -> common.Context:
    """I, x, a*, format: the reasoning teacher and the reference teacher."""
    return ask(row, with_reference(row) + FORMAT)


def privileged_slice(row: dict) -> common.Context:
    """The released code's reasoning teacher: no description before its reasoning."""
    return ask(row, with_reference(row) + FORMAT_SLICE, "<think>")


def contexts(args: Args) -> dict:
    """What every response is read in, by name; the first is what it is sampled under."""
    if args.method == "opsd":
        return {"question": question, "reference": privileged}
    return {
        "question": question,
        "perception": image_alone,
        "reasoning": privileged if args.reasoning_prefix == "full" else privileged_slice,
        "reference": privileged,
    }


# =============================================================================================== losses
def shares(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) by vocabulary entry: a (log a - log b), [n, V]."""
    log_a = common.upcast(log_a)
    return log_a.exp() * (log_a - log_b).masked_fill(log_a == -math.inf, 0.0)


def jsd(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Jensen-Shannon divergence by vocabulary entry, [n, V]."""
    # once, so that the parts of a gradient meet in float32
    log_p, log_q = common.upcast(log_p), common.upcast(log_q)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return (shares(log_p, log_m) + shares(log_q, log_m)) / 2


def limited(parts: Tensor, args: Args) -> tuple[Tensor, Tensor]:
    """A divergence from its parts [n, V] -> (the clipped divergence [n], whether the clip cut it [n])."""
    limit, parts = args.clip or math.inf, common.upcast(parts)
    if args.clip_entries:
        return parts.clamp(max=limit).sum(-1), (parts > limit).any(-1).to(parts.dtype)
    total = parts.sum(-1)
    return total.clamp(max=limit), (total > limit).to(parts.dtype)


TERMS = ("forward", "reference", "forward_clipped", "reference_clipped", "log_p", "entropy")


def terms(z: Tensor, y: Tensor, ids: Tensor, args: Args) -> tuple[Tensor, ...]:
    """TERMS, [n] each, from the logits [n, V] of the student, z, and of the token's own teacher, y.

    forward is the term of the perception and the reasoning teacher, reference that of the reference teacher; log_p (of
    the tokens) and entropy are for the log.
    """
    log_p, log_q = common.log_softmax(z), common.log_softmax(y)
    chosen = common.gather(log_p, ids)
    forward = shares(log_q, log_p)  # Eq. 14, 15: KL(teacher || student)
    kind = args.divergence
    if kind == "paper":
        kind = "forward_kl" if args.method == "opsd" else "reverse_kl"
    if kind == "forward_kl":
        reference = forward  # of OPSD: Eq. 4-6
    elif kind == "reverse_kl":
        reference = shares(log_p, log_q)  # Eq. 16: KL(student || teacher)
    elif kind == "jsd":
        reference = jsd(log_p, log_q)
    elif kind == "top_k":
        reference = topk_tail_divergence(z, y, min(args.support, z.shape[-1]))[:, None]
    else:  # without a clip, and over samples from p itself, its mean gradient is the reverse KL's
        reference = ((chosen - common.gather(log_q, ids)) ** 2 / 2)[:, None]
    forward, forward_clipped = limited(forward, args)
    reference, reference_clipped = limited(reference, args)
    entropy = common.entropy(log_p.detach())
    return forward, reference, forward_clipped, reference_clipped, chosen, entropy


# =============================================================================================== rollout
TEACHERS = ("perception", "reasoning", "reference")


def rollout(rows: list[dict], run: common.Run, args: Args) -> list[common.Sample]:
    """The student answers this rank's questions, from <description> on; s.marks says which teacher marks what."""
    samples = common.sample_responses(run.engine, rows, contexts(args), args)
    common.reward_answers(samples, args.group)  # for the log alone
    log = {"out_of_form": [], "description_length": [], "reasoning_length": []}
    for s in samples:
        spans = find_spans(run.processor.tokenizer.convert_ids_to_tokens(s.response.ids))
        s.marks = marks(spans, s.response, args)
        log["out_of_form"].append(spans is None)
        if spans is not None:
            log["description_length"].append(sum(spans[0]))
            log["reasoning_length"].append(sum(spans[1]))
    means = common.mean_over_ranks(log)
    run.log(means)
    if args.method == "vigos" and means["out_of_form"] > 0.9:
        run.note(
            f"{means['out_of_form']:.0%} of the answers are out of form: almost nothing is learned of "
            "seeing and reasoning (see samples.jsonl)"
        )
    return samples


BLANK = " \u0120\u010a\u0109\u010d"  # and how byte-level tokens write space, newline, tab, return


def closing_brace(text: str, start: int) -> int:
    """Where the brace is that closes the one opened just before `start`; -1 without it. ("{a{b}c}", 1) -> 6."""
    depth = 1
    for i in range(start, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return i
    return -1


def find_spans(pieces: list[str]) -> tuple[list[bool], list[bool]] | None:
    """Which tokens of a response, written as `pieces`, are in d, and which in r and a; None if it is out of form.

    r and a begin behind <think>; </think> and the box are part of them. A token that holds a part of a tag before r is
    in neither. The opening <description> is not part of the response.

    A 3 . </ description > <think> 3 </ think > \\boxed{ 3 } END
    1 1 1 0  0           0 0       0 0  0     0 0        0 0 0     d
    0 0 0 0  0           0 0       1 1  1     1 1        1 1 0     r and a
    """
    text = "".join(pieces)
    close = text.find("</description>")  # -1, which the check below finds again, if there is none
    think = text.find("<think>", close)
    end = text.find("</think>", think)
    box = text.find("\\boxed{", end)
    if min(close, think, end, box) < 0:
        return None
    inside = think + len("<think>")
    opened = box + len("\\boxed{")
    last = closing_brace(text, opened)
    contents = text[:close], text[inside:end], text[opened:last]  # d, r, a
    if last < 0 or not all(content.strip(BLANK) for content in contents):
        return None
    description, reasoning = [], []
    start = 0
    for piece in pieces:
        stop = start + len(piece)
        description.append(stop <= close)
        reasoning.append(inside <= start <= last)
        start = stop
    return description, reasoning


def marks(spans: tuple | None, response: common.Response, args: Args) -> dict[str, list[bool]]:
    """Teacher -> which of the response's tokens it marks. No token has two.

    Of 4 tokens, spans ([1, 0, 0, 0], [0, 0, 1, 0]) -> perception [1, 0, 0, 0], reasoning [0, 0, 1, 0], reference [0, 0,
    0, 0]. Spans None: reference [1, 1, 1, 1], and the others none.
    """
    none = [False] * len(response.ids)
    if args.method == "opsd" or spans is None:
        every = [True] * len(response.ids)
        return {"perception": none, "reasoning": none, "reference": every}
    description, reasoning = spans
    if args.mark_end and response.finished:
        reasoning = [*reasoning[:-1], True]
    return {"perception": description, "reasoning": reasoning, "reference": none}


# =============================================================================================== score
def score(samples: list[common.Sample], run: common.Run, args: Args) -> list[common.Micro]:
    """The frozen model reads every response as each of the teachers that mark a part of it.

    Adds m.marks: teacher -> [n], 1 for the tokens that it marks. Keeps in m.teacher one hidden state a token, its own
    teacher's, [n, H]; 0 where nobody marks it. Never logits.
    """
    micros = common.make_micros(samples, ["question"], run.processor, args.micro_tokens)
    with torch.no_grad():
        for m in micros:
            m.marks = {}
            own = run.head.new_zeros(len(m.ids), run.head.shape[1])  # [n, H]
            for name in TEACHERS:
                marked = []
                for s in m.samples:
                    marked += s.marks[name]
                mask = torch.tensor(marked, dtype=torch.bool, device=m.ids.device)  # [n]
                m.marks[name] = mask.float()
                if name in contexts(args):
                    own[mask] = read_as(name, m.samples, run, args)
            m.teacher = [own]
    return micros


def read_as(name: str, samples: list[common.Sample], run: common.Run, args: Args) -> Tensor:
    """Hidden states [k, H] of the k tokens that this teacher marks, in their order."""
    prompts, responses = [], []
    for s in samples:
        marked = s.marks[name]
        if not any(marked):
            continue
        first = 0
        if name == "reasoning" and args.reasoning_prefix == "slice":
            first = marked.index(True)
        prompts.append(s.prompts[name])
        places = marked[first:]  # whose hidden states are returned
        responses.append(common.Response(s.response.ids[first:], mask=places))
    return run.teacher(run.processor.batch(prompts, responses))


# =============================================================================================== weigh
def weigh(micros: list[common.Micro], run: common.Run, args: Args):
    """One weight per token and term: the mean over a teacher's tokens, of all ranks, times the teacher's weight."""
    counts = {}
    for name in TEACHERS:
        count = torch.cat([m.marks[name] for m in micros]).sum()
        counts[name] = common.all_sum(count).clamp(min=1)
    weight_reference = 1.0 if args.method == "opsd" else args.weight_reference
    for m in micros:
        mean = {name: m.marks[name] / counts[name] for name in TEACHERS}
        perception = args.weight_perception * mean["perception"]  # Eq. 18
        reasoning = args.weight_reasoning * mean["reasoning"]  # Eq. 19
        reference = weight_reference * mean["reference"]  # Eq. 20
        m.weights = {"forward": perception + reasoning, "reference": reference}  # Eq. 17, 21


# =============================================================================================== update
def update(micros: list[common.Micro], run: common.Run, args: Args) -> dict:
    """One optimizer step; the three losses, each as the mean of its own tokens, and how many the clip cut."""
    log = run.update(micros, TERMS, functools.partial(terms, args=args), extras)
    found = common.all_terms(micros)
    for name in TEACHERS:
        mask = torch.cat([m.marks[name] for m in micros])
        term = "reference" if name == "reference" else "forward"
        values = {name: found[term], f"clipped_{name}": found[f"{term}_clipped"]}
        means = common.token_means(values, mask)  # nothing where this teacher marks no token
        if means:
            log |= means | common.token_means({f"tokens_{name}": mask})
    return log


def extras(m: common.Micro, hidden: Tensor, head: Tensor) -> list:
    """What terms needs besides logits."""
    return [m.ids]


# =============================================================================================== LoRA
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def lora_layers(lm) -> dict[str, torch.nn.Linear]:
    """The linear layers called so, by full name: a convolution may be called the same, and could not be merged."""
    found = {}
    for name, module in lm.named_modules():
        if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in LORA_TARGETS:
            found[name] = module
    return found


class Adapted(common.Model):
    """Frozen weights with adapters beside the linear layers LORA_TARGETS: W + 2 B A, B = 0 at first."""

    def __init__(self, name: str, dtype: torch.dtype, empty: bool, r: int, seed: int):
        super().__init__(name, dtype, empty)
        from peft import LoraConfig, inject_adapter_in_model

        # the same adapters on every rank, of which each keeps its shard
        torch.manual_seed(seed)
        layers = list(lora_layers(self.lm))
        if not layers:
            raise common.UserError(
                f"--lora: {name!r} has no linear layer called {', '.join(LORA_TARGETS)}. Train all of it: --lora 0"
            )
        config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=layers)
        inject_adapter_in_model(config, self.lm)
        for name, parameter in self.lm.named_parameters():
            parameter.requires_grad_(".lora_" in name)

    def initial(self, batch: dict) -> Tensor:
        """Hidden states [N, H] of the model without its adapters: p_0, which costs no second copy."""
        adapted = [module for module in self.modules() if hasattr(module, "lora_A")]
        for module in adapted:
            module.set_scale("default", 0.0)
        hidden = self(batch)
        for module in adapted:
            module.set_scale("default", 1.0)
        return hidden

    def weights(self):
        """See common.Model.weights; the adapters are merged."""
        parameters = dict(self.lm.named_parameters())
        for name, value in super().weights():
            layer, adapted, _ = name.partition(".base_layer.weight")
            if adapted:
                a = common.full_tensor(parameters[f"{layer}.lora_A.default.weight"])
                b = common.full_tensor(parameters[f"{layer}.lora_B.default.weight"])
                value = value + 2 * (b.float() @ a.float()).to(value.dtype)
            if ".lora_" not in name:
                yield name.replace(".base_layer.", "."), value


# =============================================================================================== main
def check_tags(processor: common.Processor):
    """Stop if the tokenizer cannot write the tags: no answer would ever be in form."""
    tags = "<description></description><think></think>\\boxed{}"
    written = "".join(processor.tokenizer.convert_ids_to_tokens(processor.tokenize(tags)))
    if written != tags:
        raise common.UserError(
            f"the tokenizer of {processor.name!r} cannot write the tags of this method: {tags} becomes "
            f"{written}. Choose another student"
        )


def load_conflicts(args: Args, processor: common.Processor) -> dict:
    """Held-out questions whose text suggests an answer, as in ViLP: {"prior": it is right, "score": it is not}."""
    if not args.conflict_data:
        return {}
    held_out = dataclasses.replace(args, eval_data=[args.conflict_data], eval_rows=0)
    names = "problem images answer position"
    asked = {"question": question}
    (rows,) = common.load_held_out(held_out, processor, asked, names).values()
    positions = [str(x) for x in rows.with_format(None)[args.column_position]]
    if set(positions) != {"1", "2", "3"}:
        raise common.UserError(
            f"every row of {args.conflict_data!r} needs a position of 1, 2 or 3, and all of them have to "
            f"occur; column {args.column_position!r} holds {sorted(set(positions))[:8]}"
        )
    right = [i for i, position in enumerate(positions) if position == "1"]
    wrong = [i for i, position in enumerate(positions) if position != "1"]
    return {"prior": rows.select(right), "score": rows.select(wrong)}


def load(run: common.Run, args: Args):
    """Training rows and held-out rows, all checked; then the models."""
    processor = common.Processor(args.student, args)
    check_tags(processor)
    if args.teacher:
        raise common.UserError(
            "--teacher is not for this method: its teacher is --student, before it is trained"
        )
    train = common.load_rows(args, processor, contexts(args), "problem images answer reference")
    asked = {"question": question}
    held_out = common.load_held_out(args, processor, asked, "problem images answer")
    held_out |= load_conflicts(args, processor)
    load_models(run, processor, args.student)
    return train, held_out


def load_models(run: common.Run, processor: common.Processor, initial: str):
    """The student, and the initial model as each of the three teachers: a second copy, or the one without adapters."""
    args = run.args
    if not args.lora:
        run.load(processor, initial)
        return
    run.load(processor, None, functools.partial(Adapted, r=args.lora, seed=args.seed))
    run.teacher = run.student.initial
    run.head = run.student.head().to(getattr(torch, args.dtype))


def main():
    args = common.parse_args(Args, PRESETS, RANGES)
    args.column_reference = args.column_reference or args.column_answer
    run = common.Run("vigos", args)
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
