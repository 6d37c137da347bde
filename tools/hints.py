"""Hints for PTD-PO: a model of yours writes one for every row, and a check keeps out those that give the answer away.

    python -m tools.hints --data rows.parquet --model Qwen/Qwen3-VL-8B-Thinking --output runs/hints
    python -m tools.hints --data rows.parquet --model a-name --endpoint http://localhost:8000/v1 --output runs/hints
    python ptdpo.py --preset 2b --data runs/hints/rows.parquet

The model is shown image, question and answer, and the paper's three rules in our words (its hints and prompts are not
released): name the visual evidence, name the steps, give nothing away. A hint that breaks one of them (hint_check.py)
is written anew, with the reason; after --attempts of that the row keeps an empty hint, and PTD-PO does not tutor it.

--output holds hints.jsonl, a line for each answer, written as it comes (a checkpoint's: batch by batch), and at the end
rows.parquet: --data with a hint column (where it names images by relative paths, move it beside --data). A start that
finds hints goes on with the rows that have none, also with another --model: the paper has a larger one for hard rows.

An endpoint's key is that of the environment variable OPENAI_API_KEY. A request that fails for reasons of its own is
recorded, and its row is passed over until the next start; what every request would meet stops the job. Both are told
by their kind alone: an error's text may quote the request, which holds a row's answer, or the key.
"""

import asyncio
import base64
import hashlib
import io
import json
import os
import re
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import common
from tools.hint_check import FAULTS, hint_fault, hint_of, of_hints

import openai
from tqdm import tqdm


# =============================================================================================== settings
@dataclass
class Args:
    data: str  # rows: .parquet, .json, .jsonl, .csv, a folder, or a hub name
    model: str  # checkpoint that writes the hints, or the name of the one that --endpoint serves
    endpoint: str = ""  # URL of an OpenAI-compatible endpoint (.../v1); its key: OPENAI_API_KEY
    requests: int = 8  # requests at once, of an endpoint
    timeout: float = 1800  # seconds after which a request is given up, its repeats included
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
    image_root: str = ""  # folder where relative paths of images begin; empty: that of the data
    skip_bad_rows: bool = False  # leave out rows that cannot be used, instead of stopping
    column_problem: str = "problem"  # column with the question
    column_images: str = "images"  # column with the image, or the list of images
    column_answer: str = "answer"  # column with the answer, or the list of right ones
    column_solution: str = "solution"  # column with the worked solution; read where it is there
    column_hint: str = "hint"  # column to be written


# =============================================================================================== writing
RULES = """\
You write a hint for a student who sees the image and the question, and does not know the answer. You know it.
Two lines, in this form, 20 to 120 words in all, as short commands:
Look: where in the image the evidence is, what belongs together, and what there is a distraction to be ignored.
Think: the steps from that evidence to the answer, in order, and the trap in them.
Be right: following the hint leads to the given answer. Give nothing away: not the answer, not its letter or its name,
no number that has to be read off or worked out. Do not solve the question."""


def hint_prompt(row: dict, faults: list[str] = ()) -> common.Context:
    """(I, q, a*): what the writer is shown. faults: of its earlier hints and requests for this row."""
    answers = " or ".join(common.all_answers(row["answer"]))
    text = f"{row['problem']}\n\nThe answer, for you alone: {answers}"
    rejected = of_hints(faults)
    if rejected:
        text += f"\n\nYour last hint was rejected: {FAULTS[rejected[-1]]}."
    turns = [common.message("system", RULES), common.message("user", text, len(row["images"]))]
    return common.Context(turns, row["images"])


class Checkpoint:
    """Writes hints with the engine that rolls out answers in training."""

    def __init__(self, args: Args, processor: common.Processor):
        self.engine, self.args = common.ENGINES[args.engine](args.model, processor, args), args

    def write(self, rows, faults: dict[int, list], keep):
        """Calls keep(row, response) for the rows i that `faults` has, as they come; see hint_prompt."""
        numbers, size = list(faults), self.args.rollout_batch
        for at in tqdm(range(0, len(numbers), size), "batches of hints"):
            batch = {i: rows[i] for i in numbers[at : at + size]}
            prompts = [
                self.engine.processor.encode(hint_prompt(row, faults[i]))
                for i, row in batch.items()
            ]
            seeds = [common.seed_of(self.args.seed, i, len(faults[i])) for i in batch]
            for row, response in zip(batch.values(), self.engine.generate(prompts, seeds)):
                keep(row, response)


RETRIES = 10  # of a request that meets an overload or a broken connection: about a minute
CONNECT = 10  # seconds to reach the endpoint
LIMIT = 4_000_000  # bytes of a reply: more than the longest answer has, and few enough for --requests of them at once


