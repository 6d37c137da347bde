"""PTD-PO's pieces on worked examples: routing, advantages, clips, ratios, contexts, F, and what a run refuses."""

import json
import math

import common
import ptdpo
from kernels import topk_tail_divergence

import pytest
import torch
from conftest import flags, refusal, run_script


def test_eq_7_8_routing():
    correct = [True, True, False, True, False, False]
    assert ptdpo.route(correct, 2, 1.0) == (
        [False, False, True, True, True, True],
        [False, False, True, False, True, True],
    )
    assert ptdpo.route(correct, 2, 0.5) == (
        [False] * 4 + [True, True],
        [False] * 4 + [True, True],
    )  # strictly below tau
    assert ptdpo.route([False] * 5 + [True] * 5, 5, 0.2)[1] == [True] * 5 + [False] * 5
    assert ptdpo.route([True] + [False] * 4, 5, 0.2)[1] == [False] * 5


def terms_of(*tensors, **settings) -> dict:
    """ptdpo.terms by name."""
    return dict(zip(ptdpo.TERMS, ptdpo.terms(*tensors, args=ptdpo.Args(**settings)), strict=True))


def test_eq_67_to_69_an_all_fail_group_has_no_policy_gradient_and_is_tutored_all_the_same():
    advantages = common.group_advantages(torch.tensor([0.0] * 4 + [1.0, 0.0, 0.0, 1.0]), 4)
    assert (advantages[:4] == 0).all()
    for group in range(
        2, 17
    ):  # 0.9 and 0.1 are not exact in float32, and the mean of several is not either
        for reward in (0.1, 0.9, 1 - 0.1):
            assert (common.group_advantages(torch.full((2 * group,), reward), group) == 0).all()
    torch.testing.assert_close(
        advantages[4:], torch.tensor([1.0, -1.0, -1.0, 1.0]) * 0.5 / (math.sqrt(1 / 3) + 1e-6)
    )
    z, y = torch.randn(4, 30, requires_grad=True), torch.randn(4, 30)
    zero = torch.zeros(4)
    named = terms_of(z, y, torch.arange(4), zero - 3, None, advantages[:4], support=10)
    surrogate = torch.autograd.grad(named["surrogate"].sum(), z, retain_graph=True)[0]
    assert surrogate.abs().max() == 0
    assert torch.autograd.grad(named["ptd"].sum(), z)[0].norm(dim=-1).min() > 1e-3


def test_eq_42_the_tutors_pull():
    """dD/dz = 1/2 p (log p/m - E_p log p/m), at K = V."""
    z, y = (
        torch.randn(5, 40, dtype=torch.float64, requires_grad=True),
        torch.randn(5, 40, dtype=torch.float64),
    )
    value = topk_tail_divergence(z, y, 40)
    p, q = z.detach().softmax(-1), y.softmax(-1)
    ratio = (p / ((p + q) / 2)).log()
    torch.testing.assert_close(
        torch.autograd.grad(value.sum(), z)[0],
        p * (ratio - (p * ratio).sum(-1, keepdim=True)) / 2,
        rtol=1e-10,
        atol=1e-14,
    )


def test_outside_f_there_is_no_tutor_and_without_a_reference_no_kl():
    z, y = torch.randn(5, 30), torch.randn(5, 30)
    rest = [torch.arange(5), torch.zeros(5) - 3, torch.zeros(5) - 2, torch.ones(5)]
    inside, outside = terms_of(z, y, *rest, support=10), terms_of(z, *rest, support=10)
    for name in ("ptd", "student_tail", "tutor_tail", "ptd_gap_bound"):
        assert (inside[name] > 0).all() and (outside[name] == 0).all()
    assert torch.equal(inside["surrogate"], outside["surrogate"])
    assert torch.equal(inside["kl"], outside["kl"]) and (inside["kl"] > 0).all()
    rest[2] = None
    assert (terms_of(z, *rest)["kl"] == 0).all()


RATIOS = [(1.5, 1.0, 1.28, True), (1.5, -1.0, -1.5, False), (0.5, 1.0, 0.5, False)]
RATIOS += [(0.5, -1.0, -0.8, True), (1.1, 1.0, 1.1, False), (1.5, 0.0, 0.0, False)]


@pytest.mark.parametrize("ratio, advantage, value, clipped", RATIOS)
def test_clip_higher(ratio, advantage, value, clipped):
    z = torch.randn(1, 30, requires_grad=True)
    ids, log_p = torch.tensor([4]), z.detach().log_softmax(-1)[:, 4]
    old = log_p - math.log(ratio)
    named = terms_of(z, ids, old, log_p, torch.tensor([advantage]), optimizer="dapo")
    assert named["surrogate"].item() == pytest.approx(value, rel=1e-5)
    assert bool(named["clipped"]) == clipped
    moves = torch.autograd.grad(named["surrogate"].sum(), z)[0].abs().max() > 0
    assert moves == (not clipped and advantage != 0)


