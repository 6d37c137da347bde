"""The real script, run as a user runs it, on tiny models: two ranks, interruption, a copied folder, torch alone."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import common
import vgs

import pytest
import torch
from conftest import METHODS, ROOT, flags, in_tiny, run_script


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_run(folder, steps: int):
    """Metrics of every step, finite; samples; a final checkpoint that from_pretrained loads."""
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

    metrics = lines(folder / "metrics.jsonl")
    assert [m["step"] for m in metrics] == list(range(steps + 1))
    assert "acc@1" in metrics[0] and "acc@1" in metrics[-1]
    for m in metrics:
        for value in m.values():
            values = value if isinstance(value, list) else [value]
            assert all(math.isfinite(v) for v in values), m
    sample = lines(folder / "samples.jsonl")[0]
    assert sample.keys() >= {"step", "row", "problem", "response", "answer", "ids"}
    final = folder / "final"
    model, info = AutoModelForImageTextToText.from_pretrained(final, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    AutoTokenizer.from_pretrained(final).apply_chat_template([{"role": "user", "content": "a"}])
    AutoImageProcessor.from_pretrained(final, backend="pil")
    return metrics, model


VARIANTS = {
    "standard": dict(gamma=0, lambda_lp=0),
    "vgs": dict(lambda_lp=0),
    "vgs-lp": dict(measure_eta=1),
    "adaptive": dict(steer="adaptive", warmup=1, schedule="cosine"),
    "language": dict(steer="language", freeze_vision=True),
    "grpo": dict(alpha=0, group=2, updates=2, teacher=None, save_every=1),
    "mixed": dict(alpha=0.3, group=2, gradient_checkpointing=True),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_runs(tiny, tmp_path, name):
    result = run_script("vgs.py", *flags(tiny, tmp_path / "run", **VARIANTS[name]))
    assert result.returncode == 0, result.stderr
    metrics, model = check_run(tmp_path / "run", 2)
    last = metrics[-1]
    assert ("vis" in last) == (name not in ("standard", "grpo"))
    assert ("eta" in last) == (name == "vgs-lp")
    assert ("std" in last) == (name != "grpo")
    saved = tmp_path / "run" / "checkpoints" / "step-000001" / "model.safetensors"
    assert saved.exists() == (name == "grpo")
    before = common.Model(str(tiny / "student"), torch.float32).lm.state_dict()
    after = model.state_dict()
    moved = {key for key, value in after.items() if not torch.equal(value, before[key])}
    assert any("language_model" in key for key in moved)
    seen = any("visual" in key for key in moved)
    assert seen == (name != "language"), "the vision tower is trained, unless it is frozen"


def test_standard_logs_what_the_formula_says(tiny, tmp_path):
    """The std of a step equals KL(pI || qI) of its written samples, re-computed from the checkpoints."""
    argv = flags(tiny, tmp_path / "run", gamma=0, lambda_lp=0, max_steps=1)
    result = run_script("vgs.py", *argv)
    assert result.returncode == 0, result.stderr
    processor = common.Processor(str(tiny / "student"))
    student, teacher = (common.Model(str(tiny / x), torch.float32) for x in ("student", "teacher"))
    args = common.Args(data=str(tiny / "rows.parquet"))
    rows = common.load_rows(args, processor, {}, "problem images answer")
    samples = lines(tmp_path / "run" / "samples.jsonl")
    assert len(samples) == 4
    total = 0.0
    for sample in samples:
        prompt = processor.encode(vgs.with_image(rows[sample["row"]]))
        batch, found = processor.batch([prompt], [common.Response(sample["ids"])]), []
        for model in (student, teacher):
            with torch.no_grad():
                logits = model(batch) @ model.head().T
            found.append(logits[:, : processor.vocab].double().softmax(-1))
        p, q = found
        total += (p * (p.log() - q.log())).sum(-1).mean().item() / 4
    logged = lines(tmp_path / "run" / "metrics.jsonl")[1]["std"]
    assert logged == pytest.approx(total, rel=1e-4)


MIXED = dict(alpha=0.3, group=2, updates=2, gradient_checkpointing=True)
TWO_RANKS = [
    dict(dtype="bfloat16", measure_eta=1, eval_rows=1),
    pytest.param(MIXED, marks=pytest.mark.slow),
    pytest.param(dict(replicas=2), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("changes", TWO_RANKS)
def test_two_ranks(tiny, tmp_path, changes):
    """With one held-out question the second rank has nothing to answer, and nobody waits for it."""
    result = run_script("vgs.py", *flags(tiny, tmp_path / "run", **changes), torchrun=2)
    assert result.returncode == 0, result.stderr
    check_run(tmp_path / "run", 2)


# ------------------------------------------------------------------------------------------------ how it ends
def test_interruption_leaves_a_readable_run(tiny, tmp_path):
    argv = flags(tiny, tmp_path / "run", max_steps=5000)
    process = subprocess.Popen(
        [sys.executable, "vgs.py", *argv],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # a background shell ignores it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 2):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 1 and "error: interrupted" in errors, errors
    assert "Traceback" not in errors and "--output goes on" in errors, errors
    assert len(lines(metrics)) >= 3 and lines(tmp_path / "run" / "samples.jsonl")
    assert json.loads((tmp_path / "run" / "args.json").read_text())["max_steps"] == 5000


ERRORS = {
    "the parser": (dict(gama=1), "--gama"),
    "a range": (dict(top_p=1.5), "--top-p is 1.5"),
    "the method's check": (dict(alpha=0.3), "GRPO compares"),
    "a checkpoint": (dict(student="nowhere"), "'nowhere' cannot be read"),
    "a column": (dict(column_problem="question"), "no column 'question'"),
    "the batch": (dict(prompts=3), "--prompts 3 has to be a multiple of ranks x updates, 2 x 1"),
}
EARLY = ("the parser", "a range", "the method's check")  # before the ranks know each other
SLOW = ("a range", "the method's check", "a checkpoint", "the batch")
LATE = """
import atexit, os, pathlib, time
ended, start = pathlib.Path({folder!r}, "ended"), time.monotonic()
if os.environ.get("RANK") == "1":
    atexit.register(ended.touch)
