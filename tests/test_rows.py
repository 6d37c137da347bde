"""Rows: used as they are meant, or refused by name. Nothing is changed, reordered or left out without a line."""

import base64
import decimal
import json

import common
import ptdpo
import vgs
import vigos
from tools import palr

import datasets
import pyarrow
import pyarrow.parquet as pq
import pytest
from conftest import flags, run_script
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

SIZES = {"a.png": (64, 32), "b.png": (96, 32), "c.png": (32, 96)}
GOOD = {"problem": "How many?", "images": ["a.png"], "answer": "3"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows")
    for name, size in SIZES.items():
        Image.new("RGB", size, "white").save(path / name)
    return path


@pytest.fixture(scope="module")
def processor(tiny):
    return common.Processor(str(tiny / "student"))


def write(folder, records, name="rows.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def load(path, processor, held_out=False, **changes):
    args = common.Args(data=path, eval_data=[path], **changes)
    views = {"image": vgs.with_image, "text": vgs.without_image}
    wanted = (args, processor, views, "problem images answer")
    if held_out:
        return common.load_held_out(*wanted)[f"acc@1/{path}"]
    return common.load_rows(*wanted)


def refused(path, processor, **changes) -> str:
    with pytest.raises(common.UserError) as error:
        load(path, processor, **changes)
    return error.value.code


def sizes(row) -> list:
    return [image.size for image in row["images"]]


# ------------------------------------------------------------------------------------------------ marks and chats
def test_numbered_marks_are_read_in_their_order(folder, processor):
    a, b = SIZES["a.png"], SIZES["b.png"]
    records = [
        GOOD | {"problem": "Is <image 2> like <image 1>?", "images": ["a.png", "b.png"]},
        GOOD | {"problem": "<image1><image2>Which?", "images": ["a.png", "b.png"]},
        GOOD | {"problem": "<image 1> is red. Is <image 1> round?", "images": ["a.png"]},
        GOOD | {"problem": "Which?", "images": ["a.png", "b.png"]},
    ]
    rows = list(load(write(folder, records), processor))
    assert [sizes(row) for row in rows] == [[b, a], [a, b], [a, a], [a, b]]
    assert rows[0]["problem"] == "Is <image> like <image>?"
    shown = vgs.with_image(rows[0]).messages[-1]["content"]
    assert [part["type"] for part in shown] == ["text", "image", "text", "image", "text"]


@pytest.mark.parametrize(
    "problem, images",
    [
        ("Look at <image> first.", ["a.png", "b.png"]),
        ("<image>Left? <image>Right?", ["a.png"]),
        ("<image>Left? <image>Right?", ["a.png", None]),
        ("<image 1> and <image 3>?", ["a.png", "b.png"]),
        ("<image>Where?", []),
        ("<video>Where?", ["a.png"]),
    ],
)
def test_marks_and_images_that_differ_are_named(folder, processor, problem, images):
    record = GOOD | {"problem": problem, "images": images}
    said = refused(write(folder, [GOOD, record]), processor)
    assert "1 of 2 rows" in said and "row 1: " in said, said


def test_chats(folder, processor):
    user = {"role": "user", "content": "<image>How many?"}
    system = {"role": "system", "content": "Be short."}
    rows = list(load(write(folder, [GOOD | {"problem": [user]}] * 2), processor))
    assert rows[0]["problem"] == "<image>How many?"
    rows = list(load(write(folder, [GOOD | {"problem": [system, user]}]), processor))
    assert rows[0]["problem"] == "Be short.\n\n<image>How many?"
    parts = [
        {"type": "text", "text": "How many in "},
        {"type": "image"},
        {"type": "text", "text": "?"},
    ]
    chat = [{"role": "user", "content": parts}]
    rows = list(load(write(folder, [GOOD | {"problem": chat}]), processor))
    assert rows[0]["problem"] == "How many in <image>?"
    answer = {"role": "assistant", "content": "Three."}
    for turns in ([user, answer], [user, answer, user], [user, user], [answer], [system]):
        said = refused(write(folder, [GOOD | {"problem": turns}]), processor)
        assert f"a chat of {[turn['role'] for turn in turns]} is no question" in said, said


@pytest.mark.parametrize(
    "mark", ["<image_1>", "<Image 1>", "<img>", "<|image|>", "<image/>", "<image >"]
)
def test_marks_in_other_spellings_are_marks(folder, processor, mark):
    (row,) = load(write(folder, [GOOD | {"problem": f"Is {mark} red?"}]), processor)
    assert row["problem"] == "Is <image> red?"


def test_a_mark_behind_the_question_is_text(folder, processor):
    """A hint or a solution that spells one takes no image from the question."""
    (row,) = load(write(folder, [GOOD]), processor)
    row |= {"hint": "In <image> there are some.", "reference": "In <image> there are 3."}
    for context in (vigos.privileged(row), ptdpo.tutored(row, "hint")):
        kinds = [part["type"] for part in context.messages[-1]["content"]]
        assert kinds == ["image", "text"], context


# ------------------------------------------------------------------------------------------------ columns and types
def test_objects_and_mixed_types_are_refused_and_nested_columns_named(folder, processor):
    said = refused(write(folder, [GOOD | {"answer": {"role": "user", "content": "3"}}]), processor)
    assert "column 'answer'" in said and "'content'" in said and "with a dot" in said, said
    said = refused(write(folder, [GOOD | {"answer": x} for x in (3, "[10, 20]", "B")]), processor)
    assert "column 'answer'" in said and "several types" in said, said
    nested = {"problem": "How many?", "images": ["a.png"], "reward": {"style": "x", "truth": "3"}}
    path = write(folder, [nested])
    said = refused(path, processor)
    assert "no column 'answer'" in said and "reward.truth" in said, said
    assert load(path, processor, column_answer="reward.truth")[0]["answer"] == "3"


@pytest.mark.parametrize(
    "values", [["2024-01-02"] * 2, [[{"text": "3"}]], [[["3", "4"]]], [[10, "20"]]], ids=str
)
def test_answers_of_a_kind_that_no_response_meets_are_refused(folder, processor, values):
    said = refused(write(folder, [GOOD | {"answer": value} for value in values]), processor)
    assert "column 'answer'" in said and "as texts" in said, said


def with_answers(tiny, file, answers) -> str:
    """The tiny rows with these answers, hints and solutions."""
    table = pq.read_table(tiny / "rows.parquet").replace_schema_metadata(None)
    for name in ("answer", "hint", "solution"):
        if name in table.column_names:
            table = table.drop_columns(name)
        table = table.append_column(name, answers)
    pq.write_table(table, file)
    return str(file)


DECIMALS = [decimal.Decimal("3.50")] * 24
LISTS = [[decimal.Decimal("3.50"), decimal.Decimal("2.00")]] * 24


@pytest.mark.parametrize(
    "answers, written",
    [
        (pyarrow.array(DECIMALS, pyarrow.decimal128(10, 2)), "3.50"),
        (pyarrow.array(DECIMALS, pyarrow.decimal256(50, 2)), "3.50"),
        (pyarrow.array(LISTS, pyarrow.list_(pyarrow.decimal128(10, 2))), ["3.50", "2.00"]),
        (pyarrow.array([2**64 - 1] * 24, pyarrow.uint64()), 2**64 - 1),
        (pyarrow.array([0] * 24), 0),
        (pyarrow.array([0.0] * 24), 0.0),
        (pyarrow.array([False] * 24), False),
        (pyarrow.array(["0"] * 24), "0"),
        (pyarrow.array([[0]] * 24), [0]),
    ],
    ids=lambda x: str(getattr(x, "type", "")),
)
def test_answers_of_every_kind_train_and_are_written(tiny, tmp_path, answers, written):
    """Hints and solutions too: 0 and False are there, and a tutor is told them."""
    path = with_answers(tiny, tmp_path / "rows.parquet", answers)
    changes = dict(teacher=None, data=path, eval_data=path, max_steps=1, max_response=4, group=2)
    changes["tutor_context"] = "solution"
    result = run_script("ptdpo.py", *flags(tiny, tmp_path / "run", **changes))
    assert result.returncode == 0, result.stderr
    samples = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    assert {repr(json.loads(line)["answer"]) for line in samples} == {repr(written)}
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["without_solution"] == 0 and last["tutored_tokens"] == 1


@pytest.mark.parametrize("value", [0, 0.0, False, "0", [0], [False], decimal.Decimal("0.00")])
def test_zero_is_an_answer_a_hint_and_a_solution(value):
    row = dict(problem="How many?", images=[], answer=value, hint=value, solution=value)
    assert not common.is_empty(value)
    for knows in ptdpo.KNOWLEDGE:
        assert ptdpo.tutored(row, knows) is not None
    text = vigos.with_reference(row | {"reference": value})
    assert text.endswith(str(value[0] if isinstance(value, list) else value))
    assert palr.choose_wrong([value], "7", 4) == common.all_answers(value)


@pytest.mark.parametrize(
    "kind", [pyarrow.binary(), pyarrow.large_binary(), pyarrow.binary_view(), pyarrow.binary(3)]
)
def test_bytes_are_no_answers(tiny, tmp_path, processor, kind):
    path = with_answers(tiny, tmp_path / "rows.parquet", pyarrow.array([b"abc"] * 24, kind))
    said = refused(path, processor)
    assert "column 'answer'" in said and "as texts" in said, said


def test_class_labels_are_refused(folder, processor):
    """Their number is no answer."""
    features = datasets.Features(
        problem=datasets.Value("string"),
        images=datasets.List(datasets.Value("string")),
        answer=datasets.ClassLabel(names=["cat", "dog"]),
    )
    data = datasets.Dataset.from_list([GOOD | {"answer": 1}], features=features)
    data.to_parquet(folder / "labels.parquet")
    assert "ClassLabel" in refused(str(folder / "labels.parquet"), processor)


def test_a_column_may_be_called_index(folder, processor):
    path = write(folder, [{"problem": "How many?", "images": "a.png", "index": "3"}] * 2)
    rows = load(path, processor, column_answer="index")
    assert [(row["answer"], row["index"]) for row in rows] == [("3", 0), ("3", 1)]


def test_numbers_of_one_type_are_answers(folder, processor):
    for values in ([3, 4], [2.5, 3.0], ["3", "4"], [["3", "three"], ["4"]]):
        rows = load(write(folder, [GOOD | {"answer": value} for value in values]), processor)
        assert [row["answer"] for row in rows] == values


def test_none_and_na_are_answers_in_csv(folder, processor):
    (folder / "rows.csv").write_text(
        "problem,images,answer\n"
        + "".join(f"Which?,a.png,{answer}\n" for answer in ("None", "NA", "null", "nan"))
    )
    rows = load(str(folder / "rows.csv"), processor)
    assert [row["answer"] for row in rows] == ["None", "NA", "null", "nan"]
    (folder / "rows.csv").write_text("problem,images,answer\nWhich?,a.png,007\nWhich?,a.png,1.50\n")
    rows = load(str(folder / "rows.csv"), processor)
    assert [row["answer"] for row in rows] == ["007", "1.50"]
    (folder / "rows.csv").write_text("problem,images,answer\nWhich?,a.png,3\nWhich?,a.png,\n")
    assert "row 1: there is no answer" in refused(str(folder / "rows.csv"), processor)


def test_rows_of_a_csv_that_are_longer_than_its_header_are_refused(folder, processor):
    """pandas would take their first cells for the rows' names, and shift all others."""
    (folder / "long.csv").write_text("problem,answer\nHow many are 1, 2 and 3?,3\n")
    with pytest.raises(common.UserError, match="more fields than its header"):
        common.load_data(str(folder / "long.csv"), "train")


def test_columns_that_nobody_asked_for_do_no_harm(folder, processor):
    image = {"bytes": (folder / "a.png").read_bytes(), "path": None}
    record = GOOD | {"index": "x", "tables": [[1, 2], [3]], "figures": {"left": image}}
    text = datasets.Value("string")
    features = datasets.Features(
        problem=text,
        images=datasets.List(text),
        answer=text,
        index=text,
        tables=datasets.List(datasets.List(datasets.Value("int64"))),
        figures={"left": datasets.Image()},
    )
    path = folder / "unused.parquet"
    datasets.Dataset.from_list([record], features=features).to_parquet(path)
    (row,) = load(str(path), processor)
    assert sizes(row) == [SIZES["a.png"]] and row["index"] == 0


def test_messages_stay_short_whatever_a_cell_holds(folder, processor):
    huge = base64.b64encode(bytes(100_000)).decode()
    records = [
        GOOD | {"images": [huge]},
        GOOD | {"problem": f"<image>{huge}"},
        GOOD | {"problem": f"<image><image>{huge}"},
    ]
    said = refused(write(folder, records), processor)
    assert "3 of 3 rows" in said and max(map(len, said.splitlines())) < 400


# ------------------------------------------------------------------------------------------------ images
def test_photographs_stand_upright(folder, processor):
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera on its side
    Image.new("RGB", (96, 32), "white").save(folder / "phone.jpg", exif=exif)
    (row,) = load(write(folder, [GOOD | {"images": ["phone.jpg"]}]), processor)
    assert sizes(row) == [(32, 96)]


def test_a_missing_image_says_where_it_was_looked_for(folder, processor):
    said = refused(write(folder, [GOOD | {"images": ["x/1.png"]}]), processor)
    assert f"{folder}/x/1.png" in said and "--image-root" in said, said


def test_more_images_than_vllm_makes_room_for_are_refused(folder, processor):
    path = write(
        folder, [dict(problem="Which?", images=["a.png"] * n, answer="3") for n in (16, 17)]
    )
    assert "row 1: the prompt has" in refused(path, processor, max_prompt=4096)
    assert "row 0" not in refused(path, processor, max_prompt=4096)


def test_limits_of_pixels(folder, processor, tiny):
    args = common.Args(min_pixels=100_000, max_pixels=120_000)
    limited = common.Processor(str(tiny / "student"), args)
    (row,) = load(write(folder, [GOOD]), limited)
    area = limited.encode(vgs.with_image(row)).grid.prod() * limited.images.patch_size**2
    assert 100_000 <= area <= 120_000
    plain = processor.encode(vgs.with_image(row)).grid.prod() * processor.images.patch_size**2
    assert plain < 10_000


def test_rows_without_images_train_beside_rows_with(tiny, tmp_path):
    """On two ranks, of which one may have nothing to look at; on one they are read as well."""
    Image.new("RGB", (64, 32), "red").save(tmp_path / "a.png")
    more = {"solution": "3", "hint": "Look: there. Think: so."}
    write(tmp_path, [GOOD | more | {"images": x} for x in (["a.png"], [], None, ["a.png"])])
    for script, changes in (
        ("vgs.py", dict(alpha=0.3, group=2)),
        ("ptdpo.py", dict(teacher=None, group=2, lambda_ptd=0.5)),
        ("vigos.py", dict(teacher=None, column_reference="solution", conflict_data="")),
    ):
        changes |= dict(data=tmp_path / "rows.jsonl", eval_data=tmp_path / "rows.jsonl")
        argv = flags(tiny, tmp_path / script, prompts=2, max_steps=4, **changes)
        result = run_script(script, *argv, ranks=2, timeout=300)
        assert result.returncode == 0, (script, result.stderr[-2000:])
        lines = (tmp_path / script / "metrics.jsonl").read_text().splitlines()
        # an untrained student gives placeholders, which the sampler lacks, a hundredth of its mass
        assert all(json.loads(line)["sampler_gap"] < 0.02 for line in lines[1:]), lines


# ------------------------------------------------------------------------------------------------ held-out rows
def test_held_out_rows_are_never_left_out(folder, processor):
    """A figure on other rows would be another figure. Their prompts have a limit of their own."""
    path = write(folder, [GOOD, GOOD | {"images": ["missing.png"]}])
    assert len(load(path, processor, skip_bad_rows=True)) == 1
    assert "1 of 2 rows" in refused(path, processor, held_out=True, skip_bad_rows=True)
    path = write(folder, [GOOD, GOOD | {"problem": "why " * 300}])
    said = refused(path, processor, held_out=True, max_prompt=200)
    assert "--eval-max-prompt" in said, said
    assert len(load(path, processor, held_out=True, max_prompt=200, eval_max_prompt=2000)) == 2


# ------------------------------------------------------------------------------------------------ all of it
PIECES = st.sampled_from(["How many?", "<image>", "<image 1>", "<image 2>", " and ", "<b>", "Ω"])
PROBLEM = st.lists(PIECES, max_size=5).map("".join)
IMAGES = st.lists(st.sampled_from(sorted(SIZES)), max_size=3)
ANSWER = st.sampled_from(["3", "B", "(B) 12", "", " ", "None", "1/2", "left of the car"])


def as_chat(problem: str, form: str):
    if form == "text":
        return problem
    return [{"role": "user", "content": problem}]


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.tuples(PROBLEM, IMAGES, ANSWER), min_size=1, max_size=6),
    st.sampled_from(["text", "chat"]),
)
def test_every_row_is_there_as_it_was_or_is_named(tmp_path_factory, folder, processor, rows, form):
    records = []
    for problem, images, answer in rows:
        records.append({"problem": as_chat(problem, form), "images": images, "answer": answer})
    always = {"problem": as_chat("How many?", form), "images": ["a.png"], "answer": "3"}
    path = write(folder, [always, *records], "random.jsonl")
    named = set()
    try:
        found = list(load(path, processor))
    except common.UserError as e:
        named = {int(line.split()[1][:-1]) for line in e.code.splitlines() if "  row " in line}
        found = list(load(path, processor, skip_bad_rows=True))
    places = [row["index"] for row in found]
    assert places == sorted(set(range(len(records) + 1)) - named)
    for row in found[1:]:
        problem, images, answer = rows[row["index"] - 1]
        marks = [mark for mark in ("<image>", "<image 1>", "<image 2>") if mark in problem]
        assert row["answer"] == answer and answer.strip()
        for mark in ("<image 1>", "<image 2>"):
            problem = problem.replace(mark, "<image>")
        if "<image>" not in problem:
            problem = "<image>" * len(images) + problem
        assert row["problem"] == problem
        if not any("1" in mark or "2" in mark for mark in marks):
            assert sizes(row) == [SIZES[name] for name in images]
        else:
            assert {*sizes(row)} == {SIZES[name] for name in images}
