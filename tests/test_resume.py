"""A run that is stopped and resumed is the run that was not: weights, tokens and losses, bit for bit; and what cannot be resumed from."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, distance, flags, in_tiny, run_script
from safetensors.torch import load_file

import common

VOLD = dict(teacher="text-only", data="text.parquet", eval_data=None, eval_split=None, eval_rows=None, eval_every=None, sft_batch=4, sft_steps=4,
            right_traces_only=False, trace_data="text.parquet", column_text="text_problem", trace_column="text_problem", group=2, max_response=40, temperature=3.0,
            updates=2)
METHODS = {
    "vgs": ("vgs.py", dict(method="vgs", lambda_lp=None, updates=2, eta=None, measure_eta=3)),
    "ptdpo": ("ptdpo.py", dict(teacher=None, optimizer="dapo", group=2, draws=2)),
    "vold": ("vold.py", VOLD),
    "vigos, LoRA": ("vigos.py", dict(teacher=None, column_reference="solution", conflict_data="", lora=4, lora_targets="q_proj,v_proj")),
    "reopold": ("reopold.py", dict(updates=2, schedule="linear", warmup=2)),
}


def command(tiny, output, name, **changes) -> tuple[str, list[str]]:
    script, settings = METHODS[name]
    return script, flags(tiny, output, **{"prompts": 4, "max_steps": 4, "save_every": 2, "lr": 1e-3} | in_tiny(tiny, settings) | changes)


def done(result) -> str:
    assert result.returncode == 0, result.stderr
    return result.stdout


def refused(result) -> str:
    assert result.returncode != 0 and "Traceback" not in result.stderr, result.stderr
    return result.stderr


def lines(folder, file):
    """Without the seconds, which differ. A response may hold a line end of Unicode's, which splitlines() would take for one."""
    records = [json.loads(line) for line in (folder / file).read_text().split("\n")[:-1]]
    return [{key: value for key, value in record.items() if not key.startswith("seconds")} for record in records]


def same(one, other) -> None:
    for file in ("metrics.jsonl", "samples.jsonl"):
        if (one / file).exists():
            assert lines(one, file) == lines(other, file)
    ours, theirs = (load_file(folder / "final" / "model.safetensors") for folder in (one, other))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def stopped(folder, copy):
    """A copy of a finished run as it was after a checkpoint, with half a line, which ends in half a character, and half a checkpoint behind it."""
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "final")
    (copy / "checkpoints" / "step-3.partial" / "state").mkdir(parents=True)
    with open(copy / "metrics.jsonl", "ab") as f:
        f.write('{"step": 4, "Zürich'.encode()[:-5])
    return copy


@pytest.mark.parametrize("name", METHODS)
def test_resumed_is_as_undisturbed(tiny, tmp_path, name):
    whole = tmp_path / "whole"
    script, argv = command(tiny, whole, name)
    done(run_script(script, *argv))
    stages = ("sft", "rl") if name == "vold" else ("",)
    for stage in stages:
        assert lines(whole / stage, "metrics.jsonl")[-1]["step"] == 4 and not (whole / stage / "checkpoints" / "step-2.partial").exists()
    again = tmp_path / "again"
    if name == "vold":  # stopped in stage 1: stage 2 is not there yet
        shutil.copytree(whole, again)
        shutil.rmtree(again / "rl")
        stopped(whole / "sft", again / "stopped")
        shutil.rmtree(again / "sft")
        (again / "stopped").rename(again / "sft")
    else:
        stopped(whole, again)
    script, argv = command(tiny, None, name, resume=again)
    done(run_script(script, *argv))
    for stage in stages:
        same(again / stage, whole / stage)
    if name == "vold":  # and stopped in stage 2
        stopped(whole / "rl", again / "stopped")
        shutil.rmtree(again / "rl")
        (again / "stopped").rename(again / "rl")
        settings = json.loads((again / "rl" / "args.json").read_text())
        (again / "rl" / "args.json").write_text(json.dumps(settings | {"student": str(again / "sft" / "final")}))
        assert "going on after step 2" in done(run_script(script, *argv))
        same(again / "rl", whole / "rl")
    assert "this run is finished" in done(run_script(script, *argv))


