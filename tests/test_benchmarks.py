"""Every line of tools/benchmarks.csv, on rows in the published schema: questions, images, verdicts, group metrics."""

import json
import re
import sys
from pathlib import Path

import common
from tools import benchmarks, evaluate, protocols, rules, scores

import datasets
import huggingface_hub
import pytest
from benchmark_rows import DIFFERENCES, SETS, png, shown
from conftest import ROOT, run_script

NAMES = list(benchmarks.benchmarks())


# =============================================================================================== files
def save(name: str, folder: Path, rows: list[dict] | None = None) -> Path:
    """Rows as the hub has them: a parquet file, or a jsonl file beside its images."""
    published = SETS[name]
    rows = rows or published.rows
    if published.files:
        folder = folder / name
        for path, image in published.files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(image)
        lines = "".join(f"{json.dumps(row)}\n" for row in rows)
        (folder / "test_questions.jsonl").write_text(lines)
        return folder
    file = folder / f"{name}.parquet"
    as_published(rows).to_parquet(file)
    return file


def as_published(rows: list[dict]) -> datasets.Dataset:
    """With columns of images, wherever a cell is one, or where all seven may be."""
    features = dict(datasets.Dataset.from_list(rows).features)
    for column in features:
        cells = [row[column] for row in rows if row[column] is not None]
        first = cells[0] if cells else None
        if (
            isinstance(first, dict)
            and "bytes" in first
            or column.startswith("image_")
            and not cells
        ):
            features[column] = datasets.Image()
        if isinstance(first, list) and first and isinstance(first[0], dict) and "bytes" in first[0]:
            features[column] = datasets.List(datasets.Image())
    return datasets.Dataset.from_list(rows, features=datasets.Features(features))


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> list[str]:
    """NAME=PATH of every benchmark."""
    folder = tmp_path_factory.mktemp("published")
    return [f"{name}={save(name, folder)}" for name in NAMES]


@pytest.fixture(scope="module")
def evaluated(tiny, local, tmp_path_factory) -> Path:
    """Every benchmark, answered by an untrained model in one start."""
    output = tmp_path_factory.mktemp("evaluated")
    # of a start that was stopped before it knew all rows
    (output / "sets").mkdir()
    (output / "sets/mmstar.parquet").write_text("old")
    argv = ["--model", tiny / "student", "--prompt", "vgs", "--sets", *local, "--output", output]
    short = ["--max-response", 4, "--dtype", "float32", "--rollout-batch", 256]
    result = run_script("-m", "tools.evaluate", *argv, *short)
    assert result.returncode == 0, result.stderr
    (output / "stdout").write_text(result.stdout)
    return output


@pytest.fixture(scope="module")
def answers(evaluated) -> dict[str, list[dict]]:
    """Name -> the lines of answers.jsonl."""
    return scores.by(list(map(json.loads, (evaluated / "answers.jsonl").open())), "set")


def test_rows_of_every_benchmark():
    assert set(SETS) == set(NAMES)


def test_the_sets_of_a_paper_s_table():
    """Table 1 of each."""
    tables = {
        "vgs": "mmmu-pro-4 logicvista mathverse-vd mathverse-vo visualpuzzles mathvision vlmsareblind",
        "vold": "mmmu-pro-vision mmstar mathvision mathvista mathverse dynamath wemath logicvista",
        "ptdpo": "mmk12 geo3k mathverse-choice mathvista-choice wemath mmmu-pro-vision counting mathverse-v logicvista",
        "reopold-math": "aime24 aime25 amc23 math-500 minerva olympiadbench",
        "reopold-visual": "geo3k mathverse mathvision mathvista wemath hallusionbench",
        "reopold-agentic": "v-star infovqa tallyqa",
    }
    for name, table in tables.items():
        assert set(benchmarks.of_protocol(name)) == set(table.split()), name


