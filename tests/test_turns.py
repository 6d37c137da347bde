"""Responses of several turns: image tools, their answers as context without loss, limits, and refused calls."""

import json
from types import SimpleNamespace

import common
import reopold

import pytest
import torch
from conftest import accuracy, flags, refusal, run_script
from PIL import Image


def call(name="crop_image", **arguments):
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


WHOLE = call(bbox_2d=[0, 0, 1, 1], target_image=1)


@pytest.fixture(scope="module")
def processor(tiny):
    return common.Processor(str(tiny / "student"))


@pytest.fixture(scope="module")
def picture():
    image = Image.new("RGB", (80, 40))
    image.paste((200, 100, 0), (20, 10, 60, 30))
    return image


def answered(name, images, **arguments):
    return reopold.answer_call(json.dumps({"name": name, "arguments": arguments}), images)


BOXES = [[0.25, 0.25, 0.75, 0.75], [20, 10, 60, 30]]


@pytest.mark.parametrize("box", BOXES, ids=["fractions", "pixels"])
@pytest.mark.parametrize("name", ["crop_image", "crop_image_normalized"])
def test_a_crop_is_the_box(picture, name, box):
    text, (part,), failed = answered(name, [picture], bbox_2d=box, target_image=1)
    assert part.size == (40, 20) and part.getcolors() == [(800, (200, 100, 0))]
    assert not failed and "40x20" in text and text.count("<image>") == 1


def test_frames_are_shown_again(picture):
    other = Image.new("RGB", (8, 8))
    images = [picture, other]
    text, shown, failed = answered("select_frames", images, target_frames=[2, 1, 2])
    assert shown == [other, picture, other] and not failed
    assert text.count("<image>") == 3 and "Numbered 3 to 5" in text


HUGE = 10**400  # no float holds it
BAD_CROPS = [
    {},
    {"bbox_2d": None},
    {"bbox_2d": [0, 0, 1]},
    {"bbox_2d": "0,0,1,1"},
    {"bbox_2d": [0, 0, "1", 1]},
    {"bbox_2d": [True, False, True, True]},
    {"bbox_2d": [0.5, 0.1, 0.2, 0.9]},
    {"bbox_2d": [0.1, 0.1, 0.1, 0.9]},
    {"bbox_2d": [0, 0, 81, 40]},
    {"bbox_2d": [-0.1, 0, 1, 1]},
    {"bbox_2d": [0.1, 0.1, 0.3, 1.01]},
    {"bbox_2d": [0, 0, HUGE, 1]},
    {"bbox_2d": [0, 0, float("nan"), 1]},
    {"bbox_2d": [0, 0, float("inf"), 1]},
    {"bbox_2d": [0, 0, 0, 0]},
]
NO_IMAGES = (0, 2, -1, 1.5, "1", "/etc/passwd", None, True, [1], HUGE, float("nan"))
BAD_CROPS += [{"bbox_2d": [0, 0, 1, 1], "target_image": n} for n in NO_IMAGES]
BAD_FRAMES = ([], [0], [2], 1, None, ["a"], [1] * 9, [[1]], [HUGE], [True])
BAD_CALLS = [
    "",
    "crop it",
    "{",
    "[]",
    "null",
    '"crop_image"',
    "[" * 100_000,
    "9" * 5000,
    '{"name": "crop_image"}',
    '{"name": "crop_image", "arguments": []}',
    '{"name": ["crop_image"], "arguments": {}}',
    '{"name": "open_file", "arguments": {"path": "/etc/passwd"}}',
    '{"name": "__class__", "arguments": {}}',
    *(json.dumps({"name": "crop_image", "arguments": bad}) for bad in BAD_CROPS),
    *(
        json.dumps({"name": "select_frames", "arguments": {"target_frames": bad}})
        for bad in BAD_FRAMES
    ),
]


@pytest.mark.parametrize("text", BAD_CALLS, ids=lambda text: text[:60])
def test_a_bad_call_is_answered_with_an_error(picture, text):
    """No exception, no image, and nothing of what the model wrote: its text could hold control tokens."""
    said, images, failed = reopold.answer_call(text, [picture])
    assert failed and not images and said.startswith("Error: ") and len(said) < 200
    assert "passwd" not in said and "open_file" not in said


