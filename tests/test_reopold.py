"""Reopold's pieces on worked examples: floor, stop-gradient, masks, switch, diagnostics, and the real script."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import flags, run_script

import common
import reopold


@pytest.mark.parametrize("lam, lowest", [(0.1, -2.558), (0.2, -2.012), (0.3, -1.720), (0.5, -1.386)])
def test_floor_of_equation_7(lam, lowest):
    """What the mixture's bound of the log-ratio tends to where the teacher gives the token nothing; no reward is below it."""
    assert reopold.lowest_reward(lam) == pytest.approx(lowest, abs=5e-4)
    assert math.log(lam + (1 - lam) * 1e-12) / (1 - lam) == pytest.approx(reopold.lowest_reward(lam))
    log_p, log_q = torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([-0.5, -2.0, -30.0])
    assert reopold.reward_of(log_p, log_q, reopold.Args(lam=lam)).tolist() == pytest.approx([0.5, -1.0, reopold.lowest_reward(lam)])
    assert reopold.reward_of(log_p, log_q, reopold.Args(lam=lam, floor=False)).tolist() == pytest.approx([0.5, -1.0, -29.0])


@pytest.fixture(scope="module")
def by_token():
    """One position, 7 tokens: (p, gradient of the objective for the logits with and without stop-gradient, [token, logit]; R)."""
    torch.manual_seed(1)
    z, y = torch.randn(7, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    found = {}
    for stop in (True, False):
        args = reopold.Args(stop_gradient=stop, floor=False)
        rows, nan = z.repeat(7, 1).requires_grad_(), torch.full((7,), math.nan, dtype=torch.float64)
        objective = reopold.terms(rows, torch.arange(7), nan, y.log_softmax(-1), torch.zeros(7, dtype=torch.float64), args=args)[0]
        found[stop] = torch.autograd.grad(objective.sum(), rows)[0]
    return z.softmax(-1), found[True], found[False], y.log_softmax(-1) - z.log_softmax(-1)


def test_without_stop_gradient_every_advantage_is_smaller_by_one(by_token):
    """Remark 3.1: R grad log p against (R - 1) grad log p."""
    p, fixed, through, reward = by_token
    score = torch.eye(7, dtype=torch.float64) - p  # gradient of log p of each token
    torch.testing.assert_close(fixed, reward[:, None] * score)
    torch.testing.assert_close(through, (reward - 1)[:, None] * score)


def test_both_have_the_gradient_of_reverse_kl_in_the_mean(by_token):
    """Exactly over the student's distribution, and within four standard errors over 200,000 samples of it."""
    p, fixed, through, reward = by_token
    z = p.log().requires_grad_()
    kl = (z.softmax(-1) * (-reward)).sum()  # KL(p || q) with log p - log q = -R, whose own gradient has mean zero
    expected = -torch.autograd.grad(kl, z)[0]
    torch.testing.assert_close(p @ fixed, expected)
    torch.testing.assert_close(p @ through, expected)
    picks = torch.multinomial(p, 200_000, replacement=True, generator=torch.Generator().manual_seed(0))
    for each in (fixed, through):
        samples = each[picks]
        assert ((samples.mean(0) - expected).abs() < 4 * samples.std(0) / math.sqrt(len(picks))).all()


def test_the_stop_gradient_lowers_the_variance():
    """In every one of 20 random pairs: summed over the logits."""
    for seed in range(20):
        torch.manual_seed(seed)
        log_p, log_q = (torch.randn(50, dtype=torch.float64).log_softmax(-1) for _ in range(2))
        p, reward = log_p.exp(), log_q - log_p
        size = (torch.eye(50, dtype=torch.float64) - p).square().sum(-1)
        mean = (p * reward) @ (torch.eye(50, dtype=torch.float64) - p)
        with_it, without = ((p * a.square() * size).sum() - mean.square().sum() for a in (reward, reward - 1))
        assert with_it < without


def micro(**values):
    return SimpleNamespace(**{name: torch.tensor(x) for name, x in values.items()})


def test_exploration_drops_exactly_what_is_below_the_floor():
    lowest = reopold.lowest_reward(0.3)
    micros = [micro(log_q=[-1.0, -4.0, -1.0 + lowest + 1e-3], old=[-2.0, -1.0, -1.0]), micro(log_q=[-1.0 + lowest - 1e-3, -math.inf], old=[-1.0, -1.0])]
    assert [mask.tolist() for mask in reopold.kept(micros, reopold.Args(), 0.0)] == [[True, False, True], [False, False]]


@pytest.mark.parametrize("beta, count", [(0.2, 20), (0.05, 5), (0.99, 99), (1.0, 101)])
def test_refinement_keeps_exactly_the_most_uncertain_share(beta, count):
    """Of 101 tokens in two micro-batches the 1 + floor(100 beta) with the largest entropy."""
    entropies = torch.rand(101, generator=torch.Generator().manual_seed(0))
    micros = [SimpleNamespace(entropy=part, old=part, log_q=part) for part in entropies.split(60)]
    mask = torch.cat(reopold.kept(micros, reopold.Args(beta=beta), 0.5))
    assert mask.sum() == math.floor(100 * beta + 1e-9) + 1 and abs(mask.sum() - count) <= 1
    assert entropies[mask].min() >= entropies[~mask].max() if beta < 1 else mask.all()


def test_the_switch():
    """Ten steps, half of them explore: 1 to 5."""
    args = reopold.Args()
    assert [step for step in range(1, 11) if reopold.explores(args, (step - 1) / 10)] == [1, 2, 3, 4, 5]
    assert not any(reopold.explores(reopold.Args(switch=0.0), x) for x in (0.0, 0.5))
    assert not reopold.explores(reopold.Args(explore=False), 0.0) and not reopold.explores(reopold.Args(method="gkd"), 0.0)


def test_without_any_kept_token_the_weights_are_zero():
    m = SimpleNamespace(log_q=torch.full((3,), -50.0), old=torch.zeros(3), ids=torch.zeros(3))
    reopold.weigh([m], reopold.Args(), 0.0)
    assert not m.weights.any() and m.weights.isfinite().all()


def test_a_token_that_the_teacher_excludes_has_the_floor_as_its_reward():
    z = torch.randn(2, 9, requires_grad=True)
    log_q = torch.tensor([-math.inf, -1.0])
    objective = reopold.terms(z, torch.tensor([3, 4]), torch.full((2,), math.nan), log_q, torch.zeros(2), args=reopold.Args())[0]
    (gradient,) = torch.autograd.grad(objective.sum(), z)
    assert objective[0].item() == pytest.approx(reopold.lowest_reward(0.3)) and gradient.isfinite().all()


def test_the_ratio_is_clipped_pessimistically():
    """Ratios 2 and 1/2 with a good and a bad reward: clipped where the step was already taken, and nowhere else."""
    z, ids = torch.zeros(4, 2, requires_grad=True), torch.zeros(4, dtype=torch.long)
    now = -math.log(2)
    old = torch.tensor([now - math.log(2), now + math.log(2), now - math.log(2), now + math.log(2)])  # ratios 2, 1/2, 2, 1/2
    log_q = torch.tensor([now + 1, now + 1, now - 1, now - 1])  # rewards 1, 1, -1, -1
    objective, reward, clipped, *_ = reopold.terms(z, ids, old, log_q, torch.zeros(4), args=reopold.Args())
    assert reward.tolist() == pytest.approx([1, 1, -1, -1]) and clipped.tolist() == [1, 0, 0, 1]
    assert objective.tolist() == pytest.approx([1.2, 0.5, -2, -0.8])
    assert (torch.autograd.grad(objective.sum(), z)[0].norm(dim=-1) == 0).tolist() == [True, False, False, True]


@pytest.mark.parametrize("changes", [{"updates": 2, "warmup": 1}, {"method": "grpo", "teacher": None, "group": 2}, {"method": "sft"}], ids=str)
def test_real_runs(tiny, tmp_path, changes):
    result = run_script("reopold.py", *flags(tiny, tmp_path / "run", **{"updates": 1} | changes))
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"kept", "entropy", "clipped", "grad_norm", "acc@1", "seconds/score", "seconds/remember"} <= set(lines[-1])
    if changes.get("method") == "grpo":  # an untrained student is never right: every advantage is zero
        return
    assert lines[-1]["grad_norm"] > 0
    for line in lines[1:]:
        assert sum(line["log_ratio_histogram"]) == pytest.approx(1, abs=1e-4) and len(line["log_ratio_by_entropy"]) == 10
    if "method" not in changes:
        assert lines[1]["kept"] == pytest.approx(1 - lines[1]["below_floor"], abs=0.05)  # exploring: what is not below the floor at the first update
        assert lines[2]["kept"] < 0.3  # refining
        assert [line["lr"] for line in lines[1:]] == pytest.approx([0.75e-3, 0.5e-3])  # of four updates: 1/2, 1 and 2/3, 1/3


