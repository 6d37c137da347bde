"""Worker of test_distributed.py and test_vgs_exact.py: gradients of one update on eight fixed rollouts, for several layouts.

python tests/gradients.py TINY OUT LAYOUTS   with LAYOUTS a JSON list of [shares, micro-batch, chunk, method, alpha], and shares
like [8, 0]: how many of the rollouts each rank holds.
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import common  # noqa: E402
import vgs  # noqa: E402


def fixed_samples(processor, rows, count: int) -> list[common.Sample]:
    """Responses of 3 to 12 tokens, drawn once for all layouts."""
    generator = torch.Generator().manual_seed(5)
    samples = []
    for i in range(count):
        n = int(torch.randint(3, 13, (), generator=generator))
        ids = torch.randint(0, processor.vocab - 20, (n,), generator=generator).tolist()
        row = rows[i]
        response = common.Response(ids, [-1.0] * n, True)
        prompts = {"image": processor.encode(vgs.with_image(row)), "text": processor.encode(vgs.without_image(row))}
        samples.append(common.Sample(row, prompts, response, 0.0, (-1.0) ** i))
    return samples


def gradient(tiny: str, samples: list, shares: list[int], micro: int, chunk: int, method: str, alpha: float) -> dict:
    """{"gradient": whole gradient by parameter, "norm", "eta"} of one update with each rank holding its share of the samples."""
    args = vgs.Args(student=f"{tiny}/student", teacher=f"{tiny}/teacher", dtype="float32", method=method, lambda_lp=0.5, micro_batch=micro,
                    loss_chunk=chunk, alpha=alpha, group=2)
    models = common.load_models(args, common.Processor(args.student), args.teacher, updates=1)
    first = sum(shares[: common.rank()])
    micros = vgs.score(samples[first : first + shares[common.rank()]], models, args)
    eta = vgs.measure_eta(micros, models, args)["eta"] if vgs.uses_eta(args) else None
    vgs.weigh(micros, args, eta=0.7)
    vgs.accumulate(micros, models, args)
    whole = {name: common.whole(p.grad).clone() for name, p in models.student.named_parameters()}
    return {"gradient": whole, "norm": common.grad_norm(models.student).item(), "eta": eta}


def main() -> None:
    tiny, out, layouts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    common.start_distributed(vgs.Args())
    processor, rows = common.Processor(f"{tiny}/student"), common.Rows(f"{tiny}/rows.parquet", "train", {"problem": "problem"})
    samples = fixed_samples(processor, rows, 8)
    results = [gradient(tiny, samples, *layout) for layout in layouts]
    if common.rank() == 0:
        torch.save(results, out)


if __name__ == "__main__":
    common.launch(main)
