"""World size, micro-batch size and chunk size change nothing: gradients on fixed rollouts agree to 1e-6 relative in float32."""

import pytest
import torch
from conftest import run_script


def gradient(tiny, tmp_path, shares, micro, chunk, method):
    out = tmp_path / f"{shares}-{micro}-{chunk}-{method}.pt"
    ranks = len(shares.split(","))
    result = run_script("tests/gradients.py", tiny, out, shares, micro, chunk, method, torchrun=ranks if ranks > 1 else 0)
    assert result.returncode == 0, result.stderr
    return torch.load(out)


def distance(a, b) -> float:
    difference = sum((a[name] - b[name]).double().square().sum() for name in b if name != "norm")
    return (difference / sum(b[name].double().square().sum() for name in b if name != "norm")).sqrt().item()


@pytest.fixture(scope="module")
def reference(tiny, tmp_path_factory):
    return gradient(tiny, tmp_path_factory.mktemp("reference"), "8", 8, 100000, "vgs-lp")


@pytest.mark.parametrize("shares, micro, chunk", [
    ("8", 1, 100000), ("8", 3, 100000), ("8", 8, 1), ("8", 8, 7), ("8", 1, 7),
    ("4,4", 8, 100000), ("5,3", 3, 7), ("7,1", 3, 100000), ("8,0", 3, 7), ("0,8", 8, 1),
])
def test_gradients_do_not_depend_on_the_layout(tiny, tmp_path, reference, shares, micro, chunk):
    got = gradient(tiny, tmp_path, shares, micro, chunk, "vgs-lp")
    assert reference["norm"] > 1e-3 and all(name == "norm" or g.any() for name, g in reference.items()), "every parameter is trained"
    assert distance(got, reference) < 1e-6
    assert got["norm"].item() == pytest.approx(reference["norm"].item(), rel=1e-5)


@pytest.mark.parametrize("method", ["standard", "adaptive"])
def test_the_other_shapes_of_batch_too(tiny, tmp_path, method):
    """Standard reads one context instead of two; adaptive needs two percentiles."""
    one, two = (gradient(tiny, tmp_path, shares, 3, 7, method) for shares in ("8", "8,0"))
    assert distance(two, one) < 1e-6
