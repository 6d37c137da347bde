"""What the five methods share: settings, data, contexts, rollouts, the chunked vocabulary loss, GRPO, answers, FSDP2, logs.

Read it next to a method file. Its order is that of a run:

    settings, distributed, data, contexts and encoding, models, memory, rollouts, image tools, samples and
    micro-batches, the vocabulary in chunks, GRPO, answers, evaluation, optimizer, run folder

Three conventions hold everywhere:
  * Response tokens are flat. Every per-token quantity is a vector [N] with one entry per response token, and every model's
    view of them is one row per token, [N, H]. There is no padding in any loss.
  * Normalisers are weights. A method divides over the whole optimizer step and all ranks before any update, so that each
    micro-batch only adds (weight * term).sum(). Gradients then do not depend on world size, micro-batch or chunk size.
  * Importing this file needs torch and nothing else; transformers, datasets, numpy and tyro are imported where they are used.
"""

import base64
import contextlib
import dataclasses
import datetime
import functools
import hashlib
import http.client
import importlib.util
import io
import json
import math
import os
import re
import secrets
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn


class UserError(SystemExit):
    """A mistake in the settings or the data: printed as one message that names the thing and the remedy, without a traceback."""

    def __init__(self, message: str):
        super().__init__(f"\nerror: {message}")
        self.message = message


# ====================================================================================================== settings
@dataclass
class Args:
    """Settings of every method. A method file extends it; a preset gives the values; flags override the preset."""

    preset: str = ""  # a row of PRESETS in the method file; default: toy without a CUDA device, else the paper's first setting
    student: str = ""  # checkpoint that is trained: a folder, a hub name, or toy/student
    teacher: str = ""  # frozen checkpoint that marks every token
    data: str = ""  # training rows: .parquet/.json/.jsonl/.csv, a folder, a hub name, or toy/train
    data_split: str = "train"  # which split of data, where it has several
    eval_data: str = ""  # held-out rows with answers; empty: no evaluation
    eval_split: str = "test"  # which split of eval_data, where it has several
    column_problem: str = "problem"  # name of the column with the question
    column_images: str = "images"  # name of the column with the image, or the list of images
    column_answer: str = "answer"  # name of the column with the checkable answer
    skip_bad_rows: bool = False  # leave out rows that fail the checks (they are counted), instead of stopping

    engine: Literal["auto", "hf", "vllm"] = "auto"  # who generates: hf = transformers on a copy of the student; auto = vllm where it and a GPU are there
    tensor_parallel: int = 1  # ranks that share one vLLM engine, for a student that does not fit beside its training on one
    vllm_memory: float = 0.4  # share of a GPU's memory that vLLM may hold, weights included
    prompts: int = 64  # questions a rollout batch, over all ranks
    group: int = 1  # responses a question (G)
    updates: int = 1  # optimizer updates a rollout batch; more than one makes the later ones slightly off-policy
    rollout_batch: int = 64  # responses a rank generates at once
    temperature: float = 1.0  # sampling temperature of the rollouts
    top_p: float = 1.0  # nucleus sampling; 1 = off
    top_k: int = 0  # sample among the k likeliest tokens; 0 = off
    max_prompt: int = 1024  # longest allowed prompt in tokens, image tokens included
    max_response: int = 64  # tokens a response may have; longer ones are cut off and kept

    epochs: float = 1.0  # passes over the data
    max_steps: int = 0  # stop after so many rollout batches; 0 = as many as the epochs need
    lr: float = 1e-6  # AdamW learning rate
    weight_decay: float = 0.01  # AdamW weight decay on matrices (not on norms and biases)
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # learning rate after the warm-up
    warmup: int = 0  # updates with a linearly rising learning rate
    grad_clip: float = 1.0  # largest norm of the gradient
    micro_tokens: int = 8192  # tokens, padding and all contexts included, that a rank puts through the student at once; a longer sequence goes by itself
    loss_chunk: int = 256  # response tokens whose logits exist at the same time
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the forward and backward passes; the trained weights are float32
    freeze_vision: bool = False  # keep the vision tower as it is
    lora: int = 0  # rank of LoRA adapters, whose scale is 2 and which alone are trained; 0 = all weights are
    lora_targets: str = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"  # linear layers that get an adapter, by the end of their name
    timeout: float = 30.0  # minutes that ranks wait for each other before the run stops; longer than the longest rollout of one of them
    replicas: int = 1  # copies of the sharded models, as one a machine: sharded within a copy, gradients averaged over all; 1 = sharded over all ranks
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, about a third more time

    eval_every: int = 50  # rollout batches between evaluations; 0 = only at the start and the end
    eval_rows: int = 300  # held-out questions an evaluation asks, a fixed random choice; 0 = all of them
    eval_samples: int = 0  # k of Acc@k, pass@k and maj@k at temperature 1, at every evaluation; 0 = greedy Acc@1 only
    save_every: int = 0  # steps between checkpoints: the weights, and what --resume needs; 0 = only final/
    keep: int = 2  # newest checkpoints that keep what --resume needs; older ones keep their weights alone
    resume: str = ""  # go on from the newest checkpoint of this run folder; auto = of --output, or begin there if it has none
    resume_anyway: bool = False  # resume even though settings differ from those of the run so far
    log_samples: int = 8  # responses of the first rank that a step writes to samples.jsonl
    output: str = ""  # run folder; default: runs/<file>-<preset>-<time>
    plan: int = 0  # print what the run needs on each of so many GPUs, from the configs alone, and stop
    card: float = 80.0  # GiB of memory of a GPU, for --plan
    tracker: Literal["none", "tensorboard", "wandb"] = "none"  # where metrics go besides metrics.jsonl
    seed: int = 0  # order of the data and sampling


CLIPS = dict.fromkeys(("clip_low", "clip_high"), "with --updates 1 the policy is the one that sampled, and no ratio is clipped")
TRAINING = ("data", "data_split", "max_steps", "epochs", "lora", "lora_targets", "lr", "schedule", "warmup", "weight_decay", "grad_clip", "prompts",
            "updates", "eval_every", "eval_samples", "save_every", "keep", "resume", "resume_anyway", "log_samples", "tracker")  # what a run that does not train ignores
HARMLESS = ("output", "plan", "card", "resume", "resume_anyway", "tracker", "log_samples", "save_every", "keep", "eval_data", "eval_split", "eval_every", "eval_rows", "eval_samples",
            "rollout_batch", "tensor_parallel", "vllm_memory", "timeout", "replicas", "micro_tokens", "loss_chunk", "gradient_checkpointing")  # what a resumed run may change: it learns the same


def parse_args(cls, presets: dict[str, dict], argv: list[str] | None = None):
    """Command line -> settings: the dataclass's defaults, then the preset, then the flags.

    Returns (args, given): `given` is the set of field names that were on the command line, for `refuse_ignored`.
    """
    import tyro

    argv = sys.argv[1:] if argv is None else argv
    given = {re.sub(r"^no-", "", a[2:].split("=")[0].replace("_", "-")).replace("-", "_") for a in argv if a.startswith("--")}
    names = [a.split("=", 1)[1] if "=" in a else b for a, b in zip(argv, argv[1:] + [""]) if a.split("=")[0] == "--preset"]
    preset = names[-1] if names else ("toy" if not torch.cuda.is_available() else next(p for p in presets if not p.startswith("toy")))
    if preset not in presets:
        raise UserError(f"there is no preset {preset!r}; choose one of: {', '.join(presets)}")
    default = cls(**presets[preset] | {"preset": preset})
    args = tyro.cli(cls, args=argv, default=default, description=f"Settings shown are those of the preset {preset!r}.")
    for name in ("prompts", "group", "updates", "rollout_batch", "max_prompt", "max_response", "micro_tokens", "loss_chunk", "tensor_parallel", "replicas", "keep"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
    for name, value in vars(args).items():
        if value != value:
            raise UserError(f"--{name.replace('_', '-')} is no number")
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed is {args.seed}; it must lie in [0, 2^32)")
    for name in ("top_k", "max_steps", "warmup", "lora", "eval_every", "eval_rows", "eval_samples", "save_every", "log_samples", "plan"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must not be negative")
    for name, low, high in (("temperature", 1e-6, 100), ("top_p", 1e-6, 1), ("lr", 0, 10), ("weight_decay", 0, 10), ("grad_clip", 1e-12, math.inf),
                            ("vllm_memory", 0.01, 1), ("timeout", 0.01, 1e6), ("card", 0.01, 1e6), ("epochs", 1e-9, 1e9)):
        if not low <= getattr(args, name) <= high:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must lie in [{low}, {high}]")
    args.engine = choose_engine(args.engine, args.plan)
    if args.engine == "vllm" and args.temperature > 2:
        raise UserError(f"--temperature is {args.temperature}; vLLM samples at 2 at most")
    if args.prompts % args.updates:
        raise UserError(f"--prompts {args.prompts} cannot be dealt out to --updates {args.updates}: choose a divisor")
    return args, given


def choose_engine(engine: str, plan: int = 0) -> str:
    """auto -> vllm where it and a CUDA device are there (a plan is for where they are), else hf. Stops if vllm is asked for and not installed."""
    if plan and not dist.is_initialized():
        return "vllm" if engine == "auto" else engine
    installed = importlib.util.find_spec("vllm") is not None
    if engine == "vllm" and not installed:
        raise UserError("--engine vllm needs vLLM: pip install -r requirements-vllm.txt, or use --engine hf")
    return ("vllm" if installed and torch.cuda.is_available() else "hf") if engine == "auto" else engine


def refuse_ignored(args: Args, given: set[str], ignored: dict[str, str]) -> None:
    """Stop if a flag was given that this run would ignore. `ignored`: field name -> why this method ignores it."""
    if not args.lora:
        ignored = ignored | {"lora_targets": "--lora is 0"}
    if args.engine != "vllm":
        ignored = ignored | dict.fromkeys(("tensor_parallel", "vllm_memory"), f"the engine is {args.engine}")
    if not args.plan:
        ignored = ignored | {"card": "there is no --plan"}
    if not args.save_every:
        ignored = ignored | {"keep": "--save-every is 0"}
    if not args.resume:
        ignored = ignored | {"resume_anyway": "there is no --resume"}
    if args.max_steps:
        ignored = ignored | {"epochs": "--max-steps decides"}
    if not args.eval_data:
        ignored = ignored | dict.fromkeys(("eval_every", "eval_rows", "eval_samples", "eval_split"), "there is no --eval-data")
    for name in sorted(given & set(ignored)):
        raise UserError(f"--{name.replace('_', '-')} would have no effect: {ignored[name]}. Leave it out, or change the setting it needs")


# ====================================================================================================== distributed
def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def start_distributed(args: Args) -> None:
    """Join torchrun's process group, or make a group of one, so that a laptop and a node run the same FSDP2 code."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=datetime.timedelta(minutes=args.timeout))
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    torch.manual_seed(args.seed + rank())


def launch(main) -> None:
    """Run a method's main(); the ranks part only when all have finished.

    What ends it for reasons outside of it is said without a traceback. Where NCCL ends the process by itself, its own message stands.
    """
    try:
        main()
    except KeyboardInterrupt:
        raise UserError("interrupted outside of training") from None
    except torch.OutOfMemoryError as e:
        if rank() == 0:  # where it goes, by the table of --plan
            card = torch.cuda.mem_get_info()[1] / 2**30 if torch.cuda.is_available() else 80
            sys.argv += ["--plan", str(world_size()), "--card", f"{card:.0f}"]
            with contextlib.suppress(Exception, SystemExit):  # what does not train has no plan
                main()
                print("(an estimate: if it says that the run fits, it was too low)", flush=True)
        raise UserError(f"rank {rank()} is out of GPU memory ({str(e).splitlines()[0]}). Lower --micro-tokens, with vLLM --vllm-memory, set "
                        "--gradient-checkpointing, or use more GPUs") from None
    except RuntimeError as e:
        if not (isinstance(e, dist.DistError) or "gloo" in str(e)):
            raise
        raise UserError(f"rank {rank()} has lost the others ({str(e).splitlines()[0][:200]}). One of them died or hangs: what it wrote, or the end of "
                        "torchrun's message, says which. --resume goes on from the last checkpoint; --timeout is how long ranks wait for each other") from None
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def wait() -> None:
    """Until every rank is here."""
    if world_size() > 1:
        dist.barrier()


def all_sum(x: Tensor) -> Tensor:
    """Sum of x over all ranks (a new tensor)."""
    x = x.detach().clone()
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def all_gather(x: Tensor) -> Tensor:
    """Concatenation of every rank's vector [n_r], which may differ in length, in the order of the ranks."""
    if world_size() == 1:
        return x
    lengths = all_gather_object(len(x))
    padded = x.new_zeros(max(lengths))
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return torch.cat([part[:n] for part, n in zip(parts, lengths)])


def all_gather_object(x) -> list:
    """Every rank's (small, picklable) object, in the order of the ranks."""
    if world_size() == 1:
        return [x]
    parts = [None] * world_size()
    dist.all_gather_object(parts, x)
    return parts


def quantile(x: Tensor, q: Tensor) -> Tensor:
    """Quantiles q [k] of the vectors x [n_r] of all ranks together, linearly interpolated; no limit on their number of elements.

    quantile([0, 1, 2, 3, 4, 5], [0.4, 0.7]) -> [2.0, 3.5]. Without any element: inf.
    """
    x = all_gather(x).sort().values
    if len(x) == 0:
        return torch.full_like(q, math.inf, device=x.device)
    at = q.to(x.device, torch.float64) * (len(x) - 1)
    low = at.long()
    return torch.lerp(x[low], x[(low + 1).clamp(max=len(x) - 1)], (at - low).to(x.dtype))


def mean_over_ranks(values: dict[str, list]) -> dict[str, float]:
    """Mean of each list of numbers over all ranks; lists of a rank without work are empty."""
    sums = all_sum(torch.tensor([[sum(x), len(x)] for x in values.values()], dtype=torch.float64, device=device()))
    return {key: (total / max(count, 1)).item() for key, (total, count) in zip(values, sums)}


def my_share(items: list) -> list:
    """This rank's consecutive part of a list that every rank has."""
    n = len(items) // world_size()
    return items[rank() * n : (rank() + 1) * n]


def say(*words) -> None:
    """Print on the first rank only."""
    if rank() == 0:
        print(*words, flush=True)


# ====================================================================================================== data
@functools.cache
def locate(name: str) -> str:
    """Path of a checkpoint or data set; `toy/...` is built on first use by toy.py, everything else is returned as it is.

    Several processes may ask at once: toy.py holds a lock while it builds, the others wait for it.
    """
    match = re.fullmatch(r"(toy(?:-[a-z0-9_]+)?)/(.+)", name)
    if not match or Path(name).exists():
        return name
    family = match[1].partition("-")[2] or "qwen3_vl"
    script = Path(__file__).with_name("toy.py")
    if not script.exists():
        raise UserError(f"{name!r} is built by toy.py, which is not beside {Path(__file__).name}. Copy it there, or name your own "
                        "checkpoints and data with --student, --teacher, --data and --eval-data")
    try:
        result = subprocess.run([sys.executable, script, "--family", family, "--part", match[2].split("/")[0]], stdout=subprocess.PIPE, text=True)
    except KeyboardInterrupt:
        raise UserError("interrupted during start-up; no run was begun") from None
    if result.returncode:
        raise UserError(f"toy.py could not build {name!r} (see above)")
    root = Path(result.stdout.strip().splitlines()[-1])
    path = root / match[2]
    if not path.exists():
        raise UserError(f"the toy has no {match[2]!r}; it has: {', '.join(sorted(p.name for p in root.iterdir() if p.is_dir()))}")
    return str(path)


class Rows:
    """A data set as rows {problem, images, answer, index, ...}: columns renamed, images decoded when a row is read."""

    def __init__(self, name: str, split: str, columns: dict[str, str], flags: dict[str, str] | None = None):
        """`columns`: our name -> the data's name. Only the names given here have to exist. flags: our name -> the flag that sets it."""
        import datasets

        path = Path(locate(name))
        kinds = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}
        self.name, self.root = name, path.parent if path.is_file() else path
        try:
            if path.is_file():
                if path.suffix not in kinds:
                    raise UserError(f"data set {name!r}: {path.suffix!r} files are not read; use {', '.join(kinds)}, a folder or a hub name")
                data = datasets.load_dataset(kinds[path.suffix], data_files=str(path), split="train")
            elif path.is_dir() and ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
                data = datasets.load_from_disk(str(path))
            elif path.suffix in kinds or path.is_absolute() and not path.exists():
                raise UserError(f"data set {name!r} was not found: there is no such file")
            else:
                data = datasets.load_dataset(*([str(path)] if path.exists() else name.split(":")))  # a hub name, with :configuration where the data set has several
        except (FileNotFoundError, ConnectionError, datasets.exceptions.DatasetNotFoundError) as e:
            raise UserError(f"data set {name!r} was not found: it is no local file or folder, and the hub says: {e}") from None
        except StopIteration:  # what an empty file makes of the json reader
            raise UserError(f"data set {name!r} is empty") from None
        except (ValueError, RuntimeError, datasets.exceptions.DatasetGenerationError) as e:
            raise UserError(f"data set {name!r} could not be read: {e.__cause__ or e}") from None
        if isinstance(data, dict):
            if split not in data:
                raise UserError(f"data set {name!r} has no split {split!r}; it has: {', '.join(data)}")
            data = data[split]
        for ours, theirs in columns.items():
            if theirs not in data.column_names:
                raise UserError(f"data set {name!r} has no column {theirs!r}; it has: {', '.join(data.column_names)}. "
                                f"Say which one holds the {ours} with {(flags or {}).get(ours, f'--column-{ours}')} NAME")
        if len(data) == 0:
            raise UserError(f"data set {name!r} is empty")
        self.columns = {c: c for c in data.column_names} | columns
        for column in [c for c in data.column_names if "Image(" in str(data.features[c])]:
            raw = datasets.Image(decode=False)  # decoding is ours, so that a broken image can be named by its row
            data = data.cast_column(column, raw if isinstance(data.features[column], datasets.Image) else datasets.List(raw))
        self.data, self.kept = data, list(range(len(data)))

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, i: int) -> dict:
        """Row i. Raises ValueError if an image cannot be read."""
        raw = self.data[self.kept[i]]
        row = {ours: raw[theirs] for ours, theirs in self.columns.items() if theirs in raw} | {"index": self.kept[i]}
        if isinstance(row["problem"], list):  # a chat: its first user turn is the question
            row["problem"] = next((turn.get("content") for turn in row["problem"] if isinstance(turn, dict) and turn.get("role") == "user"), "")
        if "images" in row:
            images = row["images"] if isinstance(row["images"], list) else [row["images"]]
            row["images"] = [open_image(image, self.root) for image in images if image is not None]
        return row

    def column(self, name: str) -> list:
        """One column of all rows, without reading any image."""
        return list(self.data.select(self.kept)[self.columns[name]])

    def check(self, skip: bool, min_side: int = 0, answers: bool = False, complaint=None) -> None:
        """Read every row once, each rank its share, before any model is loaded. Stops with the bad rows named, or skips them.

        min_side: smallest image side in pixels, 0 where images are not needed. answers: must be non-empty.
        complaint: fn(row) -> what else is wrong with it, or None.
        """
        from tqdm import tqdm

        def wrong(i: int) -> str | None:
            try:
                row = self[i]
            except (OSError, ValueError) as e:
                return str(e)
            if not isinstance(row["problem"] or "", str):
                return f"the question is no text ({str(row['problem'])[:60]!r})"
            if not (row["problem"] or "").strip():
                return "the question is empty"
            if min_side and not row.get("images"):
                return "there is no image"
            for image in row["images"] if min_side else ():
                if min(image.size) < min_side:
                    return f"an image is {image.width} x {image.height} pixels, smaller than a patch ({min_side})"
            right = (row["answer"] or [""]) if isinstance(row.get("answer"), list) else [row.get("answer")]
            if answers and any(one is None or one != one or not plain(extract_answer(str(one)) or str(one)) for one in right):  # NaN is not itself
                return "the answer is empty, and this run needs it for its reward or evaluation"
            if answers and not any(boxed(f"\\boxed{{{one}}}") == (boxed(one) or one) for one in all_answers(row["answer"])):
                return f"the answer {str(row['answer'])[:60]!r} cannot be written inside \\boxed{{}}: no response would ever be right"
            return complaint(row) if complaint else None

        mine = range(rank(), len(self), world_size())
        with ThreadPoolExecutor(8) as pool:
            messages = tqdm(pool.map(wrong, mine), f"checking {self.name}", len(mine), leave=False, disable=rank() != 0, unit="row")
            found = [(i, message) for i, message in zip(mine, messages) if message]
        bad = dict(sorted(pair for part in all_gather_object(found) for pair in part))
        first = "\n  ".join(f"row {self.kept[i]}: {message}" for i, message in list(bad.items())[:20])
        if bad and not skip:
            more = f"\n  ... and {len(bad) - 20} more" if len(bad) > 20 else ""
            raise UserError(f"{len(bad)} of {len(self)} rows of {self.name!r} cannot be used:\n  {first}{more}\n"
                            "Mend them, or leave them out with --skip-bad-rows")
        if len(bad) == len(self):
            raise UserError(f"every row of {self.name!r} is bad:\n  {first}")
        if bad:
            say(f"{self.name}: {len(bad)} of {len(self)} rows skipped:\n  {first}")
        self.kept = [k for i, k in enumerate(self.kept) if i not in bad]


