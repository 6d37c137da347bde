"""Responses of several turns: image tools, their answers as context without loss, limits, and calls that cannot be answered."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import flags, run_script
from PIL import Image

import common
import reopold


def call(name="crop_image", **arguments):
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


@pytest.fixture(scope="module")
def processor(tiny):
    return common.Processor(str(tiny / "student"))


@pytest.fixture(scope="module")
def picture():
    image = Image.new("RGB", (80, 40))
    image.paste((200, 100, 0), (20, 10, 60, 30))
    return image


@pytest.mark.parametrize("box", [[0.25, 0.25, 0.75, 0.75], [20, 10, 60, 30]], ids=["fractions", "pixels"])
def test_a_crop_is_the_box(picture, box):
    text, (part,), failed = common.answer_call(json.dumps({"name": "crop_image", "arguments": {"bbox_2d": box, "target_image": 1}}), [picture])
    assert part.size == (40, 20) and part.getcolors() == [(800, (200, 100, 0))] and not failed and "40x20" in text and text.count("<image>") == 1


def test_frames_are_shown_again(picture):
    other = Image.new("RGB", (8, 8))
    text, shown, failed = common.answer_call('{"name": "select_frames", "arguments": {"target_frames": [2, 1, 2]}}', [picture, other])
    assert shown == [other, picture, other] and not failed and text.count("<image>") == 3 and "Numbered 3 to 5" in text


BAD_CALLS = [
    "", "crop it", "{", "[]", "null", '"crop_image"', "[" * 100_000, "9" * 5000, '{"name": "crop_image"}', '{"name": "crop_image", "arguments": []}',
    '{"name": ["crop_image"], "arguments": {}}', '{"name": "open_file", "arguments": {"path": "/etc/passwd"}}', '{"name": "__class__", "arguments": {}}',
    *(json.dumps({"name": "crop_image", "arguments": arguments}) for arguments in (
        {}, {"bbox_2d": None}, {"bbox_2d": [0, 0, 1]}, {"bbox_2d": "0,0,1,1"}, {"bbox_2d": [0, 0, "1", 1]}, {"bbox_2d": [True, False, True, True]},
        {"bbox_2d": [0.5, 0.1, 0.2, 0.9]}, {"bbox_2d": [0.1, 0.1, 0.1, 0.9]}, {"bbox_2d": [0, 0, 81, 40]}, {"bbox_2d": [-0.1, 0, 1, 1]},
        {"bbox_2d": [0.1, 0.1, 0.3, 1.01]}, {"bbox_2d": [0, 0, 10**400, 1]}, {"bbox_2d": [0, 0, float("nan"), 1]}, {"bbox_2d": [0, 0, float("inf"), 1]}, {"bbox_2d": [0, 0, 0, 0]},
        *({"bbox_2d": [0, 0, 1, 1], "target_image": n} for n in (0, 2, -1, 1.5, "1", "/etc/passwd", None, True, [1], 10**400)))),
    *(json.dumps({"name": "select_frames", "arguments": {"target_frames": frames}}) for frames in ([], [0], [2], 1, None, ["a"], [1] * 9, [[1]])),
]  # fmt: skip


@pytest.mark.parametrize("text", BAD_CALLS, ids=lambda text: text[:60])
def test_a_bad_call_is_answered_with_an_error(picture, text):
    """No exception, no image, and nothing of what the model wrote: its text could hold control tokens."""
    said, images, failed = common.answer_call(text, [picture])
    assert failed and not images and said.startswith("Error: ") and "passwd" not in said and "open_file" not in said and len(said) < 200


def test_a_transcript_is_the_conversation_that_the_template_makes(processor, tiny_rows):
    """Token for token: question, call, image, call, error message, answer."""
    row = tiny_rows[0]
    part = row["images"][0].crop((0, 0, 64, 32))
    turns = [common.user_message("Here:<image>", 1), common.user_message("Error: no.", 0)]
    said = ["I look.", "Again.", "It is 4."]
    prompt, response = processor.encode(reopold.with_tools(row)), common.Response([], [], True)
    for text, turn, images in zip(said, [*turns, None], ([part], [], None)):
        response.ids += processor.tokenizer(text)["input_ids"] + [processor.tokenizer.eos_token_id]
        if turn:
            response.observations.append(common.Observation(len(response.ids), processor.next_turn(turn, images), "", False))
    got, places = common.transcript(prompt, response.ids, response.observations)
    context = reopold.with_tools(row)
    answers = [{"role": "assistant", "content": text} for text in said]
    whole = common.Context([*context.messages, answers[0], turns[0], answers[1], turns[1], answers[2]], [*row["images"], part])
    text = processor.tokenizer.apply_chat_template(whole.messages, tokenize=False)
    expected = processor.encode_text(text, whole.images)
    assert got.ids == expected.ids[: len(got.ids)] and processor.tokenizer.decode(expected.ids[len(got.ids) :]) == "\n"
    assert torch.equal(got.pixels, expected.pixels) and torch.equal(got.grid, expected.grid) and got.images == whole.images
    assert [got.ids[i] for i in places] == response.ids
    assert common.transcript(common.Prompt([1, 2]), [3, 4, 5], [common.Observation(1, common.Prompt([8, 9]), "", False)]) == \
        (common.Prompt([1, 2, 3, 8, 9, 4, 5]), [2, 5, 6])


def test_a_template_that_rewrites_earlier_turns_is_refused(tiny):
    processor = common.Processor(str(tiny / "student"))
    processor.tokenizer.chat_template = "{{ messages[-1]['role'] }}<|im_end|>{% for m in messages %}{{ m['role'] }}<|im_end|>{% endfor %}"
    with pytest.raises(common.UserError, match="rewrites earlier turns"):
        processor.next_turn(common.user_message("Here", 0), [])


def test_tools_are_offered_where_they_may_be_called(monkeypatch):
    offered = []
    monkeypatch.setattr(common, "sample_responses", lambda engine, rows, contexts, args: offered.append(contexts) or [])
    for calls in (0, 2):
        reopold.rollout([], SimpleNamespace(engine=None), None, reopold.Args(calls=calls))
    assert offered == [{"question": reopold.question}, {"question": reopold.with_tools}]


class Scripted:
    """An engine that says what it is told to: one list of turns a prompt, found by the prompt's first tokens."""

    def __init__(self, processor, scripts):
        self.processor, self.scripts, self.asked = processor, scripts, []
        self.sync = self.rest = None

    def generate(self, prompts, temperature, top_p=1.0, top_k=0, limits=None, seeds=None):
        self.asked.append((prompts, limits))
        responses = []
        for prompt, limit in zip(prompts, limits):
            script = next(turns for ids, turns in self.scripts if prompt.ids[: len(ids)] == ids)
            ids = self.processor.tokenizer(text := script.pop(0))["input_ids"] + [self.processor.tokenizer.eos_token_id]
            kept = ids[:limit]
            responses.append(common.Response(kept, [-0.5] * len(kept), len(ids) <= limit, text if len(ids) <= limit else text[:5]))
        return responses


