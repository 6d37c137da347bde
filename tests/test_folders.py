"""A run's folder: whose it is, what may lie in it, what it goes on with, and disks that are too small for it."""

import contextlib
import fcntl
import io
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from background import read, sentences, states
from conftest import ROOT, flags, run_script
from safetensors.torch import load_file, save_file
from test_resume import VIGOS, VOLD, command, done, lines, same, stopped


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def contents(folder) -> dict:
    """Of all files but the lock, which is there as long as the folder is somebody's."""
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "lock"}


def one_sentence(result, *parts) -> str:
    """It ended with 1 and a message with these parts, and without a traceback."""
    said = result.stdout + result.stderr
    # torchrun's own report of a rank that ended begins so
    ranks, _, _ = said.partition('Traceback (most recent call last):\n  File "<frozen runpy>"')
    assert result.returncode == 1 and "Traceback" not in ranks, said
    assert said.count("error: ") == 1, said
    words = " ".join(said.split("error: ")[1].split())
    for part in parts:
        assert re.search(part, words), (part, words)
    return words


# ------------------------------------------------------------------------------------------------ names
NAME = r"vgs-toy-\d{8}-\d{6}-[0-9a-f]{4,}"


def many(tiny, tmp_path, start, count: int, seconds: float = 120):
    """So many runs at once, in one place and without --output: each has a folder, with all that is its own."""
    (tmp_path / "place").mkdir(exist_ok=True)
    running = {}
    for seed in range(count):
        argv = flags(tiny, None, seed=seed, max_steps=2 + seed % 3, eval_data="")
        argv = [ROOT / "vgs.py", *argv]
        running[seed] = start(*argv, gates="processor@0", cwd=tmp_path / "place")
    for process in running.values():
        process.reach("processor@0")
    folders = list((tmp_path / "place" / "runs").iterdir())
    assert len(folders) == count and all(re.fullmatch(NAME, p.name) for p in folders), folders
    for process in running.values():
        process.go("processor@0")
    for process in running.values():
        done(process.wait(seconds))
    seeds = []
    for folder in folders:
        settings = json.loads((folder / "args.json").read_text())
        seeds.append(settings["seed"])
        assert settings["max_steps"] == 2 + settings["seed"] % 3
        steps = list(range(1, settings["max_steps"] + 1))
        assert [line["step"] for line in lines(folder, "metrics.jsonl")] == steps
        sampled = [line["step"] for line in lines(folder, "samples.jsonl")]
        assert sampled == [step for step in steps for _ in range(4)]
        assert load_file(folder / "final" / "model.safetensors")
        assert not list(folder.rglob("*.partial"))
        said = [p for p in running.values() if folder.name in p.said()]
        assert said == [running[settings["seed"]]]
    assert sorted(seeds) == list(range(count))
    return folders


def test_runs_that_start_at_once_have_folders_of_their_own(tiny, tmp_path, start):
    many(tiny, tmp_path, start, 2)


@pytest.mark.slow
def test_a_sweep_of_eight_five_times(tiny, tmp_path, start):
    found = set()
    for time in range(5):
        (tmp_path / str(time)).mkdir()
        found |= set(many(tiny, tmp_path / str(time), start, 8, 600))
    assert len(found) == 40


@pytest.mark.slow
def test_ranks_agree_on_one_folder(tiny, tmp_path):
    argv = [ROOT / "vgs.py", *flags(tiny, None)]
    done(run_script(*argv, ranks=2, cwd=tmp_path))
    assert [bool(re.fullmatch(NAME, p.name)) for p in (tmp_path / "runs").iterdir()] == [True]


# ------------------------------------------------------------------------------------------------ locks
def held(file) -> bool:
    """Whether some process has it locked."""
    with open(file) as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@pytest.mark.parametrize("place", ["processor@0", "update@2"])
