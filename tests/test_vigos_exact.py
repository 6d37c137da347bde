"""The gradient of a whole ViGOS update against an independent float64 computation of Eq. 4-6 and 13-21.

The reference reads every sequence alone, finds the spans in the text, and adds up probabilities. It shares the fixed
rollouts and the wording of the contexts with the code under test, and nothing else.
"""

import re

import common
import vigos

import pytest
import torch
from conftest import distance, layout_gradients
from exact import read
from gradients_vigos import samples_of

SETTINGS = {
    "lora": {"clip": 0.0, "lora": 4},
    "vigos": {"clip": 0.0},
    "clipped tokens": {"clip": 0.5},
    "clipped entries": {"clip": 0.02, "clip_entries": True},
    "weights": {
        "clip": 0.0,
        "weight_perception": 0.3,
        "weight_reasoning": 0.0,
        "weight_reference": 5.0,
    },
    "forward KL on answers out of form": {"clip": 0.0, "divergence": "forward_kl"},
    "slice": {"clip": 0.0, "reasoning_prefix": "slice"},
    "with the end": {"clip": 0.0, "mark_end": True},
    "opsd": {"method": "opsd", "clip": 0.0},
    "opsd, jsd": {"method": "opsd", "clip": 0.0, "divergence": "jsd"},
    "opsd, top k": {"method": "opsd", "clip": 0.0, "divergence": "top_k", "support": 20},
    "opsd, sampled": {"method": "opsd", "clip": 0.0, "divergence": "sampled"},
}


@pytest.fixture(scope="module")
def world(tiny, tiny_rows):
    processor = common.Processor(str(tiny / "student"))
    student, frozen = (common.Model(str(tiny / "student"), torch.float64).lm for _ in range(2))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.copy_(parameter.float() * 1.02)
    return processor, tiny_rows, student, frozen


@pytest.fixture(scope="module")
def results(tiny, tmp_path_factory):
    layouts = [([8], 500, 7, "vigos", settings) for settings in SETTINGS.values()]
    return dict(
        zip(
            SETTINGS,
            layout_gradients(tiny, tmp_path_factory.mktemp("exact"), layouts, dtype="float64"),
        )
    )


def parts_of(tokenizer, ids, end: bool):
    """Token -> d or r, by the characters of the text; None where the answer is out of form."""
    pieces = tokenizer.convert_ids_to_tokens(ids)
    text = "".join(pieces)
    found = re.fullmatch(
        r"(?P<d>.+?)</description>.*?<think>(?P<r>.+?</think>.*?\\boxed\{.+?\}).*", text, re.S
    )
    if not found:
        return None
    parts, at = [], 0
    for i, piece in enumerate(pieces):
        start, at = at, at + len(piece)
        in_d, in_r = at <= found.end("d"), found.start("r") <= start < found.end("r")
        after = end and i == len(pieces) - 1
        parts.append("d" if in_d else "r" if in_r or after else None)
    return parts


def limit(shares, o):
    if not o["clip"]:
        return shares.sum()
    return (
        shares.clamp(max=o["clip"]).sum()
        if o.get("clip_entries")
        else shares.sum().clamp(max=o["clip"])
    )


def divergence(p, q, token, kind, o):
    """Of one token, from probabilities [V]: p the student's, q the teacher's."""
    if kind == "sampled":
        return (p[token].log() - q[token].log()) ** 2 / 2
    if kind == "top_k":
        inside = sorted(
            set(p.detach().topk(o["support"]).indices.tolist())
            | set(q.topk(o["support"]).indices.tolist())
        )
        outside = [v for v in range(len(p)) if v not in inside]
        p, q = (torch.cat([x[inside], x[outside].sum()[None]]) for x in (p, q))
    m = (p + q) / 2
    return limit(
        {
            "forward_kl": lambda: q * (q / p).log(),
            "reverse_kl": lambda: p * (p / q).log(),
            "jsd": lambda: (p * (p / m).log() + q * (q / m).log()) / 2,
            "top_k": lambda: (p * (p / m).log() + q * (q / m).log()) / 2,
        }[kind](),
        o,
    )


