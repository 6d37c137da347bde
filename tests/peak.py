"""Worker of test_plan.py: the peak of this process's memory over one update, beside what the plan says. python tests/peak.py FOLDER SETTINGS"""

import json
import re
import resource
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import common  # noqa: E402
import toy  # noqa: E402
import vgs  # noqa: E402


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak() -> int:
    """Of this process alone; ru_maxrss is its parent's as well."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def main() -> None:
    folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    args = vgs.Args(student=str(folder / "student"), teacher=str(folder / "teacher"), dtype="float32", max_prompt=60, max_response=190, loss_chunk=128,
                    rollout_batch=8, plan=1, engine="hf", **settings)
    common.start_distributed(args)
    processor = common.Processor(args.student)
    rows = toy.make_rows(*toy.scans()["test"], args.prompts, 0)
    prompts = [{name: processor.encode(context(row)) for name, context in vgs.contexts(args).items()} for row in rows]
    generator = torch.Generator().manual_seed(0)
    samples = [common.Sample(row, views, common.Response(torch.randint(0, processor.vocab - 20, (190,), generator=generator).tolist(), [-1.0] * 190, True))
               for row, views in zip(rows, prompts)]
    before = resident()
    models = common.load_models(args, processor, args.teacher, 1)
    for _ in range(2):  # the optimizer's moments come with the first update
        micros = vgs.score(samples, models, args)
        vgs.weigh(micros, args, 1.0)
        vgs.update(micros, models, args)
    need = common.plan_memory(args, args.teacher, len(vgs.contexts(args)), len(vgs.contexts(args)))
    print(json.dumps({"measured": peak() - before, "planned": sum(training for _, training in need.values()), "parts": {name: v[1] for name, v in need.items()},
                      "parameters": [sum(p.numel() for p in models.student.parameters()), common.sizes_of(args.student, args).parameters]}))


if __name__ == "__main__":
    common.launch(main)
