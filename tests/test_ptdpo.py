"""PTD-PO's pieces on worked examples: routing, advantages, clips, ratios, contexts, and what a run refuses."""

import json
import math
import re
import shutil
import threading
import time

import pytest
import torch
from conftest import flags, refusal, run_script

import common
import ptdpo

ROW = {"problem": "<image>How many?", "images": ["picture"], "answer": "47", "hint": "Count twice.", "solution": "40 + 7 = 47."}


def test_eq_7_8_routing():
    correct = [True, True, False, True, False, False]
    assert ptdpo.route(correct, 2, 1.0) == ([False, False, True, True, True, True], [False, False, True, False, True, True])
    assert ptdpo.route(correct, 2, 0.5) == ([False] * 4 + [True, True], [False] * 4 + [True, True])  # strictly below tau
    assert ptdpo.route([False] * 5 + [True] * 5, 5, 0.2)[1] == [True] * 5 + [False] * 5
    assert ptdpo.route([True] + [False] * 4, 5, 0.2)[1] == [False] * 5


def test_eq_67_to_69_an_all_fail_group_has_no_policy_gradient_and_is_tutored_all_the_same():
    advantages = common.group_advantages(torch.tensor([0.0] * 4 + [1.0, 0.0, 0.0, 1.0]), 4)
    assert (advantages[:4] == 0).all()
    for group in range(2, 17):  # 0.9 and 0.1 are not exact in float32, and the mean of several is not either
        for reward in (0.1, 0.9, 1 - 0.1):
            assert (common.group_advantages(torch.full((2 * group,), reward), group) == 0).all()
    torch.testing.assert_close(advantages[4:], torch.tensor([1.0, -1.0, -1.0, 1.0]) * 0.5 / (math.sqrt(1 / 3) + 1e-6))
    z, y = torch.randn(4, 30, requires_grad=True), torch.randn(4, 30)
    args = ptdpo.Args(kl=0.0, clip_low=0.2, clip_high=0.3, support=10)
    zero = torch.zeros(4)
    named = dict(zip(ptdpo.TERMS, ptdpo.terms(z, y, torch.arange(4), zero - 3, zero, advantages[:4], args=args)))
    assert torch.autograd.grad(named["surrogate"].sum(), z, retain_graph=True)[0].abs().max() == 0
    assert torch.autograd.grad(named["ptd"].sum(), z)[0].norm(dim=-1).min() > 1e-3


def test_eq_42_the_tutors_pull():
    """dD/dz = 1/2 p (log p/m - E_p log p/m), at K = V."""
    z, y = torch.randn(5, 40, dtype=torch.float64, requires_grad=True), torch.randn(5, 40, dtype=torch.float64)
    value = ptdpo.topk_tail_divergence(z, y, 40)
    p, q = z.detach().softmax(-1), y.softmax(-1)
    ratio = (p / ((p + q) / 2)).log()
    torch.testing.assert_close(torch.autograd.grad(value.sum(), z)[0], p * (ratio - (p * ratio).sum(-1, keepdim=True)) / 2, rtol=1e-10, atol=1e-14)


def test_the_tutor_covers_only_the_first_tokens():
    args = ptdpo.Args(kl=0.1, clip_low=0.2, clip_high=0.3, support=10)
    z, y = torch.randn(5, 30), torch.randn(2, 30)
    zero = torch.zeros(5)
    named = dict(zip(ptdpo.TERMS, ptdpo.terms(z, y, torch.arange(5), zero - 3, zero - 2, zero + 1, args=args)))
    assert (named["ptd"][:2] > 0).all() and (named["ptd"][2:] == 0).all() and named["ptd"].shape == (5,)
    nobody = dict(zip(ptdpo.TERMS, ptdpo.terms(z, y[:0], torch.arange(5), zero - 3, zero - 2, zero + 1, args=args)))
    assert (nobody["ptd"] == 0).all() and torch.equal(nobody["surrogate"], named["surrogate"])