def test_an_error_says_what_to_mend(picture):
    assert (
        "images are numbered from 1 to 1"
        in answered("crop_image", [picture], bbox_2d=[0, 0, 1, 1], target_image=2)[0]
    )
    assert "80 x 40 pixels" in answered("crop_image", [picture], bbox_2d=[0, 0, 81, 40])[0]
    assert "at most 8 numbers" in answered("select_frames", [picture], target_frames=[1] * 9)[0]
    assert "crop_image, " in answered("open_file", [picture])[0]


def ids_of(processor, text):
    """A whole turn of the model's."""
    return [*processor.tokenizer(text)["input_ids"], processor.tokenizer.eos_token_id]


def test_a_conversation_is_what_the_template_makes(processor, tiny_rows):
    """Token for token: question, call, image, call, error message, answer."""
    row = tiny_rows[0]
    part = row["images"][0].crop((0, 0, 64, 32))
    context = reopold.with_tools(row)
    said = ["I look.", "Again.", "It is 4."]
    turns = [("Here:<image>", [part]), ("Error: no.", []), None]
    got, messages = processor.encode(context), list(context.messages)
    for text, turn in zip(said, turns):
        got = reopold.join(got, common.Prompt(ids_of(processor, text)))
        messages.append(common.message("assistant", text))
        if turn:
            got = reopold.join(got, reopold.next_turn(processor, *turn))
            messages.append(common.message("user", turn[0], len(turn[1])))
    text = processor.tokenizer.apply_chat_template(messages, tokenize=False)
    expected = processor.encode_text(text, [*row["images"], part])
    assert got.ids == expected.ids[: len(got.ids)]
    assert processor.tokenizer.decode(expected.ids[len(got.ids) :]) == "\n"
    assert torch.equal(got.pixels, expected.pixels) and torch.equal(got.grid, expected.grid)
    assert got.images == expected.images


def test_a_student_that_cannot_take_turns_is_refused(tiny):
    processor = common.Processor(str(tiny / "student"))
    reopold.check_tools(processor, reopold.Args())
    template = "{{ m['role'] }}<|im_end|>"
    template = "{% for m in messages %}" + template + "{% endfor %}"
    processor.tokenizer.chat_template = "{{ messages[-1]['role'] }}<|im_end|>" + template
    with pytest.raises(common.UserError) as error:
        reopold.check_tools(processor, reopold.Args())
    assert "rewrites earlier turns" in error.value.code


class Scripted:
    """An engine that says what it is told to, to its own limit: a list of turns a prompt, found by its beginning."""

    def __init__(self, processor, scripts, limit):
        self.processor, self.scripts, self.limit, self.asked = processor, scripts, limit, []
        self.sync = self.sleep = self.close = lambda *_: None

    def generate(self, prompts, seeds=None):
        self.asked.append((prompts, seeds))
        responses = []
        for prompt in prompts:
            script = next(turns for ids, turns in self.scripts if prompt.ids[: len(ids)] == ids)
            whole = ids_of(self.processor, script.pop(0))
            ids = whole[: self.limit]
            text = self.processor.tokenizer.decode(ids, skip_special_tokens=True)
            log_probs = [-0.5 - i for i in range(len(ids))]
            responses.append(common.Response(ids, len(ids) == len(whole), text, log_probs))
        return responses


def scripted(processor, rows, scripts, calls=2, max_response=2000):
    prompts = [processor.encode(reopold.with_tools(row)) for row in rows]
    told = [(prompt.ids, list(script)) for prompt, script in zip(prompts, scripts)]
    engine = Scripted(processor, told, max_response)
    return reopold.Turns(engine, reopold.Args(calls=calls, max_response=max_response)), prompts


def converse(processor, rows, scripts, **settings):
    turns, prompts = scripted(processor, rows, scripts, **settings)
    return turns.generate(prompts, list(range(len(prompts)))), turns.engine, prompts


