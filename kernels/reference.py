"""The Top-K-plus-tail divergence in plain PyTorch: the definition, and beside it the gradient in closed form.

PTD-PO (arXiv 2606.07000), Eq. 13-17 and Appendix D. Student p = softmax(z), teacher q = softmax(y), one row a token:

    S  = TopK(p) u TopK(q)                                                  the support, a constant            (Eq. 14)
    p~ = ((p_v) for v in S, p_t),   p_t = sum of p_v over v not in S        the buckets; q~ likewise        (Eq. 15, 16)
    M~ = beta q~ + (1 - beta) p~
    jsd         D = beta KL(q~ || M~) + (1 - beta) KL(p~ || M~)             beta = 1/2 in the paper            (Eq. 17)
    forward_kl  D = KL(q~ || p~) = sum_b q~_b log(q~_b / p~_b)              the teacher first
    reverse_kl  D = KL(p~ || q~) = sum_b p~_b log(p~_b / q~_b)              the student first

The gradient for the student's logits, through every p, M~ included. With a_b = dD / dp~_b and abar = sum_b p~_b a_b:

    dD/dz_u = p_u (a_b(u) - abar)          b(u): the bucket of token u, the tail for every token outside S

    a_b = (1 - beta) log(p~_b / M~_b)  |  -q~_b / p~_b  |  log(p~_b / q~_b) + 1          jsd | forward_kl | reverse_kl

Conventions: 0 log 0 = 0. Equal logits are ranked by index, the smaller first, so that supports are nested in k.
"""

import math
from math import inf, nan

import torch
from torch import Tensor

KINDS = ("jsd", "forward_kl", "reverse_kl")
SUPPORTS = ("union", "student", "teacher", "given")
OUTSIDE = ("tail", "renormalised", "raw")
TAIL_FLOOR = math.log(
    1e-30
)  # forward KL needs log p_t: it goes no lower than this, and has no gradient there


def top_k(logits: Tensor, k: int) -> Tensor:
    """Marks the k largest logits of every row, equal ones by index: [N, V] -> bool [N, V].

    >>> top_k(torch.tensor([[1.0, 3.0, 2.0, 2.0]]), 2)      # of the two 2.0 the one with the smaller index
    tensor([[False,  True,  True, False]])
    """
    values = logits.topk(k, dim=-1).values
    kth = values[:, -1:]  # [N, 1]
    above = logits > kth
    equal = logits == kth
    room = k - above.sum(-1, keepdim=True)  # [N, 1]
    rank = equal.cumsum(-1, dtype=torch.int32)  # of an equal one among its like, from 1
    return above | (equal & (rank <= room))


def support_mask(z: Tensor, y: Tensor, k: int, support: str, given: Tensor | None) -> Tensor:
    """S as a mask [N, V]; given [N, M] lists token ids, -1 where a row has fewer.

    >>> support_mask(torch.zeros(1, 4), torch.zeros(1, 4), 0, "given", torch.tensor([[2, -1]]))
    tensor([[False, False,  True, False]])
    """
    if support == "student":
        return top_k(z, k)
    if support == "teacher":
        return top_k(y, k)
    if support == "union":
        return top_k(z, k) | top_k(y, k)
    rows, vocab = z.shape
    mask = torch.zeros(rows, vocab + 1, dtype=torch.bool, device=z.device)
    index = given.masked_fill(given < 0, vocab)  # -1 marks the extra column, which is cut off
    return mask.scatter_(1, index, True)[:, :-1]


def log_mass(log_p: Tensor, members: Tensor) -> Tensor:
    """log of the probability of the tokens marked in members, [N].

    It is a sum over those tokens, never one minus the others, which has no digits left where they are nearly all.
    """
    chosen = log_p.masked_fill(~members, -inf)
    empty = (chosen == -inf).all(-1)  # logsumexp has no gradient (NaN) there
    chosen = chosen.masked_fill(empty[:, None], 0.0)
    return chosen.logsumexp(-1).masked_fill(empty, -inf)


def log_buckets(logits: Tensor, inside: Tensor, outside: str, floored: bool = False) -> Tensor:
    """log p~ [N, V + 1] of one side: the support's tokens in place, the tail last, -inf for buckets that do not exist.

    floored: the tail goes no lower than TAIL_FLOOR, unless the support is the whole vocabulary and there is none.
    """
    log_p = logits.log_softmax(-1)
    tail = log_mass(log_p, ~inside)  # [N]
    if floored:
        no_tail = inside.all(-1)
        tail = torch.where(no_tail, tail, tail.clamp(min=TAIL_FLOOR))
    if outside == "renormalised":
        log_p = log_p - log_mass(log_p, inside)[:, None]
    if outside != "tail":
        tail = torch.full_like(tail, -inf)
    at_support = log_p.masked_fill(~inside, -inf)
    return torch.cat([at_support, tail[:, None]], dim=-1)


def weighted(log_weight: Tensor, log_ratio: Tensor) -> Tensor:
    """weight * log_ratio, and 0 where the weight is 0, whatever the ratio."""
    log_ratio = torch.where(log_weight > -inf, log_ratio, 0.0)
    return log_weight.exp() * log_ratio


