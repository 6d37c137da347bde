"""kernels/reference.py against PTD-PO's Eq. 13-17 written out with sets and sums; its gradient against three others."""

import itertools
import math

from kernels import reference, topk_tail_divergence
from kernels.reference import KINDS, OUTSIDE, SUPPORTS

import numpy as np
import pytest
import torch

CASES = list(itertools.product(KINDS, SUPPORTS, OUTSIDE))
N, V, K = 5, 37, 6


def logits(seed=0, n=N, v=V, scale=2.0, noise=1.0):
    generator = torch.Generator().manual_seed(seed)
    z = scale * torch.randn(n, v, generator=generator, dtype=torch.float64)
    return z, 0.8 * z + noise * torch.randn(n, v, generator=generator, dtype=torch.float64)


def given_tokens(support, n=N, v=V):
    if support != "given":
        return None
    tokens = torch.stack(
        [torch.randperm(v, generator=torch.Generator().manual_seed(i))[:8] for i in range(n)]
    )
    tokens[0, 3:] = -1
    return tokens


def by_hand(z, y, k, kind, beta, support, outside, given):
    """One row, from the paper: Python sets, numpy sums, no shared code."""
    p, q = (np.exp(x - x.max()) / np.exp(x - x.max()).sum() for x in (z, y))
    student = set(sorted(range(len(z)), key=lambda v: (-z[v], v))[:k])
    teacher = set(sorted(range(len(y)), key=lambda v: (-y[v], v))[:k])
    chosen = {
        "union": student | teacher,
        "student": student,
        "teacher": teacher,
        "given": {v for v in (given if given is not None else []) if v >= 0},
    }[support]
    others = set(range(len(z))) - chosen
    ps, qs = [p[v] for v in chosen], [q[v] for v in chosen]
    if outside == "tail" and others:
        ps, qs = ps + [sum(p[v] for v in others)], qs + [sum(q[v] for v in others)]
    if outside == "renormalised":
        ps, qs = [x / sum(ps) for x in ps], [x / sum(qs) for x in qs]
    total = 0.0
    for a, b in zip(ps, qs, strict=True):
        m = beta * b + (1 - beta) * a
        total += {
            "jsd": beta * b * math.log(b / m) + (1 - beta) * a * math.log(a / m),
            "forward_kl": b * math.log(b / a),
            "reverse_kl": a * math.log(a / b),
        }[kind]
    return total


def value(z, y, **options):
    return topk_tail_divergence(z, y, **{"k": K, **options})


def autograd(z, y, **options):
    z = z.clone().requires_grad_()
    return torch.autograd.grad(value(z, y, **options).sum(), z)[0]


@pytest.mark.parametrize("kind, support, outside", CASES)
def test_value_is_the_papers(kind, support, outside):
    z, y = logits()
    given = given_tokens(support)
    for beta in (0.5, 0.1):
        ours = value(z, y, kind=kind, beta=beta, support=support, outside=outside, given=given)
        listed = [None] * N if given is None else given.tolist()
        rows = []
        for a, b, tokens in zip(z.numpy(), y.numpy(), listed, strict=True):
            rows.append(by_hand(a, b, K, kind, beta, support, outside, tokens))
        torch.testing.assert_close(
            ours, torch.tensor(rows, dtype=torch.float64), rtol=1e-12, atol=1e-14
        )


@pytest.mark.parametrize("kind, support, outside", CASES)
def test_gradient_in_closed_form_is_autograds(kind, support, outside):
    given = given_tokens(support)
    for scale, beta, k in itertools.product((1.0, 4.0, 10.0), (0.5, 0.1, 0.9), (1, K, V - 1, V)):
        z, y = logits(scale=scale)
        options = dict(k=k, kind=kind, beta=beta, support=support, outside=outside, given=given)
        closed = reference.gradient(z, y, **options)
        assert (closed - autograd(z, y, **options)).abs().max() < 1e-12
        assert closed.sum(-1).abs().max() < 1e-12
        one_bucket = k == 1 and outside == "renormalised"  # one token alone always has all the mass
        assert closed.abs().max() > 1e-6 or one_bucket


