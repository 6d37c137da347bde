"""A run that was stopped and goes on is the run that was not: weights, tokens and losses, bit for bit.

The same command with the same --output goes on; and what cannot be gone on with.
"""

import json
import re
import shutil
import signal
import subprocess
import sys
import time

import common

import pytest
import torch
from conftest import ROOT, distance, flags, in_tiny, run_script
from safetensors.torch import load_file

VOLD = dict(
    teacher="text-only",
    data="text.parquet",
    column_text="text_problem",
    trace_data="text.parquet",
    trace_column="text_problem",
    sft_batch=4,
    sft_steps=4,
    sft_save_every=2,
    group=2,
    updates=2,
    max_response=100,
    temperature=2.0,
)
VIGOS = dict(teacher=None, column_reference="solution", conflict_data="", lora=4)
METHODS = {
    "vgs": ("vgs.py", dict(updates=2, measure_eta=3)),
    "ptdpo": ("ptdpo.py", dict(teacher=None, optimizer="dapo", group=2, draws=2)),
    "vold": ("vold.py", VOLD),
    "vigos, LoRA": ("vigos.py", VIGOS),
    "reopold": ("reopold.py", dict(updates=2, schedule="linear", warmup=2)),
}


def command(tiny, output, name, **changes) -> list:
    script, settings = METHODS[name]
    values = dict(prompts=4, max_steps=4, save_every=2, lr=1e-3) | in_tiny(tiny, settings)
    return [script, *flags(tiny, output, **values | changes)]


def done(result) -> str:
    assert result.returncode == 0, result.stderr
    return result.stdout


def refused(result) -> str:
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    return result.stderr


def lines(folder, file) -> list[dict]:
    """Without the seconds, which differ. splitlines() would split at a response's line ends of Unicode's too."""
    records = [json.loads(line) for line in (folder / file).read_text().split("\n")[:-1]]
    return [{key: x for key, x in record.items() if "seconds" not in key} for record in records]


def same(one, other):
    """Two finished runs, in all that they leave."""
    for file in ("metrics.jsonl", "samples.jsonl"):
        assert (one / file).exists() == (other / file).exists()
        if (one / file).exists():
            assert lines(one, file) == lines(other, file)
    ours, theirs = (load_file(folder / "final" / "model.safetensors") for folder in (one, other))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert not list(one.rglob("*.partial"))


def stopped(folder, copy):
    """A copy of a finished run as one that was killed in its last step would be.

    The last line is cut in a character, and half of final/ stands beside the whole checkpoints.
    """
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "final")
    (copy / "final.partial").mkdir()
    with open(copy / "metrics.jsonl", "ab") as f:
        f.write('{"step": 4, "Zürich'.encode()[:-5])
    return copy


# ------------------------------------------------------------------------------------------------ the same run
@pytest.mark.parametrize("name", METHODS)
def test_going_on_is_as_undisturbed(tiny, tmp_path, name):
    whole, again = tmp_path / "whole", tmp_path / "again"
    done(run_script(*command(tiny, whole, name)))
    stages = ("sft", "rl") if name == "vold" else ("",)
    if name == "vold":
        shutil.copytree(whole / "traces", again / "traces")
        stopped(whole / "sft", again / "sft")
    else:
        stopped(whole, again)
    argv = command(tiny, again, name)
    assert "going on after step 2" in done(run_script(*argv))
    for stage in stages:
        same(again / stage, whole / stage)
        steps = [line["step"] for line in lines(again / stage, "metrics.jsonl")]
        assert steps == [0, 1, 2, 3, 4]
    if name == "vold":  # and in its last stage
        shutil.rmtree(again / "rl")
        stopped(whole / "rl", again / "rl")
        settings = json.loads((again / "rl" / "args.json").read_text())
        settings |= dict(student=str(again / "sft" / "final"), output=str(again / "rl"))
        (again / "rl" / "args.json").write_text(json.dumps(settings))
        assert "going on after step 2" in done(run_script(*argv))
        same(again / "rl", whole / "rl")
    before = (again / stages[-1] / "metrics.jsonl").read_bytes()
    assert "this run is finished" in done(run_script(*argv))
    assert (again / stages[-1] / "metrics.jsonl").read_bytes() == before


