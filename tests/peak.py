"""Worker of test_plan.py: the peak of this process's memory over updates, beside what the plan says.

python tests/peak.py FOLDER SETTINGS
"""

import json
import re
import resource
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import common  # noqa: E402
import vgs  # noqa: E402
from tools import plan, toy  # noqa: E402

LENGTH = 190  # tokens of a response


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak() -> int:
    """Of this process alone; ru_maxrss is its parent's as well."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def main():
    folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    fixed = dict(dtype="float32", max_prompt=60, max_response=LENGTH, loss_chunk=128, engine="hf")
    paths = dict(student=str(folder / "student"), teacher=str(folder / "teacher"))
    args = vgs.Args(**paths, rollout_batch=8, **fixed, **settings)
    common.start_ranks(args)
    processor = common.Processor(args.student)
    generator = torch.Generator().manual_seed(0)
    samples = []
    for row in toy.make_rows(*toy.scans()["test"], args.prompts, 0):
        prompts = {name: processor.encode(view(row)) for name, view in vgs.contexts(args).items()}
        ids = torch.randint(0, processor.vocab - 20, (LENGTH,), generator=generator).tolist()
        samples.append(common.Sample(row, prompts, common.Response(ids, log_probs=[-1.0] * LENGTH)))
    before = resident()
    run = common.Run.__new__(common.Run)
    run.args, run.settings, run.own, run.step, run.values = args, {}, {}, 1, {}
    run.load(processor, args.teacher)
    run.optimizer, run.schedule = common.make_optimizer(run.student, args, 2)
    for _ in range(2):  # the optimizer's moments come with the first update
        micros = vgs.score(samples, run, args)
        vgs.weigh(micros, run, args)
        vgs.update(micros, run, args)
    contexts = len(vgs.contexts(args))
    need = plan.plan_memory(args, 1, 80, args.teacher, contexts, contexts)
    parameters = [sum(p.numel() for p in run.student.parameters())]
    parameters.append(plan.sizes_of(args.student, args).parameters)
    planned = sum(training for _, training in need.values())
    print(json.dumps({"measured": peak() - before, "planned": planned, "parameters": parameters}))


if __name__ == "__main__":
    common.launch(main)