def test_what_each_optimizer_stands_for():
    """Table 4, and the clip of the released code."""
    rows = {
        name: (row.clip_low, row.clip_high, row.kl, row.average)
        for name, row in ptdpo.OPTIMIZERS.items()
    }
    assert rows == {
        "grpo": (0.2, 0.3, 0.01, "token"),
        "dapo": (0.2, 0.28, 0.0, "token"),
        "gspo": (3e-4, 4e-4, 0.0, "response"),
    }


def test_k3():
    log_p, reference = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.0, -1.0, -3.0])
    wanted = [0.0, math.e - 2, math.exp(-2.5) + 1.5]
    torch.testing.assert_close(common.k3(log_p, reference), torch.tensor(wanted))


def test_gspo_ratio_of_the_response():
    """Two responses, of two tokens and one: the gradient of min(s A, clip(s) A) / R with s = exp(mean log-ratio)."""
    now, old = (
        torch.tensor([-1.0, -2.0, -0.7], requires_grad=True),
        torch.tensor([-1.0002, -1.9996, -1.0]),
    )
    length, response, advantage = (
        torch.tensor([2.0, 2.0, 1.0]),
        torch.tensor([0, 0, 1]),
        torch.tensor([1.0, 1.0, -2.0]),
    )
    log_ratio = now - old
    s = torch.stack([log_ratio[:2].mean().exp(), log_ratio[2].exp()])
    a = torch.tensor([1.0, -2.0])
    wanted = torch.minimum(s * a, s.clamp(1 - 3e-4, 1 + 4e-4) * a).sum() / 2
    of_tokens = common.sequence_old(now.detach(), old, length, response)
    surrogate, _ = common.clipped_surrogate(now, of_tokens, advantage, 3e-4, 4e-4)
    ours = (surrogate / (2 * length)).sum()
    torch.testing.assert_close(ours, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(x, now)[0] for x in (ours, wanted)))


FORMS = {
    "<think>2 + 2</think> \\boxed{4}": True,
    "2 + 2</think>\n\\boxed{4}": True,
    "\\boxed{4}": False,
    "<think>2 + 2</think> 4": False,
    "<think>a</think><think>b</think> \\boxed{4}": False,
    "<think>a <think>b</think> \\boxed{4}": False,
    "<think>a \\boxed{4}": False,
    "": False,
    "<think>a</think> \\boxed{1} <think>b</think> \\boxed{2}": False,
    "a</think> \\boxed{1}</think> \\boxed{2}": False,
    "<think>a</think> \\boxed{4": False,
    "<think>a</think> <answer>4</answer>": False,
    "<think>a</think> so \\boxed{\\frac{1}{2}}, done": True,
}


@pytest.mark.parametrize("text", FORMS)
def test_form(text):
    assert ptdpo.well_formed(text) == FORMS[text]


def test_what_the_tutor_reads_and_the_student_does_not(tiny, tiny_rows):
    """On token ids: hint, answer and solution are nowhere in the student's prompt, but in the tutor's."""
    processor = common.Processor(str(tiny / "student"))
    row = tiny_rows[0] | {
        "answer": "zebra",
        "hint": "look at the giraffe",
        "solution": "an elephant",
    }
    ids = {
        knows: processor.encode(ptdpo.tutored(row, knows)).ids
        for knows in ("question", "hint", "answer", "solution")
    }
    texts = {knows: processor.tokenizer.decode(x) for knows, x in ids.items()}
    student = processor.encode(ptdpo.question(row)).ids
    assert student == ids["question"] and not any(
        word in texts["question"] for word in ("zebra", "giraffe", "elephant")
    )
    assert "giraffe" in texts["hint"] and "zebra" not in texts["hint"]
    assert "zebra" in texts["answer"] and "elephant" not in texts["answer"]
    assert "zebra" in texts["solution"] and "elephant" in texts["solution"]
    assert all(
        x.count(processor.image_id) == student.count(processor.image_id) > 0 for x in ids.values()
    )
    assert (
        processor.encode(ptdpo.tutored(row, "hint", blind=True)).ids.count(processor.image_id) == 0
    )
    for blind in (False, True):
        views = ptdpo.contexts(ptdpo.Args(blind_tutor=blind))
        found = {name: context(row) for name, context in views.items()}
        tutor = ptdpo.tutored(row, "hint", blind=blind)
        assert found == {"question": ptdpo.question(row), "tutor": tutor}
    assert ptdpo.contexts(ptdpo.Args(lambda_ptd=0.0)) == {"question": ptdpo.question}
    without = {key: value for key, value in row.items() if key != "hint"}
    assert ptdpo.tutored(row | {"hint": "  "}, "hint") is None is ptdpo.tutored(without, "hint")
    several = ptdpo.tutored(row | {"answer": ["a cone", "a cube"]}, "answer").messages[-1]
    text = "".join(part.get("text", "") for part in several["content"])
    assert "The answer is a cone." in text and "cube" not in text


