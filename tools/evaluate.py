"""Accuracy of any checkpoint on the papers' benchmarks, or on rows of your own; every answer is written out.

    python -m tools.evaluate --model runs/x/final --prompt vgs --sets mathverse mmstar my.parquet
    torchrun --nproc-per-node 8 -m tools.evaluate --model Qwen/Qwen3-VL-2B-Instruct --protocol vigos --output evals/2b
    python -m tools.evaluate --rescore evals/2b            judges the stored answers anew, without a model

--sets: benchmarks by their names (python -m tools.benchmarks lists them), NAME=PATH for a local copy, and files,
folders or hub names of rows in our columns. --prompt: a method's, as it trains in it, or a text file of your own with
{problem} in it. The greedy answer and --samples sampled ones to each question are judged as in training
(docs/answers.md), or by the benchmark's own rule; tools.scores has every number's formula, docs/evaluation.md what it
means beside the paper's. --protocol: a paper's sets, prompt and sampling.

A folder, --output, holds sets/ (benchmarks in our columns), answers/ while it goes on, then answers.jsonl (a line an
answer: prompt, images, response, extracted answer, verdict) and results.json. Stopped, the same line goes on, on any
number of ranks; ranks take whole batches, so that their number changes no answer.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import common
import reopold
from tools import benchmarks, protocols, rules, scores

from tqdm import tqdm

# =============================================================================================== settings
RANGES = {"samples": (0, 10000), "calls": (0, 100)}


@dataclass
class Args:
    # greedy, vgs, vold, ptdpo, vigos, reopold-math, reopold-visual or reopold-agentic (docs/evaluation.md); flags
    # override it
    protocol: str = ""
    model: str = ""  # checkpoint: a folder, a hub name, or toy/student
    # vgs, vold, ptdpo, vigos, reopold or reopold-tools, as they train; or a text file with {problem} in it, and
    # before a line of --- a system turn
    prompt: str = ""
    # benchmarks, NAME=PATH, or rows in our columns; empty: the protocol's benchmarks
    sets: list[str] = field(default_factory=list)
    split: str = "test"  # which split of rows in our columns
    rows: int = 0  # questions of each set, a fixed random choice; 0 = all
    column_problem: str = "problem"  # of rows in our columns: the question
    column_images: str = "images"  # the image, or the list of images
    column_answer: str = "answer"  # the checkable answer
    # folder where relative paths of images begin, and outside of which no image is read; empty: that of the rows
    image_root: str = ""

    greedy: bool = True  # answer each question greedily: acc@1
    samples: int = 0  # sampled answers a question (n)
    k: list[int] = field(default_factory=list)  # of pass@k and maj@k; empty: n
    temperature: float = 1.0  # of the samples
    top_p: float = 1.0  # nucleus sampling; 1 = off
    top_k: int = 0  # sample among the k likeliest tokens; 0 = off
    calls: int = 0  # rounds of image tools (prompt reopold-tools)
    seed: int = 0  # of the samples
    max_prompt: int = 16384  # longest prompt in tokens, image tokens included
    max_response: int = 4096  # longest response in tokens; one that is cut off has not answered
    min_pixels: int = 0  # see the methods' --help
    max_pixels: int = 0

    engine: Literal["auto", "hf", "vllm"] = "auto"  # who generates
    vllm_memory: float = 0.8  # share of a GPU's memory that vLLM may hold
    rollout_batch: int = 64  # responses generated at once
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    timeout: float = 1440.0  # minutes that ranks wait for the slowest
    output: str = ""  # folder, gone on with if it holds this evaluation
    rescore: str = ""  # folder whose answers.jsonl is judged anew; nothing else is done

    # what engine and folder read besides
    prompts = eval_max_prompt = 0
    updates = replicas = 1

    @property
    def preset(self):
        return self.protocol


# =============================================================================================== prompts and rows
OURS = "images category rule tolerance groups"  # columns that a set may have


def in_our_columns(name: str, folder: Path, there: bool) -> tuple[str, str]:
    """What a set is called, and its rows in our columns; a benchmark's are written to the folder, or are there."""
    first = name.partition("=")[0]
    # a path or a hub name; what is called as a benchmark is one
    if first not in benchmarks.benchmarks() and (Path(name).exists() or "/" in first):
        return name, name
    label = benchmarks.find(name)[0].name
    file = folder / f"{label}.parquet"
    if common.rank() == 0 and not (there and file.exists()):
        benchmarks.write(name, file)
    common.all_gather_object("written")
    return label, str(file)


