"""Hints for PTD-PO: the check on planted spoilers, and the real script with an endpoint and with a checkpoint."""

import decimal
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import zlib

import common
from tools import hints
from tools.hint_check import hint_fault, hint_of

import pytest
from conftest import ROOT, run_here, run_script

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


OPTIONS = "Which is it? (A) a red ball (B) a blue cone (C) a cube (D) a ring"
POINTS = f"The points B, C and D lie on a line. {OPTIONS}"


@pytest.mark.parametrize("answer", ["B", "(b)", "B. a blue cone", "a blue cone"])
@pytest.mark.parametrize(
    "spoiler",
    [
        "Take the second option.",
        "Take the 2nd of the choices.",
        "The second answer option fits.",
        "Pick the second.",
        "Choose the second one, then check.",
        "It is option two.",
        "It is option 2.",
        "Choice number two fits.",
        "B is right.",
        "b is correct.",
        "See why B must be the answer.",
        "B is the only option that fits, B looks right.",
        "The right one is B.",
        "Rule out A, C and D.",
        "Rule out options A and D, then the third option.",
    ],
)
def test_an_option_is_named_by_its_letter_or_its_place(spoiler, answer):
    assert fault(spoiler, OPTIONS, answer) == "option"
    if not spoiler.startswith("Rule out"):  # also where B is a point in the question
        assert fault(spoiler, POINTS, answer) == "option"


@pytest.mark.parametrize("spoiler", ["So B.", "B fits best.", "It leads to B.", "**B** is taller."])
def test_a_letter_alone_names_an_option_unless_the_question_has_it(spoiler):
    assert fault(spoiler, OPTIONS, "B") == "option"
    assert fault(spoiler, POINTS, "B") is None


def test_the_first_and_the_last_option_are_named():
    for spoiler in ("Take the first option.", "A is right.", "So A.", "A fits.", "Option one."):
        assert fault(spoiler, OPTIONS, "A") == "option", spoiler
    for spoiler in ("Take the last option.", "Pick the last one.", "Take the fourth choice."):
        assert fault(spoiler, OPTIONS, "D") == "option", spoiler
    assert (
        fault("Take the last option.", "Which of A to D is it?", "D") is None
    )  # D of four or five?
    for spoiler in ("A and C are right.", "Take option C.", "Look for a cube."):
        assert fault(spoiler, OPTIONS, "A, C") == "option", spoiler


@pytest.mark.parametrize("answer", "ABCD")
@pytest.mark.parametrize(
    "good",
    [
        "Choose a point.",
        "Start in the second row.",
        "Draw a line.",
        "Compare both hands.",
        "Compare the options one by one.",
        "Measure the angle at B and the side from A to C.",
        "Angle A is the largest; label the vertices B, C and D.",
        "First, options that are no solids are out.",
        "Rule out each option. Two, three or four may be left, or one.",
        "Two of the options have corners.",
        "A line leads to the first and second row, then the last one.",
        "Read the answer off; it is to the right of the box.",
    ],
)
def test_a_good_hint_names_no_option(good, answer):
    assert fault(good, OPTIONS, answer) is None


def test_points_of_the_question_are_no_options():
    for good in ("B is left of C.", "B is right of D.", "Start at B.", "D is to the right of B."):
        assert fault(good, POINTS, "B") is None, good
    assert fault("B is left of C.", OPTIONS, "B") == "option"
    assert fault("Look at point B.", "Which point is it?", "B") == "option"
    segments = "Which is longest? (A) AC (B) AB (C) BC"
    assert fault("Take the second option.", segments, "AB") == "option"
    assert fault("Take the first option.", segments, "AB") is None
    yes = "Is it closed? (A) Yes (B) No"
    assert fault("There is no gap.", yes, "B") is None
    assert fault("The answer is no.", yes, "B") == "option"
    assert fault("Rule out option A.", yes, "B") == "option"  # only B is left