def open_image(image, root: Path):
    """PIL image, {"bytes", "path"}, bytes, or a path relative to the data -> RGB PIL image, fully decoded, on white where it is transparent.

    Raises ValueError if it cannot be read, or has numbers for pixels whose range nobody knows.
    """
    import numpy as np
    from PIL import Image

    if isinstance(image, dict):
        image = image["bytes"] if image.get("bytes") is not None else image.get("path")
    if isinstance(image, str):
        image = Path(root, image)
    if isinstance(image, bytes):
        image = io.BytesIO(image)
    if not isinstance(image, (Image.Image, Path, io.BytesIO)):
        raise ValueError(f"it is {str(image)[:60]!r}, and no path, bytes or image")
    try:
        image = image if isinstance(image, Image.Image) else Image.open(image)
        image.load()
    except Exception as e:  # whatever the reader of some format raises
        raise ValueError(f"the image cannot be read ({e})") from None
    if image.mode in ("I", "F"):
        raise ValueError(f"the image cannot be read (its pixels are numbers of mode {image.mode}: save it as a PNG with 8 or 16 bits)")
    if image.mode.startswith("I;16"):  # convert() alone clips at 255
        values = np.asarray(image)
        image = Image.fromarray(np.where(values == image.info.get("transparency", -1), 255, values // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


# ====================================================================================================== contexts and encoding
@dataclass
class Context:
    """What a model sees before the response: chat messages, the images they mark in order, and the beginning of the answer."""

    messages: list[dict]
    images: list = field(default_factory=list)
    prefill: str = ""


def user_message(text: str, images: int) -> dict:
    """A user turn with `images` images: where the text marks them with <image>, else in front. 0 removes the marks as well.

    user_message("<image>How many?", 1) -> content [image, "How many?"]
    user_message("<image>How many?", 0) -> content ["How many?"]
    """
    pieces = [piece for piece in re.split(r"(<image>)", text) if piece]
    marks = pieces.count("<image>")
    content = [{"type": "image"} if piece == "<image>" else {"type": "text", "text": piece} for piece in pieces]
    if marks != images:  # the text in one piece: what a mark kept apart must not become a control token later
        text = "".join(piece for piece in pieces if piece != "<image>")
        content = [{"type": "image"}] * images + ([{"type": "text", "text": text}] if text else [])
    if content and content[0]["type"] == "text":
        content[0]["text"] = content[0]["text"].lstrip()
    return {"role": "user", "content": content}


@dataclass
class Prompt:
    """An encoded context: token ids with every image placeholder expanded, and the images' patches."""

    ids: list[int]
    pixels: Tensor | None = None  # [patches, patch_dim]
    grid: Tensor | None = None  # [images, 3]: time, height, width in patches
    images: list = field(default_factory=list)  # as they came, before they were cut into patches: what tools look at


@dataclass
class Observation:
    """What a tool answered in the middle of a response: context for the tokens after it, and never part of a loss."""

    at: int  # it stands before the response's token of this number
    prompt: Prompt  # the whole turn, from the end of the model's turn to the beginning of its next one
    text: str
    failed: bool  # an error message


def transcript(prompt: Prompt, ids: list[int], observations: list[Observation] = ()) -> tuple[Prompt, list[int]]:
    """Prompt, response tokens and what tools answered between them as one sequence, and where in it each response token is.

    Prompt [1, 2], response [3, 4, 5], observation [8, 9] at 1 -> [1, 2, 3, 8, 9, 4, 5] and [2, 5, 6].
    """
    whole, places, start = list(prompt.ids), [], 0
    for end, seen in [*((o.at, o.prompt.ids) for o in observations), (len(ids), [])]:
        places += range(len(whole), len(whole) + end - start)
        whole += ids[start:end] + seen
        start = end
    shown = [p for p in (prompt, *(o.prompt for o in observations)) if p.pixels is not None]
    pixels, grid = (torch.cat([p.pixels for p in shown]), torch.cat([p.grid for p in shown])) if shown else (None, None)
    return Prompt(whole, pixels, grid, [image for p in shown for image in p.images]), places


def unreadable(name: str, error: Exception) -> str:
    """What to say of a checkpoint that cannot be read."""
    if "trust_remote_code" in str(error):
        return f"checkpoint {name!r} wants code of its own to be run, which is never done: choose one whose architecture transformers has"
    return (f"checkpoint {name!r} cannot be read ({' '.join(str(error).split())[:300] or repr(error)}). Name a folder that has its config, weights, tokenizer and "
            "image processor, or a hub model, with --student or --teacher")


SPLIT = "\ue0ff"  # private use: stands in a text where no token may reach across


class Processor:
    """Tokenizer and image processor of one checkpoint: contexts -> prompts, prompts + responses -> batches."""

    def __init__(self, name: str):
        from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

        path = locate(name)
        self.name = name
        try:
            self.config = AutoConfig.from_pretrained(path, trust_remote_code=False)
            self.tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            self.image_id = getattr(self.config, "image_token_id", None)  # None: a text-only model
            if self.image_id is not None:
                self.images = AutoImageProcessor.from_pretrained(path, backend="pil", trust_remote_code=False)  # one backend everywhere: pixels differ between them
        except Exception as e:  # transformers, its checks of a config, and each tokenizer have errors of their own
            raise UserError(unreadable(name, e)) from None
        self.pad_id = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        # A response with an image placeholder would promise the next forward pass an image that is not there: never sample one.
        vision = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        self.banned = sorted({getattr(self.config, key) for key in vision if getattr(self.config, key, None) is not None})
        self.vocab = len(self.tokenizer)  # ids from here on are padding rows of the head
        added = self.tokenizer.added_tokens_decoder.values()
        self.control = [token.content for token in added if token.special]
        try:
            around = self.render(Context([user_message("a", 0)]))
        except Exception as e:  # whatever a template raises
            raise UserError(f"the chat template of {name!r} cannot show a question ({e}): choose a checkpoint that has one") from None
        self.control += [token.content for token in added if token.content in around and not token.special]  # some families mark turns by such

    @property
    def patch(self) -> int:
        """Side of an image patch in pixels; 0 for a text-only model."""
        return self.images.patch_size if self.image_id is not None else 0

    def render(self, context: Context) -> str:
        """The context as the text that the chat template makes of it, one placeholder an image, prefill at the end.

        Control tokens that the messages spell out, such as the end of a turn, are broken by SPLIT: they stay text.
        """
        messages = [m | {"content": self.quote(m["content"]) if isinstance(m["content"], str) else
                         [c | {"text": self.quote(c["text"])} if "text" in c else c for c in m["content"]]} for m in context.messages]
        if self.image_id is None:  # the template of a language model takes plain text, and may leave out anything else without a word
            messages = [m if isinstance(m["content"], str) else m | {"content": "".join(c.get("text", "") for c in m["content"])} for m in messages]
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) + context.prefill

    def encode(self, context: Context) -> Prompt:
        """Token ids, with each placeholder expanded to as many as its image has merged patches, and the pixels."""
        return self.encode_text(self.render(context), context.images)

    def quote(self, text: str) -> str:
        """The text with SPLIT in each control token that it spells out."""
        for token in self.control:
            text = text.replace(token, token[0] + SPLIT + token[1:])
        return text

    def spell(self, text: str) -> list[int]:
        """Token ids; no token reaches across a SPLIT."""
        return [i for piece in text.split(SPLIT) for i in self.tokenizer(piece, add_special_tokens=False)["input_ids"]]

    def encode_text(self, text: str, images: list) -> Prompt:
        """See encode; the text is already what the chat template makes."""
        ids = self.spell(text)
        if self.image_id is None and images:
            raise ValueError(f"{self.name!r} is a text-only model and was given an image")
        if self.image_id is not None and ids.count(self.image_id) != len(images):
            raise ValueError(f"a prompt has {len(images)} images and {ids.count(self.image_id)} image placeholders")
        if not images:
            return Prompt(ids)
        pixels = self.images(images=images, return_tensors="pt")
        grid = pixels["image_grid_thw"]
        counts = iter((grid.prod(-1) // self.images.merge_size**2).tolist())
        expanded = [i for token in ids for i in ([token] * next(counts) if token == self.image_id else [token])]
        return Prompt(expanded, pixels["pixel_values"], grid, images)

    def next_turn(self, message: dict, images: list) -> Prompt:
        """A user's message in the middle of a conversation: what comes between the end token of one answer and the first token of the next."""
        said = [user_message("?", 0), {"role": "assistant", "content": [{"type": "text", "text": "!"}]}]
        before = self.tokenizer.apply_chat_template(said, tokenize=False)
        after = self.tokenizer.apply_chat_template([*said, message], tokenize=False, add_generation_prompt=True)
        end = before.rfind(self.tokenizer.eos_token) + len(self.tokenizer.eos_token)
        if self.tokenizer.eos_token not in before or after[:end] != before[:end]:
            raise UserError(f"the chat template of {self.name!r} cannot go on after an answer: it rewrites earlier turns, or does not end them in "
                            f"{self.tokenizer.eos_token}. Tools need one that does")
        return self.encode_text(after[end:], images)

    def complaint(self, context: Context, limit: int) -> str | None:
        """What keeps a context from being used: more than `limit` tokens, an image too many for the model or its template, a template that drops text.

        Cheap: pixels are not made, and a text that cannot be too long is not tokenized.
        """
        if self.image_id is None and context.images:
            return f"it shows an image, and {self.name!r} is a text-only model"
        text, placeholder = self.render(context), self.tokenizer.convert_ids_to_tokens(self.image_id) if self.image_id is not None else None
        if placeholder and text.count(placeholder) != len(context.images):
            return f"the chat template of {self.name!r} does not show its {len(context.images)} images"
        parts = [[m["content"]] if isinstance(m["content"], str) else [c.get("text", "") for c in m["content"]] for m in context.messages]
        if lost := next((part for of_message in parts for part in of_message if self.quote(part).strip() not in text), None):
            return f"the chat template of {self.name!r} leaves out a part of the prompt ({lost.strip()[:60]!r})"
        size = -len(context.images)  # each placeholder of the text gives way to its image's tokens
        try:
            for image in context.images:
                size += self.images.get_number_of_image_patches(image.height, image.width) // self.images.merge_size**2
        except ValueError as e:  # an extreme aspect ratio
            return f"an image cannot be prepared ({e})"
        if size + len(text.encode()) <= limit:  # a byte-level token is at least a byte
            return None
        size += len(self.spell(text))
        return f"the prompt has {size} tokens; the limit is {limit} (--max-prompt)" if size > limit else None

    def batch(self, prompts: list[Prompt], responses: list[list[int]], observations: list[list[Observation]] | None = None) -> dict[str, Tensor]:
        """Right-padded model inputs, and in rows/cols the positions whose hidden states predict the response tokens.

        The token at position c is predicted at c - 1. Prompt of 3 tokens, response of 2: cols = 2, 3. rows and cols are
        flat, [N], sequence after sequence; a response may be empty (a rank without work still has to take part).
        """
        sequences, places = zip(*map(transcript, prompts, responses, observations or [()] * len(prompts)))
        batch = self.pad(sequences)
        del batch["attention_mask"]  # padding on the right is behind everything that counts; and without a mask attention takes its fast causal path
        batch["rows"] = torch.tensor([b for b, at in enumerate(places) for _ in at], dtype=torch.long)
        batch["cols"] = torch.tensor([place - 1 for at in places for place in at], dtype=torch.long)
        return batch

    def pad(self, prompts: list[Prompt], left: bool = False) -> dict[str, Tensor]:
        """Padded input ids with everything else the model wants. mm_token_type_ids: without them Qwen2.5-VL is silently wrong."""
        ids = [p.ids for p in prompts]
        width = max(map(len, ids))
        gap = [[self.pad_id] * (width - len(row)) for row in ids]
        seen = [[0] * (width - len(row)) for row in ids]
        batch = {
            "input_ids": torch.tensor([g + row if left else row + g for g, row in zip(gap, ids)]),
            "attention_mask": torch.tensor([s + [1] * len(row) if left else [1] * len(row) + s for s, row in zip(seen, ids)]),
        }
        if self.image_id is not None:
            batch["mm_token_type_ids"] = (batch["input_ids"] == self.image_id).int()
            if any(p.pixels is not None for p in prompts):
                batch["pixel_values"] = torch.cat([p.pixels for p in prompts if p.pixels is not None])
                batch["image_grid_thw"] = torch.cat([p.grid for p in prompts if p.grid is not None])
        return batch

    def blank(self, image: bool = True) -> Prompt:
        """A prompt for a rank that has no work left: with an image where the others have some, so that its vision tower runs as theirs do."""
        from PIL import Image

        images = [Image.new("RGB", (4 * self.patch, 4 * self.patch))] if image and self.image_id is not None else []
        return self.encode(Context([user_message(" ", len(images))], images))


PROBE = ("Question: how many of the 12,345 digits are even? <reason>f(x) = 3*x**2 - 7/8</reason> \\boxed{\\frac{1}{2}}\n"
         "Caf\u00e9 na\u00efve \u2713 \u03c0 \u2248 3.14; \u56fe\u4e2d\u6709\u591a\u5c11\uff1f \u0441\u043a\u043e\u043b\u044c\u043a\u043e?\tdef main(): return None")


def check_same_inputs(student: Processor, teacher: Processor) -> None:
    """The teacher is to read the student's own prompts and response ids: stop if they would mean something else to it."""
    for text in (PROBE, " ".join(map(str, student.tokenizer.all_special_tokens))):
        ours, theirs = (p.tokenizer(text, add_special_tokens=False)["input_ids"] for p in (student, teacher))
        if ours != theirs:
            at = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
            raise UserError(f"the tokenizers of student {student.name!r} and teacher {teacher.name!r} disagree at token {at} of "
                            f"{text[:80]!r}: ids {ours[at : at + 3]} against {theirs[at : at + 3]}. Choose models of one family")
    if (student.image_id is None) != (teacher.image_id is None):
        raise UserError(f"one of student {student.name!r} and teacher {teacher.name!r} sees images and the other does not")
    if student.image_id is not None:
        for key in ("patch_size", "merge_size", "temporal_patch_size", "size", "image_mean", "image_std"):
            ours, theirs = getattr(student.images, key), getattr(teacher.images, key)
            if ours != theirs:
                raise UserError(f"student and teacher prepare images differently: {key} is {ours} against {theirs}. Choose models of one family")


def load_rows(args: Args, processor: Processor, contexts: dict, held_out: bool = False, images: bool = True, answers: bool = True,
              columns: dict[str, str] | None = None, flags: dict[str, str] | None = None, needed: tuple[str, ...] = (), pick: int = 0,
              flag: str = "--eval-data") -> Rows | None:
    """The training rows, or the held-out ones (None without --eval-data), read once and checked before any model is loaded.

    contexts: name -> fn(row) -> Context (None: not for this row); their prompts have to fit into --max-prompt.
    columns: what the method needs besides problem, images and answer, our name -> the data's; flags: see Rows.
    needed: those of them that must not be blank. flag: the one that names held-out rows. pick: so many rows, 0 = all.
    """
    name, split = (args.eval_data, args.eval_split) if held_out else (args.data, args.data_split)
    if not name and held_out:
        return None
    if not name:
        raise UserError("there is no training data: name it with --data")
    if images and processor.image_id is None:
        raise UserError(f"{processor.name!r} is a text-only model, and this method shows it images")
    columns = {"problem": args.column_problem} | (columns or {})
    columns |= ({"images": args.column_images} if images else {}) | ({"answer": args.column_answer} if answers else {})
    try:
        rows = Rows(name, split, columns, flags)
    except UserError as e:
        if not held_out or not flag:
            raise
        raise UserError(f"{e.message}\nThat was {flag}; {flag} '' turns this evaluation off") from None
    pick = args.eval_rows if held_out else pick
    if 0 < pick < len(rows):  # the same random ones in every run: data sets are often sorted
        picked = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:pick]
        rows.kept = [rows.kept[i] for i in sorted(picked.tolist())]

    def complaint(row: dict) -> str | None:
        if blank := next((name for name in needed if not str(row[name] if row[name] is not None else "").strip()), None):
            return f"the {blank} is empty (column {columns[blank]!r})"
        views = {name: view for name, context in contexts.items() if (view := context(row)) is not None}
        if args.engine == "vllm" and (most := max((len(view.images) for view in views.values()), default=0)) > IMAGES:
            return f"it has {most} images, and vLLM is given room for {IMAGES}"
        return next((f"{wrong}, context {name!r}" for name, view in views.items() if (wrong := processor.complaint(view, args.max_prompt))), None)

    rows.check(args.skip_bad_rows, processor.patch if images else 0, answers, complaint)
    return rows


def count_steps(args: Args, rows: Rows | None) -> int:
    """Rollout batches of the run: --max-steps, or as many as the epochs hold."""
    if rows is None:
        return 0
    if (args.prompts // args.updates) % world_size():
        raise UserError(f"{world_size()} ranks cannot share {args.prompts // args.updates} questions an update evenly: choose --prompts as a "
                        f"multiple of {world_size() * args.updates} (ranks x updates)")
    steps = args.max_steps or int(args.epochs * len(rows)) // args.prompts
    if steps == 0:
        raise UserError(f"{args.epochs} epochs of {len(rows)} rows do not fill one batch of --prompts {args.prompts}: lower it, or set --max-steps")
    return steps


# ====================================================================================================== models
class Model(nn.Module):
    """A checkpoint whose forward pass gives the hidden states of the response positions, or a loss made of them.

    The loss has to be inside: under FSDP2 the head is whole only during the root's forward pass.
    """

    def __init__(self, name: str, dtype: torch.dtype):
        super().__init__()
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
        from transformers.utils import logging

        logging.disable_progress_bar()
        path = locate(name)
        try:
            vision = hasattr(AutoConfig.from_pretrained(path, trust_remote_code=False), "vision_config")
            auto = AutoModelForImageTextToText if vision else AutoModelForCausalLM
            self.name, self.lm = name, auto.from_pretrained(path, dtype=dtype, trust_remote_code=False)
        except Exception as e:  # weights that are missing, cut off, or of another shape: each has its own
            raise UserError(unreadable(name, e)) from None
        self.eval()  # no dropout anywhere: the student is scored and trained as it samples

    def forward(self, batch: dict[str, Tensor], loss_fn=None):
        """batch: from Processor.batch, on any device. Returns hidden states [N, H], or loss_fn(hidden, head [V, H])."""
        inputs = {key: value.to(device(), non_blocking=True) for key, value in batch.items()}
        rows, cols = inputs.pop("rows"), inputs.pop("cols")
        hidden = self.lm.model(**inputs, use_cache=False).last_hidden_state[rows, cols]  # [N, H]
        return hidden if loss_fn is None else loss_fn(hidden, self.lm.lm_head.weight)

    @property
    def vocab(self) -> int:
        """Rows of the output matrix, padding included."""
        return self.lm.lm_head.weight.shape[0]

    def head(self) -> Tensor:
        """The whole output matrix [V, H], on every rank, without gradient."""
        return whole(self.lm.lm_head.weight.detach())

    def add_lora(self, rank: int, targets: str, seed: int) -> None:
        """Freeze the weights and put low-rank adapters beside the linear layers whose names end in one of the targets: W + 2 B A, B = 0 at first."""
        from peft import LoraConfig, inject_adapter_in_model

        named = {name for name, module in self.lm.named_modules() if isinstance(module, nn.Linear) and module is not self.lm.lm_head}  # the loss reads that itself
        for target in targets.split(","):
            if not any(name == target or name.endswith(f".{target}") for name in named):
                kinds = ", ".join(sorted({name.rpartition(".")[2] for name in named}))
                raise UserError(f"--lora-targets names {target!r}, and no linear layer of {self.name!r} ends in that; it has: {kinds}")
        with torch.random.fork_rng():
            torch.manual_seed(seed)  # the same adapters on every rank, of which each keeps its shard
            inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets.split(",")), self.lm)
        for name, parameter in self.lm.named_parameters():
            parameter.requires_grad_(".lora_" in name)

    def weights(self):
        """(name, whole value) of every parameter as an ordinary checkpoint has it, adapters merged. All ranks must go through it together."""
        parameters = dict(self.lm.named_parameters())
        for name, parameter in parameters.items():
            full = whole(parameter)
            if name.endswith(".base_layer.weight"):
                layer = name.removesuffix(".base_layer.weight")
                a, b = (whole(parameters[f"{layer}.lora_{side}.default.weight"]) for side in "AB")
                full = full + 2 * (b.float() @ a.float()).to(full.dtype)
            if ".lora_" not in name:
                yield name.replace(".base_layer.", "."), full


class WithoutAdapters:
    """A student with LoRA as it was before training: the frozen model that costs no second copy."""

    def __init__(self, student: Model, dtype: torch.dtype):
        """dtype: of the forward passes; the student's own weights are float32."""
        self.student, self.vocab, self.dtype = student, student.vocab, dtype

    def head(self) -> Tensor:
        """The whole output matrix [V, H], on every rank."""
        return self.student.head().to(self.dtype)

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        """Hidden states [N, H]; see Model.forward."""
        adapted = [module for module in self.student.modules() if hasattr(module, "lora_A")]
        for module in adapted:
            module.set_scale("default", 0.0)
        try:
            return self.student(batch)
        finally:
            for module in adapted:
                module.set_scale("default", 1.0)


def whole(parameter: Tensor) -> Tensor:
    """The full value of a parameter, sharded or not."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.detach()


def shard(parameter: Tensor) -> Tensor:
    """This rank's part of a parameter or gradient."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def load_model(name: str, args: Args, trained: bool) -> Model:
    """Load a checkpoint and shard it over all ranks (FSDP2). Of a trained one all weights are at least float32, a frozen one is in the compute dtype."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    say(f"loading {name}")
    dtype = getattr(torch, args.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    model = Model(name, wide if trained else dtype).requires_grad_(trained)
    if trained and args.lora:
        model.add_lora(args.lora, args.lora_targets, args.seed)
    if trained and args.freeze_vision and hasattr(model.lm.model, "visual"):
        model.lm.model.visual.requires_grad_(False)
    if trained and args.gradient_checkpointing:
        model.lm.gradient_checkpointing_enable()
        model.lm.train()  # transformers checkpoints only in training mode; these models have no dropout unless their config says so
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=wide)
    if world_size() % args.replicas:
        raise UserError(f"--replicas {args.replicas} does not divide the {world_size()} ranks")
    shape, names = ((world_size(),), ("shard",)) if args.replicas == 1 else ((args.replicas, world_size() // args.replicas), ("replicate", "shard"))
    mesh = dist.device_mesh.init_device_mesh(device().type, shape, mesh_dim_names=names)
    for group in mesh.get_all_groups():  # new groups begin with the backend's own timeout
        dist.distributed_c10d._set_pg_timeout(datetime.timedelta(minutes=args.timeout), group)
    blocks = set(model.lm._no_split_modules or ())
    for module in [m for m in model.modules() if type(m).__name__ in blocks]:
        fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model.to(device())


# ====================================================================================================== memory
@dataclass
class Sizes:
    """Of a checkpoint, from its config alone: numbers of parameters, and what a token's activations hold (numbers a layer, in all layers)."""

    parameters: int
    trained: int
    outside: int  # parameters outside of the blocks that are sharded one by one: embeddings, output matrix
    block: int  # parameters of the largest block
    vocab: int
    hidden: int
    cache: int  # numbers that a token leaves in the cache of keys and values
    saved: int  # numbers a token, kept for the backward pass, of all layers
    layer: int  # and of one


def sizes_of(name: str, args: Args) -> Sizes:
    """Builds the model without memory (torch's meta device)."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    try:
        config = AutoConfig.from_pretrained(locate(name), trust_remote_code=False)
    except Exception as e:  # see Processor
        raise UserError(unreadable(name, e)) from None
    with torch.device("meta"):
        lm = (AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM).from_config(config, trust_remote_code=False)
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    blocks = [count(m) for m in lm.modules() if type(m).__name__ in set(lm._no_split_modules or ())]
    vision, text = getattr(lm.model, "visual", None), config.get_text_config()
    trained = count(lm) - (count(vision) if vision is not None and args.freeze_vision else 0)
    if args.lora:
        linear = [m for n, m in lm.named_modules() if isinstance(m, nn.Linear) and n.rpartition(".")[2] in args.lora_targets.split(",")]
        trained = sum(args.lora * (m.in_features + m.out_features) for m in linear)
    # Of a block, whose attention keeps no probabilities: twenty vectors of the hidden size (what norms, queries, keys, values and outputs keep) and
    # four of the inner one, counted on Qwen3's.
    layer = 20 * text.hidden_size + 4 * text.intermediate_size
    saved = text.num_hidden_layers * (text.hidden_size if args.gradient_checkpointing else layer)
    heads = getattr(text, "num_key_value_heads", text.num_attention_heads)
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Sizes(count(lm), trained, count(lm) - sum(blocks), max(blocks, default=0), lm.lm_head.weight.shape[0], text.hidden_size,
                 2 * text.num_hidden_layers * heads * width, saved, layer)


def plan_memory(args: Args, teacher: str | None, contexts: int, kept: int) -> dict[str, tuple[float, float]]:
    """What a GPU holds: name -> (bytes while sampling, bytes while training). An estimate; prompts and responses are taken as long as they may be.

    contexts: in which the student reads a response at once. kept: hidden states of the teacher that a response token keeps until the update.
    """
    shards, narrow = max(args.plan // args.replicas, 1), 2 if args.dtype == "bfloat16" else 4
    s = sizes_of(args.student, args)
    responses = args.prompts * args.group / args.plan
    tokens = max(args.micro_tokens, contexts * (args.max_prompt + args.max_response))
    need = {
        "student, float32, sharded": (4 * s.parameters / shards,) * 2,
        "optimizer, sharded": (8 * s.trained / shards,) * 2,
        "gradients, sharded": (0, 4 * s.trained / shards),
        "gathered weights and gradients": (0, narrow * (2 * s.outside + 3 * s.block) + 4 * (s.outside + s.block) * (narrow < 4)),
        f"activations of {tokens:,} tokens": (0, narrow * tokens * (s.saved + s.layer * args.gradient_checkpointing)),
        "loss: logits of a chunk, head's gradient": (0, 4 * args.loss_chunk * s.vocab * (3 * contexts + 2 * bool(teacher) + 2) + (4 + narrow) * s.vocab * s.hidden),
    }
    if teacher is not None and not (args.lora and teacher == args.student):
        t = sizes_of(teacher, args)
        need["teacher, sharded"] = (narrow * t.parameters / shards,) * 2
        need["teacher's output matrix, whole"] = (narrow * t.vocab * t.hidden,) * 2
        need["teacher's hidden states"] = (0, narrow * kept * responses * args.max_response * t.hidden)
    if args.engine == "vllm":
        need["vLLM (asleep in training)"] = (args.vllm_memory * args.card * 2**30, 0)
    else:
        cache = s.cache * min(args.rollout_batch, responses) * (args.max_prompt + args.max_response)
        need["sampler: a copy of the student, its cache"] = (narrow * (s.parameters + cache), narrow * s.parameters)
    return need


def print_plan(args: Args, teacher: str | None, contexts: int, kept: int = 0) -> None:
    """The table of --plan."""
    if args.plan % args.replicas or (args.prompts // args.updates) % args.plan:
        raise UserError(f"--plan {args.plan}: so many ranks cannot share --prompts {args.prompts} in --updates {args.updates} evenly, or --replicas {args.replicas}")
    need = plan_memory(args, teacher, contexts, kept)
    say(f"{'GiB on each of ' + str(args.plan) + ' GPUs':44}{'sampling':>10}{'training':>10}")
    for name, (sampling, training) in need.items():
        say(f"{name:44}{sampling / 2**30:10.2f}{training / 2**30:10.2f}")
    totals = [sum(column) / 2**30 for column in zip(*need.values())]
    say(f"{'together':44}{totals[0]:10.2f}{totals[1]:10.2f}")
    responses, together = args.prompts * args.group, max(1, args.micro_tokens // (contexts * (args.max_prompt + args.max_response)))
    say(f"a step: {responses} responses, up to {responses * args.max_response:,} tokens, in {args.updates} updates; "
        f"at most {-(-responses // (args.updates * args.plan * together))} micro-batches a GPU and update")
    # What an estimate like this leaves out (kernels' workspace, fragmentation, the vision tower's activations) is taken as a tenth.
    fits = 1.1 * max(totals) <= args.card
    say(f"with a tenth to spare it {'fits' if fits else 'does not fit'} into {args.card:g} GiB" + ("" if fits else
        ": lower --micro-tokens, --loss-chunk or --vllm-memory, set --gradient-checkpointing or --lora, or use more GPUs"))


# ====================================================================================================== rollouts
@dataclass
class Response:
    """One sampled answer: its tokens (the end token included, if it got that far) and the sampler's log-prob of each."""

    ids: list[int]
    log_probs: list[float]
    finished: bool
    text: str = ""
    observations: list[Observation] = field(default_factory=list)  # what tools answered on the way
    refused: bool = False  # it ended in a call that was one too many, or whose answer no longer fitted


class HFEngine:
    """transformers' generate on an unsharded copy of the student, in the compute dtype."""

    def __init__(self, name: str, processor: Processor, args: Args, sleeps: bool = True):
        self.processor, self.args = processor, args
        self.lm = Model(name, getattr(torch, args.dtype)).requires_grad_(False).to(device()).lm
        ends = self.lm.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self.ends = sorted({e for e in [*ends, processor.tokenizer.eos_token_id] if e is not None})
        width = self.lm.get_input_embeddings().weight.shape[0]
        self.banned = processor.banned + list(range(processor.vocab, width))  # placeholders, and the padding rows of the head

    @torch.no_grad()
    def sync(self, weights) -> None:
        """Take over the student's weights (Model.weights()), one whole parameter at a time."""
        ours = dict(self.lm.named_parameters())
        for name, value in weights:
            ours[name].copy_(value)

    def rest(self) -> None:
        """Nothing is to be generated before the next sync."""

    def close(self) -> None:
        """Nothing is to be generated any more."""

    @torch.no_grad()
    def generate(self, prompts: list[Prompt], temperature: float, top_p: float = 1.0, top_k: int = 0, limits: list[int] | None = None,
                 seeds: list[int] | None = None) -> list[Response]:
        """One response a prompt, in order. temperature 0 is greedy. Log-probs are those of the distribution sampled from.

        limits: the most tokens of each response, instead of --max-response for all. seeds: what each response is drawn with; without
        them torch's global generator decides.
        """
        from transformers import GenerationConfig, LogitsProcessorList

        # Fresh settings: a checkpoint's own (top_k 20, a repetition penalty) would silently bend the sampling. All bending, and
        # the choice itself, is done by our processors below.
        self.lm.generation_config = GenerationConfig()
        config = GenerationConfig(do_sample=False, eos_token_id=self.ends, pad_token_id=self.processor.pad_id, suppress_tokens=self.banned)
        responses: list[Response] = []
        limits = limits or [self.args.max_response] * len(prompts)
        seeds = torch.randint(2**62, (len(prompts),)).tolist() if seeds is None else seeds
        for start in range(0, len(prompts), self.args.rollout_batch):
            part, room, own = (x[start : start + self.args.rollout_batch] for x in (prompts, limits, seeds))
            config.max_new_tokens = max(room)
            batch = {k: v.to(device()) for k, v in self.processor.pad(part, left=True).items()}
            processors = sampling_processors(temperature, top_p, top_k, own, max(room))
            output = self.lm.generate(**batch, generation_config=config, logits_processor=LogitsProcessorList(processors))
            log_probs = torch.stack(processors[-1].log_probs, dim=-1).tolist()  # [B, T]
            for ids, values, limit in zip(output[:, batch["input_ids"].shape[1] :].tolist(), log_probs, room):
                end = next((i + 1 for i, token in enumerate(ids[:limit]) if token in self.ends), None)
                kept = ids[: end or limit]
                text = self.processor.tokenizer.decode(kept, skip_special_tokens=True)
                responses.append(Response(kept, values[: len(kept)], end is not None, text))
        return responses


IMAGES = 16  # of one conversation: what vLLM is told to make room for, and tools keep to


class VLLMEngine:
    """vLLM within the training processes: one engine a rank, or one over --tensor-parallel ranks. See requirements-vllm.txt."""

    def __init__(self, name: str, processor: Processor, args: Args, sleeps: bool = True):
        """sleeps: whether it may leave the GPU's memory to others between rollouts; only one engine of a process can."""
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # in this process, where weights can be handed over in place
        import vllm

        self.processor, self.args, self.vllm, self.asleep, self.group = processor, args, vllm, False, None
        self.sleeps = sleeps and torch.cuda.is_available()
        if not "0.25" <= ".".join(part.zfill(2) for part in vllm.__version__.split(".")[:2]) < "0.34":
            say(f"warning: vLLM {vllm.__version__} is outside of what was tried, 0.25 to 0.33")
        if world_size() % args.tensor_parallel:
            raise UserError(f"--tensor-parallel {args.tensor_parallel} does not divide the {world_size()} ranks")
        if args.tensor_parallel > 1:
            self.group, _ = dist.new_subgroups(group_size=args.tensor_parallel, timeout=datetime.timedelta(minutes=args.timeout))
        gpu = torch.cuda.is_available()
        if not gpu:
            import vllm._custom_ops

            vllm._custom_ops._supports_onednn = False  # its packed weights could not be overwritten
        self.llm = vllm.LLM(
            model=locate(name), dtype=args.dtype, seed=args.seed, max_model_len=args.max_prompt + args.max_response, max_num_seqs=args.rollout_batch,
            tensor_parallel_size=args.tensor_parallel, distributed_executor_backend="external_launcher" if "RANK" in os.environ else None,
            limit_mm_per_prompt={"image": IMAGES, "video": 0} if processor.image_id is not None else None, enforce_eager=not gpu, enable_sleep_mode=self.sleeps,
            logprobs_mode="processed_logprobs", disable_log_stats=True, **({"gpu_memory_utilization": args.vllm_memory} if gpu else {}))
        width = self.llm.model_config.get_vocab_size()
        self.bias = {token: -100.0 for token in processor.banned + list(range(processor.vocab, width))}  # as HFEngine bans them

    def sync(self, weights) -> None:
        """See HFEngine.sync. What vLLM remembers of earlier weights goes: its caches of prefixes, and of images' features."""
        self.wake()
        dtype = getattr(torch, self.args.dtype)
        self.llm.apply_model(lambda model: model.load_weights((name, value.to(dtype)) for name, value in weights) and None)
        self.llm.reset_prefix_cache()
        self.llm.llm_engine.reset_encoder_cache()

    def rest(self) -> None:
        """Leave the GPU's memory to the update."""
        if self.sleeps and not self.asleep:
            self.llm.sleep(level=1)
            self.asleep = True

    def close(self) -> None:
        """Give back all memory, for the engine of a next stage."""
        end = dist.destroy_process_group
        dist.destroy_process_group = lambda group=None: None if group is None else end(group)  # vLLM ends its own groups, and then all: ours too
        try:
            self.llm.llm_engine.engine_core.shutdown()
        finally:
            dist.destroy_process_group = end

    def wake(self) -> None:
        if self.asleep:
            self.llm.wake_up()
            self.asleep = False

    def generate(self, prompts: list[Prompt], temperature: float, top_p: float = 1.0, top_k: int = 0, limits: list[int] | None = None,
                 seeds: list[int] | None = None) -> list[Response]:
        """See HFEngine.generate. With tensor parallelism the ranks of an engine have to call it together."""
        self.wake()
        limits = limits or [self.args.max_response] * len(prompts)
        seeds = torch.randint(2**62, (len(prompts),)).tolist() if seeds is None else seeds
        mine = list(zip(map(self.request, prompts), limits, seeds))
        parts = [mine]
        if self.group is not None:
            parts = [None] * self.args.tensor_parallel
            dist.all_gather_object(parts, mine, group=self.group)
        inputs, settings = [], []
        for request, limit, seed in (one for part in parts for one in part):
            inputs.append(request)
            settings.append(self.vllm.SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, max_tokens=limit, seed=seed, logprobs=0,
                                                     logit_bias=self.bias, stop_token_ids=[self.processor.tokenizer.eos_token_id]))
        outputs = self.llm.generate(inputs, settings, use_tqdm=False) if inputs else []
        first = sum(map(len, parts[: rank() % len(parts)]))
        responses = []
        for output in outputs[first : first + len(mine)]:
            (said,) = output.outputs
            ids = list(said.token_ids)
            log_probs = [at[token].logprob for at, token in zip(said.logprobs, ids)]
            responses.append(Response(ids, log_probs, said.finish_reason == "stop", self.processor.tokenizer.decode(ids, skip_special_tokens=True)))
        return responses

    def request(self, prompt: Prompt) -> dict:
        """A prompt as vLLM wants it: one placeholder an image, which it expands itself.

        Images have their final size, to which training resizes them too: vLLM's resizing gives pixels that differ by 0.01.
        """
        placeholder = self.processor.image_id
        ids = [token for token, before in zip(prompt.ids, [None, *prompt.ids]) if token != placeholder or before != placeholder]
        if not prompt.images:
            return {"prompt_token_ids": ids}
        patch, resample = self.processor.patch, self.processor.images.resample
        images = [image.resize((w * patch, h * patch), resample) for image, (_, h, w) in zip(prompt.images, prompt.grid.tolist())]
        return {"prompt_token_ids": ids, "multi_modal_data": {"image": images}}