def converse(processor, rows, scripts, calls=2, max_response=2000):
    prompts = [processor.encode(reopold.with_tools(row)) for row in rows]
    engine = Scripted(processor, [(p.ids, list(script)) for p, script in zip(prompts, scripts)])
    return common.WithTools(engine, calls, common.Args(max_response=max_response)).generate(prompts, 1.0), engine, prompts


def test_turns(processor, tiny_rows):
    """Three responses that end in different turns: order, log-probs, images of images, error messages, and what each turn was shown."""
    zoom, again, bad = call(bbox_2d=[0, 0, 0.5, 1], target_image=1), call(bbox_2d=[0, 0, 0.5, 1], target_image=2), call(bbox_2d=[2, 2, 3, 3000], target_image=1)
    scripts = [["\\boxed{1}"], [f"Closer. {zoom}", f"Closer still. {again}", "\\boxed{2}"], [bad, "\\boxed{3}"]]
    responses, engine, prompts = converse(processor, [tiny_rows[i] for i in range(3)], scripts)
    assert [len(asked) for asked, _ in engine.asked] == [3, 2, 1]
    assert [common.extract_answer(r.text) for r in responses] == ["1", "2", "3"] and all(r.finished for r in responses)
    assert [[o.failed for o in r.observations] for r in responses] == [[], [False, False], [True]]
    assert [image.size for image in common.transcript(prompts[1], responses[1].ids, responses[1].observations)[0].images] == [(96, 32), (48, 32), (24, 32)]
    for r, script in zip(responses, scripts):
        own = [processor.tokenizer(text)["input_ids"] + [processor.tokenizer.eos_token_id] for text in script]
        assert r.ids == sum(own, []) and len(r.log_probs) == len(r.ids)
        assert [o.at for o in r.observations] == [sum(map(len, own[: i + 1])) for i in range(len(own) - 1)]
    assert "(tool: Error: the box lies outside" in responses[2].text
    (second,) = engine.asked[2][0]
    assert second.ids == common.transcript(prompts[1], responses[1].ids[: responses[1].observations[1].at], responses[1].observations)[0].ids


def test_an_endless_loop_of_calls_ends(processor, tiny_rows):
    zoom = call(bbox_2d=[0, 0, 1, 1], target_image=1)
    (response,), engine, _ = converse(processor, [tiny_rows[0]], [[zoom] * 9], calls=3)
    assert len(engine.asked) == 4 and len(response.observations) == 3 and not response.finished and response.refused


def test_a_conversation_has_at_most_sixteen_images(processor, tiny_rows):
    again = call("select_frames", target_frames=[1] * 8)
    (response,), engine, _ = converse(processor, [tiny_rows[0]], [[again] * 3], calls=3)
    assert len(response.observations) == 1 and response.refused and not response.finished  # 1 + 8, and 8 more would be 17


