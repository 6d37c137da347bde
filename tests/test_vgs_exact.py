"""The gradient of a whole update against an independent float64 computation from the paper.

The reference reads every sequence alone through transformers' model, whole logits, no padding, no chunks, probabilities
instead of log-probabilities, one autograd call. It shares the fixed rollouts with the code under test, and nothing else.
"""

import pytest
import torch
from conftest import distance, layout_gradients
from exact import read
from gradients import fixed_samples, stale

import common

GAMMA, LAMBDA, ETA = 2.0, 0.5, 0.7  # as in gradients.py


def kl(a, b):
    return (a * (a / b).log()).sum(-1)


@pytest.fixture(scope="module")
def reference(tiny):
    """Per response: Std, Vis, Lang, VDS [T], log p of the sampled tokens, its advantage, and the tokens; with a graph to the student."""
    processor = common.Processor(str(tiny / "student"))
    rows = common.Rows(str(tiny / "rows.parquet"), "train", {"problem": "problem"})
    student, teacher = (common.Model(str(tiny / name), torch.float64).lm for name in ("student", "teacher"))
    responses = []
    for sample in fixed_samples(processor, rows, 8):
        image, text, ids = sample.prompts["image"], sample.prompts["text"], sample.response.ids
        pI, pL = (read(student, p, ids, processor.image_id, processor.vocab) for p in (image, text))
        with torch.no_grad():
            qI, qL = (read(teacher, p, ids, processor.image_id, processor.vocab) for p in (image, text))
        target = pL.detach() * qI / qL  # Eq. 9, 10
        target = target / target.sum(-1, keepdim=True)
        responses.append((kl(pI, qI), kl(pI, target), kl(pL, qL), kl(qI, qL), pI[range(len(ids)), ids].log(), sample.advantage, torch.tensor(ids)))
    return student, responses


def loss_of(method, alpha, updates, responses):
    """Eq. 17, 18, 19, 22, 24 as the mean over responses of the mean over each one's tokens."""
    scores = torch.cat([vds for _, _, _, vds, _, _, _ in responses]).sort().values

    def percentile(p):  # linear interpolation
        at = p * (len(scores) - 1)
        return scores[int(at)] + (at - int(at)) * (scores[int(at) + 1] - scores[int(at)])

    q40, q70 = percentile(0.4), percentile(0.7)
    total = 0.0
    for std, vis, lang, vds, log_p, advantage, ids in responses:
        top = (vds > q70).double()
        gamma_t = torch.where(vds > q70, GAMMA, torch.where(vds > q40, GAMMA / 2, 0.0))
        token = {"standard": std, "vgs": std + GAMMA * vis, "vgs-lp": std + GAMMA * vis + LAMBDA * top * lang,
                 "adaptive": std + gamma_t * vis + LAMBDA * top * lang, "lang-steer": std + GAMMA * lang + LAMBDA * top * vis}[method]
        ratio = (log_p - (stale(log_p.detach(), ids) if updates > 1 else log_p.detach())).exp()
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
        total = total + alpha * ETA * token.mean() - (1 - alpha) * surrogate
    return total / len(responses)


def gradient_of(loss, student):
    names = [f"lm.{name}" for name, _ in student.named_parameters()]
    return dict(zip(names, torch.autograd.grad(loss, list(student.parameters()), retain_graph=True)))


METHODS = [(method, 1.0, 1) for method in ("standard", "vgs", "vgs-lp", "adaptive", "lang-steer")]
METHODS += [("vgs-lp", 0.3, 1), ("vgs-lp", 0.3, 2)]  # mixed with GRPO, in the first update and in a later one


@pytest.fixture(scope="module")
def gradients(tiny, tmp_path_factory):
    layouts = [([8], 500, 7, "vgs", {"method": method, "alpha": alpha, "updates": updates}) for method, alpha, updates in METHODS]
    return dict(zip(METHODS, layout_gradients(tiny, tmp_path_factory.mktemp("exact"), layouts, dtype="float64")))


@pytest.mark.parametrize("method, alpha, updates", METHODS)
def test_whole_update(gradients, reference, method, alpha, updates):
    student, responses = reference
    expected, got = gradient_of(loss_of(method, alpha, updates, responses), student), gradients[method, alpha, updates]
    assert distance(got["gradient"], expected) < 1e-6


@pytest.mark.parametrize("method, steered", [("vgs", 1), ("vgs-lp", 1), ("lang-steer", 2)])
def test_eq_15_20_eta(gradients, reference, method, steered):
    student, responses = reference
    norms = [sum(g.square().sum() for g in gradient_of(sum(term(r).mean() for r in responses), student).values()).sqrt()
             for term in (lambda r: r[0], lambda r: r[0] + GAMMA * r[steered])]
    assert gradients[method, 1.0, 1]["eta"] == pytest.approx((norms[0] / norms[1]).item(), rel=1e-5)