# =============================================================================================== questions and images
@pytest.mark.parametrize("name", NAMES)
def test_questions_and_images(name, answers, evaluated):
    written = datasets.load_dataset("parquet", data_files=f"{evaluated}/sets/{name}.parquet")[
        "train"
    ]
    assert len(written) == len(answers[name]) == len(SETS[name].asked)
    for record, row, (question, widths) in zip(answers[name], written, SETS[name].asked):
        assert record["problem"] == question
        assert record["images"] == [f"{width} x 32" for width in widths.split()]
        # the marks are the images' places in the prompt
        before, *rest = question.split("<image>")
        assert all(piece in record["prompt"] for piece in [before, *rest])
        assert question.count("<image>") == len(record["images"])
        # a mark that is there twice shows one image twice
        stored = sorted(f"{image.width} x {image.height}" for image in row["images"])
        assert stored == sorted(set(record["images"]))


CATEGORIES = {
    "mmmu-pro-4": "Art",
    "mmmu-pro-10": "Art",
    "mmmu-pro-vision": "Math",
    "mathverse": "Text Dominant",
    "mathverse-choice": "Text Dominant",
    "mathverse-v": "Vision Only",
    "mathvision": "metric geometry - length",
    "mathvision-mini": "metric geometry - length",
    "mathvista": "multi_choice",
    "logicvista": "inductive",
    "visualpuzzles": "inductive",
    "vlmsareblind": "Line Plot Intersections",
    "mmstar": "coarse perception/image scene and topic",
    "hallusionbench": "VD/illusion",
    "dynamath": "algebra",
    "wemath": "3steps_3",
    "vilp": "prior",
    "cv-bench": "2D/ADE20K",
    "mmsi": "Motion (Cam.)",
    "mm-vet": "ocr,math",
    "v-star": "direct_attributes",
    "tallyqa": "simple",
    "math-500": "Precalculus",
    "olympiadbench": "Math",
}


def test_categories(answers):
    """Of the first rows; other sets have none."""
    found = {name: records[0]["category"] for name, records in answers.items()}
    assert found == dict.fromkeys(NAMES, "") | CATEGORIES


# =============================================================================================== verdicts
def verdict(record: dict, response: str, finished: bool = True):
    return rules.judge(record | {"response": response, "finished": finished})["right"]


def pairs(name: str):
    """Row, answer in the box, and whether it is right."""
    for row, (right, wrong) in SETS[name].verdicts.items():
        yield from ((row, text, True) for text in right.split("; "))
        yield from ((row, text, False) for text in wrong.split("; "))


@pytest.mark.parametrize("name", NAMES)
def test_verdicts(name, answers):
    golds = [gold if isinstance(gold, list) else [gold] for gold in SETS[name].answers]
    assert [record["answer"] for record in answers[name]] == golds
    found = list(pairs(name))
    judged = [verdict(answers[name][row], f"It is \\boxed{{{text}}}.") for row, text, _ in found]
    wrong = [(*pair, ours) for pair, ours in zip(found, judged) if ours != pair[2]]
    assert not wrong
    assert len(found) >= 6 or answers[name][0]["rule"] == "judge"


@pytest.mark.parametrize("name", NAMES)
def test_where_the_answer_is(name, answers):
    record = answers[name][0]
    if record["rule"] == "judge":
        assert verdict(record, "\\boxed{-1}") is record["right"] is None
        return
    right, wrong = (part.split("; ")[0] for part in SETS[name].verdicts[0])
    box = f"\\boxed{{{right}}}"
    for response, expected in (
        (f"<answer>{right}</answer>", True),
        (f"<think>Hm.</think>{right}", True),
        (f"<think>\\boxed{{{wrong}}}</think> {box}", True),
        (f"\\boxed{{{wrong}}}, or rather {box}", True),
        (f"{box}, or rather \\boxed{{{wrong}}}", False),
        (f"<think>{box}</think>{wrong}", False),
        (f"<think>{box}", False),
        (f"The answer is {right}", False),  # no box
        (f"\\boxed{{{right}", False),
        ("\\boxed{}", False),
        ("", False),
    ):
        assert verdict(record, response) == expected, response
    assert not verdict(record, box, finished=False)


@pytest.mark.parametrize("name, row, text, ours, why", DIFFERENCES)
def test_where_verdicts_differ_on_purpose(name, row, text, ours, why, answers):
    assert verdict(answers[name][row], f"\\boxed{{{text}}}") is ours, why


