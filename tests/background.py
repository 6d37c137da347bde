"""Runs in the background: started, waited for at a place, signalled, and ended whatever a test does."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import ranks

ROOT = Path(__file__).parent.parent
PATIENCE = 120  # seconds for what takes two; no test depends on how fast the machine is
MARK = "CLEANOPD_TEST"  # in the environment of all that a test starts, and of what these start


def wait_for(condition, what: str, seconds: float = PATIENCE):
    """What condition() is, once that is true."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"waited {seconds} seconds for: {what}"
        time.sleep(0.02)
    return found


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has just ended
        return b""


def alive(pid: int) -> bool:
    """Neither gone nor a zombie, which only waits to be counted."""
    status = read(Path(f"/proc/{pid}/stat"))
    return bool(status) and status.rpartition(b")")[2].split()[0] not in (b"Z", b"X")


def children(pid: int) -> list[int]:
    """Processes that this one has started, the oldest first."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        found += map(int, read(task).split())
    return sorted(found)


def work(command, cwd, environment, folder, umask, ignored):
    """Of a forked process: as if python had been started with this command."""
    if umask is not None:
        os.umask(umask)
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    ranks.work(command, cwd, environment, folder)


class Background:
    """A command of python: forked (quick), or (torchrun, interpreter) started as a user would.

    gates: the folder of tests/gated.py, if that is what runs. torchrun: so many ranks, of which pid is the agent.
    """

    def __init__(
        self,
        folder: Path,
        *command,
        gates: str = "",
        torchrun: int = 0,
        interpreter: bool = False,
        cwd: Path = ROOT,
        env: dict | None = None,
        umask: int | None = None,
        ignored: tuple = (),
    ):
        folder.mkdir()
        self.folder, self.gates = folder, folder / "gates"
        if gates:
            command = (ROOT / "tests" / "gated.py", self.gates, gates, *command)
        command = list(map(str, command))
        environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", MARK: str(folder)}
        environment |= env or {}
        if torchrun:
            rank_of = ["-m", "torch.distributed.run", "--standalone"]
            command = [*rank_of, "--nproc-per-node", str(torchrun), *command]
        self.forked = not (torchrun or interpreter)
        if self.forked:
            ranks.start_server()
            details = (command, cwd, environment, folder, umask, ignored)
            self.process = ranks.SERVER.Process(target=work, args=details)
            self.process.start()
        else:
            changed = os.environ | {"PYTHONPATH": ""} | environment
            changed = {key: value for key, value in changed.items() if value is not None}
            with open(folder / "stdout", "wb") as out, open(folder / "stderr", "wb") as err:
                self.process = subprocess.Popen(
                    [sys.executable, *command], cwd=cwd, env=changed, stdout=out, stderr=err
                )
        self.pid = self.process.pid

    def code(self) -> int | None:
        return self.process.exitcode if self.forked else self.process.poll()

    def text(self, name: str) -> str:
        return read(self.folder / name).decode(errors="replace")

    def said(self) -> str:
        return self.text("stdout") + self.text("stderr")

    def reach(self, place: str) -> int:
        """Wait until the first rank is at this gate; its process id."""

        def there():
            assert self.code() is None, f"it ended before {place}: {self.said()}"
            return (self.gates / place).exists()

        wait_for(there, f"{place} of {self.folder}")
        return int((self.gates / place).read_text() or 0)

    def go(self, place: str):
        (self.gates / f"go-{place}").touch()

    def wait(self, seconds: float = PATIENCE) -> subprocess.CompletedProcess:
        """Its end, with what it printed."""
        wait_for(lambda: self.code() is not None, f"the end of {self.folder}", seconds)
        out, err = self.text("stdout"), self.text("stderr")
        return subprocess.CompletedProcess(str(self.folder), self.code(), out, err)

    def left(self) -> list[int]:
        """Living processes that it has started, or that these have."""
        mark = f"{MARK}={self.folder}\0".encode()
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            pid = int(path.parent.name)
            if pid != self.pid and mark in read(path) and alive(pid):
                found.append(pid)
        return found

    def end(self):
        """Nothing of it is left."""
        if self.code() is None:
            self.process.kill()
        for pid in self.left():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.join() if self.forked else self.process.wait()


def sentences(said: str, *parts: str) -> list[str]:
    """The lines that hold a match of every part, bars left out."""
    found = re.split(r"[\r\n]+", said)
    return [line for line in found if all(re.search(part, line) for part in parts)]


def states(folder: Path) -> list[str]:
    """The checkpoints that can be gone on from, the oldest first."""
    return sorted({path.parent.name for path in folder.glob("checkpoints/step-??????/state*")})