GUISES = {
    "47": [
        "So 47 remain.",
        "So forty-seven remain.",
        "So 47.0 remain.",
        "So forty seven remain.",
        "So Forty  Seven remain.",
        "It is forty-seven-fold.",
    ],
    "3": ["There are three of them."],
    "20": ["There are twenty and five of them."],
    "21": ["There are twenty-one of them.", "There are twenty one of them."],
    "24": ["There are two dozen of them."],
    "200": ["There are two hundred.", "There are 2 hundred."],
    "100": ["There are a hundred.", "There are one hundred."],
    "105": ["There are one hundred and five.", "There are one hundred five."],
    "1200": ["There are twelve hundred.", "There are one thousand two hundred of them."],
    "205040": ["There are two hundred five thousand and forty of them."],
    "4500000": ["There are 4.5 million of them."],
    "7.5": ["It is seven point five."],
    "3/4": ["It is three quarters.", "It is three-quarters of it."],
    "2/3": ["It is two thirds."],
    "\\boxed{7}": ["So the answer is 7."],
    "\\text{Yes}": ["The answer is yes."],
    "8 cm": ["The height is 8.", "It is 8 cm."],
    "\\frac{1}{2}": ["It is 1/2.", "It is 0.5.", "It is \\frac{1}{2}.", "It is one half."],
    "2\\sqrt{3}": ["It is 2√3.", "It is $2\\sqrt{3}$."],
    "1,200": ["It is 1200."],
    "a cone": ["It is a cone."],
}


@pytest.mark.parametrize("answer, spoilers", GUISES.items())
def test_a_planted_answer_is_rejected_in_every_guise(answer, spoilers):
    for spoiler in spoilers:
        assert fault(spoiler, "How much is it?", answer) == "answer", spoiler


def test_words_that_are_no_numbers_pass():
    good = "Count them one by one; no one counts twice. Start in the second row, in its left half."
    for answer in ("1", "1/2", "11", "101"):
        assert fault(good, "How many?", answer) is None
    assert fault("Take seven. Five more.", "How many?", "12") is None
    assert fault("Take seven and five more.", "How many?", "12") is None
    assert fault("Of the forty seven dots, take the red.", "Of 47 dots?", "47") is None
    with_commas = "How many of 1,200 dots?"
    assert fault("Start with 1,200 dots.", with_commas, "30") is None


def test_a_number_of_the_solution_in_words_is_one():
    solution = "14 * 3 = 42, so 42 + 5 = 47"
    assert fault("Fourteen of them count.", "How many?", "47", solution) == "number"
    assert fault("Forty two of them count.", "How many?", "47", solution) == "number"
    assert fault("All three of them count.", "How many?", "47", solution) is None
    assert fault("Fourteen of them count.", "How many of 14?", "47", solution) is None


def test_the_check_of_endless_digits_and_words_ends():
    solution = "9" * 5000
    for number in ("9" * 5000, "1/0", "million " * 150, "seven " * 150, f"1/{'9' * 5000}"):
        start = time.perf_counter()
        assert fault(f"Take {number} dots.", "How many?", "4", solution) in ("number", None)
        assert fault("Take a dot.", "How many?", number, solution) is None
        assert time.perf_counter() - start < 2


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


@pytest.mark.parametrize("word", ["a", "one ", "7 ", "half "])
def test_an_endless_hint_is_judged_at_once(word):
    hint = f"{GOOD} {word * 1_000_000}"
    start = time.perf_counter()
    assert hint_fault(hint, {"problem": "How many?", "answer": "4"}) == "solution"
    assert time.perf_counter() - start < 2


