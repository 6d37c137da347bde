"""Hints for PTD-PO: a model of yours writes one for every row, and a check keeps out those that give the answer away.

    python -m tools.hints --data rows.parquet --model Qwen/Qwen3-VL-8B-Thinking --output runs/hints
    python -m tools.hints --data rows.parquet --model a-name --endpoint http://localhost:8000/v1 --output runs/hints
    python ptdpo.py --preset 2b --data runs/hints/rows.parquet

The model is shown image, question and answer, and the paper's three rules in our words (its hints and prompts are not
released): name the visual evidence, name the steps, give nothing away. A hint that breaks one of them (hint_check.py)
is written anew, with the reason; after --attempts of that the row keeps an empty hint, and PTD-PO does not tutor it.

--output holds hints.jsonl, a line for each answer, and at the end rows.parquet: --data with a hint column (where it
names images by relative paths, move it beside --data). A start that finds hints goes on with the rows that have none,
also with another --model: the paper has a larger one for hard rows.

An endpoint's key is that of the environment variable OPENAI_API_KEY. What goes wrong there is told by its kind alone:
an error's text may quote the request, which holds a row's answer.
"""

import base64
import io
import json
import os
import sys
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import common
from tools.hint_check import FAULTS, hint_fault


# =============================================================================================== settings
@dataclass
class Args:
    data: str  # rows: .parquet, .json, .jsonl, .csv, a folder, or a hub name
    model: str  # checkpoint that writes the hints, or the name of the one that --endpoint serves
    endpoint: str = ""  # URL of an OpenAI-compatible endpoint (.../v1); its key: OPENAI_API_KEY
    output: str = "runs/hints"  # folder of hints.jsonl and rows.parquet
    attempts: int = 3  # times a hint is written anew after the check rejected it
    max_response: int = 16384  # longest answer in tokens, thinking included (the paper's budget)
    max_prompt: int = 8192  # longest prompt in tokens, image tokens included; not of an endpoint
    engine: Literal["hf", "vllm"] = "hf"  # who generates, without an endpoint
    rollout_batch: int = 64  # hints that are written at once
    vllm_memory: float = 0.8  # share of a GPU's memory that vLLM may hold, weights included
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the engine
    temperature: float = 1.0  # of the engine's sampling
    top_p: float = 1.0  # nucleus sampling; 1 = off
    top_k: int = 0  # sample among the k likeliest tokens; 0 = off
    seed: int = 0  # of the engine's sampling
    data_split: str = "train"  # which split of data
    skip_bad_rows: bool = False  # leave out rows that cannot be used, instead of stopping
    column_problem: str = "problem"  # column with the question
    column_images: str = "images"  # column with the image, or the list of images
    column_answer: str = "answer"  # column with the answer, or the list of right ones
    column_solution: str = "solution"  # column with the worked solution; read where it is there
    column_hint: str = "hint"  # column to be written


# =============================================================================================== writing
RULES = """
You write a hint for a student who sees the image and the question, and does not know the answer. You know it.
Two lines, in this form, 20 to 120 words in all, as short commands:
Look: where in the image the evidence is, what belongs together, and what there is a distraction to be ignored.
Think: the steps from that evidence to the answer, in order, and the trap in them.
Be right: following the hint leads to the given answer. Give nothing away: not the answer, not its letter or its name,
no number that has to be read off or worked out. Do not solve the question.""".lstrip()


def hint_prompt(row: dict, faults: list[str] = ()) -> common.Context:
    """(I, q, a*): what the writer is shown. faults: why its earlier hints for this row were rejected."""
    answers = " or ".join(common.all_answers(row["answer"]))
    text = f"{row['problem']}\n\nThe answer, for you alone: {answers}"
    if faults:
        text += f"\n\nYour last hint was rejected: {FAULTS[faults[-1]]}."
    turns = [common.message("system", RULES), common.message("user", text, len(row["images"]))]
    return common.Context(turns, row["images"])


class Checkpoint:
    """Writes hints with the engine that rolls out answers in training."""

    def __init__(self, args: Args, processor: common.Processor):
        self.engine, self.args = common.ENGINES[args.engine](args.model, processor, args), args

    def answers(self, rows, faults: dict[int, list]):
        """Yields (i, response) for the rows i that `faults` has, as they come; see hint_prompt."""
        numbers, size = list(faults), self.args.rollout_batch
        for batch in (numbers[at : at + size] for at in range(0, len(numbers), size)):
            contexts = [hint_prompt(rows[i], faults[i]) for i in batch]
            prompts = [self.engine.processor.encode(context) for context in contexts]
            seeds = [common.seed_of(self.args.seed, i, len(faults[i])) for i in batch]
            yield from zip(batch, self.engine.generate(prompts, seeds))


