"""The embedded default as it is: accuracy of its models in every context, and that a minute of VGS teaches the student.

Builds the toy if this machine does not have it yet (about five minutes on two cores).
"""

import json
import math

import pytest
import torch
from conftest import run_script

import common
import toy
import vgs


@pytest.fixture(scope="module")
def held_out(request):
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        common.locate("toy/test")  # the first time this takes minutes: show its progress bar
    rows = common.Rows(common.locate("toy/test"), "test", {"problem": "problem"})
    return [rows[i] for i in range(len(rows))]


def answers(name, context, rows):
    processor = common.Processor(f"toy/{name}")
    engine = common.HFEngine(f"toy/{name}", processor, common.Args(dtype="float32", rollout_batch=200))
    return [r.text for r in engine.generate([processor.encode(toy.CONTEXTS[context][0](row)) for row in rows], 0.0)]


def accuracy(texts, rows):
    return sum(common.is_correct(common.extract_answer(t), row["answer"]) for t, row in zip(texts, rows)) / len(rows)


@pytest.mark.parametrize("name, context, low, high", [
    ("teacher", "see", 0.95, 1.0), ("teacher", "hint", 0.95, 1.0), ("teacher", "solution", 0.95, 1.0),
    ("teacher", "see_first", 0.94, 1.0), ("teacher", "solution_first", 0.95, 1.0), ("teacher", "blind", 0.02, 0.35),
    ("student", "see", 0.4, 0.6), ("student", "ask", 0.4, 0.6), ("text-teacher", "text", 0.95, 1.0),
])
def test_held_out_accuracy_in_every_context(held_out, name, context, low, high):
    texts = answers(name, context, held_out)
    assert low <= accuracy(texts, held_out) <= high
    opening = {"reason": "<reason>", "think": "<think>", "see-first": "<description>"}[toy.CONTEXTS[context][1]]
    assert all(t.startswith(opening) and "\\boxed{" in t for t in texts[:50])


def test_the_student_can_use_a_hint(held_out):
    """It is its own tutor in PTD-PO: with the hint it has to know more than without."""
    plain, hinted = (accuracy(answers("student", context, held_out), held_out) for context in ("ask", "hint"))
    assert hinted >= plain + 0.05


def test_the_teacher_describes_an_image_alone(held_out):
    texts = answers("teacher", "image_only", held_out)
    right = sum(t == toy.respond(row, "description") for t, row in zip(texts, held_out))
    assert right / len(held_out) >= 0.85


def test_without_the_image_the_teacher_does_not_know_the_digits(held_out):
    """Its distribution over the first digit is close to uniform: between 2 nats and log 10; with the image it is nearly certain."""
    processor, model = common.Processor("toy/teacher"), common.Model("toy/teacher", torch.float32)
    start = processor.tokenizer("<reason>The digits are ", add_special_tokens=False)["input_ids"]
    digit = processor.tokenizer("7", add_special_tokens=False)["input_ids"]
    assert processor.tokenizer("<reason>The digits are 7", add_special_tokens=False)["input_ids"] == start + digit
    means = {}
    for name, context in (("image", vgs.with_image), ("text", vgs.without_image)):
        prompts = [processor.encode(context(row)) for row in held_out[:100]]
        prompts = [common.Prompt(p.ids + start, p.pixels, p.grid) for p in prompts]
        with torch.no_grad():
            log_p = (model(processor.batch(prompts, [digit] * 100)) @ model.head().T).log_softmax(-1)
        means[name] = common.entropy(log_p).mean().item()
    assert 2.0 < means["text"] < math.log(10) + 0.1 and means["image"] < 0.5


def test_a_minute_of_vgs_teaches_the_student(tmp_path):
    result = run_script("vgs.py", "--preset", "toy", "--max-steps", "60", "--eval-rows", "400", "--output", tmp_path / "run", env={"OMP_NUM_THREADS": "2"})
    assert result.returncode == 0, result.stderr
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["acc@1"] >= metrics[0]["acc@1"] + 0.1
    assert metrics[-1]["vis"] < 0.8 * metrics[1]["vis"]


@pytest.mark.slow
def test_half_a_minute_of_vigos_teaches_the_student_to_look(tmp_path):
    """It starts by believing captions: prior high, score low. How low varies with the build."""
    result = run_script("vigos.py", "--preset", "toy", "--max-steps", "25", "--output", tmp_path / "run", env={"OMP_NUM_THREADS": "2"})
    assert result.returncode == 0, result.stderr
    first, *_, last = (json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert first["score"] < first["prior"] - 0.1
    assert last["acc@1"] > first["acc@1"] and last["score"] > first["score"] + 0.05
