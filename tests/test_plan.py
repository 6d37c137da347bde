"""--plan: what it says against the measured peak of one update, and that it needs no weights."""

import json

import pytest
import torch
from conftest import run_script

import common
import toy
import vgs


@pytest.fixture(scope="module")
def models(tiny, tmp_path_factory):
    """Real classes with 30 and 40 million parameters, so that they outweigh what Python itself holds."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = common.Processor(str(tiny / "student")).tokenizer
    for name, hidden, layers in (("student", 512, 4), ("teacher", 640, 4)):
        toy.make_model("qwen3_vl", tokenizer, hidden, layers, 64, 20_000).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        toy.image_processor("qwen3_vl").save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("settings", [
    {"method": "vgs", "prompts": 16, "micro_tokens": 4000},
    pytest.param({"method": "standard", "prompts": 16, "micro_tokens": 2000, "gradient_checkpointing": True}, marks=pytest.mark.slow),
    pytest.param({"method": "standard", "prompts": 4, "micro_tokens": 1000}, marks=pytest.mark.slow),
    pytest.param({"method": "standard", "prompts": 16, "micro_tokens": 4000, "lora": 8}, marks=pytest.mark.slow),
], ids=["two contexts", "checkpointing", "small", "LoRA"])
def test_the_plan_is_near_the_measured_peak(models, settings):
    result = run_script("tests/peak.py", models, json.dumps(settings))
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    # On a CPU attention under a mask keeps its scores and probabilities: 2 x 16 heads x 250 positions a token and layer.
    tokens = settings["micro_tokens"]
    attention = 4 * tokens * 2 * 16 * 250 * (1 if settings.get("gradient_checkpointing") else 4)
    assert 0.75 < (found["planned"] + attention) / found["measured"] < 1.35, found
    assert found["parameters"][0] >= found["parameters"][1]  # adapters are not in the config


def test_it_needs_configs_alone(models, tmp_path):
    for name in ("student", "teacher"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text((models / name / "config.json").read_text())
    result = run_script("vgs.py", "--preset", "toy", "--student", tmp_path / "student", "--teacher", tmp_path / "teacher", "--plan", "8", "--card", "0.5")
    assert result.returncode == 0, result.stderr
    assert "GiB on each of 8 GPUs" in result.stdout and "does not fit into 0.5 GiB: lower --micro-tokens" in result.stdout


@pytest.mark.parametrize("message, argv", [("so many ranks cannot share", ["--plan", "7"]), ("--card would have no effect", ["--card", "40"])])
def test_bad_plans(message, argv):
    result = run_script("vgs.py", "--preset", "toy", *argv)
    assert result.returncode != 0 and message in result.stderr


def test_shards_and_replicas():
    """The fixed parts are shared by all ranks of a copy."""
    one, eight, copies = (common.plan_memory(vgs.Args(student="toy/student", prompts=64, dtype="float32", engine="hf", plan=n, replicas=r), "toy/teacher", 2, 2)
                          for n, r in ((1, 1), (8, 1), (8, 2)))
    for name in ("student, float32, sharded", "optimizer, sharded", "gradients, sharded", "teacher, sharded"):
        assert one[name][1] == 8 * eight[name][1] == 4 * copies[name][1] > 0
    assert one["teacher's output matrix, whole"] == eight["teacher's output matrix, whole"] and torch.tensor(list(one.values())).isfinite().all()
