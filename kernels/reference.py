"""The Top-K-plus-tail divergence in plain PyTorch: the definition, and beside it the gradient in closed form.

PTD-PO (arXiv 2606.07000), Eq. 13-17 and Appendix D. Student p = softmax(z), teacher q = softmax(y), one row a token:

    S  = TopK(p) u TopK(q)                                                  the support, a constant            (Eq. 14)
    p~ = ((p_v) for v in S, p_t),   p_t = sum of p_v over v not in S        the buckets; q~ likewise           (Eq. 15, 16)
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

import torch
from torch import Tensor

KINDS = ("jsd", "forward_kl", "reverse_kl")
SUPPORTS = ("union", "student", "teacher", "given")
OUTSIDE = ("tail", "renormalised", "raw")
TAIL_FLOOR = math.log(1e-30)  # forward KL needs log p_t: it goes no lower than this, and has no gradient there


def top_k(logits: Tensor, k: int) -> Tensor:
    """Marks the k largest logits of every row, equal ones by index: [N, V] -> bool [N, V].

    >>> top_k(torch.tensor([[1.0, 3.0, 2.0, 2.0]]), 2)      # of the two 2.0 the one with the smaller index
    tensor([[False,  True,  True, False]])
    """
    kth = logits.topk(k, dim=-1).values[:, -1:]  # [N, 1]
    above, equal = logits > kth, logits == kth
    room = k - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= room))


def support_mask(z: Tensor, y: Tensor, k: int, support: str, given: Tensor | None) -> Tensor:
    """S as a mask [N, V]; given [N, M] lists token ids, -1 where a row has fewer."""
    if support == "given":
        mask = torch.zeros(z.shape[0], z.shape[1] + 1, dtype=torch.bool, device=z.device)
        return mask.scatter_(1, given.masked_fill(given < 0, z.shape[1]), True)[:, :-1]
    if support == "union":
        return top_k(z, k) | top_k(y, k)
    return top_k(z if support == "student" else y, k)


def log_mass(log_p: Tensor, members: Tensor) -> Tensor:
    """log of the probability of the tokens marked in members, [N]: a sum over those tokens, never one minus the others."""
    chosen = log_p.masked_fill(~members, -math.inf)
    empty = (chosen == -math.inf).all(-1)  # logsumexp has no gradient (NaN) there
    return chosen.masked_fill(empty[:, None], 0.0).logsumexp(-1).masked_fill(empty, -math.inf)


def buckets(z: Tensor, y: Tensor, inside: Tensor, kind: str, outside: str) -> tuple[Tensor, Tensor]:
    """log p~ and log q~ [N, V + 1]: the support's tokens in place, the tail last; buckets that do not exist hold -inf in both."""
    result = []
    for logits, floor in ((z, kind == "forward_kl"), (y, False)):
        log_p = logits.log_softmax(-1)
        tail = log_mass(log_p, ~inside)
        if floor:
            tail = torch.where(inside.all(-1), tail, tail.clamp(min=TAIL_FLOOR))
        if outside == "renormalised":
            log_p = log_p - log_mass(log_p, inside)[:, None]
        if outside != "tail":
            tail = torch.full_like(tail, -math.inf)
        result.append(torch.cat([log_p.masked_fill(~inside, -math.inf), tail[:, None]], dim=-1))
    return result[0], result[1]


def weighted(log_weight: Tensor, log_ratio: Tensor) -> Tensor:
    """weight * log_ratio, and 0 where the weight is 0, whatever the ratio."""
    return log_weight.exp() * torch.where(log_weight > -math.inf, log_ratio, 0.0)