def test_on_two_ranks_and_from_two_to_one(tiny, tmp_path):
    script, argv = command(tiny, tmp_path / "whole", "vgs")
    assert run_script(script, *argv, torchrun=2).returncode == 0
    for ranks in (2, 1):
        folder = stopped(tmp_path / "whole", tmp_path / str(ranks))
        result = run_script(script, *command(tiny, folder, "vgs", resume="auto")[1], torchrun=ranks if ranks > 1 else 0)
        assert result.returncode == 0, result.stderr
        assert "going on after step 2" in result.stdout
    same(tmp_path / "2", tmp_path / "whole")
    two, one = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("whole", "1"))
    assert distance(one, two) < 1e-6
    tokens = {(s["step"], s["row"]): s["ids"] for s in lines(tmp_path / "1", "samples.jsonl")}
    assert all(tokens[s["step"], s["row"]] == s["ids"] for s in lines(tmp_path / "whole", "samples.jsonl"))


def test_killed_at_some_moment(tiny, tmp_path):
    """SIGKILL, four times: in a step, and while a checkpoint is being written; each time --resume auto is told the same command."""
    script, argv = command(tiny, tmp_path / "whole", "vgs", max_steps=30, save_every=3)
    done(run_script(script, *argv))
    _, argv = command(tiny, tmp_path / "killed", "vgs", max_steps=30, save_every=3, resume="auto")
    metrics = tmp_path / "killed" / "metrics.jsonl"

    def reached(step):
        return metrics.exists() and f'"step": {step},' in metrics.read_text()

    writing = tmp_path / "killed" / "checkpoints" / "step-15.partial" / "state"
    for moment in (lambda: reached(4), lambda: reached(11), writing.exists, lambda: reached(19)):
        process = subprocess.Popen([sys.executable, script, *argv], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not moment():
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "killed" / "final").exists()
    done(run_script(script, *argv))
    same(tmp_path / "killed", tmp_path / "whole")
    kept = [(tmp_path / "killed" / "checkpoints" / f"step-{step}" / "state").exists() for step in range(3, 30, 3)]
    assert not list((tmp_path / "killed").rglob("*.partial")) and kept == [False] * 7 + [True] * 2  # --keep 2; the weights of all are there
    assert (tmp_path / "killed" / "checkpoints" / "step-3" / "model.safetensors").exists()


def saving(folder, since) -> bool:
    """Whether a checkpoint is being written that was begun after that time."""
    try:
        return any(p.stat().st_mtime > since for p in folder.rglob("step-*.partial"))
    except FileNotFoundError:  # it was whole in that moment
        return False


@pytest.mark.slow
@pytest.mark.parametrize("name, kills, steps", [("vgs", 30, 250), ("ptdpo", 10, 80), ("vold", 10, 80), ("vigos, LoRA", 10, 200), ("reopold", 10, 80)])
def test_killed_many_times(tiny, tmp_path, name, kills, steps):
    """Three of five times at a random moment of 12 seconds, the start included, else in a checkpoint's writing: what comes of it is the undisturbed run."""
    settings = dict(max_steps=steps, save_every=1) | ({"sft_steps": steps} if name == "vold" else {})
    script, argv = command(tiny, tmp_path / "whole", name, **settings)
    done(run_script(script, *argv))
    folder = tmp_path / "killed"
    _, argv = command(tiny, folder, name, resume="auto", **settings)
    random, torn = torch.Generator().manual_seed(0), 0
    for kill in range(kills):
        process, start = subprocess.Popen([sys.executable, script, *argv], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), time.time()
        wait, in_save = 12 * torch.rand(1, generator=random).item(), kill % 5 > 2
        while process.poll() is None and not (saving(folder, start) if in_save else time.time() - start > wait):
            time.sleep(0.0005)
        assert process.poll() is None, "it was killed too late: give the run more steps"
        process.send_signal(signal.SIGKILL)
        process.wait()
        torn += saving(folder, start)
    assert torn >= kills * 2 // 5 - 2  # a save may have ended before the signal came
    done(run_script(script, *argv))
    for stage in ("sft", "rl") if name == "vold" else ("",):
        same(folder / stage, tmp_path / "whole" / stage)