@pytest.mark.parametrize("ranks", [0, slow(2)])
def test_a_second_run_in_the_folder_is_refused(tiny, tmp_path, start, run, place, ranks):
    """Before anything is loaded, and while the first trains; it goes on as if nothing had been."""
    argv = command(tiny, tmp_path / "run", "vgs", save_every=1)
    process = start(*argv, gates=place)
    process.reach(place)
    assert held(tmp_path / "run" / "lock")
    before = contents(tmp_path / "run")
    result = run_script(*argv, ranks=ranks)
    one_sentence(result, re.escape(str(tmp_path / "run")), r"(?i)another --output")
    assert contents(tmp_path / "run") == before
    process.go(place)
    done(process.wait())
    assert not held(tmp_path / "run" / "lock")
    same(tmp_path / "run", run)
    assert "this run is finished" in done(run_script(*argv))


VOLDS = [("all", "rollout@0"), ("traces", "rollout@0"), slow("sft", "update@2")]
VOLDS += [slow("all", "processor@0"), slow("all", "update@2")]


@pytest.mark.parametrize("stage, place", VOLDS)
def test_a_second_vold_is_refused(tiny, tmp_path, start, stage, place):
    """In every stage, also where the second asks for this stage alone."""
    argv = command(tiny, tmp_path / "run", "vold", stage=stage, sft_steps=2, max_steps=2)
    if stage == "sft":
        traces = command(tiny, tmp_path / "run", "vold", stage="traces")
        done(run_script(*traces))
    process = start(*argv, gates=place)
    process.reach(place)
    before = contents(tmp_path / "run")
    result = run_script(*argv)
    one_sentence(result, re.escape(str(tmp_path / "run")), r"(?i)another --output")
    assert contents(tmp_path / "run") == before
    process.go(place)
    done(process.wait())


# ------------------------------------------------------------------------------------------------ whose it is
LEFT = ["metrics.jsonl", "samples.jsonl", "checkpoints", "final", "final.partial"]


@pytest.mark.parametrize("left", LEFT)
def test_a_folder_of_nobody_knows_whom_is_refused(tiny, tmp_path, run, left):
    folder = tmp_path / "run"
    folder.mkdir()
    theirs = run / left.removesuffix(".partial")
    if theirs.is_dir():
        shutil.copytree(theirs, folder / left)
    else:
        shutil.copy(theirs, folder)
    before = contents(folder)
    one_sentence(run_script(*command(tiny, folder, "vgs")), "no args.json", "--output")
    assert contents(folder) == before


def test_other_files_in_the_folder_stay(tiny, tmp_path):
    """Such as the log of the shell that has started it, which is there before the run."""
    folder = tmp_path / "run"
    (folder / "download").mkdir(parents=True)
    others = ["log.txt", "movie.partial", "lock.txt", "download/final", "download/args.json"]
    for name in others:
        (folder / name).write_text("theirs")
    argv = command(tiny, folder, "vgs", max_steps=1, eval_data="")
    done(run_script(*argv))
    assert "this run is finished" in done(run_script(*argv))
    assert all((folder / name).read_text() == "theirs" for name in others)