def make_engine(name: str, processor: Processor, args: Args, sleeps: bool = True) -> HFEngine | VLLMEngine:
    """The engine of --engine for a checkpoint; sleeps: see VLLMEngine."""
    return {"hf": HFEngine, "vllm": VLLMEngine}[choose_engine(args.engine)](name, processor, args, sleeps)


def writer(name: str, endpoint: str, args: Args):
    """fn(contexts) -> (text, whether it ended by itself) each, by a local checkpoint or by the model that an endpoint serves."""
    if endpoint:
        return functools.partial(ask_endpoint, endpoint, name, args.max_response, args.temperature)
    engine = make_engine(name, Processor(name), args)
    return lambda contexts: [(r.text, r.finished) for r in engine.generate([engine.processor.encode(c) for c in contexts], args.temperature)]


def ask_endpoint(url: str, model: str, max_tokens: int, temperature: float, contexts: list[Context]) -> list[tuple[str | None, bool]]:
    """One answer a context from an OpenAI-compatible endpoint, eight at a time; None where it refuses the request.

    Overload and outages are waited for, up to a minute. Raises UserError after that, and where the key or the address is wrong.
    Requests hold the rows' answers. So of a refused one only the error's type is shown, and what else a server says unless it quotes the request.
    """
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', 'none')}"}
    stopped = threading.Event()

    def ask(context: Context) -> tuple[str | None, bool]:
        images = iter(context.images)
        messages = [m if isinstance(m["content"], str) else m | {"content": [
            {"type": "image_url", "image_url": {"url": as_data_url(next(images))}} if c["type"] == "image" else c for c in m["content"]]}
            for m in context.messages]
        body = json.dumps({"model": model, "messages": messages, "max_tokens": max_tokens, "temperature": temperature}).encode()
        for wait in (1, 4, 15, 40, None):
            try:
                with urllib.request.urlopen(urllib.request.Request(f"{url.rstrip('/')}/chat/completions", body, headers), timeout=600) as answer:
                    choice = json.load(answer)["choices"][0]
                    text = choice["message"]["content"] or ""
                    if not isinstance(text, str):
                        raise TypeError(f"its content is no text but a {type(text).__name__}")
                    return text, choice.get("finish_reason") != "length"
            except urllib.error.HTTPError as e:
                why = ""
                with contextlib.suppress(OSError, http.client.HTTPException):  # it was cut off
                    why = e.read().decode(errors="replace")
                said = f"{e.code} {without_quotes(why, messages)[:300]}"
                if e.code in (401, 403, 404):
                    raise UserError(f"{url} refused: {said}. Look at the address, at --hint-model and at OPENAI_API_KEY") from None
                if e.code < 500 and e.code not in (408, 429):
                    kind = ", ".join(re.findall(r'"(?:type|code)": *"([\w.-]{1,40})"', why))
                    print(f"{url} refused one request: {e.code} {kind}; its own log says more", file=sys.stderr)
                    return None, True
                trouble = said
            except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:  # no connection, cut off, or no such answer
                trouble = without_quotes(repr(e), messages)[:300]
            if wait is None or stopped.is_set():
                raise UserError(f"{url} does not answer as it should ({trouble}). What was written so far is kept: start again when it does")
            if wait > 4:
                print(f"{url}: {trouble}; trying again in {wait} s", file=sys.stderr)
            stopped.wait(wait)

    pool = ThreadPoolExecutor(8)
    try:
        return list(pool.map(ask, contexts))
    finally:
        stopped.set()  # at an error or Ctrl-C: nobody waits out his minute
        pool.shutdown(wait=False, cancel_futures=True)


