"""Reopold's pieces on worked examples: floor, stop-gradient, masks, switch, curves, and the real script."""

import json
import math
from types import SimpleNamespace

import common
import reopold

import pytest
import torch
from conftest import flags, refusal, run_script
from gradients_reopold import samples_of


@pytest.mark.parametrize(
    "lam, lowest", [(0.1, -2.558), (0.2, -2.012), (0.3, -1.720), (0.5, -1.386)]
)
def test_floor_of_equation_7(lam, lowest):
    """What the mixture's bound of the log-ratio tends to where the teacher gives the token nothing."""
    assert reopold.lowest_reward(lam) == pytest.approx(lowest, abs=5e-4)
    bound = math.log(lam + (1 - lam) * 1e-12) / (1 - lam)
    assert bound == pytest.approx(reopold.lowest_reward(lam))
    log_p, log_q = torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([-0.5, -2.0, -30.0])
    floored = reopold.reward_of(log_p, log_q, reopold.Args(lam=lam))
    assert floored.tolist() == pytest.approx([0.5, -1.0, reopold.lowest_reward(lam)])
    free = reopold.reward_of(log_p, log_q, reopold.Args(lam=lam, floor=False))
    assert free.tolist() == pytest.approx([0.5, -1.0, -29.0])


@pytest.fixture(scope="module")
def by_token():
    """One position, 7 tokens: p, the objective's gradients [token, logit] with and without stop-gradient, and R."""
    torch.manual_seed(1)
    z, y = torch.randn(7, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    log_q, zero = y.log_softmax(-1), torch.zeros(7, dtype=torch.float64)
    found = {}
    for stop in (True, False):
        args = reopold.Args(stop_gradient=stop, floor=False)
        rows = z.repeat(7, 1).requires_grad_()
        objective = reopold.terms(rows, torch.arange(7), None, log_q, zero, args=args)[0]
        found[stop] = torch.autograd.grad(objective.sum(), rows)[0]
    return z.softmax(-1), found[True], found[False], log_q - z.log_softmax(-1)


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
    # KL(p || q) with log p - log q = -R, whose own gradient has mean zero
    kl = (z.softmax(-1) * (-reward)).sum()
    expected = -torch.autograd.grad(kl, z)[0]
    torch.testing.assert_close(p @ fixed, expected)
    torch.testing.assert_close(p @ through, expected)
    generator = torch.Generator().manual_seed(0)
    picks = torch.multinomial(p, 200_000, replacement=True, generator=generator)
    for each in (fixed, through):
        samples = each[picks]
        error = samples.std(0) / math.sqrt(len(picks))
        assert ((samples.mean(0) - expected).abs() < 4 * error).all()


def test_the_stop_gradient_lowers_the_variance():
    """In every one of 20 random pairs: summed over the logits."""
    one = torch.eye(50, dtype=torch.float64)
    for seed in range(20):
        torch.manual_seed(seed)
        log_p, log_q = (torch.randn(50, dtype=torch.float64).log_softmax(-1) for _ in range(2))
        p, reward = log_p.exp(), log_q - log_p
        size = (one - p).square().sum(-1)
        mean = (p * reward) @ (one - p)
        with_it, without = (
            (p * a.square() * size).sum() - mean.square().sum() for a in (reward, reward - 1)
        )
        assert with_it < without


def weighed(micros, step=1, **settings):
    """M of every micro-batch and their weights, at a step of ten; and what the user was told."""
    notes = []
    run = SimpleNamespace(step=step, total=10, note=notes.append)
    for m in micros:
        m.length = torch.ones(len(m.old))
    reopold.weigh(micros, run, reopold.Args(**settings))
    assert all(list(m.weights) == ["objective"] for m in micros)
    return [m.kept for m in micros], [m.weights["objective"] for m in micros], notes


def micro(**values):
    return SimpleNamespace(**{name: torch.tensor(x) for name, x in values.items()})


def test_exploration_drops_exactly_what_is_below_the_floor():
    lowest = reopold.lowest_reward(0.3)
    micros = [
        micro(log_q=[-1.0, -4.0, -1.0 + lowest + 1e-3], old=[-2.0, -1.0, -1.0]),
        micro(log_q=[-1.0 + lowest - 1e-3, -math.inf, -1.0], old=[-1.0, -1.0, -1.0]),
    ]
    kept, weights, _ = weighed(micros)
    assert [mask.tolist() for mask in kept] == [[True, False, True], [False, False, True]]
    third = pytest.approx(-1 / 3)  # Eq. 4 is maximised, and divides by the kept tokens of all
    assert [w.tolist() for w in weights] == [[third, 0, third], [0, 0, third]]


@pytest.mark.parametrize("beta, count", [(0.2, 20), (0.05, 5), (0.99, 99), (1.0, 101)])
def test_refinement_keeps_exactly_the_most_uncertain_share(beta, count):
    """Of 101 tokens in two micro-batches the 1 + floor(100 beta) with the largest entropy."""
    entropies = torch.rand(101, generator=torch.Generator().manual_seed(0))
    micros = [SimpleNamespace(entropy=part, old=part, log_q=part) for part in entropies.split(60)]
    mask = torch.cat(weighed(micros, step=6, beta=beta)[0])
    assert mask.sum() == math.floor(100 * beta + 1e-9) + 1 and abs(mask.sum() - count) <= 1
    assert entropies[mask].min() >= entropies[~mask].max() if beta < 1 else mask.all()


@pytest.mark.parametrize("settings", [{"select": False}, {"method": "gkd"}, {"method": "grpo"}])
def test_what_selects_nothing_keeps_every_token(settings):
    """In the second phase, with neither entropies nor old log-probs to look at."""
    m = SimpleNamespace(old=torch.zeros(4), log_q=torch.full((4,), -50.0))
    kept, weights, _ = weighed([m], step=6, **settings)
    assert kept[0].all() and weights[0].tolist() == [-0.25] * 4


def test_the_switch():
    """Ten steps, half of them explore: 1 to 5. The user is told where all of them do."""
    run = SimpleNamespace(total=10)

    def exploring(**settings):
        args = reopold.Args(**settings)
        return [step for step in range(1, 11) if reopold.explores(step, run, args)]

    assert exploring() == [1, 2, 3, 4, 5] and exploring(switch=0.3) == [1, 2, 3]
    assert exploring(switch=0.0) == exploring(explore=False) == exploring(method="gkd") == []
    m = micro(log_q=[-1.0], old=[-1.0], entropy=[1.0])
    told = {switch: weighed([m], switch=switch)[2] for switch in (0.5, 0.9, 0.91, 1.0)}
    assert not told[0.5] and not told[0.9]
    assert "--switch 1.0 lies behind the last step" in told[1.0][0] and len(told[0.91]) == 1


def test_without_any_kept_token_the_weights_are_zero():
    m = SimpleNamespace(log_q=torch.full((3,), -50.0), old=torch.zeros(3))
    _, (weights,), _ = weighed([m])
    assert not weights.any() and weights.isfinite().all()


def test_a_token_that_the_teacher_excludes_has_the_floor_as_its_reward():
    z = torch.randn(2, 9, requires_grad=True)
    log_q, ids = torch.tensor([-math.inf, -1.0]), torch.tensor([3, 4])
    objective = reopold.terms(z, ids, None, log_q, torch.zeros(2), args=reopold.Args())[0]
    (gradient,) = torch.autograd.grad(objective.sum(), z)
    assert objective[0].item() == pytest.approx(reopold.lowest_reward(0.3))
    assert gradient.isfinite().all()


def test_the_ratio_is_clipped_pessimistically():
    """Ratios 2 and 1/2 with a good and a bad reward: clipped where the step was already taken, and nowhere else."""
    z, ids = torch.zeros(4, 2, requires_grad=True), torch.zeros(4, dtype=torch.long)
    now = -math.log(2)
    high, low = now - math.log(2), now + math.log(2)  # old log-probs of ratios 2 and 1/2
    old = torch.tensor([high, low, high, low])
    log_q = torch.tensor([now + 1, now + 1, now - 1, now - 1])  # rewards 1, 1, -1, -1
    found = reopold.terms(z, ids, old, log_q, torch.zeros(4), args=reopold.Args())
    objective, reward, clipped, *_ = found
    assert reward.tolist() == pytest.approx([1, 1, -1, -1]) and clipped.tolist() == [1, 0, 0, 1]
    assert objective.tolist() == pytest.approx([1.2, 0.5, -2, -0.8])
    unmoved = torch.autograd.grad(objective.sum(), z)[0].norm(dim=-1) == 0
    assert unmoved.tolist() == [True, False, False, True]


PLAIN = dict(select=False, explore=False)


@pytest.mark.parametrize(
    "settings, reads",
    [
        (dict(), True),
        (dict(explore=False), True),
        (dict(select=False), True),
        (PLAIN, False),
        (PLAIN | dict(updates=2), True),
        (dict(method="grpo"), False),
        (dict(method="grpo", updates=2), True),
        (dict(method="gkd"), False),
        (dict(method="skew"), False),
        (dict(method="sft", updates=2), False),
    ],
    ids=str,
)
def test_the_policy_reads_only_where_a_mask_or_a_ratio_needs_it(tiny, tiny_rows, settings, reads):
    """Once a micro-batch; else there is no old log-prob. A full divergence keeps the teacher's hidden states."""
    processor = common.Processor(str(tiny / "student"))
    args = reopold.Args(**settings, micro_tokens=500)
    passes = []
    run = SimpleNamespace(processor=processor, head=None, teacher=lambda batch: "hidden")
    run.log_probs = lambda m, hidden, head: torch.full(m.ids.shape, -2.0)
    run.student = lambda batch, fn: passes.append(batch) or ("log-probs", "entropies")
    micros = reopold.score(samples_of(processor, tiny_rows, {}), run, args)
    assert len(micros) > 1 and len(passes) == (len(micros) if reads else 0)
    for m in micros:
        assert m.old == ("log-probs" if reads else None)
        assert m.teacher == (["hidden"] if args.method in ("gkd", "skew") else [])
        assert m.log_q.tolist() == [-2.0] * len(m.ids)


def updated(args, kept=True):
    """What an update logs of twenty tokens in two micro-batches, whose rewards are 0, -1, ... -19; and the notes."""
    notes = []
    number = torch.arange(20.0)
    terms = {
        "log_ratio": -number,
        "clipped": (number == 3).float(),
        "entropy": number,
        "log_p": -number,
    }
    micros = []
    for part in (slice(0, 7), slice(7, 20)):
        m = SimpleNamespace(terms={name: x[part] for name, x in terms.items()})
        m.kept = (number[part] < 5) & kept
        micros.append(m)
    run = SimpleNamespace(update=lambda *_: {"sampler_gap": 0.5, "loss": 1.0}, note=notes.append)
    return reopold.update(micros, run, args), notes


def test_the_curves():
    log, notes = updated(reopold.Args())
    assert log["kept"] == pytest.approx(0.25) and log["clipped"] == pytest.approx(0.05)
    assert log["log_ratio"] == pytest.approx(-9.5)
    assert log["below_floor"] == pytest.approx(18 / 20)  # all but 0 and -1
    assert log["sampler_gap"] == 0.5 and not notes
    counts = [0] * (len(reopold.EDGES) + 1)
    for reward in range(-19, 1):
        counts[sum(edge < reward for edge in reopold.EDGES)] += 1
    assert log["log_ratio_histogram"] == pytest.approx([n / 20 for n in counts])
    assert log["log_ratio_by_entropy"] == pytest.approx([2 * i + 0.5 for i in range(10)])
    assert "sampler_gap" not in updated(reopold.Args(method="sft"))[0]
    assert set(updated(reopold.Args(method="grpo"))[0]) == {
        "sampler_gap",
        "loss",
        "clipped",
        "kept",
    }


def test_an_update_that_keeps_no_token_says_so():
    log, notes = updated(reopold.Args(), kept=False)
    assert log["kept"] == 0 and notes == ["no token was kept: the gradient is zero"]


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "changes",
    [
        {"updates": 2, "warmup": 1},
        {"method": "grpo", "teacher": None, "group": 2},
        {"method": "sft"},
    ],
    ids=str,
)
def test_real_runs(tiny, tmp_path, changes):
    result = run_script("reopold.py", *flags(tiny, tmp_path / "run", **{"updates": 1} | changes))
    assert result.returncode == 0, result.stderr
    lines = metrics(tmp_path / "run")
    assert {"kept", "entropy", "clipped", "grad_norm", "acc@1", "seconds/score"} <= set(lines[-1])
    # an untrained student is never right: every advantage is zero
    if changes.get("method") == "grpo":
        return
    assert lines[-1]["grad_norm"] > 0
    for line in lines[1:]:
        assert sum(line["log_ratio_histogram"]) == pytest.approx(1, abs=1e-4)
        assert len(line["log_ratio_by_entropy"]) == 10
    if "method" not in changes:
        # exploring: what is not below the floor at the first update
        assert lines[1]["kept"] == pytest.approx(1 - lines[1]["below_floor"], abs=0.05)
        assert lines[2]["kept"] < 0.3  # refining
        # of four updates: 0, 1 and 2/3, 1/3
        assert [line["lr"] for line in lines[1:]] == pytest.approx([0.5e-3, 0.5e-3])


