"""What the five methods share, in the order in which a step needs it.

    settings    the command line                        samples    responses -> micro-batches of flat tokens
    ranks       torchrun's processes                    losses     KL, GRPO; over the vocabulary: kernels/vocab.py
    data        rows: question, images, answer          answers    is it right?
    prompts     chat messages -> ids and pixels         runs       models, optimizer, loop, logs
    models      checkpoints under FSDP2                 folder     what a run leaves, and how it goes on
    rollouts    transformers' or vLLM's generate

Four conventions hold everywhere:
  * Response tokens are flat. A per-token quantity is a vector [N], a model's view of the tokens is [N, H].
    There is no padding in any loss.
  * Normalisers are weights. A method divides over the whole update and all ranks before the first backward pass, so
    that a micro-batch only adds (weight * term).sum(). Neither ranks, micro-batches nor chunks change a gradient.
  * A name means one thing, and only other names are annotated. args: Args, processor: Processor, context: Context,
    prompts: list[Prompt], rows: list[dict], samples: list[Sample], m: Micro, micros: list[Micro], contexts: a name ->
    fn(row) -> Context.
  * Importing this file needs torch alone. The other packages are imported where they are used.
"""

import argparse
import contextlib
import ctypes
import datetime
import fcntl
import functools
import hashlib
import importlib.util
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
import zipfile
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Literal

# Before torch and tqdm read them. Threads that spin while they wait are slower than those that sleep beside other busy
# processes, and faster alone. In a file that is no terminal a bar is a line a minute.
if os.getloadavg()[0] > 1:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_MININTERVAL", "60")

from kernels.vocab import entropy, gather, kl, log_softmax, upcast, vocab_loss, vocab_terms  # noqa: F401

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard


class UserError(SystemExit):
    """A mistake in the settings or the data: one message that names the thing and the remedy, without a traceback.

    Where several ranks meet one, the first prints it and the others leave without a word.
    """

    def __init__(self, message: str):
        super().__init__(f"\nerror: {printable(message[:5000])}" if is_first_error() else 1)


def printable(text):
    """Without what would steer a terminal: names and messages in it are anybody's."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def is_first_error():
    """Asked once a rank. torchrun's store is there before the ranks know each other; its restarts count anew."""
    if not dist.is_torchelastic_launched() or os.getppid() == 1:  # torchrun is gone
        return True
    port = int(os.environ["MASTER_PORT"])
    wait = datetime.timedelta(seconds=5)
    try:
        store = dist.TCPStore(os.environ["MASTER_ADDR"], port, timeout=wait)
    except RuntimeError:  # it is going
        return True
    return store.add(f"errors {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", 1) == 1


# =============================================================================================== settings
@dataclass
class Args:
    """Settings of every method. A method extends it; a preset gives the values; flags override the preset."""

    preset: str = ""  # a row of PRESETS in the method file; default: toy, or the paper's with a GPU
    student: str = ""  # checkpoint to train: a folder, a hub name, or toy/student
    teacher: str = ""  # frozen checkpoint that marks every token
    data: str = ""  # training rows: .parquet, .json, .jsonl, .csv, a folder, or a hub name
    data_split: str = "train"  # which split of data
    # sets of held-out rows with answers; none: no evaluation
    eval_data: list[str] = field(default_factory=list)
    eval_split: str = "test"  # which split of eval_data
    column_problem: str = "problem"  # column with the question
    column_images: str = "images"  # column with the image, or the list of images
    column_answer: str = "answer"  # column with the checkable answer
    # folder where relative paths of images begin, and outside of which no image is read; empty: that of the data
    image_root: str = ""
    skip_bad_rows: bool = False  # leave out rows that cannot be used, instead of stopping

    # who generates; auto: vllm where it and a GPU are there
    engine: Literal["auto", "hf", "vllm"] = "auto"
    vllm_memory: float = 0.4  # share of a GPU's memory that vLLM may hold, weights included
    prompts: int = 64  # questions a rollout batch, over all ranks
    group: int = 1  # responses a question (G)
    updates: int = 1  # optimizer updates a rollout batch; the later ones are slightly off-policy
    rollout_batch: int = 64  # responses that a rank generates at once
    temperature: float = 1.0  # of the rollouts
    top_p: float = 1.0  # nucleus sampling; 1 = off
    top_k: int = 0  # sample among the k likeliest tokens; 0 = off
    max_prompt: int = 1024  # longest prompt in tokens, image tokens included
    eval_max_prompt: int = 0  # longest held-out prompt; 0 = as --max-prompt
    # smaller images are enlarged to so many pixels, and larger ones reduced; 0 = as the checkpoint says,
    # whose own limits vLLM keeps to as well
    min_pixels: int = 0
    max_pixels: int = 0
    max_response: int = 64  # longest response in tokens; longer ones are cut off and kept

    epochs: float = 1.0  # passes over the data
    max_steps: int = 0  # rollout batches; 0 = as many as the epochs need
    lr: float = 1e-6  # AdamW learning rate
    weight_decay: float = 0.01  # of matrices, not of norms and biases
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # after the warm-up
    warmup: int = 0  # updates with a linearly rising learning rate; the first of them has 0
    grad_clip: float = 1.0  # largest norm of the gradient
    micro_tokens: int = 8192  # tokens, all contexts, that a rank puts through the student at once
    loss_chunk: int = 256  # response tokens whose logits exist at the same time
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the passes; trained weights are float32
    freeze_vision: bool = False  # keep the vision tower as it is
    gradient_checkpointing: bool = False  # less memory, about a third more time
    replicas: int = 1  # copies of the sharded models, as one a machine; 1 = sharded over all ranks
    timeout: float = 30.0  # minutes that ranks wait for each other; longer than the longest rollout

    eval_every: int = 50  # rollout batches between evaluations; 0 = only at the start and the end
    eval_rows: int = 300  # held-out questions, a fixed random choice; 0 = all
    # steps between checkpoints, of which all keep their weights and the newest two the optimizer; 0 = only final/
    save_every: int = 50
    # run folder, gone on with if it holds a run; default: runs/<method>-<preset>-<time>
    output: str = ""
    seed: int = 0  # order of the data and sampling


# What a run that goes on may change, for it learns the same.
HARMLESS = """output save_every eval_every rollout_batch
vllm_memory timeout image_root eval_max_prompt micro_tokens loss_chunk gradient_checkpointing""".split()
COUNTS = "prompts group updates rollout_batch max_prompt max_response micro_tokens loss_chunk replicas".split()
RANGES = {
    **dict.fromkeys(COUNTS, (1, math.inf)),
    "temperature": (1e-6, 2),
    "top_p": (1e-6, 1),
    "vllm_memory": (0.01, 1),
    "grad_clip": (1e-9, 1e9),
    "timeout": (0.1, 1e5),
    "seed": (0, 2**32),
}


def parse_args(cls, presets, ranges, argv=None, flag="preset"):
    """Command line -> settings: the dataclass's defaults, then the preset, then the flags.

    presets: name -> values of some settings, of which the flag names one; the first is the default without a GPU.
    ranges: the method's settings -> (smallest, largest) value. What has no range must be finite and not negative.
    """
    import tyro

    real = next(name for name in presets if not name.startswith("toy"))
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    default = real if torch.cuda.is_available() else next(iter(presets))
    parser.add_argument(f"--{flag}", choices=presets, default=default)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            chosen = vars(parser.parse_known_args(argv)[0])
            args = tyro.cli(cls, args=argv, default=cls(**presets[chosen[flag]] | chosen))
    except SystemExit as e:
        if e.code:
            raise UserError(said.getvalue())
        raise  # --help
    for name, value in vars(args).items():
        low, high = (RANGES | ranges).get(name, (0, 1e12))
        if isinstance(value, (int, float)) and not low <= value <= high:
            raise UserError(
                f"--{name.replace('_', '-')} is {value}; it must lie in [{low:g}, {high:g}]"
            )
    if args.min_pixels > args.max_pixels > 0:
        raise UserError(f"--min-pixels {args.min_pixels} is above --max-pixels {args.max_pixels}")
    installed = importlib.util.find_spec("vllm")
    if args.engine == "auto":
        args.engine = "vllm" if installed and torch.cuda.is_available() else "hf"
    if args.engine == "vllm" and not installed:
        raise UserError(
            "--engine vllm needs vLLM: pip install -r requirements-vllm.txt, or use --engine hf"
        )
    return args


# =============================================================================================== ranks
def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def device():
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def start_ranks(args):
    """Join torchrun's process group, or make a group of one: a laptop and a node run the same FSDP2 code."""
    if dist.is_initialized():
        return
    if dist.is_torchelastic_launched() and sys.platform == "linux":
        # torchrun's end, however it comes, is a signal to its ranks: PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(
        "nccl" if gpu else "gloo",
        timeout=datetime.timedelta(minutes=args.timeout),
        device_id=device() if gpu else None,
        **({} if "WORLD_SIZE" in os.environ else alone),
    )


def on_signal(*_):
    """A scheduler's: a step under way is finished first (Run.steps); elsewhere it is as Ctrl-C."""
    Run.stopping = True
    if not Run.stepping:
        raise KeyboardInterrupt


def launch(main):
    """Run a method's main(). What ends it for reasons outside of it is said in a sentence."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, on_signal)
    try:
        main()
    except KeyboardInterrupt:
        raise UserError(
            "interrupted. The same command with the same --output goes on from what is saved there, a run from the "
            "last checkpoint of --save-every; or it begins anew where nothing is"
        )
    except OSError as e:  # a disk that is full, a folder that may not be written to
        raise UserError(f"{e}. Saved checkpoints are whole: with them the same command goes on")
    except torch.OutOfMemoryError as e:
        raise UserError(
            f"rank {rank()} is out of GPU memory ({str(e).splitlines()[0]}). Lower --micro-tokens, --loss-chunk or "
            "--vllm-memory, set --gradient-checkpointing, or use more GPUs; tools.plan says what a run needs"
        )
    except Exception:
        if is_first_error():
            raise
        # another rank has said why it stopped: this one's broken connection is no news
        raise SystemExit(1)
    if dist.is_initialized():
        dist.destroy_process_group()


def all_sum(x):
    """Sum of x over all ranks (a new tensor)."""
    x = x.detach().clone()
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def all_gather_object(x):
    """Every rank's small object, in the order of the ranks."""
    if world_size() == 1:
        return [x]
    parts = [None] * world_size()
    dist.all_gather_object(parts, x)
    return parts


def quantile(x, q):
    """Quantiles of the vectors x [n_r] of all ranks together, linearly interpolated.

    quantile([0, 1, 2, 3, 4, 5], [0.4, 0.7]) -> [2.0, 3.5]. torch.quantile takes 16 million elements at most.
    """
    import numpy as np

    together = np.concatenate(all_gather_object(x.cpu().numpy()))
    return torch.as_tensor(np.quantile(together, q), dtype=x.dtype, device=x.device)


