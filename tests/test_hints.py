"""Hints for PTD-PO: the check on planted spoilers, and the real script with an endpoint and with a checkpoint."""

import http.server
import json
import threading
import time

import pytest
from conftest import run_here, run_script

import common
from tools import hints
from tools.hint_check import hint_fault

LOOK = "Look: the two rows of dots on the left; ignore the"
GOOD = f"""{LOOK} shaded box beside them.
Think: count each row, then add the rows; do not count a dot twice."""
PLAIN = GOOD.replace("the two rows", "the rows").replace("twice", "again")
SPOILED = {
    "form": "Count the dots in both rows and add them up without counting one twice.",
    "evidence": "Look: dots.\nThink: count each row, then add the rows; do not count a dot twice.",
    "solution": """Look: the two rows of dots on the left.
Think: there are forty dots in the upper row and seven below, so add them.""",
    "answer": f"{LOOK} box.\nThink: the rows have 47 dots together.",
    "number": f"{LOOK} box.\nThink: add the 7 of the lower row to the upper row.",
}


@pytest.mark.parametrize("fault", SPOILED)
def test_a_planted_spoiler_is_rejected(fault):
    row = {
        "problem": "<image>How many dots are there in the 2 rows?",
        "answer": "47",
        "images": [],
        "solution": "There are forty dots in the upper row and seven below: 40 + 7 = 47.",
    }
    assert hint_fault(SPOILED[fault], row) == fault
    assert hint_fault(GOOD, row) is None
    with_a_number_of_the_question = GOOD.replace("the two rows", "the 2 rows")
    assert hint_fault(with_a_number_of_the_question, row) is None


def fault(last: str, problem: str, answer: str, solution: str = "") -> str | None:
    row = {"problem": problem, "answer": answer, "solution": solution}
    return hint_fault(f"{GOOD} {last}", row)


def test_each_of_several_right_answers_is_a_spoiler():
    answers = ["a cone", "a cube"]
    for spoiler in ("It is a cube.", "It is a cone."):
        assert fault(spoiler, "What is it?", answers) == "answer"
    assert fault("It is a ball.", "What is it?", answers) is None


def test_a_planted_option_is_rejected():
    problem = "Which is it? (A) a red ball (B) a blue cone (C) a cube\nAnswer with the letter."
    for answer in ("B", "(B)", "\\boxed{B}", "B. a blue cone"):
        for spoiler in (
            "Take option B.",
            "The answer is B.",
            "It is (B).",
            "Choose B.",
            "Pick B: it fits.",
            "The answer: B",
            "The correct one is B.",
            "So option b.",
            "Option **B**.",
            "The letter B fits.",
            "Compare it with a blue cone.",
        ):
            assert fault(spoiler, problem, answer) == "option", (spoiler, answer)
        for good in (
            "A ball is no cone.",
            "Compare the angle at A with the angle at B.",
            "Choose a side.",
        ):
            assert fault(good, problem, answer) is None, (good, answer)
    assert (
        fault("Find the cube.", problem, "C") is None
        and fault("It is a cube.", problem, "C") == "option"
    )
    lengths = "There is an angle at point B. Find the length of AC. A. 5 B. 6"
    assert fault("Find the length of AC.", lengths, "B") is None
    assert fault("The side is 6.", lengths, "B") == "option"


GUISES = {
    "47": ["So 47 remain.", "So forty-seven remain.", "So 47.0 remain."],
    "3": ["There are three of them."],
    "21": ["There are twenty-one of them."],
    "\\boxed{7}": ["So the answer is 7."],
    "\\text{Yes}": ["The answer is yes."],
    "8 cm": ["The height is 8.", "It is 8 cm."],
    "\\frac{1}{2}": ["It is 1/2.", "It is 0.5.", "It is \\frac{1}{2}."],
    "2\\sqrt{3}": ["It is 2√3.", "It is $2\\sqrt{3}$."],
    "1,200": ["It is 1200."],
    "a cone": ["It is a cone."],
}


@pytest.mark.parametrize("answer, spoilers", GUISES.items())
def test_a_planted_answer_is_rejected_in_every_guise(answer, spoilers):
    for spoiler in spoilers:
        assert fault(spoiler, "How much is it?", answer) == "answer", spoiler


def test_good_hints_pass():
    full = "How many of the 2 rows are full?"
    assert fault("Look at the 2 rows.", full, "2") is None
    assert (
        fault("Look at the 2 of them.", full, "2") is None
    )  # the word before it is the question's
    assert fault("Look at all 2 rows.", full, "2") is None  # or the one behind
    assert fault("So 2.", full, "2") == "answer"
    assert fault("There is no gap.", "Is it closed?", "No") is None
    assert fault("The answer: no.", "Is it closed?", "No") == "answer"
    sum_of_products = "5 * 2 + 1 * 2 = 12"
    assert fault("1. Count. 2. Add. 3. Check.", "How many?", "12", sum_of_products) is None
    assert fault("1. Count. 2. Add 5.", "How many?", "12", sum_of_products) == "number"
    assert fault("Take 3 steps.", "How far?", "3.5 km") is None
    assert fault("It is 12 steps.", "How far?", "3.5 km") == "number"
    assert fault("It is 3.5 km.", "How far?", "3.5 km") == "answer"