def without_quotes(said: str, messages: list[dict], length: int = 16) -> str:
    """What a server said; where any `length` characters of it stand in the messages too, only that it quoted them."""
    texts = [c.get("text", "") for m in messages for c in (m["content"] if isinstance(m["content"], list) else [{"type": "text", "text": m["content"]}])]
    sent = " ".join("\n".join([*texts, json.dumps(texts)]).split())  # as text and as JSON: either may come back
    said = " ".join(said.split())
    quoted = any(said[i : i + length] in sent for i in range(len(said) - length + 1))
    return "(its explanation quotes the request, which may hold a row's answer, and is not shown)" if quoted else said


def as_data_url(image) -> str:
    """PIL image -> data:image/png;base64,..."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


class Sampler:
    """Last in the list of logits processors: chooses every token, and notes its log-prob.

    A response is drawn with its own seed's numbers, by inverting the distribution function: what else is in the batch, and on how
    many ranks the batch is spread, changes nothing.
    """

    def __init__(self, seeds: list[int] | None, length: int):
        """seeds: one a response, of at most `length` tokens; None: greedy. log_probs: a [B] a step."""
        self.log_probs, self.numbers = [], None
        if seeds is not None:
            rows = [torch.rand(length, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
            self.numbers = torch.stack(rows).to(device())  # [B, T] in [0, 1)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        log_p = scores.float().log_softmax(-1)
        if self.numbers is None:
            token = log_p.argmax(-1, keepdim=True)
        else:
            below = log_p.double().exp().cumsum(-1)
            at = self.numbers[:, len(self.log_probs), None] * below[:, -1:]
            token = torch.searchsorted(below, at, right=True).clamp(max=below.shape[-1] - 1)
        self.log_probs.append(log_p.gather(-1, token).squeeze(-1))
        return torch.full_like(scores, -math.inf).scatter_(-1, token, 0.0)


def seed_of(*numbers: int) -> int:
    """A seed of 62 bits for a place in the run that these numbers name."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()) >> 2


