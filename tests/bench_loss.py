"""Memory and time of the chunked vocabulary loss beside the naive one, which holds all four logits whole.

    python tests/bench_loss.py         V = 151,936, H = 256, 1,024 response tokens; a minute on two cores

Each side runs in a process of its own, so that the peaks do not mix. Memory is the peak resident size above what the
process holds before the loss (on CUDA: the allocator's peak). The loss is VGS's, forward and backward, in float32.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import common  # noqa: E402
import vgs  # noqa: E402

SIZES = {"tokens": 1024, "vocab": 151_936, "width": 256, "chunk": 64, "repeats": 2}


def terms(*logits):
    return vgs.divergences(*logits)


def naive(weights, hidden, head, frozen):
    logits = [h @ head.T for h in hidden] + [h @ w.T for h, w in frozen]
    return (weights * torch.stack(terms(*logits))).sum()


def held(device) -> int:
    """The most that this process has held until now, in KiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() // 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(side: str, tokens: int, vocab: int, width: int, chunk: int, repeats: int) -> dict:
    device = common.device()
    torch.manual_seed(0)
    hidden = [torch.randn(tokens, width, device=device, requires_grad=True) for _ in range(2)]
    head = (0.05 * torch.randn(vocab, width, device=device)).requires_grad_()
    frozen = []
    for _ in range(2):
        weight = 0.05 * torch.randn(vocab, width, device=device)
        frozen.append((torch.randn(tokens, width, device=device), weight))
    weights = torch.full((3, tokens), 1 / tokens, device=device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds, before = [], held(device)
    for _ in range(repeats):
        for x in (*hidden, head):
            x.grad = None
        start = time.perf_counter()
        if side == "naive":
            loss = naive(weights, hidden, head, frozen)
        else:
            loss, _ = common.vocab_loss(terms, weights, hidden, head, frozen, chunk=chunk)
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    found = {"MiB": (held(device) - before) / 1024, "seconds": min(seconds)}
    return found | {"loss": loss.item(), "gradient": head.grad.norm().item()}


def compare(**changes) -> dict[str, dict]:
    """Both sides' measurements; changes: of SIZES."""
    sizes = [str(x) for name, value in (SIZES | changes).items() for x in (f"--{name}", value)]
    results = {}
    for side in ("naive", "chunked"):
        argv = [sys.executable, __file__, "--side", side, *sizes]
        output = subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True).stdout
        results[side] = json.loads(output)
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", choices=("naive", "chunked"))
    for name, value in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = vars(parser.parse_args())
    side = options.pop("side")
    if side:
        print(json.dumps(measure(side, **options)))
    else:
        results = compare(**options)
        print(f"{options} on {common.device()}, float32")
        for name, r in results.items():
            print(
                f"{name:8s} peak extra memory {r['MiB']:8.0f} MiB   {r['seconds']:6.2f} s   loss {r['loss']:.6f}   "
                f"|grad head| {r['gradient']:.6f}"
            )
        ratio = {x: results["chunked"][x] / results["naive"][x] for x in ("MiB", "seconds")}
        print(f"chunked / naive: memory {ratio['MiB']:.3f}, time {ratio['seconds']:.2f}")
