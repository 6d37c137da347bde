"""tools/evaluate.py as a user runs it: training's numbers, ranks, stops, prompts, text alone, and bad input."""

import json
import os
import re
import signal
import time

import common
import ptdpo
import reopold
import vgs
import vigos
from tools import benchmarks, evaluate, protocols, scores

import datasets
import pytest
from background import wait_for
from conftest import ROOT, accuracy, flags, run_here, run_script
from PIL import Image

SHORT = dict(max_response=64, dtype="float32", engine="hf")


def words(output, **changes) -> list[str]:
    """The command's flags; lists are several words, True and False switches."""
    argv = []
    for key, value in (SHORT | {"output": output} | changes).items():
        name = key.replace("_", "-")
        if value is True or value is False:
            argv.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            argv += [f"--{name}", *map(str, value)]
        elif value is not None:
            argv += [f"--{name}", str(value)]
    return argv


def run(output, ranks=0, **changes):
    argv = words(output, **changes)
    if ranks:
        return run_script("-m", "tools.evaluate", *argv, ranks=ranks)
    return run_here("tools.evaluate.py", *argv)


def passed(output, ranks=0, **changes) -> dict:
    """results.json of an evaluation that went well."""
    result = run(output, ranks, **changes)
    assert result.returncode == 0, result.stderr
    return json.loads((output / "results.json").read_text())


def answers(output) -> list[dict]:
    return [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]


def refused(output, *parts, **changes):
    """It stops with a sentence that has these parts."""
    result = run(output, **changes)
    said = result.stderr + result.stdout
    assert result.returncode == 1 and "Traceback" not in said, said
    assert said.count("error: ") == 1, said
    for part in parts:
        assert part in said, (part, said)


# ------------------------------------------------------------------------------------------------ numbers
PROMPTS = {"vgs": vgs.with_image, "ptdpo": ptdpo.question, "reopold": reopold.question}


@pytest.mark.parametrize(
    "prompt", ["vgs", *[pytest.param(x, marks=pytest.mark.slow) for x in ("ptdpo", "reopold")]]
)
def test_greedy_accuracy_is_what_training_measures(tmp_path, prompt):
    """To the last digit, on the toy, whose student is right in about half of its answers."""
    found = passed(tmp_path / "out", model="toy/student", prompt=prompt, sets=["toy/test"], rows=48)
    args = common.Args(
        dtype="float32", max_response=64, eval_data=["toy/test"], eval_rows=48, max_prompt=16384
    )
    processor = common.Processor("toy/student")
    common.start_ranks(args)
    held_out = common.load_held_out(args, processor, {"": PROMPTS[prompt]}, "problem images answer")
    engine = common.HFEngine("toy/student", processor, args)
    expected = accuracy(engine, held_out["acc@1/toy/test"], PROMPTS[prompt])
    assert 0.2 < expected < 0.9
    assert found["toy/test"]["metrics"]["acc@1"][0] == pytest.approx(100 * expected, abs=1e-4)
    assert found["toy/test"]["questions"] == 48


@pytest.mark.slow
@pytest.mark.parametrize("prompt", sorted(PROMPTS))
def test_the_whole_toy_as_a_run_measures_it(tmp_path, prompt):
    """400 questions, 8 samples: teacher, student, and a student that has been trained for some steps."""
    file = {"vgs": "vgs.py", "ptdpo": "ptdpo.py", "reopold": "reopold.py"}[prompt]
    trained = tmp_path / "run"
    result = run_script(file, "--preset", "toy", "--max-steps", "5", "--output", str(trained))
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    settings = json.loads((trained / "args.json").read_text())
    measured = {settings["student"]: lines[0]["acc@1"], str(trained / "final"): lines[-1]["acc@1"]}
    for number, (model, known) in enumerate(measured.items()):
        output = tmp_path / f"out-{number}"
        found = passed(output, model=model, prompt=prompt, sets=settings["eval_data"], samples=8)
        metrics = found[settings["eval_data"][0]]["metrics"]
        assert metrics["acc@1"][0] == pytest.approx(100 * known, abs=1e-4)
        drawn = [line["right"] for line in answers(output) if line["sample"] is not None]
        assert len(drawn) == 3200 and len(answers(output)) == 3600
        assert metrics["acc@8"][0] == pytest.approx(100 * sum(drawn) / 3200, abs=1e-4)
    teacher = "toy/teacher" if prompt == "vgs" else settings["teacher"]
    if teacher:
        found = passed(
            tmp_path / "teacher", model=teacher, prompt="vgs", sets=["toy/test"], samples=8
        )
        assert found["toy/test"]["metrics"]["acc@1"][0] > 90


