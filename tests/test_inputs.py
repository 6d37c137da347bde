"""Bad settings and bad data: a clear error that names the thing and the remedy, before any model is loaded."""

import importlib
import json
import math
import shutil

import common
import vgs

import datasets
import pytest
from conftest import METHODS, ROOT, flags, refusal, run_script
from PIL import Image


def settings(*argv):
    args = common.parse_args(vgs.Args, vgs.PRESETS, vgs.RANGES, list(argv))
    vgs.check(args)
    return args


@pytest.mark.parametrize(
    "argv, words",
    [
        ("--preset toy --prompts 0", ["--prompts is 0", "[1, inf]"]),
        ("--preset toy --top-p 1.5", ["--top-p is 1.5", "1]"]),
        ("--preset toy --temperature 0", ["--temperature is 0", "2]"]),
        ("--preset toy --min-pixels 9000 --max-pixels 5000", ["9000 is above --max-pixels 5000"]),
        ("--preset toy --seed 100000000000000000000", ["--seed", "4.29497e+09]"]),
        ("--preset toy --alpha 1.5 --group 2", ["--alpha is 1.5", "[0, 1]"]),
        ("--preset toy --gamma -1", ["--gamma is -1", "[0, "]),
        ("--preset toy --lr nan", ["--lr is nan"]),
        ("--preset toy --lambda-lp inf", ["--lambda-lp is inf"]),
        ("--preset toy --alpha 0.3", ["--group", "at least 2"]),
        ("--preset toy --alpha 0", ["--group", "at least 2"]),
        ("--preset 2b", ["runs/teacher/final", "--preset teacher", "--teacher"]),
        ("--preset 2b --gamma 0.5", ["eta 0.41", "--measure-eta"]),
        ("--preset 4b --gamma 1", ["eta 0.36", "--measure-eta"]),
    ],
)
def test_contradictions(argv, words):
    with pytest.raises(common.UserError) as error:
        settings(*argv.split())
    assert all(word in error.value.code for word in words), error.value.code


@pytest.mark.parametrize("script", METHODS)
def test_the_numbers_of_every_method_have_ranges(script):
    """A range is of a setting that there is, holds every preset's value, and ends in refused numbers."""
    method = importlib.import_module(script.removesuffix(".py"))
    ranges, defaults = common.RANGES | method.RANGES, method.Args()
    names = {name for name, value in vars(defaults).items() if type(value) in (int, float)}
    assert set(common.RANGES) | set(method.RANGES) <= names | {"freeze_vision"}  # VOLD: a switch
    for preset in method.PRESETS:
        common.parse_args(method.Args, method.PRESETS, method.RANGES, ["--preset", preset])
    for name in names:
        low, high = ranges.get(name, (0, math.inf))
        step = 1 if type(getattr(defaults, name)) is int else max(abs(low), 1e-3) / 1000
        for value in [low - step] + [high + step] * (high < math.inf):
            flag = f"--{name.replace('_', '-')}"
            with pytest.raises(common.UserError, match=f"{flag} is .* must lie in"):
                argv = ["--preset", "toy", flag, str(value)]
                common.parse_args(method.Args, method.PRESETS, method.RANGES, argv)


def test_flags_override_the_preset_and_every_preset_parses():
    assert settings("--preset", "toy").lambda_lp == 0.3
    assert settings("--preset", "toy", "--lambda-lp", "0.1").lambda_lp == 0.1
    two, four = (settings("--preset", name, "--teacher", "x") for name in ("2b", "4b"))
    assert (two.eta, two.gamma, two.lambda_lp, two.lr) == (0.41, 2.0, 0.01, 1e-6)
    assert two.prompts * two.group == 512
    assert (four.eta, four.student) == (0.36, "Qwen/Qwen3-VL-4B-Instruct")
    teacher = settings("--preset", "teacher")
    assert (teacher.alpha, teacher.group, teacher.prompts, teacher.updates) == (0, 8, 512, 4)
    assert (teacher.top_p, teacher.epochs) == (0.99, 2)


@pytest.mark.parametrize(
    "argv, word", [("--gama 2", "--gama"), ("--engine sglang", "sglang"), ("--preset 9b", "9b")]
)
def test_unknown_flags_and_choices_are_named(argv, word):
    result = run_script("vgs.py", "--preset", "toy", *argv.split())
    assert result.returncode != 0 and word in result.stdout + result.stderr
    assert "Traceback" not in result.stderr