ENDLESS = ["Look:" + "\n" * 50_000 + "x", "Look: " + "a " * 25_000, "Look: Think: " * 5_000]


@pytest.mark.parametrize("hint", ENDLESS, ids=("lines", "words", "labels"))
def test_the_form_of_an_endless_hint_is_seen_at_once(hint):
    start = time.perf_counter()
    assert hint_fault(hint, {"problem": "How many?", "answer": "4"}) == "form"
    assert time.perf_counter() - start < 2


def test_a_hint_that_was_cut_off_is_rejected():
    assert (
        hint_fault(GOOD[:-20], {"problem": "How many?", "answer": "4"}, finished=False) == "cut off"
    )


def test_a_copied_run_of_the_solution_is_one():
    solution = "first count the dots above the line and then those below it"
    copied = "Now count the dots above the line and then those below."
    assert fault(copied, "How many?", "a lot", solution) == "solution"
    assert (
        fault(copied, f"How many? {solution}", "a lot", solution) is None
    )  # the question has them too
    assert fault("Now count the dots above the line.", "How many?", "a lot", solution) is None


# ----------------------------------------------------------------------------------------------- real runs
class Server:
    """An endpoint that speaks the protocol. reply: fn(body, number of the request) -> bytes, an HTTP status, or None:
    the connection is cut off in the middle of an answer."""

    def __init__(self, reply):
        self.seen, self.keys = [], []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(handler):
                body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
                self.seen.append(body)
                self.keys.append(handler.headers["Authorization"])
                answer = reply(body, len(self.seen))
                if answer is None:
                    return handler.connection.close()
                status, data = (200, answer) if isinstance(answer, bytes) else answer
                handler.send_response(status)
                handler.send_header("Content-Type", "application/json")
                handler.end_headers()
                handler.wfile.write(data)

            def log_message(handler, *_):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()


def said_by(text: str, reason: str = "stop") -> bytes:
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": reason,
    }
    return json.dumps({"id": "1", "object": "chat.completion", "choices": [choice]}).encode()


def asked_in(body: dict) -> str:
    return body["messages"][1]["content"][-1]["text"]


KEY = "sk-not-to-be-seen"


