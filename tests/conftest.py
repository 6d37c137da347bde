"""Shared fixtures: tiny untrained models of the real classes, a tiny data set, and a way to run the real scripts."""

import contextlib
import gc
import importlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Two run at a time and share the cores; threads that wait for each other's would burn them.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 2) // 2)))

# nohup's rule is handed down, and a run keeps it
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import common  # noqa: E402
from tools import toy  # noqa: E402

from background import Background  # noqa: E402
from gradients import fixed_rows  # noqa: E402
from ranks import run_ranks  # noqa: E402


def make_tiny(folder: Path, family: str = "qwen3_vl") -> None:
    """Untrained student and teacher, two text-only models, and 24 rows of data, in seconds.

    Teachers have another width and another padding of the vocabulary.
    """
    import datasets
    from sklearn.datasets import load_digits

    digits = load_digits()
    rows = toy.make_rows(digits.images, digits.target, 24, seed=0)
    kinds = {key: datasets.Value("string") for key in rows[0]}
    features = datasets.Features(kinds | {"images": datasets.List(datasets.Image())})
    datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "rows.parquet")
    text = [{key: row[key] for key in ("text_problem", "answer")} for row in rows]
    datasets.Dataset.from_list(text).to_parquet(folder / "text.parquet")
    toy.write(toy.conflicts(digits.images, digits.target, rows[:4], seed=0), folder / "conflict")
    texts = [row["problem"] + row["text_problem"] + toy.respond(row, "reason") for row in rows]
    tokenizer = toy.make_tokenizer(texts)
    torch.manual_seed(0)
    tagged = toy.make_tokenizer(texts)
    tagged.add_tokens(["<think>", "</think>"])  # as Qwen3 has them and Qwen2.5 has not
    models = {
        "student": (family, 64, 512),
        "teacher": (family, 128, 576),
        "text-only": ("qwen3", 64, 512),
        "tagged": ("qwen3", 128, 576),
    }
    for name, (kind, hidden, vocab) in models.items():
        model = toy.make_model(kind, tokenizer, hidden, 2, 32, vocab)
        # sharper than an initialisation, so that the distributions differ from each other
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(2.0)
        model.save_pretrained(folder / name)
        (tagged if name == "tagged" else tokenizer).save_pretrained(folder / name)
        if kind != "qwen3":
            toy.image_processor(kind).save_pretrained(folder / name)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_rows(tiny) -> list[dict]:
    return fixed_rows(tiny, common.Processor(f"{tiny}/student"))


def flags(tiny: Path, output: Path | None = None, **changes) -> list[str]:
    """A short run on the tiny models; changes override or add flags (None removes one, True and False are switches)."""
    values = dict(
        preset="toy",
        student=tiny / "student",
        teacher=tiny / "teacher",
        data=tiny / "rows.parquet",
        eval_data=tiny / "rows.parquet",
        eval_split="train",
        prompts=4,
        max_steps=2,
        max_response=12,
        micro_tokens=300,
        eval_rows=4,
        eval_every=0,
        output=output,
    )
    argv = []
    for key, value in (values | changes).items():
        name = key.replace("_", "-")
        if value is True or value is False:
            argv.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            argv += [f"--{name}", str(value)]
    return argv


def in_tiny(tiny: Path, settings: dict) -> dict:
    """Settings of a test's table, in which the text-only model and rows are named alone."""
    ours = ("text-only", "text.parquet")
    return {key: tiny / value if value in ours else value for key, value in settings.items()}


METHODS = ("vgs.py", "vold.py", "ptdpo.py", "vigos.py", "reopold.py")