def load_set(name: str, args: Args, processor, context: Callable, folder: Path):
    """What a set is called, and its rows, each checked. A benchmark's are written to the folder first."""
    # of an evaluation that has begun they are known to be the same
    begun = (folder.parent / "args.json").exists()
    label, data = in_our_columns(name, folder, begun)
    asked = common.Args(
        data=data,
        data_split=args.split,
        max_prompt=args.max_prompt,
        image_root=args.image_root,
    )
    given = vars(args) if data == name else {}
    for column in f"problem answer {OURS}".split():
        key = "column_" + column
        setattr(asked, key, given.get(key, column))
    there = common.load_data(data, args.split).column_names
    # the last three are tools.benchmarks': in other rows these names may be of anything
    ours = OURS if "tolerance" in there else "images category"
    # one that is named has to be there
    more = [x for x in ours.split() if x in there or getattr(asked, "column_" + x) != x]
    if "images" not in more:
        if "image" in there:
            raise common.UserError("a set has a column 'image': give --column-images image")
        common.say(f"{name} has no column 'images', but {there}: its questions are text alone")
    names = " ".join(["problem answer", *more])
    return label, common.load_rows(asked, processor, {"": context}, names, args.rows, OURS)


# =============================================================================================== answers
@dataclass
class Job:
    """Questions start .. stop of a set, each answered greedily or several times; the file is whole or not there."""

    name: str
    rows: object
    start: int
    stop: int
    samples: int  # 0: greedy
    file: Path


