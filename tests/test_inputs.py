"""Bad settings and bad data: a clear error that names the thing and the remedy, before any model is loaded."""

import importlib
import json
import shutil
import sys
import types

import pytest
from conftest import ROOT, flags, refusal, run_script
from PIL import Image

import common
import vgs


def settings(*argv):
    args, given = common.parse_args(vgs.Args, vgs.PRESETS, list(argv))
    vgs.check_settings(args, given)
    return args


@pytest.mark.parametrize("argv, words", [
    (["--preset", "9b"], ["no preset '9b'", "toy", "2b", "4b", "teacher"]),
    (["--preset", "toy", "--prompts", "0"], ["--prompts", "at least 1"]),
    (["--preset", "toy", "--top-p", "1.5"], ["--top-p", "1.5"]),
    (["--preset", "toy", "--temperature", "0"], ["--temperature"]),
    (["--preset", "toy", "--seed", "1" + "0" * 20], ["--seed", "2^32"]),
    (["--preset", "toy", "--alpha", "1.5", "--group", "2"], ["--alpha", "[0, 1]"]),
    (["--preset", "toy", "--gamma", "-1"], ["--gamma", "negative"]),
    (["--preset", "toy", "--alpha", "0.3"], ["--group", "at least 2"]),
    (["--preset", "toy", "--method", "grpo"], ["--group", "at least 2"]),
    (["--preset", "toy", "--prompts", "10", "--updates", "4"], ["--updates 4", "divisor"]),
    (["--preset", "toy", "--method", "standard", "--analyze"], ["--analyze", "vgs-lp"]),
    (["--preset", "2b"], ["runs/teacher/final", "--preset teacher", "--teacher"]),
    (["--preset", "2b", "--gamma", "0.5"], ["eta 0.41", "--measure-eta"]),
    (["--preset", "4b", "--method", "adaptive"], ["eta 0.36", "--measure-eta"]),
])
def test_contradictions(argv, words):
    with pytest.raises(common.UserError) as error:
        settings(*argv)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("argv, ignored", [
    (["--method", "standard", "--gamma", "3"], "--gamma"),
    (["--method", "standard", "--eta", "0.4"], "--eta"),
    (["--method", "vgs", "--lambda-lp", "0.1"], "--lambda-lp"),
    (["--method", "vgs", "--log-all-terms"], "--log-all-terms"),
    (["--method", "grpo", "--group", "2", "--alpha", "0.3"], "--alpha"),
    (["--method", "grpo", "--group", "2", "--teacher", "x"], "--teacher"),
    (["--clip-low", "0.1"], "--clip-low"),
    (["--alpha", "0.3", "--group", "2", "--eta", "0.5"], "--eta"),
    (["--analyze", "--prompts", "8"], "--prompts"),
    (["--measure-eta", "5", "--eta", "0.5"], "--eta"),
    (["--analyze", "--lr", "1"], "--lr"),
    (["--eval-data", "", "--eval-every", "5"], "--eval-every"),
    (["--epochs", "2"], "--epochs"),
])
def test_a_flag_without_effect_is_an_error(argv, ignored):
    with pytest.raises(common.UserError) as error:
        settings("--preset", "toy", *argv)
    assert f"{ignored} would have no effect" in str(error.value), str(error.value)


def test_flags_override_the_preset_and_every_preset_parses():
    assert settings("--preset", "toy").lambda_lp == 0.3 and settings("--preset", "toy", "--lambda-lp", "0.1").lambda_lp == 0.1
    two, four = settings("--preset", "2b", "--teacher", "x"), settings("--preset=4b", "--teacher", "x")
    assert (two.eta, two.gamma, two.lambda_lp, two.prompts * two.group, two.lr) == (0.41, 2.0, 0.01, 512, 1e-6)
    assert (four.eta, four.student) == (0.36, "Qwen/Qwen3-VL-4B-Instruct")
    teacher = settings("--preset", "teacher")
    assert (teacher.method, teacher.group, teacher.prompts, teacher.updates, teacher.top_p, teacher.epochs) == ("grpo", 8, 512, 4, 0.99, 2)


def test_unknown_flag_and_engine_are_named(tiny):
    for argv, word in ((["--gama", "2"], "--gama"), (["--engine", "sglang"], "sglang")):
        result = run_script("vgs.py", "--preset", "toy", *argv)
        assert result.returncode != 0 and word in result.stdout + result.stderr