@pytest.mark.parametrize("ratio, advantage, value, clipped", [
    (1.5, 1.0, 1.28, True), (1.5, -1.0, -1.5, False), (0.5, 1.0, 0.5, False), (0.5, -1.0, -0.8, True), (1.1, 1.0, 1.1, False), (1.5, 0.0, 0.0, False),
])  # fmt: skip
def test_clip_higher(ratio, advantage, value, clipped):
    args = ptdpo.Args(kl=0.0, clip_low=0.2, clip_high=0.28)
    z = torch.randn(1, 30, requires_grad=True)
    ids, log_p = torch.tensor([4]), z.detach().log_softmax(-1)[:, 4]
    named = dict(zip(ptdpo.TERMS, ptdpo.terms(z, ids, log_p - math.log(ratio), log_p, torch.tensor([advantage]), args=args)))
    assert named["surrogate"].item() == pytest.approx(value, rel=1e-5) and bool(named["clipped"]) == clipped
    assert (torch.autograd.grad(named["surrogate"].sum(), z)[0].abs().max() > 0) == (not clipped and advantage != 0)


def test_k3():
    log_p, reference = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.0, -1.0, -3.0])
    wanted = [0.0, math.e - 2, math.exp(-2.5) + 1.5]
    torch.testing.assert_close(common.k3(log_p, reference), torch.tensor(wanted))


def test_gspo_ratio_of_the_response():
    """Two responses, of two tokens and one: the gradient of min(s A, clip(s) A) / R with s = exp(mean log-ratio)."""
    now, old = torch.tensor([-1.0, -2.0, -0.7], requires_grad=True), torch.tensor([-1.0002, -1.9996, -1.0])
    length, response, advantage = torch.tensor([2.0, 2.0, 1.0]), torch.tensor([0, 0, 1]), torch.tensor([1.0, 1.0, -2.0])
    log_ratio = now - old
    s = torch.stack([log_ratio[:2].mean().exp(), log_ratio[2].exp()])
    a = torch.tensor([1.0, -2.0])
    wanted = torch.minimum(s * a, s.clamp(1 - 3e-4, 1 + 4e-4) * a).sum() / 2
    ours = (common.clipped_surrogate(now, common.sequence_old(now.detach(), old, length, response), advantage, 3e-4, 4e-4) / (2 * length)).sum()
    torch.testing.assert_close(ours, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(x, now)[0] for x in (ours, wanted)))


def test_format_reward():
    for text, good in {"<think>2 + 2</think> \\boxed{4}": True, "2 + 2</think>\n\\boxed{4}": True, "\\boxed{4}": False, "<think>2 + 2</think> 4": False,
                       "<think>a</think><think>b</think> \\boxed{4}": False, "<think>a \\boxed{4}": False, "": False,
                       "<think>a</think> \\boxed{1} <think>b</think> \\boxed{2}": False, "a</think> \\boxed{1}</think> \\boxed{2}": False,
                       "<think>a</think> \\boxed{4": False, "<think>a</think> so \\boxed{\\frac{1}{2}}, done": True}.items():
        assert ptdpo.well_formed(text) == good, text
    samples = [common.Sample({"answer": "4"}, {}, common.Response([], [], True, text))
               for text in ("<think>a</think> \\boxed{4}", "\\boxed{4}", "<think>a</think> \\boxed{5}", "5")]
    common.reward_answers(samples, 2, ptdpo.well_formed, 0.1)
    assert [s.reward for s in samples] == pytest.approx([1.0, 0.9, 0.1, 0.0]) and [s.correct for s in samples] == [True, True, False, False]