def test_what_no_file_and_no_terminal_takes_is_left_out():
    assert (
        hint_of("hm</think>\x1b[31;1mred\x1b[0m\tbox\r\n\ud800\x07\u202eThink:\u200b ")
        == "red  box \nThink:"
    )
    assert hint_of("4\u200b7") == "47" and hint_of("10\u00a0cm") == "10 cm"
    for kept in (GOOD, "Größe ≤ 2√3, 二行 👀"):
        assert hint_of(kept) == kept


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
    """An endpoint that speaks the protocol. reply: fn(body, number of the request) -> bytes; or a status, bytes (or
    such as they come) and perhaps headers; or None: the connection is cut off in the middle of an answer."""

    def __init__(self, reply):
        self.seen, self.keys, self.encodings = [], [], []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(handler):
                data = handler.rfile.read(int(handler.headers["Content-Length"] or 0))
                body = json.loads(data or b"{}")
                self.seen.append(body)
                self.keys.append(handler.headers["Authorization"])
                self.encodings.append(handler.headers["Accept-Encoding"])
                answer = reply(body, len(self.seen))
                if answer is None:
                    return handler.connection.close()
                status, data, *headers = (200, answer) if isinstance(answer, bytes) else answer
                handler.send_response(status)
                for name, value in dict(*headers).items():
                    handler.send_header(name, value)
                handler.send_header("Content-Type", "application/json")
                handler.end_headers()
                for part in [data] if isinstance(data, bytes) else data:
                    handler.wfile.write(part)

            do_GET = do_POST  # what a client may make of a request that was sent on

            def log_message(handler, *_):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.handle_error = lambda *_: None  # of a client that waits no longer
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
def three(tmp_path):
    """Three rows, whose questions are one, two and three; the folder of their hints is beside them."""
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    data = tmp_path / "rows.jsonl"
    with open(data, "w") as f:
        for name in ("one", "two", "three"):
            row = {"problem": name, "images": "picture.png", "answer": f"Zürich {name}"}
            f.write(json.dumps(row) + "\n")
    return data


def records_of(data) -> list[dict]:
    file = data.parent / "hints" / "hints.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture
def asked(three):
    """fn(reply, flags) -> status and words of a start on three rows with an endpoint that replies so, their records,
    and the questions that were asked."""

    def run(reply, *flags, alone: bool = False):
        with Server(reply) as server:
            argv = ["--data", three, "--output", three.parent / "hints", "--endpoint", server.url]
            status, said = run_hints(*argv, "--model", "any", *flags, alone=alone)
        assert "Zürich" not in said and "Z\\u00fcrich" not in said, said
        return (
            status,
            said,
            {r["row"]: r for r in records_of(three)},
            list(map(asked_in, server.seen)),
        )

    return run


AGAIN_AT_ONCE = {"retry-after-ms": "1"}
HANG = threading.Event()  # never set: a request that waits for it gets no answer


def overload(status):
    return lambda body: (status, b"{}", AGAIN_AT_ONCE)


def refusal_of(status):
    return lambda body: (
        status,
        json.dumps({"error": {"message": f"not: {asked_in(body)}"}}).encode(),
    )


def drops():
    for _ in range(60):
        yield b" "
        HANG.wait(1)


FAILING = {
    "hangs": ("timeout", lambda body: HANG.wait(60)),
    "drips": ("timeout", lambda body: (200, drops())),
    "drips and fails": ("timeout", lambda body: (401, drops())),
    "429": ("overloaded", overload(429)),
    "500": ("overloaded", overload(500)),
    "cut": ("disconnected", lambda body: None),
    "400": ("refused", refusal_of(400)),
    "413": ("refused", refusal_of(413)),
    "422": ("refused", refusal_of(422)),
    "error": ("refused", lambda body: refusal_of(200)(body)[1]),
    "null": ("refused", lambda body: b'{"choices": null}'),
    "message": ("refused", lambda body: b'{"choices": [{"message": null}]}'),
    "content": ("refused", lambda body: b'{"choices": [{"message": {"content": [1]}}]}'),
}


