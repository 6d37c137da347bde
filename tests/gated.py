"""A method's main() that stops at some places until a file lets it go on: worker of test_stops.py and test_folders.py.

    python tests/gated.py FOLDER "PLACE@STEP PLACE@STEP ..." METHOD.PY FLAGS...

At such a place the first rank writes its process id to FOLDER/PLACE@STEP, and goes on once FOLDER/go-PLACE@STEP is
there or a signal has reached it. Step 0 is all that comes before the first step of this process.
"""

import importlib
import os
import select
import signal
import socket
import sys
import time
from pathlib import Path

import transformers

sys.path.insert(0, str(Path(__file__).parent.parent))
import common  # noqa: E402

LIMIT = 90  # seconds, for a test that forgets a gate or has failed
state = {"folder": Path(), "places": set(), "step": 0}


def gate(place: str):
    """Wait, if this is one of the places and it is the first time here."""
    name = f"{place}@{state['step']}"
    if name not in state["places"] or common.rank() > 0:
        return
    state["places"].remove(name)
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    aside = state["folder"] / f"aside-{name}"
    aside.write_text(str(os.getpid()))
    aside.rename(state["folder"] / name)
    end = time.monotonic() + LIMIT
    try:
        while not (state["folder"] / f"go-{name}").exists():
            if select.select([ours], [], [], 0.02)[0]:  # a signal whose handler has run
                break
            if time.monotonic() > end:
                os._exit(99)
    finally:  # that handler may raise
        signal.set_wakeup_fd(before)


def gated(holder, name: str, place: str, after: bool = False):
    """Put a function with a gate before or behind it in the place of holder.name."""
    function = getattr(holder, name)

    def waits(*args, **kwargs):
        if not after:
            gate(place)
        result = function(*args, **kwargs)
        if after:
            gate(place)
        return result

    setattr(holder, name, waits)


def gate_of_saves(save_pretrained):
    """When the weights of a checkpoint are written, and nothing else of it."""

    def waits(lm, folder, *args, **kwargs):
        save_pretrained(lm, folder, *args, **kwargs)
        gate("final" if "final" in Path(folder).name else "save")

    return waits


def watch_steps(draw, load):
    """state["step"] is the step that the run, or the stage, is in."""

    def drawn(run):
        state["step"] = run.step
        return draw(run)

    def loaded(run, *args, **kwargs):
        state["step"] = 0
        return load(run, *args, **kwargs)

    return drawn, loaded


def slow_rows(check):
    """Half a second a row; the first one says that the rows are being checked."""

    def slow(*args):
        (state["folder"] / "rows@0").touch()
        time.sleep(0.5)
        return check(*args)

    return slow


def main():
    _, folder, places, script, *argv = sys.argv
    state["folder"], state["places"] = Path(folder), set(places.split())
    state["folder"].mkdir(parents=True, exist_ok=True)
    sys.argv = [script, *argv]
    gated(common.Processor, "__init__", "processor")
    gated(common, "load_model", "load")
    gated(common.HFEngine, "generate", "rollout")
    gated(common, "vocab_loss", "update")
    gated(common.Run, "log_samples", "samples", after=True)
    gated(common.Run, "write_metrics", "metrics", after=True)
    gated(common.Run, "evaluate", "evaluate")
    saves = gate_of_saves(transformers.PreTrainedModel.save_pretrained)
    transformers.PreTrainedModel.save_pretrained = saves
    common.Run.draw, common.Run.load = watch_steps(common.Run.draw, common.Run.load)
    if "rows@0" in state["places"]:
        common.Processor.check = slow_rows(common.Processor.check)
    importlib.import_module(Path(script).stem).main()


if __name__ == "__main__":
    common.launch(main)