def run_script(
    script,
    *argv,
    ranks: int = 0,
    torchrun: int = 0,
    timeout: int = 900,
    cwd: Path = ROOT,
    env: dict | None = None,
) -> subprocess.CompletedProcess:
    """Run a script of this folder as a user would: with `ranks` ranks, which may be torchrun's processes.

    A method that needs neither ranks nor an environment of its own runs in this process, which saves the start's
    seconds. timeout: for what hangs; no test depends on how fast the machine is.
    """
    if ranks:
        with tempfile.TemporaryDirectory() as folder:
            return run_ranks([str(script), *map(str, argv)], ranks, cwd, Path(folder), timeout)
    if script in METHODS and not torchrun and cwd == ROOT and env is None:
        return run_here(script, *argv)
    launch = []
    if torchrun:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(torchrun)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    return subprocess.run(
        [sys.executable, *launch, str(script), *map(str, argv)],
        cwd=cwd,
        env=environment | (env or {}),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


def run_here(script: str, *argv) -> subprocess.CompletedProcess:
    """A method's main() in this process, with what it printed and the code it would have exited with."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    before, there = sys.argv, os.getcwd()
    handlers = {number: signal.getsignal(number) for number in STOPS}
    sys.argv = [script, *map(str, argv)]
    os.chdir(ROOT)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            common.launch(importlib.import_module(script.removesuffix(".py")).main)
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
        err.write("" if isinstance(e.code, int) or e.code is None else f"{e.code}\n")
    except Exception:  # as the interpreter would: print it and exit with 1
        code = 1
        err.write(traceback.format_exc())
    finally:
        sys.argv = before
        os.chdir(there)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        common.Run.stepping = common.Run.stopping = False
        gc.collect()  # a run that failed holds its folder for as long as it is there
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return subprocess.CompletedProcess([script, *argv], code, out.getvalue(), err.getvalue())


@pytest.fixture
def start(tmp_path):
    """start(*command, ...) -> a Background; all of them are ended behind the test."""
    started = []

    def begin(*command, **how) -> Background:
        started.append(Background(tmp_path / f"process-{len(started)}", *command, **how))
        return started[-1]

    yield begin
    for process in started:
        process.end()


def refusal(script: str, argv: list) -> str:
    """What a run with these flags says before it stops."""
    result = run_script(script, *argv)
    assert result.returncode != 0 and "Traceback" not in result.stderr, result.stderr
    return result.stderr + result.stdout


def layout_gradients(
    tiny: Path, tmp_path: Path, layouts: list, machines: int = 1, dtype: str = "float32"
) -> list[dict]:
    """Gradients of one update on fixed rollouts (gradients.py), one a layout; all are for the same number of ranks.

    machines: as many torchrun agents, which find each other by their rendezvous as on different machines. dtype: of the
    whole update.
    """
    layouts = [(*layout, settings | {"dtype": dtype}) for *layout, settings in layouts]
    ranks = len(layouts[0][0])
    argv = ["tests/gradients.py", tiny, tmp_path / "gradients.pt", json.dumps(layouts)]
    if machines == 1:
        results = [run_script(*argv, ranks=ranks)]
    else:
        with socket.socket() as s:
            s.bind(("localhost", 0))
            port = s.getsockname()[1]
        meet = ["-m", "torch.distributed.run", "--nnodes", machines]
        meet += ["--nproc-per-node", ranks // machines, "--rdzv-backend", "c10d"]
        meet += ["--rdzv-endpoint", f"localhost:{port}"]
        with ThreadPoolExecutor(machines) as pool:
            results = list(pool.map(lambda _: run_script(*meet, *argv), range(machines)))
    assert all(result.returncode == 0 for result in results), results[0].stderr
    return torch.load(tmp_path / "gradients.pt")


def accuracy(engine, rows, context) -> float:
    """Acc@1 as a run logs it."""
    run = common.Run.__new__(common.Run)
    run.engine, run.processor, run.own, run.values, run.step = engine, engine.processor, {}, {}, 1
    run.args = common.Args()
    run.evaluate({"acc@1": rows}, context)
    return run.own["acc@1 at first"]


def reads_beside_a_sampler(monkeypatch) -> list[bool]:
    """For each pass of a model from now on, whether the sampler was awake: vLLM would hold the memory for it."""
    awake, read = [False], []
    generate, forward = common.HFEngine.generate, common.Model.forward

    def generating(self, *args):
        awake[0] = True
        return generate(self, *args)

    def sleeping(self):
        awake[0] = False

    def reading(self, *args):
        read.append(awake[0])
        return forward(self, *args)

    monkeypatch.setattr(common.HFEngine, "generate", generating)
    monkeypatch.setattr(common.HFEngine, "sleep", sleeping)
    monkeypatch.setattr(common.Model, "forward", reading)
    return read


def distance(a: dict, b: dict) -> float:
    """Relative L2 distance of two gradients, parameter by parameter; b is the reference."""
    difference = sum((a[name].double() - b[name].double()).square().sum() for name in b)
    return (difference / sum(g.double().square().sum() for g in b.values())).sqrt().item()
