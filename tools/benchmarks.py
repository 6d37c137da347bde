"""The papers' benchmarks: where each is, and how its rows become ours.

    python -m tools.benchmarks                          lists them
    python -m tools.benchmarks mathverse mmstar --to sets      writes sets/mathverse.parquet, sets/mmstar.parquet

Such a file has our columns, and goes into --eval-data of a training run as well; tools.evaluate writes it by itself.
NAME=PATH takes a local copy of what the hub has: a file, a folder, or FOLDER:CONFIGURATION. docs/evaluation.md says
what each number means, and where it differs from the paper's. Columns were taken from the data cards and from the
loaders of lmms-eval and VLMEvalKit (read in November 2026, not loaded): where one has changed, an error says what was
looked for.
"""

import ast
import csv
import difflib
import functools
import os
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import common

import tyro


@dataclass
class Benchmark:
    """A line of benchmarks.csv: a hub name and its split, and the columns that hold what we ask and check."""

    name: str
    source: str  # hub name, with :CONFIGURATION
    split: str
    problem: str  # empty: the question is in the image
    images: str  # one column or several
    options: str  # lettered and written below the question
    answer: str
    category: str  # of several columns: a/b
    rule: str  # see tools.scores
    protocols: str  # whose they are, of tools.evaluate
    where: str  # rows that are taken, COLUMN=VALUE|VALUE; of several conditions all hold

    @property
    def hub(self) -> str:
        return self.source.split(":")[0]

    def columns(self) -> set[str]:
        names = f"{self.problem} {self.images} {self.options} {self.answer} {self.category}"
        return {*names.split(), *MORE.get(self.hub, "").split(), *self.conditions()}

    def conditions(self) -> dict[str, list[str]]:
        """Column -> the values that it may have."""
        found = {}
        for condition in filter(None, self.where.split(";")):
            column, _, values = condition.partition("=")
            found[column] = values.split("|")
        return found


TABLE = Path(__file__).with_suffix(".csv")
# what the functions of CHANGES read besides
MORE = {
    "AI4Math/MathVista": "choices answer_type precision",
    "lmms-lab/HallusionBench": "set_id figure_id question_id",
    "DynaMath/DynaMath_Sample": "id answer_type",
    "We-Math/We-Math": "ID",
    "vikhyatk/tallyqa-test": "qa",
    "math-ai/olympiadbench": "is_multiple_answer",
}
ABBREVIATIONS = {
    "IMAGES": "image_1 image_2 image_3 image_4 image_5 image_6 image_7",
    "VARIANTS": "+".join(f"sample_variant{i}" for i in range(1, 11)),
}


@functools.cache
def benchmarks() -> dict[str, Benchmark]:
    """Name -> benchmark, of the table."""
    with open(TABLE) as f:
        lines = list(csv.DictReader(f))
    found = {}
    for line in lines:
        b = Benchmark(**{key: ABBREVIATIONS.get(cell, cell) for key, cell in line.items()})
        found[b.name] = b
    return found


def of_protocol(name: str) -> list[str]:
    """The benchmarks that a paper reports."""
    return [b.name for b in benchmarks().values() if name in b.protocols.split()]


# =============================================================================================== rows
IN_THE_IMAGE = "Answer the question in the image."


def convert(theirs: dict, b: Benchmark, folder: str) -> list[dict]:
    """Our rows of one of theirs: mostly one. folder: where paths of images begin, or a hub name."""
    if any(str(theirs[column]) not in values for column, values in b.conditions().items()):
        return []
    problem = theirs.get(b.problem) or ""
    if not re.sub(common.MARK, "", problem).strip():
        problem += IN_THE_IMAGE
    if b.options:
        problem += lettered(theirs[b.options])
    images = [image_of(x, folder) for x in cells_of(theirs, b.images)]
    categories = [", ".join(cells_of(theirs, name)) for name in b.category.split()]
    ours = {
        "problem": place(problem, len(images)),
        "images": images,
        "answer": [str(x) for x in cells_of(theirs, b.answer)],
        "category": "/".join(categories),
        "rule": b.rule,
        "tolerance": 0.0,
        "groups": [],
    }
    change = CHANGES.get(b.hub)
    return change(theirs, ours) if change else [ours]


