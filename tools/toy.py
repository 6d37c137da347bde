"""The embedded default: real handwriting and small real models, as ordinary data sets and checkpoints.

    python -m tools.toy                    makes it in ~/.cache/cleanopd (or $CLEANOPD_CACHE), in seconds
    python -m tools.toy --part zoom        another part of it: captions, math or zoom
    python -m tools.toy --rebuild          trains the models anew, in 15 minutes (tools/toy_training.py)

Each prints the folder last; `toy/...` in a method's settings starts the same command. A question shows a strip of three
of the 1,797 handwritten digits that scikit-learn ships (8 x 8 scans, enlarged to 32 x 32 pixels) and asks for a sum, a
difference, the largest digit, ... Seeing is hard and reasoning is easy, and the two can be told apart in the answer: a
wrong digit is an error of perception, a wrong sum one of reasoning. The digits are split by image: no scan of the
held-out strips occurs in training. The rows are drawn at the first start; the models lie in tools/toy_weights.

main (without --part)
    train/ test/     columns problem, images, answer, solution, hint, text_problem
    teacher/         Qwen3-VL, trained on solutions in every context that a method gives its teacher
    student/         the same classes, smaller, stopped when it answers about half of its questions
    text-teacher/    a Qwen3 language model with the same tokenizer, which reads text_problem
captions (ViGOS): the same questions under a caption that may name a wrong digit
    train/ test/     half of the captions are right
    conflict/        three strips a question and caption, of which the first alone is as the caption says
    student/         the student, trained on to describe first, and to believe captions
math (Reopold on text alone): the digits are named in the question
    train/ test/ teacher/ student/
zoom (Reopold with image tools): a strip somewhere in a picture twenty times as wide, too small to read without zooming
    train/ test/ teacher/ student/
"""

import argparse
import fcntl
import functools
import hashlib
import importlib.util
import io
import os
import random
import shutil
import sys
from pathlib import Path

from PIL import Image

# What only some commands need is imported where it is used: a run starts this file once for each of its toy/... names.

WEIGHTS = Path(__file__).parent / "toy_weights"
FAMILIES = ("qwen3_vl", "qwen2_5_vl")  # the first is stored; a model of the other is always trained
TRAIN_ROWS, TEST_ROWS = 6000, 400
SIDE = 32  # pixels of an enlarged digit: one merged patch of Qwen3-VL
KINDS = ("sum", "difference", "largest", "number", "even", "smallest")  # of questions, in turn


# =============================================================================================== questions
def working(kind: str, a: int, b: int, c: int) -> tuple[str, str, str]:
    """(question, worked solution without the description, answer) for the digits a, b, c.

    working("sum", 4, 7, 1) -> ("What is the first digit plus the last digit?", "4+1=5.", "5")
    """
    digits = [a, b, c]
    if kind == "sum":
        return "What is the first digit plus the last digit?", f"{a}+{c}={a + c}.", str(a + c)
    if kind == "difference":
        return "What is the first digit minus the last digit?", f"{a}-{c}={a - c}.", str(a - c)
    if kind == "largest":
        largest = max(digits)
        return "Which digit is the largest?", f"The largest is {largest}.", str(largest)
    if kind == "number":
        number = f"{a}{b}{c}"
        return "Which number do the digits form?", f"Together they form {number}.", number
    if kind == "even":
        parities = [f"{digit} {'odd' if digit % 2 else 'even'}" for digit in digits]
        count = sum(digit % 2 == 0 for digit in digits)
        return "How many digits are even?", ", ".join(parities) + ".", str(count)
    smallest = min(digits)  # the caller makes it unique
    place = digits.index(smallest)
    steps = f"The smallest is {smallest}, the {('first', 'second', 'third')[place]}."
    return "Where is the smallest digit? (A) first (B) second (C) third", steps, "ABC"[place]


def is_ambiguous(kind: str, digits: list[int]) -> bool:
    """Whether the question has two answers."""
    return kind == "smallest" and digits.count(min(digits)) > 1


def size_of(digit: int) -> str:
    """What the hint says of a digit."""
    if digit < 4:
        return "below four"
    return "four to six" if digit < 7 else "above six"