def sampling_processors(temperature: float, top_p: float, top_k: int, seeds: list[int], length: int) -> list:
    """Temperature, top-k and top-p, in that order, and last a Sampler. temperature 0 is greedy."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    bend = []
    if temperature not in (0.0, 1.0):
        bend.append(TemperatureLogitsWarper(temperature))
    if temperature and top_k:
        bend.append(TopKLogitsWarper(top_k))
    if temperature and top_p < 1:
        bend.append(TopPLogitsWarper(top_p))
    return [*bend, Sampler(seeds if temperature else None, length)]


# ====================================================================================================== image tools
class ToolError(ValueError):
    """A call that cannot be answered; the message is for the model. It repeats nothing that the model wrote."""


def crop_image(arguments: dict, images: list) -> tuple[str, list]:
    """Zoom into a box of an image: bbox_2d [left, top, right, bottom], in fractions of its sides or in pixels, and target_image from 1 on."""
    image, box = image_of(arguments.get("target_image", 1), images), arguments.get("bbox_2d")
    if not isinstance(box, list) or len(box) != 4 or not all(is_number(x) for x in box):
        raise ToolError("bbox_2d must be four numbers: left, top, right, bottom")
    width, height = image.size
    if max(box) > 1 and any(0 < x < 1 for x in box):
        raise ToolError("bbox_2d must be four fractions of the sides, from 0 to 1, or four numbers of pixels")
    if max(box) <= 1:
        box = [x * side for x, side in zip(box, (width, height, width, height))]
    left, top, right, bottom = box
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise ToolError(f"the box lies outside of the image or is empty; the image is {width} x {height} pixels, and left < right and top < bottom")
    part = image.crop((math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)))
    return f"Here is the cropped image (Image Size: {part.width}x{part.height}):<image>", [part]


FRAMES = 8  # that select_frames shows at most


def select_frames(arguments: dict, images: list) -> tuple[str, list]:
    """Show some of the images again: target_frames, their numbers from 1 on."""
    numbers = arguments.get("target_frames")
    if not isinstance(numbers, list) or not 0 < len(numbers) <= FRAMES:
        raise ToolError(f"target_frames must be a list of at most {FRAMES} frame numbers")
    frames, first = [image_of(number, images) for number in numbers], len(images) + 1
    size = f"{frames[0].width}x{frames[0].height}, Numbered {first} to {first + len(frames) - 1}"
    return f"Here are the selected frames (Frame Size: {size}):{'<image>' * len(frames)}", frames


def is_number(x) -> bool:
    """An int or a finite float, as JSON gives them; true and false are none."""
    return isinstance(x, int) and not isinstance(x, bool) or isinstance(x, float) and math.isfinite(x)


def image_of(number, images: list):
    """Image by its number, from 1 on. Numbers are all that can be named: a call reaches no file."""
    if not is_number(number) or number != int(number) or not 1 <= number <= len(images):
        raise ToolError(f"images are numbered from 1 to {len(images)}")
    return images[int(number) - 1]


# By the name in a call: fn(arguments, images so far) -> (text with <image> marks, images), or raises ToolError. A tool of your own goes here.
TOOLS = {"crop_image": crop_image, "crop_image_normalized": crop_image, "select_frames": select_frames}
CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|$)", re.S)  # around {"name": ..., "arguments": {...}}


def answer_call(call: str, images: list) -> tuple[str, list, bool]:
    """What a tool says to the JSON of a call: (text, images, whether it is an error message)."""
    try:
        try:
            wanted = json.loads(call)
        except (ValueError, RecursionError):
            raise ToolError("the call is no JSON object") from None
        if not isinstance(wanted, dict) or not isinstance(arguments := wanted.get("arguments"), dict):
            raise ToolError('the call must be a JSON object {"name": ..., "arguments": {...}}')
        if not isinstance(name := wanted.get("name"), str) or name not in TOOLS:
            raise ToolError(f"there is no such tool; there are: {', '.join(TOOLS)}")
        return *TOOLS[name](arguments, images), False
    except ToolError as e:
        return f"Error: {e}.", [], True


class WithTools:
    """An engine whose responses may have several turns: the model calls a tool, reads the image or the error message that comes back, and goes on.

    A turn that calls nothing ends the response. So do a call beyond the allowed number and an answer of a tool that no longer fits into
    --max-response (which counts everything after the prompt, tools' tokens too): the response then counts as cut off.
    """

    def __init__(self, engine, calls: int, args: Args):
        """calls: that one response may make."""
        self.engine, self.calls, self.args, self.processor, self.sync = engine, calls, args, engine.processor, engine.sync
        self.rest = engine.rest

    def generate(self, prompts: list[Prompt], temperature: float, top_p: float = 1.0, top_k: int = 0, limits: None = None,
                 seeds: list[int] | None = None) -> list[Response]:
        """See HFEngine.generate; the limit is --max-response for all. text holds all turns and what tools answered."""
        responses, going = [Response([], [], False) for _ in prompts], list(range(len(prompts)))
        for turn in range(self.calls + 1):
            so_far = [transcript(prompts[i], responses[i].ids, responses[i].observations)[0] for i in going]
            room = [self.args.max_response + len(prompts[i].ids) - len(p.ids) for i, p in zip(going, so_far)]
            calling = []
            drawn = seeds and [seed_of(seeds[i], turn) for i in going]
            for i, seen, left, answer in zip(going, so_far, room, self.engine.generate(so_far, temperature, top_p, top_k, room, drawn)):
                response, call = responses[i], CALL.search(answer.text)
                response.ids += answer.ids
                response.log_probs += answer.log_probs
                response.text += answer.text
                response.finished = answer.finished and not call
                if answer.finished and call:
                    response.refused = turn == self.calls or not self.observe(response, call[1].strip(), seen, left - len(answer.ids))
                    calling += [] if response.refused else [i]
            going = calling
            if not max(all_gather_object(len(going))):  # ranks that share an engine take every turn together
                break
        return responses

    def observe(self, response: Response, call: str, seen: Prompt, room: int) -> bool:
        """Answer a call; False if the answer and one more token do not fit into `room`, or its images are too many."""
        text, images, failed = answer_call(call, seen.images)
        if len(seen.images) + len(images) > IMAGES:
            return False
        try:
            turn = self.processor.next_turn(user_message(text, len(images)), images)
        except ValueError:  # a strip so narrow that the image processor refuses it
            text, images, failed = "Error: that part is too narrow to be shown.", [], True
            turn = self.processor.next_turn(user_message(text, 0), [])
        if len(turn.ids) >= room:
            return False
        response.observations.append(Observation(len(response.ids), turn, text, failed))
        response.text += f"\n(tool: {text})\n"
        return True


# ====================================================================================================== samples and micro-batches
@dataclass
class Sample:
    """One response, with every context that it will be read in."""

    row: dict
    prompts: dict[str, Prompt]  # by the context's name
    response: Response
    correct: bool = False  # the answer, where answers are checked
    reward: float = 0.0
    advantage: float = 0.0


def sample_responses(engine, rows: list[dict], contexts: dict, args: Args, kind=Sample) -> list:
    """`group` consecutive responses a row, sampled under the first of the contexts (name -> fn(row) -> Context).

    Each is drawn with a seed of its own: from --seed, the row's number among all that the run draws, and its number in the group.
    A context may be None for a row (it lacks what the context shows): the sample then has no prompt of that name.
    kind: Sample or a subclass.
    """
    views = [{name: context(row) for name, context in contexts.items()} for row in rows]
    encoded = [{name: engine.processor.encode(view) for name, view in of_row.items() if view is not None} for of_row in views]
    sampled_under = next(iter(contexts))
    seeds = [seed_of(args.seed, row.get("draw", row["index"]), i) for row in rows for i in range(args.group)]
    responses = engine.generate([p[sampled_under] for p in encoded for _ in range(args.group)], args.temperature, args.top_p, args.top_k, seeds=seeds)
    engine.rest()
    return [kind(rows[i // args.group], encoded[i // args.group], response) for i, response in enumerate(responses)]


def reward_answers(samples: list[Sample], group: int, extra=None, weight: float = 0.0) -> None:
    """Check the answers; reward 1 for a right one, else 0, and the advantage of each response within its group.

    A response that was cut off has not answered: it is wrong.
    extra: fn(text) -> whether the response earns a second reward, which then has this weight and the answer 1 - weight.
    """
    for sample in samples:
        sample.correct = sample.response.finished and is_correct(extract_answer(sample.response.text), sample.row["answer"])
        sample.reward = (1 - weight) * sample.correct + (weight * extra(sample.response.text) if extra else 0.0)
    for sample, advantage in zip(samples, group_advantages(torch.tensor([s.reward for s in samples]), group).tolist()):
        sample.advantage = advantage


@dataclass
class Micro:
    """A micro-batch and all that is known of it before the update. n response tokens, sequence after sequence."""

    samples: list[Sample]
    batch: dict[str, Tensor]  # model inputs: every sequence in the first context, then every one in the second, ...
    contexts: int
    ids: Tensor  # [n] response tokens
    length: Tensor  # [n] length of the response that a token belongs to
    sampled: Tensor  # [n] the sampler's log-prob of the token
    advantage: Tensor  # [n]
    old: Tensor  # [n] the policy's log-prob at rollout time; NaN: the current policy is that policy
    teacher: list[Tensor] = field(default_factory=list)  # hidden states [n, H], one tensor a context
    weights: Tensor | None = None  # [K, n], set by weigh
    terms: Tensor | None = None  # [K, n], set by the forward pass

    def by_context(self, hidden: Tensor) -> list[Tensor]:
        """Hidden states of the whole batch [contexts * n, H] -> one [n, H] a context."""
        n = len(self.ids)
        return list(hidden.split(n)) if n else [hidden] * self.contexts


def make_micros(kind, samples: list[Sample], contexts: list[str], processor: Processor, limit: int, first=None, images: bool = True) -> list:
    """Samples in micro-batches (`kind`: Micro or a subclass) of at most `limit` tokens, each sequence once a context.

    images: whether the contexts show any. first: fn(sample) -> whether its tokens come before those of the other samples of its micro-batch.
    """
    micros = []
    lengths = [max(len(s.prompts[name].ids) for name in contexts) + len(s.response.ids) + sum(len(o.prompt.ids) for o in s.response.observations)
               for s in samples]
    for picked in micro_batches(lengths, limit // len(contexts)):
        part = sorted((samples[i] for i in picked), key=lambda s: not first(s)) if first else [samples[i] for i in picked]
        responses, views = [s.response.ids for s in part], [[s.prompts[name] for s in part] for name in contexts]
        seen = [s.response.observations for s in part]
        if not part:  # this rank has run out of work, and the others wait for it in every layer: an empty response
            responses, views, seen = [[]], [[processor.blank(images)] for _ in contexts], [[]]
        lengths = [len(r) for r in responses]
        micros.append(kind(
            samples=part,
            batch=processor.batch([prompt for view in views for prompt in view], responses * len(contexts), seen * len(contexts)),
            contexts=len(contexts),
            ids=per_token(lengths, responses, torch.long),
            length=per_token(lengths, lengths),
            sampled=per_token(lengths, [s.response.log_probs for s in part]),
            advantage=per_token(lengths, [s.advantage for s in part]),
            old=torch.full((sum(lengths),), math.nan, device=device()),
        ))
    return micros


def sampler_gap(micros: list[Micro], log_p: Tensor) -> Tensor:
    """|the trainer's log-prob - the sampler's| of every token, [N]; the trainer's as it was when the token was sampled.

    log_p [N]: the trainer's now, which is the same until the first update on these samples.
    """
    old = torch.cat([m.old for m in micros])
    return (torch.where(old.isnan(), log_p, old) - torch.cat([m.sampled for m in micros])).abs()


def micro_batches(lengths: list[int], limit: int) -> list[list[int]]:
    """Sequence numbers in groups of at most `limit` tokens when padded to the longest, or of one sequence; of similar length, so that little is.

    Every rank gets equally many groups, as each forward and backward pass is a joint one: a rank with fewer gets empty ones.
    lengths [5, 9, 4], limit 10 -> [[2, 0], [1]], and with another rank that has three groups -> [[2, 0], [1], []]
    """
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if groups and (len(groups[-1]) + 1) * lengths[i] <= limit:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups + [[]] * (max(all_gather_object(len(groups))) - len(groups))


def split(items: list, parts: int) -> list[list]:
    """Consecutive equal parts."""
    n = len(items) // parts
    return [items[i * n : (i + 1) * n] for i in range(parts)]


def per_token(lengths: list[int], values: list, dtype=torch.float32) -> Tensor:
    """One entry per response token, [N]: each response gives a number for all its tokens, or a list of one number a token.

    per_token([2, 1], [7, 8]) -> [7, 7, 8]     per_token([2, 1], [[1, 2], [3]]) -> [1, 2, 3]
    """
    flat = [x for n, value in zip(lengths, values) for x in (value if isinstance(value, list) else [value] * n)]
    return torch.tensor(flat, dtype=dtype, device=device())


# ====================================================================================================== the vocabulary, in chunks
def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) = sum_v a_v (log a_v - log b_v) of log-probabilities [..., V] -> [...]; 0 log 0 = 0, also for -inf against -inf."""
    return (log_a.exp() * (log_a - log_b).masked_fill(log_a == -math.inf, 0.0)).sum(-1)


def entropy(log_p: Tensor) -> Tensor:
    """Entropy in nats of log-probabilities [..., V] -> [...]."""
    return -(log_p.exp() * log_p.masked_fill(log_p == -math.inf, 0.0)).sum(-1)


def gather(log_p: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities [N, V] of the tokens ids [N] -> [N]."""
    return log_p.gather(-1, ids[:, None]).squeeze(-1)


def response_log_probs(hidden: Tensor, head: Tensor, ids: Tensor, vocab: int, chunk: int) -> Tensor:
    """Log-probs [N] of the tokens ids [N] under hidden states [N, H] and an output matrix [V, H], without gradient."""
    return vocab_terms(lambda z, ids: (gather(z.log_softmax(-1), ids),), [(hidden, head)], [ids], vocab, chunk)[0]


def widen(x: Tensor) -> Tensor:
    """To float32, from anything narrower."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def vocab_terms(fn, pairs, extras=(), vocab: int | None = None, chunk: int = 256) -> Tensor:
    """Per-token terms of an equation over the vocabulary, without gradient: fn(*logits, *extras) -> K tensors [n].

    pairs: (hidden [N, H], head [V, H]) for each logits argument; extras: [N, ...] tensors. Only the first `vocab` columns
    of every head are used (what the models share). Logits exist for `chunk` tokens at a time. Returns [K, N] in float32.
    """
    with torch.no_grad():
        parts = [torch.stack(fn(*logits, *extra)) for _, logits, extra in _chunks(pairs, extras, vocab, chunk)]
    return torch.cat(parts, dim=-1)


def _chunks(pairs, extras, vocab, chunk):
    n = len(pairs[0][0])
    for start in range(0, max(n, 1), chunk):  # an empty batch is one empty chunk
        rows = slice(start, min(start + chunk, n))
        yield rows, [widen(hidden[rows] @ head[:vocab].T) for hidden, head in pairs], [x[rows] for x in extras]


class _VocabLoss(torch.autograd.Function):
    """See vocab_loss. Its forward pass already takes the gradient of every chunk, and keeps only that."""

    @staticmethod
    def forward(ctx, fn, weights, frozen, extras, vocab, chunk, head, *hidden):
        wide = torch.promote_types(head.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=head.device)
        grad_hidden = [torch.zeros_like(h) for h in hidden]
        grad_head = None  # of a frozen head (LoRA) nobody wants one
        if ctx.needs_input_grad[6]:
            grad_head = torch.zeros(head.shape, dtype=wide, device=head.device)  # wide, so that many small chunks do not round away
        parts = []
        for rows, logits, extra in _chunks([(h, head) for h in hidden] + list(frozen), extras, vocab, chunk):
            ours = [z.requires_grad_() for z in logits[: len(hidden)]]
            with torch.enable_grad():
                terms = torch.stack(fn(*ours, *logits[len(hidden) :], *extra))  # [K, n]
                loss = (weights[:, rows] * terms).sum()
            grads = torch.autograd.grad(loss, ours, allow_unused=True, materialize_grads=True)
            for h, grad_h, g in zip(hidden, grad_hidden, grads):
                g = g.to(head.dtype)  # [n, V]
                torch.mm(g, head[:vocab], out=grad_h[rows])
                if grad_head is not None:
                    grad_head[:vocab].add_(g.T @ h[rows]) if wide != head.dtype else grad_head[:vocab].addmm_(g.T, h[rows])
            total += loss.detach()
            parts.append(terms.detach())
        ctx.save_for_backward(grad_head if grad_head is None else grad_head.to(head.dtype), *grad_hidden)
        terms = torch.cat(parts, dim=-1)
        ctx.mark_non_differentiable(terms)
        return total, terms

    @staticmethod
    def backward(ctx, grad_total, _):
        grad_head, *grad_hidden = ctx.saved_tensors
        return (None,) * 6 + (grad_head if grad_head is None else grad_head * grad_total, *(g * grad_total for g in grad_hidden))


def vocab_loss(fn, weights: Tensor, hidden, head: Tensor, frozen=(), extras=(), vocab: int | None = None, chunk: int = 256):
    """sum over k, t of weights[k, t] * terms[k, t], where terms = fn(*logits, *frozen_logits, *extras): K tensors [n].

    hidden: the student's hidden states [N, H], one tensor a context; head [V, H] is shared by them. frozen: (hidden, head)
    pairs of teachers, no gradient; a pair that covers only the first tokens gives fn fewer rows, or none. weights [K, N] must be
    final, divisors included: that is what allows the gradient to be taken chunk by chunk, so that each head is multiplied once
    and no logits are kept. Returns (loss, terms [K, N] detached).
    """
    return _VocabLoss.apply(fn, weights, tuple(frozen), tuple(extras), vocab, chunk, head, *hidden)


# ====================================================================================================== GRPO
def group_advantages(rewards: Tensor, group: int, eps: float = 1e-6) -> Tensor:
    """A_i = (r_i - mean) / (std + eps) within each group of `group` consecutive responses; rewards [B] -> [B].

    std is the unbiased one. A group whose rewards are equal gets exactly 0. [1, 0, 0, 1] in one group -> [.87, -.87, -.87, .87].
    """
    r = rewards.view(-1, group)
    if group == 1:
        return torch.zeros_like(rewards)
    equal = r.amax(-1, keepdim=True) == r.amin(-1, keepdim=True)  # the mean of eight times 0.1 is not 0.1 in float32
    return torch.where(equal, 0.0, (r - r.mean(-1, keepdim=True)) / (r.std(-1, keepdim=True) + eps)).view(-1)


def k3(log_p: Tensor, reference: Tensor) -> Tensor:
    """The k3 estimator of KL(p || reference) at sampled tokens, [N]: r - 1 - log r with r = reference / p; never negative."""
    log_ratio = reference - log_p
    return log_ratio.exp() - 1 - log_ratio


def clipped_surrogate(log_p: Tensor, old_log_p: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """min(rho A, clip(rho, 1 - low, 1 + high) A) per token, to be maximised; rho = exp(log_p - old_log_p). All [N]."""
    ratio = (log_p - old_log_p).exp()
    return torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def sequence_old(now: Tensor, old: Tensor, divisor: Tensor | float, response: Tensor) -> Tensor:
    """Old log-probs [n] that give every token its response's ratio s = exp(sum of (log p - log p_old) / divisor), and its own gradient.

    The token's ratio is then s p / sg(p) = exp(log p - (sg(log p) - log s)). divisor: the response's length (GSPO), or 1 for the
    ratio of the whole response. response [n] numbers the responses from 0.
    """
    log_s = torch.zeros_like(now).index_add_(0, response, (now - old) / divisor)  # entry i: response i (there are at most n)
    return now - log_s[response]


# ====================================================================================================== answers
def extract_answer(text: str) -> str | None:
    r"""The content of the last complete \boxed{...}; without one, the text after the last </reason>; else None.

    "<reason>2 + 2</reason> \boxed{\frac{1}{2}}" -> "\frac{1}{2}".   "<reason>none</reason> (c)" -> "(c)".   "so 4" -> None
    """
    if (content := boxed(text)) is not None:
        return content
    _, tag, tail = text.rpartition("</reason>")
    return (tail.strip() or None) if tag else None


def boxed(text: str) -> str | None:
    r"""The content of the last complete \boxed{...} of a text, or None."""
    opened, last = [], (-1, -1)  # braces that are open: where the content begins, or -1 of any other brace
    for match in re.finditer(r"\\boxed\s*\{|[{}]", text):
        if match[0] != "}":
            opened.append(match.end() if len(match[0]) > 1 else -1)
        elif opened:
            last = max(last, (opened.pop(), match.start()))
    return text[slice(*last)].strip() if last[0] >= 0 else None


def is_correct(prediction: str | None, answer) -> bool:
    """Whether an extracted answer equals the reference: as text, then as option letter, as number, and last with math-verify.

    answer: a string or number, or a list of them, of which each is right.
    """
    if prediction is None:
        return False
    if isinstance(answer, list):
        return any(is_correct(prediction, one) for one in answer)
    ours, gold = plain(prediction), plain(extract_answer(str(answer)) or str(answer))
    if ours.casefold() == gold.casefold():
        return True
    if as_option(gold):
        return as_option(ours) == as_option(gold)
    if (number := as_number(gold)) is not None and as_number(ours) is not None:
        return as_number(ours) == number
    if max(len(ours), len(gold)) > 200:  # no short answer is this long, and a symbolic parser can be made to hang by one
        return False
    import math_verify

    return math_verify.verify(math_verify.parse(f"\\boxed{{{gold}}}"), math_verify.parse(f"\\boxed{{{ours}}}"))


def all_answers(answer) -> list[str]:
    """A row's right answers as texts; most rows have one."""
    return [str(one).strip() for one in (answer if isinstance(answer, list) else [answer])]


def one_answer(answer) -> str:
    """What a model is shown of a row's answer: of several right ones the first."""
    return str(answer[0] if isinstance(answer, list) else answer)


def plain(text: str) -> str:
    r"""Without what stands around an answer: "$\text{Yes}$." -> "Yes"."""
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}", r"\1", text.strip())
    return re.sub(r"</?answer>", "", text).strip().strip("$").strip().rstrip(".").strip()


def as_option(text: str) -> str | None:
    """"(B)", "B", "b." or "B: blue" -> "B"; anything else -> None."""
    match = re.fullmatch(r"\(?([A-Za-z])(?:\)|[.:)].*)?", text, re.S)
    return match[1].upper() if match else None


def as_number(text: str) -> Fraction | None:
    """"1,200", "-3", "0.50", "3/4", "12 %" -> its exact value."""
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text.replace("\u2212", "-")).removesuffix("%").replace("\\", "").strip()
    match = re.fullmatch(r"([+-]?(?:\d+\.?\d*|\.\d+))(?:\s*/\s*(\d+))?", text)
    if not match or len(text) > 60 or (match[2] and int(match[2]) == 0):
        return None
    return Fraction(match[1]) / int(match[2] or 1)


# ====================================================================================================== evaluation
def evaluate(engine, rows, context, samples: int = 0) -> dict[str, float]:
    """Accuracy on held-out rows, shared out over the ranks. `context`: fn(row) -> Context.

    acc@1: greedy. With samples = k, at temperature 1: acc@k the mean accuracy of k answers, pass@k the share of questions
    with at least one right, maj@k the share whose most frequent answer is right.
    """
    mine = [rows[i] for i in range(rank(), len(rows), world_size())]
    prompts = [engine.processor.encode(context(row)) for row in mine]
    greedy = [not r.refused and is_correct(extract_answer(r.text), row["answer"]) for r, row in zip(engine.generate(prompts, 0.0), mine)]
    sums = [len(mine), sum(greedy), 0.0, 0, 0]
    if samples:
        seeds = [seed_of(row["index"], i) for row in mine for i in range(samples)]
        responses = engine.generate([p for p in prompts for _ in range(samples)], 1.0, seeds=seeds)
        answers = [None if r.refused else extract_answer(r.text) for r in responses]
        for i, row in enumerate(mine):
            given = answers[i * samples : (i + 1) * samples]
            right = [is_correct(a, row["answer"]) for a in given]
            sums[2] += sum(right) / samples
            sums[3] += any(right)
            sums[4] += right[given.index(Counter(given).most_common(1)[0][0])]
    count, *totals = all_sum(torch.tensor(sums, dtype=torch.float64, device=device())).tolist()
    names = ["acc@1", f"acc@{samples}", f"pass@{samples}", f"maj@{samples}"][: 4 if samples else 1]
    return {name: total / count for name, total in zip(names, totals)}


# ====================================================================================================== optimizer
def make_optimizer(model: nn.Module, args: Args, updates: int):
    """AdamW (decay on matrices only), and a schedule over `updates` updates: warm-up, then constant, linear or cosine to zero."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1], "weight_decay": args.weight_decay},
              {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}]

    def factor(step: int) -> float:
        if step < args.warmup:
            return (step + 1) / (args.warmup + 1)
        done = (step - args.warmup) / max(1, updates - args.warmup)
        return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[args.schedule]

    optimizer = torch.optim.AdamW(groups, lr=args.lr)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def grad_norm(model: nn.Module) -> Tensor:
    """L2 norm of the whole gradient over all ranks."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


@dataclass
class Models:
    """What a run trains with."""

    processor: Processor
    student: Model
    engine: HFEngine
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    vocab: int  # columns that the student, the teacher and the tokenizer share
    teacher: Model | WithoutAdapters | None = None
    head: Tensor | None = None  # the teacher's output matrix [V, H], whole on every rank


def load_models(args: Args, processor: Processor, teacher: str | None, updates: int) -> Models:
    """Student, rollout engine, optimizer, and (None: no) frozen teacher."""
    student, frozen = load_model(args.student, args, trained=True), None
    if teacher is not None:
        same = args.lora and teacher == args.student
        frozen = WithoutAdapters(student, getattr(torch, args.dtype)) if same else load_model(teacher, args, trained=False)
    vocab = min([processor.vocab, student.vocab] + ([frozen.vocab] if frozen else []))
    engine = make_engine(args.student, processor, args)
    return Models(processor, student, engine, *make_optimizer(student, args, updates), vocab, frozen, frozen and frozen.head())


class NotFinite(Exception):
    """A loss or a gradient with a NaN or an infinity in it, on any rank. Every rank raises it, and no weight has moved."""

    def __init__(self, found: list[str], micros: list[Micro]):
        super().__init__("; ".join(found))
        self.micros = micros


def clip_and_step(models: Models, micros: list[Micro], names: tuple[str, ...], limit: float) -> dict[str, float]:
    """Clip the gradient of these micro-batches, step, clear. names: those of their terms. Raises NotFinite on every rank, before the weights move.

    Returns the gradient's norm before clipping, and the learning rate of this step.
    """
    norm, lr = grad_norm(models.student), models.schedule.get_last_lr()[0]
    loss = sum((m.weights * m.terms).masked_fill(m.weights == 0, 0.0).sum() for m in micros)
    value = (norm + 0.0 * all_sum(loss)).item()  # waits for the device, once an update and after its last backward pass
    if not math.isfinite(value):
        values, gradients = zip(*all_gather_object((not_finite(micros, names), not_finite_gradient(models.student))))
        found = enumerate(values if any(values) else gradients)  # a value that is not finite spoils every rank's gradient
        raise NotFinite([f"rank {r}: {', '.join(what)}" for r, what in found if what] or ["the gradient's norm, which has grown too large for its numbers"], micros)
    torch.nn.utils.clip_grads_with_norm_([p for p in models.student.parameters() if p.requires_grad], limit, norm)
    models.optimizer.step()
    models.schedule.step()
    models.optimizer.zero_grad()
    return {"grad_norm": value, "lr": lr}


UNKNOWN_IS_NAN = ("old", "reference")  # of a micro-batch


def not_finite(micros: list[Micro], names: tuple[str, ...]) -> list[str]:
    """What of this rank's micro-batches is not finite, and in the response to which row it begins."""
    found = {}
    for m in micros:
        known = {name: value for name, value in vars(m).items() if isinstance(value, Tensor) and value.is_floating_point() and name not in ("weights", "terms")}
        known |= {f"hidden states of teacher {i}": hidden.sum(-1) for i, hidden in enumerate(m.teacher)}
        known |= {f"weight of {name}": row for name, row in zip(names, m.weights)} | dict(zip(names, m.terms))
        for name, value in known.items():
            bad = (value.isinf() if name in UNKNOWN_IS_NAN else ~value.isfinite()).nonzero().flatten().tolist()
            if bad and name not in found:
                rows = [s.row["index"] for s in m.samples for _ in s.response.ids]
                found[name] = f"{name} (from row {rows[bad[0]]})"
    return list(found.values())


def not_finite_gradient(student: nn.Module) -> list[str]:
    """The first parameter of whose gradient this rank's part is not finite."""
    return [f"gradient of {name}" for name, p in student.named_parameters() if p.grad is not None and not shard(p.grad).isfinite().all()][:1]


# ====================================================================================================== run folder
def refuse_folder(path: Path) -> None:
    """Stop if a folder cannot be made there, before hours of work have nowhere to go."""
    try:
        at = next(p for p in (path, *path.absolute().parents) if p.exists())
    except OSError as e:  # a folder above it that may not be looked into
        raise UserError(f"{path} cannot be written to ({e}). Choose another --output") from None
    if not at.is_dir() or not os.access(at, os.W_OK):
        raise UserError(f"{path} cannot be written to: {at} is {'a folder that is not yours to write to' if at.is_dir() else 'a file'}. Choose another --output")


def replace_text(file: Path, text: str) -> None:
    """Write a file so that it is the old one or the new one, whenever the process is killed."""
    aside = file.with_name(f"{file.name}.partial")
    aside.write_text(text)
    aside.replace(file)


def whole_lines(file: Path) -> list[str]:
    """The lines of a file. What stands behind the last line's end is a killed process's, perhaps half a character, and left out."""
    data = file.read_bytes()
    return data[: data.rfind(b"\n") + 1].decode().split("\n")[:-1]


class Records:
    """Results a row, in a folder with one .jsonl a rank: a start that finds some goes on behind them, on any number of ranks."""

    def __init__(self, folder: str, made_from: dict):
        """made_from: the settings that a continued start has to share. done: the rows (record["row"]) that are there."""
        self.folder = Path(folder)
        refuse_folder(self.folder)
        self.path = self.folder / f"records-{rank()}.jsonl"
        settings = self.folder / "made_from.json"
        if settings.exists() and json.loads(settings.read_text()) != made_from:
            raise UserError(f"{self.folder} was begun with {settings.read_text().strip()}, and this is {json.dumps(made_from)}: choose another --output")
        self.done = {record["row"] for record in self.all()}  # waits for every rank
        if rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_text(settings, json.dumps(made_from) + "\n")
        all_gather_object(None)
        if self.path.exists():  # the half line of a start that was killed
            os.truncate(self.path, self.path.read_bytes().rfind(b"\n") + 1)

    def all(self) -> list[dict]:
        all_gather_object(None)
        return read_records(self.folder)

    def batches(self, pending: list, size: int, title: str):
        """This rank's pending items in batches, with a bar. Every rank gets equally many (the last ones empty), and none runs far ahead."""
        from tqdm import tqdm

        count = max(all_gather_object(-(-len(pending) // size)))
        for i in tqdm(range(count), title, unit="batch", disable=rank() != 0):
            yield pending[i * size : (i + 1) * size]
            all_gather_object(None)  # nobody waits at the end for longer than a collective may

    def add(self, records: list[dict]) -> None:
        with open(self.path, "a") as f:
            f.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def read_records(folder: Path) -> list[dict]:
    """The records of every rank, in the order of their rows. A last line without its end is a killed start's, and left out."""
    records = []
    for path in sorted(Path(folder).glob("records-*.jsonl")):
        for number, line in enumerate(whole_lines(path), 1):
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError as e:
                raise UserError(f"{path}, line {number} is no whole JSON record ({e}): remove that line, and its row is made again") from None
    return sorted(records, key=lambda record: record["row"])


class Run:
    """The folder of a run: args.json, metrics.jsonl (one line a step), samples.jsonl, checkpoints/, and at the end final/."""

    def __init__(self, method: str, args: Args):
        """Choose the folder, and stop if it holds a run that is not to be resumed. Nothing is written before begin()."""
        self.method, self.args, self.tracker, self.state = method, args, None, None
        name = args.output or str(Path("runs", f"{method}-{args.preset}-{time.strftime('%Y%m%d-%H%M%S')}"))
        self.path = Path(all_gather_object(name)[0])
        if args.resume:
            self.find_state()
        elif all_gather_object((self.path / "args.json").exists())[0]:
            raise UserError(f"{self.path} already holds a run; go on with it by --resume auto, choose another folder with --output, or remove this one")
        refuse_folder(self.path)
        package = {"none": None, "tensorboard": "tensorboard", "wandb": "wandb"}[args.tracker]
        if package and importlib.util.find_spec(package) is None:
            raise UserError(f"--tracker {args.tracker} needs a package: pip install {package}")

    def find_state(self) -> None:
        """What --resume goes on from: self.state, the newest whole one, or None where `auto` finds none."""
        auto = self.args.resume == "auto"
        if auto and not self.args.output:
            raise UserError("--resume auto looks for a run in the folder that --output names: name it")
        if not auto and self.args.output not in ("", self.args.resume):
            raise UserError(f"--output {self.args.output} would have no effect: --resume goes on in {self.args.resume}")
        self.path = self.path if auto else Path(self.args.resume)
        states, finished = states_in(self.path), (self.path / "final").exists()
        torn = [state for state in states if not all((state / name).exists() and (state / name).stat().st_size for name in (".metadata", "progress.json"))]
        for state in torn:
            say(f"{state} is not whole, and is passed over")
        whole_ones = [state for state in states if state not in torn]
        if not whole_ones and not auto and not finished:
            raise UserError(f"{self.path} holds no checkpoint to resume from (checkpoints/step-N/state); they are written with --save-every")
        if not (self.path / "args.json").exists():
            if whole_ones or finished:
                raise UserError(f"{self.path} has checkpoints and no args.json, so nobody knows whose they are: choose another --output")
            return
        before, now = json.loads((self.path / "args.json").read_text()), self.settings()
        if before["file"] != now["file"]:
            raise UserError(f"{self.path} is a run of {before['file']}, and this is {now['file']}")
        changed = [f"--{name.replace('_', '-')} {before.get(name)} -> {value}" for name, value in now.items() if name not in HARMLESS and before.get(name) != value]
        if changed and not self.args.resume_anyway:
            raise UserError(f"{self.path} was begun with other settings ({', '.join(changed)}). Give the same ones, or say --resume-anyway")
        if finished:
            say(f"{self.path / 'final'} is there: this run is finished. Another one can begin where it ended: --student {self.path / 'final'} and another --output")
            raise SystemExit(0)
        if not whole_ones and any(self.path.glob("checkpoints/step-*[0-9]/config.json")):
            raise UserError(f"{self.path} holds weights, and no state/ to go on from: choose another --output (--student {self.path}/checkpoints/step-N begins with them)")
        self.state = whole_ones[-1] if whole_ones else None
        if self.state is None:
            say(f"{self.path} holds a run without a checkpoint: it begins anew")

    def settings(self) -> dict:
        """What args.json holds."""
        return {"file": f"{self.method}.py", **dataclasses.asdict(self.args)}

    def begin(self, plan: str) -> None:
        """Create the folder, once nothing can be refused any more, and say what the run is going to do."""
        say(f"{self.method}, preset {self.args.preset}, engine {self.args.engine}: {plan}\n{f'going on after step {step_of(self.state)}, ' if self.state else ''}writing to {self.path}")
        if rank() == 0:
            self.path.mkdir(parents=True, exist_ok=True)
            if self.args.resume:
                self.clear(step_of(self.state) if self.state else -1)
            replace_text(self.path / "args.json", json.dumps(self.settings(), indent=2) + "\n")
            if self.args.tracker == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter

                self.tracker = SummaryWriter(str(self.path), purge_step=step_of(self.state) + 1 if self.state else None)
            elif self.args.tracker == "wandb":
                import wandb

                name = self.path / "wandb-id"  # a run that is resumed goes on in its own curves
                if self.state is None or not name.exists():
                    name.write_text(secrets.token_hex(4))
                self.tracker = wandb.init(project="cleanopd", name=str(self.path), dir=str(self.path), config=self.settings(), id=name.read_text(), resume="allow")
                self.tracker.define_metric("*", step_metric="step")  # wandb's own step cannot go back to that of a checkpoint

    def clear(self, done: int) -> None:
        """Remove what a run that was killed left behind step `done`: lines, and checkpoints that are not whole."""
        for file in ("metrics.jsonl", "samples.jsonl"):
            cut_behind(self.path / file, done)
        torn = [state.parent for state in states_in(self.path) if step_of(state) > done]
        for folder in (*self.path.glob("checkpoints/step-*.partial"), self.path / "final.partial", *torn):
            shutil.rmtree(folder, ignore_errors=True)

    def write(self, file: str, record: dict) -> None:
        """Append one JSON line, at once on disk: a run that is interrupted leaves whole lines."""
        if rank() == 0:
            with open(self.path / file, "a") as f:
                f.write(json.dumps(record, ensure_ascii=False) + "\n")

    def samples(self, step: int, samples: list[Sample], rewarded: bool) -> None:
        """Responses as text and tokens, a line each, to samples.jsonl."""
        for s in samples:
            record = {"step": step, "row": s.row["index"], "problem": s.row["problem"], "response": s.response.text, "answer": s.row.get("answer")}
            record |= {"reward": s.reward} if rewarded else {}
            record |= {"tools": [{"at": o.at, "text": o.text, "failed": o.failed} for o in s.response.observations]} if s.response.observations else {}
            self.write("samples.jsonl", record | {"ids": s.response.ids})

    def metrics(self, step: int, values: dict) -> None:
        """One line of metrics.jsonl. Lists (one value a bin) stay lists there; a tracker gets them one by one."""
        self.write("metrics.jsonl", {"step": step} | {key: [round(v, 6) for v in x] if isinstance(x, list) else round(x, 6) for key, x in values.items()})
        if self.tracker is not None:
            scalars = {key: x for key, x in values.items() if not isinstance(x, list)}
            scalars |= {f"{key}/{i}": v for key, x in values.items() if isinstance(x, list) for i, v in enumerate(x)}
            if hasattr(self.tracker, "add_scalar"):
                for key, value in scalars.items():
                    self.tracker.add_scalar(key, value, step)
            else:
                self.tracker.log(scalars | {"step": step})

    def close(self) -> None:
        """Let the tracker write what it holds; another run of this process may begin one of its own."""
        if self.tracker is not None:
            self.tracker.close() if hasattr(self.tracker, "add_scalar") else self.tracker.finish()

    def save(self, folder: str, models: "Models", progress: dict | None = None) -> None:
        """Write the whole model as an ordinary checkpoint, in the precision it came with, and with `progress` what --resume needs beside it.

        Aside first and then in place: what has a checkpoint's name is whole.
        """
        model, processor, aside = models.student, models.processor, self.path / f"{folder}.partial"
        if rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed
        stored = processor.config.dtype or processor.config.get_text_config().dtype or torch.float32
        weights = {}
        for name, value in model.weights():
            if rank() == 0:
                weights[name] = value.to(stored).cpu()
        if rank() == 0:
            save_checkpoint(model.lm, processor, aside, weights)
        wait()
        if progress is not None:
            import torch.distributed.checkpoint as dcp

            dcp.save(training_state(models), checkpoint_id=aside / "state")
        if rank() == 0:
            if progress is not None:
                with open(aside / "state" / "progress.json", "w") as f:
                    f.write(json.dumps(progress) + "\n")
                    f.flush()
                    os.fsync(f.fileno())
            shutil.rmtree(self.path / folder, ignore_errors=True)  # one that was not whole
            aside.rename(self.path / folder)
            say(f"saved {self.path / folder}")
            for old in states_in(self.path)[: -self.args.keep] if progress is not None else ():
                shutil.rmtree(old)
        wait()

    def restore(self, models: "Models") -> dict:
        """Weights, optimizer and schedule as they were; returns the `progress` that was saved with them. On any number of ranks."""
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import set_state_dict

        state, groups, schedule = training_state(models), models.optimizer.param_groups, models.schedule
        settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        dcp.load(state, checkpoint_id=self.state)
        set_state_dict(models.student, models.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=state_options())
        progress = json.loads((self.state / "progress.json").read_text())
        schedule.last_epoch = progress["step"] * self.args.updates
        for group, setting, base, factor in zip(models.optimizer.param_groups, settings, schedule.base_lrs, schedule.lr_lambdas):
            group |= setting | {"lr": base * factor(schedule.last_epoch)}  # this run's settings, which --resume-anyway may have changed
        schedule._last_lr = [group["lr"] for group in models.optimizer.param_groups]
        models.engine.sync(models.student.weights())
        return progress


def step_of(state: Path) -> int:
    """.../checkpoints/step-20/state -> 20"""
    return int(state.parent.name.removeprefix("step-"))


def states_in(folder: Path) -> list[Path]:
    """What can be resumed from in a run folder, oldest first."""
    found = [state for state in folder.glob("checkpoints/step-*/state") if state.parent.name.removeprefix("step-").isdigit()]
    return sorted(found, key=step_of)


def state_options():
    """Frozen weights are not written: they are those of --student."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(ignore_frozen_params=True, strict=False)


def training_state(models: "Models") -> dict:
    """Trained weights and optimizer, sharded as they are; any number of ranks can read what is written of it."""
    from torch.distributed.checkpoint.state_dict import get_state_dict

    return dict(zip(("model", "optimizer"), get_state_dict(models.student, models.optimizer, options=state_options())))


def cut_behind(file: Path, step: int) -> None:
    """Leave the lines of a .jsonl up to this step; the last one may be the half line of a run that was killed."""
    if file.exists():
        replace_text(file, "".join(line + "\n" for line in whole_lines(file) if json.loads(line)["step"] <= step))


def save_checkpoint(lm, processor: Processor, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """What from_pretrained and vLLM load: weights, config, tokenizer with chat template, image processor."""
    lm.save_pretrained(folder, state_dict=weights)
    processor.config.save_pretrained(folder)  # as it came: lm's own says float32, the precision of training
    processor.tokenizer.save_pretrained(folder)
    if processor.image_id is not None:
        processor.images.save_pretrained(folder)
    from transformers.utils import cached_file

    for file in ("processor_config.json", "video_preprocessor_config.json"):  # for AutoProcessor; we read neither
        source = cached_file(locate(processor.name), file, _raise_exceptions_for_missing_entries=False,
                             _raise_exceptions_for_connection_errors=False)  # a missing extra must not cost a finished run
        if source and Path(source).resolve() != Path(folder, file).resolve():
            shutil.copy(source, folder)


GAP = 0.1  # mean difference of log-probs, in nats, that rounding does not explain


def bends_nothing(args: Args) -> bool:
    """Whether responses are sampled from the model's own distribution."""
    return (args.temperature, args.top_p, args.top_k) == (1.0, 1.0, 0)


class Progress:
    """The steps of a run, with a bar: collects what is logged during a step and writes it when the step ends.

    with Progress(run, steps, models, questions) as progress:
        for step in progress:                # 1, 2, ..., steps; in a resumed run from where it was
            ...; progress.phase("rollout")   # the seconds since the last phase ended
            progress.log({"std": 0.1})       # several values of a key are averaged

    When a step is done its line of metrics is written, and then a checkpoint every --save-every steps, and final/ at the end.
    """

    def __init__(self, run: Run, steps: int, models: "Models", questions: "Questions"):
        """A run that is resumed is restored here. own: numbers that a method carries from step to step, kept in checkpoints."""
        from tqdm import tqdm

        self.run, self.steps, self.models, self.questions, self.values, self.shown = run, steps, models, questions, {}, {}
        saved = run.restore(models) if run.state else {"step": 0, "drawn": 0, "own": {}}
        self.step = self.first = saved["step"]
        self.own, self.warned = saved["own"], False
        questions.skip(saved["drawn"])
        self.bar = tqdm(total=steps, initial=self.first, unit="step", disable=rank() != 0, dynamic_ncols=True)
        self.started = self.mark = time.perf_counter()

    def __enter__(self):
        return self

    def __iter__(self):
        for self.step in range(self.first + 1, self.steps + 1):
            self.values, self.mark = {}, time.perf_counter()
            yield self.step
            means = self.means()
            self.run.metrics(self.step, means)
            if means.get("sampler_gap", 0) > GAP and not self.warned and bends_nothing(self.run.args):
                self.warned = True
                self.note(f"the sampler's log-probs differ by {means['sampler_gap']:.2g} from the trainer's in the mean: they should be the same model")
            every = self.run.args.save_every
            if self.step == self.steps:
                self.run.save("final", self.models)
            elif every and self.step % every == 0:
                self.run.save(f"checkpoints/step-{self.step}", self.models, {"step": self.step, "drawn": self.questions.drawn, "own": self.own})
            self.bar.update()

    def means(self) -> dict:
        return {key: [sum(column) / len(values) for column in zip(*values)] if isinstance(values[0], list) else sum(values) / len(values)
                for key, values in self.values.items()}

    def log(self, values: dict) -> None:
        for key, value in values.items():
            if key != "sampler_gap" or key not in self.values:  # of a step's first update alone: after it the trainer is another model
                self.values.setdefault(key, []).append(value)
        self.shown |= {key: f"{value:.3f}" for key, value in values.items() if key in ("std", "reward", "acc@1")}
        self.bar.set_postfix(self.shown, refresh=False)

    def samples(self, samples: list[Sample], args: Args, rewarded: bool) -> None:
        """Log the share of finished responses (and the mean reward), and write some responses out."""
        values = {"finished": [s.response.finished for s in samples]} | ({"reward": [s.reward for s in samples]} if rewarded else {})
        self.log(means := mean_over_ranks(values))
        self.run.samples(self.step, samples[: args.log_samples], rewarded)
        if self.step == self.first + 1 and not bends_nothing(args):
            self.note(f"responses are sampled with temperature {args.temperature}, top-p {args.top_p} and top-k {args.top_k}; the loss takes them as "
                      "samples of the model itself, at 1, 1 and 0")
        if means["finished"] == 0:
            self.note(f"no response ended by itself within --max-response {args.max_response} (see samples.jsonl)")

    def note(self, text: str) -> None:
        """A line above the bar, for what the user should know of this step."""
        if rank() == 0:
            self.bar.write(f"step {self.step}: {text}")

    def phase(self, name: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.log({f"seconds/{name}": now - self.mark})
        self.mark = now

    def evaluate(self, engine, rows: Rows | None, context, args: Args, others: dict[str, Rows] | None = None) -> None:
        """Held-out accuracy at the start, at the end and every --eval-every steps.

        others: more held-out rows, of which the greedy accuracy is logged under their name.
        """
        last = self.step == self.steps
        if rows is None or not (self.step == 0 or last or (args.eval_every and self.step % args.eval_every == 0)):
            return
        if not self.values and self.step:  # before the first step of a resumed run
            return
        result = evaluate(engine, rows, context, args.eval_samples)
        result |= {name: evaluate(engine, more, context)["acc@1"] for name, more in (others or {}).items()}
        self.phase("evaluate")
        self.log(result)
        if self.step == 0:
            self.run.metrics(0, result)
        if self.step == 0 or last:
            self.note(", ".join(f"held-out {key} {value:.1%}" for key, value in result.items()))

    def __exit__(self, kind, error, trace):
        self.bar.close()
        self.run.close()
        if kind is NotFinite:
            skipped = ("samples", "teacher")  # hidden states are many, and can be made again
            self.run.path.mkdir(parents=True, exist_ok=True)  # another machine may have a disk of its own
            torch.save([{"rows": [s.row["index"] for s in m.samples], **{key: value for key, value in vars(m).items() if key not in skipped}}
                        for m in error.micros], self.run.path / f"not-finite-rank-{rank()}.pt")
            raise UserError(f"step {self.step}: not finite: {error}. No weight was moved by this update; each rank's batch is in "
                            f"{self.run.path}/not-finite-rank-*.pt. Look at the row; or lower --lr and go on with --resume and --resume-anyway: with the same "
                            "settings it would end here again") from None
        if kind is KeyboardInterrupt:
            raise UserError(f"interrupted in step {self.step} of {self.steps}. {self.run.path} holds the metrics and samples of the steps before "
                            "it, and the weights that were saved")
        if kind is None:
            say(f"{self.steps} steps in {(time.perf_counter() - self.started) / 60:.1f} minutes")


def data_order(rows: int, prompts: int, seed: int):
    """Endless batches of `prompts` row numbers: every epoch a fresh shuffle, no row twice in an epoch, the same on every rank."""
    generator, queue = torch.Generator().manual_seed(seed), []
    while True:
        while len(queue) < prompts:
            queue += torch.randperm(rows, generator=generator).tolist()
        yield queue[:prompts]
        queue = queue[prompts:]


class Questions:
    """Training rows in the order of data_order, and how many batches of them were drawn."""

    def __init__(self, rows, prompts: int, seed: int, updates: int = 1):
        """rows: Rows or a list of rows; prompts: of a batch, over all ranks and all its updates."""
        self.rows, self.order, self.updates, self.drawn = rows, data_order(len(rows), prompts, seed), updates, 0

    def skip(self, batches: int) -> None:
        """Draw so many without looking at them."""
        for _ in range(batches):
            next(self.order)
        self.drawn += batches

    def draw(self) -> list[dict]:
        """This rank's part of the next batch, update by update; row["draw"] is a row's number among all that the run draws."""
        numbers = next(self.order)
        numbered, self.drawn = list(enumerate(numbers, self.drawn * len(numbers))), self.drawn + 1
        return [self.rows[i] | {"draw": n} for part in split(numbered, self.updates) for n, i in my_share(part)]
