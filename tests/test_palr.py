"""tools/palr.py: leakage by hand, and a whole measurement against float64, token by token."""

import json
import math

import common
import vigos
from tools import palr

import datasets
import pytest
import torch
from conftest import flags, reads_beside_a_sampler, run_here, run_script
from exact import read
from gradients_vigos import teach_form


def test_leakage_by_hand():
    """Two tokens, two wrong answers.

    log q - log p = .5, -1: s = .5, 1. c_A = log(.4 / .2), 0; c_I = log(.4 / .1), log(.3 / .2).
    """
    q = torch.tensor([0.4, 0.3]).log()
    student = q - torch.tensor([0.5, -1.0])
    wrong = torch.tensor([[0.1, 0.2], [0.3, 0.6]]).log()
    a, both = palr.leakage(student, q, wrong, torch.tensor([0.1, 0.2]).log()).tolist()
    assert a == pytest.approx(0.5 * math.log(2))
    assert both == pytest.approx(a + 0.5 * math.log(4) + math.log(1.5))


def test_leakage_of_a_teacher_that_ignores_the_answer_or_the_image():
    student, q, other = (torch.randn(30).sigmoid().log() for _ in range(3))
    deaf = palr.leakage(student, q, q.repeat(4, 1), other)  # the same with every answer
    blind = palr.leakage(student, q, other.repeat(4, 1), q)  # the same with every image
    nothing = palr.leakage(student, q, q[None, :][:0], other)  # knows no answer
    assert deaf[1] > 0 and nothing[1] > 0 and blind[1] > 0
    assert palr.rate(deaf) == pytest.approx(0, abs=1e-4) and palr.rate(nothing) == 0
    assert palr.rate(blind) == pytest.approx(100)
    assert palr.rate(torch.zeros(2)) is None


def test_wrong_answers_are_different_and_wrong():
    candidates = [None, " ", "3", "$7$", "7", ["8", "3"], "3.0", float("nan"), 9, "10"]
    assert palr.choose_wrong(candidates, "3", 3) == ["$7$", "8", "9"]
    assert palr.choose_wrong(candidates, ["3", "7"], 9) == ["8", "9", "10"]