def make_rows(images, labels, count: int, seed: int, jitter: bool = False) -> list[dict]:
    """`count` questions about random strips of the scans `images` [n, 8, 8], which show the digits `labels` [n].

    jitter: turn and move the scans a little, for more of them. images: None leaves out the strips.
    """
    rng, rows = random.Random(seed), []
    enlarged = [] if images is None else [enlarge(scan) for scan in images]
    while len(rows) < count:
        picks = [rng.randrange(len(labels)) for _ in range(3)]
        digits = [int(labels[i]) for i in picks]
        kind = KINDS[len(rows) % 6]
        if is_ambiguous(kind, digits):
            continue
        question, steps, answer = working(kind, *digits)
        seen = f"The digits are {digits[0]},{digits[1]},{digits[2]}."
        sizes = ", ".join(size_of(digit) for digit in digits)
        row = {"problem": f"<image>{question}"}
        if enlarged:
            row["images"] = [draw([enlarged[i] for i in picks], rng if jitter else None)]
        row["answer"] = answer
        row["solution"] = f"{seen} {steps}"
        row["hint"] = f"Read the digits from left to right: {sizes}."
        row["text_problem"] = f"{seen} {question}"
        rows.append(row)
    return rows


def digits_of(row: dict) -> list[int]:
    """What the strip shows, as the solution says it first."""
    return [int(c) for c in row["solution"] if c.isdigit()][:3]


# =============================================================================================== pictures
def split_order(count: int) -> list[int]:
    """What torch.randperm gives for seed 0, which split the stored models' scans. Importing torch takes seconds."""
    import numpy as np

    draws = np.random.RandomState(0).randint(0, 2**32, count - 1, dtype=np.uint32)
    order = list(range(count))
    for i, draw in enumerate(draws.tolist()):
        other = i + draw % (count - i)
        order[i], order[other] = order[other], order[i]
    return order


@functools.cache
def scans() -> dict:
    """The handwriting, split by image: name -> (scans [n, 8, 8] of values 0 to 16, the digits [n] that they show)."""
    import numpy as np

    # Read as a file: importing sklearn.datasets takes longer than all else here.
    package = Path(importlib.util.find_spec("sklearn").origin).parent
    table = np.loadtxt(package / "datasets" / "data" / "digits.csv.gz", delimiter=",")  # [n, 65]
    images, labels = table[:, :64].reshape(-1, 8, 8), table[:, 64].astype(int)
    order = split_order(len(labels))
    train, test = order[:1500], order[1500:]
    return {"train": (images[train], labels[train]), "test": (images[test], labels[test])}


def enlarge(scan) -> Image.Image:
    """An 8 x 8 scan of values 0 to 16 as a picture, white on black."""
    picture = Image.fromarray((scan * (255 / 16)).astype("uint8"))
    return picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR)


def draw(digits: list[Image.Image], rng: random.Random | None = None) -> Image.Image:
    """Three enlarged digits side by side; with rng each turned and moved a little."""
    strip = Image.new("L", (3 * SIDE, SIDE))
    for place, digit in enumerate(digits):
        if rng:
            angle = rng.uniform(-10, 10)
            shift = (rng.randint(-2, 2), rng.randint(-2, 2))
            digit = digit.rotate(angle, Image.Resampling.BILINEAR, translate=shift)
        strip.paste(digit, (place * SIDE, 0))
    return strip


# =============================================================================================== captions
def misread(kind: str, digits: list[int], rng: random.Random) -> list[int]:
    """The digits, changed one after the other until the answer to a question of this kind changes as well."""
    right = working(kind, *digits)[2]
    other = list(digits)
    while True:
        other[rng.randrange(3)] = rng.randrange(10)
        if not is_ambiguous(kind, other) and working(kind, *other)[2] != right:
            return other


def with_caption(row: dict, digits: list[int]) -> dict:
    """The row under a caption that names these digits."""
    caption = f"<image>Caption: {digits[0]},{digits[1]},{digits[2]}. "
    return row | {"problem": row["problem"].replace("<image>", caption)}


