"""tools/figures: VGS Figure 3, PTD-PO Figures 3 and 5."""

import json
import math

from tools import figures, scores

import pytest
import torch
from conftest import flags, reads_beside_a_sampler, run_here, run_script

NOT_READ = dict.fromkeys(("max_steps", "prompts", "data", "eval_every"))


def figure(method, argv, ranks=0):
    if ranks:
        result = run_script("-m", "tools.figures", method, *argv, ranks=ranks)
    else:
        result = run_here("tools.figures", method, *argv)
    assert result.returncode == 0, result.stderr
    return result


# also a rank without a question
@pytest.mark.parametrize("ranks, rows", [(0, 8), pytest.param(2, 1, marks=pytest.mark.slow)])
def test_angles_in_ten_bins(tiny, tmp_path, ranks, rows):
    settings = NOT_READ | {"eval_rows": rows, "max_response": 20}
    figure("vgs", flags(tiny, tmp_path / "run", **settings), ranks)
    table = json.loads((tmp_path / "run" / "angles.json").read_text())
    assert [line["bin"] for line in table] == list(range(10))
    for line in table:
        assert all(0 <= line[key] <= 180 for key in ("lang_vis", "std_vis", "std_lang"))
        assert line["norm_std"] > 0


def test_the_angle_between_two_gradients():
    one, other = (
        [torch.tensor([3.0, 0.0]), torch.tensor([0.0])],
        [torch.tensor([1.0, 1.0]), torch.tensor([0.0])],
    )
    assert figures.angle(one, other) == pytest.approx(45)
    assert figures.angle(one, [-x for x in one]) == pytest.approx(180)
    assert figures.angle(one, [0 * x for x in one]) is None


def test_shifts_and_pass_at_on_worked_examples():
    assert [scores.pass_at(4, 2, n) for n in (1, 2, 3, 4)] == [0.5, 1 - 1 / 6, 1.0, 1.0]
    assert scores.pass_at(4, 0, 2) == 0
    z, y = torch.randn(2, 3, 6, dtype=torch.float64)
    ids = torch.tensor([5, 0, 2])
    nll, nll_hint, kl, kl_hint = figures.shifts(z, y, ids)
    for i, token in enumerate(ids.tolist()):
        p, q = ((x[i].exp() / x[i].exp().sum()).tolist() for x in (z, y))
        assert nll[i].item() == pytest.approx(-math.log(p[token]))
        assert nll_hint[i].item() == pytest.approx(-math.log(q[token]))
        expected = sum(b * math.log(b / a) for a, b in zip(p, q))
        assert kl[i].item() == 0 and kl_hint[i].item() == pytest.approx(expected)


# one of three has no question
@pytest.mark.parametrize("ranks", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_contexts_of_a_tutor(tiny, tmp_path, ranks):
    settings = NOT_READ | {"teacher": None, "group": 4, "eval_rows": 2}
    result = figure("ptdpo", flags(tiny, tmp_path / "run", **settings), ranks)
    assert "2 of 2 questions have a hint and a solution" in result.stdout
    table = json.loads((tmp_path / "run" / "contexts.json").read_text())
    assert [line["context"] for line in table] == ["question", "answer", "hint", "solution"]
    assert table[0]["delta_nll"] == 0 and table[0]["kl"] == 0
    assert all(line["kl"] > 0 and line["length"] > 1 for line in table[1:])
    for line in table:
        assert line["hard_none"] + line["hard_some"] + line["hard_all"] == line["hard"] <= 2
        assert 0 <= line["pass@1"] <= line["pass@4"] <= 1


@pytest.mark.parametrize(
    "method, argv", [("", []), ("vold", []), ("vgs", ["--gamma", "0", "--lambda-lp", "0"])]
)
def test_what_has_no_figure_is_refused(method, argv):
    result = run_here("tools.figures", *filter(None, [method]), *argv)
    assert (
        result.returncode != 0 and "error: " in result.stderr and "Traceback" not in result.stderr
    )


@pytest.mark.parametrize("command", ["vgs.py", "tools.figures vgs", "tools.figures ptdpo"])
def test_the_sampler_sleeps_while_models_read(tiny, tmp_path, monkeypatch, command):
    read = reads_beside_a_sampler(monkeypatch)
    settings = {"max_response": 20} if command == "vgs.py" else NOT_READ | {"eval_rows": 4}
    if "ptdpo" in command:
        settings |= {"teacher": None}
    result = run_here(*command.split(), *flags(tiny, tmp_path / "run", **settings))
    assert result.returncode == 0 and read and not any(read), result.stderr
