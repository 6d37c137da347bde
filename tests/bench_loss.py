"""Memory and time of the chunked vocabulary loss beside the naive one, which holds all four logits whole.

    python tests/bench_loss.py                        V = 151,936, H = 256, 1,024 response tokens; a minute on two cores

Each side runs in a process of its own, so that the peaks do not mix. Memory is the peak resident size above what the process
holds before the loss (on CUDA: the allocator's peak). The loss is VGS's, forward and backward, in float32.
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


def terms(*logits):
    return vgs.divergences(*logits)[:3]


def naive(weights, hidden, head, frozen):
    logits = [h @ head.T for h in hidden] + [h @ w.T for h, w in frozen]
    return (weights * torch.stack(terms(*logits))).sum()


def measure(side: str, tokens: int, vocab: int, width: int, chunk: int, repeats: int) -> dict:
    device = common.device()
    torch.manual_seed(0)
    hidden = [torch.randn(tokens, width, device=device, requires_grad=True) for _ in range(2)]
    head = (0.05 * torch.randn(vocab, width, device=device)).requires_grad_()
    frozen = [(torch.randn(tokens, width, device=device), 0.05 * torch.randn(vocab, width, device=device)) for _ in range(2)]
    weights = torch.full((3, tokens), 1 / tokens, device=device)
    seconds, before = [], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() // 1024
    for _ in range(repeats):
        for x in (*hidden, head):
            x.grad = None
        start = time.perf_counter()
        loss = naive(weights, hidden, head, frozen) if side == "naive" else common.vocab_loss(terms, weights, hidden, head, frozen, chunk=chunk)[0]
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() // 1024 if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"MiB": (peak - before) / 1024, "seconds": min(seconds), "loss": loss.item(), "gradient": head.grad.norm().item()}


def compare(tokens: int = 1024, vocab: int = 151_936, width: int = 256, chunk: int = 64, repeats: int = 2) -> dict[str, dict]:
    results = {}
    for side in ("naive", "chunked"):
        argv = [sys.executable, __file__, "--side", side, *(str(x) for x in ("--tokens", tokens, "--vocab", vocab, "--width", width, "--chunk", chunk, "--repeats", repeats))]
        results[side] = json.loads(subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", choices=("naive", "chunked"))
    for name, value in (("tokens", 1024), ("vocab", 151_936), ("width", 256), ("chunk", 64), ("repeats", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = vars(parser.parse_args())
    side = options.pop("side")
    if side:
        print(json.dumps(measure(side, **options)))
    else:
        results = compare(**options)
        print(f"{options} on {common.device()}, float32")
        for name, result in results.items():
            print(f"{name:8s} peak extra memory {result['MiB']:8.0f} MiB   {result['seconds']:6.2f} s   loss {result['loss']:.6f}   |grad head| {result['gradient']:.6f}")
        print(f"chunked / naive: memory {results['chunked']['MiB'] / results['naive']['MiB']:.3f}, time {results['chunked']['seconds'] / results['naive']['seconds']:.2f}")