def token_means(values, where=None):
    """Name -> mean of each [N] of all ranks' tokens, weighed by `where` [N]; nothing where that is zero everywhere."""
    where = torch.ones_like(next(iter(values.values()))) if where is None else where.float()
    sums = torch.stack([where, *(where * x for x in values.values())]).sum(-1)
    count, *totals = all_sum(sums).tolist()
    return {name: total / count for name, total in zip(values, totals)} if count else {}


def mean_over_ranks(values):
    """Mean of each list of numbers over all ranks; nothing where all of them are empty."""
    means = {}
    for name, x in values.items():
        means |= token_means({name: torch.tensor(x, dtype=torch.float64, device=device())})
    return means


def say(text):
    """Print on the first rank only."""
    if rank() == 0:
        print(printable(text), flush=True)


# =============================================================================================== data
@functools.cache
def locate(name):
    """Path of a checkpoint or data set; `toy/...` is made on first use by tools/toy.py, all else is returned as it is.

    tools.toy runs as a process of its own, for it imports the methods.
    """
    if not name.startswith("toy/") or Path(name).exists():
        return name
    command = [sys.executable, "-m", "tools.toy", "--part", name.split("/")[1]]
    beside = Path(__file__).parent
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=beside)
    if result.returncode:
        raise UserError(
            f"{name!r} is made by tools/toy.py, which is not beside {Path(__file__).name} or failed (see above). "
            "Name your own checkpoints and data with --student, --teacher, --data and --eval-data"
        )
    return str(Path(result.stdout.splitlines()[-1], name.removeprefix("toy/")))


def load_data(name, split):
    """A data set, by `datasets`: a file, a folder, or a hub name (with :configuration where it has several)."""
    import datasets
    import pandas

    if not name:
        raise UserError(
            "there is no training data: name it with --data (traces of vold.py: --trace-data)"
        )
    path = Path(locate(name))
    try:
        kind = path.suffix[1:].replace("jsonl", "json")
        if kind in ("parquet", "json", "csv") and not path.is_dir():
            if kind == "csv":  # as it is written: "NA" and "007" are answers
                table = pandas.read_csv(path, dtype=str, keep_default_na=False)
                if not isinstance(table.index, pandas.RangeIndex):
                    raise ValueError("its rows have more fields than its header")
                return datasets.Dataset.from_pandas(table)
            return datasets.load_dataset(kind, data_files=str(path), split="train")
        if (path / "state.json").exists():
            return datasets.load_from_disk(str(path))
        return datasets.load_dataset(*str(path).split(":"), split=split)
    except Exception as e:  # every reader has errors of its own
        raise UserError(
            f"data set {name!r}, split {split!r}, cannot be read: {e.__cause__ or e!r:.300}\nIt may be a .parquet, "
            ".json, .jsonl or .csv file, a folder, or a hub name, behind whose colon a configuration stands"
        )


FORMATS = "JPEG PNG WEBP GIF BMP TIFF".split()  # of images; some of PIL's others start programs


def open_images(images, root):
    """{"bytes", "path"}, bytes, or paths of files below root, alone or in a list -> PIL images, of headers alone.

    Raises ValueError or OSError where one is none, or too large. Symbolic links are followed: data sets have them.
    """
    from PIL import Image

    opened = []
    for image in images if isinstance(images, list) else [images]:
        if isinstance(image, dict):
            image = image.get("bytes") or image.get("path")
        if isinstance(image, bytes):
            image = io.BytesIO(image)
        else:
            image = Path(os.path.abspath(root / str(image)))
            if not image.is_file() or {root, root.resolve()}.isdisjoint(image.parents):
                raise ValueError(
                    f"no file below --image-root, by default the data's folder: {image}"
                )
        image = Image.open(image, formats=FORMATS)
        pixels = image.width * image.height
        if pixels > Image.MAX_IMAGE_PIXELS or image.mode.startswith(("I", "F")):
            raise ValueError(
                f"an image of {pixels} pixels, {image.mode}, is too large or has over 8 bits a colour"
            )
        opened.append(image)
    return opened


def decode(images):
    """The pixels of opened images, upright and RGB. What is transparent stands on white."""
    from PIL import Image, ImageOps

    decoded = []
    for image in map(ImageOps.exif_transpose, images):
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        decoded.append(image.convert("RGB"))
    return decoded


# Of what `datasets` calls the type of a column: images, paths or bytes, or lists of them; texts or chats; texts and
# numbers, or lists of them. Of other images it would itself make pixels, by whatever program PIL knows for them.
KINDS = {
    "images": r"((Large)?List\()?(Image|Value|\{(?!.*Image))|Json",
    "problem": r"(?!.*(Image|Audio|Video|Pdf))(Value\('(large_)?string|(Large)?List)",
    "answer": r"((Large)?List\()?Value\('(?!time|date|duration|float16|float32|.*binary)",
}


def select_columns(data, columns, name):
    """The named columns, and the rows' numbers as one more; stops with those named that are not there or no texts."""
    theirs = set(columns.values())
    if not theirs <= set(data.column_names):
        data = data.flatten()  # --column-answer reward_model.ground_truth
    for ours, column in columns.items():
        if column not in data.column_names:
            raise UserError(
                f"data set {name!r} has no column {column!r}; it has: {', '.join(data.column_names)}. Say which one "
                f"holds the {ours} with --column-{ours} NAME (text alone, in vold.py: --column-text, --trace-column)"
            )
        feature = data.info.features[column]
        kind = str(feature)
        if not re.match(KINDS.get(ours, KINDS["answer"]), kind):
            raise UserError(
                f"column {column!r} of {name!r} holds {kind}. Name one part of an object with a dot, as in "
                f"--column-{ours} {column}.PART; write dates, and cells of several types, all as texts"
            )
        if "Image" in kind:  # open_images decodes them
            getattr(feature, "feature", feature).decode = False
    return data.select_columns(sorted(theirs)).add_column(" row", range(len(data)))


def load_rows(args, processor, contexts, names, pick=0, optional=""):
    """The rows of --data, each read and checked before any model is loaded.

    A row is {problem, images, answer, ..., index}, its images decoded when it is read. contexts: name -> fn(row) ->
    Context, whose prompts have to fit. names: the columns that the method needs, which --column-NAME names in the data;
    optional: those of them that a row may leave empty, as images always are. pick: a fixed random choice of so many.
    """
    name = args.data
    columns = {column: getattr(args, f"column_{column}") for column in names.split()}
    data = select_columns(load_data(name, args.data_split), columns, name)
    if 0 < pick < len(data):  # the same in every run; data sets are often sorted
        data = data.shuffle(seed=0).select(range(pick))
    root = Path(os.path.abspath(args.image_root or locate(name)))
    root = root.parent if root.is_file() else root

    reader = functools.partial(read, columns, root)

    def check(row):
        for column, theirs in columns.items():
            if column not in ["images", *optional.split()] and is_empty(row[column]):
                raise ValueError(f"there is no {column} (column {theirs!r})")
        for context in contexts.values():
            view = context(row)
            if view is not None:
                processor.check(view, args.max_prompt)

    numbers = data[" row"]
    data = data.with_transform(functools.partial(reader, decode))
    bad = faults_of(data.with_transform(functools.partial(reader, list)), check, name)
    listed = "\n  ".join(
        [f"{len(bad)} of {len(data)} rows of {name!r} cannot be used:"]
        + [f"row {numbers[i]}: {fault}" for i, fault in list(bad.items())[:20]]
    )
    if bad and (not args.skip_bad_rows or len(bad) == len(data)):
        raise UserError(
            f"{listed}\nMend them; training rows, but no held-out ones, can be left out with --skip-bad-rows. Where "
            "images were not found: their paths begin at the data, or at --image-root"
        )
    if bad:
        say(f"{listed}\nThey are left out")
    return data.select([i for i in range(len(data)) if i not in bad])


def load_held_out(args, processor, contexts, names, load=load_rows):
    """The rows of each set of --eval-data by the name of its accuracy, read by `load` as if the set were --data."""
    found = {}
    for name in filter(None, args.eval_data):
        # what is measured is measured on all rows
        held = replace(args, data=name, data_split=args.eval_split, skip_bad_rows=False)
        held.max_prompt = args.eval_max_prompt or args.max_prompt
        found[f"acc@1/{name}"] = load(held, processor, contexts, names, args.eval_rows)
    return found


def read(columns, root, pixels, batch):
    """A batch of a data set -> rows; pixels: decode, or list where the images' headers are enough."""
    rows = {ours: batch[theirs] for ours, theirs in columns.items()} | {"index": batch[" row"]}
    images = rows.get("images") or [[]] * len(rows["index"])
    opened = [open_images(cell or [], root) for cell in images]
    rows["problem"], opened = zip(*map(marked, rows["problem"], opened))
    try:
        rows["images"] = list(map(pixels, opened))
    except Exception as e:  # PIL has errors of its own
        raise UserError(
            f"an image of row {rows['index']} in {root} cannot be decoded ({e}). Mend it: the same command goes on "
            "from the last checkpoint"
        )
    return rows


def faults_of(data, check, name):
    """What check(row) raises, by the row's place; every row is read once, by one of the ranks."""
    from tqdm import tqdm

    found = {}
    mine = range(rank(), len(data), world_size())
    for i in tqdm(mine, f"checking {name}", disable=rank() > 0):
        try:
            check(data[i])
        except Exception as e:  # PIL and templates have errors of their own
            found[i] = f"{e!s:.200}"
    return dict(sorted(pair for part in all_gather_object(found) for pair in part.items()))


MARK = r"(?i)<\|?(?:image|img)[ _-]*(?:(\d+) *)?/?\|?>"  # of an image in a question


def marked(problem, images):
    """A question and its images, in the order of their marks, where it has any: <image>, or <image 1>, <image 2>.

    A chat is read if it is one user turn, in text or parts, with or without a system turn, which then stands in front.
    Raises ValueError for a longer one, and where marks and images differ.
    """
    turns = problem if isinstance(problem, list) else [{"role": "user", "content": problem}]
    roles = [turn.get("role") for turn in turns]
    if roles not in (["user"], ["system", "user"]):
        raise ValueError(
            f"a chat of {roles} is no question: it may have one user turn in these roles, and a system turn before it"
        )
    texts = []
    for turn in turns:
        text = turn.get("content")
        if isinstance(text, list):
            text = "".join("<image>" if "image" in part["type"] else part["text"] for part in text)
        if not isinstance(text, str):
            raise ValueError(f"the question is no text ({problem!s:.60})")
        texts.append(text)
    text = "\n\n".join(texts)
    marks = re.findall(MARK, text)
    numbers = [int(mark or i) for i, mark in enumerate(marks, 1)]
    if marks and set(numbers) != set(range(1, len(images) + 1)) or "<video" in text:
        raise ValueError(f"it marks images {numbers} or videos, and has {len(images)} images")
    if marks:
        images = [images[number - 1] for number in numbers]
    else:
        text = "<image>" * len(images) + text
    text = re.sub(MARK, "<image>", text)
    if not text.replace("<image>", "").strip():
        raise ValueError("there is no question")
    return text, images