def test_anls(answers):
    """1 - edits / length of the longer; below one half nothing."""
    numbers, letters = answers["infovqa"]
    for record, text, share in (
        (letters, "abcx", 3 / 4),
        (letters, "abxy", 1 / 2),
        (letters, "axyz", 0),
        (letters, "abcde", 4 / 5),
        (numbers, "5 millions", 9 / 10),
        (numbers, "5,000,00", 8 / 9),  # of the nearest answer
    ):
        assert verdict(record, f"\\boxed{{{text}}}") == pytest.approx(share)


# =============================================================================================== group metrics
def measured(name: str, rows: list[dict], verdicts: str) -> dict:
    """Results of published rows, of which those with a 1 are answered right."""
    b = benchmarks.benchmarks()[name]
    ours = [one for row in rows for one in benchmarks.convert(row, b, "")]
    records = []
    for i, (row, right) in enumerate(zip(ours, verdicts.replace(" ", ""), strict=True)):
        text = row["answer"][0] if right == "1" else "neither"
        record = row | {"set": name, "row": i, "sample": None, "finished": True}
        record["response"] = f"\\boxed{{{text}}}"
        records.append(record | rules.judge(record))
    return scores.results(records, [])[name]


def value(found: dict, metric: str = "acc@1") -> float:
    return found["metrics"][metric][0]


def changed(name: str, column: dict) -> dict:
    """A published row with other cells."""
    return SETS[name].rows[0] | column


def test_hallusionbench():
    def asked(category, below, figure, question):
        cells = {"category": category, "subcategory": below, "question_id": question}
        shows = category != "VS" or figure != "0"
        cells |= {"figure_id": figure, "image": shown(32) if shows else None}
        return changed("hallusionbench", cells)

    rows = [
        asked("VD", "illusion", "1", "0"),
        asked("VD", "illusion", "1", "1"),
        asked("VD", "illusion", "2", "0"),
        asked("VD", "illusion", "2", "1"),
        asked("VD", "math", "1", "0"),  # another group, although the ids are the same
        asked("VS", "map", "0", "0"),  # without a figure: of no fAcc
        asked("VS", "map", "1", "0"),
    ]
    found = measured("hallusionbench", rows, "1011 1 01")
    assert value(found) == pytest.approx(100 * 5 / 7, abs=1e-3)
    # illusion 0 and math 0 are right; illusion 1 and map 0 are not
    assert value(found, "qAcc") == 50
    # illusion 2, math 1 and map 1 are right; illusion 1 is not
    assert value(found, "fAcc") == 75


def test_dynamath():
    rows = [changed("dynamath", {"id": one}) for one in "121212"]
    found = measured("dynamath", rows, "111110")
    assert value(found) == pytest.approx(100 * 5 / 6, abs=1e-3)
    assert value(found, "worst") == 50


def test_wemath():
    rows = []
    for problem in ("2steps_1", "2steps_2", "2steps_3", "2steps_4", "3steps_1", "3steps_2"):
        steps = int(problem[0])
        for step in [*range(1, steps + 1), "multi"]:
            rows.append(changed("wemath", {"ID": problem, "key": f"{steps}steps_{step}"}))
    verdicts = (
        "111"  # complete mastery
        "110"  # inadequate generalisation: one half
        "011"  # by rote, and loosely mastery
        "001"  # by rote
        "1100"  # insufficient knowledge
        "1001"  # by rote, and loosely mastery
    )
    found = measured("wemath", rows, verdicts)
    assert value(found, "strict") == 25  # (1 + 1/2) / 6
    assert value(found, "loose") == pytest.approx(100 * 3.5 / 6, abs=1e-3)  # (1 + 1/2 + 1 + 1) / 6


def test_vilp():
    found = measured("vilp", SETS["vilp"].rows[:2], "110 011")
    parts = found["categories"]
    assert value(parts["prior"]) == 50
    # (of the second images 2 / 2, of the third 1 / 2) / 2
    assert value(parts["score"]) == 75


def test_cv_bench():
    kinds = [("2D", "ADE20K")] * 4 + [("2D", "COCO")] * 2 + [("3D", "Omni3D")] * 3
    rows = [changed("cv-bench", {"type": kind, "source": source}) for kind, source in kinds]
    found = measured("cv-bench", rows, "1110 10 111")
    assert value(found, "balanced") == ((75 + 50) / 2 + 100) / 2
    assert value(found) == pytest.approx(100 * 7 / 9, abs=1e-3)


