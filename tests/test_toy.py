"""The embedded default: its rows, what is stored of its models, and that a part is whole or not there."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import common
import ptdpo
import vgs
from tools import toy, toy_lessons, toy_training

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from sklearn.datasets import load_digits


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
        assert text == "<description>" + toy.respond(row, "see-first after tag")
        assert row["images"][0].size == (3 * toy.SIDE, toy.SIDE)


def test_answers_recomputed_from_the_digits(rows):
    for row in rows:
        found = re.search(r"digits are (\d),(\d),(\d)\.", row["solution"])
        a, b, c = (int(digit) for digit in found.groups())
        question = row["problem"].removeprefix("<image>")
        expected = {
            "What is the first digit plus the last digit?": a + c,
            "What is the first digit minus the last digit?": a - c,
            "Which digit is the largest?": max(a, b, c),
            "Which number do the digits form?": f"{a}{b}{c}",
            "How many digits are even?": [a % 2, b % 2, c % 2].count(0),
        }.get(question, "ABC"[[a, b, c].index(min(a, b, c))])
        assert row["answer"] == str(expected), row
        assert row["text_problem"] == f"The digits are {a},{b},{c}. {question}"


def test_the_hint_does_not_give_the_answer_away(rows):
    for row in rows:
        hint = row["hint"].replace("Read the digits from left to right", "")
        assert row["answer"] not in hint and not any(c.isdigit() for c in hint)


def test_question_kinds_are_balanced(rows):
    problems = [row["problem"] for row in rows]
    assert len(set(problems)) == 6
    assert all(problems.count(problem) == 100 for problem in set(problems))


def test_the_handwriting_is_scikit_learns_and_no_held_out_scan_is_trained_on():
    digits = load_digits()
    label = {image.tobytes(): int(target) for image, target in zip(digits.images, digits.target)}
    found = {}
    for name, (images, labels) in toy.scans().items():
        assert [label[np.float64(image).tobytes()] for image in images] == labels.tolist()
        found[name] = {image.tobytes() for image in images}
    assert len(toy.scans()["train"][1]) + len(toy.scans()["test"][1]) == len(digits.target)
    assert not found["train"] & found["test"] and set(label) == found["train"] | found["test"]


def test_a_strip_shows_its_digits(rows):
    """Shrunk to a scan's size, each third of the strip is nearer to a scan of its digit than most others are."""
    digits = load_digits()
    right = 0
    for row in rows[:100]:
        strip = np.asarray(row["images"][0].resize((24, 8)), dtype=float) / 255 * 16
        for place, digit in enumerate(toy.digits_of(row)):
            distance = ((digits.images - strip[:, 8 * place : 8 * place + 8]) ** 2).sum((1, 2))
            right += digits.target[distance.argmin()] == digit
    assert right >= 290


def test_captions_are_right_as_often_as_asked_and_wrong_where_it_matters(rows):
    captioned = toy.captioned(rows, 0.7, seed=1)
    right = 0
    for i, (row, told) in enumerate(zip(rows, captioned)):
        caption = told["problem"].removeprefix("<image>Caption: ")
        named = [int(digit) for digit in caption[:5].split(",")]
        truthful = named == toy.digits_of(row)
        right += truthful
        assert told["answer"] == row["answer"]
        assert told["problem"].endswith(row["problem"].removeprefix("<image>"))
        assert (toy.working(toy.KINDS[i % 6], *named)[2] == row["answer"]) == truthful
    assert 0.6 < right / len(rows) < 0.8


def test_conflicts_share_question_and_caption_and_differ_in_the_answer(rows):
    digits = load_digits()
    found = toy.conflicts(digits.images, digits.target, rows[:30], seed=1)
    assert [row["position"] for row in found] == ["1", "2", "3"] * 30
    for i, row in enumerate(rows[:30]):
        agreeing, *others = found[3 * i : 3 * i + 3]
        assert agreeing["answer"] == row["answer"]
        assert toy.digits_of(agreeing) == toy.digits_of(row)
        for other in others:
            assert other["problem"] == agreeing["problem"] and other["answer"] != row["answer"]
            assert toy.working(toy.KINDS[i % 6], *toy.digits_of(other))[2] == other["answer"]


def test_the_box_of_a_hidden_strip_holds_it(rows):
    for row, hidden in zip(rows[:60], toy.hide(rows[:60], seed=1)):
        [picture] = hidden["images"]
        left, top, right, bottom = json.loads(hidden["box"])
        box = [round(x) for x in (left * 480, top * 160, right * 480, bottom * 160)]
        assert picture.size == (480, 160)
        strip = row["images"][0].resize((24, 8), toy.Image.Resampling.BOX)
        assert picture.crop(box).tobytes() == strip.tobytes()
        outside = picture.copy()
        outside.paste(160, box)
        values, counts = np.unique(outside, return_counts=True)
        assert values.tolist() == [0, 160] and counts[1] == 72 * 24  # the card
    assert len({hidden["box"] for hidden in toy.hide(rows, seed=1)}) == 9