@pytest.fixture(scope="module")
def parrot(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parrot") / "student"
    teach_form(tiny, folder)
    return folder


def measure(tiny, student, output, ranks=0, **changes):
    """Greedy, unless told otherwise."""
    values = dict(student=student, max_response=64, eval_rows=0, top_k=1, teacher=None)
    values |= dict(data=None, prompts=None, max_steps=None, eval_every=None)
    argv = flags(tiny, output, **values | changes)
    if ranks:
        result = run_script("-m", "tools.palr", *argv, ranks=ranks)
    else:
        result = run_here("tools.palr", *argv)
    found = json.loads((output / "palr.json").read_text()) if result.returncode == 0 else None
    return result, found


def with_wrong(tiny, folder, wrong: list):
    """The tiny rows with a column "others" of wrong answers."""
    data = datasets.load_dataset("parquet", data_files=str(tiny / "rows.parquet"), split="train")
    data.add_column("others", wrong).to_parquet(folder / "rows.parquet")
    return data


def test_a_real_run_with_the_students_own_wrong_answers(tiny, parrot, tmp_path):
    """No leakage into a description by a teacher that was not told, some into all else."""
    changes = dict(top_k=0, temperature=0.3)
    result, found = measure(tiny, parrot, tmp_path / "run", **changes)
    assert result.returncode == 0, result.stderr
    assert found["responses"] == 24 and found["used"] == 24 - found["out_of_form"] > 12
    assert found["wrong_answers"] == pytest.approx(4, abs=0.3)
    opsd, ours = found["palr"]["opsd"], found["palr"]["vigos"]
    assert ours["description"] == 0 < ours["reasoning"] < 99
    assert 0 < opsd["description"] < 99 and opsd["reasoning"] == ours["reasoning"]
    assert 0 < ours["both"] < opsd["both"] < 99


def expected_rates(rows, processor, responses, student, teacher) -> tuple[dict, int]:
    """PALR in % by (method, part), and the number of responses in form: one token at a time, from probabilities."""

    def probabilities(lm, context, ids):
        with torch.no_grad():
            found = read(lm, processor.encode(context), ids, processor.image_id, processor.vocab)
        return found[range(len(ids)), ids]

    parts = ("description", "reasoning")
    sums = {(method, part): [0.0, 0.0] for method in ("opsd", "vigos") for part in parts}
    used = 0
    for i, response in enumerate(responses):
        ids, row = response.ids, rows[i]
        spans = vigos.find_spans(processor.tokenizer.convert_ids_to_tokens(ids))
        if spans is None:
            continue
        used += 1
        beside = row | {"images": rows[(i + 1) % len(rows)]["images"]}

        def told(row, answer):
            return vigos.privileged(row | {"reference": answer})

        p = probabilities(student, vigos.question(row), ids)
        q = {
            "image": probabilities(teacher, vigos.image_alone(row), ids),
            "told": probabilities(teacher, told(row, row["answer"]), ids),
        }
        other = {
            "image": probabilities(teacher, vigos.image_alone(beside), ids),
            "told": probabilities(teacher, told(beside, row["answer"]), ids),
        }
        misled = sum(probabilities(teacher, told(row, answer), ids) for answer in ("77", "88")) / 2
        for method, part in sums:
            view = "image" if (method, part) == ("vigos", "description") else "told"
            for t, inside in enumerate(spans[parts.index(part)]):
                if not inside:
                    continue
                s = abs((q[view][t] / p[t]).log())
                by_answer = max(0.0, (q[view][t] / misled[t]).log()) if view == "told" else 0.0
                by_image = max(0.0, (q[view][t] / other[view][t]).log())
                sums[method, part][0] += float(s * by_answer)
                sums[method, part][1] += float(s * (by_answer + by_image))
    rates = {}
    for method in ("opsd", "vigos"):
        both = [sum(x) for x in zip(*(sums[method, part] for part in parts))]
        for part, (a, all_of_it) in zip(
            (*parts, "both"), (*(sums[method, p] for p in parts), both)
        ):
            rates[method, part] = 100 * a / all_of_it
    return rates, used


def test_against_float64(tiny, parrot, tmp_path):
    """The student is not the teacher, and wrong answers come from a column; two ranks agree."""
    data = datasets.load_dataset("parquet", data_files=str(tiny / "rows.parquet"), split="train")
    with_wrong(tiny, tmp_path, [["77", row["answer"], None, " ", "88"] for row in data])
    moved = common.Model(str(parrot), torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in moved.parameters():
            if parameter.numel() > 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.02 * noise * parameter.std())
    processor = common.Processor(str(parrot))
    common.save_checkpoint(moved.lm, processor, tmp_path / "moved")
    changes = dict(teacher=parrot, column_wrong="others", eval_data=tmp_path / "rows.parquet")
    result, found = measure(tiny, tmp_path / "moved", tmp_path / "one", **changes)
    assert result.returncode == 0, result.stderr
    assert found["wrong_answers"] == 2 and found["used"] > 12

    args = common.Args(data=str(tmp_path / "rows.parquet"))
    args.dtype, args.max_response = "float32", 64
    rows = common.load_rows(args, processor, {}, "problem images answer")
    engine = common.HFEngine(str(tmp_path / "moved"), processor, args)
    responses = engine.generate([processor.encode(vigos.question(rows[i])) for i in range(24)])
    student, teacher = (
        common.Model(str(name), torch.float64).lm for name in (tmp_path / "moved", parrot)
    )
    expected, used = expected_rates(rows, processor, responses, student, teacher)
    assert used == found["used"]
    for (method, part), value in expected.items():
        assert found["palr"][method][part] == pytest.approx(value, rel=1e-3, abs=1e-6)

    changes |= dict(micro_tokens=400, ranks=2)
    result, two = measure(tiny, tmp_path / "moved", tmp_path / "two", **changes)
    assert result.returncode == 0, result.stderr
    assert two["used"] == found["used"]
    assert two["palr"]["opsd"] == pytest.approx(found["palr"]["opsd"], rel=1e-3)


def test_the_sampler_sleeps_while_models_read(tiny, parrot, tmp_path, monkeypatch):
    read = reads_beside_a_sampler(monkeypatch)
    result, _ = measure(tiny, parrot, tmp_path / "run")
    assert result.returncode == 0 and read and not any(read), result.stderr


def test_the_teacher_of_a_trained_student_has_to_be_named(tiny, tmp_path):
    (tmp_path / "args.json").write_text('{"student": "the-initial-one"}')
    result, _ = measure(tiny, tmp_path / "final", tmp_path / "run")
    message = "was trained from 'the-initial-one': name that with --teacher"
    assert result.returncode != 0 and message in result.stderr


@pytest.mark.parametrize("wrong", [["12, 34"] * 24, [[]] * 12 + [None] * 12], ids=["text", "empty"])
def test_wrong_answers_have_to_be_lists(tiny, tmp_path, wrong):
    with_wrong(tiny, tmp_path, wrong)
    changes = dict(eval_data=tmp_path / "rows.parquet", column_wrong="others")
    result, _ = measure(tiny, tiny / "student", tmp_path / "run", **changes)
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert "column 'others'" in result.stderr and "lists of wrong answers" in result.stderr


def test_leakage_of_nothing_is_no_zero(tiny, tmp_path):
    result, _ = measure(tiny, tiny / "student", tmp_path / "run", max_response=4)
    message = "none of the 24 responses can be used: 24 are out of form"
    assert result.returncode != 0 and message in result.stderr


def test_held_out_questions_have_to_be_named(tiny, tmp_path):
    result, _ = measure(tiny, tiny / "student", tmp_path / "run", eval_data="")
    assert result.returncode != 0 and "name it with --eval-data" in result.stderr
