"""World size, micro-batches and chunks change nothing: gradients on fixed rollouts agree to 1e-6 in float32.

That the gradient is the right one: test_*_exact.py, in float64. What float32 itself costs: the third test here.
"""

import json

import pytest
from conftest import distance, flags, layout_gradients, run_script

WHOLE = 100_000  # a chunk that holds every token, a micro-batch that holds every sequence
SOME = 500  # tokens of a micro-batch: one to five sequences
MIXED = ("vgs", {"alpha": 0.3})


def layout(shares: list, micro: int, chunk: int, method: str = "vgs", settings=MIXED[1]) -> tuple:
    return (shares, micro, chunk, method, settings)


ONE = [layout([8], WHOLE, WHOLE), layout([8], 1, WHOLE), layout([8], SOME, WHOLE)]
ONE += [layout([8], WHOLE, 1), layout([8], WHOLE, 7), layout([8], 1, 7)]
TWO = [layout([4, 4], WHOLE, WHOLE), layout([5, 3], SOME, 7), layout([7, 1], SOME, WHOLE)]
TWO += [layout([8, 0], SOME, 7), layout([0, 8], WHOLE, 1)]
COPIES = layout([5, 3], SOME, 7, "vgs", MIXED[1] | {"replicas": 2})  # a whole model on each rank
OTHER = [
    ("vgs", {"gamma": 0.0, "lambda_lp": 0.0}),  # one context instead of two
    ("vgs", {"steer": "adaptive"}),  # two percentiles, and eta measured on both ranks
    ("vgs", {"steer": "language"}),
    ("ptdpo", {"lambda_ptd": 0.5, "kl": 0.1}),  # a tutor for some of the tokens
    ("ptdpo", {"lambda_ptd": 0.5, "optimizer": "gspo", "updates": 2}),  # ratios of whole responses
    ("ptdpo", {"lambda_ptd": 0.5, "blind_tutor": True}),
    ("vold", {"beta": 0.5}),
    ("vold", {"stage": "sft"}),
    ("vold", {"beta": 0.5, "kl_tokens": "sum", "ratio": "sequence", "updates": 2}),
    ("vigos", {"clip": 0.5}),
    ("vigos", {"method": "opsd"}),
    ("vigos", {"lora": 4}),
    ("reopold", {"progress": 0.9, "updates": 2}),
    ("reopold", {"updates": 2, "calls": 2}),
    ("reopold", {"method": "gkd-top"}),
]
# Something on both ranks, so that divisors differ; and of each method once nothing on the second.
SHARED = [([5, 3], other) for other in OTHER]
SHARED += [([8, 0], OTHER[i]) for i in (0, 3, 6, 9, 13)]


@pytest.fixture(scope="module")
def gradients(tiny, tmp_path_factory):
    """By layout: one process for all layouts of one rank, one start for all layouts of two."""
    one = ONE + [layout([8], SOME, 7, *other) for other in OTHER]
    two = [*TWO, COPIES]
    two += [layout(shares, SOME, 7, *other) for shares, other in SHARED]
    found = {}
    for layouts in (one, two):
        results = layout_gradients(tiny, tmp_path_factory.mktemp("gradients"), layouts)
        found |= {str(of): result for of, result in zip(layouts, results)}
    return found


@pytest.mark.parametrize("other", [*ONE[1:], *TWO, COPIES], ids=str)
def test_gradients_do_not_depend_on_the_layout(gradients, other):
    reference, got = gradients[str(ONE[0])], gradients[str(other)]
    assert all(g.any() for g in reference["gradient"].values()), "every parameter is trained"
    assert distance(got["gradient"], reference["gradient"]) < 1e-6
    assert got["norm"] == pytest.approx(reference["norm"], rel=1e-5)


@pytest.mark.parametrize("shares, other", SHARED, ids=str)
def test_the_other_shapes_of_batch_too(gradients, shares, other):
    """Also what is measured and logged: eta, shares, means over the tokens, the size of F."""
    one = gradients[str(layout([8], SOME, 7, *other))]
    two = gradients[str(layout(shares, SOME, 7, *other))]
    assert distance(two["gradient"], one["gradient"]) < 1e-6
    assert set(two) == set(one)
    for key in set(one) - {"gradient", "adapters"}:
        assert two[key] == near(one[key]), key
    if other[0] == "ptdpo":
        assert one["tutored"] > 0


def near(value):
    """What rounding allows of a number, of numbers by name, or of None."""
    if isinstance(value, dict):
        return {key: near(x) for key, x in value.items()}
    return None if value is None else pytest.approx(value, rel=1e-5, abs=1e-7)


@pytest.mark.slow
def test_float32_has_the_gradient_of_float64(gradients, tiny, tmp_path):
    others = [layout([8], SOME, 7, *other) for other in OTHER]
    for of, exact in zip(others, layout_gradients(tiny, tmp_path, others, dtype="float64")):
        assert distance(gradients[str(of)]["gradient"], exact["gradient"]) < 4e-6, of


@pytest.mark.slow
def test_two_machines_have_the_gradient_of_one(gradients, tiny, tmp_path):
    """Two torchrun agents that meet on a port of localhost, with one rank each."""
    (found,) = layout_gradients(tiny, tmp_path, [layout([5, 3], SOME, 7)], machines=2)
    assert distance(found["gradient"], gradients[str(ONE[0])]["gradient"]) < 1e-6


def test_two_ranks_train_as_one_does(tiny, tmp_path):
    """The real script, three steps: the same questions, the same sampled tokens, the same losses."""
    runs = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        argv = flags(tiny, folder, max_steps=3)
        result = run_script("vgs.py", *argv, ranks=ranks if ranks > 1 else 0)
        assert result.returncode == 0, result.stderr
        runs.append((read(folder / "samples.jsonl"), read(folder / "metrics.jsonl")))
    (samples, metrics), (half, again) = runs
    tokens = {(s["step"], s["row"]): s["ids"] for s in samples}
    assert len(half) == 6  # the first rank logs its own
    assert all(s["ids"] == tokens[s["step"], s["row"]] for s in half)
    for one, two in zip(metrics, again, strict=True):
        assert two == {key: pytest.approx(x, rel=1e-4, abs=1e-5) for key, x in one.items()}


def read(file) -> list[dict]:
    """Without the seconds."""
    records = [json.loads(line) for line in file.read_text().splitlines()]
    return [{key: x for key, x in record.items() if "seconds" not in key} for record in records]