class Client(openai.DefaultAsyncHttpxClient):
    """Sends a request, with its key, to no other address, and reads no more than LIMIT bytes of any reply.

    A reply that is longer becomes one without an answer, of the same status. None is unpacked: that could make a
    thousand times as much of it.
    """

    async def send(self, request, **options):
        request.headers["Accept-Encoding"] = "identity"
        reply = await super().send(request, **options | {"stream": True})
        body = bytearray()
        async for part in reply.aiter_raw():
            body += part
            if len(body) > LIMIT:
                body = b"{}"
                break
        await reply.aclose()
        reply.headers.pop("Content-Encoding", None)
        return type(reply)(
            reply.status_code, headers=reply.headers, content=bytes(body), request=request
        )


class Endpoint:
    """Writes hints by requests, --requests at a time. The client repeats them, and waits as Retry-After says."""

    def __init__(self, args: Args):
        if args.requests < 1 or not 0 < args.timeout < 1e6:
            raise common.UserError(
                f"--requests is {args.requests} and --timeout {args.timeout:g}: they have to be at least one request, "
                "and more than 0 and less than 1e6 seconds"
            )
        if not args.endpoint.startswith(("http://", "https://")):
            raise common.UserError("--endpoint has to begin with http:// or https://")
        self.args, self.key = args, os.environ.get("OPENAI_API_KEY") or "none"
        if not re.fullmatch("[!-~]+", self.key):
            raise common.UserError(
                "the environment variable OPENAI_API_KEY holds a blank, a line's end (as in a file from Windows) or "
                "another character that no key has: set it anew, without"
            )

    def write(self, rows, faults: dict[int, list], keep):
        """See Checkpoint.write; keep(row, None, fault) where a request failed. UserError where all of them would."""
        try:
            asyncio.run(self.write_all(rows, faults, keep))
        except EndpointError as e:
            raise common.UserError(
                f"--endpoint does not answer as it should ({e}). Look at its log, at the address, at --model and at "
                "OPENAI_API_KEY; it is not followed to another address, and compressed replies are not read. What was "
                "written so far is kept: start again when it does"
            )

    async def write_all(self, rows, faults, keep):
        client = openai.AsyncOpenAI(
            base_url=self.args.endpoint,
            api_key=self.key,
            max_retries=RETRIES,
            timeout=openai.Timeout(None, connect=CONNECT),  # the whole request's is in ask()
            http_client=Client(follow_redirects=False),
        )
        waiting = iter(tqdm(faults, "hints"))  # each task takes its next row from here

        async def write_some():
            for i in waiting:
                row = rows[i]
                keep(row, *await self.ask(client, row, faults[i]))

        async with client:
            tasks = [asyncio.create_task(write_some()) for _ in range(self.args.requests)]
            try:
                await asyncio.gather(*tasks)
            finally:  # after an error of one of them the others' requests are dropped, not awaited
                for task in tasks:
                    task.cancel()

    async def ask(self, client, row: dict, faults: list[str]) -> tuple:
        """(response, ""), or (None, fault) where this request alone failed."""
        context = hint_prompt(row, faults)
        images = iter(context.images)
        for turn in context.messages:
            for part in turn["content"]:
                if part["type"] == "image":
                    part.pop("text")
                    part.update(type="image_url", image_url={"url": as_data_url(next(images))})
        request = {
            "model": self.args.model,
            "messages": context.messages,
            "max_tokens": self.args.max_response,
        }
        try:
            reply = await asyncio.wait_for(
                client.chat.completions.with_raw_response.create(**request), self.args.timeout
            )
            return as_response(reply.http_response.content), ""
        except Exception as e:  # the client's own, and whatever an answer that is none leads to
            fault = request_fault(e)
            kind = f"{type(e).__name__} {getattr(e, 'status_code', '')}".strip()
            if getattr(e, "param", None) in list(request):  # no other word of the endpoint's
                kind += f" of {e.param}"
        if not fault:
            raise EndpointError(kind)
        print(f"row {row['index']} is passed over: {FAULTS[fault]} ({kind})", file=sys.stderr)
        return None, fault


class EndpointError(Exception):
    """What every request would meet."""


class NoAnswer(Exception):
    """A reply in JSON that holds no text: some endpoints report a request's error so, with status 200."""


def as_response(body: bytes) -> common.Response:
    """The body of a reply -> its text, and whether it ended by itself."""
    choices = json.loads(body).get("choices")  # what has no get() is of no endpoint
    try:
        choice = choices[0]
        text = str.strip(choice["message"]["content"] or "")
        return common.Response([], choice.get("finish_reason") != "length", text)
    except (LookupError, TypeError):
        raise NoAnswer


def request_fault(error: Exception) -> str:
    """The fault of the request that met this error; "" for an error that every other request would meet."""
    status = getattr(error, "status_code", 0)
    if isinstance(error, asyncio.TimeoutError):
        return "timeout"
    if isinstance(error, NoAnswer) or status in (400, 413, 422):
        return "refused"
    if status in (408, 409, 429) or status >= 500:
        return "overloaded"
    # By name: the client's releases use different HTTP libraries. Not being connected at all is everyone's error.
    broken = type(error.__cause__).__name__ in ("ReadError", "WriteError", "RemoteProtocolError")
    return "disconnected" if broken else ""