def test_any_number_of_ranks_gives_the_same_answers(tiny, tmp_path):
    """Greedy and sampled, byte by byte: ranks take whole batches."""
    sets = [str(tiny / "rows.parquet")]
    changes = dict(model=tiny / "student", prompt="vgs", sets=sets, samples=3, rollout_batch=8)
    one = passed(tmp_path / "one", **changes)
    two = passed(tmp_path / "two", ranks=2, **changes)
    assert one == two
    assert (tmp_path / "one/answers.jsonl").read_bytes() == (
        tmp_path / "two/answers.jsonl"
    ).read_bytes()
    lines = answers(tmp_path / "one")
    assert len(lines) == 24 * 4
    assert len({line["response"] for line in lines if line["row"] == 0}) == 4  # samples differ


@pytest.mark.parametrize("ranks", [0, 2])
def test_killed_and_started_again_gives_the_same_file(tiny, tmp_path, start, ranks):
    changes = dict(
        model=tiny / "student",
        prompt="vgs",
        sets=[str(tiny / "rows.parquet")],
        samples=3,
        rollout_batch=4,
    )
    whole = passed(tmp_path / "whole", **changes)
    output = tmp_path / "out"
    process = start("-m", "tools.evaluate", *words(output, **changes), interpreter=True)
    wait_for(lambda: len(list(output.glob("answers/*.jsonl"))) >= 2, "two batches of answers")
    os.kill(process.pid, signal.SIGKILL)
    process.wait(60)
    done = {file: file.stat().st_mtime_ns for file in output.glob("answers/*.jsonl")}
    assert 2 <= len(done) < 30 and not (output / "answers.jsonl").exists()
    assert passed(output, ranks=ranks, **changes) == whole
    assert (output / "answers.jsonl").read_bytes() == (
        tmp_path / "whole/answers.jsonl"
    ).read_bytes()
    assert not (output / "answers").exists()
    result = run(output, **changes)  # once more: nothing is asked
    assert (
        result.returncode == 0
        and "0 of " in result.stdout
        and "0 of 96 verdicts changed" in result.stdout
        and not (output / "answers").exists()
    )


def test_every_answer_is_written_out_and_can_be_judged_anew(tiny, tmp_path):
    output = tmp_path / "out"
    changes = dict(model="toy/student", prompt="vgs", sets=["toy/test"], rows=8, samples=2)
    before = passed(output, **changes)
    lines = answers(output)
    assert len(lines) == 24 and [line["sample"] for line in lines[:9]] == [None] * 8 + [0]
    for line in lines:
        assert (
            line["problem"].replace("<image>", "") in line["prompt"]
            and "Think first" in line["prompt"]
        )
        assert line["images"] and line["answer"] and line["response"]
        right = common.is_correct(line["extracted"], line["answer"]) and line["finished"]
        assert line["right"] == right
    # a person mends a reference
    wrong = next(line for line in lines if line["extracted"] and not line["right"])
    wrong["answer"] = wrong["extracted"]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (output / "answers.jsonl").write_text(text)
    result = run_here("tools.evaluate.py", "--rescore", str(output), "--k", "1", "2")
    assert result.returncode == 0 and "1 of 24 verdicts changed" in result.stdout, result.stderr
    after = json.loads((output / "results.json").read_text())
    assert after != before and "pass@1" in after["toy/test"]["metrics"]