def test_mmstar():
    kinds = ["math a", "math a", "math b", "science c", "science d"]
    cells = [dict(zip(("category", "l2_category"), kind.split())) for kind in kinds]
    found = measured("mmstar", [changed("mmstar", one) for one in cells], "10 1 1 0")
    assert value(found, "balanced") == (50 + 100 + 100 + 0) / 4


def test_tallyqa():
    found = measured("tallyqa", SETS["tallyqa"].rows, "10 1")
    assert value(found) == pytest.approx(100 * 2 / 3, abs=1e-3)
    assert value(found["categories"]["simple"]) == 100
    assert value(found["categories"]["complex"]) == 0


def test_results_of_all(evaluated, answers):
    """Each set has its own metrics; those of a judge are written out alone."""
    found = json.loads((evaluated / "results.json").read_text())
    mean = found.pop("mean")
    assert list(found) == NAMES and set(mean["metrics"]) == {"acc@1"}
    for name, of_set in found.items():
        assert of_set["questions"] == len(SETS[name].asked)
        assert ("acc@1" in of_set["metrics"]) == (not name.endswith("mm-vet"))
    own = {
        "hallusionbench": {"qAcc", "fAcc"},
        "dynamath": {"worst"},
        "wemath": {"strict", "loose"},
    }
    for name, metrics in own.items():
        assert metrics <= set(found[name]["metrics"])
    assert set(found["vilp"]["categories"]) == {"prior", "score"}
    assert set(found["cv-bench"]["categories"]) == {"2D/ADE20K", "2D/COCO", "3D/Omni3D"}
    assert set(found["tallyqa"]["categories"]) == {"simple", "complex"}
    assert "written out for a judge" in (evaluated / "stdout").read_text()


# =============================================================================================== other schemas
def said(function, *args) -> str:
    """What a user is told."""
    with pytest.raises(common.UserError) as error:
        function(*args)
    return error.value.code


@pytest.mark.parametrize("name", NAMES)
def test_a_column_of_another_name(name, monkeypatch):
    data = as_published(SETS[name].rows)
    for column in benchmarks.benchmarks()[name].columns():
        monkeypatch.setattr(common, "load_data", lambda *_: data.rename_column(column, "moved"))  # noqa: B023
        there = set(data.column_names) - {column} | {"moved"}
        told = said(benchmarks.load, name)
        assert f"the benchmark {name} looks for {column} in " in told
        assert set(told.split("which has: ")[1].split(". Its")[0].split(", ")) == there


@pytest.mark.parametrize("name", NAMES)
def test_all_columns_that_are_read_are_looked_for(name, tmp_path):
    class Row(dict):
        def __getitem__(self, column):
            read.add(column)
            return super().__getitem__(column)

        def get(self, column):
            read.update([column] if column else [])
            return super().get(column)

    b, read = benchmarks.benchmarks()[name], set()
    save(name, tmp_path)
    for row in SETS[name].rows:
        benchmarks.convert(Row(row), b, str(tmp_path / name))
    assert read == b.columns() or b.where and read < b.columns()


@pytest.mark.parametrize(
    "name, column, words",
    [
        ("mathvista", {"answer": "103"}, "'103' is not in list"),
        ("vilp", {"answer2": ""}, "list index out of range"),
        ("vilp", {"image1": None}, "list index out of range"),
        ("mmmu-pro-4", {"options": "['red', 'bl"}, "SyntaxError"),
        ("mmmu-pro-10", {"options": str(list(range(11)))}, "ValueError"),
        ("v-star", {"image": "../published/secret.png"}, "no file below"),
        ("v-star", {"image": "OCR/0.jpg"}, "no file below"),
    ],
)
def test_a_row_that_is_not_as_published(name, column, words, tmp_path):
    (tmp_path / "secret.png").write_bytes(png(32))
    rows = [SETS[name].rows[1], changed(name, column)]
    path = save(name, tmp_path, rows)
    told = said(benchmarks.write, f"{name}={path}", tmp_path / "ours.parquet")
    assert f"row 1 of the benchmark {name} " in told and words in told
    assert not (tmp_path / "ours.parquet").exists()