def is_empty(value):
    """None, NaN, a text without an answer in it, or a list of nothing or with such."""
    cells = value if isinstance(value, list) else [value]
    return not cells or any(x is None or x != x or plain(str(x)) == "" for x in cells)


# =============================================================================================== prompts
IMAGES = 16  # of one conversation: what vLLM is told to make room for


@dataclass
class Context:
    """What a model sees before the response: chat messages, the images they mark, and the answer's beginning."""

    messages: list[dict]
    images: list = field(default_factory=list)
    prefill: str = ""


@dataclass
class Prompt:
    """An encoded context: token ids with every image placeholder expanded, and the images' patches."""

    ids: list[int]
    pixels: Tensor | None = None  # [patches, patch_dim]
    grid: Tensor | None = None  # [images, 3]: time, height, width in patches
    images: list = field(default_factory=list)  # as they came


def message(role, text, images=0):
    """A turn with `images` images: where the text first marks them with <image>, else in front; 0 removes marks.

    message("user", "<image>How many?", 1) -> content [image, "How many?"]; with 0 -> ["How many?"]
    """
    if text.count("<image>") < images or not images:
        text = "<image>" * images + text.replace("<image>", "").lstrip()
    content = []
    for piece in filter(None, re.split("(<image>)", text.lstrip(), maxsplit=images)):
        image = piece == "<image>"
        content.append({"type": "image" if image else "text", "text": "" if image else piece})
    return {"role": role, "content": content}


BREAK = "\ue0ff"  # private use: stands in a text where no token may reach across
VISION_KEYS = "image_token_id video_token_id vision_start_token_id vision_end_token_id".split()


class Processor:
    """Tokenizer and image processor of one checkpoint: contexts -> prompts, prompts + responses -> batches."""

    def __init__(self, name, args=None):
        """args: for --min-pixels and --max-pixels."""
        from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

        self.name = name
        self.config = load_pretrained(name, AutoConfig)
        self.tokenizer = load_pretrained(name, AutoTokenizer)
        self.image_id = getattr(self.config, "image_token_id", None)  # None: a text-only model
        self.images = None
        if hasattr(self.config, "vision_config"):
            pixels = {key: getattr(args, key, 0) or None for key in ("min_pixels", "max_pixels")}
            # everywhere: pixels differ between backends
            self.images = load_pretrained(name, AutoImageProcessor, backend="pil", **pixels)
            if not self.config.model_type.startswith("qwen"):
                raise UserError(
                    f"{name!r} is {self.config.model_type}. Models that see have to be of Qwen2-VL's line: Qwen2-VL, "
                    "Qwen2.5-VL, Qwen3-VL, Qwen3.5, or a mixture of experts of the last two"
                )
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.vocab = len(self.tokenizer)  # ids from here on are padding rows of the head
        # Never sampled: an image placeholder would promise the next forward pass an image that is not there.
        padding = range(self.vocab, self.config.get_text_config().vocab_size)
        vision = {getattr(self.config, key, None) for key in VISION_KEYS} - {None}
        self.banned = sorted(vision.union(padding))

    def escape(self, text):
        """The text with a BREAK in each control token that it spells, such as the end of a turn: it stays text."""
        for token in self.tokenizer.all_special_tokens:
            text = text.replace(token, token[0] + BREAK + token[1:])
        return text

    def render(self, context):
        """The text that the chat template makes of a context, one placeholder an image, prefill at the end."""
        messages = []
        for turn in context.messages:
            content = [part | {"text": self.escape(part["text"])} for part in turn["content"]]
            # a language model's template takes plain text, and may leave out all else
            if self.image_id is None:
                content = "".join(part["text"] for part in content)
            messages.append(turn | {"content": content})
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        if context.prefill and text.rstrip().endswith("<think>"):
            raise ValueError("the chat template opens <think>, in which the answer cannot begin")
        return text + context.prefill

    def tokenize(self, text):
        """Token ids; no token reaches across a BREAK."""
        return [
            i
            for piece in text.split(BREAK)
            for i in self.tokenizer(piece, add_special_tokens=False)["input_ids"]
        ]

    def encode(self, context):
        """Token ids, with each placeholder expanded to as many as its image has merged patches, and the pixels."""
        return self.encode_text(self.render(context), context.images)

    def encode_text(self, text, images):
        """See encode; the text is what the chat template makes."""
        ids = self.ids_of(text, images)
        if not images:
            return Prompt(ids)
        pixels = self.images(images=images, return_tensors="pt")
        return Prompt(ids, pixels["pixel_values"], pixels["image_grid_thw"], images)

    def ids_of(self, text, images):
        """Token ids, an image's placeholder as often as it has merged patches. No pixels are made.

        Raises ValueError if the text does not show the images.
        """
        ids = self.tokenize(text)
        shown = ids.count(self.image_id)
        if shown != len(images):
            raise ValueError(
                f"{self.name!r} shows {shown} of the prompt's {len(images)} images; a model of text alone shows none"
            )
        left = iter(images)
        expanded = []
        for token in ids:
            count = 1
            if token == self.image_id:
                image = next(left)
                patches = self.images.get_number_of_image_patches(image.height, image.width)
                count = patches // self.images.merge_size**2
            expanded += [token] * count
        return expanded

    def check(self, context, limit):
        """Raises ValueError where a context cannot be used. Cheap: no pixels are made."""
        text = self.render(context)
        for turn in context.messages:
            for part in turn["content"]:
                if self.escape(part["text"]).strip() not in text:
                    raise ValueError(f"the chat template leaves out {part['text'].strip()[:60]!r}")
        size = len(self.ids_of(text, context.images))
        if size > limit or len(context.images) > IMAGES:
            raise ValueError(
                f"the prompt has {size} tokens and {len(context.images)} images; the limits are {limit} (--max-prompt, "
                f"--eval-max-prompt; large images: --max-pixels) and {IMAGES}"
            )

    def batch(self, prompts, responses, images=True):
        """Right-padded inputs, and in rows/cols the positions [N] whose hidden states predict the sampled tokens.

        The token at c is predicted at c - 1. Prompt of 3 tokens, response of 2 -> cols 2, 3. Nobody attends to the
        padding behind, so there is no mask, and attention takes its fast causal path.

        images: whether other ranks' batches show some. They wait for this rank in every layer, the vision tower's too:
        where nothing is here, or nothing is to be seen, a prompt without a response is added.
        """
        from PIL import Image

        pairs = list(zip(prompts, responses))
        images = images and self.images is not None
        if not pairs or images and not any(prompt.images for prompt in prompts):
            shown = [Image.new("RGB", (128, 128))] if images else []
            context = Context([message("user", "a", len(shown))], shown)
            pairs.append((self.encode(context), Response([])))
        batch = self.pad([Prompt(p.ids + r.ids, p.pixels, p.grid) for p, r in pairs])
        del batch["attention_mask"]
        before = [torch.tensor([False] * (len(p.ids) - 1) + r.mask) for p, r in pairs]
        sampled = nn.utils.rnn.pad_sequence(before, batch_first=True)  # [B, T], at c - 1
        batch["rows"], batch["cols"] = sampled.nonzero().T
        return batch

    def pad(self, prompts, side="right"):
        """Padded model inputs. mm_token_type_ids: without them Qwen2.5-VL is silently wrong."""
        ids = {"input_ids": [p.ids for p in prompts]}
        batch = self.tokenizer.pad(ids, padding_side=side, return_tensors="pt")
        if self.image_id is not None:
            batch["mm_token_type_ids"] = (batch["input_ids"] == self.image_id).int()
            shown = [p for p in prompts if p.pixels is not None]
            if shown:
                batch["pixel_values"] = torch.cat([p.pixels for p in shown])
                batch["image_grid_thw"] = torch.cat([p.grid for p in shown])
        return batch


def load_pretrained(name, auto, **settings):
    """auto.from_pretrained of a checkpoint; what cannot be read is named."""
    if Path(locate(name), "adapter_config.json").exists():
        raise UserError(
            f"{name!r} holds adapters: merge them into their model (peft: merge_and_unload)"
        )
    try:
        return auto.from_pretrained(locate(name), trust_remote_code=False, **settings)
    except Exception as e:
        # transformers, its checks of a config, and each tokenizer have errors of their own
        raise UserError(
            f"checkpoint {name!r} cannot be read ({e!r:.300}). Name a folder or a hub model that has config, weights, "
            "tokenizer and image processor, and needs no code of its own, with --student and --teacher, or --model"
        )


IMAGE_KEYS = """patch_size merge_size temporal_patch_size size resample rescale_factor do_normalize
image_mean image_std""".split()


def check_same_inputs(student, teacher):
    """The teacher reads the student's prompts and response ids: stop if they would mean something else to it."""

    def inputs(processor):
        images = {key: str(getattr(processor.images, key, "")) for key in IMAGE_KEYS}
        return (processor.tokenizer.get_vocab() | images).items()

    different = sorted({key for key, _ in inputs(student) ^ inputs(teacher)})
    if different:
        raise UserError(
            f"student {student.name!r} and teacher {teacher.name!r} read tokens or images differently: "
            f"{different[:3]}. Choose models of one family"
        )


# =============================================================================================== models
class Model(nn.Module):
    """A checkpoint whose forward pass gives the hidden states of the response positions, or a loss made of them.

    The loss has to be inside: under FSDP2 the head is whole only during the root's forward pass.
    """

    def __init__(self, name, dtype, empty=False):
        """empty: without its weights and their memory."""
        super().__init__()
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
        from transformers.utils import logging

        logging.disable_progress_bar()
        config = load_pretrained(name, AutoConfig)
        vision = hasattr(config, "vision_config")
        auto = AutoModelForImageTextToText if vision else AutoModelForCausalLM
        if empty:
            with torch.device("meta"):
                self.lm = auto.from_config(config, dtype=dtype)
        else:
            self.lm, found = load_pretrained(name, auto, dtype=dtype, output_loading_info=True)
            if found["missing_keys"]:
                missing = sorted(found["missing_keys"])[:3]
                raise UserError(
                    f"checkpoint {name!r} has no weights for {missing}, which would be random: mend or choose another"
                )
            if found["unexpected_keys"]:
                say(
                    f"of checkpoint {name!r} these stay unused: {sorted(found['unexpected_keys'])[:3]}"
                )
        self.eval()  # no dropout anywhere: the student is scored and trained as it samples

    def forward(self, batch, loss_fn=None):
        """batch: from Processor.batch, on any device. Returns hidden states [N, H], or loss_fn(hidden, head [V, H])."""
        inputs = {key: value.to(device(), non_blocking=True) for key, value in batch.items()}
        rows = inputs.pop("rows")
        cols = inputs.pop("cols")
        hidden = self.lm.model(**inputs, use_cache=False).last_hidden_state[rows, cols]  # [N, H]
        return hidden if loss_fn is None else loss_fn(hidden, self.lm.lm_head.weight)

    def head(self):
        """The whole output matrix [V, H], on every rank, without gradient."""
        return full_tensor(self.lm.lm_head.weight.detach())

    def weights(self):
        """(name, whole value) of every parameter, as a checkpoint has it. All ranks go through it."""
        for name, parameter in self.lm.named_parameters():
            yield name, as_saved(self.lm, name, full_tensor(parameter))