while os.environ.get("RANK") == "0" and not ended.exists() and time.monotonic() < start + 60:
    time.sleep(0.1)
if os.environ.get("RANK") == "0":
    time.sleep(1)
"""


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in ERRORS]
)
def test_an_error_is_printed_once_under_torchrun(tiny, tmp_path, name):
    """The early ones also where the second rank has ended before the first begins, which torchrun then ends."""
    changes, words = ERRORS[name]
    if name in EARLY:
        (tmp_path / "sitecustomize.py").write_text(LATE.format(folder=str(tmp_path)))
    argv = flags(tiny, tmp_path / "run", **changes)
    result = run_script("vgs.py", *argv, torchrun=2, env={"PYTHONPATH": str(tmp_path)})
    assert result.returncode != 0
    said = " ".join(result.stderr.replace("│", " ").split())
    assert said.count(words) == said.count("error: ") == 1, result.stderr
    assert words in said.split("Traceback")[0], "a traceback, if any, is torchrun's own"


def test_an_error_of_one_rank_alone_is_printed(tiny, tmp_path):
    """Such as a machine that lacks a file: here the second rank does not find the teacher."""
    (tmp_path / "sitecustomize.py").write_text("""
import os, pathlib
if os.environ.get("RANK") == "1":
    exists = pathlib.Path.exists
    pathlib.Path.exists = lambda self: self.name != "final" and exists(self)