def test_vllm_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(common.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(common.UserError, match="pip install -r requirements-vllm.txt"):
        settings("--preset", "toy", "--engine", "vllm")
    assert settings("--preset", "toy").engine == "hf"


# ------------------------------------------------------------------------------------------------ data
def write(folder, records, name="rows.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


@pytest.fixture
def good(tmp_path):
    Image.new("RGB", (64, 32), "white").save(tmp_path / "a.png")
    return {"problem": "How many?", "images": "a.png", "answer": "3"}


def load(path, tiny, skip=False, names="problem images answer", **changes):
    args = common.Args(data=path, skip_bad_rows=skip, **changes)
    processor = common.Processor(str(tiny / "student"))
    views = {"image": vgs.with_image, "text": vgs.without_image}
    return common.load_rows(args, processor, views, names)


def bad_rows(folder, good) -> list[tuple]:
    """Rows, and what is said of each."""
    Image.new("RGB", (64, 8)).save(folder / "flat.png")
    Image.new("RGB", (16 * 250, 16)).save(folder / "thin.png")
    (folder / "text.png").write_text("not an image")
    Image.new("I;16", (64, 64)).save(folder / "deep.png")
    return [
        (good | {"images": "missing.png"}, "missing.png"),
        (good | {"images": "text.png"}, "cannot identify image"),
        (good | {"images": "deep.png"}, "I;16"),
        (good | {"images": "thin.png"}, "aspect ratio"),
        (good | {"images": ["a.png", None]}, "no file below --image-root"),
        (
            good | {"problem": "<image>Left? <image>Right?"},
            "marks images [1, 2] or videos, and has 1",
        ),
        (good | {"problem": "<image 2>Which?"}, "marks images [2] or videos, and has 1"),
        (good | {"problem": "<video>Which?"}, "marks images [] or videos, and has 1"),
        (good | {"problem": "<image>"}, "no question"),
        (good | {"answer": " "}, "no answer"),
        (good | {"answer": None}, "no answer"),
        (good | {"answer": "$$"}, "no answer"),
        (good | {"problem": ""}, "no question"),
        (good | {"problem": None}, "question is no text"),
        (good | {"problem": "why " * 2000}, "--max-prompt"),
    ]


def test_each_bad_row_is_named_and_can_be_skipped(tmp_path, tiny, good):
    cases = bad_rows(tmp_path, good)
    path = write(tmp_path, [good, *(row for row, _ in cases), good])
    with pytest.raises(common.UserError) as error:
        load(path, tiny)
    message = error.value.code
    assert f"{len(cases)} of {len(cases) + 2} rows" in message and "--skip-bad-rows" in message
    for i, (_, words) in enumerate(cases, start=1):
        said = [line for line in message.splitlines() if line.strip().startswith(f"row {i}: ")]
        assert len(said) == 1 and words in said[0], (i, words, message)
    rows = load(path, tiny, skip=True)
    assert [rows[i]["index"] for i in range(len(rows))] == [0, len(cases) + 1]


def test_a_file_that_is_cut_off_is_named_when_its_row_is_drawn(tmp_path, tiny, good):
    """The check reads headers alone: 47,000 photographs would take an hour to decode."""
    Image.effect_noise((64, 64), 80).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:700])
    rows = load(write(tmp_path, [good, good | {"images": "cut.png"}]), tiny)
    assert rows[0]["images"]
    with pytest.raises(common.UserError, match=r"row \[1\] .* cannot be decoded \(.*truncated"):
        rows[1]


def test_of_many_bad_rows_the_first_are_named(tmp_path, tiny, good):
    path = write(tmp_path, [good] + [good | {"images": "missing.png"}] * 25)
    with pytest.raises(common.UserError, match="25 of 26 rows") as error:
        load(path, tiny)
    assert error.value.code.count("missing.png") == 20


def test_an_empty_answer_is_fine_where_no_reward_needs_it(tmp_path, tiny, good):
    assert len(load(write(tmp_path, [good | {"answer": ""}]), tiny, names="problem images")) == 1