def run_hints(*argv, alone: bool = False) -> tuple[int, str]:
    """The exit status and all that it printed, without a request or the key. alone: as a process of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", KEY)
        run = run_script("-m", "tools.hints", *argv) if alone else run_here("tools.hints", *argv)
    said = run.stdout + run.stderr
    assert KEY not in said and "for you alone" not in said and "Traceback" not in said, said
    return run.returncode, said


def sometimes(body: dict, number: int):
    """The first hint for a row with an odd answer spoils it; some requests meet an overload, or are cut off."""
    if number % 5 == 1:
        return 503, b"{}"
    if number % 7 == 2:
        return None
    answer = asked_in(body).split("for you alone: ")[1].split("\n")[0]
    spoil = answer in "13579" and "rejected" not in asked_in(body)
    return said_by(f"<think>hm</think>{PLAIN}" + (f" It is {answer}." if spoil else ""))


def written(folder) -> dict:
    import datasets

    file = str(folder / "rows.parquet")
    mode = "force_redownload"
    return datasets.load_dataset("parquet", data_files=file, split="train", download_mode=mode)


@pytest.fixture(scope="module")
def hinted(tiny, tmp_path_factory):
    """An endpoint, the flags of a start with it, their folder, and what the first such start printed."""
    folder = tmp_path_factory.mktemp("hints")
    with Server(sometimes) as server:
        argv = ["--data", tiny / "rows.parquet", "--output", folder, "--endpoint", server.url]
        status, said = run_hints(*argv, "--model", "any", alone=True)
        assert status == 0, said
        yield server, argv, folder, said


def test_an_endpoint_writes_hints(hinted):
    server, _, folder, said = hinted
    data = written(folder)
    odd = sum(answer in "13579" for answer in data["answer"])
    assert len(data) == 24 and set(data["hint"]) == {PLAIN} and 0 < odd < 24
    assert f"{24 - odd} kept at once, {odd} after writing anew, 0 dropped" in said
    for body in server.seen:
        url = body["messages"][1]["content"][0]["image_url"]["url"]
        assert url.startswith("data:image/png;base64,") and body["max_tokens"] == 16384
    assert set(server.keys) == {f"Bearer {KEY}"}


def test_a_start_goes_on_where_the_last_one_stopped(hinted, tiny, tmp_path):
    server, argv, folder, _ = hinted
    file, before = folder / "hints.jsonl", len(server.seen)
    lines = [line for line in file.read_text().splitlines() if json.loads(line)["hint"]]
    killed = "".join(f"{line}\n" for line in lines[:9]) + lines[9][:20]  # in the middle of a line
    file.write_text(killed)
    status, said = run_hints(*argv, "--model", "any")
    assert status == 0 and "9 of them written before" in said, said
    assert 15 <= len(server.seen) - before < 60
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert sum(bool(record["hint"]) for record in records) == 24

    # Dropped by the first model: the next start, here with another, tries it again.
    last = {record["row"]: record for record in records}
    last[3] |= {"hint": "", "faults": ["form"]}
    file.write_text("".join(json.dumps(record) + "\n" for record in last.values()))
    status, said = run_hints(*argv, "--model", "another")
    assert status == 0 and "23 of them written before" in said, said
    assert set(written(folder)["hint"]) == {PLAIN}
    assert json.loads(file.read_text().splitlines()[-1])["model"] == "another"
    assert "rejected: it has to be a line" in asked_in(server.seen[-1])

    others = tmp_path / "others.parquet"
    others.write_bytes((tiny / "rows.parquet").read_bytes())
    status, said = run_hints(*argv, "--model", "any", "--data", others)
    assert status != 0 and "choose another --output" in said


@pytest.fixture
def asked(tmp_path):
    """fn(reply) -> status and words of a start on three rows with an endpoint that replies so, and its records."""
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    data = tmp_path / "rows.jsonl"
    with open(data, "w") as f:
        for name in ("one", "two", "three"):
            row = {"problem": name, "images": "picture.png", "answer": f"Zürich {name}"}
            f.write(json.dumps(row) + "\n")

    def run(reply):
        with Server(reply) as server:
            argv = ["--data", data, "--output", tmp_path / "hints", "--endpoint", server.url]
            status, said = run_hints(*argv, "--model", "any", "--attempts", 0)
        assert "Zürich" not in said and "Z\\u00fcrich" not in said, said
        lines = (tmp_path / "hints" / "hints.jsonl").read_text().splitlines()
        return status, said, {r["row"]: r for r in map(json.loads, lines)}

    return run


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_request_costs_one_row_and_is_not_quoted(asked, status):
    def reply(body, number):
        if "two" in asked_in(body):
            return status, json.dumps({"error": {"message": f"not: {asked_in(body)}"}}).encode()
        return said_by(PLAIN, "length" if "three" in asked_in(body) else "stop")

    code, said, records = asked(reply)
    assert code == 0 and said.count("refused one request") == 1
    assert records[0]["hint"] == PLAIN and records[0]["faults"] == []
    assert [records[i]["faults"] for i in (1, 2)] == [["refused"], ["cut off"]]
    assert "1 kept at once, 0 after writing anew, 2 dropped" in said


@pytest.mark.parametrize("status, kind", [(401, "AuthenticationError"), (404, "NotFoundError")])
def test_a_wrong_key_or_address_stops(asked, status, kind):
    def reply(body, number):
        return status, json.dumps({"error": {"message": f"{KEY}: {asked_in(body)}"}}).encode()

    code, said, records = asked(reply)
    assert code != 0 and f"does not answer as it should ({kind})" in said and records == {}


NONSENSE = [
    b'{"choices": null}',
    b"[]",
    b'{"choices": []}',
    b'{"choices": [{"message": null}]}',
    b'{"choices": [{"message": {"content": [1]}}]}',
    '{"said": "The answer, for you alone: Zürich"}'.encode("latin-1"),
    b"<html>",
    b"[" * 200_000,
]


@pytest.mark.parametrize("body", NONSENSE, ids=range(len(NONSENSE)))
def test_nonsense_is_named_and_not_quoted(body, capsys):
    with Server(lambda *_: body) as server:
        writer = hints.Endpoint(hints.Args(data="", model="any", endpoint=server.url))
        row = {"problem": "Where?", "answer": "Zürich", "images": []}
        with pytest.raises(common.UserError, match="does not answer as it should") as error:
            list(writer.answers([row], {0: []}))
    said = error.value.message + capsys.readouterr().err
    assert "Zürich" not in said and "alone" not in said


def test_a_checkpoint_whose_hints_have_no_form_gets_none_kept(tiny, tmp_path):
    """An untrained model: every row is asked again, dropped and counted."""
    argv = [
        "--data",
        tiny / "rows.parquet",
        "--model",
        tiny / "student",
        "--output",
        tmp_path / "hints",
    ]
    status, said = run_hints(*argv, "--attempts", 1, "--max-response", 8, "--rollout-batch", 10)
    assert status == 0, said
    assert "0 kept at once, 0 after writing anew, 24 dropped" in said
    lines = [
        json.loads(line) for line in (tmp_path / "hints" / "hints.jsonl").read_text().splitlines()
    ]
    assert len(lines) == 48 and {len(line["faults"]) for line in lines} == {1, 2}
    assert {fault for line in lines for fault in line["faults"]} <= {"cut off", "form"}


def test_what_a_checkpoint_cannot_be_shown_is_named(tiny, tmp_path):
    from PIL import Image

    Image.new("RGB", (64 * 250, 64)).save(tmp_path / "long.png")
    row = {"problem": "How many?", "images": "long.png", "answer": "4"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    argv = ["--data", tmp_path / "rows.jsonl", "--output", tmp_path / "hints", "--model"]
    for model, why in (("student", "aspect ratio"), ("text-only", "shows 0 of")):
        status, said = run_hints(*argv, tiny / model)
        assert status != 0 and why in said, said