def test_what_the_tutor_reads_and_the_student_does_not(tiny, tiny_rows):
    """On token ids: hint, answer and solution are nowhere in the student's prompt; the tutor's has the image and what it knows."""
    processor = common.Processor(str(tiny / "student"))
    row = tiny_rows[0] | {"answer": "zebra", "hint": "look at the giraffe", "solution": "an elephant"}
    ids = {knows: processor.encode(ptdpo.tutored(row, knows)).ids for knows in ("question", "hint", "answer", "solution")}
    texts = {knows: processor.tokenizer.decode(x) for knows, x in ids.items()}
    student = processor.encode(ptdpo.question(row)).ids
    assert student == ids["question"] and not any(word in texts["question"] for word in ("zebra", "giraffe", "elephant"))
    assert "giraffe" in texts["hint"] and "zebra" not in texts["hint"]
    assert "zebra" in texts["answer"] and "elephant" not in texts["answer"]
    assert "zebra" in texts["solution"] and "elephant" in texts["solution"]
    assert all(x.count(processor.image_id) == student.count(processor.image_id) > 0 for x in ids.values())
    assert processor.encode(ptdpo.tutored(row, "hint", blind=True)).ids.count(processor.image_id) == 0
    for args, expected in ((ptdpo.Args(), ptdpo.tutored(row, "hint")), (ptdpo.Args(blind_tutor=True), ptdpo.tutored(row, "hint", blind=True))):
        assert {name: context(row) for name, context in ptdpo.contexts(args).items()} == {"question": ptdpo.question(row), "tutor": expected}
    assert ptdpo.tutored(row | {"hint": "  "}, "hint") is None and ptdpo.tutored({k: v for k, v in row.items() if k != "hint"}, "hint") is None


def test_the_tutor_sees_the_image_and_reads_the_hint(tiny, tiny_rows):
    processor, model = common.Processor(str(tiny / "student")), common.Model(str(tiny / "student"), torch.float32)

    def hidden(row, **changes):
        with torch.no_grad():
            return model(processor.batch([processor.encode(ptdpo.tutored(row | changes, "hint"))], [[5, 6, 7]]))

    plain = hidden(tiny_rows[0])
    assert (hidden(tiny_rows[0], images=tiny_rows[1]["images"]) - plain).abs().max() > 1e-3
    assert (hidden(tiny_rows[0], hint="Read it from right to left.") - plain).abs().max() > 1e-3


def test_dynamic_sampling_draws_again(monkeypatch):
    """dapo keeps groups that are neither all right nor all wrong, and fills up with the others when the draws are used up."""
    verdicts = iter([[True, True], [True, False], [False, False], [False, True], [True, False], [True, True]])
    draws = iter([["a", "b"], ["c", "d"], ["e", "f"]])

    def answers(engine, rows, contexts, args, kind):
        return [kind({"answer": "1", "name": row}, {"tutor": None}, common.Response([1], [0.0], True, f"\\boxed{{{int(right)}}}"))
                for row in rows for right in next(verdicts)]

    monkeypatch.setattr(common, "sample_responses", answers)
    models = type("Models", (), {"engine": None})
    args = ptdpo.Args(optimizer="dapo", prompts=2, group=2, draws=3)
    samples, log = ptdpo.rollout(lambda: next(draws), models, args)
    assert [s.row["name"] for s in samples] == ["b", "b", "d", "d"]
    assert log["draws"] == 2 and log["informative"] == 0.5 and log["all_pass"] == log["all_fail"] == 0.25  # of all four groups
    args.draws = 1
    samples, log = ptdpo.rollout(lambda: next(draws), models, args)
    assert [s.row["name"] for s in samples] == ["e", "e", "f", "f"] and log["draws"] == 1


def test_a_rollout_rewards_the_form_and_tutors_by_the_answer_alone(monkeypatch):
    """Two right answers, one without a thought; a right and a wrong one, both in form; a wrong one whose row has no hint."""
    texts = ["<think>a</think> \\boxed{1}", "\\boxed{1}", "<think>a</think> \\boxed{1}", "<think>a</think> \\boxed{2}", "\\boxed{2}", "\\boxed{1}"]
    monkeypatch.setattr(common, "sample_responses", lambda engine, rows, contexts, args, kind: [
        kind({"answer": "1"}, {"tutor": None} if i < 4 else {}, common.Response([1], [0.0], True, text)) for i, text in enumerate(texts)])
    samples, _ = ptdpo.rollout(list, type("Models", (), {"engine": None}), ptdpo.Args(prompts=3, group=2))
    assert [s.reward for s in samples] == pytest.approx([1.0, 0.9, 1.0, 0.1, 0.0, 0.9])
    assert [s.failing for s in samples] == [False, False, True, True, True, True]
    assert [s.tutored for s in samples] == [False, False, False, True, False, False]


