"""Batches that a long run meets once: one token, one response, all right, all wrong, out of form, cut off.

Each for the methods that can tell it from any other batch. A rank with nothing: test_distributed.py.
"""

import importlib

import common

import gradients
import pytest
import torch

SETTINGS = {
    "vgs": {"alpha": 0.3},
    "ptdpo": {"lambda_ptd": 0.5, "kl": 0.0},
    "vold": {"stage": "rl", "beta": 0.5},
    "vigos": {"mark_end": True},
    "reopold": {"progress": 0.0, "updates": 2},
}
CASES = [(method, how) for method in SETTINGS for how in ("one token", "one response", "one group")]
CASES += [
    ("vgs", "all right"),
    ("ptdpo", "all right"),
    ("ptdpo", "all wrong"),
    ("vold", "all right"),
]
CASES += [
    ("vold", "all wrong"),
    ("reopold", "all right"),
    ("vigos", "out of form"),
    ("vigos", "cut off"),
]
# Nobody to correct, and no advantage.
NOTHING = [("ptdpo", "all right"), ("vold", "all right"), ("reopold", "all right")]


def odd(how: str, samples: list) -> list:
    """Eight samples in groups of two, made odd."""
    for i, s in enumerate(samples):
        ids, log_probs = s.response.ids, s.response.log_probs
        if how == "one token":
            s.response = common.Response(ids[:1], log_probs=log_probs[:1])
        if how in ("all right", "all wrong"):
            s.advantage = 0.0
        if how == "out of form":
            s.response = common.Response([7 + i] * len(ids), log_probs=log_probs)
        if how == "cut off":
            s.response = common.Response(ids[:-1], finished=False, log_probs=log_probs[:-1])
    return samples[: {"one response": 1, "one group": 2}.get(how, 8)]


@pytest.fixture(scope="module")
def batch(tiny):
    """fn(method, how) -> what gradients.py finds for an odd batch."""
    common.start_ranks(common.Args())
    processor = common.Processor(f"{tiny}/student")
    rows = gradients.fixed_rows(tiny, processor)

    def run(method: str, how: str) -> dict:
        worker = importlib.import_module(f"gradients_{method}")
        correct = {"all right": [True] * 8, "all wrong": [False] * 8}.get(how, gradients.CORRECT)
        fixed = gradients.fixed_samples
        with pytest.MonkeyPatch.context() as p:
            for module in (gradients, worker):
                p.setattr(module, "CORRECT", correct, raising=False)
            p.setattr(worker, "fixed_samples", lambda *args, **more: odd(how, fixed(*args, **more)))
            settings = SETTINGS[method]
            if (method, how) == ("reopold", "all right"):
                settings = {"method": "grpo"}  # its other objectives have no rewards
            shares = [{"one response": 1, "one group": 2}.get(how, 8)]
            return worker.gradient(
                tiny, processor, rows, shares, 500, 7, settings | {"dtype": "float32"}
            )

    yield run
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("method, how", CASES)
def test_odd_batches_are_finite_and_as_the_formulas_say(batch, method, how):
    found = batch(method, how)
    assert all(g.isfinite().all() for g in found["gradient"].values())
    size = max((g.abs().max().item() for g in found["gradient"].values()), default=0.0)
    assert (size == 0) == ((method, how) in NOTHING), size
    for x in found.get("log", {}).values():
        for value in x if isinstance(x, list) else [x]:
            assert value == value and abs(value) < float("inf"), found["log"]