# ------------------------------------------------------------------------------------------------ the same content
@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """Undisturbed, with states behind its second and third step."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    done(run_script(*command(tiny, folder, "vgs", save_every=1)))
    return folder


FILES = ("student", "teacher", "rows.parquet", "held.parquet", "text.parquet", "text-only")
USES = {
    "vgs": dict(freeze_vision=True),
    "vigos, LoRA": VIGOS,
    "vold": dict(VOLD, stage="rl", sft_save_every=None, sft_batch=None, sft_steps=None),
}


@pytest.fixture(scope="module")
def inputs(tiny, tmp_path_factory):
    """inputs(name) -> a stopped run's command, whose models and rows are copies in the folder `used`."""
    base = tmp_path_factory.mktemp("inputs")
    used, kept = base / "used", base / "kept"
    used.mkdir()
    for name in FILES:
        source = tiny / name.replace("held", "rows")
        if source.is_dir():
            shutil.copytree(source, used / name)
        else:
            shutil.copy(source, used / name)
    shutil.copytree(used, kept)

    def begin(name):
        folder = base / name
        script = f"{name.split(',')[0]}.py"
        changes = dict(student=used / "student", eval_data=used / "held.parquet")
        changes |= dict(data=used / "rows.parquet", teacher=used / "teacher")
        settings = {k: used / v if v in FILES else v for k, v in USES[name].items()}
        values = dict(max_steps=3, save_every=1, lr=1e-3) | changes | settings
        if not folder.exists():
            done(run_script(script, *flags(tiny, folder, **values)))
        again = base / "again"
        shutil.rmtree(again, ignore_errors=True)
        shutil.copytree(folder, again)
        stage = "rl" if name == "vold" else ""
        shutil.rmtree(again / stage / "final")
        shutil.rmtree(
            again / stage / "checkpoints" / "step-000002"
        )  # what it goes on from is step 1
        settings = json.loads((again / stage / "args.json").read_text())
        settings["output"] = str(again / stage)
        (again / stage / "args.json").write_text(json.dumps(settings))
        return [script, *flags(tiny, again, **values)], again / stage, folder / stage

    begin.used = used
    yield begin
    shutil.rmtree(used)
    shutil.copytree(kept, used)


@pytest.fixture
def used(inputs, tmp_path):
    """The folder of the copies, which are the old ones again behind the test."""
    shutil.copytree(inputs.used, tmp_path / "kept")
    yield inputs.used
    shutil.rmtree(inputs.used)
    shutil.copytree(tmp_path / "kept", inputs.used)


def rewrite(file, change):
    """change(list of rows) -> the rows that the file has from now on."""
    import datasets

    rows = datasets.Dataset.from_parquet(str(file), cache_dir=str(file.parent / "cache"))
    features = rows.features
    rows = change(rows.cast_column("images", datasets.List(datasets.Image(decode=False))).to_list())
    datasets.Dataset.from_list(rows, features=features).to_parquet(file)


def edit(column):
    """In one row, by one character."""

    def edited(rows):
        return [*rows[:5], rows[5] | {column: f"{rows[5][column]}1"}, *rows[6:]]

    return lambda used: rewrite(used / "rows.parquet", edited)


def swap_two_rows(rows):
    return [rows[1], rows[0], *rows[2:]]


def add(weights):
    next(iter(weights.values())).view(-1)[0] += 1


def change_weights(folder, change, part=""):
    file = folder / "model.safetensors"
    weights = load_file(file)
    ours = {name: value.clone() for name, value in weights.items() if part in name}
    change(ours)
    save_file(weights | ours, file, metadata={"format": "pt"})