@pytest.mark.parametrize("answer", [[], [""], ["3", ""], [None], ["3", None]])
def test_of_several_answers_none_may_be_empty(tmp_path, tiny, good, answer):
    """An empty one would reward an empty box."""
    with pytest.raises(common.UserError, match="row 0: there is no answer"):
        load(write(tmp_path, [good | {"answer": answer}, good | {"answer": ["3", "4"]}]), tiny)


def test_a_chat_without_content_and_text_in_another_encoding_are_named(tmp_path, tiny, good):
    chat = good | {"problem": [{"role": "user", "text": "Hi"}]}
    with pytest.raises(common.UserError, match="row 0: the question is no text"):
        load(write(tmp_path, [chat]), tiny)
    line = '{"problem": "Zürich?", "images": "a.png", "answer": "3"}\n'
    (tmp_path / "latin.jsonl").write_bytes(line.encode("latin-1"))
    with pytest.raises(common.UserError, match="utf-8|UTF-8|Unicode"):
        load(str(tmp_path / "latin.jsonl"), tiny)


def test_every_row_bad(tmp_path, tiny, good):
    with pytest.raises(common.UserError, match="1 of 1 rows"):
        load(write(tmp_path, [good | {"images": "missing.png"}]), tiny, skip=True)


def test_missing_file_column_split_and_empty_data(tmp_path, tiny, good):
    with pytest.raises(common.UserError, match="nothing-here"):
        load(str(tmp_path / "nothing-here"), tiny)
    with pytest.raises(common.UserError, match="nothing-here.parquet.* cannot be read"):
        load("nothing-here.parquet", tiny)
    path = write(tmp_path, [good])
    with pytest.raises(common.UserError, match="no column 'question'.*--column-problem"):
        load(path, tiny, column_problem="question")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(common.UserError, match="empty.jsonl"):
        load(str(tmp_path / "empty.jsonl"), tiny)
    (tmp_path / "broken.jsonl").write_text('{"problem": "a"\n{"problem"')
    with pytest.raises(common.UserError, match="JSON"):
        load(str(tmp_path / "broken.jsonl"), tiny)
    for name in ("rows.zip", "rows.tsv"):
        with pytest.raises(
            common.UserError, match=f"{name}.* cannot be read(.|\n)*.parquet, .json"
        ):
            load(write(tmp_path, [good], name), tiny)


def test_images_as_paths_lists_bytes_and_other_modes(tmp_path, tiny, good):
    """A path, a list of paths, and palette, grey and transparent pictures all arrive as RGB."""
    for mode in ("P", "L", "RGBA"):
        Image.new(mode, (64, 32)).save(tmp_path / f"{mode}.png")
    files = ("a.png", "P.png", "L.png", "RGBA.png")
    rows = load(write(tmp_path, [good | {"images": [name]} for name in files]), tiny)
    assert [rows[i]["images"][0].mode for i in range(4)] == ["RGB"] * 4
    data = [good | {"images": {"bytes": (tmp_path / "a.png").read_bytes(), "path": None}}]
    text = datasets.Value("string")
    features = datasets.Features({"problem": text, "images": datasets.Image(), "answer": text})
    path = tmp_path / "bytes.parquet"
    datasets.Dataset.from_list(data, features=features).to_parquet(path)
    assert load(str(path), tiny)[0]["images"][0].size == (64, 32)


def test_held_out_rows_are_a_fixed_random_choice(tmp_path, tiny, good):
    """Data sets are often sorted. --eval-rows 0 takes all."""
    path = write(tmp_path, [good | {"answer": str(i)} for i in range(30)])
    processor, found = common.Processor(str(tiny / "student")), []
    for rows in (8, 8, 0):
        args = common.Args(eval_data=[path], eval_rows=rows)
        (data,) = common.load_held_out(args, processor, {}, "problem images answer").values()
        found.append([data[i]["index"] for i in range(len(data))])
        assert [data[i]["answer"] for i in range(len(data))] == [str(i) for i in found[-1]]
    assert found[0] == found[1] != list(range(8)) and len(set(found[0])) == 8
    assert found[2] == list(range(30))
    for none in ([], [""]):
        assert common.load_held_out(common.Args(eval_data=none), processor, {}, "problem") == {}