HALF = call(bbox_2d=[0, 0, 0.5, 1], target_image=1)
QUARTER = call(bbox_2d=[0, 0, 0.5, 1], target_image=2)
OUTSIDE = call(bbox_2d=[2, 2, 3, 3000], target_image=1)
SCRIPTS = [
    ["\\boxed{1}"],
    [f"Closer. {HALF}", f"Closer still. {QUARTER}", "\\boxed{2}"],
    [OUTSIDE, "\\boxed{3}"],
]


def test_turns(processor, tiny_rows):
    """Three responses that end in different turns: order, masks, log-probs, images of images, and error messages."""
    rows = [tiny_rows[i] for i in range(3)]
    responses, engine, prompts = converse(processor, rows, SCRIPTS)
    assert [len(asked) for asked, _ in engine.asked] == [3, 2, 1]
    assert [common.extract_answer(r.text) for r in responses] == ["1", "2", "3"]
    assert all(r.finished and not r.refused for r in responses)
    assert [r.errors for r in responses] == [[], [False, False], [True]]
    sizes = [image.size for image in responses[1].conversation.images]
    assert sizes == [(96, 32), (48, 32), (24, 32)]
    assert "(tool: Error: the box is empty or outside" in responses[2].text
    for r, script, prompt in zip(responses, SCRIPTS, prompts):
        own = [ids_of(processor, text) for text in script]
        sampled = [token for token, mask in zip(r.ids, r.mask) if mask]
        assert sampled == sum(own, []) and len(r.mask) == len(r.ids)
        assert r.log_probs == [-0.5 - i for ids in own for i in range(len(ids))]
        assert prompt.ids + r.ids == r.conversation.ids
    # what stands between the model's turns is the tool's, and nothing else
    first, second = (len(ids_of(processor, text)) for text in SCRIPTS[2])
    tool = reopold.next_turn(processor, answered_outside(rows[2]), [])
    assert responses[2].mask == [True] * first + [False] * len(tool.ids) + [True] * second
    assert responses[2].ids[first : first + len(tool.ids)] == tool.ids


def answered_outside(row):
    return reopold.answer_call(reopold.CALL.search(OUTSIDE)[1], row["images"])[0]


def test_every_turn_sees_all_before_it_and_has_its_own_seed(processor, tiny_rows):
    rows = [tiny_rows[i] for i in range(3)]
    responses, engine, prompts = converse(processor, rows, SCRIPTS)
    assert [p.ids for p in engine.asked[0][0]] == [p.ids for p in prompts]
    ((last,), seeds) = engine.asked[2]
    own = len(ids_of(processor, "\\boxed{2}"))
    assert last.ids == responses[1].conversation.ids[:-own]
    assert len(last.images) == len(last.grid) == 3
    assert engine.asked[0][1] == [common.seed_of(i, 0) for i in range(3)]
    assert engine.asked[1][1] == [common.seed_of(i, 1) for i in (1, 2)]
    assert seeds == [common.seed_of(1, 2)]


def test_greedy_turns_have_no_seeds(processor, tiny_rows):
    turns, prompts = scripted(processor, [tiny_rows[0]], [[HALF, "\\boxed{1}"]])
    turns.generate(prompts)
    assert [seeds for _, seeds in turns.engine.asked] == [None, None]


def test_an_endless_loop_of_calls_ends(processor, tiny_rows):
    (response,), engine, _ = converse(processor, [tiny_rows[0]], [[WHOLE] * 9], calls=3)
    assert len(engine.asked) == 4 and len(response.errors) == 3
    assert not response.finished and response.refused and response.text == ""


def test_a_conversation_has_at_most_sixteen_images(processor, tiny_rows):
    again = call("select_frames", target_frames=[1] * 8)
    (response,), *_ = converse(processor, [tiny_rows[0]], [[again] * 3], calls=3)
    # 1 + 8, and 8 more would be 17
    assert len(response.errors) == 1 and response.refused and not response.finished
    assert len(response.conversation.images) == 9


def test_a_strip_that_cannot_be_shown_is_an_error(processor, tiny_rows):
    """The image processor refuses sides of 200 to 1."""
    row = tiny_rows[0] | {"images": [Image.new("RGB", (600, 20))]}
    strip = call(bbox_2d=[0, 0, 600, 2], target_image=1)
    (response,), *_ = converse(processor, [row], [[strip, "\\boxed{1}"]])
    assert response.errors == [True] and "too narrow" in response.text and response.finished
    assert len(response.conversation.images) == len(response.conversation.grid) == 1