@pytest.mark.parametrize("kind, support, outside", CASES)
def test_gradient_by_differences(kind, support, outside):
    z, y = logits(n=2)
    given = given_tokens(support, n=2)
    options = dict(kind=kind, support=support, outside=outside, given=given)
    if (
        given is None
    ):  # the support is a constant of the gradient: pass it in, so that no step changes it
        mask = reference.support_mask(z, y, K, support, None)
        options |= dict(support="given", given=torch.where(mask, torch.arange(V), -1))
    assert torch.autograd.gradcheck(lambda x: value(x, y, **options), z.clone().requires_grad_())
    closed, step = (
        reference.gradient(z, y, k=K, kind=kind, support=support, outside=outside, given=given),
        1e-6,
    )
    for u in range(0, V, 5):
        moved = [
            value(z + sign * step * torch.eye(V, dtype=torch.float64)[u], y, **options)
            for sign in (1, -1)
        ]
        assert ((moved[0] - moved[1]) / (2 * step) - closed[:, u]).abs().max() < 1e-8


def released_jsd(z, y, k):
    """The loss that the paper's repository trains with: weights without gradient, a mixture that keeps it."""
    log_p, log_q = z.log_softmax(-1), y.log_softmax(-1)
    index = z.detach().topk(k, dim=-1).indices
    kept = []
    for x in (log_p, log_q):
        top = x.gather(1, index)
        kept.append(
            torch.cat([top, (1 - top.exp().sum(-1, keepdim=True)).clamp(min=1e-8).log()], dim=-1)
        )
    log_s, log_t = kept
    log_m = ((log_s.exp() + log_t.exp()) / 2).log()
    student = (log_s.exp().detach() * (log_s - log_m)).sum(-1)
    teacher = (log_t.exp() * (log_t - log_m)).sum(-1)
    return (student + teacher) / 2


def test_gradient_is_not_zero_as_that_of_the_released_loss_is():
    z, y = logits()
    released = torch.autograd.grad(released_jsd(z.requires_grad_(), y, K).sum(), z)[0]
    with torch.no_grad():  # the same value, and no gradient at all
        torch.testing.assert_close(
            released_jsd(z, y, K), value(z, y, support="student"), rtol=1e-12, atol=0
        )
    assert released.abs().max() < 1e-15
    assert autograd(z.detach(), y, support="student").norm(dim=-1).min() > 1e-3
    ours = z.detach().clone()
    for _ in range(200):
        ours -= 5.0 * autograd(ours, y)
    assert (value(ours, y) < 0.2 * value(z.detach(), y)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_never_above_the_full_divergence_and_growing_with_k(kind):
    z, y = logits(n=20)
    full = value(z, y, k=V, kind=kind)
    log_p, log_q = z.log_softmax(-1), y.log_softmax(-1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    kl = {
        "forward_kl": (log_q.exp() * (log_q - log_p)).sum(-1),
        "reverse_kl": (log_p.exp() * (log_p - log_q)).sum(-1),
    }
    kl["jsd"] = (
        (log_p.exp() * (log_p - log_m)).sum(-1) + (log_q.exp() * (log_q - log_m)).sum(-1)
    ) / 2
    torch.testing.assert_close(full, kl[kind], rtol=1e-12, atol=0)
    previous = torch.zeros(20, dtype=torch.float64)
    for k in range(1, V + 1):
        now, metrics = value(z, y, k=k, kind=kind, return_metrics=True)
        assert (now >= previous - 1e-14).all() and (now <= full + 1e-14).all()
        assert (full - now <= metrics["gap_bound"] + 1e-14).all()
        previous = now
    for beta in (0.1, 0.5, 0.8):  # the certificate and the ceiling of every beta
        d, metrics = value(z, y, beta=beta, return_metrics=True)
        assert (value(z, y, k=V, beta=beta) - d <= metrics["gap_bound"]).all()
        assert (d <= -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)).all()
    far = torch.zeros(1, V, dtype=torch.float64)
    far[0, 0] = 60.0
    assert (
        abs(float(value(far, far.flip(1))) - math.log(2)) < 1e-12
    )  # disjoint: the ceiling is reached, not passed


def test_invariances():
    z, y = logits()
    for kind, outside in itertools.product(KINDS, OUTSIDE):
        options = dict(kind=kind, outside=outside)
        torch.testing.assert_close(
            value(z + 7.0, y - 3.0, **options), value(z, y, **options), rtol=1e-11, atol=1e-13
        )
        gradients = autograd(z + 7.0, y - 3.0, **options), autograd(z, y, **options)
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-13)
        assert value(z, z + 2.0, **options).abs().max() < 1e-14
        # The raw KLs push on even when student and teacher agree: the missing tail is what holds the buckets' pull in
        # balance.
        assert (autograd(z, z + 2.0, **options).abs().max() < 1e-14) == (
            outside != "raw" or kind == "jsd"
        )
    torch.testing.assert_close(value(z, y), value(y, z), rtol=1e-12, atol=0)
    # columns that both leave out: cut, or at -inf
    cut = value(z, y, valid_vocab=30)
    torch.testing.assert_close(cut, value(z[:, :30], y[:, :30]), rtol=0, atol=0)
    masked = [x.clone().index_fill_(1, torch.arange(30, V), -math.inf) for x in (z, y)]
    torch.testing.assert_close(cut, value(*masked), rtol=1e-14, atol=0)
    torch.testing.assert_close(cut, value(z, y[:, :30]), rtol=0, atol=0)
    gradient = autograd(z, y, valid_vocab=30)
    assert (gradient[:, 30:] == 0).all() and torch.equal(
        gradient[:, :30], autograd(z[:, :30], y[:, :30])
    )


