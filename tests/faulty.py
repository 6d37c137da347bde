"""A method's main(), in which one thing goes wrong on the last rank: worker of test_faults.py and test_resume.py.

    python tests/faulty.py RESULT METHOD.PY FAULT FLAGS...

It strikes once this process has done one update: in the next one, or in the first checkpoint's writing. When an update
is refused, the first rank writes to RESULT, as JSON, what each rank holds: whether a weight of its has moved, how many
updates were done, and the rows of this one. Of die-WHERE and hang-WHERE nothing is left to be written.
"""

import importlib
import json
import math
import os
import shutil
import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import common  # noqa: E402

state = {"fault": "", "updates": 0}


def strikes(fault: str) -> bool:
    """Whether this fault is due on this rank."""
    last = common.rank() == common.world_size() - 1
    return state["fault"] == fault and state["updates"] == 1 and last


def perish(where: str):
    """This process dies, or stops as one does that the system has stopped, if that is due here."""
    for fault, number in ((f"die-{where}", signal.SIGKILL), (f"hang-{where}", signal.SIGSTOP)):
        if strikes(fault):
            os.kill(os.getpid(), number)


def perishing(holder, name: str, before: str = "", after: str = ""):
    """Put a function that may perish before or after its work in the place of holder.name."""
    function = getattr(holder, name)

    def perishes(*args, **kwargs):
        perish(before)
        result = function(*args, **kwargs)
        perish(after)
        return result

    setattr(holder, name, perishes)


def perish_at_rename(rename):
    """Of a whole checkpoint; torch renames files in it, too."""

    def perishes(path, target):
        whole = path.name.startswith("step-")
        perish("rename" if whole else "")
        rename(path, target)
        perish("clean" if whole else "")

    return perishes


def torn(save):
    """The half of a state is on the disk when this process dies."""

    def saves(value, file):
        save(value, file)
        os.truncate(file, os.path.getsize(file) // 2)
        perish("state")
        save(value, file)

    return saves


def spoil_loss(vocab_loss):
    def spoilt(fn, weights, *args, **kwargs):
        def broken(*tensors):
            perish("update")
            extra = 0.0
            if strikes("loss-nan"):
                extra = math.nan
            elif strikes("loss-inf"):
                extra = math.inf
            return tuple(term + extra for term in fn(*tensors))

        return vocab_loss(broken, weights, *args, **kwargs)

    return spoilt


def spoil_gradient(backward):
    def spoilt(run, *args):
        loss = backward(run, *args)
        gradients = [local(p.grad) for p in run.student.parameters() if p.grad is not None]
        for fault, value in (("gradient-nan", math.nan), ("gradient-inf", math.inf)):
            if strikes(fault):
                next(g for g in gradients if g.numel()).view(-1)[0] = value
        return loss

    return spoilt


def spoil_teacher(load):
    def hook(module, inputs, hidden):
        due = strikes("teacher-nan") and len(hidden)
        return hidden.index_fill(0, torch.tensor([0]), math.nan) if due else hidden

    def spoilt(run, *args):
        load(run, *args)
        if isinstance(run.teacher, torch.nn.Module):
            run.teacher.register_forward_hook(hook)

    return spoilt


def spoil_reward(group_advantages):
    def spoilt(rewards, group):
        if strikes("reward-nan"):
            rewards = torch.where(torch.arange(len(rewards)) == 1, math.nan, rewards)
        return group_advantages(rewards, group)

    return spoilt


def watch(update):
    """Count the updates; of one that is refused, write what it leaves."""

    def watched(run, micros, *args):
        # whole ones: FSDP2 leaves some so after a pass without a backward one
        before = [common.full_tensor(p).clone() for p in run.student.parameters()]
        try:
            log = update(run, micros, *args)
        except common.UserError:
            now = [common.full_tensor(p) for p in run.student.parameters()]
            moved = any(not torch.equal(a, b) for a, b in zip(before, now))
            rows = sorted({s.row["index"] for m in micros for s in m.samples})
            found = {"moved": moved, "updates": state["updates"], "rows": rows}
            ranks = common.all_gather_object(found)
            if common.rank() == 0:
                state["result"].write_text(json.dumps(ranks))
            raise
        state["updates"] += 1
        return log

    return watched


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def main() -> None:
    _, result, script, state["fault"], *argv = sys.argv
    state["result"], sys.argv = Path(result), [script, *argv]
    common.vocab_loss = spoil_loss(common.vocab_loss)
    common.group_advantages = spoil_reward(common.group_advantages)
    common.Run.load = spoil_teacher(common.Run.load)
    common.Run.backward = spoil_gradient(common.Run.backward)
    common.Run.update = watch(common.Run.update)
    perishing(common.HFEngine, "generate", before="rollout")
    perishing(shutil, "copyfile", before="weights")  # of a checkpoint, before its config is there
    perishing(common.Run, "training_state", before="save")
    torch.save = torn(torch.save)
    Path.rename = perish_at_rename(Path.rename)
    importlib.import_module(script.removesuffix(".py")).main()


if __name__ == "__main__":
    common.launch(main)