# ------------------------------------------------------------------------------------------------ models and folders
@pytest.mark.parametrize(
    "file, spoil",
    [
        ("model.safetensors", lambda data: data[:5000]),
        ("model.safetensors", None),
        ("tokenizer.json", lambda data: data[:100]),
        ("config.json", lambda data: data[:100]),
        (
            "config.json",
            lambda data: data.replace(b'"hidden_size": ', b'"hidden_size": "x", "was": '),
        ),
    ],
)
def test_a_spoilt_checkpoint_is_named(tiny, tmp_path, file, spoil):
    shutil.copytree(tiny / "student", tmp_path / "spoilt")
    path = tmp_path / "spoilt" / file
    path.write_bytes(spoil(path.read_bytes())) if spoil else path.unlink()
    said = refusal("vgs.py", flags(tiny, tmp_path / "run", student=tmp_path / "spoilt"))
    assert "spoilt' cannot be read" in said, said


@pytest.mark.parametrize("output", ["file", "file/below"])
def test_an_output_that_cannot_be_a_folder_is_refused_early(tiny, tmp_path, output):
    (tmp_path / "file").write_text("x")
    said = refusal("vgs.py", flags(tiny, tmp_path / output, student=tmp_path / "not looked at"))
    assert f"{tmp_path / output} cannot be used" in said and "--output" in said, said


@pytest.mark.parametrize("settings", ["{}", "not JSON", "{"])
def test_a_folder_of_unknown_settings_is_left_alone(tiny, tmp_path, settings):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "args.json").write_text(settings)
    said = refusal("vgs.py", flags(tiny, tmp_path / "run"))
    assert "other settings" in said or "no args.json that can be read" in said, said
    assert "--output" in said and (tmp_path / "run" / "args.json").read_text() == settings


def test_a_teacher_with_another_tokenizer_is_refused_before_weights_are_loaded(tiny, tmp_path):
    shutil.copytree(tiny / "teacher", tmp_path / "teacher")
    file = tmp_path / "teacher" / "tokenizer.json"
    known = json.loads(file.read_text())
    vocab = known["model"]["vocab"]
    one, other = list(vocab)[40:42]
    vocab[one], vocab[other] = vocab[other], vocab[one]
    file.write_text(json.dumps(known))
    (tmp_path / "teacher" / "model.safetensors").unlink()
    said = refusal("vgs.py", flags(tiny, tmp_path / "run", teacher=tmp_path / "teacher"))
    assert "read tokens or images differently" in said and repr(one) in said, said


def test_a_teacher_that_sees_images_otherwise_is_refused(tiny, tmp_path):
    shutil.copytree(tiny / "teacher", tmp_path / "teacher")
    file = tmp_path / "teacher" / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_mean": [0.1, 0.2, 0.3]}))
    said = refusal("vgs.py", flags(tiny, tmp_path / "run", teacher=tmp_path / "teacher"))
    assert "differently: ['image_mean']" in said, said


def test_a_text_only_teacher_is_refused(tiny, tmp_path):
    said = refusal("vgs.py", flags(tiny, tmp_path / "run", teacher=tiny / "text-only"))
    assert "read tokens or images differently" in said, said


def test_a_text_only_student_is_refused(tiny, tmp_path):
    """Its prompt would not show the image."""
    changes = dict(student=tiny / "text-only", alpha=0, group=2, teacher=None)
    said = refusal("vgs.py", flags(tiny, tmp_path / "run", **changes))
    assert "text-only' shows 0 of the prompt's 1 images" in said, said


def test_a_missing_checkpoint_is_named(tiny, tmp_path):
    assert "nowhere" in refusal(
        "vgs.py", flags(tiny, tmp_path / "run", student=tmp_path / "nowhere")
    )


def test_too_little_data_for_a_batch_is_named(tiny, tmp_path):
    said = refusal("vgs.py", flags(tiny, tmp_path / "run", max_steps=0, prompts=32))
    assert "24 rows do not fill one batch of --prompts 32" in said, said


def test_copies_that_do_not_divide_the_ranks(tiny, tmp_path):
    assert "the ranks one of --replicas, 3" in refusal(
        "vgs.py", flags(tiny, tmp_path / "run", replicas=3)
    )


def test_a_copy_without_the_tools_says_what_is_missing(tmp_path):
    for name in ("vgs.py", "common.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    result = run_script("vgs.py", "--preset", "toy", cwd=tmp_path)
    assert result.returncode == 1 and "'toy/student' is made by tools/toy.py" in result.stderr
    assert "--student" in result.stderr and "Traceback" not in result.stderr, result.stderr