def test_all_tokens_behind_the_prompt_count(processor, tiny_rows):
    """--max-response holds the model's turns and the tools'. What lies behind it was not said."""

    def run(limit):
        script = [WHOLE, "\\boxed{1}"]
        (r,), engine, _ = converse(processor, [tiny_rows[0]], [script], max_response=limit)
        assert len(r.ids) <= limit and len(r.log_probs) == sum(r.mask)
        return r, len(engine.asked)

    full, turns = run(2000)
    answer = len(ids_of(processor, "\\boxed{1}"))
    used = len(full.ids) - answer
    assert turns == 2 and full.finished
    exact, _ = run(used + answer)
    assert exact.finished and exact.ids == full.ids and exact.text == full.text
    late, _ = run(used + answer - 1)  # without the end of its turn
    assert not late.finished and not late.refused and late.ids == full.ids[:-1]
    tight, turns = run(used + 1)
    assert turns == 2 and not tight.finished and tight.ids == full.ids[: used + 1]
    assert common.extract_answer(tight.text) is None
    none, turns = run(used)  # no room for a token behind what the tool says
    assert turns == 1 and none.refused and not none.finished and not none.errors
    assert none.text == "" and all(none.mask)
    cut, turns = run(10)
    assert turns == 1 and len(cut.ids) == 10 and not cut.finished and not cut.refused


LATE = "\\boxed{ANSWER}"


@pytest.mark.parametrize(
    "script, limit, right",
    [
        ([WHOLE, LATE], 2000, True),
        ([f"{LATE} {WHOLE}"] * 3, 2000, False),
        ([WHOLE, "well " * 200 + LATE], 250, False),
    ],
    ids=["answered", "refused", "behind the limit"],
)
def test_only_an_answer_within_the_limits_counts(processor, tiny_rows, script, limit, right):
    """For the evaluation, which reads the text, and for rewards."""
    row = tiny_rows[0]
    script = [text.replace("ANSWER", str(row["answer"])) for text in script]
    turns, _ = scripted(processor, [row], [script], max_response=limit)
    assert accuracy(turns, [row], reopold.with_tools) == right
    turns, _ = scripted(processor, [row], [script], max_response=limit)
    args = reopold.Args(calls=2, max_response=limit)
    samples = common.sample_responses(turns, [row], reopold.contexts(args), args)
    common.reward_answers(samples, 1)
    assert samples[0].correct == right


def test_what_tools_show_reaches_the_trainer(processor, tiny_rows):
    """The batch holds the whole conversations, the loss the sampled tokens alone; a group's prompts stay apart."""
    args = reopold.Args(calls=2, group=2, max_response=2000)
    prompt = processor.encode(reopold.with_tools(tiny_rows[1]))
    script = [f"Closer. {HALF}", "\\boxed{5}", "\\boxed{2}"]
    engine = Scripted(processor, [(prompt.ids, script)], 2000)
    log = {}
    run = SimpleNamespace(writer=reopold.Turns(engine, args), log=log.update)
    samples = reopold.rollout([tiny_rows[1]], run, args)
    assert log == {"tool_calls": 0.5, "tool_errors": 0.0, "tool_refused": 0.0}
    assert all(s.prompts["question"].ids == prompt.ids for s in samples)
    assert [len(s.prompts["question"].grid) for s in samples] == [2, 1]
    (m,) = common.make_micros(samples, ["question"], processor, 10_000)
    by_length = sorted(samples, key=lambda s: len(s.response.ids))
    seen = [s.response.conversation for s in by_length]
    for row, conversation in zip(m.batch["input_ids"].tolist(), seen):
        assert row[: len(conversation.ids)] == conversation.ids
    assert torch.equal(m.batch["pixel_values"], torch.cat([p.pixels for p in seen]))
    assert torch.equal(m.batch["image_grid_thw"], torch.cat([p.grid for p in seen]))
    own = ["\\boxed{5}", f"Closer. {HALF}", "\\boxed{2}"]
    assert m.ids.tolist() == sum((ids_of(processor, text) for text in own), [])
    assert len(m.sampled) == len(m.ids) == len(m.batch["cols"])


