"""Worker of test_faults.py: a method's main(), in which one thing goes wrong on the last rank in the second step.

python tests/faulty.py RESULT METHOD.PY FAULT FLAGS...    When an update is refused the first rank writes to RESULT, as JSON, whether any weight
had moved on each rank, and how many updates had been done.
"""

import importlib
import json
import math
import os
import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import common  # noqa: E402

clip_and_step, vocab_loss, load_models, group_advantages = common.clip_and_step, common.vocab_loss, common.load_models, common.group_advantages
state = {"fault": "", "updates": 0}


def strikes(fault: str) -> bool:
    """Whether this fault is due: on the last rank, before the second update."""
    return state["fault"] == fault and state["updates"] == 1 and common.rank() == common.world_size() - 1


def perish(where: str) -> None:
    """This process dies, or hangs as one does that the system has stopped, if that is due here."""
    for fault, number in ((f"die-{where}", signal.SIGKILL), (f"hang-{where}", signal.SIGSTOP)):
        if strikes(fault):
            os.kill(os.getpid(), number)


def perishing(where: str, function):
    def perishes(*args, **kwargs):
        perish(where)
        return function(*args, **kwargs)

    return perishes


def faulty_loss(fn, weights, *args, **kwargs):
    def broken(*tensors):
        perish("update")
        extra = math.nan if strikes("loss-nan") else math.inf if strikes("loss-inf") else 0.0
        return tuple(term + extra for term in fn(*tensors))

    return vocab_loss(broken, weights, *args, **kwargs)


def faulty_step(models, micros, names, limit):
    gradients = [common.shard(p.grad) for p in models.student.parameters() if p.grad is not None]
    for fault, value in (("gradient-nan", math.nan), ("gradient-inf", math.inf)):
        if strikes(fault):
            next(g for g in gradients if g.numel()).view(-1)[0] = value
    before = [common.shard(p).clone() for p in models.student.parameters()]
    try:
        result = clip_and_step(models, micros, names, limit)
    except common.NotFinite:
        moved = any(not torch.equal(a, common.shard(p)) for a, p in zip(before, models.student.parameters()))
        found = common.all_gather_object((moved, state["updates"]))
        if common.rank() == 0:
            state["result"].write_text(json.dumps(dict(zip(("moved", "updates"), zip(*found)))))
        raise
    state["updates"] += 1
    return result


def faulty_models(*args):
    models = load_models(*args)

    def hook(module, inputs, hidden):
        return hidden.index_fill(0, torch.tensor([0]), math.nan) if strikes("teacher-nan") and len(hidden) else hidden

    if isinstance(models.teacher, torch.nn.Module):
        models.teacher.register_forward_hook(hook)
    return models


def faulty_advantages(rewards, group):
    return group_advantages(torch.where(torch.arange(len(rewards)) == 1, math.nan, rewards) if strikes("reward-nan") else rewards, group)


def main() -> None:
    _, result, script, state["fault"], *argv = sys.argv
    common.clip_and_step, common.vocab_loss, common.load_models, common.group_advantages = faulty_step, faulty_loss, faulty_models, faulty_advantages
    common.training_state = perishing("save", common.training_state)
    common.HFEngine.generate = perishing("rollout", common.HFEngine.generate)
    state["result"], sys.argv = Path(result), [script, *argv]
    importlib.import_module(script.removesuffix(".py")).main()


if __name__ == "__main__":
    common.launch(main)
