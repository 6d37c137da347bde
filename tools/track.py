"""The curves of a run in TensorBoard or Weights & Biases, beside the run or after it.

    python -m tools.track runs/vgs-toy-... --to tensorboard     tensorboard --logdir runs shows them
    python -m tools.track runs/vgs-toy-... --to wandb           in the project cleanopd, under the run's name

It follows metrics.jsonl to the run's end (final/), in a process of its own: what a tracker waits for, or whatever stops
it, is nothing to the run. A curve is a key of metrics.jsonl; a list (one value a bin) gives a curve for each place. It
writes them anew from the first step at every start, so that a run that went on has each step once. --to needs its
package: pip install tensorboard, or wandb.
"""

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import common

import tyro


@dataclass
class Args:
    run: tyro.conf.Positional[Path]  # folder of the run
    to: Literal["tensorboard", "wandb"] = "tensorboard"
    every: float = 10.0  # seconds between looks at metrics.jsonl


def curves(record: dict) -> dict[str, float]:
    """A line of metrics.jsonl -> name -> number: {"step": 1, "a": [5, 6]} -> {"a/0": 5, "a/1": 6}."""
    found = {}
    for key, value in record.items():
        if isinstance(value, list):
            found |= {f"{key}/{i}": x for i, x in enumerate(value)}
        elif key != "step":
            found[key] = value
    return found


def writer(args: Args):
    """fn(name -> number, step), which the package of --to gives."""
    settings = json.loads((args.run / "args.json").read_text())
    if args.to == "wandb":
        import wandb

        return wandb.init(project="cleanopd", name=str(args.run), config=settings).log
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(args.run / "tensorboard", ignore_errors=True)  # of an earlier start
    board = SummaryWriter(str(args.run / "tensorboard"))

    def log(values, step):
        for name, value in values.items():
            board.add_scalar(name, value, step)
        board.flush()

    return log


def main():
    args = tyro.cli(Args, description=__doc__)
    file, done = args.run / "metrics.jsonl", 0
    if not (args.run / "args.json").exists():
        raise common.UserError(f"{args.run} holds no run that has begun: it has no args.json")
    try:
        log = writer(args)
    except ImportError:
        raise common.UserError(f"{args.to} is not installed: pip install {args.to}")
    while True:
        last = (args.run / "final").exists()  # before the look, which then sees all
        lines = common.whole_lines(file)
        for line in lines[done:]:
            record = json.loads(line)
            log(curves(record), step=record["step"])
        done = len(lines)
        if last:
            break
        time.sleep(args.every)
    common.say(f"{done} lines of {file} are shown in {args.to}")


if __name__ == "__main__":
    common.launch(main)