def log_mixture(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """log(beta q + (1 - beta) p)."""
    teacher = math.log(beta) + log_q
    student = math.log1p(-beta) + log_p
    return torch.logaddexp(teacher, student)


def terms(log_p: Tensor, log_q: Tensor, kind: str, beta: float) -> Tensor:
    """Every bucket's share of D. log_p is the student's, log_q the teacher's; all shapes alike."""
    absent = (log_p == -inf) & (log_q == -inf)
    log_p = log_p.masked_fill(absent, 0.0)  # p = q contributes 0
    log_q = log_q.masked_fill(absent, 0.0)
    if kind == "forward_kl":
        return weighted(log_q, log_q - log_p)
    if kind == "reverse_kl":
        return weighted(log_p, log_p - log_q)
    log_m = log_mixture(log_p, log_q, beta)
    teacher = weighted(log_q, log_q - log_m)
    student = weighted(log_p, log_p - log_m)
    jsd = beta * teacher + (1 - beta) * student
    return jsd.masked_fill(absent, 0.0)


def shared(
    student_logits: Tensor, teacher_logits: Tensor, valid_vocab: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Both over the shared vocabulary in float32 or float64, and bad [N]: the rows that have no distribution.

    Such a row holds NaN or +inf, or -inf throughout, on either side. Its logits are returned as zeros.
    """
    smaller = min(student_logits.shape[1], teacher_logits.shape[1])
    v = valid_vocab or smaller
    wide = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
    z = student_logits[:, :v].to(wide)
    y = teacher_logits[:, :v].to(wide)
    z_max = z.detach().amax(-1)
    y_max = y.detach().amax(-1)
    bad = ~(z_max.isfinite() & y_max.isfinite())
    z = z.masked_fill(bad[:, None], 0.0)
    y = y.masked_fill(bad[:, None], 0.0)
    return z, y, bad


def divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    k: int = 100,
    kind: str = "jsd",
    beta: float = 0.5,
    support: str = "union",
    outside: str = "tail",
    valid_vocab: int | None = None,
    given: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """D [N], differentiable by autograd in student_logits [N, V], and the metrics.

    Arguments, metrics and units as in `topk_tail_divergence`, which also checks them.
    """
    z, y, bad = shared(student_logits, teacher_logits.detach(), valid_vocab)
    inside = support_mask(z.detach(), y, k, support, given)
    log_p = log_buckets(z, inside, outside, floored=kind == "forward_kl")
    log_q = log_buckets(y, inside, outside)
    value = terms(log_p, log_q, kind, beta).sum(-1)
    # A row without a distribution is NaN, and so is its gradient: it must not pass for a row that has nothing to learn.
    poison = torch.zeros_like(value).masked_fill(bad, nan)
    used = student_logits[:, : z.shape[1]].to(z.dtype)
    poisoned = used.sum(-1) * poison
    value = torch.where(bad, poisoned, value)

    with torch.no_grad():
        p_tail = log_mass(z.log_softmax(-1), ~inside).exp()
        q_tail = log_mass(y.log_softmax(-1), ~inside).exp()
        overlap = torch.full_like(p_tail, nan)
        if support == "union":
            in_both = 2 * k - inside.sum(-1)  # |A n B| = |A| + |B| - |A u B|
            overlap = (in_both / k).to(z.dtype)
        bound = torch.full_like(p_tail, inf)
        if (
            kind == "jsd" and outside == "tail"
        ):  # from Eq. 63: each log-ratio inside the tail is bounded
            mixture_tail = beta * q_tail + (1 - beta) * p_tail
            bound = mixture_tail * math.log(2)
        floored = torch.zeros_like(bad)
        if kind == "forward_kl" and outside == "tail":
            below = p_tail < math.exp(TAIL_FLOOR)
            floored = below & (q_tail > 0) & ~bad
    metrics = {
        "student_tail": p_tail.masked_fill(bad, nan),
        "teacher_tail": q_tail.masked_fill(bad, nan),
        "overlap": overlap.masked_fill(bad, nan),
        "gap_bound": bound.masked_fill(bad, nan),
        "tail_floored": floored,
        "bad": bad,
    }
    return value, metrics


@torch.no_grad()
def gradient(
    student_logits: Tensor,
    teacher_logits: Tensor,
    k: int = 100,
    kind: str = "jsd",
    beta: float = 0.5,
    support: str = "union",
    outside: str = "tail",
    valid_vocab: int | None = None,
    given: Tensor | None = None,
) -> Tensor:
    """dD/dz in closed form [N, V], zero beyond the shared vocabulary; float32, or float64 for float64 logits."""
    z, y, bad = shared(student_logits, teacher_logits, valid_vocab)
    inside = support_mask(z, y, k, support, given)
    log_p = log_buckets(z, inside, outside, floored=kind == "forward_kl")
    log_q = log_buckets(y, inside, outside)
    # slope_b = p~_b a_b, which stays finite where p~_b vanishes
    if kind == "forward_kl":
        slope = -log_q.exp()
        at_floor = log_p[:, -1] <= TAIL_FLOOR
        slope[:, -1].masked_fill_(at_floor, 0.0)
    elif kind == "reverse_kl":
        slope = weighted(log_p, log_p - log_q + 1)
    else:
        log_m = log_mixture(log_p, log_q, beta)
        slope = (1 - beta) * weighted(log_p, log_p - log_m)
    abar = slope.sum(-1, keepdim=True)
    p = log_p[:, :-1].exp()
    at_support = slope[:, :-1] - p * abar

    if outside == "renormalised":  # tokens outside S do not occur in D
        at_others = torch.zeros_like(z)
    elif outside == "raw":  # they occur in the softmax alone
        at_others = z.softmax(-1) * -abar
    else:
        log_tail = log_p[:, -1:]
        share = (z.log_softmax(-1) - log_tail).exp()  # of the tail's mass
        share = share.masked_fill(log_tail == -inf, 0.0)
        tail_slope = slope[:, -1:]
        at_others = share * tail_slope - z.softmax(-1) * abar

    slope = torch.where(inside, at_support, at_others)
    result = torch.zeros_like(student_logits, dtype=z.dtype)
    vocab = z.shape[1]
    result[:, :vocab] = slope.masked_fill(bad[:, None], nan)
    return result