@pytest.mark.parametrize("how", FAILING)
def test_a_request_that_fails_costs_its_row_alone(asked, how, monkeypatch):
    kind, failing = FAILING[how]
    if how == "cut":  # the client waits longer each time
        monkeypatch.setattr(hints, "RETRIES", 1, raising=False)
    flags = ["--timeout", 3 if kind == "timeout" else 1800]

    def reply(body, number):
        if asked_in(body).startswith("two"):
            return failing(body)
        return said_by(PLAIN, "length" if asked_in(body).startswith("three") else "stop")

    code, said, records, questions = asked(reply, "--attempts", 1, *flags)
    assert code == 0 and said.count("row 1 is passed over") == 1, said
    assert records[0]["hint"] == PLAIN and records[0]["faults"] == []
    assert records[1]["hint"] == "" and records[1]["faults"] == [kind]
    assert records[2]["faults"] == ["cut off", "cut off"]
    assert "1 kept at once, 0 after writing anew, 2 dropped" in said
    assert f"faults: {{'{kind}': 1, 'cut off': 2}}" in said
    if kind in ("timeout", "refused"):  # asking for the same again would be of no use
        assert sum(question.startswith("two") for question in questions) == 1

    # The next start asks for it again, without a word of a rejected hint; it may fail again.
    code, said, records, questions = asked(reply, "--attempts", 0, *flags)
    assert code == 0 and records[1]["faults"] == [kind, kind], said
    assert not any(question.startswith("one") for question in questions)
    anew = [question for question in questions if question.startswith("two")]
    assert anew and not any("rejected" in question for question in anew)
    code, said, records, _ = asked(lambda *_: said_by(PLAIN), "--attempts", 0)
    assert code == 0 and records[1]["hint"] == PLAIN
    assert "2 kept at once, 1 after writing anew, 0 dropped" in said


def test_where_every_request_fails_the_tool_stops(asked):
    """The endpoint's own sentence may quote the answer; the parameter that it refuses does not."""
    error = {"message": "max_tokens? The answer is zebra", "param": "max_tokens", "code": "x"}
    body = json.dumps({"error": error}).encode()
    code, said, records, questions = asked(lambda *_: (400, body), "--attempts", 3)
    assert code != 0 and "every request failed" in said and "--endpoint" in said
    assert "BadRequestError 400 of max_tokens" in said and "zebra" not in said
    assert [records[i]["faults"] for i in range(3)] == [["refused"]] * 3 and len(questions) == 3


def test_hints_of_other_questions_are_refused(three, asked):
    """The same file, edited: hints go by the row's number."""
    code, said, *_ = asked(lambda *_: said_by(PLAIN))
    assert code == 0, said
    lines = three.read_text().splitlines(keepends=True)
    three.write_text("".join(reversed(lines)))
    code, said, *_ = asked(lambda *_: said_by(PLAIN))
    assert code != 0 and "choose another --output" in said


def test_images_are_sent_as_images_alone(hinted):
    server, *_ = hinted
    parts = [part for turn in server.seen[0]["messages"] for part in turn["content"]]
    images = [part for part in parts if part["type"] == "image_url"]
    assert images and all(set(part) == {"type", "image_url"} for part in images)


def test_a_failed_request_hides_no_rejected_hint():
    row = {"problem": "How many?", "answer": "4", "images": []}
    texts = []
    for faults in (["form"], ["form", "timeout"], ["timeout"], []):
        texts.append(hints.hint_prompt(row, faults).messages[1]["content"][-1]["text"])
    assert texts[0] == texts[1] and "rejected: it has to be a line" in texts[0]
    assert texts[2] == texts[3] and "rejected" not in texts[2]


def test_retry_after_is_waited_for(asked):
    came = {}

    def reply(body, number):
        times = came.setdefault(asked_in(body), [])
        times.append(time.monotonic())
        if len(times) == 1 and asked_in(body).startswith("two"):
            return 429, b"{}", {"retry-after": "1"}
        return said_by(PLAIN)

    code, said, records, questions = asked(reply, "--attempts", 0)
    assert code == 0 and [records[i]["faults"] for i in range(3)] == [[], [], []], said
    first, second = next(times for question, times in came.items() if question.startswith("two"))
    assert second - first >= 1 and len(questions) == 4


