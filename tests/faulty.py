"""Worker of test_faults.py: runs of the methods' main(), in each of which one thing goes wrong on the last rank in the second step.

python tests/faulty.py RESULTS RUNS    with RUNS a JSON list of [method.py, fault, flags]. The first rank writes one JSON line a run to
RESULTS: the two, and what main() ended with on each rank, whether any weight had moved, and how many updates were done.
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
start_distributed = common.start_distributed
state = {"fault": "", "updates": 0, "moved": None}


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
        state["moved"] = any(not torch.equal(a, common.shard(p)) for a, p in zip(before, models.student.parameters()))
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


def start_once(args) -> None:
    if not torch.distributed.is_initialized():
        start_distributed(args)


def main() -> None:
    results, runs = sys.argv[1], json.loads(sys.argv[2])
    common.clip_and_step, common.vocab_loss, common.load_models, common.group_advantages = faulty_step, faulty_loss, faulty_models, faulty_advantages
    common.start_distributed, common.training_state = start_once, perishing("save", common.training_state)
    common.HFEngine.generate = perishing("rollout", common.HFEngine.generate)
    for script, fault, argv in runs:  # die-*, hang-*: one a process
        state.update(fault=fault, updates=0, moved=None)
        sys.argv = [script, *argv]
        try:
            importlib.import_module(script.removesuffix(".py")).main()
            said = ""
        except SystemExit as e:
            said = str(e.code)
        found = common.all_gather_object([said, state["moved"], state["updates"]])
        if common.rank() == 0:
            with open(results, "a") as f:
                f.write(json.dumps([script, fault, {key: [each[i] for each in found] for i, key in enumerate(("said", "moved", "updates"))}]) + "\n")


    torch.distributed.barrier()
    os._exit(0)  # several runs of one process leave behind more of gloo's threads than end well by themselves


if __name__ == "__main__":
    common.launch(main)