class Endpoint:
    """Writes hints by requests, eight at a time, each repeated for about a minute where the endpoint is overloaded."""

    def __init__(self, args: Args):
        from openai import OpenAI

        key = os.environ.get("OPENAI_API_KEY") or "none"
        self.client = OpenAI(base_url=args.endpoint, api_key=key, max_retries=10, timeout=1800)
        self.args = args

    def answers(self, rows, faults: dict[int, list]):
        """See Checkpoint.answers. Raises UserError where the endpoint does not work."""
        with ThreadPoolExecutor(8) as pool:
            try:
                futures = {pool.submit(self.ask, rows, i, faults[i]): i for i in faults}
                for future in as_completed(futures):
                    yield futures[future], future.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)  # at an error, or Ctrl-C

    def ask(self, rows, i: int, faults: list[str]) -> common.Response:
        """The text is None where the endpoint refuses this request alone."""
        context = hint_prompt(rows[i], faults)
        images = iter(context.images)
        for turn in context.messages:
            for part in turn["content"]:
                if part["type"] == "image":
                    part.update(type="image_url", image_url={"url": as_data_url(next(images))})
        try:
            reply = self.client.chat.completions.create(
                model=self.args.model,
                messages=context.messages,
                max_tokens=self.args.max_response,
            )
            choice = reply.choices[0]
            text = str.strip(choice.message.content or "")
            return common.Response([], choice.finish_reason != "length", text)
        except Exception as e:  # the client's own, and whatever an answer that is none leads to
            kind, status = type(e).__name__, getattr(e, "status_code", None)
        if status in (400, 413, 422):
            print(f"--endpoint refused one request: {kind}", file=sys.stderr)
            return common.Response([], text=None)
        raise common.UserError(
            f"--endpoint does not answer as it should ({kind}). Look at its log, at the address, at --model and at "
            "OPENAI_API_KEY. What was written so far is kept: start again when it does"
        )


def as_data_url(image) -> str:
    """PIL image -> data:image/png;base64,..."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def judged(row: dict, faults: list[str], response: common.Response) -> dict:
    """A row's record: its hint, or "", and the faults of all that were rejected."""
    hint = (response.text or "").rpartition("</think>")[2].strip()
    fault = hint_fault(hint, row, response.finished)
    if response.text is None:
        fault = "refused"
    if fault:
        hint, faults = "", [*faults, fault]
    return {"row": row["index"], "hint": hint, "faults": faults}


# =============================================================================================== main
def earlier_records(file: Path, data: str) -> dict[int, dict]:
    """The last record of each row that earlier starts wrote; the half line of one that was killed goes."""
    records = defaultdict(lambda: {"hint": "", "faults": []})
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = common.whole_lines(file) if file.exists() else []
    for record in map(json.loads, lines):
        records[record["row"]] = record
        if record["data"] != data:
            raise common.UserError(
                f"{file} has hints for {record['data']}: choose another --output"
            )
    common.replace_text(file, "".join(f"{line}\n" for line in lines))
    return records


def load(args: Args) -> tuple:
    """The rows, and who writes their hints."""
    names = "problem images answer"
    if args.column_solution in common.load_data(args.data, args.data_split).column_names:
        names += " solution"
    if args.endpoint:
        return common.load_rows(args, None, {}, names, optional="solution"), Endpoint(args)
    processor = common.Processor(args.model)
    rows = common.load_rows(args, processor, {"hint": hint_prompt}, names, optional="solution")
    return rows, Checkpoint(args, processor)


def main():
    import tyro
    from tqdm import tqdm

    args = tyro.cli(Args)
    file, data = Path(args.output, "hints.jsonl"), f"{args.data}, {args.data_split}"
    records = earlier_records(file, data)
    rows, writer = load(args)
    kept = list(rows["index"])  # their numbers in the data
    before = sum(bool(records[row]["hint"]) for row in kept)
    print(f"hints for {len(kept)} rows, {before} of them written before; {file}")
    for _ in range(1 + args.attempts):
        faults = {}  # of the rows that have no hint yet
        for i, row in enumerate(kept):
            if not records[row]["hint"]:
                faults[i] = records[row]["faults"]
        for i, response in tqdm(writer.answers(rows, faults), "hints", len(faults)):
            record = judged(rows[i], faults[i], response) | {"model": args.model, "data": data}
            records[kept[i]] = record
            with open(file, "a") as f:
                f.write(json.dumps(record) + "\n")
    write_table(records, kept, args)


def write_table(records: dict[int, dict], kept: list[int], args: Args):
    """rows.parquet, and how many hints were rejected."""
    path = Path(args.output, "rows.parquet")
    table = common.load_data(args.data, args.data_split).select(kept)
    if args.column_hint in table.column_names:
        table = table.remove_columns(args.column_hint)
    hints = [records[row]["hint"] for row in kept]
    table.add_column(args.column_hint, hints).to_parquet(path)
    found = [records[row] for row in kept if records[row]["hint"]]
    anew = sum(bool(record["faults"]) for record in found)
    rejected = Counter(fault for row in kept for fault in records[row]["faults"])
    print(
        f"{len(found) - anew} kept at once, {anew} after writing anew, {len(kept) - len(found)} dropped (empty hint); "
        f"rejected: {dict(rejected)}\nwritten to {path}"
    )


if __name__ == "__main__":
    common.launch(main)