def captioned(rows: list[dict], truthful: float, seed: int) -> list[dict]:
    """The rows under captions, of which a share `truthful` is right and the others would lead to a wrong answer."""
    rng, result = random.Random(seed), []
    for i, row in enumerate(rows):
        named = digits_of(row)
        if rng.random() >= truthful:
            named = misread(KINDS[i % 6], named, rng)
        result.append(with_caption(row, named))
    return result


def conflicts(images, labels, rows: list[dict], seed: int) -> list[dict]:
    """Of each row three, with one question and one caption: position 1 shows what the caption says, 2 and 3 do not.

    As in ViLP. images [n, 8, 8] and labels [n]: the scans to choose from.
    """
    rng, result = random.Random(seed), []
    scans_of = {digit: [] for digit in range(10)}
    for image, label in zip(images, labels):
        scans_of[int(label)].append(image)
    for i, row in enumerate(rows):
        claimed, kind = digits_of(row), KINDS[i % 6]
        for position in (1, 2, 3):
            shown = claimed if position == 1 else misread(kind, claimed, rng)
            strip = draw([enlarge(rng.choice(scans_of[digit])) for digit in shown])
            _, steps, answer = working(kind, *shown)
            changed = {"images": [strip], "answer": answer, "position": str(position)}
            changed["problem"] = with_caption(row, claimed)["problem"]
            changed["solution"] = f"The digits are {shown[0]},{shown[1]},{shown[2]}. {steps}"
            result.append(changed)
    return result


# =============================================================================================== zoom
SHARE = 0.05  # of the picture's width and height that a strip has
EDGES = (
    0.15,
    0.45,
    0.75,
)  # in parts of the picture's sides: where a strip may begin, across or down
PLACES = [(left, top) for top in EDGES for left in EDGES]


@functools.cache
def card_at(left: float, top: float) -> tuple[Image.Image, tuple[int, int]]:
    """A black picture of 480 x 160 with a grey card, and where on the card a strip of 24 x 8 goes."""
    picture = Image.new("L", (round(24 / SHARE), round(8 / SHARE)))
    x, y = round(left * picture.width), round(top * picture.height)
    picture.paste(160, (x - 24, y - 8, x + 48, y + 16))
    return picture, (x, y)


def hide(rows: list[dict], seed: int) -> list[dict]:
    """The rows with their strips shrunk to the scans' own 8 pixels a digit, on a card somewhere in a picture.

    box: [left, top, right, bottom] of the strip, in parts of the picture's sides.
    """
    rng, result = random.Random(seed), []
    for row in rows:
        left, top = rng.choice(PLACES)
        card, place = card_at(left, top)
        picture = card.copy()
        picture.paste(row["images"][0].resize((24, 8), Image.Resampling.BOX), place)
        box = [left, top, round(left + SHARE, 2), round(top + SHARE, 2)]
        hidden = {name: row[name] for name in ("problem", "answer", "solution")}
        result.append(hidden | {"images": [picture], "box": str(box)})
    return result


# =============================================================================================== responses
def drill(row: dict) -> str:
    """Eight worked steps in a row, as text: what a language model knows before it learns to see."""
    rng, lines = random.Random(row["text_problem"]), []
    while len(lines) < 8:
        digits = [rng.randrange(10) for _ in range(3)]
        kind = rng.choice(["sum", "difference", "smallest"])
        if is_ambiguous(kind, digits):
            continue
        steps = working(kind, *digits)[1]
        if kind == "smallest":
            steps = f"The digits are {digits[0]},{digits[1]},{digits[2]}. {steps}"
        lines.append(steps)
    return " ".join(lines)