def test_text_alone_on_two_ranks(tiny, tmp_path):
    changes = dict(
        student=tiny / "text-only",
        teacher=tiny / "text-only",
        data=tiny / "text.parquet",
        eval_data=tiny / "text.parquet",
        column_problem="text_problem",
        lr=1e-9,
    )
    result = run_script("reopold.py", *flags(tiny, tmp_path / "run", **changes), ranks=2)
    assert result.returncode == 0, result.stderr
    # it is its own teacher
    assert metrics(tmp_path / "run")[-1]["log_ratio"] == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("which", ["data", "eval_data"])
def test_a_text_only_student_is_refused_rows_with_images(tiny, tmp_path, which):
    """It would answer without them, and nobody would know."""
    changes = dict(data=tiny / "text.parquet", eval_data=tiny / "text.parquet")
    changes |= dict(student=tiny / "text-only", teacher=tiny / "text-only")
    changes |= {"column_problem": "text_problem", which: tiny / "rows.parquet"}
    said = refusal("reopold.py", flags(tiny, tmp_path / "run", **changes))
    assert "shows 0 of the prompt's 1 images" in said


@pytest.mark.parametrize(
    "message, argv",
    [
        ("--lam is 1.0", "--lam 1"),
        ("--lam is 0.0", "--lam 0"),
        ("--beta is 0.0", "--beta 0"),
        ("--beta is 1.5", "--beta 1.5"),
        ("--switch is -1.0", "--switch -1"),
        ("--switch is 1.5", "--switch 1.5"),
        ("--clip is 1.5", "--clip 1.5"),
        ("--calls is -1", "--calls -1"),
        ("--group to at least 2", "--method grpo"),
    ],
)
def test_bad_settings(message, argv):
    argv = ["--preset", "toy", *argv.split()]
    with pytest.raises(common.UserError) as error:
        reopold.check(common.parse_args(reopold.Args, reopold.PRESETS, reopold.RANGES, argv))
    assert message in error.value.code


@pytest.mark.parametrize("preset", reopold.PRESETS)
def test_presets_are_accepted(preset):
    argv = ["--preset", preset, "--engine", "hf"]
    reopold.check(common.parse_args(reopold.Args, reopold.PRESETS, reopold.RANGES, argv))
