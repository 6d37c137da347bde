"""Losses over the whole vocabulary that never hold its logits: a sum of weighted terms, chunk by chunk.

    loss, terms = vocab_loss(fn, weights, [hidden], head)     to be trained: with the gradient of hidden and head
    terms = vocab_terms(fn, [(hidden, head)])                 to be known

fn is an equation of a paper: logits [n, V] of some tokens -> its terms, [n] each. What a token weighs is known before
the loss is (divisors are weights too), so the gradient of a chunk can be taken as soon as its logits are there: each
head is multiplied once, and no logits outlive their chunk. Needs torch alone: copy this file.
"""

import math

import torch
from torch import Tensor


def upcast(x: Tensor) -> Tensor:
    """x in float32; as it is where that is wider. Every loss begins with this: a divergence is a difference of
    log-probs, of whose digits bfloat16 has three.
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


def log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities [..., V] of logits [..., V] of any precision, in float32 at least."""
    return upcast(logits).log_softmax(-1)


def kl(log_a: Tensor, log_b: Tensor | float) -> Tensor:
    """KL(a || b) = sum_v a_v (log a_v - log b_v) of log-probabilities [..., V] -> [...]; 0 log 0 = 0, also at -inf."""
    log_a = upcast(log_a)
    difference = (log_a - log_b).masked_fill(log_a == -math.inf, 0.0)
    return (log_a.exp() * difference).sum(-1)


def entropy(log_p: Tensor) -> Tensor:
    """Entropy in nats of log-probabilities [..., V] -> [...]: -KL(p || 1), with a mass of 1 on every token."""
    return -kl(log_p, 0.0)


def gather(log_p: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities [N, V] of the tokens ids [N] -> [N]."""
    chosen = log_p.gather(-1, ids[:, None])
    return chosen.squeeze(-1)


def chunks(pairs, extras, vocab, size: int):
    """Yields (rows, logits [n, V] of each pair (hidden, head), each extra [n] or None), `size` tokens at a time."""
    count = max(len(pairs[0][0]), 1)  # an empty batch is one empty chunk
    for start in range(0, count, size):
        rows = slice(start, start + size)
        logits = []
        for hidden, head in pairs:
            logits.append(upcast(hidden[rows] @ head[:vocab].T))
        yield rows, logits, [None if x is None else x[rows] for x in extras]


@torch.no_grad()
def vocab_terms(fn, pairs, extras=(), vocab=None, chunk: int = 256) -> Tensor:
    """Per-token terms [K, N] of an equation over the vocabulary, without gradient: fn(*logits, *extras) -> K x [n].

    pairs: (hidden [N, H], head [V, H]) for each logits argument. Only the first `vocab` columns of every head are used
    (what the models share). Logits exist for `chunk` tokens at a time.
    """
    found = []
    for _, logits, extra in chunks(pairs, extras, vocab, chunk):
        terms = fn(*logits, *extra)
        found.append(torch.stack(terms))
    return torch.cat(found, dim=-1)


class _VocabLoss(torch.autograd.Function):
    """See vocab_loss. Its forward pass already takes the gradient of every chunk, and keeps only that."""

    @staticmethod
    def forward(ctx, fn, weights, frozen, extras, vocab, chunk, head, *hidden):
        # many small chunks would round away in less
        wide = torch.promote_types(head.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=head.device)
        grad_hidden = [torch.zeros_like(h) for h in hidden]
        grad_head = None  # of a frozen head (LoRA) nobody wants one
        if ctx.needs_input_grad[6]:
            grad_head = torch.zeros_like(head, dtype=wide)
        found = []
        students = len(hidden)
        pairs = [(h, head) for h in hidden] + list(frozen)
        for rows, logits, extra in chunks(pairs, extras, vocab, chunk):
            ours = [z.requires_grad_() for z in logits[:students]]
            with torch.enable_grad():
                terms = torch.stack(fn(*ours, *logits[students:], *extra))  # [K, n]
                if weights.shape != (len(terms), len(hidden[0])):  # which would broadcast
                    raise ValueError(
                        f"weights {list(weights.shape)} for {len(terms)} terms a token"
                    )
                w = weights[:, rows]
                # no weight: may be anything
                loss = (w * terms).masked_fill(w == 0, 0.0).sum()
            grads = torch.autograd.grad(loss, ours, allow_unused=True, materialize_grads=True)
            for h, grad_h, g in zip(hidden, grad_hidden, grads):
                g = g.to(head.dtype)  # [n, V]
                grad_h[rows] = g @ head[:vocab]
                if grad_head is not None:
                    grad_head[:vocab] += g.T @ h[rows]
            total += loss.detach()
            found.append(terms.detach())
        if grad_head is not None:
            grad_head = grad_head.to(head.dtype)
        ctx.save_for_backward(grad_head, *grad_hidden)
        terms = torch.cat(found, dim=-1)
        ctx.mark_non_differentiable(terms)
        return total, terms

    @staticmethod
    def backward(ctx, upstream, _):
        grads = [None if g is None else g * upstream for g in ctx.saved_tensors]
        return None, None, None, None, None, None, *grads


def vocab_loss(
    fn, weights: Tensor, hidden, head: Tensor, frozen=(), extras=(), vocab=None, chunk: int = 256
):
    """sum over k, t of weights[k, t] * terms[k, t], where terms = fn(*logits, *frozen_logits, *extras): K tensors [n].

    hidden: the student's hidden states [N, H], one tensor a context; they share head [V, H]. frozen: (hidden, head)
    pairs of teachers, without gradient. weights [K, N] must be final, divisors included: that allows the gradient to be
    taken chunk by chunk, so that each head is multiplied once and no logits are kept. Returns (loss, terms [K, N]
    detached). Raises ValueError where weights has another shape.
    """
    frozen, extras = tuple(frozen), tuple(extras)
    return _VocabLoss.apply(fn, weights, frozen, extras, vocab, chunk, head, *hidden)