def test_the_tutor_sees_the_image_and_reads_the_hint(tiny, tiny_rows):
    processor, model = (
        common.Processor(str(tiny / "student")),
        common.Model(str(tiny / "student"), torch.float32),
    )

    def hidden(row, **changes):
        with torch.no_grad():
            prompt = processor.encode(ptdpo.tutored(row | changes, "hint"))
            return model(processor.batch([prompt], [common.Response([5, 6, 7])]))

    plain = hidden(tiny_rows[0])
    assert (hidden(tiny_rows[0], images=tiny_rows[1]["images"]) - plain).abs().max() > 1e-3
    assert (hidden(tiny_rows[0], hint="Read it from right to left.") - plain).abs().max() > 1e-3


class FakeRun:
    """Draws batches of names; log keeps what is logged."""

    def __init__(self, *batches):
        self.batches, self.engine, self.logged, self.notes = iter(batches), None, {}, []

    def draw(self):
        return next(self.batches)

    def log(self, values):
        self.logged |= values

    def note(self, text):
        self.notes.append(text)


def answering(monkeypatch, texts: dict[str, list[str]], hinted=lambda name: True) -> None:
    """The student's answers to each name; 1 is right."""

    def answers(engine, rows, contexts, args):
        samples = []
        for name in rows:
            prompts = {"tutor": None} if hinted(name) else {}
            for text in texts[name]:
                response = common.Response([1], True, text)
                samples.append(
                    common.Sample(
                        {"problem": "", "answer": "1", "name": name}, dict(prompts), response
                    )
                )
        return samples

    monkeypatch.setattr(common, "sample_responses", answers)


RIGHT, WRONG, BARE = "<think>a</think> \\boxed{1}", "<think>a</think> \\boxed{2}", "\\boxed{1}"


def test_dynamic_sampling_draws_again(monkeypatch):
    """dapo keeps groups that are neither all right nor all wrong, and fills up with others after its last draw."""
    verdicts = {"a": [RIGHT] * 2, "b": [RIGHT, WRONG], "c": [WRONG] * 2, "d": [WRONG, RIGHT]}
    answering(monkeypatch, verdicts | {"e": [RIGHT, WRONG], "f": [RIGHT] * 2})
    args = ptdpo.Args(optimizer="dapo", prompts=2, group=2, draws=3)
    run = FakeRun(["a", "b"], ["c", "d"], ["e", "f"])
    samples = ptdpo.rollout(run.draw(), run, args)
    assert [s.row["name"] for s in samples] == ["b", "b", "d", "d"]
    assert run.logged["draws"] == 2 and run.logged["informative"] == 0.5  # of all four groups
    assert run.logged["all_pass"] == run.logged["all_fail"] == 0.25
    args.draws = 1
    assert [s.row["name"] for s in ptdpo.rollout(run.draw(), run, args)] == ["e", "e", "f", "f"]
    assert run.logged["draws"] == 1
    args.optimizer, again = "grpo", FakeRun(["a", "b"], ["c", "d"])
    assert [s.row["name"] for s in ptdpo.rollout(again.draw(), again, args)] == ["a", "a", "b", "b"]
    assert "draws" not in again.logged


def test_dynamic_sampling_fills_up_in_the_order_of_drawing(monkeypatch):
    """So that no update gets only groups without an advantage."""
    answering(
        monkeypatch, {"a": [RIGHT, WRONG], "b": [WRONG] * 2, "c": [RIGHT, WRONG], "d": [WRONG] * 2}
    )
    args = ptdpo.Args(optimizer="dapo", prompts=4, group=2, draws=1, updates=2)
    run = FakeRun(list("abcd"))
    assert [s.row["name"] for s in ptdpo.rollout(run.draw(), run, args)] == list("aabbccdd")


def test_a_rollout_rewards_the_form_and_tutors_by_the_answer_alone(monkeypatch):
    """Two right answers, one without a thought; a right and a wrong one, both in form; a row without a hint."""
    answering(
        monkeypatch,
        {"a": [RIGHT, BARE], "b": [RIGHT, WRONG], "c": ["\\boxed{2}", BARE]},
        "c".__ne__,
    )
    run = FakeRun(["a", "b", "c"])
    samples = ptdpo.rollout(run.draw(), run, ptdpo.Args(prompts=3, group=2))
    assert [s.reward for s in samples] == pytest.approx([1.0, 0.9, 1.0, 0.1, 0.0, 0.9])
    assert [s.correct for s in samples] == [True, True, True, False, False, True]
    assert [s.below_tau for s in samples] == [False, False, True, True, True, True]
    assert [s.tutored for s in samples] == [False, False, False, True, False, False]
    assert all(s.advantage != 0 for s in samples) and run.notes == []
    statistics = {"all_pass": 1 / 3, "informative": 2 / 3, "all_fail": 0, "without_hint": 1 / 3}
    assert run.logged == pytest.approx(
        statistics | {"correct": 4 / 6, "well_formed": 3 / 6, "with_advantage": 1}
    )
    answering(monkeypatch, {"a": [WRONG, WRONG]})
    samples = ptdpo.rollout(["a"], run, ptdpo.Args(prompts=1, group=2))
    assert "only the tutor teaches" in run.notes[0] and all(s.tutored for s in samples)


