"""Worker of test_distributed.py: the gradient of one update on fixed rollouts, written whole by the first rank.

python tests/gradients.py TINY OUT SHARES MICRO CHUNK METHOD ALPHA   with SHARES like 4,0: how many of the samples each rank holds.
"""

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


def main() -> None:
    tiny, out, shares, micro, chunk, method, alpha = sys.argv[1:]
    counts = [int(n) for n in shares.split(",")]
    args = vgs.Args(student=f"{tiny}/student", teacher=f"{tiny}/teacher", dtype="float32", method=method, lambda_lp=0.5, micro_batch=int(micro),
                    loss_chunk=int(chunk), prompts=len(counts), alpha=float(alpha), group=2)
    common.start_distributed(args)
    models = common.load_models(args, common.Processor(args.student), args.teacher, updates=1)
    rows = common.Rows(f"{tiny}/rows.parquet", "train", {"problem": "problem"})
    first = sum(counts[: common.rank()])
    samples = fixed_samples(models.processor, rows, sum(counts))[first : first + counts[common.rank()]]
    micros = vgs.score(samples, models, args)
    eta = vgs.measure_eta(micros, models, args)["eta"] if vgs.uses_eta(args) else None
    vgs.weigh(micros, args, eta=0.7)
    vgs.accumulate(micros, models, args)
    gradient = {name: common.whole(p.grad).clone() for name, p in models.student.named_parameters()}
    norm = common.grad_norm(models.student)
    if common.rank() == 0:
        torch.save({"gradient": gradient, "norm": norm.item(), "eta": eta}, out)


if __name__ == "__main__":
    common.launch(main)
