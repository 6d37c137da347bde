"""VGS's equations against float64 mathematics written from the paper (arXiv:2606.00564), values and gradients.

The references here are written with probabilities and explicit sums, and share no code with vgs.py.
"""

import math
import types

import pytest
import torch

import common
import vgs

N, V = 7, 13


@pytest.fixture
def logits():
    """Student and teacher logits with and without the image, float64; the student's carry gradient."""
    torch.manual_seed(0)
    zI, zL, yI, yL = (2 * torch.randn(N, V, dtype=torch.float64) for _ in range(4))
    return zI.requires_grad_(), zL.requires_grad_(), yI, yL


def softmax(z):
    e = (z - z.max(-1, keepdim=True).values).exp()
    return e / e.sum(-1, keepdim=True)


def reference_kl(a, b):
    """sum_v a log(a / b) from probabilities."""
    return (a * (a / b).log()).sum(-1)


def reference_target(pL, qI, qL):
    """q* from probabilities (Eq. 9, 10)."""
    q = pL * qI / qL
    return q / q.sum(-1, keepdim=True)


def test_eq_3_6_11_12_values(logits):
    pI, pL, qI, qL = (softmax(z) for z in logits)
    std, vis, lang, vds = vgs.divergences(*logits)
    torch.testing.assert_close(std, reference_kl(pI, qI), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(vis, reference_kl(pI, reference_target(pL, qI, qL)), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(lang, reference_kl(pL, qL), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(vds, reference_kl(qI, qL), rtol=1e-12, atol=1e-14)


def test_eq_3_6_11_gradients(logits):
    """d KL(p || q) / d z_v = p_v (log p_v/q_v - KL), with q* held constant."""
    zI, zL, _, _ = logits
    pI, pL, qI, qL = (softmax(z).detach() for z in logits)
    std, vis, lang, _ = vgs.divergences(*logits)
    for term, z, p, q in ((std, zI, pI, qI), (vis, zI, pI, reference_target(pL, qI, qL)), (lang, zL, pL, qL)):
        (gradient,) = torch.autograd.grad(term.sum(), z, retain_graph=True)
        expected = p * ((p / q).log() - reference_kl(p, q)[:, None])
        torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=1e-13)
        assert expected.abs().max() > 1e-3


def test_eq_10_no_gradient_through_the_students_prior(logits):
    zI, zL, _, _ = logits
    _, vis, _, vds = vgs.divergences(*logits)
    assert torch.autograd.grad(vis.sum(), zL, allow_unused=True)[0] is None
    assert not vds.requires_grad


def test_eq_13_one_kl_identity(logits):
    """Std + gamma Vis has the gradient of (1 + gamma) KL(pI || r), r proportional to qI (pL / qL)^(gamma / (1 + gamma))."""
    zI, zL, _, _ = logits
    pL, qI, qL = (softmax(z).detach() for z in logits[1:])
    for gamma in (0.5, 2.0, 7.0):
        std, vis, _, _ = vgs.divergences(*logits)
        r = qI * (pL / qL) ** (gamma / (1 + gamma))
        one = (1 + gamma) * reference_kl(softmax(zI), r / r.sum(-1, keepdim=True))
        ours, theirs = (torch.autograd.grad(x.sum(), zI)[0] for x in (std + gamma * vis, one))
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


def test_all_divergences_vanish_when_the_teacher_is_the_student():
    torch.manual_seed(1)
    z = torch.randn(N, V, dtype=torch.float64)
    w = torch.randn(N, V, dtype=torch.float64)
    std, vis, lang, vds = vgs.divergences(z, w, z, w)
    for term in (std, vis, lang):
        torch.testing.assert_close(term, torch.zeros(N, dtype=torch.float64), atol=1e-14, rtol=0)
    assert vds.min() > 0.01  # the image still matters to this teacher


def test_shift_invariance(logits):
    shifted = [z + c for z, c in zip(logits, (3.0, -50.0, 100.0, -7.0))]
    for ours, theirs in zip(vgs.divergences(*logits), vgs.divergences(*shifted)):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_padded_vocabulary_of_minus_infinity_equals_slicing(dtype):
    torch.manual_seed(2)
    whole = [torch.randn(N, V, dtype=dtype) for _ in range(4)]
    padded = [torch.cat([z, torch.full((N, 5), -math.inf, dtype=dtype)], -1) for z in whole]
    results = []
    for tensors in (whole, padded):
        tensors = [z.clone().requires_grad_(i < 2) for i, z in enumerate(tensors)]
        terms = vgs.divergences(*tensors)
        sum(t.sum() for t in terms).backward()
        results.append([*terms, tensors[0].grad[:, :V], tensors[1].grad[:, :V]])
        assert all(z.grad.isfinite().all() for z in tensors[:2])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-6 if dtype == torch.float32 else 1e-14)


def test_extreme_logits_stay_finite():
    z = [torch.tensor([[300.0, -300.0, 0.0], [0.0, 0.0, 0.0]]) for _ in range(4)]
    z[2] = -z[2]
    z[0].requires_grad_(), z[1].requires_grad_()
    terms = vgs.divergences(*z)
    sum(t.sum() for t in terms).backward()
    assert all(t.isfinite().all() for t in terms) and z[0].grad.isfinite().all() and z[1].grad.isfinite().all()


VDS = torch.tensor([0.1, 0.4, 0.5, 0.7, 0.9])
Q40, Q70 = torch.tensor(0.4), torch.tensor(0.7)


@pytest.mark.parametrize("method, std, vis, lang", [
    ("standard", [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]),
    ("vgs", [1, 1, 1, 1, 1], [2, 2, 2, 2, 2], [0, 0, 0, 0, 0]),  # Eq. 13
    ("vgs-lp", [1, 1, 1, 1, 1], [2, 2, 2, 2, 2], [0, 0, 0, 0, 0.3]),  # Eq. 16: strictly above Q0.7
    ("adaptive", [1, 1, 1, 1, 1], [0, 0, 1, 1, 2], [0, 0, 0, 0, 0.3]),  # Eq. 25: 0 up to Q0.4, gamma / 2 up to Q0.7, gamma above
    ("lang-steer", [1, 1, 1, 1, 1], [0, 0, 0, 0, 0.3], [2, 2, 2, 2, 2]),  # Eq. 19, 21
])
def test_eq_13_16_19_25_coefficients(method, std, vis, lang):
    got = vgs.steering(method, VDS, Q40, Q70, gamma=2.0, lam=0.3)
    torch.testing.assert_close(got, torch.tensor([std, vis, lang], dtype=torch.float32))


def test_gamma_and_lambda_zero_are_standard_exactly():
    standard = vgs.steering("standard", VDS, Q40, Q70, 0.0, 0.0)
    for method in ("vgs", "vgs-lp", "adaptive", "lang-steer"):
        assert torch.equal(vgs.steering(method, VDS, Q40, Q70, 0.0, 0.0), standard)


def micro(lengths, vds=None, advantage=0.0):
    """A micro-batch without sequences, for weigh alone."""
    n = sum(lengths)
    return vgs.Micro([], {}, 2, torch.zeros(n, dtype=torch.long), common.per_token(lengths, lengths), torch.zeros(n), torch.full((n,), advantage),
                     torch.zeros(n), vds=vds)


def test_eq_3_16_17_18_weights_are_response_means():
    """Two responses of 2 and 4 tokens: every token weighs 1 / (its length * 2); LP divides by the length, not by what it selects."""
    vds = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    q70 = 3.5  # linear interpolation at 0.7 * 5
    args = vgs.Args(method="vgs-lp", gamma=2.0, lambda_lp=0.1)
    m = micro([2, 4], vds)
    vgs.weigh([m], args, eta=0.5)
    mean = torch.tensor([1 / 4, 1 / 4, 1 / 8, 1 / 8, 1 / 8, 1 / 8])
    torch.testing.assert_close(m.weights, torch.stack([0.5 * mean, 0.5 * 2 * mean, 0.5 * 0.1 * mean * (vds > q70), *[0 * mean] * 4]))


def test_quantiles_and_divisors_span_the_micro_batches():
    vds = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    args = vgs.Args(method="adaptive", gamma=2.0, lambda_lp=0.1)
    together, apart = [micro([2, 4], vds)], [micro([2], vds[:2]), micro([], vds[:0]), micro([4], vds[2:])]
    vgs.weigh(together, args, 1.0)
    vgs.weigh(apart, args, 1.0)
    torch.testing.assert_close(together[0].weights, torch.cat([m.weights for m in apart], -1))


def test_eq_22_mixes_with_grpo():
    args = vgs.Args(method="vgs", gamma=2.0, alpha=0.3, group=2)
    m = micro([2, 4], advantage=1.0)
    vgs.weigh([m], args, eta=1.0)
    mean = torch.tensor([1 / 4, 1 / 4, 1 / 8, 1 / 8, 1 / 8, 1 / 8])
    torch.testing.assert_close(m.weights, torch.stack([0.3 * mean, 0.3 * 2 * mean, 0 * mean, -0.7 * mean, *[0 * mean] * 3]))
    grpo = micro([2, 4], advantage=1.0)
    vgs.weigh([grpo], vgs.Args(method="grpo", group=2), eta=1.0)
    torch.testing.assert_close(grpo.weights, torch.stack([0 * mean, 0 * mean, 0 * mean, -mean, *[0 * mean] * 3]))


def test_clipped_surrogate_and_its_gradient():
    """min(rho A, clip(rho) A): outside the clip range and on its far side the gradient is zero; inside it is rho A."""
    log_p = torch.tensor([0.0, 0.5, 0.5, -0.5, -0.5], dtype=torch.float64, requires_grad=True)
    old, advantage = torch.zeros(5, dtype=torch.float64), torch.tensor([2.0, 1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    value = common.clipped_surrogate(log_p, old, advantage, 0.2, 0.3)
    up, down = math.exp(0.5), math.exp(-0.5)
    torch.testing.assert_close(value, torch.tensor([2.0, 1.3, -up, down, -0.8], dtype=torch.float64))
    value.sum().backward()
    torch.testing.assert_close(log_p.grad, torch.tensor([2.0, 0.0, -up, down, 0.0], dtype=torch.float64))


def test_group_advantages():
    got = common.group_advantages(torch.tensor([1.0, 0, 0, 1, 1, 1, 1, 1]), 4)
    torch.testing.assert_close(got, torch.tensor([0.8660, -0.8660, -0.8660, 0.8660, 0, 0, 0, 0]), atol=1e-4, rtol=0)
    assert torch.equal(got[4:], torch.zeros(4))


@pytest.mark.parametrize("norms, eta", [((2.0, 4.0), 0.5), ((2.0, 0.0), 1.0), ((math.nan, math.nan), 1.0), ((2.0, math.inf), 1.0)])
def test_eq_15_eta_of_norms_that_cannot_be_divided_is_1(norms, eta, monkeypatch):
    """A NaN of one rank is in every rank's norm: as eta it would be in every weight too, and blame all of them."""
    found = iter(norms)
    monkeypatch.setattr(common, "grad_norm", lambda student: torch.tensor(next(found)))
    for phase in ("weigh", "accumulate"):
        monkeypatch.setattr(vgs, phase, lambda *args, **kwargs: None)
    assert vgs.measure_eta([], types.SimpleNamespace(student=torch.nn.Linear(1, 1)), vgs.Args())["eta"] == eta