def test_vllm_gets_many_batches_at_once(tmp_path):
    """Greedy ones and sampled ones by themselves, each once, in their order."""
    args = evaluate.Args(samples=4, rollout_batch=8)
    jobs = evaluate.jobs_of({"a": range(150), "b": range(5)}, args, tmp_path)
    assert [len(part) for part in evaluate.parts_of(jobs, args)] == [1] * len(jobs)
    args.engine = "vllm"
    parts = evaluate.parts_of(jobs, args)
    assert [job for part in parts for job in part] == jobs
    assert max(map(len, parts)) == 16 and all(len({j.samples for j in part}) == 1 for part in parts)


# ------------------------------------------------------------------------------------------------ prompts
def test_columns_that_are_named_as_a_benchmarks_are(tiny, tmp_path):
    """`rule` and `groups` may be anything in somebody's rows; a category may be a list."""
    file = tmp_path / "rows.jsonl"
    row = {"problem": "1 + 1 = ?", "answer": "2", "rule": "mathruler", "groups": "math"}
    lines = [json.dumps(row | {"category": kind}) for kind in (["a", "b"], ["c"])]
    file.write_text("\n".join(lines))
    found = passed(
        tmp_path / "out", model=tiny / "text-only", prompt="vold", sets=[str(file)], max_response=4
    )
    found = found[str(file)]
    assert list(found["metrics"]) == ["acc@1", "balanced"]
    assert list(found["categories"]) == ["['a', 'b']", "['c']"]


def test_every_method_asks_as_it_trains(tiny, tmp_path):
    """The prompt in answers.jsonl is the method's own context; vigos' with its opening."""
    processor = common.Processor(f"{tiny}/student")
    contexts = {"vgs": vgs.with_image, "ptdpo": ptdpo.question, "vigos": vigos.question}
    for name, context in contexts.items():
        assert protocols.PROMPTS[name] is context
    assert set(protocols.PROMPTS) == {*contexts, "vold", "reopold", "reopold-tools"}
    sets = [str(tiny / "rows.parquet")]
    changes = dict(model=tiny / "student", sets=sets, rows=2, max_response=4)
    for name in ("vold", "vigos"):
        passed(tmp_path / name, prompt=name, **changes)
        for line in answers(tmp_path / name):
            row = {"problem": line["problem"], "images": [Image.new("RGB", (8, 8))]}
            assert line["prompt"] == processor.render(protocols.PROMPTS[name](row))
    assert answers(tmp_path / "vigos")[0]["prompt"].endswith("<description>")