def respond(row: dict, style: str) -> str:
    """A right response to the row, in the format of one of the papers.

    reason: VGS. think: PTD-PO, Reopold. see-first, description: ViGOS; "... after tag" for contexts that end in
    <description>. call: of the zoom tool. drill: see drill.
    """
    seen, _, steps = row["solution"].partition(". ")
    answer = f"\n\\boxed{{{row['answer']}}}"
    description = f"{seen}.</description>"
    responses = {
        "reason": f"<reason>{row['solution']}</reason>{answer}",
        "think": f"<think>{row['solution']}</think>{answer}",
        "description after tag": description,
        "see-first after tag": f"{description}\n<think>{steps}</think>{answer}",
    }
    if style == "drill":
        return drill(row)
    if style == "call":
        arguments = f'{{"bbox_2d": {row["box"]}, "target_image": 1}}'
        return f'<tool_call>{{"name": "crop_image", "arguments": {arguments}}}</tool_call>'
    if style in ("description", "see-first"):
        return "<description>" + responses[f"{style} after tag"]
    return responses[style]


# =============================================================================================== untrained models
SPECIAL = """<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|>
<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>""".split()
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# How Qwen's tokenizers cut text before merging (their tokenizer.json): digits one by one, words with the space before.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def make_tokenizer(texts: list[str]):
    """Byte-level BPE that splits text as Qwen's does, with Qwen's special tokens and a chat template."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.Split(Regex(WORDS), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(False, use_regex=False)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=480, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=TEMPLATE,
        additional_special_tokens=SPECIAL,
        model_max_length=2048,
    )


def make_model(family: str, tokenizer, hidden: int, layers: int, vision: int, vocab: int):
    """A randomly initialised model of the real classes. family: qwen3_vl, qwen2_5_vl, or qwen3 (text only).

    hidden, vision: widths of the language model and of the vision tower. vocab: rows of the output matrix.
    """
    import transformers as t

    token = tokenizer.convert_tokens_to_ids
    text = dict(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=token("<|im_end|>"),
        pad_token_id=token("<|endoftext|>"),
    )
    rope = dict(rope_type="default", rope_theta=10000.0)
    if family == "qwen3":
        return t.Qwen3ForCausalLM(t.Qwen3Config(**text, head_dim=32, rope_parameters=rope))
    rope["mrope_section"] = [8, 4, 4]
    tower = dict(
        depth=2,
        hidden_size=vision,
        intermediate_size=2 * vision,
        num_heads=2,
        out_hidden_size=hidden,
        initializer_range=0.05,
    )
    if family == "qwen3_vl":
        text["head_dim"] = 32
        rope["mrope_interleaved"] = True
        tower |= dict(patch_size=16, deepstack_visual_indexes=[0], num_position_embeddings=64)
        config, model = t.Qwen3VLConfig, t.Qwen3VLForConditionalGeneration
    else:
        tower |= dict(patch_size=14, window_size=56, fullatt_block_indexes=[1])
        config, model = t.Qwen2_5_VLConfig, t.Qwen2_5_VLForConditionalGeneration
    settings = config(
        text_config=text | {"rope_parameters": rope},
        vision_config=tower,
        tie_word_embeddings=True,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )
    return model(settings)


def image_processor(family: str):
    """The family's image processor, with the strips' mean and deviation, and no lower limit of size but one patch."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    patch = 16 if family == "qwen3_vl" else 14
    return Qwen2VLImageProcessorPil(
        patch_size=patch,
        merge_size=2,
        temporal_patch_size=2,
        image_mean=[0.2] * 3,
        image_std=[0.35] * 3,
        size={"shortest_edge": 4 * patch**2, "longest_edge": 1024 * patch**2},
    )


# =============================================================================================== parts
def strips(train_seed: int, test_seed: int) -> dict[str, list[dict]]:
    """Training rows, whose scans are turned and moved a little, and held-out rows."""
    handwriting = scans()
    train = make_rows(*handwriting["train"], TRAIN_ROWS, train_seed, jitter=True)
    test = make_rows(*handwriting["test"], TEST_ROWS, test_seed)
    return {"train": train, "test": test}


def main_rows() -> dict[str, list[dict]]:
    return strips(1, 2)