@pytest.mark.parametrize("flags, most", [([], 3), (["--requests", 2], 2), (["--requests", 1], 1)])
def test_so_many_requests_are_made_at_once(asked, flags, most):
    lock, at_once, seen = threading.Lock(), 0, []

    def reply(body, number):
        nonlocal at_once
        with lock:
            at_once += 1
            seen.append(at_once)
        time.sleep(0.5)
        with lock:
            at_once -= 1
        return said_by(PLAIN)

    code, said, records, _ = asked(reply, *flags)
    assert code == 0 and len(records) == 3 and max(seen) == most, said


@pytest.mark.parametrize(
    "flags, why",
    [
        (["--requests", 0], "--requests is 0"),
        (["--timeout", 0], "--timeout 0"),
        (["--timeout", "nan"], "--timeout nan"),
        (["--endpoint", "localhost:8000/v1"], "has to begin with http://"),
    ],
)
def test_flags_that_cannot_be_are_refused(asked, flags, why):
    code, said, records, questions = asked(lambda *_: said_by(PLAIN), *flags)
    assert code != 0 and why in said and questions == [] and records == {}, said


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_what_was_finished_is_kept_when_the_job_is_killed(three, asked, how):
    """While a request is under way: every answer that came has its line, and is not asked for again."""

    def reply(body, number):
        return HANG.wait(60) if asked_in(body).startswith("two") else said_by(PLAIN)

    with Server(reply) as server:
        argv = ["--data", three, "--output", three.parent / "hints", "--endpoint", server.url]
        command = [sys.executable, "-m", "tools.hints", *map(str, argv), "--model", "any"]
        job = subprocess.Popen(
            [*command, "--requests", "2"],
            cwd=ROOT,
            env=os.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # a background shell ignores it
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            deadline = time.monotonic() + 120
            while len(records_of(three)) < 2 and job.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            job.send_signal(how)
            said, _ = job.communicate(timeout=20)
        finally:
            job.kill()
            job.wait()
    assert "Traceback" not in said and "exception" not in said, said
    if how != signal.SIGKILL:
        assert job.returncode == 1 and "What was written so far is kept" in said, said
    else:
        assert job.returncode == -how
    assert [(r["row"], r["hint"]) for r in records_of(three)] == [(0, PLAIN), (2, PLAIN)]
    code, said, records, questions = asked(lambda *_: said_by(PLAIN))
    assert code == 0 and "2 of them written before" in said, said
    assert len(questions) == 1 and questions[0].startswith("two") and records[1]["hint"] == PLAIN


def test_a_key_that_ends_stops_at_once_and_keeps_what_was_written(asked):
    """Another request that is under way is not waited for."""
    done = []

    def reply(body, number):
        if asked_in(body).startswith("one"):
            return HANG.wait(120)
        done.append(number)
        return said_by(PLAIN) if len(done) == 1 else (401, b"{}")

    start = time.monotonic()
    code, said, records, _ = asked(reply, "--requests", 2, alone=True)
    assert code != 0 and "does not answer as it should (AuthenticationError 401)" in said
    assert [r["hint"] for r in records.values()] == [PLAIN]
    assert time.monotonic() - start < 60


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/v1", "http://nowhere.invalid/v1"])
def test_an_address_where_nothing_is_stops(asked, url, monkeypatch):
    monkeypatch.setattr(hints, "RETRIES", 0, raising=False)
    code, said, records, _ = asked(lambda *_: said_by(PLAIN), "--endpoint", url)
    assert code != 0 and "does not answer as it should (APIConnectionError)" in said
    assert records == {}


@pytest.mark.parametrize(
    "status, kind",
    [(401, "AuthenticationError"), (403, "PermissionDeniedError"), (404, "NotFoundError")],
)
def test_a_wrong_key_or_address_stops(asked, status, kind):
    def reply(body, number):
        return status, json.dumps({"error": {"message": f"{KEY}: {asked_in(body)}"}}).encode()

    code, said, records, _ = asked(reply)
    assert code != 0 and f"does not answer as it should ({kind} {status})" in said and records == {}


NONSENSE = [
    b"[]",
    b"3",
    '{"said": "The answer, for you alone: Zürich"}'.encode("latin-1"),
    b"<html>",
    b"[" * 200_000,
]


@pytest.mark.parametrize("body", NONSENSE, ids=range(len(NONSENSE)))
def test_a_reply_that_is_no_endpoints_stops_and_is_not_quoted(asked, body):
    code, said, records, _ = asked(lambda *_: body)
    assert code != 0 and "does not answer as it should" in said and records == {}


# ----------------------------------------------------------------------------------------------- hostile endpoints
NO_KEYS = [
    f"{KEY}\r\n",
    f" {KEY}",
    f"{KEY} two",
    f"{KEY}\t",
    f"\x1b{KEY}",
    f"{KEY}é",
    f"{KEY}\udcff",
    " " * 30,
]


@pytest.mark.parametrize("key", NO_KEYS, ids=range(len(NO_KEYS)))
def test_a_key_that_is_none_is_refused_by_its_variables_name(asked, key, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "KEY", key)
    code, said, records, questions = asked(lambda *_: said_by(PLAIN))
    assert code != 0 and "OPENAI_API_KEY holds a blank" in said and "set it anew" in said
    assert "sk-not" not in said and questions == [] and records == {}


@pytest.mark.parametrize("status", [200, 400, 401, 403, 422])
@pytest.mark.parametrize("echo", [KEY, [KEY], {"key": KEY}], ids=("text", "list", "object"))
def test_a_key_that_an_error_says_is_not_repeated(three, asked, status, echo):
    error = dict.fromkeys(("message", "param", "code", "type"), echo)
    body = json.dumps({"error": error}).encode()
    code, said, *_ = asked(lambda *_: (status, body, {"x-request-id": KEY}))
    assert code != 0 and "OPENAI_API_KEY" in said or "every request failed" in said, said
    for file in (three.parent / "hints").iterdir():
        assert KEY not in file.read_text()


@pytest.mark.parametrize("status", [200, 400, 401])
def test_nothing_is_printed_of_an_errors_own_words(asked, status):
    """Escape sequences, lone surrogates, and a megabyte of them."""
    error = dict.fromkeys(("message", "param", "code", "type"), "\x1b]0;owned\x07\ud800" * 50_000)
    body = json.dumps({"error": error}).encode()
    code, said, *_ = asked(lambda *_: (status, body))
    assert code != 0 and "owned" not in said and len(said) < 3000, said[:3000]
    assert all(c.isprintable() or c in "\r\n" for c in said)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_request_is_not_sent_on_to_another_address(asked, status):
    with Server(lambda *_: said_by(PLAIN)) as other:
        there = {"Location": f"{other.url}/chat/completions"}
        code, said, records, questions = asked(lambda *_: (status, b"", there), "--requests", 1)
    assert other.seen == [] and other.keys == []
    assert code != 0 and f"does not answer as it should (APIStatusError {status})" in said
    assert "not followed to another address" in said and records == {} and len(questions) == 1


def endless(begin: bytes = b"", part: bytes = b"x" * 2**20, parts: int = 400):
    yield begin
    for _ in range(parts):
        yield part


def zipped(parts):
    pack = zlib.compressobj(wbits=31)
    yield from map(pack.compress, parts)
    yield pack.flush()


ZIPPED = {"Content-Encoding": "gzip"}
HUGE = {  # how the request for a row ends: what is written of it, and what is said
    "answer": (
        lambda: (200, endless(said_by("x")[:-60])),
        ["refused"],
        "its reply held no answer or over 4 MB (NoAnswer)",
    ),
    "500": (lambda: (500, endless(), AGAIN_AT_ONCE), ["overloaded"], "InternalServerError 500"),
    "401": (lambda: (401, endless()), None, "as it should (AuthenticationError 401)"),
    "zipped": (
        lambda: (200, zipped(endless(b"{")), ZIPPED),
        None,
        "compressed replies are not read",
    ),
    "zipped 500": (
        lambda: (500, zipped(endless()), ZIPPED | AGAIN_AT_ONCE),
        ["overloaded"],
        "InternalServerError 500",
    ),
    "zipped 401": (lambda: (401, zipped(endless()), ZIPPED), None, "AuthenticationError 401"),
    "choices": (
        lambda: (200, b'{"choices": [{}' + b",{}" * 1_300_000 + b"]}"),
        ["refused"],
        "(NoAnswer)",
    ),
}


@pytest.mark.parametrize("how", HUGE)
def test_a_huge_reply_is_not_read_to_its_end(asked, how, monkeypatch):
    """400 MB, or what unpacks to it, and what would be objects by the million: none of it is held."""
    monkeypatch.setattr(hints, "RETRIES", 1)
    huge, faults, why = HUGE[how]

    def reply(body, number):
        return huge() if asked_in(body).startswith("two") else said_by(PLAIN)

    tracemalloc.start()
    try:
        code, said, records, _ = asked(reply, "--attempts", 0, "--requests", 1)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 200e6, f"{most / 1e6:.0f} MB"
    assert why in said and (code == 0) == (faults is not None), said
    assert records[0]["hint"] == PLAIN
    if faults:
        assert records[1]["faults"] == faults and records[2]["hint"] == PLAIN


def test_an_answer_is_asked_for_as_it_is(hinted):
    """Nothing has to be unpacked: a kilobyte could become a megabyte."""
    server, *_ = hinted
    assert set(server.encodings) == {"identity"}


def test_an_answer_that_no_file_takes_loses_no_row(three, asked):
    dirty = PLAIN.replace("the shaded", "\ud800\x1b[2Jthe\x00 shaded\x07").replace("\n", "\r\n")
    code, said, records, _ = asked(lambda body, number: said_by(dirty))
    assert code == 0 and "3 kept at once" in said, said
    assert not any(raw in said for raw in ("\ud800", "\x1b[2J", "\0", "\7"))  # tqdm has others
    for hint in written(three.parent / "hints")["hint"]:
        assert " ".join(hint.split()) == " ".join(PLAIN.split())


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


def test_the_hints_of_a_checkpoint_are_kept_batch_by_batch(tiny, tmp_path, monkeypatch):
    batches, generate = [], common.HFEngine.generate

    def die_in_the_third(engine, prompts, seeds=None):
        batches.append(len(prompts))
        if len(batches) == 3:
            raise KeyboardInterrupt
        return generate(engine, prompts, seeds)

    monkeypatch.setattr(common.HFEngine, "generate", die_in_the_third)
    argv = ["--data", tiny / "rows.parquet", "--model", tiny / "student", "--output", tmp_path]
    status, said = run_hints(*argv, "--max-response", 8, "--rollout-batch", 10)
    assert status != 0 and batches == [10, 10, 4], said
    lines = (tmp_path / "hints.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in lines] == list(range(20))


def test_what_a_checkpoint_cannot_be_shown_is_named(tiny, tmp_path):
    from PIL import Image

    Image.new("RGB", (64 * 250, 64)).save(tmp_path / "long.png")
    row = {"problem": "How many?", "images": "long.png", "answer": "4"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    argv = ["--data", tmp_path / "rows.jsonl", "--output", tmp_path / "hints", "--model"]
    for model, why in (("student", "aspect ratio"), ("text-only", "shows 0 of")):
        status, said = run_hints(*argv, tiny / model)
        assert status != 0 and why in said, said


@pytest.mark.parametrize("solution", [0, 0.0, "0", [0], [False, 0], decimal.Decimal(0)])
def test_a_solution_may_be_a_number_and_zero(solution):
    """A hint with a number of the solution gives it away; without any solution a single digit may count things."""
    hint = "Look: the apples on the left table. Think: taking all of them leaves 0."
    row = {"problem": "How many are left?", "answer": "none"}
    assert hint_fault(hint, row) is None
    assert hint_fault(hint, row | {"solution": None}) is None
    assert hint_fault(hint, row | {"solution": solution}) == "number"
