"""The gradient of a whole VOLD update against an independent float64 computation of Eq. 2, 3, 5 and 6, and of Eq. 4 in stage 1.

The reference reads every sequence alone, and the teacher reads the response's text in its own tokens. It shares the fixed rollouts with
the code under test, and nothing else.
"""

import pytest
import torch
from conftest import distance, layout_gradients
from exact import read
from gradients import CORRECT, TAGGED, fixed_samples, stale

import common
import vold

SETTINGS = {
    "masked": {},
    "not masked": {"mask": "none"},
    "masked by group": {"mask": "group"},
    "GRPO alone": {"beta": 0.0},
    "k1": {"estimator": "k1", "mask": "none"},
    "k3": {"estimator": "k3"},
    "sum over tokens": {"kl_tokens": "sum"},
    "a falling beta": {"beta_decay": 0.1, "beta_min": 0.35},
    "later update": {"updates": 2},
    "ratio of the response, later update": {"ratio": "sequence", "updates": 2},
    "stage 1": {"stage": "sft"},
}
BASE = {"beta": 0.5}


@pytest.fixture(scope="module")
def world(tiny):
    student, teacher = (common.Processor(str(tiny / name)) for name in ("student", "tagged"))
    rows = common.Rows(str(tiny / "rows.parquet"), "train", {"problem": "problem"})
    return student, teacher, rows, *(common.Model(str(tiny / name), torch.float64).lm for name in ("student", "tagged"))


@pytest.fixture(scope="module")
def results(tiny, tmp_path_factory):
    layouts = [([8], 500, 7, "vold", BASE | settings) for settings in SETTINGS.values()]
    return dict(zip(SETTINGS, layout_gradients(tiny, tmp_path_factory.mktemp("exact"), layouts, dtype="float64")))


def log_q(world, i, sample, args):
    """The teacher's log-prob of every token of the response, None for the pieces of a tag."""
    _, processor, _, _, teacher = world
    prompt = processor.encode(vold.question(sample.row, args))
    ids = sample.response.ids
    if i != 1:
        q = read(teacher, prompt, ids, None, processor.vocab)
        return list(q[range(len(ids)), ids].log())
    theirs = processor.tokenizer(TAGGED)["input_ids"]
    q = read(teacher, prompt, theirs, None, processor.vocab)[range(len(theirs)), theirs].log()
    place = {span: j for j, span in enumerate(spans(processor.tokenizer.convert_ids_to_tokens(theirs)))}
    tags = [(TAGGED.index(tag), TAGGED.index(tag) + len(tag)) for tag in ("<think>", "</think>")]
    return [None if any(start < tag[1] and end > tag[0] for tag in tags) else q[place[start, end]]
            for start, end in spans(world[0].tokenizer.convert_ids_to_tokens(ids))]


def spans(pieces):
    """First character and the one behind the last, for each token of a text."""
    ends = [sum(map(len, pieces[: i + 1])) for i in range(len(pieces))]
    return list(zip([0, *ends], ends))


def loss(world, settings):
    """Eq. 5, 6 from the definitions, with a graph to the student."""
    student, _, rows, model, _ = world
    o = {"mask": "response", "estimator": "k2", "kl_tokens": "mean", "ratio": "token", "beta_decay": 0, "beta_min": 0} | BASE | settings
    args = vold.Args(**BASE | settings)
    if "stage" in o:  # Eq. 4: the mean over all tokens
        samples = fixed_samples(student, rows, 8, "vold", BASE | settings)
        each = [read(model, s.prompts["question"], s.response.ids, student.image_id, student.vocab)[range(len(s.response.ids)), s.response.ids] for s in samples]
        return -torch.cat(each).log().mean()
    beta = max(o["beta"] - 2 * o["beta_decay"], o["beta_min"])  # step 3
    policy, pull, tokens = [], [], 0
    for i, s in enumerate(fixed_samples(student, rows, 8, "vold", BASE | settings)):
        ids = torch.tensor(s.response.ids)
        p = read(model, s.prompts["question"], s.response.ids, student.image_id, student.vocab)[range(len(ids)), ids]
        old = stale(p.detach().log(), ids).exp() if o.get("updates") else p.detach()
        ratio = (p / old).prod()[None] if o["ratio"] == "sequence" else p / old
        policy.append(torch.minimum(ratio * s.advantage, ratio.clamp(0.8, 1.3) * s.advantage))
        pair = i // 2 * 2
        masked = {"response": CORRECT[i], "none": False, "group": CORRECT[pair] or CORRECT[pair + 1]}[o["mask"]]
        with torch.no_grad():
            q = log_q(world, i, s, args)
        d = [p[t].log() - q[t] for t in range(len(ids)) if q[t] is not None]
        d = {"k1": lambda x: x, "k2": lambda x: x**2 / 2, "k3": lambda x: (-x).exp() - 1 + x}[o["estimator"]](torch.stack(d))
        pull.append((not masked) * d.sum())
        tokens += len(ids)
    j = sum(x.sum() for x in policy) / (8 if o["ratio"] == "sequence" else tokens)
    return -j + beta * sum(pull) / (tokens if o["kl_tokens"] == "mean" else 8)


@pytest.mark.parametrize("name", SETTINGS)
def test_whole_update(world, results, name):
    model = world[3]
    trained = {key: p for key, p in model.named_parameters() if ".visual." not in key}
    expected = dict(zip([f"lm.{key}" for key in trained], torch.autograd.grad(loss(world, SETTINGS[name]), list(trained.values()))))
    assert set(results[name]["gradient"]) == set(expected)  # the frozen vision tower has none
    assert distance(results[name]["gradient"], expected) < 1e-6
    if name == "stage 1":
        return
    share = results[name]["share"]
    assert (share["grad_norm_distillation"] > 0) == (name != "GRPO alone") and share["grad_norm_grpo"] > 0