def test_dynamic_sampling_fills_up_in_the_order_of_drawing(monkeypatch):
    """So that no update gets only groups without an advantage."""
    verdicts = [[True, False], [False, False], [True, False], [False, False]]
    monkeypatch.setattr(common, "sample_responses", lambda engine, rows, contexts, args, kind: [
        kind({"answer": "1", "name": row}, {}, common.Response([1], [0.0], True, f"\\boxed{{{int(right)}}}")) for row in rows for right in verdicts["abcd".index(row)]])
    args = ptdpo.Args(optimizer="dapo", prompts=4, group=2, draws=1, updates=2)
    samples, _ = ptdpo.rollout(lambda: list("abcd"), type("Models", (), {"engine": None}), args)
    assert [s.row["name"] for s in samples] == list("aabbccdd")


# --------------------------------------------------------------------------------------------------------------------- real runs
@pytest.mark.parametrize("changes", [{}, {"optimizer": "dapo", "draws": 2, "updates": 2}, {"optimizer": "gspo", "updates": 2}, {"lambda_ptd": 0, "kl": 0},
                                     {"tutor_context": "solution", "tutor_all": ""}, {"lora": 4, "dtype": "bfloat16"}], ids=str)  # fmt: skip
def test_real_runs(tiny, tmp_path, changes):
    argv = [part for part in flags(tiny, tmp_path / "run", teacher=None, group=4, **changes) if part]
    result = run_script("ptdpo.py", *argv)
    assert result.returncode == 0, result.stderr
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == [0, 1, 2] and (tmp_path / "run" / "final" / "config.json").exists()
    last = metrics[-1]
    assert {"reward", "all_fail", "informative", "all_pass", "entropy", "response_length", "finished"} <= last.keys()
    assert ("ptd" in last) == ("kl" not in changes)
    if not changes:  # untrained models: everything fails, nothing has an advantage, the tutor still moves the student
        assert last["all_fail"] == last["tutored_tokens"] == 1 and last["ptd"] > 0 and last["grad_norm"] > 0
        assert "the policy gradient is zero, only the tutor teaches" in result.stdout + result.stderr
        assert 0 < last["student_tail"] < 1 and 0 < last["ptd_gap_bound"] <= math.log(2)
        two = run_script("ptdpo.py", *[x if x != str(tmp_path / "run") else str(tmp_path / "two") for x in argv], torchrun=2)
        assert two.returncode == 0, two.stderr


def test_rows_without_hints_are_left_out_and_counted(tiny, tmp_path):
    import datasets

    data = datasets.load_dataset("parquet", data_files=str(tiny / "rows.parquet"), split="train")
    some = data.map(lambda row, i: {"hint": row["hint"] if i % 2 else ""}, with_indices=True)
    some.to_parquet(tmp_path / "some.parquet")
    result = run_script("ptdpo.py", *flags(tiny, tmp_path / "run", teacher=None, group=2, data=tmp_path / "some.parquet"))
    assert result.returncode == 0, result.stderr
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert 0 < sum(m["without_hint"] for m in metrics[1:]) / 2 < 1 and all(0 < m["tutored_tokens"] < 1 for m in metrics[1:])
    data.remove_columns("hint").to_parquet(tmp_path / "none.parquet")
    result = run_script("ptdpo.py", *flags(tiny, tmp_path / "other", teacher=None, group=2, data=tmp_path / "none.parquet"))
    assert result.returncode != 0 and all(x in result.stderr for x in ("no column 'hint'", "--column-hint", "--make-hints", "--lambda-ptd 0"))
    data.map(lambda row: {"hint": " "}).to_parquet(tmp_path / "blank.parquet")
    result = run_script("ptdpo.py", *flags(tiny, tmp_path / "other", teacher=None, group=2, data=tmp_path / "blank.parquet"))
    assert result.returncode != 0 and "none of the 24 rows" in result.stderr and not (tmp_path / "other").exists()


