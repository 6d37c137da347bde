"""The gradient of a whole VOLD update against an independent float64 computation: Eq. 2, 3, 5, 6, and Eq. 4 of sft.

The reference reads every sequence alone, and the teacher reads the response's text in its own tokens. It shares the
fixed rollouts with the code under test, and nothing else.
"""

import common
import vold

import pytest
import torch
from conftest import distance, layout_gradients
from exact import read
from gradients import CORRECT, fixed_rows, stale
from gradients_vold import STEP, TAGGED, samples_of

DEFAULTS = {
    "mask": "response",
    "estimator": "k2",
    "kl_tokens": "mean",
    "ratio": "token",
    "beta": 0.5,
    "beta_decay": 0.0,
    "beta_min": 0.0,
    "updates": 1,
    "stage": "rl",
}
SETTINGS = {
    "masked": {},
    "not masked": {"mask": "none"},
    "masked by group": {"mask": "group"},
    "GRPO alone": {"beta": 0.0},
    "k1": {"estimator": "k1", "mask": "none"},
    "k3": {"estimator": "k3"},
    "sum over tokens": {"kl_tokens": "sum"},
    "a falling beta": {"beta_decay": 0.1},
    "beta's lowest value": {"beta_decay": 0.1, "beta_min": 0.35},
    "later update": {"updates": 2},
    "ratio of the response, later update": {"ratio": "sequence", "updates": 2},
    "sft": {"stage": "sft"},
}


@pytest.fixture(scope="module")
def world(tiny):
    """The student's and the teacher's processors, the samples, the student and the teacher."""
    student, teacher = (common.Processor(str(tiny / name)) for name in ("student", "tagged"))
    samples = samples_of(student, fixed_rows(tiny, student))
    models = [common.Model(str(tiny / name), torch.float64).lm for name in ("student", "tagged")]
    return student, teacher, samples, *models


@pytest.fixture(scope="module")
def results(tiny, tmp_path_factory):
    layouts = [([8], 500, 7, "vold", DEFAULTS | changes) for changes in SETTINGS.values()]
    folder = tmp_path_factory.mktemp("exact")
    return dict(zip(SETTINGS, layout_gradients(tiny, folder, layouts, dtype="float64")))


def spans(pieces):
    """First character and the one behind the last, for each token of a text."""
    ends = [sum(map(len, pieces[: i + 1])) for i in range(len(pieces))]
    return list(zip([0, *ends], ends))


def teacher_log_probs(world, i, sample):
    """The teacher's log-prob of every token of the response, None for the pieces of a tag."""
    student, teacher, _, _, model = world
    prompt = teacher.encode(vold.question(sample.row, vold.Args()))
    ids = sample.response.ids
    if i != 1:
        q = read(model, prompt, ids, None, teacher.vocab)
        return list(q[range(len(ids)), ids].log())
    theirs = teacher.tokenizer(TAGGED)["input_ids"]
    q = read(model, prompt, theirs, None, teacher.vocab)[range(len(theirs)), theirs].log()
    pieces = teacher.tokenizer.convert_ids_to_tokens(theirs)
    place = {span: j for j, span in enumerate(spans(pieces))}
    tags = []
    for tag in ("<think>", "</think>"):
        tags.append((TAGGED.index(tag), TAGGED.index(tag) + len(tag)))
    found = []
    for start, end in spans(student.tokenizer.convert_ids_to_tokens(ids)):
        in_tag = any(start < tag[1] and end > tag[0] for tag in tags)
        found.append(None if in_tag else q[place[start, end]])
    return found


def probabilities(world, sample):
    """The student's of the sampled tokens, [T], with a graph to it."""
    student, _, _, model, _ = world
    ids = sample.response.ids
    p = read(model, sample.prompts["question"], ids, student.image_id, student.vocab)
    return p[range(len(ids)), ids]


def estimate(d, estimator):
    return {"k1": d, "k2": d**2 / 2, "k3": (-d).exp() - 1 + d}[estimator]


def loss(world, changes):
    """Eq. 4, or Eq. 5 and 6, from the definitions, with a graph to the student."""
    o, samples = DEFAULTS | changes, world[2]
    if o["stage"] == "sft":  # the mean over all tokens
        return -torch.cat([probabilities(world, s) for s in samples]).log().mean()
    policy, pull, tokens = [], [], 0
    for i, s in enumerate(samples):
        p, ids = probabilities(world, s), torch.tensor(s.response.ids)
        now = p.detach().log()
        old = stale(now, ids).exp() if o["updates"] > 1 else now.exp()
        ratio = (p / old).prod()[None] if o["ratio"] == "sequence" else p / old
        cut = ratio.clamp(0.8, 1.3) * s.advantage
        policy.append(torch.minimum(ratio * s.advantage, cut).sum())
        pair = i // 2 * 2
        of_group = CORRECT[pair] or CORRECT[pair + 1]
        masked = {"response": CORRECT[i], "none": False, "group": of_group}[o["mask"]]
        with torch.no_grad():
            q = teacher_log_probs(world, i, s)
        d = torch.stack([p[t].log() - q[t] for t in range(len(ids)) if q[t] is not None])
        pull.append((not masked) * estimate(d, o["estimator"]).sum())
        tokens += len(ids)
    beta = max(o["beta"] - (STEP - 1) * o["beta_decay"], o["beta_min"])
    j = sum(policy) / (8 if o["ratio"] == "sequence" else tokens)
    return -j + beta * sum(pull) / (tokens if o["kl_tokens"] == "mean" else 8)


@pytest.mark.parametrize("name", SETTINGS)
def test_whole_update(world, results, name):
    trained = {key: p for key, p in world[3].named_parameters() if ".visual." not in key}
    gradients = torch.autograd.grad(loss(world, SETTINGS[name]), list(trained.values()))
    expected = dict(zip([f"lm.{key}" for key in trained], gradients))
    found = results[name]["gradient"]
    assert set(found) == set(expected)  # the frozen vision tower has none
    error = distance(found, expected)
    print(f"{name}: {error:.2e}")
    assert error < 1e-6


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "sft"])
def test_shares_are_of_the_two_parts(results, name):
    share = results[name]["share"]
    grpo, distillation = share["grad_norm_grpo"], share["grad_norm_distillation"]
    assert grpo > 0 and (distillation > 0) == (name != "GRPO alone")
    assert share["distillation_share"] == pytest.approx(distillation / (grpo + distillation))