""")
    (tmp_path / "runs" / "teacher" / "final").mkdir(parents=True)
    argv = ["--preset", "2b", "--student", tiny / "student", "--data", tiny / "rows.parquet"]
    env = {"PYTHONPATH": str(tmp_path)}
    result = run_script(ROOT / "vgs.py", *argv, torchrun=2, cwd=tmp_path, env=env)
    assert result.returncode != 0 and result.stderr.count("is not there yet") == 1, result.stderr


SAMPLER = "not finite: the sampler's logits"


@pytest.mark.parametrize(
    "model, message, changes, ranks",
    [
        ("teacher", "step 1: not finite: rank 0: std of row", {}, 0),
        ("student", SAMPLER, {}, 0),  # greedy, before the first step
        ("student", SAMPLER, {"eval_data": ""}, 0),
        ("student", SAMPLER, {}, 2),
        ("student", SAMPLER, {"eval_data": ""}, 2),
    ],
)
def test_a_non_finite_model_stops_before_the_weights_move(
    tiny, tmp_path, model, message, changes, ranks
):
    """A NaN among its weights: the run says which term of which row, or who sampled, and saves no final checkpoint."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny / model, tmp_path / "broken")
    weights = load_file(tmp_path / "broken" / "model.safetensors")
    weights["model.language_model.norm.weight"][0] = float("nan")
    save_file(weights, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    argv = flags(tiny, tmp_path / "run", **{model: tmp_path / "broken"} | changes)
    result = run_script("vgs.py", *argv, ranks=ranks)
    assert result.returncode != 0 and "Traceback" not in result.stderr, result.stderr
    assert result.stderr.count(message) == 1, result.stderr
    assert not (tmp_path / "run" / "final").exists()


# ------------------------------------------------------------------------------------------------ copied
SETTINGS = {
    "vgs.py": dict(),
    "ptdpo.py": dict(teacher=None, group=2),
    "vold.py": dict(
        stage="rl", teacher="text-only", data="text.parquet", column_text="text_problem", group=2
    ),
    "vigos.py": dict(teacher=None, column_reference="solution", conflict_data=""),
    "reopold.py": dict(updates=1),
}


@pytest.mark.parametrize(
    "script", [pytest.param(s, marks=[pytest.mark.slow] * (s != "vgs.py")) for s in METHODS]
)
def test_copying_the_files_is_enough(tiny, tmp_path, script):
    for name in (script, "common.py"):
        shutil.copy(ROOT / name, tmp_path)
    if (ROOT / "kernels").exists():
        shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    settings = in_tiny(tiny, SETTINGS[script])
    result = run_script(
        script, *flags(tiny, tmp_path / "run", max_steps=1, **settings), cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    check_run(tmp_path / "run" / ("rl" if script == "vold.py" else ""), 1)


@pytest.mark.parametrize("module", [*(m.removesuffix(".py") for m in METHODS), "tools.hints"])
def test_threads_and_bars_are_told_before_they_are_imported(module):
    """On a busy machine threads sleep while they wait; a bar in a file is a line a minute. The user's own hold."""
    code = "import os; os.getloadavg = lambda: (LOAD, 0, 0); "
    code += f"import {module}, tqdm; print(tqdm.tqdm(range(1)).mininterval)"
    own = dict(OMP_WAIT_POLICY="ACTIVE", TQDM_MININTERVAL="5")
    for load, more, sleeps, seconds in (
        (0.5, {}, False, 60),
        (2, {}, True, 60),
        (2, own, False, 5),
    ):
        env = {"PATH": os.environ["PATH"], "OMP_DISPLAY_ENV": "verbose"} | more
        words = [sys.executable, "-c", code.replace("LOAD", str(load))]
        result = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
        assert float(result.stdout) == seconds, result.stderr
        shown = re.search(r"GOMP_SPINCOUNT = '(\d+)'", result.stderr)
        if shown:  # GNU's OpenMP
            assert (shown[1] == "0") == sleeps


def test_importing_needs_torch_alone():
    """Every other package is hidden; the loss functions work all the same."""
    code = """
import importlib.abc, sys
HIDDEN = "transformers datasets numpy tqdm tyro PIL vllm accelerate safetensors sklearn math_verify peft openai"
class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in HIDDEN.split():
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hide())
import torch, ptdpo, reopold, vgs, vigos, vold
z = [torch.randn(5, 11) for _ in range(4)]
std, vis, lang = vgs.divergences(*z)
vds = vgs.visual_dependency(*z[2:])
weights = vgs.steering(vds, vds.quantile(0.4), vds.quantile(0.7), vgs.Args())
assert std.shape == weights["lang"].shape == (5,)
print("ok")
"""
    result = run_script("-c", code)
    assert result.stdout.strip() == "ok", result.stderr