@pytest.mark.parametrize("message, changes", [
    ("at least 2", {"group": 1}), ("strange", {"optimizer": "strange"}), ("--tau is 0", {"tau": 0}), ("must not be negative", {"lambda_ptd": -1}),
    ("would have no effect", {"teacher": "x"}), ("--draws would have no effect", {"draws": 3}), ("--tau would have no effect", {"lambda_ptd": 0, "tau": 0.4}),
    ("contradicts", {"optimizer": "gspo", "average": "token"}), ("--support must lie", {"support": 2000}), ("more than the", {"support": 1000}),
    ("context 'tutor'", {"max_prompt": 110}), ("--lr would have no effect", {"analyze": "", "lr": 0.1, **dict.fromkeys(("max_steps", "prompts", "data", "eval_every"))}),
    ("needs held-out questions", {"analyze": "", "eval_data": ""}), ("--clip-low would have no effect", {"clip_low": 0.1}),
    ("--divergence would have no effect", {"analyze": "", "divergence": "jsd", **dict.fromkeys(("max_steps", "prompts", "data", "eval_every"))}),
])  # fmt: skip
def test_bad_settings(tiny, tmp_path, message, changes):
    argv = flags(tiny, tmp_path / "run", **{"teacher": None, "group": 4} | changes)
    argv = [part for before, part in zip(["", *argv], argv) if before != "--analyze"]  # a flag without a value
    assert message in refusal("ptdpo.py", argv)
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------------------------------- hints
GOOD = "Look: the two rows of dots on the left; ignore the shaded box beside them.\nThink: count each row, then add the rows; do not count a dot twice."
PLAIN = GOOD.replace("the two rows", "the rows").replace("twice", "again")
SPOILED = {
    "form": "Count the dots in both rows and add them up without counting one twice.",
    "evidence": "Look: dots.\nThink: count each row, then add the rows; do not count a dot twice.",
    "solution": "Look: the two rows of dots on the left.\nThink: there are forty dots in the upper row and seven below, so add them.",
    "answer": "Look: the two rows of dots on the left; ignore the box.\nThink: the rows have 47 dots together.",
    "number": "Look: the two rows of dots on the left; ignore the box.\nThink: add the 7 of the lower row to the upper row.",
}


@pytest.mark.parametrize("fault", SPOILED)
def test_a_planted_spoiler_is_rejected(fault):
    row = {"problem": "<image>How many dots are there in the 2 rows?", "answer": "47", "images": [],
           "solution": "There are forty dots in the upper row and seven below: 40 + 7 = 47."}
    assert ptdpo.hint_fault(SPOILED[fault], row) == fault
    assert ptdpo.hint_fault(GOOD, row) is None
    assert ptdpo.hint_fault(GOOD.replace("the two rows", "the 2 rows"), row) is None  # a number of the question


def fault(last: str, problem: str, answer: str, solution: str = "") -> str | None:
    return ptdpo.hint_fault(f"{GOOD} {last}", {"problem": problem, "answer": answer, "solution": solution})


def test_each_of_several_right_answers_is_a_spoiler_and_the_first_is_shown():
    answers = ["a cone", "a cube"]
    assert fault("It is a cube.", "What is it?", answers) == fault("It is a cone.", "What is it?", answers) == "answer"
    assert fault("It is a ball.", "What is it?", answers) is None
    shown = ptdpo.tutored({"problem": "What is it?", "images": [], "answer": answers}, "answer").messages[-1]["content"][0]["text"]
    assert "The answer is a cone." in shown and "cube" not in shown