# ----------------------------------------------------------------------------------------------- real runs
RUNS = [
    {},
    {"optimizer": "dapo", "draws": 2, "updates": 2},
    {"optimizer": "gspo", "updates": 2},
    {"optimizer": "gspo", "lambda_ptd": 0},
    {"tutor_context": "solution", "tutor_all": ""},
    {"dtype": "bfloat16"},
]


@pytest.mark.parametrize("changes", RUNS, ids=str)
def test_real_runs(tiny, tmp_path, changes):
    argv = flags(tiny, tmp_path / "run", teacher=None, group=4, **changes)
    argv = [part for part in argv if part]
    result = run_script("ptdpo.py", *argv)
    assert result.returncode == 0, result.stderr
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    assert [m["step"] for m in metrics] == [0, 1, 2]
    assert (tmp_path / "run" / "final" / "config.json").exists()
    last = metrics[-1]
    assert {
        "reward",
        "all_fail",
        "informative",
        "all_pass",
        "entropy",
        "response_length",
        "finished",
    } <= last.keys()
    assert ("ptd" in last) == ("tutored_tokens" in last) == (changes.get("lambda_ptd") != 0)
    assert ("kl" in last) == ("optimizer" not in changes)
    if not changes:  # untrained models: everything fails, nothing has an advantage, the tutor still moves the student
        assert (
            last["all_fail"] == last["tutored_tokens"] == 1
            and last["ptd"] > 0
            and last["grad_norm"] > 0
        )
        assert (
            "the policy gradient is zero, only the tutor teaches" in result.stdout + result.stderr
        )
        assert 0 < last["student_tail"] < 1 and 0 < last["ptd_gap_bound"] <= math.log(2)
        there = [str(tmp_path / "two") if part == str(tmp_path / "run") else part for part in argv]
        two = run_script("ptdpo.py", *there, ranks=2)
        assert two.returncode == 0, two.stderr


def test_rows_without_hints_are_left_out_and_counted(tiny, tmp_path):
    import datasets

    file = str(tiny / "rows.parquet")
    data = datasets.load_dataset("parquet", data_files=file, split="train")
    data.map(lambda row, i: {"hint": row["hint"] if i % 2 else ""}, with_indices=True).to_parquet(
        tmp_path / "some.parquet"
    )
    data.remove_columns("hint").to_parquet(tmp_path / "none.parquet")
    data.map(lambda row: {"hint": " "}).to_parquet(tmp_path / "blank.parquet")
    argv = flags(tiny, tmp_path / "run", teacher=None, group=2, data=tmp_path / "some.parquet")
    result = run_script("ptdpo.py", *argv)
    assert result.returncode == 0, result.stderr
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines][1:]
    assert 0 < sum(m["without_hint"] for m in metrics) / 2 < 1
    assert all(0 < m["tutored_tokens"] < 1 for m in metrics)
    for name in ("none", "blank"):
        argv = flags(
            tiny, tmp_path / name, teacher=None, group=2, data=tmp_path / f"{name}.parquet"
        )
        said = refusal("ptdpo.py", argv)
        assert "has a hint in a column 'hint'" in said and "python -m tools.hints" in said
        assert "--column-hint" in said and "--lambda-ptd 0" in said and "solution" in said


REFUSED = [
    ("--group is 1", {"group": 1}),
    ("strange", {"optimizer": "strange"}),
    ("--tau is 0", {"tau": 0}),
    ("--tau is 1.5", {"tau": 1.5}),
    ("--lambda-ptd is -1", {"lambda_ptd": -1}),
    ("--draws is 0", {"draws": 0}),
    ("--support is 2000", {"support": 2000}),
    ("its tutor is --student", {"teacher": "some/model"}),
    ("the limits are 110", {"max_prompt": 110}),
]


@pytest.mark.parametrize("message, changes", REFUSED)
def test_bad_settings(tiny, tmp_path, message, changes):
    argv = flags(tiny, tmp_path / "run", **{"teacher": None, "group": 4} | changes)
    assert message in refusal("ptdpo.py", argv)