# ---------------------------------------------------------------------------------------------------- data
def write(folder, records, name="rows.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


@pytest.fixture
def good(tmp_path):
    Image.new("RGB", (64, 32), "white").save(tmp_path / "a.png")
    return {"problem": "How many?", "images": "a.png", "answer": "3"}


def load(path, tiny, skip=False, answers=True, **changes):
    args = common.Args(data=path, skip_bad_rows=skip, **changes)
    return common.load_rows(args, common.Processor(str(tiny / "student")), {"image": vgs.with_image, "text": vgs.without_image}, answers=answers)


def bad_rows(folder, good):
    Image.new("RGB", (64, 8)).save(folder / "flat.png")
    Image.new("RGB", (16 * 250, 16)).save(folder / "thin.png")
    (folder / "text.png").write_text("not an image")
    Image.effect_noise((64, 64), 80).save(folder / "whole.png")
    (folder / "cut.png").write_bytes((folder / "whole.png").read_bytes()[:700])
    return [
        (good | {"images": "missing.png"}, "missing.png"), (good | {"images": "text.png"}, "cannot be read"), (good | {"images": "cut.png"}, "cannot be read"),
        (good | {"images": "flat.png"}, "64 x 8 pixels"), (good | {"images": "thin.png"}, "aspect ratio"), (good | {"images": None}, "no image"), (good | {"answer": " "}, "answer is empty"),
        (good | {"answer": None}, "answer is empty"), (good | {"problem": ""}, "question is empty"), (good | {"problem": "why " * 2000}, "--max-prompt"),
        (good | {"problem": 7}, "question is no text"), (good | {"answer": float("nan")}, "answer is empty"), (good | {"answer": "$$"}, "answer is empty"),
    ]


def test_each_bad_row_is_named_and_can_be_skipped(tmp_path, tiny, good):
    cases = bad_rows(tmp_path, good)
    path = write(tmp_path, [good, *(row for row, _ in cases), good])
    with pytest.raises(common.UserError) as error:
        load(path, tiny)
    message = str(error.value)
    assert f"{len(cases)} of {len(cases) + 2} rows" in message and "--skip-bad-rows" in message
    for i, (_, words) in enumerate(cases, start=1):
        assert any(line.strip().startswith(f"row {i}: ") and words in line for line in message.splitlines()), (i, words, message)
    rows = load(path, tiny, skip=True)
    assert len(rows) == 2 and [rows[i]["index"] for i in range(2)] == [0, len(cases) + 1]


def test_an_empty_answer_is_fine_where_no_reward_needs_it(tmp_path, tiny, good):
    assert len(load(write(tmp_path, [good | {"answer": ""}]), tiny, answers=False)) == 1


@pytest.mark.parametrize("answer", [[], [""], ["3", ""], [None], ["3", None]])
def test_of_several_answers_none_may_be_empty(tmp_path, tiny, good, answer):
    """An empty one would reward an empty box."""
    with pytest.raises(common.UserError, match="answer is empty"):
        load(write(tmp_path, [good | {"answer": answer}, good | {"answer": ["3", "4"]}]), tiny)


def test_a_chat_without_content_and_text_in_another_encoding_are_named(tmp_path, tiny, good):
    with pytest.raises(common.UserError, match="row 0: the question is empty"):
        load(write(tmp_path, [good | {"problem": [{"role": "user", "text": "Hi"}]}]), tiny)
    (tmp_path / "latin.jsonl").write_bytes('{"problem": "Zürich?", "images": "a.png", "answer": "3"}\n'.encode("latin-1"))
    with pytest.raises(common.UserError, match="utf-8|UTF-8|Unicode") as error:
        load(str(tmp_path / "latin.jsonl"), tiny)
    assert "image" not in error.value.message


def test_every_row_bad(tmp_path, tiny, good):
    with pytest.raises(common.UserError, match="every row of"):
        load(write(tmp_path, [good | {"images": "missing.png"}]), tiny, skip=True)


def test_missing_file_column_split_and_empty_data(tmp_path, tiny, good):
    with pytest.raises(common.UserError, match="nothing-here"):
        load(str(tmp_path / "nothing-here"), tiny)
    with pytest.raises(common.UserError, match=r"no column 'question'.*--column-problem") as error:
        load(write(tmp_path, [good]), tiny, column_problem="question")
    assert "--eval-data" not in str(error.value)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(common.UserError, match="empty"):
        load(str(tmp_path / "empty.jsonl"), tiny)
    with pytest.raises(common.UserError, match="no such file"):
        load("nothing-here.parquet", tiny)
    (tmp_path / "broken.jsonl").write_text('{"problem": "a"\n{"problem"')
    with pytest.raises(common.UserError, match="JSON"):
        load(str(tmp_path / "broken.jsonl"), tiny)
    with pytest.raises(common.UserError, match=r"--eval-data ''"):
        common.load_rows(common.Args(eval_data=write(tmp_path, [good]), column_problem="x"), common.Processor(str(tiny / "student")), {}, held_out=True)
    with pytest.raises(common.UserError, match="files are not read"):
        load(write(tmp_path, [good], "rows.txt"), tiny)


def test_images_as_paths_lists_bytes_and_other_modes(tmp_path, tiny, good):
    """A path, a list of paths, and palette, grey and transparent pictures all arrive as RGB."""
    for mode in ("P", "L", "RGBA"):
        Image.new(mode, (64, 32)).save(tmp_path / f"{mode}.png")
    records = [good | {"images": [name]} for name in ("a.png", "P.png", "L.png", "RGBA.png")]
    rows = load(write(tmp_path, records), tiny)
    assert [rows[i]["images"][0].mode for i in range(4)] == ["RGB"] * 4
    import datasets

    data = [good | {"images": {"bytes": (tmp_path / "a.png").read_bytes(), "path": None}}]
    datasets.Dataset.from_list(data, features=datasets.Features({"problem": datasets.Value("string"), "images": datasets.Image(),
                                                                 "answer": datasets.Value("string")})).to_parquet(tmp_path / "bytes.parquet")
    assert load(str(tmp_path / "bytes.parquet"), tiny)[0]["images"][0].size == (64, 32)


# ---------------------------------------------------------------------------------------------------- models and folders
@pytest.mark.parametrize("file, spoil", [
    ("model.safetensors", lambda data: data[:5000]), ("model.safetensors", None), ("tokenizer.json", lambda data: data[:100]), ("config.json", lambda data: data[:100]),
    ("config.json", lambda data: data.replace(b'"hidden_size": ', b'"hidden_size": "x", "was": ')),
])
def test_a_spoilt_checkpoint_is_named(tiny, tmp_path, file, spoil):
    shutil.copytree(tiny / "student", tmp_path / "spoilt")
    path = tmp_path / "spoilt" / file
    path.write_bytes(spoil(path.read_bytes())) if spoil else path.unlink()
    result = run_script("vgs.py", *flags(tiny, tmp_path / "run", student=tmp_path / "spoilt"))
    assert result.returncode != 0 and "spoilt' cannot be read" in result.stderr and "Traceback" not in result.stderr, result.stderr


@pytest.mark.parametrize("output", ["file", "file/below"])
def test_an_output_that_cannot_be_a_folder_is_refused_early(tiny, tmp_path, output):
    (tmp_path / "file").write_text("x")
    result = run_script("vgs.py", *flags(tiny, tmp_path / output, student=tmp_path / "not looked at yet"))
    assert result.returncode != 0 and "cannot be written to" in result.stderr and "is a file" in result.stderr, result.stderr
    with pytest.raises(common.UserError, match="cannot be written to"):
        common.Records(str(tmp_path / output), {})


def test_a_run_that_is_resumed_needs_no_other_folder(tmp_path, monkeypatch):
    """Not even where runs/ could not be made."""
    (tmp_path / "runs").write_text("a file")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(common.UserError, match="holds no checkpoint to resume from"):
        common.Run("vgs", common.Args(resume=str(tmp_path / "run")))


def test_teacher_with_another_tokenizer_is_refused_before_weights_are_loaded(tiny, tmp_path):
    import toy

    shutil.copytree(tiny / "teacher", tmp_path / "teacher")
    toy.make_tokenizer(["completely other words, other merges " * 3]).save_pretrained(tmp_path / "teacher")
    (tmp_path / "teacher" / "model.safetensors").unlink()
    result = run_script("vgs.py", *flags(tiny, tmp_path / "run", teacher=tmp_path / "teacher"))
    assert result.returncode != 0 and "the tokenizers of student" in result.stderr and "Traceback" not in result.stderr, result.stderr


def test_text_only_teacher_is_refused(tiny, tmp_path):
    result = run_script("vgs.py", *flags(tiny, tmp_path / "run", teacher=tiny / "text-only"))
    assert result.returncode != 0 and "sees images and the other does not" in result.stderr and "Traceback" not in result.stderr, result.stderr


def test_text_only_student_is_refused(tiny, tmp_path):
    result = run_script("vgs.py", *flags(tiny, tmp_path / "run", student=tiny / "text-only", method="grpo", group=2, teacher=None))
    assert result.returncode != 0 and "text-only model" in result.stderr and "Traceback" not in result.stderr, result.stderr
    assert not (tmp_path / "run").exists(), "a refused run leaves no folder"


def test_a_tracker_that_is_not_installed_leaves_no_folder(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(common.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(common.UserError, match="pip install wandb"):
        common.Run("vgs", common.Args(output=str(tmp_path / "run"), tracker="wandb"))
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_goes_on_in_its_own_curves(tmp_path, monkeypatch):
    begun, logged, axes = [], [], []
    curves = types.SimpleNamespace(define_metric=lambda name, step_metric: axes.append((name, step_metric)), log=lambda values: logged.append(values))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **how: begun.append(how) or curves))
    monkeypatch.setattr(common.importlib.util, "find_spec", lambda name: True)
    state = tmp_path / "run" / "checkpoints" / "step-1" / "state"
    for saved in (False, False, True):
        if saved:
            state.mkdir(parents=True)
            for name in (".metadata", "progress.json"):
                (state / name).write_text("{}")
        run = common.Run("vgs", common.Args(output=str(tmp_path / "run"), tracker="wandb", resume="auto"))
        run.begin("")
        run.metrics(2, {"std": 0.5})
    first, anew, resumed = (how["id"] for how in begun)
    assert first != anew == resumed and all(how["resume"] == "allow" for how in begun)
    assert axes == [("*", "step")] * 3 and logged == [{"std": 0.5, "step": 2}] * 3  # over our steps, which a resumed run goes back in


def test_missing_checkpoint_is_named(tiny, tmp_path):
    result = run_script("vgs.py", *flags(tiny, tmp_path / "run", student=tmp_path / "nowhere"))
    assert result.returncode != 0 and "nowhere" in result.stderr and "Traceback" not in result.stderr, result.stderr


def test_a_folder_that_holds_a_run_is_left_alone(tiny, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "args.json").write_text("{}")
    result = run_script("vgs.py", *flags(tiny, tmp_path / "run"))
    assert result.returncode != 0 and "already holds a run" in result.stderr and "--output" in result.stderr, result.stderr
    assert (tmp_path / "run" / "args.json").read_text() == "{}"


def test_ranks_that_do_not_divide_the_batch(tiny, tmp_path):
    result = run_script("vgs.py", *flags(tiny, tmp_path / "run", prompts=3), torchrun=2)
    assert result.returncode != 0 and "2 ranks cannot share 3 questions" in result.stderr, result.stderr


def test_a_copy_without_toy_says_what_is_missing(tmp_path):
    for name in ("vgs.py", "common.py"):
        shutil.copy(ROOT / name, tmp_path)
    result = run_script("vgs.py", "--preset", "toy", cwd=tmp_path)
    assert result.returncode != 0 and "toy.py" in result.stderr and "--student" in result.stderr and "Traceback" not in result.stderr, result.stderr


@pytest.mark.parametrize("script, argv", [("vgs.py", "--analyze"), ("vold.py", "--stage traces"), ("vigos.py", "--palr"), ("ptdpo.py", "--analyze")])
def test_adapters_are_refused_where_nothing_is_trained(script, argv):
    assert "--lora would have no effect" in refusal(script, ["--preset", "toy", *argv.split(), "--lora", "4"])


@pytest.mark.parametrize("script, mode", [("ptdpo", "--make-hints --hint-model x"), ("ptdpo", "--analyze"), ("vigos", "--palr"), ("vgs", "--analyze"), ("vold", "--stage traces")])
def test_how_long_ranks_wait_can_be_said_where_nothing_is_trained(script, mode):
    method = importlib.import_module(script)
    args, given = common.parse_args(method.Args, method.PRESETS, ["--preset", "toy", *mode.split(), "--timeout", "90"])
    method.check_settings(args, given)
    assert args.timeout == 90
