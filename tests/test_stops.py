"""A run that is asked to stop, or left alone by torchrun: it saves, says where it stands, and goes on bit for bit.

Where a signal comes is decided by gates (gated.py), not by the clock; the random moments are among the slow ones.
"""

import fcntl
import os
import time
from signal import SIGHUP, SIGTERM, SIGUSR1

import common
from tools import toy

import pytest
import torch
from background import alive, children, sentences, states, wait_for
from conftest import ROOT, run_script
from test_resume import METHODS, command, done, lines, same

SIGNALS = (SIGTERM, SIGUSR1, SIGHUP)
SOON = 20  # seconds of a busy machine, for what has nothing to save
MINUTE = 60  # a scheduler's patience


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


LONGER = dict(max_steps=6, save_every=1)


def settings(tiny, output, **changes) -> list:
    """Without checkpoints of --save-every: what is gone on with is what the signal has saved."""
    return command(tiny, output, "vgs", **dict(save_every=0) | changes)


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    done(run_script(*settings(tiny, folder)))
    return folder


@pytest.fixture(scope="module")
def whole_on_two(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole-on-two") / "run"
    done(run_script(*settings(tiny, folder), ranks=2))
    return folder


@pytest.fixture(scope="module")
def saved_on_two(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved-on-two") / "run"
    done(run_script(*settings(tiny, folder, **LONGER), ranks=2))
    return folder


def stopped_after(result, step: int):
    """It ended as a run that could not do its work, and said once after which step and how to go on."""
    said = result.stdout + result.stderr
    assert result.returncode == 1, said
    assert len(sentences(said, rf"\bstep {step}\b", "--output")) == 1, said
    ours = said.split("torch/distributed/elastic")[0].split("Received Signals")[0]
    assert "Traceback" not in ours, said


def ended_early(process, since: float):
    """Before the first step: within seconds, in a sentence, and nothing of it goes on."""
    result = process.wait(SOON)
    assert time.monotonic() - since < SOON
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert len(sentences(result.stderr, "error: ")) == 1, result.stderr
    wait_for(lambda: not process.left(), "the end of what it had started", SOON)


def steps_of(folder) -> list[int]:
    return [line["step"] for line in lines(folder, "metrics.jsonl")]


# ------------------------------------------------------------------------------------------------ one process
PLACES = [
    (SIGTERM, "update@2"),
    (SIGUSR1, "rollout@2"),
    (SIGHUP, "metrics@2"),
    slow(SIGHUP, "update@2"),
    slow(SIGTERM, "rollout@2"),
    slow(SIGUSR1, "samples@2"),
    slow(SIGTERM, "evaluate@2"),
    slow(SIGTERM, "save@2"),
]


@pytest.mark.parametrize("number, place", PLACES)
def test_a_signal_lets_the_step_end_and_is_gone_on_from(
    tiny, tmp_path, start, whole, number, place
):
    """Wherever in the step it comes; in the save of --save-every as well."""
    changes = dict(save_every=2) if "save" in place else {}
    changes |= dict(eval_every=2) if "evaluate" in place else {}
    argv = settings(tiny, tmp_path / "run", **changes)
    process = start(*argv, gates=place)
    process.reach(place)
    os.kill(process.pid, number)
    stopped_after(process.wait(MINUTE), 2)
    assert steps_of(tmp_path / "run") == [0, 1, 2] and not (tmp_path / "run" / "final").exists()
    assert states(tmp_path / "run")[-1] == "step-000002"
    assert "going on after step 2" in done(run_script(*argv))
    assert steps_of(tmp_path / "run") == [0, 1, 2, 3, 4]
    if "evaluate" not in place:  # a line of metrics has what the other lacks
        same(tmp_path / "run", whole)


@pytest.mark.parametrize("name", [slow(name) for name in METHODS])
def test_each_method_goes_on_from_where_it_was_stopped(tiny, tmp_path, start, name):
    changes = dict(save_every=0) | ({"sft_save_every": 0} if name == "vold" else {})
    done(run_script(*command(tiny, tmp_path / "whole", name, **changes)))
    argv = command(tiny, tmp_path / "run", name, **changes)
    stages = ("sft", "rl") if name == "vold" else ("",)
    for _ in stages:  # the second start goes on with sft's third step, and is stopped in rl
        process = start(*argv, gates="update@2")
        process.reach("update@2")
        os.kill(process.pid, SIGTERM)
        stopped_after(process.wait(MINUTE), 2)
    done(run_script(*argv))
    for stage in stages:
        same(tmp_path / "run" / stage, tmp_path / "whole" / stage)


@pytest.mark.slow
def test_a_second_signal_does_not_spoil_the_save(tiny, tmp_path, start, whole):
    argv = settings(tiny, tmp_path / "run")
    process = start(*argv, gates="update@2 save@2")
    for place in ("update@2", "save@2"):
        process.reach(place)
        os.kill(process.pid, SIGTERM)
    stopped_after(process.wait(MINUTE), 2)
    assert "going on after step 2" in done(run_script(*argv))
    same(tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["update@4", "final@4"])
def test_in_the_last_step_nothing_is_lost(tiny, tmp_path, start, whole, place):
    """It may end as a finished run, or as one that the same line finishes."""
    argv = settings(tiny, tmp_path / "run")
    process = start(*argv, gates=place)
    process.reach(place)
    os.kill(process.pid, SIGTERM)
    result = process.wait(MINUTE)
    assert result.returncode in (0, 1) and "Traceback" not in result.stderr, result.stderr
    assert (result.returncode == 0) == (tmp_path / "run" / "final").exists()
    done(run_script(*argv))
    same(tmp_path / "run", whole)


@pytest.mark.parametrize("number", [SIGHUP, slow(SIGTERM), slow(SIGUSR1)])
def test_a_signal_that_was_ignored_stays_ignored(tiny, tmp_path, start, whole, number):
    """As nohup ignores a closed terminal: the run goes on to its end."""
    process = start(*settings(tiny, tmp_path / "run"), gates="update@2", ignored=(number,))
    process.reach("update@2")
    os.kill(process.pid, number)
    process.go("update@2")
    done(process.wait())
    same(tmp_path / "run", whole)


# ------------------------------------------------------------------------------------------------ before a step
EARLY = [("load@0", SIGUSR1), ("rollout@0", SIGTERM), slow("processor@0", SIGHUP)]


@pytest.mark.parametrize("place, number", EARLY)
def test_before_the_first_step_it_ends_at_once(tiny, tmp_path, start, whole, place, number):
    """While models are loaded, and in the first evaluation; the same line then begins."""
    argv = settings(tiny, tmp_path / "run")
    process = start(*argv, gates=place)
    process.reach(place)
    since = time.monotonic()
    os.kill(process.pid, number)
    ended_early(process, since)
    done(run_script(*argv))
    same(tmp_path / "run", whole)


def test_while_many_rows_are_checked_it_ends_at_once(tiny, tmp_path, start):
    """Half a second a row: all of them would take half a minute and more."""
    import datasets

    rows = datasets.load_dataset("parquet", data_files=str(tiny / "rows.parquet"), split="train")
    datasets.concatenate_datasets([rows] * 40).to_parquet(tmp_path / "many.parquet")
    argv = settings(tiny, tmp_path / "run", data=tmp_path / "many.parquet")
    process = start(*argv, gates="rows@0")
    wait_for((process.gates / "rows@0").exists, "the first row")
    since = time.monotonic()
    os.kill(process.pid, SIGTERM)
    ended_early(process, since)


@pytest.mark.parametrize("number", [SIGTERM, slow(SIGUSR1), slow(SIGHUP)])
def test_while_the_toy_is_made_it_ends_with_its_process(tmp_path, start, number):
    """tools.toy, which waits here for another that makes the same, is not left behind."""
    known = toy.digest(ROOT / "tools" / "toy.py", toy.WEIGHTS / "recipe.json")
    cache = tmp_path / "cache" / f"toy-{known[:10]}"
    cache.mkdir(parents=True)
    with open(cache / "main.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        env = {"CLEANOPD_CACHE": str(tmp_path / "cache")}
        argv = ["vgs.py", "--preset", "toy", "--max-steps", 1, "--output", tmp_path / "run"]
        process = start(*argv, env=env)

        def waits() -> bool:
            assert process.code() is None, process.said()
            return any(holds(pid, cache / "main.lock") for pid in process.left())

        wait_for(waits, "tools.toy at its lock")
        since = time.monotonic()
        os.kill(process.pid, number)
        ended_early(process, since)
    assert [path.name for path in cache.iterdir()] == ["main.lock"]


def holds(pid: int, file) -> bool:
    """Whether this process has the file open."""
    try:
        opened = list(os.scandir(f"/proc/{pid}/fd"))
        return any(os.readlink(entry.path) == str(file) for entry in opened)
    except OSError:  # it has just ended
        return False


@pytest.mark.slow
def test_while_the_toy_is_written_it_ends_and_leaves_no_half(tmp_path, start):
    cache = tmp_path / "cache"
    argv = ["vgs.py", "--preset", "toy", "--max-steps", 1, "--output", tmp_path / "run"]
    argv += ["--eval-rows", 4, "--prompts", 4]
    process = start(*argv, env={"CLEANOPD_CACHE": str(cache)})
    begun = "*/main.partial/teacher/model.safetensors"
    wait_for(lambda: list(cache.glob(begun)), "the first of its files")
    since = time.monotonic()
    os.kill(process.pid, SIGTERM)
    ended_early(process, since)
    assert not list(cache.glob("*/main"))
    done(start(*argv, env={"CLEANOPD_CACHE": str(cache)}).wait())


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_while_traces_are_written_it_ends_at_once(tiny, tmp_path, start, number):
    changes = dict(rollout_batch=4)
    done(run_script(*command(tiny, tmp_path / "whole", "vold", **changes)))
    argv = command(tiny, tmp_path / "run", "vold", **changes)
    process = start(*argv, gates="rollout@0")
    process.reach("rollout@0")
    since = time.monotonic()
    os.kill(process.pid, number)
    ended_early(process, since)
    done(run_script(*argv))
    for stage in ("sft", "rl"):
        same(tmp_path / "run" / stage, tmp_path / "whole" / stage)


# ------------------------------------------------------------------------------------------------ torchrun
def ranks_of(agent: int, count: int) -> list[int]:
    """torchrun starts nothing but them."""
    return wait_for(lambda: found if len(found := children(agent)) == count else [], "the ranks")


ASKED = [
    ("the agent", SIGTERM),
    (1, SIGUSR1),
    slow("the agent", SIGHUP),
    *[slow(one, number) for one in (0, 1) for number in SIGNALS if (one, number) != (1, SIGUSR1)],
]


@pytest.mark.parametrize("who, number", ASKED)
def test_under_torchrun_all_ranks_stop_behind_the_same_step(
    tiny, tmp_path, start, whole_on_two, who, number
):
    """The signal reaches torchrun, as Slurm's or Kubernetes' does, or one rank alone."""
    argv = settings(tiny, tmp_path / "run")
    process = start(*argv, gates="update@2", torchrun=2)
    first = process.reach("update@2")
    ranks = ranks_of(process.pid, 2)
    assert first == ranks[0]
    os.kill(process.pid if who == "the agent" else ranks[who], number)
    if who == 1:  # the first one is not told
        process.go("update@2")
    stopped_after(process.wait(MINUTE), 2)
    wait_for(lambda: not process.left(), "the end of all ranks", SOON)
    assert "going on after step 2" in done(run_script(*argv, ranks=2))
    assert steps_of(tmp_path / "run") == [0, 1, 2, 3, 4]
    same(tmp_path / "run", whole_on_two)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["load@0", "rollout@0"])
@pytest.mark.parametrize("who", ["the agent", 0, 1])
def test_under_torchrun_before_the_first_step_it_ends_at_once(tiny, tmp_path, start, who, place):
    process = start(*settings(tiny, tmp_path / "run"), gates=place, torchrun=2)
    process.reach(place)
    since = time.monotonic()
    os.kill(process.pid if who == "the agent" else ranks_of(process.pid, 2)[who], SIGTERM)
    process.go(place)
    result = process.wait(SOON)
    assert result.returncode == 1 and result.stderr.count("error: ") == 1, result.stderr
    wait_for(lambda: not process.left(), "the end of all ranks", SOON)
    assert time.monotonic() - since < SOON


KILLED = ["save@2", "rollout@2"]
KILLED += [slow(f"{place}@{step}") for place in ("save", "rollout") for step in (1, 3, 4, 5)]


@pytest.mark.parametrize("place", KILLED)
def test_no_rank_outlives_torchrun(tiny, tmp_path, start, saved_on_two, place):
    """Only the agent is killed, by SIGKILL: within 10 seconds its ranks are gone, and the folder is free and whole."""
    argv = settings(tiny, tmp_path / "run", **LONGER)
    process = start(*argv, gates=place, torchrun=2)
    process.reach(place)
    ranks = ranks_of(process.pid, 2)
    partial = list((tmp_path / "run").rglob("*.partial"))
    assert bool(partial) == place.startswith("save"), partial
    process.process.kill()
    wait_for(lambda: not any(map(alive, ranks)), "the end of its ranks", 10)
    assert not process.left() and not (tmp_path / "run" / "final").exists()
    step = int(place[-1])
    assert len(states(tmp_path / "run")) >= min(step - 1, 2), "what was saved before is there"
    done(run_script(*argv, ranks=2))
    assert steps_of(tmp_path / "run") == list(range(7))
    same(tmp_path / "run", saved_on_two)


# ------------------------------------------------------------------------------------------------ random moments
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_stopped_at_random_moments(tiny, tmp_path, start, ranks):
    """SIGTERM, twenty times: no step is lost but the one under way, and the end is the undisturbed run's."""
    stops, steps = 20, 80 if ranks < 8 else 50
    changes = dict(max_steps=steps, prompts=8 if ranks < 8 else 16, lr=1e-4)
    launched = dict(torchrun=ranks) if ranks > 1 else dict(interpreter=True)
    done(start(*settings(tiny, tmp_path / "whole", **changes), **launched).wait(3600))
    folder, random = tmp_path / "run", torch.Generator().manual_seed(ranks)
    argv = settings(tiny, folder, **changes)

    def draw(most: float) -> float:
        return most * torch.rand(1, generator=random).item()

    def count() -> int:
        file = folder / "metrics.jsonl"
        return file.read_bytes().count(b"\n") - 1 if file.exists() else -1

    known = 0
    for stop in range(stops):
        process = start(*argv, **launched)
        if stop % 4:  # some steps on; else anywhere in the start
            target = known + 1 + int(draw(2))
            wait_for(lambda p=process, t=target: p.code() is not None or count() >= t, "steps", 600)
            time.sleep(draw(1.0))
        else:
            wait_for(lambda p=process: "preset toy" in p.said(), "the beginning", 600)
            time.sleep(draw(2.0))
        assert process.code() is None, f"give the run more steps: {process.said()}"
        before = max(count(), 0)
        os.kill(process.pid, SIGTERM)
        result = process.wait(MINUTE)
        # torchrun itself sometimes aborts when it ends
        assert result.returncode == 1 or ranks > 1 and result.returncode, result.stderr
        wait_for(lambda p=process: not p.left(), "the end of all ranks", SOON)
        assert before <= max(count(), 0) <= before + 2, (
            "the step under way, and one that just began"
        )
        begun = "going on" in result.stdout or count() > known  # or it was stopped before
        if f"going on after step {known}" not in result.stdout and known and begun:
            pytest.fail(f"step {known} was lost: {result.stdout}")
        known = max(count(), 0)
        assert known == 0 or states(folder)[-1] == f"step-{known:06}"
    done(start(*argv, **launched).wait(3600))
    assert steps_of(folder) == list(range(steps + 1))
    same(folder, tmp_path / "whole")


def test_ranks_do_not_wait_long_for_a_torchrun_that_was_killed(monkeypatch):
    """Its store may be gone before it is: torch alone would look for that for five minutes, and hold the folder."""
    monkeypatch.setattr(common.dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    since = time.monotonic()
    assert common.is_first_error()  # and its sentence is said
    assert time.monotonic() - since < 20
