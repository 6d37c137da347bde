"""The gradient of a whole PTD-PO update against an independent float64 computation of Eq. 3, 8, 11-17.

The reference reads every sequence alone, forms the support with Python sets, and adds up probabilities. It shares the
fixed rollouts with the code under test, and nothing else.
"""

import common

import pytest
import torch
from conftest import distance, layout_gradients
from exact import read
from gradients import CORRECT, fixed_rows, stale
from gradients_ptdpo import samples_of

K, EXTRA = 20, 0.1
SETTINGS = {
    "grpo": {"kl": EXTRA},
    "grpo, mean of responses": {"average": "response", "kl": EXTRA},
    "grpo, later update": {"updates": 2, "kl": EXTRA},
    "grpo, no KL": {"kl": 0.0},
    "no tutor": {"lambda_ptd": 0.0, "kl": EXTRA},
    "tau 0.5": {"tau": 0.5, "kl": EXTRA},
    "all trajectories": {"tutor_all": True, "kl": EXTRA},
    "no KL on failing groups": {"drop_reference_kl": True, "tau": 0.5, "kl": EXTRA},
    "forward KL": {"divergence": "forward_kl", "kl": EXTRA},
    "reverse KL": {"divergence": "reverse_kl", "kl": EXTRA},
    "solution": {"tutor_context": "solution", "kl": EXTRA},
    "blind": {"blind_tutor": True, "kl": EXTRA},
    "dapo, later update": {"optimizer": "dapo", "updates": 2},
    "gspo": {"optimizer": "gspo"},
    "gspo, later update": {"optimizer": "gspo", "updates": 2},
}
COMMON = {"support": K, "lambda_ptd": 0.5}
CLIPS = {"grpo": (0.2, 0.3), "dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4)}
DEFAULTS = {"optimizer": "grpo", "tau": 1.0, "kl": 0.0, "divergence": "jsd"} | COMMON


@pytest.fixture(scope="module")
def world(tiny):
    processor = common.Processor(str(tiny / "student"))
    rows = fixed_rows(tiny, processor)
    student, frozen = (common.Model(str(tiny / "student"), torch.float64).lm for _ in range(2))
    with torch.no_grad():  # otherwise the reference KL is at its minimum, and has no gradient
        for parameter in student.parameters():
            parameter.mul_(1.02)
    return processor, rows, student, frozen


@pytest.fixture(scope="module")
def gradients(tiny, tmp_path_factory):
    layouts = [([8], 500, 7, "ptdpo", COMMON | settings) for settings in SETTINGS.values()]
    folder = tmp_path_factory.mktemp("exact")
    return dict(zip(SETTINGS, layout_gradients(tiny, folder, layouts, dtype="float64")))


def divergence(p, q, kind):
    """Eq. 14-17 for one token: the union of both Top-K sets, and everything else in one bucket."""
    support = set(p.detach().topk(K).indices.tolist()) | set(q.topk(K).indices.tolist())
    inside, outside = sorted(support), sorted(set(range(len(p))) - support)
    p, q = (torch.cat([x[inside], x[outside].sum()[None]]) for x in (p, q))
    m = (p + q) / 2
    return {
        "jsd": ((q * (q / m).log()).sum() + (p * (p / m).log()).sum()) / 2,
        "forward_kl": (q * (q / p).log()).sum(),
        "reverse_kl": (p * (p / q).log()).sum(),
    }[kind]


def loss(world, settings):
    """Eq. 12 from the definitions, with a graph to the student; |F|; the sum over F of D; the mean of k3."""
    processor, rows, student, frozen = world
    o = DEFAULTS | settings
    low, high = CLIPS[o["optimizer"]]
    objective, drift, tutoring, in_f = [], [], 0.0, 0
    for i, s in enumerate(samples_of(processor, rows, COMMON | settings)):
        ids = torch.tensor(s.response.ids)
        every = range(len(ids))

        def probabilities(lm, view, s=s):
            return read(lm, s.prompts[view], s.response.ids, processor.image_id, processor.vocab)

        p = probabilities(student, "question")
        with torch.no_grad():
            reference = probabilities(frozen, "question")[every, ids]
        chosen = p[every, ids]
        old = stale(chosen.detach().log(), ids).exp() if o.get("updates") else chosen.detach()
        ratio = chosen / old
        if o["optimizer"] == "gspo":  # one ratio for the response
            ratio = ratio.log().mean().exp()[None]
        clipped = torch.minimum(ratio * s.advantage, ratio.clamp(1 - low, 1 + high) * s.advantage)
        pair = i // 2 * 2
        failing = (CORRECT[pair] + CORRECT[pair + 1]) / 2 < o["tau"]
        drift.append(reference / chosen - 1 - (reference / chosen).log())
        kept = not (failing and o.get("drop_reference_kl"))
        objective.append(clipped - o["kl"] * drift[-1] * kept)
        chosen_for_f = o.get("tutor_all") or (failing and not CORRECT[i])  # Eq. 8
        if o["lambda_ptd"] and "tutor" in s.prompts and chosen_for_f:
            with torch.no_grad():
                q = probabilities(frozen, "tutor")
            tutoring = tutoring + sum(divergence(p[t], q[t], o["divergence"]) for t in every)
            in_f += len(ids)
    if o.get("average") == "response" or o["optimizer"] == "gspo":
        mean = torch.stack([x.mean() for x in objective]).mean()
    else:
        mean = torch.cat(objective).mean()
    total = -mean + (o["lambda_ptd"] * tutoring / in_f if in_f else 0.0)
    return total, in_f, tutoring, torch.cat(drift).mean()


@pytest.mark.parametrize("name", SETTINGS)
def test_whole_update(world, gradients, name):
    expected, in_f, tutoring, drift = loss(world, SETTINGS[name])
    student, found = world[2], gradients[name]
    names = [f"lm.{key}" for key, _ in student.named_parameters()]
    expected = dict(zip(names, torch.autograd.grad(expected, list(student.parameters()))))
    assert found["tutored"] == in_f and (in_f > 0) == (name != "no tutor")
    assert distance(found["gradient"], expected) < 1e-6
    print("DIST", name, distance(found["gradient"], expected))
    assert ("ptd" in found["log"]) == (in_f > 0)
    if in_f:
        assert found["log"]["ptd"] == pytest.approx((tutoring / in_f).item(), rel=1e-6)
    if "kl" in found["log"]:
        assert found["log"]["kl"] == pytest.approx(drift.item(), rel=1e-6)
    assert ("kl" in found["log"]) == (SETTINGS[name].get("kl", 0.0) > 0)
