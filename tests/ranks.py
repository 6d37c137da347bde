"""Ranks without their start: each is forked from a process that has already imported what a run imports.

What torchrun itself does (which rank it ends, what it reports) is tested with torchrun; see conftest.run_script.
"""

import multiprocessing
import multiprocessing.connection
import os
import runpy
import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import common  # noqa: F401

import datasets  # noqa: F401
import math_verify  # noqa: F401
import peft  # noqa: F401
import torch
import tyro  # noqa: F401
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl  # noqa: F401
from transformers.models.qwen3_vl import modeling_qwen3_vl  # noqa: F401

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["ranks"])
GRACE = 10  # seconds in which the other ranks may end by themselves, once one has failed


def start_server():
    """Before Python 3.12.8 the server does not get this process's sys.path, and would preload nothing, silently."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    forkserver.ensure_running()
    del os.environ["PYTHONPATH"]
    if before is not None:
        os.environ["PYTHONPATH"] = before


def work(command: list[str], cwd: Path, environment: dict, folder: Path):
    """A forked process becomes a rank: as if python had been started with this command."""
    for name, number in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.update(environment)
    os.chdir(cwd)
    torch.set_num_threads(1)
    sys.argv = command
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(command[0]).absolute().parent))
        runpy.run_path(command[0], run_name="__main__")


def run_ranks(command, ranks: int, cwd: Path, folder: Path, timeout: float):
    """Run a command as `ranks` processes that find each other as torchrun's do; as subprocess.run gives it back."""
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(ranks)}
    shared |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    shared |= {"TORCHELASTIC_RUN_ID": "test"}
    start_server()
    processes = []
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        process = SERVER.Process(target=work, args=(command, cwd, shared | own, folder))
        process.start()
        processes.append(process)
    end = time.monotonic() + timeout
    while any(process.exitcode is None for process in processes) and time.monotonic() < end:
        if any(process.exitcode for process in processes):
            end = min(end, time.monotonic() + GRACE)
        multiprocessing.connection.wait([p.sentinel for p in processes if p.exitcode is None], 1)
    hung = [process for process in processes if process.exitcode is None]
    for process in hung:
        process.kill()
        process.join()
    code = int(any(process.exitcode for process in processes))
    said = [(folder / name).read_text() for name in ("stdout", "stderr")]
    if hung and not code:
        raise subprocess.TimeoutExpired(command, timeout, *said)
    return subprocess.CompletedProcess(command, code, *said)
