"""One table, one run: the kernel, the alternatives that are installed, and this machine's own copy bandwidth as the yardstick.

    python -m kernels.bench                                     # on a GPU: N = 8192, V = 151,936, K = 100, bfloat16
    python -m kernels.bench --rows 64 --vocab 32000             # anything smaller; the default on a CPU, where it says so
    python -m kernels.bench --resources sm_90                   # registers, spills and shared memory of each kernel, from nvcc

Every entry takes logits [N, V] of a student and a teacher and leaves the gradient of the mean divergence for the student's logits
(forward and backward). The floor of that is three passes over [N, V]: two reads and one write. "share" is the floor at the measured
copy bandwidth divided by the time. Full-vocabulary and Top-K divergences are different functions: the first is never the smaller.
"error" is the largest relative L2 error of a row's gradient against float64 mathematics of the same function, over 16 rows.
"""

import argparse
import math
import os
import statistics
import subprocess
import time

import torch
import torch.nn.functional as F

import kernels
from kernels import reference, topk_tail_divergence


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(function, device, repeat) -> list[float]:
    """Milliseconds of each call, after warming up."""
    for _ in range(min(10, repeat)):
        function()
    times = []
    for _ in range(repeat):
        synchronize(device)
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            function()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            function()
            times.append(1000 * (time.perf_counter() - begin))
    return times


