"""World size, micro-batch size and chunk size change nothing: gradients on fixed rollouts agree to 1e-6 relative in float32.

That the gradient is the right one: test_*_exact.py, in float64. What float32 itself costs: the last test of gradients here.
"""

import json

import pytest
from conftest import distance, flags, layout_gradients, run_script

WHOLE = 100_000  # a chunk that holds every token, a micro-batch that holds every sequence
SOME = 500  # tokens of a micro-batch: one to five sequences
MIXED = ("vgs", {"method": "vgs-lp", "alpha": 0.3})
ONE = [([8], micro, chunk, *MIXED) for micro, chunk in ((WHOLE, WHOLE), (1, WHOLE), (SOME, WHOLE), (WHOLE, 1), (WHOLE, 7), (1, 7))]
TWO = [(shares, micro, chunk, *MIXED)
       for shares, micro, chunk in (([4, 4], WHOLE, WHOLE), ([5, 3], SOME, 7), ([7, 1], SOME, WHOLE), ([8, 0], SOME, 7), ([0, 8], WHOLE, 1))]
# one context instead of two; two percentiles, and eta measured on both ranks; a tutor for some of the tokens, ratios of whole responses
OTHER = [("vgs", {"method": "standard"}), ("vgs", {"method": "adaptive"}), ("ptdpo", {"lambda_ptd": 0.5, "kl": 0.1}),
         ("ptdpo", {"lambda_ptd": 0.5, "optimizer": "gspo", "updates": 2}),
         ("ptdpo", {"lambda_ptd": 0.5, "blind_tutor": True}), ("vold", {"beta": 0.5}), ("vold", {"stage": "sft"}),
         ("vold", {"beta": 0.5, "kl_tokens": "sum", "ratio": "sequence", "updates": 2}),
         ("vigos", {"clip": 0.5}), ("vigos", {"method": "opsd"}), ("vigos", {"lora": 4}),
         ("reopold", {"progress": 0.9, "updates": 2}), ("reopold", {"updates": 2, "calls": 2}), ("reopold", {"method": "gkd-top"})]
SHARES = [([8, 0], [5, 3])[i % 2] for i in range(len(OTHER))]  # in turn: nothing on the second rank, and something on both, so that divisors differ


COPIES = ([5, 3], SOME, 7, "vgs", MIXED[1] | {"replicas": 2})  # a whole model on each rank


@pytest.fixture(scope="module")
def gradients(tiny, tmp_path_factory):
    """By layout: one process for all layouts of one rank, one torchrun for all layouts of two."""
    one, two = ONE + [([8], SOME, 7, *other) for other in OTHER], TWO + [COPIES] + [(shares, SOME, 7, *other) for shares, other in zip(SHARES, OTHER)]
    found = {}
    for layouts in (one, two):
        results = layout_gradients(tiny, tmp_path_factory.mktemp("gradients"), layouts)
        found |= {str(layout): result for layout, result in zip(layouts, results)}
    return found


@pytest.mark.parametrize("layout", [*ONE[1:], *TWO, COPIES], ids=str)
def test_gradients_do_not_depend_on_the_layout(gradients, layout):
    reference, got = gradients[str(ONE[0])], gradients[str(layout)]
    assert all(g.any() for g in reference["gradient"].values()), "every parameter is trained"
    assert distance(got["gradient"], reference["gradient"]) < 1e-6
    assert got["norm"] == pytest.approx(reference["norm"], rel=1e-5)


@pytest.mark.parametrize("shares, other", list(zip(SHARES, OTHER)), ids=str)
def test_the_other_shapes_of_batch_too(gradients, shares, other):
    one, two = gradients[str(([8], SOME, 7, *other))], gradients[str((shares, SOME, 7, *other))]
    assert distance(two["gradient"], one["gradient"]) < 1e-6
    if other[0] == "ptdpo":
        assert two["tutored"] == one["tutored"] > 0  # |F|
    elif "stage" in other[1]:
        assert two["tokens"] == one["tokens"] > 0
    elif other[0] == "vold":
        assert two["share"] == pytest.approx(one["share"], rel=1e-5) and two["log"] == pytest.approx(one["log"], rel=1e-5)
    elif other[0] in ("vigos", "reopold"):
        assert two.get("kept") == one.get("kept") and set(two["log"]) == set(one["log"])
        assert all(two["log"][key] == pytest.approx(value, rel=1e-5) for key, value in one["log"].items())
    else:
        assert two["eta"] == (None if other[1]["method"] == "standard" else pytest.approx(one["eta"], rel=1e-5))


def test_float32_has_the_gradient_of_float64(gradients, tiny, tmp_path):
    others = [([8], SOME, 7, *other) for other in OTHER]
    for layout, exact in zip(others, layout_gradients(tiny, tmp_path, others, dtype="float64")):
        assert distance(gradients[str(layout)]["gradient"], exact["gradient"]) < 4e-6, layout


def test_two_machines_have_the_gradient_of_one(gradients, tiny, tmp_path):
    """Two torchrun agents that meet on a port of localhost, with one rank each."""
    (found,) = layout_gradients(tiny, tmp_path, [([5, 3], SOME, 7, *MIXED)], machines=2)
    assert distance(found["gradient"], gradients[str(ONE[0])]["gradient"]) < 1e-6


def test_two_ranks_train_as_one_does(tiny, tmp_path):
    """The real script, three steps: the same questions, the same sampled tokens, the same losses."""
    runs = []
    for ranks in (1, 2):
        result = run_script("vgs.py", *flags(tiny, tmp_path / str(ranks), max_steps=3), torchrun=ranks if ranks > 1 else 0)
        assert result.returncode == 0, result.stderr
        runs.append([[json.loads(line) for line in (tmp_path / str(ranks) / file).read_text().splitlines()] for file in ("samples.jsonl", "metrics.jsonl")])
    (samples, metrics), (first, again) = runs
    tokens = {(s["step"], s["row"]): s["ids"] for s in samples}
    assert len(first) == 6 and all(s["ids"] == tokens[s["step"], s["row"]] for s in first)  # the first rank logs its half
    for one, two in zip(metrics, again):
        assert {k: pytest.approx(v, rel=1e-4, abs=1e-5) for k, v in one.items() if "seconds" not in k} == {k: v for k, v in two.items() if "seconds" not in k}
