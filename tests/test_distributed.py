"""World size, micro-batch size and chunk size change nothing: gradients on fixed rollouts agree to 1e-6 relative in float32."""

import pytest
from conftest import distance, layout_gradient


@pytest.fixture(scope="module")
def reference(tiny, tmp_path_factory):
    return layout_gradient(tiny, tmp_path_factory.mktemp("reference"), "8", 8, 100000, "vgs-lp", 0.3)


@pytest.mark.parametrize("shares, micro, chunk", [
    ("8", 1, 100000), ("8", 3, 100000), ("8", 8, 1), ("8", 8, 7), ("8", 1, 7),
    ("4,4", 8, 100000), ("5,3", 3, 7), ("7,1", 3, 100000), ("8,0", 3, 7), ("0,8", 8, 1),
])
def test_gradients_do_not_depend_on_the_layout(tiny, tmp_path, reference, shares, micro, chunk):
    got = layout_gradient(tiny, tmp_path, shares, micro, chunk, "vgs-lp", 0.3)
    assert all(g.any() for g in reference["gradient"].values()), "every parameter is trained"
    assert distance(got["gradient"], reference["gradient"]) < 1e-6
    assert got["norm"] == pytest.approx(reference["norm"], rel=1e-5)


@pytest.mark.parametrize("method", ["standard", "adaptive"])
def test_the_other_shapes_of_batch_too(tiny, tmp_path, method):
    """Standard reads one context instead of two; adaptive needs two percentiles, and measures eta on both ranks."""
    one, two = (layout_gradient(tiny, tmp_path, shares, 3, 7, method, 1.0) for shares in ("8", "8,0"))
    assert distance(two["gradient"], one["gradient"]) < 1e-6
    assert two["eta"] == (one["eta"] if method == "standard" else pytest.approx(one["eta"], rel=1e-5))