def test_on_two_ranks_and_from_two_to_one(tiny, tmp_path):
    done(run_script(*command(tiny, tmp_path / "whole", "vgs"), ranks=2))
    for ranks in (2, 1):
        folder = stopped(tmp_path / "whole", tmp_path / str(ranks))
        argv = command(tiny, folder, "vgs")
        said = done(run_script(*argv, ranks=ranks if ranks > 1 else 0))
        assert said.count("going on after step 2") == 1
    same(tmp_path / "2", tmp_path / "whole")
    near(tmp_path / "1", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_from_one_rank_to_two(tiny, tmp_path, name):
    done(run_script(*command(tiny, tmp_path / "whole", name)))
    if name == "vold":
        shutil.copytree(tmp_path / "whole", tmp_path / "two")
        shutil.rmtree(tmp_path / "two" / "rl")
        shutil.rmtree(tmp_path / "two" / "sft")
        stopped(tmp_path / "whole" / "sft", tmp_path / "two" / "sft")
    else:
        stopped(tmp_path / "whole", tmp_path / "two")
    done(run_script(*command(tiny, tmp_path / "two", name), ranks=2))
    for stage in ("sft", "rl") if name == "vold" else ("",):
        near(tmp_path / "two" / stage, tmp_path / "whole" / stage)


def near(one, other):
    """Two finished runs on other ranks: the same tokens, and weights that only rounding tells apart."""
    ours, theirs = (load_file(folder / "final" / "model.safetensors") for folder in (one, other))
    assert distance(ours, theirs) < 1e-6
    if one.name != "sft":  # which samples nothing
        sampled, known = sampled_in(one), sampled_in(other)
        both = sampled.keys() & known.keys()
        assert len(both) >= 4 and all(sampled[place] == known[place] for place in both)


def sampled_in(folder) -> dict:
    """(step, row) -> the logged responses' ids."""
    found = {}
    for s in lines(folder, "samples.jsonl"):
        found.setdefault((s["step"], s["row"]), []).append(s["ids"])
    return found


def test_what_a_run_that_goes_on_may_change(tiny, tmp_path):
    """HARMLESS settings change no token, and nothing of the weights but rounding."""
    done(run_script(*command(tiny, tmp_path / "whole", "vgs")))
    folder = stopped(tmp_path / "whole", tmp_path / "run")
    changes = dict(micro_tokens=150, loss_chunk=5, rollout_batch=2, save_every=3, eval_every=1)
    said = done(run_script(*command(tiny, folder, "vgs", **changes)))
    assert "going on after step 2" in said
    near(folder, tmp_path / "whole")
    assert (
        "acc@1" in lines(folder, "metrics.jsonl")[3]
        and (folder / "checkpoints" / "step-000003").exists()
    )


# ------------------------------------------------------------------------------------------------ killed
# Where a process is killed -> whether half a checkpoint is left, whether it had written a whole one.
PLACES = {
    "update": (False, True),  # its second; all others in the checkpoint behind its first
    "weights": (True, False),
    "state": (True, False),
    "rename": (True, False),
    "clean": (False, True),  # the checkpoint is there, and the oldest state not removed yet
}
ALL = pytest.param("weights state rename clean update", marks=pytest.mark.slow)


@pytest.mark.parametrize("places", ["state clean", ALL])
def test_killed_in_many_places_of_a_step_and_a_save(tiny, tmp_path, places):
    """By SIGKILL, one process after the other: no checkpoint is torn, no step lost or done twice."""
    changes = dict(max_steps=5, save_every=1, updates=1)
    done(run_script(*command(tiny, tmp_path / "whole", "vgs", **changes)))
    folder, before = tmp_path / "killed", 0
    argv = command(tiny, folder, "vgs", **changes)
    for place in places.split():
        torn, whole = PLACES[place]
        worker = ["tests/faulty.py", tmp_path / "result", argv[0], f"die-{place}", *argv[1:]]
        result = run_script(*worker)
        assert result.returncode == -signal.SIGKILL, f"{place}: {result.stderr}"
        assert (f"going on after step {before}" in result.stdout) == (before > 0), place
        before += whole
        saved = sorted(p.name for p in folder.glob("checkpoints/step-??????"))
        assert saved == [f"step-{i:06}" for i in range(1, before + 1)], place
        assert bool(list(folder.rglob("*.partial"))) == torn, place
    assert f"going on after step {before}" in done(run_script(*argv))
    same(folder, tmp_path / "whole")
    states = [(folder / "checkpoints" / f"step-{i:06}" / "state.pt").exists() for i in range(1, 5)]
    assert states == [False, False, True, True]  # the newest two
    assert (folder / "checkpoints" / "step-000001" / "model.safetensors").exists()


MANY = [("vgs", 30), ("ptdpo", 10), ("vold", 10), ("vigos, LoRA", 10), ("reopold", 10)]


@pytest.mark.slow
@pytest.mark.parametrize("name, kills", MANY)
def test_killed_many_times(tiny, tmp_path, name, kills):
    """SIGKILL at random moments: of the start, some steps later, and (every third) while a checkpoint is written."""
    settings = dict(max_steps=8 * kills, save_every=1)
    settings |= {"sft_steps": 4 * kills, "sft_save_every": 1} if name == "vold" else {}
    done(run_script(*command(tiny, tmp_path / "whole", name, **settings)))
    folder, random = tmp_path / "killed", torch.Generator().manual_seed(0)
    argv = command(tiny, folder, name, **settings)

    def draw(most: float) -> float:
        return most * torch.rand(1, generator=random).item()

    def steps() -> int:
        files = [folder / stage / "metrics.jsonl" for stage in ("", "sft", "rl")]
        return sum(file.read_bytes().count(b"\n") for file in files if file.exists())

    def saving(since: float) -> bool:
        try:
            return any(p.stat().st_mtime > since for p in folder.rglob("step-*.partial"))
        except FileNotFoundError:  # it was whole in that moment
            return False

    for kill in range(kills):
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        process = subprocess.Popen([sys.executable, *map(str, argv)], cwd=ROOT, **quiet)
        start, before, more = time.time(), steps(), int(draw(6))
        if kill % 3:
            while process.poll() is None and steps() < before + more:
                time.sleep(0.01)
            time.sleep(draw(0.3 if more else 12))
        while kill % 3 == 0 and process.poll() is None and not saving(start):
            time.sleep(0.0005)
        assert process.poll() is None, "it had ended: give the run more steps"
        process.send_signal(signal.SIGKILL)
        process.wait()
    done(run_script(*argv))
    for stage in ("sft", "rl") if name == "vold" else ("",):
        same(folder / stage, tmp_path / "whole" / stage)


def test_small_files_are_old_or_new(tmp_path, monkeypatch):
    """Killed in replace_text: the old text is there. Half a line of a record is left out, and no line before it."""
    file, write = tmp_path / "args.json", type(tmp_path).write_text
    common.replace_text(file, "old")

    def killed(path, text, encoding):
        write(path, text[: len(text) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(type(tmp_path), "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        common.replace_text(file, "new and longer")
    monkeypatch.undo()
    assert file.read_text() == "old"
    common.replace_text(file, "new")
    assert file.read_text() == "new"
    assert common.whole_lines(tmp_path / "none") == []
    file.write_bytes('{"a": "\u2028"}\n{"b": 1}\n{"c": "Zürich'.encode()[:-5])
    assert common.whole_lines(file) == ['{"a": "\u2028"}', '{"b": 1}']


# ------------------------------------------------------------------------------------------------ refused
@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    done(run_script(*command(tiny, folder, "vgs")))
    return folder


OTHERS = [
    ("vgs", {"lr": 1e-4}, r"other settings \(lr 0.001 -> 0.0001;"),
    (
        "vgs",
        {"seed": 1, "gamma": 1.0},
        r"seed 0 -> 1.*gamma 2.0 -> 1.0|gamma 2.0 -> 1.0.*seed 0 -> 1",
    ),
    ("ptdpo", {}, "file vgs.py -> ptdpo.py"),
]


@pytest.mark.parametrize("name, changes, message", OTHERS)
@pytest.mark.parametrize("how", ["stopped", "finished", "without a checkpoint"])
def test_another_run_in_the_folder_is_refused(tiny, tmp_path, run, name, changes, message, how):
    folder = tmp_path / "run"
    shutil.copytree(run, folder) if how == "finished" else stopped(run, folder)
    if how == "without a checkpoint":
        shutil.rmtree(folder / "checkpoints")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    said = refused(run_script(*command(tiny, folder, name, **changes)))
    assert re.search(message, said) and "--output" in said, said
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_run_without_a_checkpoint_begins_anew(tiny, tmp_path, run):
    folder = stopped(run, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints")
    assert "going on" not in done(run_script(*command(tiny, folder, "vgs")))
    same(folder, run)


def test_what_is_not_the_runs_own_stays(tiny, tmp_path):
    """A folder that is there already, with a download in it."""
    (tmp_path / "run" / "other").mkdir(parents=True)
    others = [tmp_path / "run" / "movie.partial", tmp_path / "run" / "other" / "model.partial"]
    for file in others:
        file.write_text("x")
    done(run_script(*command(tiny, tmp_path / "run", "vgs", max_steps=1, save_every=0)))
    assert all(file.read_text() == "x" for file in others)


@pytest.mark.parametrize("left", ["checkpoints", "final"])
def test_checkpoints_of_nobody_knows_whom_are_refused(tiny, tmp_path, run, left):
    folder = tmp_path / "run"
    shutil.copytree(run / left, folder / left)
    assert "no args.json" in refused(run_script(*command(tiny, folder, "vgs")))
    assert sorted(p.name for p in folder.iterdir()) == sorted([left, "lock"])