def test_records_survive_a_kill_in_any_place(tmp_path, monkeypatch):
    """Of a start that begins again: what is whole is never written anew, half a line, cut inside a character, goes, and the settings are old or new."""
    store = common.Records(str(tmp_path), {"data": "x"})
    store.add([{"row": 0, "text": "Zürich"}, {"row": 1, "text": "x"}])
    file = tmp_path / "records-0.jsonl"
    whole, write = file.read_bytes(), Path.write_text

    def killed(path, text):
        write(path, text[: len(text) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", killed)
    monkeypatch.setattr(Path, "write_bytes", killed)
    with pytest.raises(KeyboardInterrupt):
        common.Records(str(tmp_path), {"data": "x"})
    monkeypatch.setattr(Path, "write_text", write)
    assert common.Records(str(tmp_path), {"data": "x"}).done == {0, 1} and file.read_bytes() == whole
    with open(file, "ab") as f:
        f.write('{"row": 2, "text": "Zürich'.encode()[:-5])
    assert common.Records(str(tmp_path), {"data": "x"}).done == {0, 1} and file.read_bytes() == whole


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    script, argv = command(tiny, folder, "reopold")
    done(run_script(script, *argv))
    return folder


def test_a_torn_checkpoint_is_passed_over(tiny, tmp_path, run):
    folder = stopped(run, tmp_path / "run")
    shutil.copytree(folder / "checkpoints" / "step-2", folder / "checkpoints" / "step-3")
    (folder / "checkpoints" / "step-3" / "state" / ".metadata").unlink()
    script, argv = command(tiny, folder, "reopold", resume="auto")
    said = done(run_script(script, *argv))
    assert "step-3/state is not whole, and is passed over" in said and "going on after step 2" in said
    assert not (folder / "checkpoints" / "step-3").exists()  # it would count among the --keep newest
    same(folder, run)


@pytest.mark.parametrize("name, changes, message", [
    ("reopold", {"lr": 1e-4}, r"other settings \(--lr 0.001 -> 0.0001\)"),
    ("reopold", {"seed": 1, "lam": 0.2}, "--seed 0 -> 1"),
    ("vgs", {}, "is a run of reopold.py, and this is vgs.py"),
])
def test_another_run_is_refused(tiny, tmp_path, run, name, changes, message):
    folder = stopped(run, tmp_path / "run")
    script, argv = command(tiny, None, name, resume=folder, **changes)
    assert re.search(message, refused(run_script(script, *argv)))


def test_it_can_be_told_to_go_on_all_the_same(tiny, tmp_path, run):
    folder = stopped(run, tmp_path / "run")
    script, argv = command(tiny, None, "reopold", resume=folder, max_steps=3, lr=1e-4, schedule="constant")
    done(run_script(script, *argv, "--resume-anyway"))
    after = lines(folder, "metrics.jsonl")
    assert [line["step"] for line in after] == [0, 1, 2, 3] and (folder / "final").exists()
    assert after[2]["lr"] != after[3]["lr"] == 1e-4


def test_auto_looks_at_the_settings_of_a_run_without_a_checkpoint_too(tiny, tmp_path, run):
    folder = stopped(run, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints")
    before = (folder / "metrics.jsonl").read_bytes()
    assert "is a run of reopold.py" in refused(run_script(*command(tiny, folder, "vgs", resume="auto")[:1], *command(tiny, folder, "vgs", resume="auto")[1]))
    assert (folder / "metrics.jsonl").read_bytes() == before
    script, argv = command(tiny, folder, "reopold", resume="auto")
    assert "it begins anew" in done(run_script(script, *argv))
    same(folder, run)


def test_what_cannot_be_resumed(tiny, tmp_path):
    assert "holds nothing to resume from" in refused(run_script("vold.py", *command(tiny, None, "vold", resume=tmp_path / "none")[1]))
    for changes, message in ((dict(resume="auto"), "name it"), (dict(resume=tmp_path / "none"), "holds no checkpoint to resume from"),
                             (dict(resume=tmp_path / "none", output=tmp_path / "other"), "--output .*other would have no effect")):
        script, argv = command(tiny, changes.pop("output", None), "reopold", **changes)
        assert re.search(message, refused(run_script(script, *argv)))


def test_what_is_not_the_runs_own_stays(tiny, tmp_path):
    """A folder that is there already, with a download in it; and checkpoints of nobody knows whom."""
    (tmp_path / "run" / "other").mkdir(parents=True)
    others = [tmp_path / "run" / "movie.partial", tmp_path / "run" / "other" / "model.partial"]
    for file in others:
        file.write_text("x")
    for changes in ({}, {"resume": "auto"}):
        script, argv = command(tiny, tmp_path / "run", "reopold", max_steps=1, save_every=0, **changes)
        done(run_script(script, *argv))
        assert all(file.read_text() == "x" for file in others)
        shutil.rmtree(tmp_path / "run" / "final")
    state = tmp_path / "run" / "checkpoints" / "step-1" / "state"
    state.mkdir(parents=True)
    for name in (".metadata", "progress.json"):
        (state / name).write_text("{}")
    (tmp_path / "run" / "args.json").unlink()
    assert "no args.json" in refused(run_script(script, *argv)) and (state / "progress.json").exists()


def test_auto_begins_where_nothing_is(tiny, tmp_path):
    script, argv = command(tiny, tmp_path / "run", "reopold", resume="auto", max_steps=1, save_every=0)
    done(run_script(script, *argv))
    assert [line["step"] for line in lines(tmp_path / "run", "metrics.jsonl")] == [0, 1]
