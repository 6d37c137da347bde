"""VGS's equations against float64 mathematics written from the paper (arXiv:2606.00564), values and gradients.

The references here are written with probabilities and explicit sums, and share no code with vgs.py.
"""

import math
import types

import common
import vgs

import pytest
import torch

N, V = 7, 13


@pytest.fixture
def logits():
    """Student and teacher logits with and without the image, float64; the student's carry gradient."""
    torch.manual_seed(0)
    zI, zL, yI, yL = (2 * torch.randn(N, V, dtype=torch.float64) for _ in range(4))
    return zI.requires_grad_(), zL.requires_grad_(), yI, yL


def test_the_question_alone_is_read_only_where_it_steers():
    for changes in (dict(alpha=0.0), dict(gamma=0.0, lambda_lp=0.0)):
        assert list(vgs.contexts(vgs.Args(**changes))) == ["image"]
    for changes in (dict(alpha=0.3), dict(gamma=0.0), dict(lambda_lp=0.0)):
        assert list(vgs.contexts(vgs.Args(**changes))) == ["image", "text"]


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
    std, vis, lang = vgs.divergences(*logits)
    vds = vgs.visual_dependency(*logits[2:])
    torch.testing.assert_close(std, reference_kl(pI, qI), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        vis, reference_kl(pI, reference_target(pL, qI, qL)), rtol=1e-12, atol=1e-14
    )
    torch.testing.assert_close(lang, reference_kl(pL, qL), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(vds, reference_kl(qI, qL), rtol=1e-12, atol=1e-14)


def test_eq_3_6_11_gradients(logits):
    """d KL(p || q) / d z_v = p_v (log p_v/q_v - KL), with q* held constant."""
    zI, zL, _, _ = logits
    pI, pL, qI, qL = (softmax(z).detach() for z in logits)
    std, vis, lang = vgs.divergences(*logits)
    for term, z, p, q in (
        (std, zI, pI, qI),
        (vis, zI, pI, reference_target(pL, qI, qL)),
        (lang, zL, pL, qL),
    ):
        (gradient,) = torch.autograd.grad(term.sum(), z, retain_graph=True)
        expected = p * ((p / q).log() - reference_kl(p, q)[:, None])
        torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=1e-13)
        assert expected.abs().max() > 1e-3


def test_eq_10_no_gradient_through_the_students_prior(logits):
    zI, zL, _, _ = logits
    _, vis, _ = vgs.divergences(*logits)
    assert torch.autograd.grad(vis.sum(), zL, allow_unused=True)[0] is None


def test_eq_13_one_kl_identity(logits):
    """Std + gamma Vis has the gradient of (1 + gamma) KL(pI || r), r ~ qI (pL / qL)^(gamma / (1 + gamma))."""
    zI, zL, _, _ = logits
    pL, qI, qL = (softmax(z).detach() for z in logits[1:])
    for gamma in (0.5, 2.0, 7.0):
        std, vis, _ = vgs.divergences(*logits)
        r = qI * (pL / qL) ** (gamma / (1 + gamma))
        one = (1 + gamma) * reference_kl(softmax(zI), r / r.sum(-1, keepdim=True))
        ours, theirs = (torch.autograd.grad(x.sum(), zI)[0] for x in (std + gamma * vis, one))
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


def test_all_divergences_vanish_when_the_teacher_is_the_student():
    torch.manual_seed(1)
    z = torch.randn(N, V, dtype=torch.float64)
    w = torch.randn(N, V, dtype=torch.float64)
    std, vis, lang = vgs.divergences(z, w, z, w)
    for term in (std, vis, lang):
        torch.testing.assert_close(term, torch.zeros(N, dtype=torch.float64), atol=1e-14, rtol=0)
    assert vgs.visual_dependency(z, w).min() > 0.01  # the image still matters to this teacher


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
        torch.testing.assert_close(
            ours,
            theirs,
            rtol=1e-5 if dtype == torch.float32 else 1e-12,
            atol=1e-6 if dtype == torch.float32 else 1e-14,
        )