def copy_bandwidth(device) -> float:
    """Bytes per second of a large copy, reads and writes counted."""
    size = (8 << 30) if device.type == "cuda" else (256 << 20)
    source = torch.ones(size // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return size / (statistics.median(timed(lambda: target.copy_(source), device, 20)) / 1000)


def make_logits(rows, vocab, dtype, device, seed):
    """A broad bulk, a decaying head, and a peak that goes from flat to all but certain over the rows; a teacher near it."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal():
        return torch.randn(rows, vocab, generator=generator, device=device, dtype=torch.float32)

    z = 2.2 * normal()
    head = torch.randint(vocab, (rows, min(400, vocab)), generator=generator, device=device)
    z.scatter_add_(1, head, torch.linspace(6, 0, head.shape[1], device=device).expand(rows, -1))
    z.scatter_add_(1, head[:, :1], torch.linspace(0, 16, rows, device=device)[:, None])
    y = (0.9 * z + normal()).to(dtype)
    return z.to(dtype), y


# ------------------------------------------------------------------------------------------------------------------ the alternatives
def full_jsd(z, y):
    """JSD over the whole vocabulary, written down as it is."""
    log_p, log_q = z.float().log_softmax(-1), y.float().log_softmax(-1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return (F.kl_div(log_m, log_p, reduction="none", log_target=True) + F.kl_div(log_m, log_q, reduction="none", log_target=True)).sum(-1) / 2


def eager_topk(z, y, k):
    """Top-K plus tail without a [N, V] float32 tensor that outlives its line, the tail as one minus the rest."""
    index = torch.cat([z.detach().topk(k, dim=-1).indices, y.topk(k, dim=-1).indices], dim=-1).sort(-1).values
    repeated = torch.zeros_like(index, dtype=torch.bool)
    repeated[:, 1:] = index[:, 1:] == index[:, :-1]
    result = []
    for x in (z, y):
        log_p = (x.gather(1, index).float() - x.float().logsumexp(-1, keepdim=True)).masked_fill(repeated, -math.inf)
        tail = torch.log1p(-log_p.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-7))
        result.append(torch.cat([log_p, tail], dim=-1))
    return reference.terms(*result, "jsd", 0.5).sum(-1)


def candidates(z, y, k):
    """name -> (function of (z, y) giving [N] or the mean, whether it is the full vocabulary's divergence)."""
    if z.is_cuda:
        yield "topk_tail.cu", lambda z, y: topk_tail_divergence(z, y, k), False
    yield "reference.py", lambda z, y: reference.divergence(z, y, k)[0], False
    yield "eager Top-K and tail", lambda z, y: eager_topk(z, y, k), False
    yield "eager, full vocabulary", full_jsd, True
    yield "torch.compile, full vocabulary", torch.compile(full_jsd, dynamic=False), True
    try:
        from trl.experimental.iw_opd.iw_opd_trainer import IWOPDTrainer

        yield "TRL, Top-K and tail", lambda z, y: IWOPDTrainer.generalized_jsd_loss(z[None], y[None], top_k=k, reduction="sum") / len(z), False
    except ImportError:
        print("TRL is not installed: left out")
    try:
        from liger_kernel.transformers import LigerJSD

        if z.is_cuda:
            yield "Liger JSD, full vocabulary", lambda z, y: LigerJSD()(z.float().log_softmax(-1), y.float().log_softmax(-1)), True
    except ImportError:
        print("liger-kernel is not installed: left out")


def head_candidates(k, chunk):
    """name -> function of (student hidden, student head, teacher hidden, teacher head) that leaves the student's gradients."""

    def products(hs, ws, ht, wt):  # the three (or four) matrix products that no method can avoid
        for a, b in zip(hs.split(chunk), ht.split(chunk)):
            b @ wt.T
            (a @ ws.T) @ ws

    def ours(hs, ws, ht, wt):  # chunk by chunk, the gradient over the student's logits; the head frozen
        for a, b in zip(hs.split(chunk), ht.split(chunk)):
            z = (a @ ws.T).requires_grad_()
            (g,) = torch.autograd.grad(topk_tail_divergence(z, b @ wt.T, k, inplace=z.is_cuda).mean(), z)
            g @ ws

    yield "head products alone", products
    yield "topk_tail_divergence on chunks of the heads' products", ours
    try:
        from liger_kernel.transformers import LigerFusedLinearJSD

        if torch.cuda.is_available():

            def liger(hs, ws, ht, wt):
                LigerFusedLinearJSD()(hs.detach().requires_grad_(), ws, ht, wt, None).backward()

            yield "Liger fused linear JSD, full vocabulary", liger
    except ImportError:
        pass


# ------------------------------------------------------------------------------------------------------------------------- the table
def gradient_of(function, z, y):
    leaf = z.detach().requires_grad_()
    value = function(leaf, y)
    (gradient,) = torch.autograd.grad(value.mean(), leaf)
    return gradient


def largest_error(function, full, z, y, k) -> float:
    rows = torch.linspace(0, len(z) - 1, min(16, len(z)), device=z.device).long()
    z, y = z[rows].contiguous(), y[rows].contiguous()
    exact = reference.gradient(z.double(), y.double(), k=z.shape[1] if full else k)
    error = len(rows) * gradient_of(function, z.clone(), y).double() - exact
    return float((error.norm(dim=-1) / exact.norm(dim=-1)).max())


def measure(name, call, device, repeat):
    """-> sorted milliseconds and the peak of extra memory in MiB (CUDA), or None where memory did not suffice."""
    try:
        if device.type == "cuda":
            call()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            torch.cuda.synchronize()
            extra = (torch.cuda.max_memory_allocated() - before) / 2**20
        else:
            extra = math.nan
        return sorted(timed(call, device, repeat)), extra
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        print(f"{name}: out of memory")
        return None


def in_mib(extra: float) -> str:
    return "not measured" if math.isnan(extra) else f"{extra:,.0f}"


def logits_table(args, device, dtype, bandwidth):
    n, v, k = args.rows, args.vocab, args.k
    unit = n * v * torch.empty(0, dtype=dtype).element_size()
    floor = 3 * unit / bandwidth * 1000
    print(f"copy bandwidth {bandwidth / 1e9:,.0f} GB/s; N = {n}, V = {v:,}, K = {k}, {args.dtype}: floor {floor:.2f} ms\n")
    inputs = [make_logits(n, v, dtype, device, seed) for seed in range(3)]  # larger together than any cache
    exact, bound = topk_tail_divergence(*inputs[0], k, return_metrics=True)
    step = max(1, n // 16)  # the gap to the full divergence on some rows
    full = reference.divergence(inputs[0][0][::step].double(), inputs[0][1][::step].double(), k=v)[0]
    print(f"mean divergence: Top-K and tail {float(exact[::step].mean()):.6f}, full vocabulary {float(full.mean()):.6f}, "
          f"certified gap at most {float(bound['gap_bound'][::step].mean()):.6f}\n")  # fmt: skip

    print("| forward and backward | ms (median) | p10 - p90 | useful GB/s | share of the copy bandwidth | extra MiB | error |")
    print("|---|---|---|---|---|---|---|")
    for name, function, is_full in candidates(*inputs[0], k):
        turn = iter(range(10**9))

        def call():
            z, y = inputs[next(turn) % 3]
            gradient_of(function, z, y)

        error = largest_error(function, is_full, *inputs[0], k)
        measured = measure(name, call, device, args.repeat)
        if measured:
            times, extra = measured
            ms = statistics.median(times)
            spread = f"{times[len(times) // 10]:.2f} - {times[-1 - len(times) // 10]:.2f}"
            print(f"| {name} | {ms:.2f} | {spread} | {3 * unit / ms / 1e6:,.1f} | {100 * floor / ms:.0f} % | {in_mib(extra)} | {error:.1e} |", flush=True)
    for name, call in {
        "topk_tail_divergence, forward only": lambda: topk_tail_divergence(*inputs[0], k),
        "torch.topk of both, nothing else": lambda: [x.topk(k, dim=-1) for x in inputs[0]],
    }.items():
        times, extra = measure(name, call, device, args.repeat)
        print(f"| {name} | {statistics.median(times):.2f} | | | | {in_mib(extra)} | |")


def heads_table(args, device, dtype):
    n, v, k = args.rows, args.vocab, args.k
    heads = [0.05 * torch.randn(v, args.hidden, dtype=dtype, device=device) for _ in range(2)]
    hidden = [torch.randn(n, args.hidden, dtype=dtype, device=device) for _ in range(2)]
    print(f"\n| from hidden states, H = {args.hidden}, student's head frozen | ms (median) | extra MiB |")
    print("|---|---|---|")
    for name, function in head_candidates(k, 2048):
        measured = measure(name, lambda: function(hidden[0], heads[0], hidden[1], heads[1]), device, max(3, args.repeat // 5))
        if measured:
            print(f"| {name} | {statistics.median(measured[0]):.2f} | {in_mib(measured[1])} |", flush=True)


def main():
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192 if gpu else 64)
    parser.add_argument("--vocab", type=int, default=151_936 if gpu else 32_000)
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16" if gpu else "float32")
    parser.add_argument("--hidden", type=int, default=2048 if gpu else 128, help="width of the heads in the second table")
    parser.add_argument("--repeat", type=int, default=50 if gpu else 5)
    parser.add_argument("--resources", metavar="ARCH", help="print what each kernel uses on this architecture, and end")
    args = parser.parse_args()
    if args.resources:
        command = [kernels.find_nvcc(), *kernels.NVCC_FLAGS, f"-arch={args.resources}", "-Xptxas", "-v", "-o", os.devnull, kernels.SOURCE]
        print(subprocess.run(command, capture_output=True, text=True, check=True).stderr)
        return

    device, dtype = torch.device("cuda" if gpu else "cpu"), getattr(torch, args.dtype)
    if gpu:
        p = torch.cuda.get_device_properties(0)
        print(f"{p.name}, {p.multi_processor_count} SMs, L2 {p.L2_cache_size >> 20} MiB, torch {torch.__version__}, CUDA {torch.version.cuda}")
    else:
        print(f"No CUDA device: the plain-PyTorch reference on {torch.get_num_threads()} CPU threads. These are no figures of the kernel.")
    bandwidth = copy_bandwidth(device)
    logits_table(args, device, dtype, bandwidth)
    heads_table(args, device, dtype)


if __name__ == "__main__":
    main()