def test_tools_are_offered_where_they_may_be_called():
    assert reopold.contexts(reopold.Args(calls=0)) == {"question": reopold.question}
    assert reopold.contexts(reopold.Args(calls=2)) == {"question": reopold.with_tools}


class Calling:
    """The real engine, whose answers of the first turns are taken for calls: an untrained model makes none."""

    def __init__(self, engine):
        self.engine, self.processor, self.turn = engine, engine.processor, 0
        self.sync, self.sleep, self.close = engine.sync, engine.sleep, engine.close

    def generate(self, *what):
        self.turn += 1
        responses = self.engine.generate(*what)
        for i, r in enumerate(responses):
            r.ids, r.log_probs, r.finished = r.ids[: 6 + i], r.log_probs[: 6 + i], True
            right = 0.5 if i % 2 else -0.5
            if self.turn < 3:
                r.text = call(bbox_2d=[0, 0, right, 1], target_image=self.turn)
        return responses


def test_what_was_sampled_in_turns_has_the_trainers_log_probs(tiny, tiny_rows, processor):
    """Tokens behind images and error messages, against one pass over the whole; tools' tokens get no gradient."""
    args = common.Args(dtype="float32", max_response=9)
    engine = common.HFEngine(str(tiny / "student"), processor, args)
    prompts = [processor.encode(reopold.with_tools(tiny_rows[i])) for i in range(4)]
    turns = reopold.Turns(Calling(engine), reopold.Args(calls=2, max_response=200))
    responses = turns.generate(prompts, [3, 4, 5, 6])
    assert [len(r.errors) for r in responses] == [2] * 4
    assert {failed for r in responses for failed in r.errors} == {True, False}
    samples = [common.Sample(tiny_rows[0], {"question": p}, r) for p, r in zip(prompts, responses)]
    for s in samples:
        whole = s.response.conversation
        s.prompts["question"] = common.Prompt(
            s.prompts["question"].ids, whole.pixels, whole.grid, whole.images
        )
    m = common.Micro(samples, ["question"], processor)
    model = common.Model(str(tiny / "student"), torch.float32)
    kept = []

    def keep(module, inputs, output):
        output.last_hidden_state.retain_grad()
        kept.append(output.last_hidden_state)

    model.lm.model.register_forward_hook(keep)
    logits = model(m.batch) @ model.head().T
    logits[:, engine.processor.banned] = -torch.inf
    log_p = common.gather(logits.log_softmax(-1), m.ids)
    torch.testing.assert_close(log_p, m.sampled, rtol=0, atol=5e-5)
    log_p.sum().backward()
    # the positions that predict a token of a loss
    trained = kept[0].grad.any(-1).nonzero().tolist()
    places = []
    for b, (prompt, r) in enumerate(zip(prompts, responses)):
        places += [[b, len(prompt.ids) + t - 1] for t, sampled in enumerate(r.mask) if sampled]
    assert trained == places and not any(all(r.mask) for r in responses)


@pytest.mark.parametrize(
    "ranks, changes",
    [
        (0, {}),
        pytest.param(2, {}, marks=pytest.mark.slow),
        (0, {"method": "sft"}),
        (0, {"method": "grpo", "group": 2}),
    ],
    ids=str,
)
def test_real_runs_with_tools(tiny, tmp_path, ranks, changes):
    """An untrained model calls nothing; offered a tool it still trains, and the log says so."""
    settings = dict(calls=2, updates=1) | changes
    result = run_script("reopold.py", *flags(tiny, tmp_path / "run", **settings), ranks=ranks)
    assert result.returncode == 0, result.stderr
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["tool_calls"] == last["tool_errors"] == last["tool_refused"] == 0
    assert last["grad_norm"] > 0 or "grpo" in changes.values()


def test_tools_want_a_student_that_sees(tiny, tmp_path):
    text_only = dict(student=tiny / "text-only", teacher=tiny / "text-only")
    said = refusal("reopold.py", flags(tiny, tmp_path / "run", calls=2, **text_only))
    assert "sees no images" in said