def full_tensor(parameter):
    """The whole value of a parameter, sharded or not."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.detach()


def as_saved(lm, name, value):
    """A parameter as a checkpoint has it, and back: transformers keeps the experts of Qwen3-VL-MoE transposed."""
    turned = lm.config.model_type == "qwen3_vl_moe" and ".mlp.experts." in name
    return value.transpose(1, 2) if turned else value


def load_model(name, args, trained, kind=Model):
    """A checkpoint, sharded over all ranks (FSDP2): float32 at least if it is trained, else in the compute dtype.

    kind: Model, or what a method makes of it.
    """
    dtype = getattr(torch, args.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    model = kind(name, wide if trained else dtype, empty=rank() > 0)
    if not trained:
        model.requires_grad_(False)
    weights = model.state_dict()
    if args.freeze_vision and hasattr(model.lm.model, "visual"):
        model.lm.model.visual.requires_grad_(False)
    if trained and args.gradient_checkpointing:
        name = "activation_checkpointing_enable"  # before transformers 5.2x: gradient_...
        getattr(model.lm, name, model.lm.gradient_checkpointing_enable)()
        # what checkpoints asks for training mode; dropout is not to know of it
        for module in model.modules():
            module.training = hasattr(module, "gradient_checkpointing")
    shape = (args.replicas, world_size() // args.replicas)
    mesh = dist.init_device_mesh(device().type, shape, mesh_dim_names=("replicate", "shard"))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=wide)
    for module in model.modules():
        if type(module).__name__ in model.lm._no_split_modules:
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    # The first rank has read the weights: a node's memory holds one copy, not one a rank.
    if rank() > 0:
        model.to_empty(device=device())
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model.to(device()), weights, options=options)
    for buffer in model.buffers():
        dist.broadcast(buffer, 0)
    return model


# =============================================================================================== rollouts
@dataclass
class Response:
    """One answer: its tokens (the end token included, if it got that far) and what the sampler says of them."""

    ids: list[int]
    finished: bool = True  # it ended by itself
    text: str = ""
    log_probs: list[float] = field(default_factory=list)  # of the sampled tokens, by the sampler
    # which tokens the model sampled; the others are what tools answered
    mask: list[bool] = field(default_factory=list)

    def __post_init__(self):
        self.mask = self.mask or [True] * len(self.ids)


class HFEngine:
    """transformers' generate on an unsharded copy of the student, in the compute dtype."""

    def __init__(self, name, processor, args):
        self.processor = processor
        self.args = args
        self.lm = Model(name, getattr(torch, args.dtype)).to(device()).lm
        ends = self.lm.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self.ends = sorted({*ends, processor.tokenizer.eos_token_id} - {None})

    @torch.no_grad()
    def sync(self, weights):
        """Take over the student's weights (Model.weights()), one whole parameter at a time."""
        for name, value in weights:
            self.lm.get_parameter(name).copy_(as_saved(self.lm, name, value))

    def sleep(self):
        """Nothing is to be generated before the next sync."""

    def close(self):
        """Nothing is to be generated any more."""

    @torch.no_grad()
    def generate(self, prompts, seeds=None):
        """One response a prompt, in order.

        seeds: what each response is drawn with; None: greedy. Log-probs are those of the distribution sampled from.
        """
        import transformers as t

        args = self.args
        # a checkpoint's own would silently bend the sampling
        self.lm.generation_config = t.GenerationConfig(
            eos_token_id=self.ends,
            pad_token_id=self.processor.tokenizer.pad_token_id,
            suppress_tokens=self.processor.banned,
            max_new_tokens=args.max_response,
        )
        warpers = []
        if seeds:
            warpers.append(t.TemperatureLogitsWarper(args.temperature))
            if args.top_k:
                warpers.append(t.TopKLogitsWarper(args.top_k))
            if args.top_p < 1:
                warpers.append(t.TopPLogitsWarper(args.top_p))
        responses = []
        for start in range(0, len(prompts), args.rollout_batch):
            part = slice(start, start + args.rollout_batch)
            batch = self.processor.pad(prompts[part], side="left").to(device())
            sampler = Sampler(seeds and seeds[part], args.max_response)
            output = self.lm.generate(**batch, logits_processor=[*warpers, sampler])
            sampled = output[:, batch["input_ids"].shape[1] :].tolist()
            log_probs = torch.stack(sampler.log_probs, -1)  # [B, T]
            for ids, values in zip(sampled, log_probs.tolist()):
                end = next((i + 1 for i, token in enumerate(ids) if token in self.ends), None)
                text = self.processor.tokenizer.decode(ids[:end], skip_special_tokens=True)
                responses.append(Response(ids[:end], end is not None, text, values[:end]))
        return responses