def loss(world, settings):
    processor, rows, student, frozen = world
    o = dict(method="vigos", weight_perception=1.0, weight_reasoning=1.0, weight_reference=2.0)
    o = o | settings
    kind = o.get("divergence", "forward_kl" if o["method"] == "opsd" else "reverse_kl")
    found = {"perception": [], "reasoning": [], "reference": []}
    for s in samples_of(processor, rows, vigos.Args(**settings)):
        ids = s.response.ids
        p = read(student, s.prompts["question"], ids, processor.image_id, processor.vocab)
        parts = (
            None if o["method"] == "opsd" else parts_of(processor.tokenizer, ids, o.get("mark_end"))
        )

        def teacher(name, skip=0, s=s, ids=ids):
            with torch.no_grad():
                return read(
                    frozen, s.prompts[name], ids[skip:], processor.image_id, processor.vocab
                )

        if parts is None:
            q = teacher("reference")
            found["reference"] += [divergence(p[t], q[t], ids[t], kind, o) for t in range(len(ids))]
            continue
        skip = parts.index("r") if o.get("reasoning_prefix") == "slice" else 0
        seen, thought = teacher("perception"), teacher("reasoning", skip)
        found["perception"] += [
            divergence(p[t], seen[t], ids[t], "forward_kl", o)
            for t, part in enumerate(parts)
            if part == "d"
        ]
        found["reasoning"] += [
            divergence(p[t], thought[t - skip], ids[t], "forward_kl", o)
            for t, part in enumerate(parts)
            if part == "r"
        ]
    weights = (
        {name: o[f"weight_{name}"] for name in found}
        if o["method"] == "vigos"
        else dict.fromkeys(found, 1.0)
    )
    return sum(
        weights[name] * torch.stack(values).mean() for name, values in found.items() if values
    ), {name: len(v) for name, v in found.items()}


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "lora"])
def test_whole_update(world, results, name):
    expected, counts = loss(world, SETTINGS[name])
    student = world[2]
    expected = dict(
        zip(
            [f"lm.{key}" for key, _ in student.named_parameters()],
            torch.autograd.grad(expected, list(student.parameters())),
        )
    )
    log = results[name]["log"]
    assert {f"tokens_{part}" for part, count in counts.items() if count} == {
        key for key in log if key.startswith("tokens_")
    }
    assert counts["reference"] > 0 and (counts["perception"] > 0) == (not name.startswith("opsd"))
    assert distance(results[name]["gradient"], expected) < 1e-6
    if name == "clipped tokens":
        assert 0 < max(
            log["clipped_reasoning"], log["clipped_perception"], log["clipped_reference"]
        )


def test_lora(world, results, tiny):
    """W + 2 B A: if G is the gradient of the whole W, the adapters' are 2 B^T G and 2 G A^T; nothing else has one."""
    processor, rows, _, frozen = world
    adapters, gradient = (
        {name.removeprefix("lm."): x.double() for name, x in results["lora"][key].items()}
        for key in ("adapters", "gradient")
    )
    student = common.Model(str(tiny / "student"), torch.float64).lm
    pairs = {
        name.split(".lora_A.")[0]: (x, adapters[name.replace("lora_A", "lora_B")])
        for name, x in adapters.items()
        if ".lora_A." in name
    }
    parameters = {name.removesuffix(".weight"): p for name, p in student.named_parameters()}
    with torch.no_grad():
        for name, (a, b) in pairs.items():
            parameters[name] += 2 * b @ a
    assert len(pairs) == 14 and all(
        "language_model" in name for name in pairs
    )  # 7 linear layers in each of 2 blocks
    value, _ = loss((processor, rows, student, frozen), SETTINGS["lora"])
    whole = dict(zip(pairs, torch.autograd.grad(value, [parameters[name] for name in pairs])))
    expected = {
        f"{name}.lora_A.default.weight": 2 * b.T @ whole[name] for name, (_, b) in pairs.items()
    }
    expected |= {
        f"{name}.lora_B.default.weight": 2 * whole[name] @ a.T for name, (a, _) in pairs.items()
    }
    assert set(gradient) == set(expected) and distance(gradient, expected) < 1e-6