def test_all_tokens_behind_the_prompt_count(processor, tiny_rows):
    """The limit shrinks by what was said and shown; a reply without room for an answer ends the response, as does a call that is cut off."""
    zoom = call(bbox_2d=[0, 0, 1, 1], target_image=1)
    (full,), engine, prompts = converse(processor, [tiny_rows[0]], [[zoom, "\\boxed{1}"]])
    used = [len(asked[0].ids) - len(prompts[0].ids) for asked, _ in engine.asked]
    assert [limits for _, limits in engine.asked] == [[2000 - n] for n in used]
    (tight,), engine, _ = converse(processor, [tiny_rows[0]], [[zoom, "\\boxed{1}"]], max_response=used[1] + 1)
    assert engine.asked[1][1] == [1] and not tight.finished
    (none,), engine, _ = converse(processor, [tiny_rows[0]], [[zoom, "\\boxed{1}"]], max_response=used[1])
    assert len(engine.asked) == 1 and not none.observations and not none.finished and none.refused
    (cut,), engine, _ = converse(processor, [tiny_rows[0]], [[zoom, "\\boxed{1}"]], max_response=10)
    assert len(engine.asked) == 1 and len(cut.ids) == 10 and not cut.finished


class Calling:
    """The real engine, whose answers of the first turns are taken for calls: an untrained model makes none."""

    def __init__(self, engine):
        self.engine, self.processor, self.sync, self.rest, self.turn = engine, engine.processor, engine.sync, engine.rest, 0

    def generate(self, *what):
        self.turn += 1
        said = self.engine.generate(*what)
        for i, response in enumerate(said):
            response.finished = True
            response.text = call(bbox_2d=[0, 0, 0.5 if i % 2 else -0.5, 1], target_image=self.turn) if self.turn < 3 else response.text
        return said


def test_what_was_sampled_in_turns_has_the_trainers_log_probs(tiny, tiny_rows, processor):
    """Tokens sampled after images and error messages, against one forward pass over the whole conversation; and tools' tokens get no gradient."""
    torch.manual_seed(0)
    engine = common.HFEngine(str(tiny / "student"), processor, common.Args(dtype="float32", max_response=40))
    engine.ends = [engine.processor.tokenizer.eos_token_id]
    short = common.Args(max_response=200)
    real = engine.generate
    engine.generate = lambda prompts, t, p, k, room, seeds: real(prompts, t, p, k, [6 + i for i in range(len(room))])
    prompts = [processor.encode(reopold.with_tools(tiny_rows[i])) for i in range(4)]
    responses = common.WithTools(Calling(engine), 2, short).generate(prompts, 1.0)
    assert [len(r.observations) for r in responses] == [2] * 4 and {o.failed for r in responses for o in r.observations} == {True, False}
    model = common.Model(str(tiny / "student"), torch.float32)
    batch = processor.batch(prompts, [r.ids for r in responses], [r.observations for r in responses])
    kept = []
    model.lm.model.register_forward_hook(lambda module, inputs, output: kept.append(output.last_hidden_state) or output.last_hidden_state.retain_grad())
    hidden = model(batch)
    logits = hidden @ model.head().T
    logits[:, engine.banned] = -torch.inf
    ids = torch.tensor([i for r in responses for i in r.ids])
    log_p = common.gather(logits.log_softmax(-1), ids)
    torch.testing.assert_close(log_p, torch.tensor([x for r in responses for x in r.log_probs]), rtol=0, atol=5e-5)
    log_p.sum().backward()
    trained = kept[0].grad.any(-1).nonzero().tolist()  # the positions that predict a token of a loss
    assert trained == [[b, place - 1] for b, r in enumerate(responses) for place in common.transcript(prompts[b], r.ids, r.observations)[1]]


def test_each_response_has_its_own_limit(tiny, tiny_rows, processor):
    engine = common.HFEngine(str(tiny / "student"), processor, common.Args(dtype="float32", max_response=40, rollout_batch=2))
    engine.ends = []
    prompts = [processor.encode(reopold.question(tiny_rows[i])) for i in range(3)]
    responses = engine.generate(prompts, 1.0, limits=[3, 9, 1])
    assert [len(r.ids) for r in responses] == [len(r.log_probs) for r in responses] == [3, 9, 1] and not any(r.finished for r in responses)


def test_real_runs_with_tools(tiny, tmp_path):
    """An untrained student calls nothing; offered a tool on two ranks it still trains, and the log says so."""
    result = run_script("reopold.py", *flags(tiny, tmp_path / "run", calls=2, updates=1), torchrun=2)
    assert result.returncode == 0, result.stderr
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["tool_calls"] == last["tool_errors"] == last["tool_refused"] == 0 < last["grad_norm"]


def test_tools_want_a_student_that_sees(tiny, tmp_path):
    result = run_script("reopold.py", *flags(tiny, tmp_path / "run", student=tiny / "text-only", teacher=tiny / "text-only", calls=2))
    assert result.returncode != 0 and "is a text-only model" in result.stdout + result.stderr and "Traceback" not in result.stderr