def cells_of(row: dict, columns: str) -> list:
    """What is in these columns, and in their lists: {"a": [1, 2], "b": None, "c": 3}, "a b c" -> [1, 2, 3]."""
    found = []
    for name in columns.split():
        value = row[name]
        found += value if isinstance(value, list) else [value]
    return [x for x in found if x is not None and x != ""]


def lettered(options) -> str:
    """Lines "A. red" of a list, of the text of a list, or of "A. red;B. blue"; "" where there is nothing to read."""
    if isinstance(options, str) and options.startswith("["):
        options = ast.literal_eval(options)
    if isinstance(options, str):
        options = [
            re.sub(r"^\s*[A-J][.:]\s*", "", x) for x in re.split(r"[;；](?=\s*[A-J][.:])", options)
        ]
    letters = "ABCDEFGHIJ"
    # options in the picture are named by their letters alone
    if not options or list(options) == list(letters[: len(options)]):
        return ""
    pairs = zip(letters[: len(options)], options, strict=True)
    return "".join(f"\n{letter}. {text}" for letter, text in pairs)


def place(text: str, images: int) -> str:
    """Marks <image 1> stay where they name every image; else they become words, and the images come first."""
    marks = re.findall(common.MARK, text)
    named = {int(number or i) for i, number in enumerate(marks, 1)}
    if named in (set(), set(range(1, images + 1))):
        return text
    return re.sub(common.MARK, r"(image \1)", text).replace("(image )", "")


def image_of(cell, folder: str) -> dict:
    """{"bytes", "path"} of an image: such an object, bytes, or a path below the folder or in the hub's repository."""
    if isinstance(cell, dict) and cell.get("bytes"):
        return cell
    if isinstance(cell, bytes):
        return {"bytes": cell, "path": None}
    path = cell["path"] if isinstance(cell, dict) else cell
    if Path(folder).is_dir():
        (image,) = common.open_images(path, Path(os.path.abspath(folder)))
        file = image.filename
    else:
        import huggingface_hub

        file = huggingface_hub.hf_hub_download(folder, path, repo_type="dataset")
    return {"bytes": Path(file).read_bytes(), "path": path}


def mathvista(theirs, ours):
    """The letter of the right choice; a number to its precision."""
    choices = theirs["choices"]
    if choices:
        ours["answer"] = ["ABCDEFGHIJ"[choices.index(theirs["answer"])]]
    elif theirs["answer_type"] == "float":
        ours |= {"rule": "number", "tolerance": 0.5 * 10 ** -int(theirs["precision"])}
    return [ours]


def visualpuzzles(theirs, ours):
    if not theirs["options"]:
        ours["problem"] += "\nChoose from A, B, C and D in the image."
    return [ours]


def hallusionbench(theirs, ours):
    """Groups: one question of all figures; one figure with all its questions, but for those without one."""
    ours["answer"] = ["Yes" if str(theirs["gt_answer"]) == "1" else "No"]
    kind = "_".join(str(theirs[key]) for key in ("category", "subcategory", "set_id"))
    ours["groups"] = [f"qAcc {kind}_{theirs['question_id']}"]
    if (theirs["category"], str(theirs["figure_id"])) != ("VS", "0"):
        ours["groups"].append(f"fAcc {kind}_{theirs['figure_id']}")
    return [ours]


def dynamath(theirs, ours):
    ours["groups"] = [f"worst {theirs['id']}"]
    if theirs["answer_type"] == "float":
        ours |= {"rule": "number", "tolerance": 1e-3}
    return [ours]


def wemath(theirs, ours):
    ours["groups"] = [f"strict {theirs['ID']}", f"loose {theirs['ID']}"]
    return [ours]


def vilp(theirs, ours):
    """One question, three images: the first has the answer that the text suggests."""
    rows = []
    problem = f"Please answer with one word: {theirs['question']}"
    for i, category in enumerate(("prior", "score", "score")):
        # where one of them is empty, the third is not there
        part = {"images": [ours["images"][i]], "answer": [ours["answer"][i]], "category": category}
        rows.append(ours | {"problem": problem} | part)
    return rows


def tallyqa(theirs, ours):
    rows = []
    for one in theirs["qa"]:
        category = "simple" if one["is_simple"] else "complex"
        asked = {"problem": one["question"], "answer": [str(one["answer"])], "category": category}
        rows.append(ours | asked)
    return rows