def test_a_planted_option_is_rejected():
    problem = "Which is it? (A) a red ball (B) a blue cone (C) a cube\nAnswer with the letter."
    for answer in ("B", "(B)", "\\boxed{B}", "B. a blue cone"):
        for spoiler in ("Take option B.", "The answer is B.", "It is (B).", "Choose B.", "Pick B: it fits.", "The answer: B", "The correct one is B.", "So option b.",
                        "Option **B**.", "The letter B fits.", "Compare it with a blue cone."):
            assert fault(spoiler, problem, answer) == "option", (spoiler, answer)
        for good in ("A ball is no cone.", "Compare the angle at A with the angle at B.", "Choose a side."):
            assert fault(good, problem, answer) is None, (good, answer)
    assert fault("Find the cube.", problem, "C") is None and fault("It is a cube.", problem, "C") == "option"
    lengths = "There is an angle at point B. Find the length of AC. A. 5 B. 6"
    assert fault("Find the length of AC.", lengths, "B") is None and fault("The side is 6.", lengths, "B") == "option"


@pytest.mark.parametrize("answer, spoilers", [
    ("47", ["So 47 remain.", "So forty-seven remain.", "So 47.0 remain."]), ("3", ["There are three of them."]), ("\\boxed{7}", ["So the answer is 7."]),
    ("\\text{Yes}", ["The answer is yes."]), ("8 cm", ["The height is 8.", "It is 8 cm."]), ("\\frac{1}{2}", ["It is 1/2.", "It is 0.5.", "It is \\frac{1}{2}."]),
    ("2\\sqrt{3}", ["It is 2√3.", "It is $2\\sqrt{3}$."]), ("1,200", ["It is 1200."]), ("a cone", ["It is a cone."]),
])  # fmt: skip
def test_a_planted_answer_is_rejected_in_every_guise(answer, spoilers):
    for spoiler in spoilers:
        assert fault(spoiler, "How much is it?", answer) == "answer", spoiler


def test_good_hints_pass():
    assert fault("Look at the 2 rows.", "How many of the 2 rows are full?", "2") is None
    assert fault("So 2.", "How many of the 2 rows are full?", "2") == "answer"
    assert fault("There is no gap.", "Is it closed?", "No") is None and fault("The answer: no.", "Is it closed?", "No") == "answer"
    assert fault("1. Count. 2. Add. 3. Check.", "How many?", "12", "5 * 2 + 1 * 2 = 12") is None
    assert fault("1. Count. 2. Add 5.", "How many?", "12", "5 * 2 + 1 * 2 = 12") == "number"
    assert fault("Take 3 steps.", "How far?", "3.5 km") is None and fault("It is 12 steps.", "How far?", "3.5 km") == "number"
    assert fault("It is 3.5 km.", "How far?", "3.5 km") == "answer"


@pytest.mark.parametrize("hint", ["Look:" + "\n" * 50_000 + "x", "Look: " + "a " * 25_000, "Look: Think: " * 5_000])
def test_the_form_of_an_endless_hint_is_seen_at_once(hint):
    start = time.perf_counter()
    assert ptdpo.hint_fault(hint, {"problem": "How many?", "answer": "4"}) and time.perf_counter() - start < 2


def test_a_hint_that_was_cut_off_is_rejected():
    assert ptdpo.hint_fault(GOOD[:-20], {"problem": "How many?", "answer": "4"}, finished=False) == "cut off"