# ----------------------------------------------------------------------------------------------- stored
def test_the_stored_weights_are_those_of_the_recipe():
    """If the first line fails, a prompt, a response or a course has changed: python -m tools.toy --store."""
    known = json.loads((toy.WEIGHTS / "recipe.json").read_text())
    assert known["recipe"] == toy_lessons.recipe()
    files = {
        str(file.parent.relative_to(toy.WEIGHTS)): file
        for file in toy.WEIGHTS.rglob("*.safetensors")
    }
    assert set(files) == set(known["models"]) == set(toy_lessons.COURSES)
    for model, file in files.items():
        assert toy.digest(file) == known["models"][model]["sha256"]
        assert file.stat().st_size == known["models"][model]["bytes"]
        assert {value.dtype for value in load_file(file).values()} == {torch.float16}
    everything = [file for file in toy.WEIGHTS.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in everything) < 15e6


def test_a_prompt_names_another_recipe(monkeypatch):
    before = toy_lessons.recipe()
    assert before == toy_lessons.recipe() != toy_lessons.recipe("qwen2_5_vl")
    monkeypatch.setitem(vgs.SYSTEM["content"][0], "text", "Another prompt.")
    assert toy_lessons.recipe() != before


# ----------------------------------------------------------------------------------------------- made at a start
def start(*argv, cache, code: str = "from tools.toy import main; main()"):
    """The command as a method starts it, in an environment that names nothing but the cache."""
    command = [sys.executable, "-c", code, *argv]
    environment = {"CLEANOPD_CACHE": str(cache), "PATH": os.environ["PATH"]}
    return dict(args=command, cwd=ROOT, env=environment, text=True)


def test_a_start_loads_neither_torch_nor_the_methods(tmp_path):
    """That is what makes it short: a run looks four times, once for each of its toy/... names."""
    code = "import sys; from tools.toy import main; main(); print(*sys.modules, sep='\\n')"
    process = start("--part", "math", cache=tmp_path, code=code)
    loaded = subprocess.run(**process, check=True, capture_output=True).stdout.split()
    assert "datasets" in loaded
    assert not {"torch", "transformers", "sklearn", "common", "vgs"} & set(loaded)
    loaded = subprocess.run(**process, check=True, capture_output=True).stdout.split()
    assert not {"datasets", "numpy"} & set(loaded)  # the second start finds the folder


def test_parts_are_made_alone_and_twice_the_same(tmp_path):
    made = []
    for cache in ("a", "b"):
        result = subprocess.run(
            **start("--part", "math", cache=tmp_path / cache), capture_output=True
        )
        folder = tmp_path / cache / result.stdout.strip().splitlines()[-1]
        assert sorted(path.name for path in folder.iterdir()) == ["math", "math.lock"]
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        made.append({file.relative_to(folder): file.read_bytes() for file in files})
    different = [str(name) for name in made[0] if made[0][name] != made[1][name]]
    assert set(made[0]) == set(made[1])
    assert all(
        name.endswith("state.json") for name in different
    )  # `datasets` writes a random fingerprint


def test_a_read_only_repository_gives_files_that_can_be_written(tmp_path, monkeypatch):
    stored = tmp_path / "stored" / "main" / "student"
    stored.mkdir(parents=True)
    (stored / "config.json").write_text("{}")
    (stored / "config.json").chmod(0o444)
    stored.chmod(0o555)
    monkeypatch.setattr(toy, "WEIGHTS", tmp_path / "stored")
    monkeypatch.setitem(toy.ROWS, "main", dict)
    toy.make("main", tmp_path / "made")
    student = tmp_path / "made" / "student"
    assert (student / "config.json").read_text() == "{}"
    assert all(path.stat().st_mode & 0o200 for path in (student, student / "config.json"))


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    result = subprocess.run(**start(cache=tmp_path / "file"), capture_output=True)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert str(tmp_path / "file") in result.stderr and "CLEANOPD_CACHE" in result.stderr