# =============================================================================================== names and copies
@pytest.mark.parametrize(
    "name, near",
    [
        ("mathvers", "mathverse"),
        ("MMStar", "mmstar"),
        ("halusionbench=x.parquet", "hallusionbench"),
        ("aime", "aime24"),
        ("qqq", "mmmu-pro-4"),  # near to none: all
    ],
)
def test_an_unknown_name(name, near, tmp_path):
    told = said(evaluate.in_our_columns, name, tmp_path, False)
    assert f"there is no benchmark {name.split('=')[0]!r}" in told and near in told


def test_a_local_copy_that_is_not_there():
    assert "there is no x.parquet, which was to hold mmstar" in said(
        benchmarks.find, "mmstar=x.parquet"
    )


@pytest.mark.parametrize("name", NAMES)
def test_no_network(name, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    b = benchmarks.benchmarks()[name]
    assert b.source in said(benchmarks.load, name)
    told = capsys.readouterr().out
    assert f"{name} is {b.source} on the hub, split {b.split}" in told
    assert f"{name}=PATH takes a local copy, a file or a folder" in told


def test_copies_in_the_layout_of_the_hub(tmp_path):
    """A folder of ten splits, one with a configuration, and the rows beside images as a file."""
    ten = tmp_path / "dynamath"
    (ten / "data").mkdir(parents=True)
    for i in range(1, 11):
        row = changed("dynamath", {"question": f"variant {i}"})
        as_published([row]).to_parquet(ten / f"data/sample_variant{i}-00000-of-00001.parquet")
    questions = benchmarks.load(f"dynamath={ten}")["question"]
    assert list(questions) == [f"variant {i}" for i in range(1, 11)]

    two = tmp_path / "two"
    two.mkdir()
    card = "---\nconfigs:\n"
    for name in ("mmmu-pro-4", "mmmu-pro-10"):
        save(name, two)
        configuration = benchmarks.benchmarks()[name].source.split(":")[1]
        card += f"- config_name: {configuration}\n  data_files:\n  - split: test\n    path: {name}.parquet\n"
    (two / "README.md").write_text(f"{card}---\n")
    for name in ("mmmu-pro-4", "mmmu-pro-10"):
        configuration = benchmarks.benchmarks()[name].source.split(":")[1]
        assert len(benchmarks.load(f"{name}={two}:{configuration}")) == len(SETS[name].rows)

    folder = save("v-star", tmp_path)
    benchmarks.write(f"v-star={folder}/test_questions.jsonl", tmp_path / "ours.parquet")
    assert len(datasets.Dataset.from_parquet(f"{tmp_path}/ours.parquet")) == 2


def test_an_image_in_the_hub_s_repository(monkeypatch, tmp_path):
    asked = []
    (tmp_path / "image").write_bytes(png(32))

    def download(*args, **how):
        asked.append((args, how))
        return tmp_path / "image"

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    cell = benchmarks.image_of("OCR/0.jpg", "craigwu/vstar_bench")
    assert cell == {"bytes": png(32), "path": "OCR/0.jpg"}
    assert asked == [(("craigwu/vstar_bench", "OCR/0.jpg"), {"repo_type": "dataset"})]


def test_the_command(local, evaluated, tmp_path, monkeypatch, capsys):
    """It writes what tools.evaluate does; without names it lists them."""
    some = [one for one in local if one.split("=")[0] in ("mmstar", "vilp", "v-star")]
    result = run_script("-m", "tools.benchmarks", *some, "--to", tmp_path)
    assert result.returncode == 0, result.stderr
    for one in some:
        file = f"{one.split('=')[0]}.parquet"
        assert (tmp_path / file).read_bytes() == (evaluated / "sets" / file).read_bytes()

    monkeypatch.setattr(sys, "argv", ["tools.benchmarks"])
    benchmarks.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == NAMES


def test_the_document_has_every_benchmark_and_protocol():
    text = (ROOT / "docs" / "evaluation.md").read_text()
    first = [line.split("|")[1] for line in text.splitlines() if line.startswith("| ")]
    listed = set(re.findall(r"[\w.-]+", " ".join(first)))
    names = {name for name in benchmarks.benchmarks() if not name.startswith("zli-")}
    assert names <= listed, names - listed
    assert set(protocols.PROTOCOLS) <= listed
    for name in protocols.PROTOCOLS:
        assert name == "greedy" or benchmarks.of_protocol(name)
