"""The gradient of a whole update against an independent float64 computation from the paper.

The reference reads every sequence alone through transformers' model, whole logits, no padding, no chunks, probabilities
instead of log-probabilities, one autograd call. It shares the fixed rollouts with the code under test.
"""

import common

import pytest
import torch
from conftest import distance, layout_gradients
from exact import read
from gradients import fixed_rows, stale
from gradients_vgs import samples_of

GAMMA, ETA = 2.0, 0.7  # as in gradients.py


def kl(a, b):
    return (a * (a / b).log()).sum(-1)


@pytest.fixture(scope="module")
def reference(tiny):
    """Per response: Std, Vis, Lang, VDS, log p of the tokens [T], its advantage, and the tokens; with a graph."""
    processor = common.Processor(str(tiny / "student"))
    rows = fixed_rows(tiny, processor)
    student, teacher = (
        common.Model(str(tiny / name), torch.float64).lm for name in ("student", "teacher")
    )
    responses = []
    for sample in samples_of(processor, rows):
        image, text, ids = sample.prompts["image"], sample.prompts["text"], sample.response.ids
        pI, pL = (read(student, p, ids, processor.image_id, processor.vocab) for p in (image, text))
        with torch.no_grad():
            qI, qL = (
                read(teacher, p, ids, processor.image_id, processor.vocab) for p in (image, text)
            )
        target = pL.detach() * qI / qL  # Eq. 9, 10
        target = target / target.sum(-1, keepdim=True)
        responses.append(
            (
                kl(pI, qI),
                kl(pI, target),
                kl(pL, qL),
                kl(qI, qL),
                pI[range(len(ids)), ids].log(),
                sample.advantage,
                torch.tensor(ids),
            )
        )
    return student, responses


def loss_of(steer, gamma, lam, alpha, updates, responses):
    """Eq. 17, 18, 19, 22, 24 as the mean over responses of the mean over each one's tokens."""
    scores = torch.cat([vds for _, _, _, vds, _, _, _ in responses]).sort().values

    def percentile(p):  # linear interpolation
        at = p * (len(scores) - 1)
        return scores[int(at)] + (at - int(at)) * (scores[int(at) + 1] - scores[int(at)])

    q40, q70 = percentile(0.4), percentile(0.7)
    total = 0.0
    for std, vis, lang, vds, log_p, advantage, ids in responses:
        top = (vds > q70).double()
        gamma_t = torch.where(vds > q70, gamma, torch.where(vds > q40, gamma / 2, 0.0))
        token = {
            "image": std + gamma * vis + lam * top * lang,
            "adaptive": std + gamma_t * vis + lam * top * lang,
            "language": std + gamma * lang + lam * top * vis,
        }[steer]
        ratio = (log_p - (stale(log_p.detach(), ids) if updates > 1 else log_p.detach())).exp()
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
        total = (
            total
            + alpha * (ETA if alpha == 1 and gamma else 1.0) * token.mean()
            - (1 - alpha) * surrogate
        )
    return total / len(responses)


def gradient_of(loss, student):
    names = [f"lm.{name}" for name, _ in student.named_parameters()]
    return dict(
        zip(names, torch.autograd.grad(loss, list(student.parameters()), retain_graph=True))
    )


# (steer, gamma, lambda, alpha, updates)
SETTINGS = [("image", 0.0, 0.0, 1.0, 1), ("image", 2.0, 0.0, 1.0, 1)]  # Standard, VGS
SETTINGS += [
    (steer, 2.0, 0.5, 1.0, 1) for steer in ("image", "adaptive", "language")
]  # VGS-LP, ...
SETTINGS += [
    ("image", 2.0, 0.5, 0.3, 1),
    ("image", 2.0, 0.5, 0.3, 2),
]  # with GRPO, in the first update and a later one
SETTINGS += [
    ("image", 0.0, 0.0, 0.3, 1),
    ("image", 2.0, 0.5, 0.0, 2),
]  # Standard with GRPO; GRPO alone


@pytest.fixture(scope="module")
def gradients(tiny, tmp_path_factory):
    layouts = []
    for steer, gamma, lam, alpha, updates in SETTINGS:
        settings = {
            "steer": steer,
            "gamma": gamma,
            "lambda_lp": lam,
            "alpha": alpha,
            "updates": updates,
        }
        layouts.append(([8], 500, 7, "vgs", settings))
    return dict(
        zip(
            SETTINGS,
            layout_gradients(tiny, tmp_path_factory.mktemp("exact"), layouts, dtype="float64"),
        )
    )


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_whole_update(gradients, reference, settings):
    student, responses = reference
    expected = gradient_of(loss_of(*settings, responses), student)
    assert distance(gradients[settings]["gradient"], expected) < 1e-6


@pytest.mark.parametrize(
    "settings, steered", [(SETTINGS[1], 1), (SETTINGS[2], 1), (SETTINGS[4], 2)]
)
def test_eq_15_20_eta(gradients, reference, settings, steered):
    student, responses = reference
    norms = []
    for term in (lambda r: r[0], lambda r: r[0] + GAMMA * r[steered]):
        found = gradient_of(sum(term(r).mean() for r in responses), student)
        norms.append(sum(g.square().sum() for g in found.values()).sqrt())
    assert gradients[settings]["eta"] == pytest.approx((norms[0] / norms[1]).item(), rel=1e-5)