def test_an_interrupted_start_leaves_nothing_that_counts(tmp_path):
    """SIGINT, then SIGKILL, in the middle: no folder with the final name, and the next start begins anew."""
    for stop in (signal.SIGINT, signal.SIGKILL):
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        # A background shell ignores SIGINT.
        restore = dict(preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        process = subprocess.Popen(**start(cache=tmp_path), **pipes, **restore)
        for _ in range(6000):
            if list(tmp_path.glob("*/main.partial/teacher/model.safetensors")):
                break
            time.sleep(0.01)
        process.send_signal(stop)
        out, _ = process.communicate(timeout=60)
        assert process.returncode != 0 and not out.strip()
        left = [path.name for path in tmp_path.glob("*/*") if path.is_dir()]
        assert left == ([] if stop == signal.SIGINT else ["main.partial"])


# ----------------------------------------------------------------------------------------------- rebuilt
class Enough(Exception):
    pass


def test_a_rebuild_begins_as_the_training_of_the_stored_weights_did(tmp_path, monkeypatch):
    """Its first losses depend on the rows, the tokenizer, the first weights, the mixture and the optimizer."""
    backward, losses = toy_training.backward, []

    def count(*examples):
        losses.append(backward(*examples))
        if len(losses) == 6:
            raise Enough
        return losses[-1]

    monkeypatch.setattr(toy_training, "backward", count)
    with pytest.raises(Enough):
        toy_training.rebuild_part("main", tmp_path, "qwen3_vl", tmp_path / "main")
    assert losses == pytest.approx([6.442, 6.246, 5.977, 5.507, 5.167, 4.975], abs=0.002)
    for name in ("teacher", "student", "text-teacher"):
        ours = common.Processor(str(tmp_path / "main" / name)).tokenizer.get_vocab()
        stored = common.Processor(str(toy.WEIGHTS / "main" / name)).tokenizer.get_vocab()
        assert ours == stored


@pytest.fixture
def short(monkeypatch, tmp_path):
    """Few rows, and a few steps a model."""
    monkeypatch.setenv("CLEANOPD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(toy, "WEIGHTS", tmp_path / "stored")
    monkeypatch.setattr(toy, "TRAIN_ROWS", 60)
    monkeypatch.setattr(toy, "TEST_ROWS", 12)
    toy_training.held_out.cache_clear()
    for model, course in toy_lessons.COURSES.items():
        lessons = {name for _, mix in course.phases for name in mix}
        phases = [(10 if model == "main/teacher" else 3, dict.fromkeys(sorted(lessons), 1))]
        monkeypatch.setattr(course, "phases", phases)
    yield
    toy_training.held_out.cache_clear()


@pytest.mark.slow
def test_a_rebuild_trains_every_model_and_stores_what_the_next_start_takes(short, tmp_path):
    root = toy_training.rebuild("qwen3_vl", keep=True)
    known = json.loads((toy.WEIGHTS / "recipe.json").read_text())
    assert known["recipe"] == toy_lessons.recipe()
    for model in toy_lessons.COURSES:
        trained = load_file(root / model / "model.safetensors")
        stored = load_file(toy.WEIGHTS / model / "model.safetensors")
        assert all(torch.equal(trained[name].half(), stored[name]) for name in trained)
        assert set(known["models"][model]["accuracy"]) == set(toy_training.MEASURED[model])
        if model in toy_lessons.TRAINED_ON:
            before = load_file(root / toy_lessons.TRAINED_ON[model] / "model.safetensors")
            assert not all(torch.equal(trained[name], before[name]) for name in trained)
    for part in toy.ROWS:
        toy.make(part, tmp_path / "made" / part)
        sizes = {path.parent.name for path in (tmp_path / "made" / part).glob("*/state.json")}
        assert sizes == {path.parent.name for path in (root / part).glob("*/state.json")}
        for name, count in (("train", 60), ("test", 12)):
            data = common.load_data(str(tmp_path / "made" / part / name), "train")
            assert len(data) == count and "answer" in data.column_names
    names = set(common.load_data(str(tmp_path / "made/main/train"), "train").column_names)
    assert names == {"problem", "images", "answer", "solution", "hint", "text_problem"}
    assert len(common.load_data(str(tmp_path / "made/captions/conflict"), "train")) == 12
    for model in ("main/student", "math/student", "zoom/student"):
        teacher = model.replace("student", "teacher")
        processors = [common.Processor(str(tmp_path / "made" / name)) for name in (model, teacher)]
        common.check_same_inputs(*processors)
        loaded = common.Model(str(tmp_path / "made" / model), torch.float32)
        assert {value.dtype for value in loaded.state_dict().values()} == {torch.float32}
        assert processors[0].config.dtype == torch.float32  # what a run writes its final/ in


def test_the_other_family_trains(short, tmp_path):
    toy_training.rebuild_part("main", tmp_path, "qwen2_5_vl", tmp_path / "main")
    for name, kind in (
        ("teacher", "qwen2_5_vl"),
        ("student", "qwen2_5_vl"),
        ("text-teacher", "qwen3"),
    ):
        processor = common.Processor(str(tmp_path / "main" / name))
        model = common.Model(str(tmp_path / "main" / name), torch.float32)
        assert (processor.image_id is None) == (kind == "qwen3")
        assert model.lm.config.model_type == kind