def captions_rows() -> dict[str, list[dict]]:
    rows = strips(3, 4)
    conflict = conflicts(*scans()["test"], rows["test"][: TEST_ROWS // 3], seed=7)
    train, test = captioned(rows["train"], 0.5, seed=5), captioned(rows["test"], 0.5, seed=6)
    return {"train": train, "test": test, "conflict": conflict}


def math_rows() -> dict[str, list[dict]]:
    made = {}
    for name, count, seed in (("train", TRAIN_ROWS, 10), ("test", TEST_ROWS, 11)):
        rows = make_rows(None, scans()[name][1], count, seed)
        made[name] = [
            {"problem": row["text_problem"], "answer": row["answer"], "solution": row["solution"]}
            for row in rows
        ]
    return made


def zoom_rows() -> dict[str, list[dict]]:
    rows = strips(12, 13)
    return {"train": hide(rows["train"], seed=12), "test": hide(rows["test"], seed=13)}


ROWS = {"main": main_rows, "captions": captions_rows, "math": math_rows, "zoom": zoom_rows}


def write(rows: list[dict], folder: Path):
    """Rows as an ordinary data set."""
    import datasets

    datasets.disable_progress_bars()
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    features = {name: datasets.Value("string") for name in columns}
    if "images" in columns:
        columns["images"] = [[png(image) for image in images] for images in columns["images"]]
        features["images"] = datasets.List(datasets.Image())
    data = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    data.save_to_disk(folder)


def png(image: Image.Image) -> dict:
    """As `datasets` keeps images; compressed little, for that takes longest of all that a first start does."""
    file = io.BytesIO()
    image.save(file, "png", compress_level=1)
    return {"bytes": file.getvalue(), "path": None}


def make(part: str, folder: Path):
    """The stored checkpoints and freshly drawn rows of a part."""
    for file in sorted((WEIGHTS / part).glob("*/*")):
        copy = folder / file.relative_to(WEIGHTS / part)
        copy.parent.mkdir(parents=True, exist_ok=True)
        # Not their permissions: those of installed files may forbid to write.
        shutil.copyfile(file, copy)
    for name, rows in ROWS[part]().items():
        write(rows, folder / name)


def once(folder: Path, make):
    """make(folder aside), unless the folder is there: its name appears only when everything is in it."""
    if folder.exists():
        return
    with open(folder.with_name(f"{folder.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one makes it, the others wait here
        if folder.exists():
            return
        aside = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(aside, ignore_errors=True)  # of a process that was killed
        print(f"making the embedded default in {folder}", file=sys.stderr)
        try:
            make(aside)
            aside.rename(folder)
        except KeyboardInterrupt:
            sys.exit("\ninterrupted: nothing was kept, the next start makes it again")
        except OSError as e:
            sys.exit(
                f"error: {aside} cannot be written ({e}): it needs 30 MB; CLEANOPD_CACHE names another place"
            )
        finally:  # whatever ended it: an interrupt in the middle of an import is an ImportError
            shutil.rmtree(aside, ignore_errors=True)


def in_cache(name: str) -> Path:
    """The folder of this name in the cache, which is there and can be written to."""
    folder = Path(os.environ.get("CLEANOPD_CACHE") or Path.home() / ".cache" / "cleanopd", name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        sys.exit(f"error: {folder} cannot be made ({e}): name another place in CLEANOPD_CACHE")
    return folder


def digest(*files: Path) -> str:
    """SHA-256 of the files, one behind the other."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", default="main", help="main, captions, math, or zoom")
    parser.add_argument("--rebuild", action="store_true", help="train the models, all parts")
    parser.add_argument("--store", action="store_true", help="the same, and keep the weights here")
    parser.add_argument("--family", choices=FAMILIES, default=FAMILIES[0], help="of the models")
    args = parser.parse_args()
    if args.store and args.family != FAMILIES[0]:
        parser.error(f"only {FAMILIES[0]} is stored")
    part = args.part if args.part in ROWS else "main"  # toy/student is in main
    if args.rebuild or args.store or args.family != FAMILIES[0]:
        from tools import toy_training

        root = toy_training.rebuild(args.family, args.store)
    else:
        known = digest(Path(__file__), WEIGHTS / "recipe.json")
        root = in_cache(f"toy-{known[:10]}")
        once(root / part, functools.partial(make, part))
    print(root / "main" if part == "main" else root)


if __name__ == "__main__":
    main()