CHANGES = {
    "reversed": ("vgs", "rows", lambda u: rewrite(u / "rows.parquet", lambda r: r[::-1])),
    "a question": ("vgs", "rows", edit("problem")),
    "a reference": ("vigos, LoRA", "rows", edit("solution")),
    "two rows": ("vgs", "rows", lambda u: rewrite(u / "rows.parquet", swap_two_rows)),
    "one row less": ("vgs", "rows", lambda u: rewrite(u / "rows.parquet", lambda r: r[:-1])),
    "teacher": ("vgs", "teacher", lambda u: change_weights(u / "teacher", add)),
    "frozen vision": ("vgs", "student", lambda u: change_weights(u / "student", add, "visual")),
    "under adapters": ("vigos, LoRA", "student", lambda u: change_weights(u / "student", add)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_content_under_the_same_name_is_refused(tiny, inputs, used, change):
    """The sentence names what differs, and nothing in the folder has changed."""
    name, differs, spoil = CHANGES[change]
    argv, folder, _ = inputs(name)
    before = contents(folder)
    spoil(used)
    said = one_sentence(run_script(*argv), r"--output", rf"(?<!-)\b{differs}\b")
    others = {"teacher", "student"} - {differs}
    assert not [name for name in others if re.search(rf"(?<!-)\b{name}\b", said)], said
    assert contents(folder) == before


def test_the_same_content_goes_on(tiny, inputs, used, tmp_path):
    """Copied anew, so that all times differ; and held-out rows are no part of what is learned."""
    argv, folder, whole = inputs("vgs")
    for name in FILES:
        copy = tmp_path / name
        if (used / name).is_dir():
            shutil.copytree(used / name, copy, copy_function=shutil.copyfile)
            shutil.rmtree(used / name)
        else:
            shutil.copyfile(used / name, copy)
            (used / name).unlink()
        shutil.move(copy, used / name)
    rewrite(used / "held.parquet", lambda rows: rows[::-1])
    assert "going on after step 1" in done(run_script(*argv))
    ours, theirs = (load_file(f / "final" / "model.safetensors") for f in (folder, whole))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vgs", "vigos, LoRA", "vold"])
def test_the_same_content_on_two_ranks_goes_on(tiny, inputs, used, name):
    argv, folder, whole = inputs(name)
    assert "going on after step 1" in done(run_script(*argv, ranks=2))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vigos, LoRA", "vold"])
def test_the_same_content_of_other_methods_goes_on(tiny, inputs, used, name):
    argv, folder, whole = inputs(name)
    assert "going on after step 1" in done(run_script(*argv))
    same(folder, whole)


# ------------------------------------------------------------------------------------------------ damaged
def newest_state(folder) -> list[Path]:
    """The files of the newest state, the largest first."""
    found = sorted(folder.glob("checkpoints/step-??????/state*"))[-1]
    files = [p for p in found.rglob("*") if p.is_file()] if found.is_dir() else [found]
    return sorted(files, key=lambda file: -file.stat().st_size)


def cut(file):
    data = file.read_bytes()
    file.write_bytes(data[: len(data) * 2 // 3])


def cut_by_a_byte(file):
    file.write_bytes(file.read_bytes()[:-1])


def empty(file):
    file.write_bytes(b"")


def zeros(file):
    """What a file system may leave of a file that was being written when the power failed."""
    file.write_bytes(bytes(file.stat().st_size))


def noise(file, bits: int = 200):
    """A few bits in all of it."""
    data, source = bytearray(file.read_bytes()), random.Random(0)
    for _ in range(bits):
        data[source.randrange(len(data))] ^= 1 << source.randrange(8)
    file.write_bytes(data)


def one_bit(file):
    """In the middle, which is some tensor's."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def missing(file):
    file.unlink()


DAMAGES = [cut, noise, slow(empty), one_bit, slow(zeros), slow(cut_by_a_byte)]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_named_and_the_one_before_taken(tiny, tmp_path, run, damage):
    folder = stopped(run, tmp_path / "run")
    assert states(folder) == ["step-000002", "step-000003"]
    damage(newest_state(folder)[0])
    result = run_script(*command(tiny, folder, "vgs", save_every=1))
    said = done(result) + result.stderr
    assert sentences(said, "step-000003") and "going on after step 2" in said, said
    same(folder, run)


def test_where_every_state_is_damaged_nothing_is_lost(tiny, tmp_path, run):
    """It would begin anew, and empty the metrics: the user decides."""
    folder = stopped(run, tmp_path / "run")
    for file in folder.glob("checkpoints/*/state.pt"):
        cut(file)
    before = contents(folder)
    result = run_script(*command(tiny, folder, "vgs", save_every=1))
    said = one_sentence(result, "no state in .* is whole", "--student")
    assert sentences(result.stdout, "step-000003") and sentences(result.stdout, "step-000002"), said
    assert contents(folder) == before


@pytest.mark.slow
def test_a_missing_file_of_the_state(tiny, tmp_path, run):
    folder = stopped(run, tmp_path / "run")
    missing(newest_state(folder)[0])
    result = run_script(*command(tiny, folder, "vgs", save_every=1))
    assert "going on after step 2" in done(result)
    same(folder, run)


@pytest.mark.slow
def test_a_damaged_state_on_two_ranks(tiny, tmp_path):
    argv = command(tiny, tmp_path / "whole", "vgs", save_every=1)
    done(run_script(*argv, ranks=2))
    folder = stopped(tmp_path / "whole", tmp_path / "run")
    noise(newest_state(folder)[0])
    result = run_script(*command(tiny, folder, "vgs", save_every=1), ranks=2)
    said = done(result) + result.stderr
    assert len(sentences(said, "step-000003")) == 1 and "going on after step 2" in said, said
    same(folder, tmp_path / "whole")


SETTINGS = ["{", "", "null", "3", '"x"', "\0" * 300, "\udcff"]


@pytest.mark.parametrize("text", SETTINGS)
def test_settings_that_cannot_be_read_are_named(tiny, tmp_path, run, text):
    folder = stopped(run, tmp_path / "run")
    (folder / "args.json").write_bytes(text.encode(errors="surrogateescape"))
    before = contents(folder)
    one_sentence(run_script(*command(tiny, folder, "vgs")), r"args\.json")
    assert contents(folder) == before


GARBAGE = [b"\0" * 700, b"\xff\xfe\x80", b"{", b"", b"[" * 5000]


def test_lines_that_cannot_be_read_are_passed_over(tiny, tmp_path, run):
    """In the middle of the file, and as its last ones, with and without an end of line."""
    folder = stopped(run, tmp_path / "run")
    for file in ("metrics.jsonl", "samples.jsonl"):
        first, *others = (run / file).read_bytes().split(b"\n")[:-1]
        damaged = [first, *GARBAGE, *others[:-1], *GARBAGE]
        (folder / file).write_bytes(b"\n".join(damaged) + b"\n" + bytes(4096))
    result = run_script(*command(tiny, folder, "vgs", save_every=1))
    assert "going on after step 3" in done(result)
    for file in ("metrics.jsonl", "samples.jsonl"):
        assert readable(folder / file) == lines(run, file)


def readable(file) -> list[dict]:
    """The lines that are a step's."""
    found = []
    for line in file.read_bytes().split(b"\n"):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            found.append({key: x for key, x in record.items() if "seconds" not in key})
    return found


class Planted:
    """A pickle of it runs a command where it is loaded."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch '{self.file}'",)


@pytest.mark.parametrize("how", ["a pickle", "a file of torch"])
def test_a_planted_pickle_is_not_run(tiny, tmp_path, run, how):
    """In place of every file of the newest state: the command is not run, and the run goes on from the one before."""
    folder, ran = stopped(run, tmp_path / "run"), tmp_path / "ran"
    for file in newest_state(folder):
        if how == "a pickle":
            file.write_bytes(pickle.dumps(Planted(ran)))
        else:
            saved = io.BytesIO()
            torch.save({"model_state_dict": Planted(ran)}, saved)
            file.write_bytes(saved.getvalue())
    result = run_script(*command(tiny, folder, "vgs", save_every=1))
    said = result.stdout + result.stderr
    assert not ran.exists(), "the command has run"
    assert sentences(said, "step-000003"), said
    assert "going on after step 2" in done(result)
    assert not ran.exists()
    same(folder, run)


# ------------------------------------------------------------------------------------------------ small disks
SIZE = r"\d[\d.,]* ?(?:[kKMGT]i?B|bytes)\b"


@pytest.fixture
def disk(tmp_path):
    """disk(kilobytes) -> an empty disk of this size."""
    mounted = []

    def mount(kilobytes: int) -> Path:
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", str(folder)]
        able = sys.platform == "linux" and shutil.which("mount") and os.geteuid() == 0
        if not able or subprocess.run(words, capture_output=True).returncode:
            pytest.skip("this user may not mount a disk")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """A foreign file that takes all that is free."""
    foreign = folder / "foreign"
    with open(foreign, "wb", buffering=0) as f, contextlib.suppress(OSError):
        while True:
            f.write(bytes(4096))
    assert os.statvfs(folder).f_bavail == 0
    return foreign


def checkpoints(folder: Path) -> dict:
    """The files of those that are whole, in a folder that a run is writing to."""
    found = {}
    for whole in folder.glob("run/checkpoints/step-??????"):
        found |= contents(whole)
    return found


@pytest.mark.parametrize("save_every, kilobytes", [(2, 2500), (0, 600)])
def test_a_disk_that_is_too_small_is_said_before_training(tiny, disk, save_every, kilobytes):
    """2.5 MB are no room for a checkpoint with its state, which has 4.5, and 0.6 MB none for final/."""
    place = disk(kilobytes)
    result = run_script(*command(tiny, place / "run", "vgs", save_every=save_every))
    words = one_sentence(result, re.escape(str(place)), "need", "free|left")
    assert len(re.findall(SIZE, words)) >= 2, words
    metrics = place / "run" / "metrics.jsonl"
    assert not metrics.exists() or not metrics.read_bytes(), "a step, or the first evaluation"


# What is the first that finds no room, if the disk is filled in this step.
FULL = {
    "samples": ("update@1", dict(save_every=0)),  # their file outgrows its first 4 KB in step 5
    "metrics": ("update@5", dict(save_every=0)),  # in step 7
    "checkpoint": ("update@2", dict(save_every=2)),
    "final": ("update@8", dict(save_every=0)),
    "a second checkpoint": ("update@3", dict(save_every=2)),
}
QUICK = ("samples", "checkpoint")


@pytest.fixture(scope="module")
def long_run(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("long") / "run"
    done(run_script(*command(tiny, folder, "vgs", max_steps=8, save_every=0)))
    return folder


def filled(tiny, start, disk, what, **how):
    """A run whose disk is filled under it: it says so once and ends, and what was there before is whole."""
    place, changes = FULL[what]
    folder = disk(60_000)
    argv = command(tiny, folder / "run", "vgs", max_steps=8, **changes)
    process = start(*argv, gates=place, **how)
    process.reach(place)
    before, foreign, older = contents(folder / "run"), fill(folder), checkpoints(folder)
    process.go(place)
    one_sentence(process.wait(60), re.escape(str(folder)), SIZE, "needs")
    for file, data in before.items():
        assert read(file).startswith(data), f"{file} is not what it was, and more"
    assert checkpoints(folder) == older
    foreign.unlink()
    return folder / "run", argv


@pytest.mark.parametrize("what", [x if x in QUICK else slow(x) for x in FULL])
def test_a_disk_that_fills_up_costs_no_step_that_was_saved(tiny, start, disk, long_run, what):
    """With room on the disk the same line goes on from the newest checkpoint, where there is one."""
    folder, argv = filled(tiny, start, disk, what)
    said = done(run_script(*argv))
    assert ("going on after step 2" in said) == (what == "a second checkpoint")
    same(folder, long_run)


@pytest.mark.slow
def test_a_full_disk_on_two_ranks(tiny, tmp_path, start, disk):
    whole = tmp_path / "whole"
    done(run_script(*command(tiny, whole, "vgs", max_steps=8, save_every=0), ranks=2))
    folder, argv = filled(tiny, start, disk, "a second checkpoint", torchrun=2)
    assert "going on after step 2" in done(run_script(*argv, ranks=2))
    same(folder, whole)


def make_toy(cache, part: str = "math") -> subprocess.CompletedProcess:
    words = [sys.executable, "-m", "tools.toy", "--part", part]
    env = {"CLEANOPD_CACHE": str(cache), "PATH": os.environ["PATH"]}
    return subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("kilobytes", [200, slow(600), slow(1200), slow(2400)])
def test_a_toy_that_a_disk_has_no_room_for_is_not_taken_for_whole(tmp_path, disk, kilobytes):
    """One sentence with the disk and what is needed; then, with room, the next start makes all of it."""
    done(make_toy(tmp_path / "cache"))
    (whole,) = (tmp_path / "cache").glob("*/math")
    size = sum(p.stat().st_size for p in whole.rglob("*") if p.is_file())
    if size < kilobytes * 1000:
        pytest.skip("it has room there")
    small = disk(kilobytes)
    result = make_toy(small)
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    said = sentences(result.stderr, "error: ")
    assert len(said) == 1 and str(small) in said[0] and re.search(SIZE, said[0]), result.stderr
    assert not list(small.glob("*/math"))
    words = ["mount", "-o", "remount,size=100m", str(small)]
    subprocess.run(words, check=True)
    done(make_toy(small))
    (made,) = small.glob("*/math")
    sizes = [{p.relative_to(f): p.stat().st_size for p in f.rglob("*")} for f in (whole, made)]
    assert sizes[0].keys() == sizes[1].keys()
    assert all(
        sizes[0][p] == sizes[1][p] for p in sizes[0] if p.suffix in (".safetensors", ".arrow")
    )


# ------------------------------------------------------------------------------------------------ other surroundings
@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o002, 0o664)])
def test_files_are_for_whom_the_umask_says(tiny, tmp_path, start, umask, mode):
    argv = command(tiny, tmp_path / "run", "vgs", max_steps=2, save_every=1, eval_data="")
    done(start(*argv, umask=umask).wait())
    modes = {}
    for folder in ("final", "checkpoints"):
        for path in (tmp_path / "run" / folder).rglob("*"):
            expected = mode | 0o111 if path.is_dir() else mode
            modes[str(path)] = (path.stat().st_mode & 0o777, expected)
    assert any("model.safetensors" in path for path in modes)
    assert not {path: oct(found) for path, (found, expected) in modes.items() if found != expected}


def test_a_bar_that_nobody_watches_is_short(tiny, tmp_path, start):
    """In a file, a line a minute: this run is shorter than that."""
    argv = command(tiny, tmp_path / "run", "vgs", max_steps=8, save_every=0)
    result = start(*argv, interpreter=True).wait()
    done(result)
    said = re.split(r"[\r\n]", result.stdout + result.stderr)
    drawn = [line for line in said if re.search(r"\d+/\d+ \[", line)]
    training = [line for line in drawn if "/8 [" in line]
    # at its beginning, behind the first step, and at its end
    assert len(training) <= 3, training
    assert len(drawn) <= 3 + 2 * 2, drawn  # two more bars, of rows


def test_a_rank_alone_is_one_process_or_a_sentence(tiny, tmp_path, start):
    """RANK of some scheduler, without what torchrun says besides."""
    argv = command(tiny, tmp_path / "run", "vgs", max_steps=1, eval_data="")
    result = start(*argv, env={"RANK": "0"}).wait()
    assert "Traceback" not in result.stderr, result.stderr
    if result.returncode:
        one_sentence(result, "RANK")


@pytest.mark.parametrize("output", ["run", slow("运行")])
def test_chinese_questions_in_a_plain_locale(tmp_path, tiny, start, output):
    from PIL import Image

    Image.new("RGB", (64, 64), "white").save(tmp_path / "one.png")
    row = {"problem": "图中有什么? 数字是多少?", "images": "one.png", "answer": "三"}
    rows = tmp_path / "rows.jsonl"
    text = json.dumps(row, ensure_ascii=False) + "\n"
    rows.write_text(text * 8, encoding="utf-8")
    changes = dict(data=rows, eval_data=rows, max_steps=1, save_every=0)
    plain = dict(LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
    plain |= dict(PYTHONIOENCODING=None, LANG=None)
    argv = command(tiny, tmp_path / output, "vgs", **changes)
    done(start(*argv, interpreter=True, env=plain).wait())
    sample = lines(tmp_path / output, "samples.jsonl")[0]
    assert sample["problem"].endswith(row["problem"])


@pytest.mark.parametrize("home", ["unwritable", slow("unset")])
def test_without_a_home(tiny, tmp_path, start, home):
    """It works, or says in a sentence what to do."""
    (tmp_path / "file").write_text("")
    place = str(tmp_path / "file" / "home") if home == "unwritable" else None
    env = {"HOME": place, "XDG_CACHE_HOME": None, "HF_HOME": None, "TMPDIR": None}
    argv = command(tiny, tmp_path / "run", "vgs", max_steps=1, eval_data="")
    result = start(*argv, interpreter=True, env=env).wait()
    if result.returncode:
        one_sentence(result, "cannot be read")
