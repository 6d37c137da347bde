"""Losses of half-precision inputs, as whoever copies a loss into other code has them, with Qwen's vocabulary.

Each against itself in float64, of the same numbers. Student and teacher are close, as they are while one learns from
the other: there a divergence is a small difference, of which bfloat16 leaves neither size nor sign.
"""

import common
import ptdpo
import reopold
import vgs
import vigos
import vold
from kernels import topk_tail_divergence
from tools import figures

import pytest
import torch

VOCAB, TOKENS = 151_936, 6


def make_inputs() -> dict[str, torch.Tensor]:
    """Logits [N, V] z, z2 (student), y, y2 (teacher); p, q: their log-probs [N, V]; chosen, other: of ids, [N]."""
    generator = torch.Generator().manual_seed(0)
    z = 3 * torch.randn(TOKENS, VOCAB, generator=generator)
    found = {"z": z}
    for name in ("z2", "y", "y2"):
        found[name] = z + 0.05 * torch.randn(TOKENS, VOCAB, generator=generator)
    found["p"], found["q"] = z.log_softmax(-1), found["y"].log_softmax(-1)
    found["chosen"] = common.gather(found["p"], ids)
    found["other"] = common.gather(found["q"], ids)
    found["advantage"] = torch.randn(TOKENS, generator=generator)
    return found


ids = torch.arange(TOKENS)
answers = torch.tensor([0, 0, 0, 1, 1, 1])


def reopold_terms(method):
    def loss(z, y, other, advantage):
        teacher = [y] if method in reopold.FULL else []
        args = reopold.Args(method=method)
        return reopold.terms(z, *teacher, ids, None, other, advantage, args=args)

    return loss, "z y other advantage"


def vigos_terms(divergence):
    args = vigos.Args(divergence=divergence, clip=0.0)
    return lambda z, y: vigos.terms(z, y, ids, args), "z y"


def clipped(log_p, old, advantage):
    return common.clipped_surrogate(log_p, old, advantage, 0.2, 0.2)


LOSSES = {
    "common.log_softmax": (common.log_softmax, "z"),
    "common.kl": (common.kl, "p q"),
    "common.entropy": (common.entropy, "p"),
    "common.clipped_surrogate": (clipped, "chosen other advantage"),
    "common.k3": (common.k3, "chosen other"),
    "common.sequence_old": (lambda p, q: common.sequence_old(p, q, 1.0, answers), "chosen other"),
    "vgs.visual_target": (vgs.visual_target, "p q p"),
    "vgs.divergences": (vgs.divergences, "z z2 y y2"),
    "vgs.visual_dependency": (vgs.visual_dependency, "y y2"),
    "vgs.terms": (
        lambda z, z2, y, y2, a: vgs.terms(z, z2, y, y2, ids, None, a, args=vgs.Args()),
        "z z2 y y2 advantage",
    ),
    "vold.distance k1": (lambda p, q: vold.distance(p, q, "k1"), "chosen other"),
    "vold.distance k2": (lambda p, q: vold.distance(p, q, "k2"), "chosen other"),
    "vold.distance k3": (lambda p, q: vold.distance(p, q, "k3"), "chosen other"),
    "vold.terms": (
        lambda z, q, a: vold.terms(z, ids, None, q, a, vold.Args()),
        "z other advantage",
    ),
    "ptdpo.terms": (
        lambda z, y, q, a: ptdpo.terms(z, y, ids, None, q, a, args=ptdpo.Args()),
        "z y other advantage",
    ),
    "vigos.shares": (lambda p, q: vigos.shares(p, q).sum(-1), "p q"),
    "vigos.jsd": (lambda p, q: vigos.jsd(p, q).sum(-1), "p q"),
    "vigos.limited": (lambda p: vigos.limited(p, vigos.Args(clip=0.0)), "p"),
    "reopold.reward_of": (lambda p, q: reopold.reward_of(p, q, reopold.Args()), "chosen other"),
    "figures.shifts": (lambda z, y: figures.shifts(z, y, ids), "z y"),
}
for method in ("reopold", "skew", "gkd", "gkd-top", "sft", "grpo"):
    LOSSES[f"reopold.terms {method}"] = reopold_terms(method)
for divergence in ("forward_kl", "reverse_kl", "jsd", "top_k", "sampled"):
    LOSSES[f"vigos.terms {divergence}"] = vigos_terms(divergence)
for kind in ("jsd", "forward_kl", "reverse_kl"):
    LOSSES[f"topk_tail_divergence {kind}"] = (
        lambda z, y, kind=kind: topk_tail_divergence(z, y, 100, kind),
        "z y",
    )


@pytest.fixture(scope="module")
def inputs():
    return make_inputs()


def values_and_gradients(loss, tensors):
    leaves = [x.clone().requires_grad_() for x in tensors]
    values = loss(*leaves)
    values = values if isinstance(values, tuple) else (values,)
    total = sum(x.sum() for x in values if x.requires_grad)
    gradients = [None] * len(leaves)
    if total != 0:
        gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    return [x.detach() for x in values], gradients


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_summed_in_float32(name, dtype, inputs):
    """Values to 1e-2 of themselves, in float32; gradients, which are as wide as the inputs, to their rounding."""
    loss, names = LOSSES[name]
    narrow = [inputs[key].to(dtype) for key in names.split()]
    values, gradients = values_and_gradients(loss, narrow)
    expected, wanted = values_and_gradients(loss, [x.double() for x in narrow])
    for value, right in zip(values, expected):
        assert (value.dtype, right.dtype) == (torch.float32, torch.float64)
        torch.testing.assert_close(value.double(), right, rtol=1e-2, atol=3e-6)
    for gradient, right in zip(gradients, wanted):
        if right is not None and right.any():
            assert (gradient.double() - right).norm() < 1e-2 * right.norm()


@pytest.mark.parametrize("name", LOSSES)
def test_float32_stays_float32(name, inputs):
    loss, names = LOSSES[name]
    values, _ = values_and_gradients(loss, [inputs[key] for key in names.split()])
    assert {value.dtype for value in values} == {torch.float32}
