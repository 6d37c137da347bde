"""The gradient of a whole Reopold update against an independent float64 computation of Eq. 2-10 and of the baselines.

The reference reads every sequence alone and sorts all its tokens' entropies. It shares the fixed rollouts with the
code under test, and nothing else. Student and teacher have different widths and differently padded vocabularies.
"""

import math

import common

import pytest
import torch
from conftest import distance, layout_gradients
from exact import read
from gradients import fixed_rows, stale
from gradients_reopold import samples_of

RKL = {"stop_gradient": False, "floor": False, "select": False, "explore": False}
SETTINGS = {
    "RKL": RKL,
    "RKL, later update": RKL | {"updates": 2},
    "+1": RKL | {"stop_gradient": True},
    "+2": {"select": False, "explore": False},
    "+2, later update, another floor": {
        "select": False,
        "explore": False,
        "lam": 0.1,
        "updates": 2,
    },
    "floor without stop-gradient": {"stop_gradient": False, "select": False, "explore": False},
    "+3": {"explore": False},
    "+3, later update, another share": {"explore": False, "beta": 0.55, "updates": 2},
    "Reopold, exploring": {"progress": 0.49},
    "Reopold, exploring, later update": {"progress": 0.0, "updates": 2, "lam": 0.5},
    "Reopold, refining": {"progress": 0.5},
    "skew": {"method": "skew", "lam": 0.1},
    "gkd": {"method": "gkd"},
    "gkd-top": {"method": "gkd-top"},
    "sft": {"method": "sft"},
    "grpo": {"method": "grpo", "updates": 2},
    "+2, with tools": {"select": False, "explore": False, "calls": 2},
    "Reopold, refining, with tools": {"progress": 0.5, "calls": 2, "updates": 2},
}


@pytest.fixture(scope="module")
def world(tiny):
    processor = common.Processor(str(tiny / "student"))
    rows = fixed_rows(tiny, processor)
    return (
        processor,
        rows,
        *(common.Model(str(tiny / name), torch.float64).lm for name in ("student", "teacher")),
    )


@pytest.fixture(scope="module")
def results(tiny, tmp_path_factory):
    layouts = [([8], 500, 7, "reopold", settings) for settings in SETTINGS.values()]
    return dict(
        zip(
            SETTINGS,
            layout_gradients(tiny, tmp_path_factory.mktemp("exact"), layouts, dtype="float64"),
        )
    )


def full_divergence(p, q, method, lam):
    """Of one token, from probabilities [V]: the student's first."""
    if method == "skew":
        q = lam * p + (1 - lam) * q
    if method == "gkd-top":
        inside = sorted(set(p.detach().topk(5).indices.tolist()) | set(q.topk(5).indices.tolist()))
        outside = [v for v in range(len(p)) if v not in inside]
        p, q = (torch.cat([x[inside], x[outside].sum()[None]]) for x in (p, q))
    return (p * (p / q).log()).sum()


def loss(world, settings):
    """(- the objective, with a graph to the student; the number of kept tokens)."""
    processor, rows, student, teacher = world
    o = {
        "method": "reopold",
        "stop_gradient": True,
        "floor": True,
        "select": True,
        "explore": True,
        "lam": 0.3,
        "beta": 0.2,
        "progress": 0.0,
    } | settings
    lowest = math.log(o["lam"]) / (1 - o["lam"])
    gains, rewards, entropies = [], [], []
    for s in samples_of(processor, rows, settings):
        prompt, mask = s.prompts["question"], s.response.mask
        ids = torch.tensor([token for token, sampled in zip(s.response.ids, mask) if sampled])
        rest = (processor.image_id, processor.vocab, mask)
        p = read(student, prompt, s.response.ids, *rest)
        with torch.no_grad():
            q = read(teacher, prompt, s.response.ids, *rest)
        entropies += (-(p * p.log()).sum(-1)).tolist()
        if o["method"] in ("skew", "gkd", "gkd-top"):
            gains += [-full_divergence(p[t], q[t], o["method"], o["lam"]) for t in range(len(ids))]
            continue
        chosen, liked = p[range(len(ids)), ids], q[range(len(ids)), ids]
        old = stale(chosen.detach().log(), ids).exp() if o.get("updates") else chosen.detach()
        rewards += (liked / old).log().tolist()
        if o["method"] == "sft":
            gains += list(chosen.log())
            continue
        reward = (liked / (chosen.detach() if o["stop_gradient"] else chosen)).log()
        reward = reward.clamp(min=lowest) if o["floor"] else reward
        reward = torch.full_like(reward, s.advantage) if o["method"] == "grpo" else reward
        gains += list(torch.minimum(chosen / old * reward, (chosen / old).clamp(0.8, 1.2) * reward))
    mask = [True] * len(gains)
    if o["method"] == "reopold" and o["explore"] and o["progress"] < 0.5:
        mask = [r >= lowest for r in rewards]
    elif o["method"] == "reopold" and o["select"]:
        ranked = sorted(range(len(gains)), key=lambda t: -entropies[t])
        best = set(ranked[: math.floor(o["beta"] * (len(gains) - 1)) + 1])
        mask = [t in best for t in range(len(gains))]
    return -sum(g for g, keep in zip(gains, mask) if keep) / sum(mask), sum(mask), len(mask)


@pytest.mark.parametrize("name", SETTINGS)
def test_whole_update(world, results, name):
    student = world[2]
    value, kept, tokens = loss(world, SETTINGS[name])
    names = [f"lm.{key}" for key, _ in student.named_parameters()]
    expected = dict(zip(names, torch.autograd.grad(value, list(student.parameters()))))
    drops = name == "+3" or "share" in name or "Reopold" in name
    assert results[name]["kept"] == kept and (kept < tokens) == drops
    assert distance(results[name]["gradient"], expected) < 1e-6
