"""tools.track shows what metrics.jsonl holds: while the run goes on, after it, and anew at every start."""

import json
import sys
import threading
import types

import common
from tools import track

import pytest

LINES = [{"step": 0, "acc@1": 0.5}, {"step": 1, "loss": 2.5, "vis_by_vds": [5.0, 6.0]}]


@pytest.fixture
def run(tmp_path):
    """A run that has begun: a folder with its settings and its first two lines."""
    (tmp_path / "args.json").write_text(json.dumps({"gamma": 2.0}))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return tmp_path


def show(monkeypatch, run, *flags):
    monkeypatch.setattr(sys, "argv", ["track", str(run), "--every", "0.05", *flags])
    track.main()


@pytest.fixture
def wandb(monkeypatch):
    """Stands in for the package: what it was told at the start, and the values and steps that came."""
    told = types.SimpleNamespace(begun=[], logged=[])

    def init(**how):
        told.begun.append(how)
        return types.SimpleNamespace(log=lambda values, step: told.logged.append((step, values)))

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    return told


def test_tensorboard_has_each_step_once(run, monkeypatch):
    """Also after a second start, and a list is a curve a place."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (run / "final").mkdir()
    for _ in range(2):
        show(monkeypatch, run)
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    for name, points in {
        "acc@1": [(0, 0.5)],
        "loss": [(1, 2.5)],
        "vis_by_vds/1": [(1, 6.0)],
    }.items():
        assert [(e.step, e.value) for e in events.Scalars(name)] == points


def test_wandb_gets_the_settings_and_what_comes_later(run, monkeypatch, wandb):
    """It follows the run to its end."""

    def goes_on():
        with open(run / "metrics.jsonl", "a") as f:
            f.write(json.dumps({"step": 2, "loss": 1.5}) + "\n" + '{"step": 3, "lo')
        (run / "final").mkdir()

    timer = threading.Timer(0.3, goes_on)
    timer.start()
    show(monkeypatch, run, "--to", "wandb")
    timer.join()
    (how,) = wandb.begun
    assert how["config"] == {"gamma": 2.0} and how["name"] == str(run)
    first = {"loss": 2.5, "vis_by_vds/0": 5.0, "vis_by_vds/1": 6.0}
    assert wandb.logged == [(0, {"acc@1": 0.5}), (1, first), (2, {"loss": 1.5})]


def test_a_folder_without_a_run_is_named(tmp_path, monkeypatch):
    with pytest.raises(common.UserError, match="holds no run that has begun"):
        show(monkeypatch, tmp_path)
