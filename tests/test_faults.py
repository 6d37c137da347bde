"""What goes wrong in the middle of a run: numbers that are not finite, ranks that die or hang, memory that runs out."""

import json
import re
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import flags, in_tiny, run_script

import common
import vgs

GRPO = dict(group=2, temperature=3.0)
RUNS = {
    "vgs.py": dict(alpha=0.3, **GRPO),
    "ptdpo.py": dict(teacher=None, **GRPO),
    "vold.py": dict(teacher="text-only", data="text.parquet", stage="rl", column_text="text_problem", mask="none", **GRPO),
    "vold.py, stage 1": dict(teacher="text-only", data="text.parquet", column_text="text_problem", trace_data="text.parquet", trace_column="text_problem",
                             right_traces_only=False, sft_batch=4, sft_steps=2, max_response=40, **GRPO),
    "vigos.py": dict(teacher=None, column_reference="solution", conflict_data=""),
    "reopold.py": dict(updates=1),
}
FAULTS = ("loss-nan", "loss-inf", "gradient-nan", "gradient-inf", "teacher-nan", "reward-nan")
QUICK = ("loss-nan", "reward-nan", "teacher-nan", "loss-nan", "gradient-inf", "loss-inf")  # the one of each that the gate runs
GRID = [(name, fault) for name, settings in RUNS.items() for fault in FAULTS
        if not (fault == "reward-nan" and "group" not in settings or fault in ("reward-nan", "teacher-nan") and "stage 1" in name)]


@pytest.mark.parametrize("script, fault", [pytest.param(*of, marks=[pytest.mark.slow] * (of not in zip(RUNS, QUICK))) for of in GRID])
def test_nothing_that_is_not_finite_reaches_the_weights(script, fault, tiny, tmp_path):
    """On one of two ranks only, in the second step: both stop there, no weight moves, and rank and quantity are named."""
    argv = flags(tiny, tmp_path / "run", **in_tiny(tiny, RUNS[script]) | dict(max_steps=2, eval_data="", eval_split=None, eval_rows=None, eval_every=None))
    result = run_script("tests/faulty.py", tmp_path / "result", script.split(",")[0], fault, *argv, torchrun=2)
    assert result.returncode != 0, result.stderr
    found = json.loads((tmp_path / "result").read_text())
    assert found["moved"] == [False, False] and found["updates"] == [1, 1]
    assert "rank 0: " not in result.stderr, "that one is innocent"
    quantity = {"loss": r"rank 1: \w+ \(from row \d+\)", "gradient": "rank 1: gradient of ", "teacher": r"rank 1: .*(hidden states of teacher 0|log_q) \(",
                "reward": r"rank 1: advantage \("}[fault.split("-")[0]]
    assert "step 2: not finite: " in result.stderr and re.search(quantity, result.stderr), result.stderr
    folder = tmp_path / "run" / {"vold.py": "rl", "vold.py, stage 1": "sft"}.get(script, "")
    batches = [torch.load(folder / f"not-finite-rank-{r}.pt") for r in range(2)]
    assert all({"rows", "batch", "ids", "terms", "weights"} <= micro.keys() for batch in batches for micro in batch)
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 1 and not (folder / "final").exists()


DEATHS = [(script, f"{how}-{where}") for script in RUNS if script.endswith(".py") for how in ("die", "hang") for where in ("rollout", "update", "save")]


@pytest.mark.parametrize("script, fault", [pytest.param(*of, marks=[pytest.mark.slow] * (of != ("vgs.py", "die-update"))) for of in DEATHS])
def test_nobody_waits_for_a_dead_rank(script, fault, tiny, tmp_path):
    """One of two ranks is killed, or stops without a word: the run ends within a minute, says so, and leaves no process and no torn checkpoint."""
    changes = dict(max_steps=4, eval_data="", eval_split=None, eval_rows=None, eval_every=None, timeout=0.2, save_every=1)
    argv = flags(tiny, tmp_path / "run", **in_tiny(tiny, RUNS[script]) | changes)
    start = time.monotonic()
    result = run_script("tests/faulty.py", tmp_path / "result", script, fault, *argv, torchrun=2)
    assert result.returncode != 0 and time.monotonic() - start < 90  # start-up included; torchrun gives a hanging process 30 seconds
    assert "rank 0 has lost the others" in result.stderr if "hang" in fault else "Signal 9 (SIGKILL)" in result.stderr, result.stderr
    left = [p for p in Path("/proc").glob("[0-9]*/cmdline") if str(tmp_path).encode() in read(p)]
    assert not left
    saved = [p.name for p in (tmp_path / "run").rglob("checkpoints/step-?")]
    assert saved == ([] if "save" in fault else ["step-1"])


def test_full_memory_is_explained_by_the_plan(tiny, tmp_path, monkeypatch, capsys):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(vgs, "rollout", full)
    monkeypatch.setattr(sys, "argv", ["vgs.py", *flags(tiny, tmp_path / "run")])
    with pytest.raises(common.UserError, match="rank 0 is out of GPU memory.*Tried to allocate 20 GiB.*--micro-tokens"):
        common.launch(vgs.main)
    torch.distributed.destroy_process_group()
    assert "GiB on each of 1 GPUs" in capsys.readouterr().out


@pytest.mark.parametrize("script, bent", [("vgs.py", {}), ("vgs.py", {"top_p": 0.9}), ("reopold.py", {"temperature": 1.5, "top_k": 20})])
def test_a_sampler_that_is_not_the_model_is_named_once(script, bent, tiny, tmp_path):
    result = run_script(script, *flags(tiny, tmp_path / "run", **bent))
    said = "".join((result.stdout + result.stderr).split())
    assert result.returncode == 0 and said.count("responsesaresampledwith") == bool(bent), result.stderr
    if bent:
        assert f"temperature{bent.get('temperature', 1.0)},top-p{bent.get('top_p', 1.0)}andtop-k{bent.get('top_k', 0)};" in said


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has just ended
        return b""
