"""The embedded default: its rows, its models, and that a build is whole or not there. The full build itself: test_default.py."""

import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from sklearn.datasets import load_digits

import common
import ptdpo
import toy


@pytest.fixture(scope="module")
def rows():
    digits = load_digits()
    return toy.make_rows(digits.images, digits.target, 600, seed=3)


def test_every_solution_ends_in_its_answer_in_every_format(rows):
    for row in rows:
        for style in ("reason", "think", "see-first"):
            text = toy.respond(row, style)
            assert common.is_correct(common.extract_answer(text), row["answer"]), text
        assert ptdpo.well_formed(toy.respond(row, "think"))
        assert text.startswith("<description>") and "</think>\n\\boxed{" in text
        assert row["images"][0].size == (3 * toy.SIDE, toy.SIDE) and row["images"][0].mode == "RGB"


def test_answers_recomputed_from_the_digits(rows):
    import re

    for row in rows:
        a, b, c = (int(d) for d in re.search(r"digits are (\d),(\d),(\d)\.", row["solution"]).groups())
        question = row["problem"].removeprefix("<image>")
        expected = {
            "What is the first digit plus the last digit?": a + c, "What is the first digit minus the last digit?": a - c,
            "Which digit is the largest?": max(a, b, c), "Which number do the digits form?": f"{a}{b}{c}",
            "How many digits are even?": [a % 2, b % 2, c % 2].count(0),
        }.get(question, "ABC"[[a, b, c].index(min(a, b, c))])
        assert row["answer"] == str(expected), row
        assert row["text_problem"] == f"The digits are {a},{b},{c}. {question}"


def test_the_hint_does_not_give_the_answer_away(rows):
    for row in rows:
        assert row["answer"] not in row["hint"].replace("Read the digits from left to right", "") and not any(d.isdigit() for d in row["hint"])


def test_question_kinds_are_balanced(rows):
    assert len({row["problem"] for row in rows}) == 6
    assert all(sum(row["problem"] == p for row in rows) == 100 for p in {row["problem"] for row in rows})


def test_captions_are_right_as_often_as_asked_and_wrong_where_it_matters(rows):
    captioned = toy.captioned(rows, 0.7, seed=1)
    named = [[int(c) for c in row["problem"].removeprefix("<image>Caption: ")[:5].split(",")] for row in captioned]
    right = [digits == toy.digits_of(row) for digits, row in zip(named, rows)]
    assert 0.6 < sum(right) / len(rows) < 0.8
    for i, (digits, row, told, true) in enumerate(zip(named, rows, captioned, right)):
        assert told["answer"] == row["answer"] and told["problem"].endswith(row["problem"].removeprefix("<image>"))
        assert (toy.working(toy.KINDS[i % 6], *digits)[2] == row["answer"]) == true


def test_conflicts_share_question_and_caption_and_differ_in_the_answer(rows):
    digits = load_digits()
    found = toy.conflicts(digits.images, digits.target, rows[:30], seed=1)
    assert [row["position"] for row in found] == ["1", "2", "3"] * 30
    for i, row in enumerate(rows[:30]):
        agreeing, *others = found[3 * i : 3 * i + 3]
        assert agreeing["answer"] == row["answer"] and toy.digits_of(agreeing) == toy.digits_of(row)
        assert all(other["problem"] == agreeing["problem"] and other["answer"] != row["answer"] for other in others)
        assert all(toy.working(toy.KINDS[i % 6], *toy.digits_of(other))[2] == other["answer"] for other in others)


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_both_families_build_train_and_answer(tmp_path, family, monkeypatch):
    """The whole build with a few steps a model: every checkpoint and data set is there and loads."""
    monkeypatch.setattr(toy, "TRAIN_ROWS", 60)
    monkeypatch.setattr(toy, "TEST_ROWS", 12)
    for name in ("TEACHER", "STUDENT", "TEXT_TEACHER"):
        monkeypatch.setattr(toy, name, [(10, dict.fromkeys(toy.CONTEXTS, 1) if name == "TEACHER" else {"text": 1})])
    toy.build(tmp_path / "toy", family)
    data = {name: common.Rows(str(tmp_path / "toy" / name), "train", {"problem": "problem"}) for name in ("train", "test")}
    assert (len(data["train"]), len(data["test"])) == (60, 12)
    assert set(data["train"][0]) >= {"problem", "images", "answer", "solution", "hint", "text_problem"}
    for name in ("teacher", "student", "text-teacher"):
        processor, model = common.Processor(str(tmp_path / "toy" / name)), common.Model(str(tmp_path / "toy" / name), torch.float32)
        assert (processor.image_id is None) == (name == "text-teacher") and model.lm.config.model_type == ("qwen3" if name == "text-teacher" else family)
    common.check_same_inputs(*(common.Processor(str(tmp_path / "toy" / name)) for name in ("student", "teacher")))
    monkeypatch.setattr(toy, "DESCRIBER", [(5, dict.fromkeys(toy.DESCRIBING, 1))])
    toy.build_captions(tmp_path / "captions", tmp_path / "toy")
    sizes = {name: len(common.Rows(str(tmp_path / "captions" / name), "train", {"problem": "problem"})) for name in ("train", "test", "conflict")}
    assert sizes == {"train": 60, "test": 12, "conflict": 12}
    before, after = (common.Model(str(tmp_path / name / "student"), torch.float32).state_dict() for name in ("toy", "captions"))
    assert not all(torch.equal(before[name], after[name]) for name in before)


def test_an_interrupted_build_leaves_nothing_that_counts(tmp_path):
    """SIGINT, then SIGKILL, in the middle: no folder with the final name, and the next start begins anew."""
    for stop in (signal.SIGINT, signal.SIGKILL):
        process = subprocess.Popen([sys.executable, "toy.py"], cwd=ROOT, env={"CLEANOPD_CACHE": str(tmp_path), "PATH": "/usr/bin:/bin"},
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a background shell ignores it
        for _ in range(600):
            if list(tmp_path.glob("*.partial/train/state.json")):
                break
            time.sleep(0.1)
        process.send_signal(stop)
        out, _ = process.communicate(timeout=60)
        assert process.returncode != 0 and not out.strip()
        left = [p.name for p in tmp_path.iterdir() if p.is_dir()]
        assert left == [] if stop == signal.SIGINT else all(name.endswith(".partial") for name in left)


def test_the_recipe_names_the_folder(monkeypatch):
    before = toy.recipe("qwen3_vl")
    assert before == toy.recipe("qwen3_vl") != toy.recipe("qwen2_5_vl")
    monkeypatch.setitem(toy.vgs.SYSTEM, "content", "Another prompt.")
    assert toy.recipe("qwen3_vl") != before
