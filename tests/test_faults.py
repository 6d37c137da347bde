"""What goes wrong in the middle of a run: numbers that are not finite, ranks that die or hang, full memory."""

import json
import re
from pathlib import Path

import common
import vgs

import pytest
import torch
from conftest import flags, in_tiny, run_script

GRPO = dict(group=2, temperature=2.0)
TEXT = dict(teacher="text-only", data="text.parquet", column_text="text_problem")
TRACES = dict(trace_data="text.parquet", trace_column="text_problem", sft_batch=4, sft_steps=2)
RUNS = {
    "vgs.py": dict(alpha=0.3, **GRPO),
    "ptdpo.py": dict(teacher=None, **GRPO),
    "vold.py": dict(stage="rl", mask="none", **TEXT, **GRPO),
    "vold.py, stage sft": dict(max_response=100, **TEXT, **TRACES, **GRPO),
    "vigos.py": dict(teacher=None, column_reference="solution", conflict_data=""),
    "reopold.py": dict(updates=1),
}
FAULTS = ("loss-nan", "loss-inf", "gradient-nan", "gradient-inf", "teacher-nan", "reward-nan")
QUICK = {("ptdpo.py", "reward-nan")}


def can_strike(name: str, fault: str) -> bool:
    """Not every run has rewards, and sft has no teacher."""
    without_rewards = "group" not in RUNS[name] or "sft" in name
    if fault == "teacher-nan":
        return "sft" not in name
    return fault != "reward-nan" or not without_rewards


def slow_unless(quick, cases) -> list:
    return [pytest.param(*of, marks=[pytest.mark.slow] * (of not in quick)) for of in cases]


GRID = [(name, fault) for name in RUNS for fault in FAULTS if can_strike(name, fault)]


@pytest.mark.parametrize("name, fault", slow_unless(QUICK, GRID))
def test_nothing_that_is_not_finite_reaches_the_weights(name, fault, tiny, tmp_path):
    """On one of two ranks, in the second step: both stop, no weight moves, and rank, quantity and row are named."""
    settings = in_tiny(tiny, RUNS[name]) | dict(eval_data="")
    argv = flags(tiny, tmp_path / "run", **settings)
    script = name.split(",")[0]
    result = run_script("tests/faulty.py", tmp_path / "result", script, fault, *argv, ranks=2)
    assert result.returncode != 0, result.stderr
    first, second = json.loads((tmp_path / "result").read_text())
    assert [first["moved"], second["moved"]] == [False, False]
    assert [first["updates"], second["updates"]] == [1, 1]
    assert result.stderr.count("error: step 2: not finite: ") == 1, result.stderr
    assert "rank 0: " not in result.stderr, "that one is innocent"
    if "gradient" in fault:
        assert "not finite: the gradient, of finite terms" in result.stderr, result.stderr
    else:
        named = re.search(r"rank 1: [\w ]+ of row (\d+)", result.stderr)
        assert named and int(named[1]) in second["rows"], result.stderr
    folder = tmp_path / "run" / {"vold.py": "rl", "vold.py, stage sft": "sft"}.get(name, "")
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 1 and not (folder / "final").exists()


PLACES = ("rollout", "update", "save")
DEATHS = [(script, how, where) for script in RUNS for how in ("die", "hang") for where in PLACES]
DEATHS = [of for of in DEATHS if "sft" not in of[0]]


@pytest.mark.parametrize("script, how, where", slow_unless({("vgs.py", "die", "update")}, DEATHS))
def test_nobody_waits_for_a_dead_rank(script, how, where, tiny, tmp_path):
    """One of two ranks is killed, or stops without a word: the run ends, and leaves no process and no torn checkpoint.

    That it ends is seen by the limit of the whole run, which is there for what hangs.
    """
    changes = dict(max_steps=4, eval_data="", save_every=1) | (
        {"timeout": 1} if how == "hang" else {}
    )
    argv = [
        script,
        f"{how}-{where}",
        *flags(tiny, tmp_path / "run", **in_tiny(tiny, RUNS[script]) | changes),
    ]
    result = run_script("tests/faulty.py", tmp_path / "result", *argv, torchrun=2, timeout=900)
    assert result.returncode != 0 and not list((tmp_path / "run").rglob("final"))
    if how == "die":
        assert "Signal 9 (SIGKILL)" in result.stderr, result.stderr
    assert not [
        p for p in Path("/proc").glob("[0-9]*/cmdline") if str(tmp_path).encode() in read(p)
    ]
    saved = [p.name for p in (tmp_path / "run").rglob("checkpoints/step-??????")]
    assert saved == ([] if where == "save" else ["step-000001"])


def test_full_memory_is_explained(tiny, tmp_path, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(vgs, "rollout", full)
    result = run_script("vgs.py", *flags(tiny, tmp_path / "run"))
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert re.search(
        r"rank 0 is out of GPU memory.*Tried to allocate 20 GiB.*--micro-tokens", result.stderr
    )


@pytest.mark.parametrize(
    "script, bent", [("vgs.py", {}), ("vgs.py", {"top_p": 0.5}), ("reopold.py", {"top_k": 20})]
)
def test_a_sampler_that_is_not_the_model_is_named_once(script, bent, tiny, tmp_path):
    result = run_script(script, *flags(tiny, tmp_path / "run", **bent))
    assert result.returncode == 0, result.stderr
    said = " ".join((result.stdout + result.stderr).split())
    assert said.count("(sampler_gap)") == bool(bent), said
    gaps = [
        json.loads(line).get("sampler_gap") for line in open(tmp_path / "run" / "metrics.jsonl")
    ]
    assert all((gap > common.SAMPLER_GAP) == bool(bent) for gap in gaps if gap is not None)


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has just ended
        return b""
