"""The real script, run as a user runs it, on tiny models: every method, two ranks, interruption, a copied folder, torch alone."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, flags, run_script

import common


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_run(folder, steps: int):
    """Metrics of every step, finite; samples; a final checkpoint that from_pretrained loads."""
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

    metrics = lines(folder / "metrics.jsonl")
    assert [m["step"] for m in metrics] == list(range(steps + 1)) and "acc@1" in metrics[0] and "acc@1" in metrics[-1]
    for m in metrics:
        for value in m.values():
            assert all(math.isfinite(v) for v in (value if isinstance(value, list) else [value])), m
    assert lines(folder / "samples.jsonl")[0].keys() >= {"step", "row", "problem", "response", "answer", "ids"}
    model, info = AutoModelForImageTextToText.from_pretrained(folder / "final", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    AutoTokenizer.from_pretrained(folder / "final").apply_chat_template([{"role": "user", "content": "a"}])
    AutoImageProcessor.from_pretrained(folder / "final", backend="pil")
    return metrics, model


@pytest.mark.parametrize("name, changes", {
    "standard": dict(method="standard"),
    "standard-all-terms": dict(method="standard", log_all_terms=""),
    "vgs": dict(method="vgs"),
    "vgs-lp": dict(method="vgs-lp", measure_eta=1),
    "adaptive": dict(method="adaptive", warmup=1, schedule="cosine"),
    "lang-steer": dict(method="lang-steer", freeze_vision=""),
    "grpo": dict(method="grpo", group=2, updates=2, teacher=None, save_every=1),
    "mixed": dict(method="vgs-lp", alpha=0.3, group=2, eval_samples=2, gradient_checkpointing=""),
}.items())
def test_every_method_runs(tiny, tmp_path, name, changes):
    argv = [part for part in flags(tiny, tmp_path / "run", **changes) if part]
    result = run_script("vgs.py", *argv)
    assert result.returncode == 0, result.stderr
    metrics, model = check_run(tmp_path / "run", 2)
    last = metrics[-1]
    assert ("vis" in last) == (name not in ("standard", "grpo")) and ("eta" in last) == (name == "vgs-lp")
    assert ("std" in last) == (name != "grpo") and ("reward" in last) == (name in ("grpo", "mixed"))
    assert (tmp_path / "run" / "checkpoints" / "step-1").exists() == (name == "grpo")
    if name == "mixed":
        assert {"acc@2", "pass@2", "maj@2"} <= last.keys() and "acc@2" in metrics[0]
    before = common.Model(str(tiny / "student"), torch.float32).lm.state_dict()
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert any("language_model" in key for key in moved)
    assert any("visual" in key for key in moved) == (name != "lang-steer"), "the vision tower is trained, unless it is frozen"


def test_standard_logs_what_the_formula_says(tiny, tmp_path):
    """The std of a step equals KL(pI || qI) of its written samples, re-computed from the checkpoints."""
    result = run_script("vgs.py", *flags(tiny, tmp_path / "run", method="standard", max_steps=1, log_samples=4))
    assert result.returncode == 0, result.stderr
    import vgs

    processor = common.Processor(str(tiny / "student"))
    student, teacher = (common.Model(str(tiny / name), torch.float32) for name in ("student", "teacher"))
    rows = common.Rows(str(tiny / "rows.parquet"), "train", {"problem": "problem"})
    samples = lines(tmp_path / "run" / "samples.jsonl")
    assert len(samples) == 4
    total = 0.0
    for sample in samples:
        prompt, ids = processor.encode(vgs.with_image(rows[sample["row"]])), sample["ids"]
        with torch.no_grad():
            p, q = ((m(processor.batch([prompt], [ids])) @ m.head().T)[:, : processor.vocab].double().softmax(-1) for m in (student, teacher))
        total += (p * (p.log() - q.log())).sum(-1).mean().item() / 4
    assert lines(tmp_path / "run" / "metrics.jsonl")[1]["std"] == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("changes", [{}, dict(method="vgs-lp", alpha=0.3, group=2, updates=2, gradient_checkpointing=""), dict(dtype="bfloat16", measure_eta=1),
                                     dict(lora=4, dtype="bfloat16")])  # fmt: skip
def test_two_ranks(tiny, tmp_path, changes):
    result = run_script("vgs.py", *[part for part in flags(tiny, tmp_path / "run", **changes) if part], torchrun=2)
    assert result.returncode == 0, result.stderr
    check_run(tmp_path / "run", 2)


def test_analyze_on_more_ranks_than_questions(tiny, tmp_path):
    """Two ranks, one held-out question: the second rank has nothing, and nobody waits for it."""
    argv = flags(tiny, tmp_path / "run", data=None, prompts=None, max_steps=None, eval_rows=1, eval_every=None)
    result = run_script("vgs.py", *argv, "--analyze", torchrun=2)
    assert result.returncode == 0 and (tmp_path / "run" / "angles.json").exists(), result.stderr


def test_analyze_writes_ten_bins(tiny, tmp_path):
    result = run_script("vgs.py", *flags(tiny, tmp_path / "run", data=None, prompts=None, max_steps=None, eval_rows=8, eval_every=None), "--analyze")
    assert result.returncode == 0, result.stderr
    table = json.loads((tmp_path / "run" / "angles.json").read_text())
    assert [row["bin"] for row in table] == list(range(10)) and result.stdout.count("\n   ") >= 10
    assert all(0 <= row[key] <= 180 for row in table for key in ("lang_vis", "std_vis", "std_lang"))


def test_interruption_leaves_a_readable_run(tiny, tmp_path):
    argv = flags(tiny, tmp_path / "run", max_steps=500)
    process = subprocess.Popen([sys.executable, "vgs.py", *argv], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a background shell ignores it
    metrics = tmp_path / "run" / "metrics.jsonl"
    for _ in range(600):
        if metrics.exists() and metrics.read_text().count("\n") >= 3:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and "interrupted in step" in errors and "Traceback" not in errors, errors
    assert len(lines(metrics)) >= 3 and lines(tmp_path / "run" / "samples.jsonl") and json.loads((tmp_path / "run" / "args.json").read_text())


def test_a_non_finite_gradient_stops_before_the_weights_move(tiny, tmp_path):
    """A teacher with a NaN among its weights: the run says which quantity is not finite, and saves no final checkpoint."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny / "teacher", tmp_path / "broken")
    weights = load_file(tmp_path / "broken" / "model.safetensors")
    weights["model.language_model.norm.weight"][0] = float("nan")
    save_file(weights, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    result = run_script("vgs.py", *flags(tiny, tmp_path / "run", teacher=tmp_path / "broken"))
    assert result.returncode != 0 and "step 1: not finite: rank 0: " in result.stderr and "hidden states of teacher 0" in result.stderr and not (tmp_path / "run" / "final").exists()


def test_copying_the_files_is_enough(tiny, tmp_path):
    for name in ("vgs.py", "common.py"):
        shutil.copy(ROOT / name, tmp_path)
    if (ROOT / "kernels").exists():
        shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    result = run_script("vgs.py", *flags(tiny, tmp_path / "run", max_steps=1), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    check_run(tmp_path / "run", 1)


def test_importing_needs_torch_alone():
    """Every other package is hidden; the loss functions work all the same."""
    code = """
import importlib.abc, sys
class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"transformers", "datasets", "numpy", "tqdm", "tyro", "PIL", "vllm", "accelerate", "safetensors", "sklearn", "math_verify"}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hide())
import torch, vgs
z = [torch.randn(5, 11) for _ in range(4)]
std, vis, lang, vds = vgs.divergences(*z)
assert vgs.steering("vgs-lp", vds, vds.quantile(0.4), vds.quantile(0.7), 2.0, 0.01).shape == (3, 5) and std.shape == (5,)
print("ok")
"""
    result = run_script("-c", code)
    assert result.stdout.strip() == "ok", result.stderr