class Sampler:
    """Last of the logits processors: chooses every token, and notes its log-prob.

    A response is drawn with the numbers of its own seed, by inverting the distribution function: what else is in the
    batch, and on how many ranks the batch is spread, changes nothing.
    """

    def __init__(self, seeds, length):
        """seeds: one a response, of at most `length` tokens; None: greedy. log_probs: a [B] a step."""
        self.log_probs = []
        self.numbers = None
        if seeds is not None:
            rows = [
                torch.rand(length, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
                for n in seeds
            ]
            self.numbers = torch.stack(rows).to(device())  # [B, T] in [0, 1)

    def __call__(self, input_ids, scores):
        log_p = log_softmax(scores)
        # of NaN or +inf, or where nothing is left: no token drawn from it would be one
        if log_p.isnan().any():
            raise UserError(
                "not finite: the sampler's logits. Lower --lr, or look at the checkpoint"
            )
        if self.numbers is None:
            token = log_p.argmax(-1, keepdim=True)
        else:
            below = log_p.double().exp().cumsum(-1)
            at = self.numbers[:, len(self.log_probs), None] * below[:, -1:]
            token = torch.searchsorted(below, at, right=True).clamp(max=below.shape[-1] - 1)
        self.log_probs.append(log_p.gather(-1, token).squeeze(-1))
        return torch.full_like(scores, -math.inf).scatter_(-1, token, 0.0)


def seed_of(*numbers):
    """A seed of 62 bits for the place in the run that these numbers name."""
    return int(hashlib.blake2b(repr(numbers).encode(), digest_size=8).hexdigest(), 16) >> 2


class VLLMEngine:
    """vLLM within the training processes, one engine a rank. See requirements-vllm.txt."""

    def __init__(self, name, processor, args):
        # weights are handed over in place
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        from vllm import LLM

        self.processor = processor
        self.args = args
        self.asleep = False
        self.gpu = torch.cuda.is_available()
        self.llm = LLM(
            model=locate(name),
            dtype=args.dtype,
            seed=args.seed,
            max_model_len=max(args.max_prompt, args.eval_max_prompt) + args.max_response,
            max_num_seqs=args.rollout_batch,
            gpu_memory_utilization=args.vllm_memory,
            distributed_executor_backend="external_launcher" if world_size() > 1 else None,
            limit_mm_per_prompt={"image": IMAGES, "video": 0},
            enforce_eager=not self.gpu,
            enable_sleep_mode=self.gpu,
            logprobs_mode="processed_logprobs",
        )
        # as HFEngine suppresses them
        self.bias = dict.fromkeys(processor.banned, -100.0)

    def wake(self):
        if self.asleep:
            self.llm.wake_up()
        self.asleep = False

    def sync(self, weights):
        """Take over the student's weights. What vLLM remembers of earlier ones goes: prefixes and image features."""
        self.wake()
        dtype = getattr(torch, self.args.dtype)
        pairs = ((name, value.to(dtype)) for name, value in weights)
        self.llm.apply_model(lambda model: model.load_weights(pairs) and None)
        self.llm.reset_prefix_cache()
        self.llm.llm_engine.reset_encoder_cache()

    def sleep(self):
        """Leave the GPU's memory to the update."""
        if self.gpu:
            self.llm.sleep(level=1)
            self.asleep = True

    def close(self):
        """Give back all memory, for the engine of a next stage."""
        end = dist.destroy_process_group
        # vLLM ends its own groups and then all, which are ours too.
        dist.destroy_process_group = lambda group=None: None if group is None else end(group)
        try:
            self.llm.llm_engine.engine_core.shutdown()
        finally:
            dist.destroy_process_group = end

    def generate(self, prompts, seeds=None):
        """See HFEngine.generate. At temperature 0 vLLM is greedy, whatever top_p and top_k are."""
        from vllm import SamplingParams

        self.wake()
        args = self.args
        settings = [
            SamplingParams(
                seed=seed,
                temperature=args.temperature if seeds else 0,
                top_p=args.top_p,
                top_k=args.top_k,
                max_tokens=args.max_response,
                logprobs=0,
                logit_bias=self.bias,
            )
            for seed in seeds or [None] * len(prompts)
        ]
        requests = [self.request(prompt) for prompt in prompts]
        responses = []
        for output in self.llm.generate(requests, settings, use_tqdm=False):
            answer = output.outputs[0]
            ids = list(answer.token_ids)
            log_probs = [at[token].logprob for at, token in zip(answer.logprobs, ids)]
            text = self.processor.tokenizer.decode(ids, skip_special_tokens=True)
            responses.append(Response(ids, answer.finish_reason == "stop", text, log_probs))
        return responses

    def request(self, prompt):
        """A prompt as vLLM wants it: one placeholder an image, and images of their final size.

        vLLM expands placeholders itself; and its resizing gives pixels that differ by 0.01 from training's.
        """
        image = self.processor.image_id
        before = [None, *prompt.ids]
        ids = [token for token, last in zip(prompt.ids, before) if token != image or last != image]
        if not prompt.images:
            return {"prompt_token_ids": ids}
        patch = self.processor.images.patch_size
        resample = self.processor.images.resample
        sizes = [(width * patch, height * patch) for _, height, width in prompt.grid.tolist()]
        images = [picture.resize(size, resample) for picture, size in zip(prompt.images, sizes)]
        return {"prompt_token_ids": ids, "multi_modal_data": {"image": images}}


ENGINES = {"hf": HFEngine, "vllm": VLLMEngine}


# =============================================================================================== samples
@dataclass
class Sample:
    """One response, with every context that it will be read in. A method adds attributes of its own."""

    row: dict
    prompts: dict[str, Prompt]  # by the context's name
    response: Response | None = None
    correct: bool = False
    reward: float = 0.0
    advantage: float = 0.0


def sample_responses(engine, rows, contexts, args, greedy=False):
    """`group` consecutive responses a row, or a greedy one, under the first of the contexts (name -> fn(row)).

    Each is drawn with a seed of its own: from --seed, the row's number among all that the run draws, and its number in
    the group. A context may be None for a row that lacks what it shows; the sample then has no prompt of that name.
    """
    samples = []
    seeds = []
    for row in rows:
        prompts = {}
        for name, context in contexts.items():
            view = context(row)
            if view is not None:
                prompts[name] = engine.processor.encode(view)
        for i in range(1 if greedy else args.group):
            samples.append(Sample(row, dict(prompts)))
            seeds.append(seed_of(args.seed, row.get("draw", row["index"]), i))
    first = next(iter(contexts))
    asked = [s.prompts[first] for s in samples]
    for s, response in zip(samples, engine.generate(asked, None if greedy else seeds)):
        s.response = response
    return samples


def reward_answers(samples, group, reward=None):
    """Check the answers, reward them, and set the advantages within each group of `group` responses.

    reward: fn(sample) -> number; default: 1 for a right answer, else 0. A response that was cut off has not answered.
    """
    for s in samples:
        s.correct = is_right(s.response, s.row)
        s.reward = reward(s) if reward else float(s.correct)
    advantages = group_advantages(torch.tensor([s.reward for s in samples]), group)
    for s, advantage in zip(samples, advantages.tolist()):
        s.advantage = advantage


class Micro:
    """A micro-batch and all that is known of it before the update. n sampled tokens, sequence after sequence.

    batch      inputs: every sequence in the first context, then every one in the second, ...
    ids        [n] the tokens                               old      [n] log-prob when sampled; None: of this policy
    length     [n] tokens of the token's response           teacher  hidden states [n, H], one tensor a context
    response   [n] its number in the micro-batch            weights  name of a term -> [n], set by weigh
    advantage  [n]                                          terms    name -> [n], set by the forward pass
    sampled    [n] the sampler's log-prob                   A method adds [n] vectors of its own.
    """

    def __init__(self, samples, contexts, processor, images=True):
        responses = [s.response for s in samples]
        prompts = [s.prompts[name] for name in contexts for s in samples]
        self.samples = samples
        self.contexts = len(contexts)
        self.batch = processor.batch(prompts, responses * len(contexts), images)
        self.lengths = [sum(r.mask) for r in responses]
        tokens = [token for r in responses for token, sampled in zip(r.ids, r.mask) if sampled]
        self.ids = torch.tensor(tokens, dtype=torch.long, device=device())
        self.length = self.spread(self.lengths)
        self.response = self.spread(range(len(responses)), torch.long)
        self.advantage = self.spread([s.advantage for s in samples])
        self.sampled = torch.tensor([x for r in responses for x in r.log_probs], device=device())
        self.old = None
        self.teacher = []

    def spread(self, values, dtype=torch.float32):
        """A number a response -> [n]. Responses of 2 and 1 tokens, [7, 8] -> [7, 7, 8]."""
        repeats = torch.tensor(self.lengths, dtype=torch.long)
        return torch.tensor(values, dtype=dtype).repeat_interleave(repeats).to(device())


def make_micros(samples, contexts, processor, limit, images=True):
    """Samples in micro-batches of at most `limit` tokens (or one sequence), each sequence once a context.

    Sequences of similar length go together. All ranks get equally many micro-batches, the last ones empty: every pass
    is a joint one. images: whether the contexts show any.
    """

    def length(s):
        return max(len(s.prompts[name].ids) for name in contexts) + len(s.response.ids)

    parts = []
    for s in sorted(samples, key=length):
        if parts and (len(parts[-1]) + 1) * length(s) <= limit // len(contexts):
            parts[-1].append(s)
        else:
            parts.append([s])
    missing = max(all_gather_object(len(parts))) - len(parts)
    return [Micro(part, contexts, processor, images) for part in parts + [[]] * missing]


def split(items, parts):
    """Consecutive equal parts."""
    n = len(items) // parts
    return [items[i * n : (i + 1) * n] for i in range(parts)]


# =============================================================================================== losses
def group_advantages(rewards, group):
    """A = (r - mean) / (std + 1e-6) within each group of `group` consecutive responses; rewards [B] -> [B].

    std is the unbiased one. A group of equal rewards gets exactly 0. [1, 0, 0, 1] -> [.87, -.87, -.87, .87]
    """
    if group == 1:
        return torch.zeros_like(rewards)
    # in float32 the mean of eight times 0.1 is not 0.1
    r = rewards.double().view(-1, group)
    advantages = (r - r.mean(-1, keepdim=True)) / (r.std(-1, keepdim=True) + 1e-6)
    return advantages.view(-1).to(upcast(rewards).dtype)


def clipped_surrogate(log_p, old, advantages, low, high):
    """(min(rho A, clip(rho, 1 - low, 1 + high) A), to be maximised; whether the clip cut it), [N]; rho = p / p_old."""
    ratio = (upcast(log_p) - old).exp()
    free = ratio * advantages
    surrogate = torch.minimum(free, ratio.clamp(1 - low, 1 + high) * advantages)
    return surrogate, (surrogate < free).to(free.dtype)


def k3(log_p, reference):
    """The k3 estimator of KL(p || reference) at sampled tokens, [N]: r - 1 - log r with r = reference / p.

    So is its value in the mean over samples from p; its mean gradient is that of KL(reference || p).
    """
    log_ratio = upcast(reference) - log_p
    return log_ratio.exp() - 1 - log_ratio


def sequence_old(now, old, divisor, response):
    """Old log-probs [n] that give every token its response's ratio s = exp(sum of (log p - log p_old) / divisor).

    The token's ratio is then s p / sg(p), with its own gradient. divisor: the response's length (GSPO), or 1 for the
    ratio of the whole response. response [n] numbers the responses from 0.
    """
    now = upcast(now)
    # entry i: response i
    log_s = torch.zeros_like(now).index_add_(0, response, (now - old) / divisor)
    return now - log_s[response]


# =============================================================================================== answers
# An option as a question lists it, up to the next one or the line's end: its letter, and all of it.
LISTED = r"(?<!\w)\(?(?=([A-J]))(\1[).:] *.+?)(?=(?<!\s)\s*(?:\(?[A-J][).:] |\n|$)|$)"


def is_right(response, row):
    """Whether a response answers a row right, in training and in evaluation. One that was cut off has not answered.

    Where the answer is the letter of an option that the question lists, the option's text is right too.
    """
    answers = all_answers(row["answer"])
    options = dict(re.findall(LISTED, row["problem"]))
    answers += [options.get(one.strip("(.)"), one) for one in answers]
    return response.finished and is_correct(extract_answer(response.text), answers)


def extract_answer(text):
    r"""Where in a response the answer is; None: nowhere.

    What stands behind the last </reason>, </think> or </description> counts; a thought that is still open has no
    answer. There it is the content of the last complete \boxed{...} or <answer>; without one, behind a closed thought,
    all of it.

    "<reason>.</reason> \boxed{\frac{1}{2}}" -> "\frac{1}{2}".  "<reason>\boxed{3}</reason> (c)" -> "(c)".  "4" -> None
    """
    import regex

    *thoughts, tail = re.split("</(?:reason|think|description)>", text)
    if re.search("<(?:reason|think|description)>", tail):
        return None
    answer = tail if thoughts else ""
    # braces in pairs, to any depth, from each \boxed to the next: in linear time
    tail = re.sub("(?s)<answer>((?:(?!<answer>).)*?)</answer>", r"\\boxed{\1}", tail)
    for piece in tail.split("\\boxed")[1:]:
        box = regex.match(r"\s*(\{(?:[^{}]++|(?1))*+\})", piece)
        answer = box[1][1:-1] if box else answer
    return answer.strip() or None


def is_correct(prediction, answer):
    """Whether an extracted answer equals the reference. docs/answers.md has the rule in words.

    answer: a string or number, or a list of them, of which each is right. It may be a response with its answer in a
    box, or behind "####".
    """
    if prediction is None:
        return False
    golds = {one.rpartition("####")[2] for one in all_answers(answer)}
    return any(same(plain(prediction), plain(extract_answer(gold) or gold)) for gold in golds)


def same(ours, gold):
    """Whether two plain answers are equal. The form of the gold decides how they are compared."""
    if ours.casefold() == gold.casefold():  # but x is not X
        return gold != "" and (ours == gold or not is_mathematics(gold))
    # no short answer is this long, and a symbolic parser can be made to hang by one
    if max(len(ours), len(gold)) > 200:
        return False
    (letter, text), (right, meaning) = as_option(ours), as_option(gold)
    if letter and right:
        return letter == right and (not text or not meaning or same(text, meaning))
    if right:
        return same(ours, meaning)
    if letter and text:
        return same(text, gold)
    (brackets, parts), (needed, golds) = as_list(ours), as_list(gold)
    shorter, longer = sorted((len(parts), len(golds)))
    if longer > 1 and (shorter > 1 or brackets == needed):
        equal = map(same, parts, golds)
        if re.search(r"^\{|\bor\b|=.*=", gold):  # a set has no order
            equal = (any(same(one, other) for one in parts) for other in golds)
        return shorter == longer and brackets == needed and all(equal)
    return same_quantity(ours, gold)


def same_quantity(ours, gold):
    """Equal values, of one unit where both have one; 50 % is 0.5, and 50 as well."""
    (value, unit), (right, needed) = as_quantity(ours), as_quantity(gold)
    if unit and needed and unit != needed:
        return False
    if isinstance(value, str) or isinstance(right, str):
        return is_mathematics(f"{value}\n{right}") and same_mathematics(str(value), str(right))
    if unit == needed or "%" not in (unit, needed):
        return value == right
    return right in (value, value / 100 if unit == "%" else value * 100)


def same_mathematics(ours, gold):
    """By math-verify. It takes tiny numbers for equal, so that their quotient is looked at; and it is not symmetric."""
    from math_verify import parse, verify

    a, b = parse(f"\\boxed{{{ours}}}"), parse(f"\\boxed{{{gold}}}")
    if all(getattr(x, "is_number", False) for x in a[:1] + b[:1]):
        a, b = parse("1"), parse(rf"\boxed{{\frac{{{ours}}}{{{gold}}}}}")
    return verify(b, a, float_rounding=12) or verify(a, b, float_rounding=12)


def all_answers(answer):
    """A row's right answers as texts; most rows have one. The first is the one that a model is shown."""
    return [str(one).strip() for one in (answer if isinstance(answer, list) else [answer])]


# Other ways to write the same: pattern => how it is written here; \040 is a blank.
SPELLINGS = r"""
\\(?:(?:text)?color ?\{\w+\}|(?:text|math(?!bb)|mbox|emph|ce|b[mf]|bold|underline|operator)[a-z]*) ?\{([^{}]*)\} => \1
\\(?:(?:text)?color ?\{\w+\}|(?:text|math(?!bb)|mbox|emph|ce|b[mf]|bold|underline|operator)[a-z]*) ?\{([^{}]*)\} => \1
<\|[^|]*\|>|\\(?:left|right|[bB]igg?[lr]?)(?![a-z])|\\[,;:!]|\\[()\[\]]|\\?\$|USD ?|US(?=\\?\$)|[€£¥₹] =>
\\quad\b|~ => \040
(?<!\\)\\(?=[{}% ]) =>
\s+ => \040
(?<=\d)\{,\}(?=\d) => ,
[\u2010-\u2015\u2212] => -
\u2044 => /
[\u2018\u2019] => '
^'(.*)'$ => \1
[\u201c\u201d] => "
、|(?<=[\dA-H])[和与](?=[\dA-H]) => ,\040
(?<=[\dA-H])或(?=[\dA-H]) => \040or\040
± => \\pm\040
<= => \\le\040
>= => \\ge\040
^(\d+) ?\\times ?(\d+)$ => \1×\2
π => \\pi\040
∠ => \\angle\040
∞ => \\infty\040
^(?:\w ?)?(?:\\approx|≈|about|approximately|约) ?(?=\d) =>
(?<=\S) ?(?:\\approx|≈).*$ =>
^\+ ?(?=\\infty) =>
(?<=\d)(?<!/\d) ?(?:thousand|千(?![克米瓦]))(?![a-z]) => e3
(?<=\d)(?<!/\d) ?(?:million)\b => e6
(?<=\d)(?<!/\d) ?(?:billion)\b => e9
(?<=\d)(?<!/\d) ?万 => e4
(?<=\d)(?<!/\d) ?亿 => e8
^([-+]?\d+(?:\.\d+)?) ?(?:[x×*]|\\times|\\cdot) ?10(?:\^|\*\*)\{?(-?\d{1,3})\}?(?= |$) => \1e\2
\\varnothing => \\emptyset
(?<!\\)(?:√|sqrt) ?(?:\(([^()]*)\)|\{([^{}]*)\}|(\d+(?:\.\d+)?|\w)) => \\sqrt{\1\2\3}
(?<![\\a-z])pi(?![a-z]) => \\pi
(?<=\w)\*\*(?=\w) => ^
\^?\{? ?\\(?:circ|degree)(?:(?![a-z])) ?\}?|(?<=\d) ?(?:degrees?|度) => °
(?<!\d)°|°(?= ?[-+]) =>
° ?(?=[CF]\b) => \040
(?<=\d) ?percent => %
(?<=\d) ?sq(?:uare|\.)? ([a-z]+)\b => \040\1^2
(?<=\d) ?cu(?:bic|\.)? ([a-z]+)\b => \040\1^3
(?<=\d) ?([kcm]?)(?:ilo|enti|illi)?(m)et(?:er|re)s?\b => \040\1\2
(?<=\d) ?([kcm]?)(?:ilo|enti|illi)?(g)rams?\b => \040\1\2
(?<=\d) ?平方厘米 => \040cm^2
(?<=\d) ?厘米 => \040cm
(?<=\d) ?(?:hours?|hrs?)\b => \040h
(?<=\d) ?(min)utes?\b|(?<=\d) ?(s)ec(?:ond)?s?\b => \040\1\2
(?<=\d) ?(?:feet|foot)\b => \040ft
(?<=\d) ?(in)ch(?:es)?\b|(?<=\d) ?(mi)les?\b => \040\1\2
(?<=\d) ?yards?\b => \040yd
(?<=\d) ?(m?)(?:illi)?lit(?:er|re)s?\b => \040\1L
(?<=\d) ?(?:pounds?|lbs)\b => \040lb
(?i)(?<=\d) ?([ap])\.?m\b\.? => \040\1m
\b0(?=\d[:/]) =>
\^\{?(st|nd|rd|th)\b\}? => \1
\^(-\d+|\d{2,}) => ^{\1}
([_^])\{(\w)\} => \1\2
(?<![\d.])(\d+) (\d+)/(\d+)\b => \1\\frac{\2}{\3}
\\frac ?(\d) ?(\d) => \\frac{\1}{\2}
^(-?)\\frac\{(-?\d+)\}\{(\d+)\}(?![\w^!({\\]) => \1\2/\3
(?<![\d,.(\[{])([1-9]\d{,2})[, ](\d{3})(?:[, ](\d{3}))?(?:[, ](\d{3}))?(?![,\d)\]}]) => \1\2\3\4
^(.*?)\\pm ?(.*)$ => {\1+\2, \1-\2}
(?i)^(?:.*[.,;!?] )?(?:(?!\b(?:not|never|cannot|wrong|incorrect)\b|n't)[^.,;!?])*\banswer(?: is:?|\** ?:)\** =>
(?i)^the (?:correct |right )?(?:option|choice) is:? =>
(?i)^the (?:(?!\b(?:not|never|wrong|incorrect)\b|n't)[^.,;=\d])* is (?=[-\\\d]) =>
^((?:.* )?\(?[A-H]\)?) is (?:the )?(?:correct|right)(?: answer| option| choice)?$ => \1
(?: |\\\\)+$ =>
^(?:[Tt]he|[Aa]n?) (?=\w{2})(?!and\b|or\b) =>
(?:(?<=[A-Z])|(?<=[A-Z][a-z])|(?<=\)))_\{?(\d+)\}?(?=[A-Z(]|$) => \1
^\(?([A-H])\)? ?[&+] ?\(?([A-H])\)?$ => \1, \2
(?<![\\A-Za-z])(sin|cos|tan|log|ln)(?![A-Za-z]) => \\\1\040
 ?([=<>]) ? => \1
^\\(?:overline|triangle|angle) ?\{?([A-Z]+)\}?$ => \1
 ?: ?(?=\d) => :
^(?:.*(?:答案|故)(?:是|为)?:?|答:)(?=.) =>
^(?:故?选项?):?(?=[A-H]+$) =>
"""
AROUND = ' *"`'  # what may stand around an answer


def plain(text):
    r"""An answer in the usual spelling, without what stands around it: "$\text{Yes}$." -> "Yes"; "1{,}0" -> "1,0"."""
    # before the characters lose their place: x² is not x2, and 1½ not 11/2
    text = re.sub("[⁰¹²³⁴-⁻]+", r"^{\g<0>}", text)
    text = re.sub("(?<=[0-9])(?=[¼-¾⅐-⅞])", " ", text)
    text = unicodedata.normalize("NFKC", text).strip(AROUND)
    for line in SPELLINGS.strip().split("\n"):
        pattern, _, usual = line.partition(" =>")
        text = re.sub(pattern, usual.strip(), text)
    return text.strip(AROUND).rstrip(".。;" + AROUND)


# A letter, or yes or no, and what stands behind it, without another option: "A) or B)" is none.
OPTION = r"""(?x:
    (?i:(?:option|choice|answer|figure|image|graph|diagram|picture)[ ])? [(\[{]?
    ((?i:(?!yes.*\bno\b|no.*\byes\b)(?:yes|no)(?=[.,;:][ ][a-z]|[ ][-(]|$)) | [A-Za-z](?!,))
    (?: [)\]}:]+ | [.,](?=[ ]|$) | (?<=[A-H])[ ]-(?=[ ]) | [ ](?=\() | $)
    # another option
    (?!.*(?:\b[A-J][).:](?![A-Z]) | [ ][a-h][).][ ] | \([a-h]\) | (?:\bor|/)[ ]?\(?[A-Ja-h]\b))
    (?![ ]?[A-H]$ | .*\bmaybe[ ][A-H]$)
    (.*)
)"""


def as_option(text):
    """ "(B)", "b.", "Option B" or "B - blue" -> "B" and the text behind it; "Yes, it is" -> "YES", ...; else "", ""."""
    match = re.fullmatch(OPTION, text, re.S)
    return (match[1].upper(), match[2].strip()) if match else ("", "")


def as_list(text):
    r"""Brackets and parts: "(1, 2)" -> "()", ["1", "2"]; "1 and 2" or "{1, 2}" -> "", ...; "B, A" -> "", ["A", "B"]."""
    if re.fullmatch("[A-H]{2,}", text):  # options
        return "", list(text)
    match = re.fullmatch(r"([(\[{])((?!.*[)\]].*[(\[]).*)([)\]}])", text)
    brackets, inside = (match[1] + match[3], match[2]) if match else ("", text)
    parts = re.split(r" ?(?:, ?(?:and|or)\b|[,;]|\b(?:and|or)\b) ?(?![^(\[{]*[)\]}])", inside)
    if re.fullmatch("(?!(?=.*A)(?=.*B).*C)(?:[A-H]|[,; ]|and|or)*", inside):  # no order of A, B, C
        parts.sort()
    return brackets.replace("{}", ""), parts


NUMBER = r"[-+]?(?:\d+/0*[1-9]\d*|\d*\.?\d+(?:[eE][-+]?\d{1,3})?)"
UNIT = r"""(?x:
    # no word that changes the number
    (?!.*(?<![^\W\d_])(?:or|and|to|more|less|is|not|but|plus|minus|at|negative|maybe|perhaps|wrong|incorrect|below|above
        |through|till|until|versus|point|squared|cubed|factorial|dozen|hundred|thousand|thirds?|hal(?:f|ves)|quarters?
        |fourths?|fifths?|tenths?|hundredths?|thousandths?|[ap]m|BCE?|trillion|crore|lakh
        |January|February|March|April|May|June|July|August|September|October|November|December)(?![^\W\d_]))
    (?!.*[α-λν-ω以多折成百千负]|.*分之|(?<=\d{3}0)s$)
    # no variable, and at a number no product of them
    (?!.*(?<![^\W\d_°])(?:[a-fijkn-rt-zBDEGIMO-SUX-Z]|(?<![ ])[AFHNT])(?![^\W\d_]))
    (?!(?<=\d)(?!(?:[kcmdnμ]?[mglLsVWNJ]|[kMG]?(?:Hz|Pa|W|Wh|J|B|eV)|mA|mol|min|hrs?|sec|ft|in
        |yd|mi|lbs?|oz|st|nd|rd|th|rad|atm|mph|px|kmh|bits?|pts?|yrs?)(?![A-Za-z]))[A-Za-z]{2,4}(?![A-Za-z]))
    (?:[^\W\d_]|[ °%/.·])* (?:(?<=[a-z])\^-?\d)?
)"""


def as_quantity(text):
    """Value and unit: "0.50 cm" -> 1/2, "cm"; "2 apples" -> 2, "apple"; what has no unit -> itself and ""."""
    match = re.fullmatch(rf"(.*?(?:[\d}}]|\\pi)) ?({UNIT})", text)
    value, unit = match.groups() if match else (text, "")
    if re.fullmatch(NUMBER, value):
        value = Fraction(value)
    return value, unit.removesuffix("s") or unit


# there is a digit, an operator or a command
MATHEMATICS = r"[\d\\=+*/^<>-]"
# and nothing of these
TEXT = r"""(?x:
    (?<![^\W\d_])(?![abcxyz]{2}(?![^\W\d_]))[^\W\d_]{2}  # a word
    | [^\W\d_]\.?\d | \d_ | '  # a code, a number in another base, a prime
    | \d([-/.])\d+\1\d | :\d | !.*!  # a date, a time or a ratio, two factorials, which take too long
    | (?<![_^\d])\d+[ ]\d | \b[A-Z][->][A-Z]\b  # two numbers, an order
    | (?m:^[\d.]+[ ]?[-x×*][ ]?[\d.]+$)  # a range, a size
    # one equation, which is more than a name and its value
    | \A(?=[^=]*=[^=]*\Z)(?:.*\n)?(?![ ]*\{?[A-Za-z]?\}?(?:_\w+)?(?:\([^()\n]*\))?=)[^=\n]*(?<!_\{\w)=
    | (?m:^[ ]*[\d.][\d. +*/-]*[<>=][\d. +*/<>=-]+$)  # a statement of numbers: all true ones would be equal
    | \^[^+*/ \n-]*\^[^+*/ \n-]*\^  # a tower of powers, which takes too long
)"""

# "AB = " or "Area = " before the value of one side, where the other has no name
NAMED = r"(?m:^(?:m? ?\\angle ?\w+|[A-Z]{2,}|[A-Za-z ]{4,})=)(?=[^=]*\Z)"


def is_mathematics(text):
    """Whether to parse a text."""
    names = re.sub(rf"{NAMED}|\\(?:begin|end|mathbb) ?\{{\w+\}}|\\[A-Za-z]+", "  ", text)
    return bool(re.search(MATHEMATICS, text)) and not re.search(TEXT, names)


# =============================================================================================== runs
SAMPLER_GAP = 0.1  # mean difference of log-probs, in nats, that rounding does not explain


class Run:
    """One run: its models, its loop and its folder (args.json, metrics.jsonl, samples.jsonl, checkpoints/, final/).

        run = Run("vgs", args)                            # goes on where the folder holds a run of the same settings
        run.load(processor, teacher)                      # student, teacher, head, engine, vocab
        for step in run.steps(train, held_out, context):  # 1, 2, ...; evaluates, logs and saves in between
            rows = run.draw()                             # this rank's part of the next batch
            run.log(run.update(micros, ...))              # several values of a key are averaged

    step, total: number of this step, and of all. own: numbers that a method carries from step to step.
    """

    # whether steps are taken, and whether a signal has asked this rank to stop
    stepping = stopping = False

    def __init__(self, method, args):
        start_ranks(args)
        ranks = world_size()
        if args.prompts % (ranks * args.updates) or ranks % args.replicas:
            raise UserError(
                f"--prompts {args.prompts} has to be a multiple of ranks x updates, {ranks} x {args.updates}, and the "
                f"ranks one of --replicas, {args.replicas}"
            )
        name = (
            args.output
            or f"runs/{method}-{args.preset}-{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(3).hex()}"
        )
        self.args = args
        self.path = Path(all_gather_object(name)[0])
        self.settings = {"file": f"{method}.py", **vars(args)}
        self.step = self.drawn = 0
        self.own = {}
        self.values = {}
        self.noted = set()
        self.claim_folder()

    def load(self, processor, teacher, student=Model):
        """Student, rollout engine and (None: no) frozen teacher. student: Model, or what a method makes of it."""
        self.processor = processor
        self.student = load_model(self.args.student, self.args, trained=True, kind=student)
        # columns that all heads have
        self.vocab = min(processor.vocab, self.student.lm.lm_head.weight.shape[0])
        self.teacher = self.head = None
        if teacher is not None:
            self.teacher = load_model(teacher, self.args, trained=False)
            # [V, H], whole on every rank
            self.head = self.teacher.head()
            self.vocab = min(self.vocab, len(self.head))
            self.settings["teacher's weights"] = bits_of(self.teacher)
        self.settings["student's weights"] = bits_of(self.student)
        self.engine = ENGINES[self.args.engine](self.args.student, processor, self.args)

    def steps(self, train, held_out, context):
        """Yields 1, 2, ...; then the sampler takes over the weights, and what is due is evaluated and saved.

        held_out: name of the accuracy -> rows, and context: fn(row) -> Context of these.
        """
        from tqdm import tqdm

        args = self.args
        self.total = args.max_steps or int(args.epochs * len(train)) // args.prompts
        if self.total == 0:
            raise UserError(
                f"--epochs {args.epochs} of {len(train)} rows do not fill one batch of --prompts {args.prompts}"
            )
        self.train = train
        self.order = data_order(len(train), args.prompts, args.seed)
        self.settings["rows"] = seed_of(texts_of(train))
        self.optimizer, self.schedule = make_optimizer(
            self.student, args, self.total * args.updates
        )
        say(
            f"{self.settings['file']}, preset {args.preset}: {self.total} steps of {args.prompts} questions x "
            f"{args.group} responses in {args.updates} updates; engine {args.engine}, {world_size()} ranks; rows "
            f"of {args.data!r}, held out {args.eval_data!r}; in {self.path}"
        )
        self.begin()
        if self.step == 0:
            self.evaluate(held_out, context)
        Run.stepping = True  # from here on a signal waits for the step's end
        bar = tqdm(range(self.step + 1, self.total + 1), args.preset, disable=rank() > 0)
        for self.step in bar:
            self.mark = time.perf_counter()
            yield self.step
            self.phase("update")
            self.engine.sync(self.student.weights())
            self.phase("sync")
            if self.step == self.total or args.eval_every and self.step % args.eval_every == 0:
                self.evaluate(held_out, context)
            self.last = self.write_metrics()
            bar.set_postfix_str(
                f"loss {self.last['loss']}, acc@1 {self.last.get('acc@1', '-')}", refresh=False
            )
            if self.step == self.total:
                continue
            due = args.save_every and self.step % args.save_every == 0
            if due:
                self.save(f"checkpoints/step-{self.step:06}")
            if any(all_gather_object(Run.stopping)):
                if not due:
                    self.save(f"checkpoints/step-{self.step:06}")
                say(
                    f"stopped by a signal, all of step {self.step} saved: --output {self.path} goes on"
                )
                raise SystemExit(1)
        self.save("final")
        Run.stepping = False
        self.finish()

    def draw(self):
        """This rank's part of the next batch, update by update; row["draw"] is its number among all that are drawn."""
        numbered = list(enumerate(next(self.order), self.drawn * self.args.prompts))
        self.drawn += 1
        mine = [split(part, world_size())[rank()] for part in split(numbered, self.args.updates)]
        return [self.train[i] | {"draw": n} for part in mine for n, i in part]

    def update(self, micros, names, terms, extras):
        """One optimizer step on the sum over micro-batches, terms and tokens of weight * term; what to log of it.

        See backward; two of the names are log_p, of the tokens, and entropy. Where the loss or the gradient is not
        finite, every rank stops before a weight moves.
        """
        loss = all_sum(self.backward(micros, names, terms, extras))
        norm = grad_norm(self.student)
        lr = self.schedule.get_last_lr()[0]
        # waits for the device, once an update and after its last backward pass
        if not (loss + norm).isfinite():
            self.stop_not_finite(micros)
        # those without a gradient are passed over
        nn.utils.clip_grads_with_norm_(self.student.parameters(), self.args.grad_clip, norm)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        found = all_terms(micros)
        before = found["log_p"] if micros[0].old is None else torch.cat([m.old for m in micros])
        gap = (before - torch.cat([m.sampled for m in micros])).abs()
        log = token_means({"entropy": found["entropy"], "sampler_gap": gap})
        return log | {"loss": loss.item(), "grad_norm": norm.item(), "lr": lr}

    def backward(self, micros, names, terms, extras):
        """student.grad += the gradient of the sum over micro-batches of weight * term, which is returned.

        terms: fn(*student's logits, *teachers' logits, *extras) -> one [n] for each of `names`.
        extras: fn(m, hidden, head) -> what else it needs, [n] each, or None.
        """
        total = torch.zeros((), device=device())
        for m in micros:
            zero = torch.zeros_like(m.length)
            weights = torch.stack([m.weights.get(name, zero) for name in names])

            def loss_fn(hidden, head, m=m, weights=weights):
                teachers = [(h, self.head) for h in m.teacher]
                views = hidden.chunk(m.contexts)  # [n, H] each
                more = extras(m, hidden, head)
                return vocab_loss(
                    terms, weights, views, head, teachers, more, self.vocab, self.args.loss_chunk
                )

            loss, found = self.student(m.batch, loss_fn)
            m.terms = dict(zip(names, found))
            total = total + loss.detach()
            # FSDP2 averages over ranks; the weights already hold the divisor
            (loss * world_size()).backward()
        return total

    def log_probs(self, m, hidden, head):
        """Log-probs [n] of the tokens of m, by the hidden states of its first context, without gradient."""

        def chosen(z, ids):
            return (gather(log_softmax(z), ids),)

        pair = (hidden.chunk(m.contexts)[0], head)
        return vocab_terms(chosen, [pair], [m.ids], self.vocab, self.args.loss_chunk)[0]

    def stop_not_finite(self, micros):
        """Name the rank, the quantity and the row, and stop. Every rank calls it."""
        found = all_gather_object(bad_value(micros))
        named = "; ".join(f"rank {r}: {what}" for r, what in enumerate(found) if what)
        raise UserError(
            f"step {self.step}: not finite: {named or 'the gradient, of finite terms'}. No weight was moved by this "
            "update. Look at the row; or begin from a checkpoint with --student, another --output and a lower --lr"
        )

    def log(self, values):
        for key, value in values.items():
            # after a step's first update the trainer has moved on
            if key != "sampler_gap" or key not in self.values:
                self.values.setdefault(key, []).append(value)

    def note(self, text):
        """A line above the bar, once a run, for what the user should know."""
        from tqdm import tqdm

        if rank() == 0 and text not in self.noted:
            tqdm.write(f"step {self.step}: {text}")
            self.noted.add(text)

    def phase(self, name):
        """Log the seconds since the last phase ended."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.log({f"seconds/{name}": now - self.mark})
        self.mark = now

    def evaluate(self, held_out, context):
        """Greedy accuracy (Acc@1) on each set of held-out rows, shared out over the ranks, and the mean of several."""
        self.mark = time.perf_counter()
        found = {}
        for name, rows in held_out.items():
            mine = [rows[i] for i in range(rank(), len(rows), world_size())]
            samples = sample_responses(self.engine, mine, {"": context}, self.args, greedy=True)
            found |= mean_over_ranks({name: [is_right(s.response, s.row) for s in samples]})
        if not found:
            return
        several = [x for name, x in found.items() if "acc@1" in name]
        if several:
            found["acc@1"] = sum(several) / len(several)
            self.own.setdefault("acc@1 at first", found["acc@1"])
        self.log(found)
        self.phase("evaluate")
        if self.step == 0:
            self.write_metrics()

    def log_samples(self, samples):
        """The rollout is done: log its finished responses and rewards, and write some of it to samples.jsonl."""
        self.engine.sleep()
        values = {
            "finished": [s.response.finished for s in samples],
            "response_length": [sum(s.response.mask) for s in samples],
            "reward": [s.reward for s in samples],
        }
        self.log(mean_over_ranks(values))
        for s in samples[:8]:
            record = {
                "row": s.row["index"],
                "problem": s.row["problem"],
                "answer": s.row.get("answer"),
                "response": s.response.text,
                "reward": s.reward,
                "ids": s.response.ids,
            }
            self.write("samples.jsonl", record)
        if self.values["finished"][-1] == 0:
            self.note(
                f"no response ended by itself within --max-response {self.args.max_response} (see samples.jsonl)"
            )
        self.phase("rollout")

    def write_metrics(self):
        """A line of metrics.jsonl: the mean of each key; of lists (one value a bin) place by place."""
        import numpy as np

        means = {
            key: np.round(np.mean(values, axis=0), 6).tolist()
            for key, values in self.values.items()
        }
        self.values = {}
        self.write("metrics.jsonl", means)
        if means.get("sampler_gap", 0) > SAMPLER_GAP:
            self.note(
                "the sampler's log-probs differ from the trainer's (sampler_gap), which should be the same model's"
            )
        return means

    def write(self, file, record):
        """Append one JSON line, at once on disk: a run that is killed leaves whole lines."""
        line = json.dumps({"step": self.step} | record, ensure_ascii=False, default=str)
        if rank() == 0:
            self.need_room()
            with open(self.path / file, "ab") as f:
                f.write(f"{line}\n".encode(errors="replace"))

    def need_room(self):
        """Stop where the disk has none for a checkpoint: float32 weights, and AdamW's two moments of them."""
        need = 16 * sum(p.numel() for p in self.student.parameters())
        free = shutil.disk_usage(self.path).free
        if free < need:
            raise UserError(
                f"{self.path} has {free / 1e9:.3f} GB left, and a checkpoint needs {need / 1e9:.3f} GB. Make room: the "
                "same command goes on from the last one"
            )

    # ------------------------------------------------------------------------------------------- folder
    def claim_folder(self):
        """Take the folder to the end of this process, before anything is loaded; stop if it holds another run."""
        if rank() == 0:
            self.lock = claim(self.path)
            self.check_same()
        # the others wait here for the first
        if all_gather_object((self.path / "final").exists())[0]:
            say(
                f"{self.path}/final is there: this run is finished. Another --output begins another"
            )
            raise SystemExit(0)

    def check_same(self):
        """Stop where the folder holds a run of other settings, or what is no run's."""
        file = self.path / "args.json"
        known = self.settings
        there = [name for name in OURS if (self.path / name).exists()]
        try:
            if there:
                known = dict(json.loads(file.read_text()))
        except (OSError, TypeError, ValueError) as e:
            raise UserError(
                f"{self.path} holds {there}, and no args.json that can be read ({e}): choose another --output"
            )
        changed = [
            f"{name} {known.get(name)} -> {value}"
            for name, value in self.settings.items()
            if known.get(name) != value and name not in HARMLESS
        ]
        if changed:
            raise UserError(
                f"{self.path} holds a run with other settings ({', '.join(changed)}; rows and weights are told by what "
                "is in them). Give the same to go on, or choose another --output; --student begins with its weights"
            )

    def begin(self):
        """Go on from the newest whole checkpoint; what a run that was killed left behind it goes."""
        for state in reversed(self.states()):
            if self.restore(state):
                say(f"going on after step {self.step}")
                break
        else:
            if self.states():
                raise UserError(
                    f"no state in {self.path} is whole. Begin another --output; --student with one of its checkpoints "
                    "begins with its weights"
                )
        for _ in range(self.drawn):  # the batches of the steps that are done
            next(self.order)
        if rank() > 0:
            return
        self.check_same()  # by now rows and weights are known
        replace_text(self.path / "args.json", json.dumps(self.settings, indent=2))
        for file in (self.path / "metrics.jsonl", self.path / "samples.jsonl"):
            lines = [x for x in whole_lines(file) if 0 < self.step >= json.loads(x)["step"]]
            replace_text(file, "".join(f"{line}\n" for line in lines))

    def finish(self):
        """Say what was learned, and where to look."""
        self.engine.close()
        before = self.own.get("acc@1 at first")
        after = self.last.get("acc@1")
        learned = f"held-out accuracy {before:.1%} -> {after:.1%}. " if before is not None else ""
        say(
            f"{self.total} steps done. {learned}{self.path}/samples.jsonl holds answers, metrics.jsonl the curves, "
            "and final/ a checkpoint for from_pretrained and vLLM"
        )

    def states(self):
        """What can be gone on from, oldest first: states of the checkpoints, which are renamed when they are whole."""
        return sorted(self.path.glob("checkpoints/step-??????/state.pt"))

    def save(self, folder):
        """The model as an ordinary checkpoint, in the precision it came with; what the run goes on with, in state.pt.

        Aside first and then in place: what has a checkpoint's name is whole. final/ has no state.
        """
        aside = self.path / f"{folder}.partial"
        config = self.processor.config
        # Qwen3-VL's says it of the language model alone
        dtype = config.dtype or config.get_text_config().dtype or torch.float32
        weights = {}
        for name, value in self.student.weights():
            if rank() == 0:
                weights[name] = value.to(dtype).cpu().contiguous()
        state = None if folder == "final" else self.training_state()

        if rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed
            save_checkpoint(self.student.lm, self.processor, aside, weights)
            if state:
                torch.save(state, aside / "state.pt")
            shutil.rmtree(self.path / folder, ignore_errors=True)
            aside.rename(self.path / folder)
            for old in self.states()[:-2]:
                old.unlink()
        dist.barrier()

    def training_state(self):
        """What a run goes on with, whole on the first rank; any number of ranks can read it."""
        options = StateDictOptions(
            full_state_dict=True, cpu_offload=True, ignore_frozen_params=True
        )
        model, optimizer = get_state_dict(self.student, self.optimizer, options=options)
        return {
            "tensors": {"model_state_dict": model, "optim_state_dict": optimizer},
            "schedule": self.schedule.state_dict(),
            "numbers": [self.step, self.drawn, self.own],
        }

    def restore(self, file):
        """Weights, optimizer, schedule and numbers of a state; False where it is not whole. Nothing in it is run."""
        try:
            if zipfile.ZipFile(file).testzip():  # which torch.load leaves out
                raise ValueError("its checksums differ")
            state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        except Exception as e:  # of zip, of pickle, of the disk
            say(f"{file} is not whole and passed over ({e!r:.200})")
            return False
        # frozen weights are those of --student
        options = StateDictOptions(full_state_dict=True, strict=False)
        set_state_dict(self.student, self.optimizer, **state["tensors"], options=options)
        self.schedule.load_state_dict(state["schedule"])
        self.step, self.drawn, self.own = state["numbers"]
        self.engine.sync(self.student.weights())
        return True


# What a run leaves. Where one of them is somebody else's, nothing is touched. An evaluation's sets/ is there before.
OURS = """args.json metrics.jsonl samples.jsonl checkpoints final final.partial
answers answers.jsonl results.json""".split()


def claim(folder):
    """Make a folder and hold it, as long as what is returned lives; stop where another process does."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "a")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        raise UserError(
            f"{folder} cannot be used: another run does, or it cannot be written to ({e}). Choose another --output"
        )
    return lock


def texts_of(rows):
    """All of the rows but their images' bytes."""
    if isinstance(rows, list):
        return rows
    kept = [name for name, kind in rows.features.items() if "Image" not in str(kind)]
    return rows.with_format(None).select_columns(kept)[:]


def bits_of(model):
    """Tells one checkpoint from another, on any number of ranks, by the sum of each weight's bits."""
    sums = [p.to_local().flatten().view(torch.int16).sum() for p in model.parameters()]
    return seed_of(*all_sum(torch.stack(sums)).tolist())


def data_order(rows, prompts, seed):
    """Endless batches of `prompts` row numbers, the same on every rank: every epoch a fresh shuffle."""
    generator = torch.Generator().manual_seed(seed)
    queue = []
    while True:
        while len(queue) < prompts:
            queue += torch.randperm(rows, generator=generator).tolist()
        yield queue[:prompts]
        queue = queue[prompts:]


def make_optimizer(model, args, updates):
    """AdamW (decay on matrices only), and a schedule over `updates`: warm-up, then constant, linear or cosine to 0."""
    from transformers import get_scheduler

    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise UserError(
            "no weight of the student would be trained: all are frozen (--freeze-vision, --lora)"
        )
    groups = [
        {"params": [p for p in trained if p.ndim > 1]},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, weight_decay=args.weight_decay)
    schedule = args.schedule.replace("constant", "constant_with_warmup")
    return optimizer, get_scheduler(schedule, optimizer, args.warmup, updates)


def grad_norm(model):
    """L2 norm of the whole gradient over all ranks."""
    return full_tensor(
        torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    )


def all_terms(micros):
    """Each term over the tokens of all micro-batches, [N]."""
    return {name: torch.cat([m.terms[name] for m in micros]) for name in micros[0].terms}


def bad_value(micros):
    """The first term or weight of this rank that is not finite, and the row that its response answers; or nothing."""
    for m in micros:
        weights = {f"weight of {name}": x for name, x in m.weights.items()}
        for name, x in (weights | m.terms).items():
            bad = m.response[~x.isfinite()]
            if len(bad):
                return f"{name} of row {m.samples[bad[0]].row['index']}"
    return ""


def save_checkpoint(lm, processor, folder, weights=None):
    """What from_pretrained and vLLM load: the weights, and all else (config, tokenizer, images) as it came."""
    from transformers.utils import cached_file

    # Model.weights has its experts as they are saved; transformers would turn them back
    turned = lm.config.model_type == "qwen3_vl_moe"
    lm.save_pretrained(folder, state_dict=weights, save_original_format=not turned)
    source = Path(cached_file(locate(processor.name), "config.json")).parent
    for file in source.iterdir():
        if file.suffix in (".json", ".jinja", ".txt", ".model") and ".index." not in file.name:
            shutil.copyfile(file, folder / file.name)
    for file in folder.glob("*.safetensors"):  # made for their owner alone, whatever the umask says
        shutil.copymode(folder / "config.json", file)


def replace_text(file, text):
    """Write a file so that it is the old one or the new one, whenever the process is killed."""
    aside = file.with_name(f"{file.name}.partial")
    aside.write_text(text, "utf-8")
    aside.replace(file)


def whole_lines(file):
    """The lines of a file that are JSON. What is none was being written when a process or a machine was stopped."""
    lines = []
    for line in file.read_bytes().split(b"\n") if file.exists() else ():
        with contextlib.suppress(ValueError, RecursionError):
            json.loads(line)
            lines.append(line.decode())
    return lines