def test_extreme_logits_stay_finite():
    z = [torch.tensor([[300.0, -300.0, 0.0], [0.0, 0.0, 0.0]]) for _ in range(4)]
    z[2] = -z[2]
    z[0].requires_grad_(), z[1].requires_grad_()
    terms = vgs.divergences(*z)
    sum(t.sum() for t in terms).backward()
    assert (
        all(t.isfinite().all() for t in terms)
        and z[0].grad.isfinite().all()
        and z[1].grad.isfinite().all()
    )


VDS = torch.tensor([0.1, 0.4, 0.5, 0.7, 0.9])
Q40, Q70 = torch.tensor(0.4), torch.tensor(0.7)


STANDARD = {"gamma": 0.0, "lambda_lp": 0.0}


@pytest.mark.parametrize(
    "settings, std, vis, lang",
    [
        (STANDARD, [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]),
        ({"lambda_lp": 0.0}, [1, 1, 1, 1, 1], [2, 2, 2, 2, 2], [0, 0, 0, 0, 0]),  # Eq. 13
        ({}, [1, 1, 1, 1, 1], [2, 2, 2, 2, 2], [0, 0, 0, 0, 0.3]),  # Eq. 16: strictly above Q0.7
        # Eq. 25: 0 up to Q0.4, gamma / 2 up to Q0.7, gamma above
        ({"steer": "adaptive"}, [1, 1, 1, 1, 1], [0, 0, 1, 1, 2], [0, 0, 0, 0, 0.3]),
        ({"steer": "language"}, [1, 1, 1, 1, 1], [0, 0, 0, 0, 0.3], [2, 2, 2, 2, 2]),  # Eq. 19, 21
    ],
)
def test_eq_13_16_19_25_coefficients(settings, std, vis, lang):
    got = vgs.steering(VDS, Q40, Q70, vgs.Args(**{"gamma": 2.0, "lambda_lp": 0.3} | settings))
    for name, expected in (("std", std), ("vis", vis), ("lang", lang)):
        torch.testing.assert_close(got[name], torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("steer", ["image", "adaptive", "language"])
def test_gamma_and_lambda_zero_are_standard_exactly(steer):
    got = vgs.steering(VDS, Q40, Q70, vgs.Args(steer=steer, **STANDARD))
    assert torch.equal(got["std"], torch.ones(5))
    assert torch.equal(got["vis"], torch.zeros(5)) and torch.equal(got["lang"], torch.zeros(5))


def micro(lengths, vds=None):
    """A micro-batch without sequences, for weigh alone."""
    m = common.Micro.__new__(common.Micro)
    m.lengths, m.teacher = lengths, [] if vds is None else [None, None]
    m.length, m.vds = m.spread(lengths), vds
    return m


RUN = types.SimpleNamespace(own={})


def weights_of(m) -> dict:
    """Those that are not zero everywhere."""
    return {name: w for name, w in m.weights.items() if w.abs().sum() > 0}


def test_eq_3_16_17_18_weights_are_response_means():
    """Two responses of 2 and 4 tokens: a token weighs 1 / (its length * 2); LP divides by the length as well."""
    vds = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    q70 = 3.5  # linear interpolation at 0.7 * 5
    m = micro([2, 4], vds)
    vgs.weigh([m], RUN, vgs.Args(gamma=2.0, lambda_lp=0.1, eta=0.5))
    mean = torch.tensor([1 / 4, 1 / 4, 1 / 8, 1 / 8, 1 / 8, 1 / 8])
    got = weights_of(m)
    assert set(got) == {"std", "vis", "lang"}
    torch.testing.assert_close(got["std"], 0.5 * mean)
    torch.testing.assert_close(got["vis"], 0.5 * 2 * mean)
    torch.testing.assert_close(got["lang"], 0.5 * 0.1 * mean * (vds > q70))


def test_quantiles_and_divisors_span_the_micro_batches():
    vds = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    args = vgs.Args(steer="adaptive", gamma=2.0, lambda_lp=0.1)
    together = [micro([2, 4], vds)]
    apart = [micro([2], vds[:2]), micro([0], vds[:0]), micro([4], vds[2:])]
    vgs.weigh(together, RUN, args)
    vgs.weigh(apart, RUN, args)
    for name, whole in together[0].weights.items():
        torch.testing.assert_close(whole, torch.cat([m.weights[name] for m in apart]))


def test_eq_22_mixes_with_grpo():
    """alpha of distillation, 1 - alpha of the surrogate, which is maximised; no eta."""
    m = micro([2, 4], torch.arange(6.0))
    vgs.weigh([m], RUN, vgs.Args(gamma=2.0, lambda_lp=0.0, alpha=0.3, eta=0.5))
    mean = torch.tensor([1 / 4, 1 / 4, 1 / 8, 1 / 8, 1 / 8, 1 / 8])
    got = weights_of(m)
    assert set(got) == {"std", "vis", "surrogate"}
    torch.testing.assert_close(got["std"], 0.3 * mean)
    torch.testing.assert_close(got["vis"], 0.3 * 2 * mean)
    torch.testing.assert_close(got["surrogate"], -0.7 * mean)
    grpo = micro([2, 4])
    vgs.weigh([grpo], RUN, vgs.Args(alpha=0.0))
    assert set(weights_of(grpo)) == {"surrogate"}
    torch.testing.assert_close(grpo.weights["surrogate"], -mean)


def test_clipped_surrogate_and_its_gradient():
    """min(rho A, clip(rho) A): outside the clip range and on its far side the gradient is zero; inside it is rho A."""
    log_p = torch.tensor([0.0, 0.5, 0.5, -0.5, -0.5], dtype=torch.float64, requires_grad=True)
    old = torch.zeros(5, dtype=torch.float64)
    advantage = torch.tensor([2.0, 1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    value, cut = common.clipped_surrogate(log_p, old, advantage, 0.2, 0.3)
    up, down = math.exp(0.5), math.exp(-0.5)
    expected = torch.tensor([2.0, 1.3, -up, down, -0.8], dtype=torch.float64)
    torch.testing.assert_close(value, expected)
    assert cut.tolist() == [0, 1, 0, 0, 1]
    value.sum().backward()
    expected = torch.tensor([2.0, 0.0, -up, down, 0.0], dtype=torch.float64)
    torch.testing.assert_close(log_p.grad, expected)


def test_group_advantages():
    got = common.group_advantages(torch.tensor([1.0, 0, 0, 1, 1, 1, 1, 1]), 4)
    expected = torch.tensor([0.8660, -0.8660, -0.8660, 0.8660, 0, 0, 0, 0])
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    assert torch.equal(got[4:], torch.zeros(4))


NORMS = [((2.0, 4.0), 0.5), ((2.0, 0.0), 1.0), ((math.nan, math.nan), 1.0), ((2.0, math.inf), 1.0)]


@pytest.mark.parametrize("norms, eta", NORMS)
def test_eq_15_eta_of_norms_that_cannot_be_divided_is_1(norms, eta, monkeypatch):
    """A NaN of one rank is in every rank's norm: as eta it would be in every weight too, and blame all of them."""
    found = iter(norms)
    monkeypatch.setattr(common, "grad_norm", lambda student: torch.tensor(next(found)))
    monkeypatch.setattr(vgs, "weigh", lambda *args: None)
    student = torch.nn.Linear(1, 1)
    run = types.SimpleNamespace(student=student, backward=lambda *args: None, own={})
    assert vgs.measure_eta([], run, vgs.Args())["eta"] == eta == run.own["eta"]