def test_a_prompt_of_ones_own_and_rounds_of_tools(tiny, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("Look closely.\n{problem}\nEnd with \\boxed{}.")
    sets = [str(tiny / "rows.parquet")]
    changes = dict(model=tiny / "student", sets=sets, rows=2, max_response=8)
    passed(tmp_path / "own", prompt=file, **changes)
    line = answers(tmp_path / "own")[0]
    assert (
        "Look closely.\n" in line["prompt"]
        and line["problem"].replace("<image>", "") in line["prompt"]
    )
    passed(tmp_path / "tools", prompt="reopold-tools", calls=2, **changes)
    assert "crop_image" in answers(tmp_path / "tools")[0]["prompt"]
    for text in ("no place for it", "{problem} Again: {problem}", "<image>\n{problem}"):
        file.write_text(text)
        refused(tmp_path / "no", "{problem} in it once, and no <image>", prompt=file, **changes)
    refused(tmp_path / "no", "is no prompt", "vigos", prompt="vgz", **changes)
    refused(tmp_path / "no", "go together", prompt="vgs", calls=2, **changes)


def test_text_alone_with_a_model_that_sees(tiny, tmp_path):
    """And a text model, which is refused rows with images."""
    file = tmp_path / "text.jsonl"
    file.write_text(
        '{"problem": "1 + 1 = ?", "answer": "2"}\n{"problem": "2 + 1 = ?", "answer": "3"}\n'
    )
    changes = dict(prompt="reopold", sets=[str(file)], max_response=4)
    result = run(tmp_path / "sees", model=tiny / "student", **changes)
    assert result.returncode == 0, result.stderr
    assert (
        "no column 'images', but ['problem', 'answer']: its questions are text alone"
        in result.stdout
    )
    assert [line["images"] for line in answers(tmp_path / "sees")] == [[], []]
    passed(tmp_path / "reads", model=tiny / "text-only", **changes)
    sets = [str(tiny / "rows.parquet")]
    refused(
        tmp_path / "no",
        "a model of text alone shows none",
        model=tiny / "text-only",
        prompt="reopold",
        sets=sets,
    )


# ------------------------------------------------------------------------------------------------ bad input
def test_bad_input_is_refused_by_name(tiny, tmp_path):
    model, mine = tiny / "student", str(tiny / "rows.parquet")
    known = dict(model=model, prompt="vgs", max_response=4)
    output = tmp_path / "no"
    refused(output, "no benchmark 'mathvers'", "mathverse", "./NAME", sets=["mathvers"], **known)
    refused(output, "AI4Math/MathVerse", "mathverse=PATH", sets=["mathverse"], **known)
    refused(output, "there is no /nowhere", sets=["mathverse=/nowhere"], **known)
    refused(output, f"has {mine} twice", sets=[mine, mine], **known)
    refused(output, "give --model, --prompt and --sets", sets=None, **known)
    for k in (0, 3):
        refused(output, f"--k {k}", sets=[mine], k=[1, k], samples=2, **known)
    refused(output, "nothing is to be answered", sets=[mine], greedy=False, **known)
    refused(output, "--samples is -1", sets=[mine], samples=-1, **known)
    refused(
        output,
        "has no column 'reply'",
        "--column-answer",
        sets=[mine],
        column_answer="reply",
        **known,
    )
    refused(output, "has no column 'picture'", sets=[mine], column_images="picture", **known)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"problem": "1 + 1 = ?", "answer": "2", "image": "a.png"}\n')
    refused(output, "--column-images image", sets=[str(rows)], **known)
    rows.write_text('{"problem": "1 + 1 = ?", "answer": ""}\n')
    refused(output, "1 of 1 rows", "there is no answer", sets=[str(rows)], **known)
    result = run_here("tools.evaluate.py", "--rescore", str(tmp_path / "nothing"))
    assert result.returncode == 1 and "no evaluation has been finished" in result.stderr