@pytest.fixture
def endpoint():
    """A server that speaks the protocol: the first hint for a row with an odd answer spoils it; one request in five meets an overload."""
    import http.server

    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append(body)
            if len(seen) % 5 == 1:
                return self.send_error(503)
            if len(seen) % 7 == 2:
                return self.connection.close()  # in the middle of an answer
            text = body["messages"][1]["content"][-1]["text"]
            answer = text.split("for you alone: ")[1].split("\n")[0]
            spoil = answer in "13579" and "rejected" not in text
            hint = f"<think>hm</think>{PLAIN}" + (f" It is {answer}." if spoil else "")
            reply = json.dumps({"choices": [{"message": {"content": hint}}]}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", seen
    server.shutdown()


def test_make_hints_with_an_endpoint_and_goes_on_where_it_stopped(tiny, tmp_path, endpoint):
    import datasets

    url, seen = endpoint
    argv = ["ptdpo.py", "--preset", "toy", "--make-hints", "--hint-model", "any", "--hint-endpoint", url, "--data", tiny / "rows.parquet", "--output",
            tmp_path / "hints"]
    result = run_script(*argv)
    assert result.returncode == 0, result.stderr
    data = datasets.load_dataset("parquet", data_files=str(tmp_path / "hints" / "rows.parquet"), split="train")
    odd = sum(a in "13579" for a in data["answer"])
    assert len(data) == 24 and all(hint == PLAIN for hint in data["hint"]) and 0 < odd < 24
    assert f"{24 - odd} kept at once, {odd} after writing anew, 0 dropped" in result.stdout
    assert all(body["messages"][1]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,") for body in seen)
    records = tmp_path / "hints" / "records-0.jsonl"
    lines = records.read_text().splitlines(keepends=True)
    records.write_text("".join(lines[:9]) + lines[9][:20])  # killed in the middle of a line
    before = len(seen)
    again = run_script(*argv)
    assert again.returncode == 0 and "9 of them written before" in again.stdout, again.stderr
    assert 15 <= len(seen) - before < 40 and len(records.read_text().splitlines()) == 24
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    lines[3] |= {"hint": "", "faults": ["form"]}  # dropped by the first model: the next start, here with another, tries it again
    records.write_text("".join(json.dumps(line) + "\n" for line in lines))
    another = run_script(*argv[:5], "another", *argv[6:])
    assert another.returncode == 0 and "23 of them written before" in another.stdout, another.stderr
    written = datasets.load_dataset("parquet", data_files=str(tmp_path / "hints" / "rows.parquet"), split="train", download_mode="force_redownload")
    assert all(hint == PLAIN for hint in written["hint"])
    assert [json.loads(line)["model"] for line in records.read_text().splitlines()] == ["any"] * 24 + ["another"]
    shutil.copy(tiny / "rows.parquet", tmp_path / "others.parquet")
    other = run_script(*[tmp_path / "others.parquet" if part == tiny / "rows.parquet" else part for part in argv])
    assert other.returncode != 0 and "choose another --output" in other.stderr


def test_an_endpoint_that_refuses_one_request_costs_one_row(capsys):
    import http.server

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            text = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][0]["content"]
            self.send_response({"filtered, and repeated": 400, "no key": 401}.get(text, 200))
            self.end_headers()
            self.wfile.write(json.dumps({"type": "bad_request", "choices": [{"message": {"content": text}, "finish_reason": "length" if text == "long" else "stop"}]}).encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def ask(*texts):
        contexts = [common.Context([{"role": "user", "content": text}]) for text in texts]
        return common.ask_endpoint(f"http://127.0.0.1:{server.server_port}", "any", 8, 1.0, contexts)

    assert ask("one", "filtered, and repeated", "long") == [("one", True), (None, True), ("long", False)]
    said = capsys.readouterr().err
    assert "refused one request: 400 bad_request" in said and "repeated" not in said
    with pytest.raises(common.UserError, match="refused: 401"):
        ask("one", "no key")
    server.shutdown()


@pytest.mark.parametrize("body", [b'{"choices": null}', b'[]', b'{"choices": [{"message": null}]}', b'{"choices": [{"message": {"content": [1]}}]}',
                                  '{"said": "The answer, for you alone: Zürich"}'.encode("latin-1"), b"<html>", b"[" * 200_000])
def test_an_endpoint_that_answers_nonsense_is_named_and_not_quoted(body, monkeypatch, capsys):
    import http.server

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    wait = threading.Event.wait
    monkeypatch.setattr(threading.Event, "wait", lambda self, seconds=None: wait(self, seconds and min(seconds, 0.01)))  # no minute between its trials
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    context = common.Context([{"role": "user", "content": "The answer, for you alone: Zürich"}])
    with pytest.raises(common.UserError, match="does not answer as it should") as error:
        common.ask_endpoint(f"http://127.0.0.1:{server.server_port}", "any", 8, 1.0, [context])
    assert "Zürich" not in error.value.message + capsys.readouterr().err and "alone" not in error.value.message
    server.shutdown()


@pytest.mark.parametrize("quote", [lambda text: text, lambda text: json.dumps({"input": text}), repr, lambda text: text[:30].replace(" ", "\n  ")])
def test_an_error_that_quotes_the_request_is_not_shown(quote):
    text = "The right answer, for you alone: Zürich ist 7½ km weit\nWrite a hint."
    for content in (text, [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": "data:"}}]):
        said = common.without_quotes(f"invalid value: {quote(text)}", [{"role": "system", "content": "Help."}, {"role": "user", "content": content}])
        assert "Zürich" not in said and "for you alone" not in said and "quotes the request" in said
    known = "The model `any` has a maximum context length of 4096 tokens. However, you requested 5000."
    assert common.without_quotes(known, [{"role": "user", "content": text}]) == known and common.without_quotes("", []) == ""


def test_figures_3_and_5_on_worked_examples():
    assert [ptdpo.pass_at(n, 2, 4) for n in (1, 2, 3, 4)] == [0.5, 1 - 1 / 6, 1.0, 1.0] and ptdpo.pass_at(2, 0, 4) == 0
    z, y = torch.randn(2, 3, 6, dtype=torch.float64)
    ids = torch.tensor([5, 0, 2])
    nll, nll_hint, kl, kl_hint = ptdpo.shifts(z, y, ids)
    for i, token in enumerate(ids.tolist()):
        p, q = ((x[i].exp() / x[i].exp().sum()).tolist() for x in (z, y))
        assert nll[i].item() == pytest.approx(-math.log(p[token])) and nll_hint[i].item() == pytest.approx(-math.log(q[token]))
        assert kl[i].item() == 0 and kl_hint[i].item() == pytest.approx(sum(b * math.log(b / a) for a, b in zip(p, q)))


@pytest.mark.parametrize("ranks", [0, 3])  # three ranks share two questions
def test_analyze(tiny, tmp_path, ranks):
    output = tmp_path / "run"
    argv = flags(tiny, output, teacher=None, group=4, eval_rows=2, **dict.fromkeys(("max_steps", "prompts", "data", "eval_every")))
    result = run_script("ptdpo.py", *argv, "--analyze", torchrun=ranks)
    assert result.returncode == 0, result.stderr
    table = json.loads((output / "contexts.json").read_text())
    assert [line["context"] for line in table] == ["question", "answer", "hint", "solution"]
    assert table[0]["delta_nll"] == 0 and table[0]["kl"] == 0 and all(line["kl"] > 0 and line["length"] > 1 for line in table[1:])
    for line in table:
        assert line["hard_none"] + line["hard_some"] + line["hard_all"] == line["hard"] <= 2 and 0 <= line["pass@1"] <= line["pass@4"] <= 1
    assert f"{len(table)} tutor contexts on 2 held-out questions" in result.stdout


def test_make_hints_names_what_a_local_model_cannot_be_shown(tiny, tmp_path):
    from PIL import Image

    Image.new("RGB", (64 * 250, 64)).save(tmp_path / "long.png")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"problem": "How many?", "images": "long.png", "answer": "4"}) + "\n")
    for model, why in (("student", "aspect ratio"), ("text-only", "is a text-only model")):
        result = run_script("ptdpo.py", "--preset", "toy", "--make-hints", "--hint-model", tiny / model, "--data", tmp_path / "rows.jsonl", "--output", tmp_path / "hints")
        assert result.returncode != 0 and why in result.stderr and "Traceback" not in result.stderr, result.stderr


def test_make_hints_with_a_local_model(tiny, tmp_path):
    """An untrained model writes nothing of the right form: every row is asked again, dropped and counted."""
    result = run_script("ptdpo.py", "--preset", "toy", "--make-hints", "--hint-model", tiny / "student", "--hint-attempts", 1, "--max-response", 8,
                        "--data", tiny / "rows.parquet", "--output", tmp_path / "hints")
    assert result.returncode == 0, result.stderr
    found = re.search(r"0 kept at once, 0 after writing anew, 24 dropped .empty hint.; rejections: refused 0, cut off (\d+), form (\d+)", result.stdout)
    assert found and int(found[1]) + int(found[2]) == 48, result.stdout