def test_equal_logits_rank_by_index():
    x = torch.tensor([[0.0, 1.0, 1.0, -0.0, 1.0, 2.0]])
    order = torch.sort(x, dim=-1, descending=True, stable=True).indices[0].tolist()
    for k in range(1, 7):
        assert reference.top_k(x, k)[0].nonzero()[:, 0].tolist() == sorted(order[:k])


def test_rows_without_a_distribution_are_nan_and_alone():
    clean, y = logits(n=6)
    z = clean.clone()
    z[1, 3], z[2, 5], z[3] = math.nan, math.inf, -math.inf
    y = y.clone()
    y[4, 0] = math.nan
    leaf = z.clone().requires_grad_()
    d, metrics = value(leaf, y, return_metrics=True)
    d.sum().backward()
    assert metrics["bad"].tolist() == d.isnan().tolist() == [False, True, True, True, True, False]
    assert leaf.grad.isnan().all(-1).tolist() == metrics["bad"].tolist()
    good = [0, 5]
    assert torch.equal(d[good], value(clean[good], y[good]))
    assert torch.equal(leaf.grad[good], autograd(clean[good], y[good]))
    closed = reference.gradient(z, y, k=K)
    assert closed.isnan().all(-1).tolist() == metrics["bad"].tolist()
    torch.testing.assert_close(closed[good], leaf.grad[good], rtol=1e-12, atol=1e-14)


def test_impossible_tokens():
    """-inf logits are probabilities of 0: JSD and reverse KL stay finite where only the teacher allows a token."""
    z, y = logits(n=2)
    z = z.clone()
    z[:, y[0].argmax()] = -math.inf
    for kind, support in itertools.product(KINDS, SUPPORTS[:3]):
        options = dict(kind=kind, support=support)
        d, g = value(z, y, **options), autograd(z, y, **options)
        assert d.isfinite().all() or (
            kind == "forward_kl" and support != "student" and d[0] == math.inf
        )
        assert g.isfinite().all()
        assert (reference.gradient(z, y, k=K, **options) - g).abs().max() < 1e-12
    # The student's tail is empty, the teacher's is not: forward KL meets its floor and has no gradient there.
    z[:, K:] = -math.inf
    z[:, :K] = 1.0
    d, metrics = value(z, y, kind="forward_kl", support="student", return_metrics=True)
    assert metrics["tail_floored"].all() and d.isfinite().all()
    g = autograd(z, y, kind="forward_kl", support="student")
    assert (
        reference.gradient(z, y, k=K, kind="forward_kl", support="student") - g
    ).abs().max() < 1e-12