def test_text_alone_on_two_ranks(tiny, tmp_path):
    changes = dict(student=tiny / "text-only", teacher=tiny / "text-only", data=tiny / "text.parquet", eval_data=tiny / "text.parquet", column_problem="text_problem",
                   lr=1e-9)
    result = run_script("reopold.py", *flags(tiny, tmp_path / "run", **changes), torchrun=2)
    assert result.returncode == 0, result.stderr
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["log_ratio"] == pytest.approx(0, abs=1e-3)  # it is its own teacher
    refused = run_script("reopold.py", *flags(tiny, tmp_path / "no", **changes | {"data": tiny / "rows.parquet"}))
    assert refused.returncode != 0 and "it shows an image, and" in refused.stderr + refused.stdout and "Traceback" not in refused.stderr


@pytest.mark.parametrize("message, argv", [
    ("--lam is 1.0", "--lam 1"), ("--lam is 0.0", "--lam 0"), ("--beta is 0.0", "--beta 0"), ("--beta is 1.5", "--beta 1.5"), ("--switch", "--switch -1"),
    ("--beta would have no effect", "--no-select --beta 0.3"), ("--switch would have no effect", "--no-explore --switch 0.3"),
    ("--lam would have no effect", "--no-floor --no-explore --lam 0.2"), ("--floor would have no effect", "--method gkd --updates 1 --no-floor"),
    ("--updates above 1", "--method gkd --updates 2"), ("--group to at least 2", "--method grpo"), ("--clip-low would have no effect", "--updates 1 --clip-low 0.1"),
    ("--teacher would have no effect", "--method grpo --group 2 --teacher x"),
])  # fmt: skip
def test_bad_settings(message, argv):
    with pytest.raises(common.UserError, match=message):
        reopold.check_settings(*common.parse_args(reopold.Args, reopold.PRESETS, ["--preset", "toy", *argv.split()]))


def test_a_switch_behind_the_end_is_warned_of(tiny, tmp_path):
    result = run_script("reopold.py", *flags(tiny, tmp_path / "run", switch=1.5, max_steps=1))
    assert result.returncode == 0 and "warning: --switch 1.5 lies behind the last step" in result.stdout