def jobs_of(sets: dict, args: Args, folder: Path) -> list[Job]:
    """All work, in batches that do not depend on the number of ranks."""
    jobs = []
    for n in [0] * args.greedy + [args.samples] * (args.samples > 0):
        size = max(1, args.rollout_batch // max(1, n))
        for number, (name, rows) in enumerate(sets.items()):
            for start in range(0, len(rows), size):
                file = folder / f"{number:03}-{n}-{start:07}.jsonl"
                jobs.append(Job(name, rows, start, min(start + size, len(rows)), n, file))
    return jobs


def answer(jobs: list[Job], engine, context: Callable, args: Args):
    """Write what the model says to the questions of these jobs, which have equally many samples."""
    rows = [job.rows[i] for job in jobs for i in range(job.start, job.stop)]
    n = jobs[0].samples
    asked = SimpleNamespace(group=n, seed=args.seed)
    samples = iter(common.sample_responses(engine, rows, {"": context}, asked, greedy=n == 0))
    for job in jobs:
        lines = []
        for i in range((job.stop - job.start) * max(1, n)):
            s = next(samples)
            record = s.row | {
                "set": job.name,
                "row": s.row["index"],
                "sample": i % n if n else None,
                "prompt": engine.processor.render(context(s.row)),
                "images": [f"{image.width} x {image.height}" for image in s.row["images"]],
                "response": s.response.text,
                "finished": s.response.finished,
            }
            del record["index"]
            lines.append(json.dumps(record | rules.judge(record), ensure_ascii=False))
        common.replace_text(job.file, "".join(f"{line}\n" for line in lines))


def parts_of(jobs: list[Job], args: Args) -> list[list[Job]]:
    """Jobs that are handed over together: one, but to vLLM, which fills the place of an answer that has ended, many."""
    size = 16 if args.engine == "vllm" else 1
    parts = []
    for n in sorted({job.samples for job in jobs}):
        same = [job for job in jobs if job.samples == n]
        parts += [same[i : i + size] for i in range(0, len(same), size)]
    return parts


def answer_all(pending: list[Job], processor, context: Callable, args: Args):
    """Every rank takes its share; the first waits for the others."""
    engine = common.ENGINES[args.engine](args.model, processor, args)
    if args.calls:
        engine = reopold.Turns(engine, args)
    mine = parts_of(pending[common.rank() :: common.world_size()], args)
    for jobs in tqdm(mine, "answering", disable=common.rank() > 0):
        answer(jobs, engine, context, args)
    engine.close()
    common.all_gather_object("answered")


# =============================================================================================== results
def score(folder: Path, records: list[dict], ks: list[int]):
    """Write answers.jsonl and results.json, and print the table."""
    found = scores.results(records, ks)
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    common.replace_text(folder / "answers.jsonl", "".join(f"{line}\n" for line in lines))
    common.replace_text(folder / "results.json", json.dumps(found, indent=2) + "\n")
    common.say(f"{scores.table(found)}\nwritten to {folder}/results.json and answers.jsonl")


def rescore(folder: Path, ks: list[int]):
    """Judge the answers of a finished evaluation anew."""
    file = folder / "answers.jsonl"
    if not file.exists():
        raise common.UserError(f"{file} is not there: no evaluation has been finished there")
    records, changed = {}, 0
    for n, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            record = json.loads(line)
            verdict = rules.judge(record)
            changed += verdict["right"] != record["right"]
            records[record["set"], record["row"], record["sample"]] = record | verdict
        except (ValueError, LookupError, TypeError, AttributeError) as e:  # written there by hand
            raise common.UserError(
                f"line {n} of {file} is no answer ({e!r:.200}): mend it, or take it out. Nothing was changed"
            )
    common.say(f"{changed} of {len(records)} verdicts changed")
    score(folder, list(records.values()), ks)


# =============================================================================================== main
def check(args: Args):
    """Refuse what nothing could be made of."""
    if not (args.model and args.sets and args.prompt and args.greedy + args.samples):
        raise common.UserError(
            "give --model, --prompt and --sets, or a --protocol that has the last two; and without --greedy or "
            "--samples nothing is to be answered"
        )
    scores.check_ks(args.k, args.samples)
    if bool(args.calls) != (args.prompt == "reopold-tools"):
        raise common.UserError("--calls N and --prompt reopold-tools go together")


def load_sets(args: Args, processor, context: Callable, folder: Path) -> dict:
    sets = {}
    for name in args.sets:
        label, rows = load_set(name, args, processor, context, folder)
        if label in sets:
            raise common.UserError(f"--sets has {label} twice")
        sets[label] = rows
    return sets


def begin(run: common.Run, sets: dict, context: Callable):
    """Stop where the folder holds answers of other rows, prompts, weights or batches; else note them there."""
    # of a hub name there are none; template and config count as weights do
    files = []
    for kind in ("safetensors", "json", "jinja"):
        files += Path(common.locate(run.args.model)).glob(f"*.{kind}")
    first, *_ = sets.values()
    run.settings |= {
        "rows of sets": common.seed_of(*map(common.texts_of, sets.values())),
        "first question": context(first[0]).messages,
        "weights": sorted(f"{x.name} {x.stat().st_mtime_ns}" for x in files),
        "batch": run.args.rollout_batch,
    }
    if common.rank() == 0:
        run.check_same()
        common.replace_text(run.path / "args.json", json.dumps(run.settings, indent=2))


def main():
    args = common.parse_args(Args, protocols.PROTOCOLS, RANGES, flag="protocol")
    if args.rescore:
        return rescore(Path(args.rescore), args.k)
    args.sets = args.sets or benchmarks.of_protocol(args.protocol)
    check(args)
    context = protocols.prompt_of(args.prompt)
    run = common.Run("evaluate", args)
    processor = common.Processor(args.model, args)
    if not processor.tokenizer.chat_template:
        raise common.UserError(f"the model {args.model!r} has no chat template to ask it with")
    sets = load_sets(args, processor, context, run.path / "sets")
    begin(run, sets, context)
    jobs = jobs_of(sets, args, run.path / "answers")
    done = (run.path / "answers.jsonl").exists()
    pending = [job for job in jobs if not done and not job.file.exists()]
    common.all_gather_object("all ranks have seen the same files")
    common.say(f"{len(pending)} of {len(jobs)} batches are to be answered, in {run.path}")
    if pending:
        (run.path / "answers").mkdir(exist_ok=True)
        answer_all(pending, processor, context, args)
    if common.rank() > 0:
        return
    if done:
        return rescore(run.path, args.k)
    lines = [line for job in jobs for line in common.whole_lines(job.file)]
    score(run.path, list(map(json.loads, lines)), args.k)
    shutil.rmtree(run.path / "answers")


if __name__ == "__main__":
    common.launch(main)