def together(theirs, ours):
    """Several answers are one answer of several parts; "or" between them leaves their order open."""
    text = ", ".join(ours["answer"])
    if theirs["is_multiple_answer"]:  # commas, but those in brackets
        text = re.sub(r", *(?![^(\[{]*[)\]}])", " or ", text)
    ours["answer"] = [text]
    return [ours]


CHANGES = {
    "AI4Math/MathVista": mathvista,
    "neulab/VisualPuzzles": visualpuzzles,
    "lmms-lab/HallusionBench": hallusionbench,
    "DynaMath/DynaMath_Sample": dynamath,
    "We-Math/We-Math": wemath,
    "ViLP/ViLP": vilp,
    "vikhyatk/tallyqa-test": tallyqa,
    "math-ai/olympiadbench": together,
}


# =============================================================================================== files
def find(name: str) -> tuple[Benchmark, str]:
    """The benchmark of NAME or NAME=PATH, and where its data are."""
    name, _, path = name.partition("=")
    known = benchmarks()
    if name not in known:
        near = difflib.get_close_matches(name, known, 3, 0.4) or list(known)
        raise common.UserError(
            f"there is no benchmark {name!r}; near it: {', '.join(near)}. A set of your own is a file, a folder or a "
            "hub name with a slash (./NAME)"
        )
    if path and not Path(path.split(":")[0]).exists():
        raise common.UserError(f"there is no {path}, which was to hold {name}")
    return known[name], path or known[name].source


def load(name: str):
    """Their rows, with images as they are stored; stops with what was looked for, where it is not there."""
    import datasets

    b, place_of = find(name)
    common.say(
        f"{b.name} is {b.source} on the hub, split {b.split}; {b.name}=PATH takes a local copy, a file or a folder"
    )
    data = common.load_data(place_of, b.split)
    missing = sorted(b.columns() - set(data.column_names))
    if missing:
        raise common.UserError(
            f"the benchmark {b.name} looks for {', '.join(missing)} in {place_of!r}, which has: "
            f"{', '.join(data.column_names)}. Its columns have changed: write the rows in ours (README), or mend the "
            "line of tools/benchmarks.csv"
        )
    for column, feature in data.features.items():
        if isinstance(feature, datasets.Image):
            data = data.cast_column(column, datasets.Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            data = data.cast_column(column, datasets.List(datasets.Image(decode=False)))
    return data


def write(name: str, file: Path):
    """A benchmark's rows in our columns, as a parquet file that is whole or not there."""
    import datasets

    b, place_of = find(name)
    folder = place_of.split(":")[0]
    if Path(folder).is_file():
        folder = str(Path(folder).parent)
    data = load(name)
    string = datasets.Value("string")
    features = {
        "problem": string,
        "images": datasets.List(datasets.Image()),
        "answer": datasets.List(string),
        "category": string,
        "rule": string,
        "tolerance": datasets.Value("float64"),
        "groups": datasets.List(string),
    }

    def rows():
        for n, theirs in enumerate(data):
            try:
                yield from convert(theirs, b, folder)
            except (ValueError, KeyError, IndexError, TypeError, SyntaxError, OSError) as e:
                raise common.UserError(
                    f"row {n} of the benchmark {b.name} ({place_of}) is not as its line in tools/benchmarks.py says: "
                    f"{e!r:.200}"
                )

    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as aside:
        ours = datasets.Dataset.from_generator(
            rows, features=datasets.Features(features), cache_dir=aside
        )
        ours.to_parquet(f"{aside}/rows.parquet")
        os.replace(f"{aside}/rows.parquet", file)


# =============================================================================================== main
@dataclass
class Args:
    names: tyro.conf.Positional[list[str]] = field(default_factory=list)  # NAME or NAME=PATH
    to: str = ""  # folder for the files


def main():
    args = tyro.cli(Args, description=__doc__)
    if not args.names:
        for b in benchmarks().values():
            common.say(f"{b.name:20}{b.source}, {b.split:.40}")
    for name in args.names:
        file = Path(args.to or ".", f"{find(name)[0].name}.parquet")
        write(name, file)
        common.say(f"written: {file}")


if __name__ == "__main__":
    common.launch(main)