def test_a_model_without_a_chat_template_is_refused(tiny, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for file in (tiny / "student").iterdir():
        if file.name != "chat_template.jinja":
            (model / file.name).write_bytes(file.read_bytes())
    config = json.loads((model / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    sets = [str(tiny / "rows.parquet")]
    refused(tmp_path / "no", "has no chat template", model=model, prompt="vgs", sets=sets)


def test_an_output_of_another_prompt_is_refused(tiny, tmp_path):
    """The file has the same name."""
    file = tmp_path / "prompt.txt"
    file.write_text("{problem}")
    sets = [str(tiny / "rows.parquet")]
    changes = dict(model=tiny / "student", prompt=file, sets=sets, rows=2, max_response=4)
    passed(tmp_path / "out", **changes)
    file.write_text("Look closely. {problem}")
    refused(tmp_path / "out", "first question", **changes)


def test_an_output_of_other_settings_rows_or_weights_is_refused(tiny, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"problem": "1 + 1 = ?", "answer": "2"}\n')
    model = tmp_path / "model"
    model.mkdir()
    for one in (tiny / "student").iterdir():
        (model / one.name).write_bytes(one.read_bytes())
    output = tmp_path / "out"
    changes = dict(model=model, prompt="vgs", sets=[str(file)], max_response=4)
    passed(output, **changes)
    kept = (output / "answers.jsonl").read_bytes()
    refused(output, "max_response 4 -> 5", **changes | dict(max_response=5))
    refused(output, "batch 64 -> 8", rollout_batch=8, **changes)
    file.write_text('{"problem": "1 + 1 = ?", "answer": "3"}\n')
    refused(output, "rows of sets", **changes)
    file.write_text('{"problem": "1 + 1 = ?", "answer": "2"}\n')
    time.sleep(0.01)
    os.utime(model / "model.safetensors")
    refused(output, "weights", **changes)
    trained = flags(tiny, output, data=tiny / "rows.parquet")
    result = run_script("vgs.py", *trained)
    assert result.returncode == 1 and "holds a run with other settings" in result.stderr
    assert (output / "answers.jsonl").read_bytes() == kept


def test_a_prompt_or_a_template_that_has_changed_is_refused(tiny, tmp_path):
    """Half of the answers would be to another question."""
    file, model, output = tmp_path / "prompt.txt", tmp_path / "model", tmp_path / "out"
    model.mkdir()
    for one in (tiny / "student").iterdir():
        (model / one.name).write_bytes(one.read_bytes())
    sets = [str(tiny / "rows.parquet")]
    changes = dict(model=model, prompt=file, sets=sets, rows=2, max_response=4)
    file.write_bytes(b"\xef\xbb\xbfLook closely. {problem}")  # as some editors begin a file
    passed(output, **changes)
    assert "\ufeff" not in answers(output)[0]["prompt"]
    file.write_text("Look away. {problem}")
    refused(output, "first question", "Look away", **changes)
    file.write_text("Look closely. {problem}")
    passed(output, **changes)
    time.sleep(0.01)
    os.utime(model / "chat_template.jinja")
    refused(output, "weights", **changes)


def test_a_line_written_by_hand_that_is_none_is_named_and_nothing_is_lost(tiny, tmp_path):
    output = tmp_path / "out"
    sets = [str(tiny / "rows.parquet")]
    passed(output, model=tiny / "student", prompt="vgs", sets=sets, rows=3, max_response=4)
    file = output / "answers.jsonl"
    first, second, third = file.read_text().splitlines()
    incomplete = [dict(json.loads(second)) for _ in range(3)]
    for record, key in zip(incomplete, ("row", "sample", "finished")):
        del record[key]
    for line in (second[:-9], "null", "[]", "", *map(json.dumps, incomplete)):
        text = f"{first}\n{line}\n{third}\n"
        file.write_text(text)
        result = run_here("tools.evaluate.py", "--rescore", str(output))
        assert result.returncode == 1 and "line 2 of " in result.stderr, result.stderr
        assert "Traceback" not in result.stderr and file.read_text() == text


def a_record(row, sample=None, **more):
    kept = {"set": "s", "problem": "?", "answer": "1", "finished": True, "extracted": "1"}
    return kept | {"row": row, "sample": sample, "response": "", "right": True} | more


def test_sixteen_samples_are_no_greedy_answer():
    found = scores.metrics([a_record(0, i) for i in range(16)], [])["metrics"]
    assert list(found) == ["acc@16", "pass@16", "maj@16"]
    assert "acc@1 sampled" in scores.metrics([a_record(0, 0)], [])["metrics"]


def test_the_table_is_whole_and_tells_sets_apart(tmp_path, capsys):
    """Two hundred categories, two long paths."""
    records = [a_record(i, category=f"kind {i}") for i in range(200)]
    folder = "/home/somebody/a/long/way/down"
    for name in ("one", "two"):
        records.append(a_record(0, set=f"{folder}/{name}.parquet", finished=False, extracted=None))
    evaluate.score(tmp_path, records, [])
    said = capsys.readouterr().out
    assert all(f"  kind {i} " in said for i in range(200))
    assert "/one.parquet " in said and "/two.parquet " in said
    assert "0.0 % finished" in said
    assert said.endswith("results.json and answers.jsonl\n")


def test_what_is_called_as_a_benchmark_is_one(tmp_path, monkeypatch):
    """Also where a folder beside it has its name; a path to that has a slash."""
    monkeypatch.chdir(tmp_path)
    written = []
    monkeypatch.setattr(benchmarks, "write", lambda name, file: written.append(name))
    (tmp_path / "mathverse").mkdir()
    (tmp_path / "mine").mkdir()
    in_ours = [
        evaluate.in_our_columns(name, tmp_path, True)
        for name in ("mathverse", "./mathverse", "mine", "mathverse=mine")
    ]
    there = str(tmp_path / "mathverse.parquet")
    assert in_ours == [
        ("mathverse", there),
        ("./mathverse", "./mathverse"),
        ("mine", "mine"),
        ("mathverse", there),
    ]
    assert written == ["mathverse", "mathverse=mine"]  # for the file is not there
    (tmp_path / "mathverse.parquet").touch()
    evaluate.in_our_columns("mathverse", tmp_path, True)
    assert len(written) == 2


def test_the_copy_for_other_harnesses_has_the_training_prompt(tiny, tmp_path):
    """docs/evaluation.md: whatever system turn they add, the model is asked as it was trained."""
    text = (ROOT / "docs" / "evaluation.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.S)
    block = block.replace("runs/x/final-vgs", f"{tmp_path}/copy").replace(
        "runs/x/final", f"{tiny}/student"
    )
    exec(block, {})
    row = {"problem": "How many?", "images": [Image.new("RGB", (8, 8))]}
    expected = vgs.with_image(row)
    others = common.Context(
        [common.message("system", "Be kind."), expected.messages[1]], row["images"]
    )
    alone = common.Context(expected.messages[1:], row["images"])
    trained = common.Processor(f"{tiny}/student").render(expected)
    copied = common.Processor(f"{tmp_path}/copy")
    assert copied.render(others) == copied.render(alone) == trained


# ------------------------------------------------------------------------------------------------ in training
def test_a_run_measures_several_sets_and_their_mean(tiny, tmp_path):
    """Sets of 24 and of 2 rows: the mean is of the sets, not of the rows."""
    rows = datasets.load_dataset("parquet", data_files=str(tiny / "rows.parquet"), split="train")
    few = tmp_path / "few.parquet"
    rows.select(range(2)).to_parquet(few)
    argv = flags(tiny, tmp_path / "run", max_steps=1, eval_data=None, max_prompt=200)
    argv += ["--eval-data", str(tiny / "rows.parquet"), str(few), "--eval-max-prompt", "300"]
    result = run_script("vgs.py", *argv)
    assert result.returncode == 0, result.stderr
    for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines():
        found = json.loads(line)
        sets = [found[f"acc@1/{name}"] for name in (tiny / "rows.parquet", few)]
        assert found["acc@1"] == pytest.approx(sum(sets) / 2)


def test_the_mean_of_several_sets(monkeypatch):
    """Accuracies 1 and 0 of 3 rows and 1 row are 0.5 together; other measures are not part of it."""
    run = common.Run.__new__(common.Run)
    run.args, run.own, run.values, run.step = common.Args(), {}, {}, 1

    class Engine:
        processor = type("P", (), {"encode": lambda self, context: context})()

        def generate(self, prompts, seeds):
            assert seeds is None
            return [common.Response([1], text=f"\\boxed{{{p}}}") for p in prompts]

    run.engine = Engine()
    row = {"problem": "?", "answer": "1", "index": 0}
    sets = {"acc@1/a": [row] * 3, "acc@1/b": [row | {"answer": "2"}], "prior": [row]}
    run.evaluate(sets, lambda row: "1")
    assert run.values["acc@1"] == [0.5] and run.values["acc@1/a"] == [1.0]
    assert run.values["prior"] == [1.0] and run.own == {"acc@1 at first": 0.5}
