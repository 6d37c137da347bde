"""Batches that a long run meets once: a single token, a single response, all right, all wrong, all out of form, all cut off.

Each for the methods that can tell it from any other batch. A rank with nothing beside one with all: test_distributed.py.
"""

import gradients
import pytest
import torch

import common
import vgs

SETTINGS = {
    "vgs": {"method": "vgs-lp", "alpha": 0.3}, "ptdpo": {"lambda_ptd": 0.5, "kl": 0.0}, "vold": {"beta": 0.5}, "vigos": {"mark_end": True},
    "reopold": {"progress": 0.0, "updates": 2},
}
CASES = [(method, how) for method in SETTINGS for how in ("one token", "one response", "one group")]
CASES += [("vgs", "all right"), ("ptdpo", "all right"), ("ptdpo", "all wrong"), ("vold", "all right"), ("vold", "all wrong"), ("reopold", "all right"),
          ("vigos", "out of form"), ("vigos", "cut off")]
NOTHING = [("ptdpo", "all right"), ("vold", "all right"), ("reopold", "all right")]  # nobody to correct, and no advantage


def odd(how: str, samples: list) -> list:
    """Eight samples in groups of two, made odd."""
    for i, s in enumerate(samples):
        if how == "one token":
            s.response.ids, s.response.log_probs = s.response.ids[:1], s.response.log_probs[:1]
        if how in ("all right", "all wrong"):
            s.advantage = 0.0
        if how == "out of form":
            s.response.ids = [7 + i] * len(s.response.ids)
        if how == "cut off":
            s.response.finished, s.response.ids, s.response.log_probs = False, s.response.ids[:-1], s.response.log_probs[:-1]
    return samples[: {"one response": 1, "one group": 2}.get(how, 8)]


@pytest.fixture(scope="module")
def batch(tiny):
    """fn(method, how) -> what gradients.py finds for an odd batch; models are loaded once a method."""
    common.start_distributed(vgs.Args())
    processor, rows = common.Processor(f"{tiny}/student"), common.Rows(f"{tiny}/rows.parquet", "train", {"problem": "problem"})
    models, load, fixed, correct = {}, common.load_models, gradients.fixed_samples, gradients.CORRECT

    def run(method: str, how: str) -> dict:
        def load_once(args, processor, teacher, updates):
            key = (method, args.student, teacher)
            if key not in models or method in ("ptdpo", "vigos"):  # whose students move away from the initial model there
                models[key] = load(args, processor, teacher, updates)
            models[key].student.zero_grad()
            return models[key]

        common.load_models = load_once
        gradients.CORRECT = {"all right": [True] * 8, "all wrong": [False] * 8}.get(how, correct)
        gradients.fixed_samples = lambda *args: odd(how, fixed(*args))
        function = getattr(gradients, f"{method}_gradient")
        settings = {"method": "grpo"} if (method, how) == ("reopold", "all right") else SETTINGS[method]  # its other objectives have no rewards
        return function(tiny, processor, rows, [8], 500, 7, settings | {"dtype": "float32"})

    yield run
    common.load_models, gradients.fixed_samples, gradients.CORRECT = load, fixed, correct
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("method, how", CASES)
def test_odd_batches_are_finite_and_as_the_formulas_say(batch, method, how):
    found = batch(method, how)
    assert all(g.isfinite().all() for g in found["gradient"].values())
    size = max((g.abs().max().item() for g in found["gradient"].values()), default=0.0)
    assert (size == 0) == ((method, how) in NOTHING), size
    for value in (v for x in found.get("log", {}).values() for v in (x if isinstance(x, list) else [x])):
        assert value == value and abs(value) < float("inf"), found["log"]