def log_mixture(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """log(beta q + (1 - beta) p)."""
    return torch.logaddexp(math.log(beta) + log_q, math.log1p(-beta) + log_p)


def terms(log_p: Tensor, log_q: Tensor, kind: str, beta: float) -> Tensor:
    """Every bucket's share of D. log_p is the student's, log_q the teacher's; all shapes alike."""
    absent = (log_p == -math.inf) & (log_q == -math.inf)
    log_p, log_q = log_p.masked_fill(absent, 0.0), log_q.masked_fill(absent, 0.0)  # p = q contributes 0
    if kind == "forward_kl":
        return weighted(log_q, log_q - log_p)
    if kind == "reverse_kl":
        return weighted(log_p, log_p - log_q)
    log_m = log_mixture(log_p, log_q, beta)
    return (beta * weighted(log_q, log_q - log_m) + (1 - beta) * weighted(log_p, log_p - log_m)).masked_fill(absent, 0.0)


def shared(student_logits: Tensor, teacher_logits: Tensor, valid_vocab: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Both over the shared vocabulary in float32 or float64, and which rows have no distribution: NaN, +inf, or -inf throughout."""
    v = valid_vocab or min(student_logits.shape[1], teacher_logits.shape[1])
    wide = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
    z, y = student_logits[:, :v].to(wide), teacher_logits[:, :v].to(wide)
    bad = ~(z.detach().amax(-1).isfinite() & y.detach().amax(-1).isfinite())
    return z.masked_fill(bad[:, None], 0.0), y.masked_fill(bad[:, None], 0.0), bad


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
    """D [N], differentiable by autograd in student_logits [N, V], and the metrics. Arguments as in `topk_tail_divergence`."""
    z, y, bad = shared(student_logits, teacher_logits.detach(), valid_vocab)
    inside = support_mask(z.detach(), y, k, support, given)
    log_p, log_q = buckets(z, y, inside, kind, outside)
    # A row without a distribution is NaN, and so is its gradient: it must not pass for a row that has nothing to learn.
    poison = torch.zeros_like(bad, dtype=z.dtype).masked_fill(bad, math.nan)
    value = terms(log_p, log_q, kind, beta).sum(-1)
    value = torch.where(bad, student_logits[:, : z.shape[1]].to(z.dtype).sum(-1) * poison, value)

    with torch.no_grad():
        p_tail, q_tail = (log_mass(x.log_softmax(-1), ~inside).exp() for x in (z, y))
        overlap, bound = torch.full_like(p_tail, math.nan), torch.full_like(p_tail, math.inf)
        if support == "union":
            overlap = (2 * k - inside.sum(-1)) / k  # |A n B| = |A| + |B| - |A u B|
        if kind == "jsd" and outside == "tail":
            bound = (beta * q_tail + (1 - beta) * p_tail) * math.log(2)  # from Eq. 63: each log-ratio inside the tail is bounded
        floored = (p_tail < math.exp(TAIL_FLOOR)) & (q_tail > 0) & (kind == "forward_kl") & (outside == "tail")
        metrics = {"student_tail": p_tail, "teacher_tail": q_tail, "overlap": overlap, "gap_bound": bound}
        metrics = {name: x.to(z.dtype).masked_fill(bad, math.nan) for name, x in metrics.items()}
    return value, metrics | {"tail_floored": floored & ~bad, "bad": bad}


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
    log_p, log_q = buckets(z, y, inside, kind, outside)
    # slope_b = p~_b a_b, which stays finite where p~_b vanishes
    if kind == "forward_kl":
        slope = -log_q.exp()
        slope[:, -1].masked_fill_(log_p[:, -1] <= TAIL_FLOOR, 0.0)
    elif kind == "reverse_kl":
        slope = weighted(log_p, log_p - log_q + 1)
    else:
        slope = (1 - beta) * weighted(log_p, log_p - log_mixture(log_p, log_q, beta))
    abar = slope.sum(-1, keepdim=True)
    at_support = slope[:, :-1] - log_p[:, :-1].exp() * abar
    if outside == "renormalised":  # tokens outside S do not occur in D
        at_others = torch.zeros_like(z)
    elif outside == "raw":  # they occur in the softmax alone
        at_others = z.softmax(-1) * -abar
    else:
        share = (z.log_softmax(-1) - log_p[:, -1:]).exp()  # of the tail's mass
        share = share.masked_fill(log_p[:, -1:] == -math.inf, 0.0)
        at_others = share * slope[:, -1:] - z.softmax(-1) * abar
    result = torch.zeros_like(student_logits, dtype=z.dtype)
    result[:, : z.shape[1]] = torch.where(inside, at_support, at_others).masked_fill(bad[:, None], math.nan)
    return result
