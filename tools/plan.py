"""What a run needs on each GPU, from the models' configs alone: an estimate.

    python -m tools.plan vgs --preset 2b --gpus 8               eight cards of 80 GiB
    python -m tools.plan reopold --preset visual-3b --gpus 8 --card 141 --micro-tokens 32768

The first word is the method; its own flags follow. A hub model's config is downloaded, no weights. Prompts and
responses are taken as long as they may be. vLLM is assumed unless --engine hf is given.
"""

import argparse
import importlib
import sys
from dataclasses import dataclass
from pathlib import Path

import common
import vigos

import torch
from torch import nn

GIB = 2**30


@dataclass
class Sizes:
    """Of a checkpoint: numbers of parameters, and of what a token's activations hold."""

    parameters: int
    trained: int
    outside: int  # parameters outside of the blocks that are sharded one by one
    block: int  # parameters of the largest block
    vocab: int
    hidden: int
    cache: int  # numbers that a token leaves in the cache of keys and values
    saved: int  # numbers a token, kept for the backward pass, of all layers
    layer: int  # and of one


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def sizes_of(name, args) -> Sizes:
    """Builds the model without memory (torch's meta device)."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = common.load_pretrained(name, AutoConfig)
    sees = hasattr(config, "vision_config")
    auto = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    with torch.device("meta"):
        lm = auto.from_config(config, trust_remote_code=False)
    kinds = set(lm._no_split_modules or ())
    blocks = [count(m) for m in lm.modules() if type(m).__name__ in kinds]
    trained = count(lm)
    if args.freeze_vision and sees:
        trained -= count(lm.model.visual)
    rank = getattr(args, "lora", 0)
    if rank:
        adapted = vigos.lora_layers(lm).values()
        trained = sum(rank * (m.in_features + m.out_features) for m in adapted)
    text = config.get_text_config()
    # A block whose attention keeps no probabilities keeps twenty vectors of the hidden size (what norms, queries, keys,
    # values and outputs need) and four of the inner one, counted on Qwen3's.
    layer = 20 * text.hidden_size + 4 * text.intermediate_size
    kept = text.hidden_size if args.gradient_checkpointing else layer
    heads = getattr(text, "num_key_value_heads", text.num_attention_heads)
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Sizes(
        parameters=count(lm),
        trained=trained,
        outside=count(lm) - sum(blocks),
        block=max(blocks, default=0),
        vocab=lm.lm_head.weight.shape[0],
        hidden=text.hidden_size,
        cache=2 * text.num_hidden_layers * heads * width,
        saved=text.num_hidden_layers * kept,
        layer=layer,
    )


def plan_memory(args, gpus, card, teacher, contexts, kept) -> dict[str, tuple[float, float]]:
    """What a GPU holds: name -> (bytes while sampling, bytes while training).

    contexts: in which the student reads a response at once. kept: hidden states of the teacher that a response token
    keeps until the update.
    """
    shards, narrow = max(gpus // args.replicas, 1), 2 if args.dtype == "bfloat16" else 4
    s = sizes_of(args.student, args)
    responses = args.prompts * args.group / gpus
    sequence = args.max_prompt + args.max_response
    tokens = max(args.micro_tokens, contexts * sequence)
    gathered = narrow * (2 * s.outside + 3 * s.block)
    if narrow < 4:  # reduced in float32
        gathered += 4 * (s.outside + s.block)
    saved = s.saved + (s.layer if args.gradient_checkpointing else 0)
    logits = 4 * args.loss_chunk * s.vocab * (3 * contexts + (4 if teacher else 2))
    head = (4 + narrow) * s.vocab * s.hidden
    need = {
        "student, float32, sharded": (4 * s.parameters / shards,) * 2,
        "optimizer, sharded": (8 * s.trained / shards,) * 2,
        "gradients, sharded": (0, 4 * s.trained / shards),
        "gathered weights and gradients": (0, gathered),
        f"activations of {tokens:,} tokens": (0, narrow * tokens * saved),
        "loss: logits of a chunk, head's gradient": (0, logits + head),
    }
    if teacher and not getattr(args, "lora", 0):
        t = sizes_of(teacher, args)
        need["teacher, sharded"] = (narrow * t.parameters / shards,) * 2
        need["teacher's output matrix, whole"] = (narrow * t.vocab * t.hidden,) * 2
        states = narrow * kept * responses * args.max_response * t.hidden
        need["teacher's hidden states"] = (0, states)
    if args.engine == "vllm":
        need["vLLM (asleep in training)"] = (args.vllm_memory * card * GIB, 0)
    else:
        cache = s.cache * min(args.rollout_batch, responses) * sequence
        sampler = narrow * s.parameters
        need["sampler: a copy of the student, its cache"] = (sampler + narrow * cache, sampler)
    return need


def print_plan(args, gpus, card, teacher, contexts, kept):
    """The table, and whether it fits with a tenth to spare for what an estimate leaves out."""
    if args.prompts % (args.updates * gpus) or gpus % args.replicas:
        raise common.UserError(
            f"--gpus {gpus} cannot share --prompts {args.prompts} in --updates {args.updates}"
        )
    need = plan_memory(args, gpus, card, teacher, contexts, kept)
    print(f"{f'GiB on each of {gpus} GPUs':44}{'sampling':>10}{'training':>10}")
    totals = [sum(column) for column in zip(*need.values())]
    for name, (sampling, training) in (need | {"together": totals}).items():
        print(f"{name:44}{sampling / GIB:10.2f}{training / GIB:10.2f}")
    fits = 1.1 * max(totals) / GIB <= card
    advice = (
        "it fits"
        if fits
        else (
            "it does not fit: lower --micro-tokens, --loss-chunk or --vllm-memory, set --gradient-checkpointing or "
            "--lora, or use more GPUs"
        )
    )
    print(f"with a tenth to spare for what is left out, on cards of {card:g} GiB: {advice}")


def teacher_of(method: str, module, args) -> str | None:
    """The frozen model that a run loads."""
    if method == "vgs":
        made_here = args.teacher == module.HUB["teacher"] and not Path(args.teacher).exists()
        teacher = module.PRESETS["teacher"]["student"] if made_here else args.teacher
        return teacher if args.alpha else None
    if method == "reopold":
        return None if args.method == "grpo" else args.teacher
    return args.teacher if method == "vold" else args.student


def main():
    methods = ("vgs", "vold", "ptdpo", "vigos", "reopold")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("method", choices=methods)
    parser.add_argument("--gpus", type=int, default=8, help="that share the run")
    parser.add_argument("--card", type=float, default=80.0, help="GiB of memory of each")
    own, flags = parser.parse_known_args()
    if own.gpus < 1 or own.card <= 0:
        raise common.UserError("--gpus has to be at least 1, and --card positive")
    module = importlib.import_module(own.method)
    if not any(flag.split("=")[0] == "--preset" for flag in flags):
        real = next(name for name in module.PRESETS if not name.startswith("toy"))
        flags = ["--preset", real, *flags]
    sys.argv = [f"tools.plan {own.method}", *flags]
    args = common.parse_args(module.Args, module.PRESETS, module.RANGES, flags)
    asks_hf = (
        "hf" in [b for a, b in zip(flags, flags[1:]) if a == "--engine"] or "--engine=hf" in flags
    )
    args.engine = "hf" if asks_hf else "vllm"
    contexts = len(module.contexts(args)) if own.method == "vgs" else 1
    kept = {"vold": 0, "vgs": contexts, "reopold": 1}.get(own.method, 1)
    if own.method == "reopold" and args.method not in module.FULL:
        kept = 0
    print_plan(args, own.gpus, own.card, teacher_of(own.method, module, args), contexts, kept)


if __name__ == "__main__":
    main()