def as_data_url(image) -> str:
    """PIL image -> data:image/png;base64,..."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


# =============================================================================================== main
class Records:
    """hints.jsonl, a line for each answer: {"row", "hint", "faults", "model", "data"}. A row's last line counts.

    A row without a hint has "" there. faults: of all its hints that were rejected, and of its requests that failed.
    """

    def __init__(self, args: Args, problems: list[str]):
        """Reads what earlier starts wrote; the half line of one that was killed goes."""
        self.file, self.model = Path(args.output, "hints.jsonl"), args.model
        questions = hashlib.blake2b(repr(problems).encode(), digest_size=8).hexdigest()
        self.data = f"{args.data}, {args.data_split}, questions {questions}"
        self.last = defaultdict(lambda: {"hint": "", "faults": []})  # of each row
        self.passed_over = set()  # rows whose request failed in this start
        self.lock = common.claim(self.file.parent)
        lines = common.whole_lines(self.file)
        for record in map(json.loads, lines):
            self.last[record["row"]] = record
            if record["data"] != self.data:
                raise common.UserError(
                    f"{self.file} has hints for {record['data']}, not for {self.data}: choose another --output"
                )
        common.replace_text(self.file, "".join(f"{line}\n" for line in lines))

    def waiting(self, numbers: list[int]):
        """Those of the rows with these numbers in the data that are to be asked for: i -> their faults."""
        faults = {}
        for i, number in enumerate(numbers):
            if not self.last[number]["hint"] and number not in self.passed_over:
                faults[i] = self.last[number]["faults"]
        return faults

    def keep(self, row: dict, response: common.Response | None, fault: str = ""):
        """Judge a row's answer and write its line. fault: of the request, where it failed."""
        number, hint = row["index"], ""
        if fault:
            self.passed_over.add(number)
        else:
            hint = hint_of(response.text)
            fault = hint_fault(hint, row, response.finished)
        faults = self.last[number]["faults"]
        if fault:
            hint, faults = "", [*faults, fault]
        record = self.last[number] = {
            "row": number,
            "hint": hint,
            "faults": faults,
            "model": self.model,
            "data": self.data,
        }
        with open(self.file, "a") as f:
            f.write(json.dumps(record) + "\n")


def load(args: Args) -> tuple:
    """The rows, the records of their hints, and who writes these: the slowest to load comes last."""
    names = "problem images answer"
    if args.column_solution in common.load_data(args.data, args.data_split).column_names:
        names += " solution"
    writer = Endpoint(args) if args.endpoint else None  # before the rows: it looks at the flags
    processor = None if args.endpoint else common.Processor(args.model)
    contexts = {"hint": hint_prompt} if processor else {}
    rows = common.load_rows(args, processor, contexts, names, optional="solution")
    records = Records(args, list(rows.with_format(None)[args.column_problem]))
    return rows, records, writer or Checkpoint(args, processor)


def main():
    import tyro

    args = tyro.cli(Args)
    rows, records, writer = load(args)
    numbers = list(rows.with_format(None)[" row"])  # in the data
    before = sum(bool(records.last[number]["hint"]) for number in numbers)
    print(f"hints for {len(numbers)} rows, {before} of them written before; {records.file}")
    for _ in range(1 + args.attempts):
        try:
            writer.write(rows, records.waiting(numbers), records.keep)
        except KeyboardInterrupt:
            raise common.UserError(
                "interrupted. What was written so far is kept: the same command goes on from it"
            )
        if len(records.passed_over) == len(numbers):
            raise common.UserError(
                "every request failed, see above: look at --endpoint, --model, --timeout and --max-response, and at "
                "the endpoint's log. Start again when they are mended"
            )
    write_table(records.last, numbers, args)


def write_table(records: dict[int, dict], kept: list[int], args: Args):
    """rows.parquet, and how many hints were rejected."""
    path = Path(args.output, "rows.parquet")
    table = common.load_data(args.data, args.data_split).select(kept)
    if args.column_hint in table.column_names:
        print(f"the column {args.column_hint!r} of the data is replaced")
        table = table.remove_columns(args.column_hint)
    hints = [records[row]["hint"] for row in kept]
    table.add_column(args.column_hint, hints).to_parquet(path)
    found = [records[row] for row in kept if records[row]["hint"]]
    anew = sum(bool(of_hints(record["faults"])) for record in found)
    faults = Counter(fault for row in kept for fault in records[row]["faults"])
    print(
        f"{len(found) - anew} kept at once, {anew} after writing anew, {len(kept) - len(found)} dropped (empty hint); "
        f"faults: {dict(faults)}\nwritten to {path}; it belongs beside {args.data}, where relative image paths begin"
    )


if __name__ == "__main__":
    common.launch(main)
