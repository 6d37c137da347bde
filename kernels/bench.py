"""One table, one run: the kernel, the alternatives that are installed, and this machine's own copy bandwidth.

    python -m kernels.bench                                # on a GPU: N = 8192, V = 151,936, K = 100, bfloat16
    python -m kernels.bench --rows 64 --vocab 32000        # anything smaller; the default on a CPU, where it says so
    python -m kernels.bench --resources sm_90              # registers, spills and shared memory of each kernel

Every entry takes logits [N, V] of a student and a teacher and leaves the gradient of the mean divergence for the
student's logits (forward and backward). The floor of that is three passes over [N, V]: two reads and one write.
"share" is the floor at the measured copy bandwidth divided by the time. Full-vocabulary and Top-K divergences are
different functions: the first is never the smaller. "error" is the largest relative L2 error of a row's gradient
against float64 mathematics of the same function, over 16 rows; bfloat16 gradients are rounded to 8 bits.
"""

import argparse
import functools
import itertools
import math
import os
import statistics
import subprocess
import time

import kernels
from kernels import reference, topk_tail_divergence

import torch
import torch.nn.functional as F

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
CHUNK = 2048  # rows of logits at a time in the second table


# -------------------------------------------------------------------------------------------------------------- timing
def timed(function, repeat) -> list[float]:
    """Milliseconds of each call, after warming up."""
    for _ in range(min(10, repeat)):
        function()
    if GPU:
        return timed_on_gpu(function, repeat)
    times = []
    for _ in range(repeat):
        begin = time.perf_counter()
        function()
        times.append(1000 * (time.perf_counter() - begin))
    return times


def timed_on_gpu(function, repeat) -> list[float]:
    """Milliseconds between CUDA events around each call.

    The calls are queued without waiting for one another, so that launching one is hidden behind the one before.
    """
    pairs = []
    for _ in range(repeat):
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairs]


def copy_bandwidth() -> float:
    """Bytes per second of a large copy, reads and writes counted."""
    size = (4 << 30) if GPU else (128 << 20)
    source = torch.ones(size, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    times = timed(lambda: target.copy_(source), 20)
    return 2 * size / (statistics.median(times) / 1000)


def measure(call, repeat) -> tuple[list[float], str]:
    """Sorted milliseconds, and the peak of extra memory in MiB."""
    if not GPU:
        return sorted(timed(call, repeat)), "not measured"
    call()  # whatever it compiles or keeps is not its working memory
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    return sorted(timed(call, repeat)), f"{extra / 2**20:,.0f}"


def attempt(row, *arguments) -> str:
    """The columns that row(*arguments) makes, or the reason for which it makes none."""
    try:
        return row(*arguments)
    except ImportError as error:
        return str(error)  # No module named ...
    except torch.OutOfMemoryError:
        reason = "out of memory"
    except (
        torch._dynamo.exc.TorchDynamoException
    ) as error:  # no C compiler for Triton, for instance
        reason = f"torch.compile failed ({type(error).__name__})"
    torch.cuda.empty_cache()  # here, where the error no longer holds the tensors
    return reason


# -------------------------------------------------------------------------------------------------------------- inputs
def make_logits(rows, vocab, dtype, seed):
    """A broad bulk, a decaying head, and a peak from flat to all but certain over the rows; a teacher near it."""
    generator = torch.Generator(device=DEVICE).manual_seed(seed)
    random = {"generator": generator, "device": DEVICE}
    z = torch.randn(rows, vocab, **random).mul_(2.2)
    head = torch.randint(vocab, (rows, min(400, vocab)), **random)
    decay = torch.linspace(6, 0, head.shape[1], device=DEVICE)
    z.scatter_add_(1, head, decay.expand(rows, -1))
    peak = torch.linspace(0, 16, rows, device=DEVICE)
    z.scatter_add_(1, head[:, :1], peak[:, None])
    y = torch.randn(rows, vocab, **random).add_(z, alpha=0.9)
    return z.to(dtype), y.to(dtype)


def gradient_of(function, z, y):
    leaf = z.detach().requires_grad_()
    value = function(leaf, y)
    (gradient,) = torch.autograd.grad(value.mean(), leaf)
    return gradient


def rotating(function, inputs):
    """A call that takes the next set of inputs each time: together they are larger than any cache."""
    sets = itertools.cycle(inputs)

    def call():
        z, y = next(sets)
        gradient_of(function, z, y)

    return call


def largest_error(function, full, z, y, k) -> float:
    step = max(1, len(z) // 16)
    z = z[::step].clone()
    y = y[::step].clone()
    if full:
        k = z.shape[1]
    exact = reference.gradient(z.double(), y.double(), k=k)
    got = gradient_of(function, z, y).double() * len(z)
    relative = (got - exact).norm(dim=-1) / exact.norm(dim=-1)
    return float(relative.max())


# ---------------------------------------------------------------------------------------------------- the alternatives
def full_jsd(z, y):
    """JSD over the whole vocabulary, written down as it is."""
    log_p = z.float().log_softmax(-1)
    log_q = y.float().log_softmax(-1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    student = F.kl_div(log_m, log_p, reduction="none", log_target=True)
    teacher = F.kl_div(log_m, log_q, reduction="none", log_target=True)
    return (student + teacher).sum(-1) / 2


def eager_topk(z, y, k):
    """Top-K plus tail without a [N, V] float32 tensor that outlives its line, the tail as one minus the rest."""
    tops = [x.detach().topk(k, dim=-1).indices for x in (z, y)]
    index = torch.cat(tops, dim=-1).sort(-1).values  # [N, 2K]
    repeated = torch.zeros_like(index, dtype=torch.bool)
    repeated[:, 1:] = index[:, 1:] == index[:, :-1]
    log_buckets = []
    for x in (z, y):
        log_p = x.gather(1, index).float() - x.float().logsumexp(-1, keepdim=True)
        log_p = log_p.masked_fill(repeated, -math.inf)
        mass = log_p.exp().sum(-1, keepdim=True)
        tail = torch.log1p(-mass.clamp(max=1 - 1e-7))
        log_buckets.append(torch.cat([log_p, tail], dim=-1))
    return reference.terms(*log_buckets, "jsd", 0.5).sum(-1)


def trl_jsd(z, y, k):
    from trl.experimental.iw_opd.iw_opd_trainer import IWOPDTrainer

    total = IWOPDTrainer.generalized_jsd_loss(z[None], y[None], top_k=k, reduction="sum")
    return total / len(z)


def liger_jsd(z, y):
    from liger_kernel.transformers import LigerJSD

    return LigerJSD()(z.float().log_softmax(-1), y.float().log_softmax(-1))


def candidates(k) -> list[tuple]:
    """Name, function of (z, y) giving [N] or the mean, whether it is the full vocabulary's divergence."""
    entries = [
        ("reference.py", lambda z, y: reference.divergence(z, y, k)[0], False),
        ("eager Top-K and tail", functools.partial(eager_topk, k=k), False),
        ("eager, full vocabulary", full_jsd, True),
        ("torch.compile, full vocabulary", torch.compile(full_jsd, dynamic=False), True),
        ("TRL, Top-K and tail", functools.partial(trl_jsd, k=k), False),
    ]
    if GPU:
        kernel = functools.partial(topk_tail_divergence, k=k)
        entries.insert(0, ("topk_tail.cu", kernel, False))
        entries.append(("Liger JSD, full vocabulary", liger_jsd, True))
    return entries


def head_products(hs, ws, ht, wt, k):
    """The three matrix products that no method can avoid, in chunks."""
    for a, b in zip(hs.split(CHUNK), ht.split(CHUNK), strict=True):
        b @ wt.T
        (a @ ws.T) @ ws


def head_topk(hs, ws, ht, wt, k):
    """The same, the gradient written over the student's logits between them."""
    for a, b in zip(hs.split(CHUNK), ht.split(CHUNK), strict=True):
        z = (a @ ws.T).requires_grad_()
        value = topk_tail_divergence(z, b @ wt.T, k, inplace=GPU)
        (gradient,) = torch.autograd.grad(value.mean(), z)
        gradient @ ws


def head_liger(hs, ws, ht, wt, k):
    from liger_kernel.transformers import LigerFusedLinearJSD

    leaf = hs.detach().requires_grad_()
    LigerFusedLinearJSD()(leaf, ws, ht, wt, None).backward()


# ---------------------------------------------------------------------------------------------------------- the tables
def gradient_row(function, full, inputs, args, bandwidth) -> str:
    error = largest_error(function, full, *inputs[0], args.k)
    times, extra = measure(rotating(function, inputs), args.repeat)
    ms = statistics.median(times)
    tenth = len(times) // 10
    spread = f"{times[tenth]:.2f} - {times[-1 - tenth]:.2f}"
    useful = 3 * inputs[0][0].nbytes / (ms / 1000)  # bytes a second
    share = f"{100 * useful / bandwidth:.0f} %"
    return f"{ms:.2f} | {spread} | {useful / 1e9:,.1f} | {share} | {extra} | {error:.1e}"


def call_row(call, repeat) -> str:
    times, extra = measure(call, repeat)
    return f"{statistics.median(times):.2f} | {extra}"


def print_gap(z, y, k) -> None:
    """How far the Top-K divergence lies below the full one on 16 rows, and the bound that comes with it."""
    step = max(1, len(z) // 16)
    z = z[::step]
    y = y[::step]
    value, metrics = topk_tail_divergence(z, y, k, return_metrics=True)
    full, _ = reference.divergence(z.double(), y.double(), k=z.shape[1])
    bound = metrics["gap_bound"].mean()
    print(
        f"mean divergence: Top-K and tail {value.mean():.6f}, full vocabulary {full.mean():.6f}, "
        f"certified gap at most {bound:.6f}"
    )


def logits_table(args, dtype) -> None:
    inputs = [make_logits(args.rows, args.vocab, dtype, seed) for seed in range(3)]
    z, y = inputs[0]
    bandwidth = copy_bandwidth()
    floor = 1000 * 3 * z.nbytes / bandwidth
    print(f"copy bandwidth {bandwidth / 1e9:,.0f} GB/s; floor {floor:.2f} ms")
    print(f"N = {args.rows}, V = {args.vocab:,}, K = {args.k}, {args.dtype}")
    print_gap(z, y, args.k)

    print(
        "\n| forward and backward | ms (median) | p10 - p90 | useful GB/s | share | extra MiB | error |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, function, full in candidates(args.k):
        row = attempt(gradient_row, function, full, inputs, args, bandwidth)
        print(f"| {name} | {row} |", flush=True)
    parts = {
        "topk_tail_divergence, forward only": lambda: topk_tail_divergence(z, y, args.k),
        "torch.topk of both, nothing else": lambda: (z.topk(args.k), y.topk(args.k)),
    }
    print("\n| a part of it | ms (median) | extra MiB |")
    print("|---|---|---|")
    for name, call in parts.items():
        print(f"| {name} | {attempt(call_row, call, args.repeat)} |", flush=True)


def heads_table(args, dtype) -> None:
    like = {"dtype": dtype, "device": DEVICE}
    student_head = 0.05 * torch.randn(args.vocab, args.hidden, **like)
    teacher_head = 0.05 * torch.randn(args.vocab, args.hidden, **like)
    student = torch.randn(args.rows, args.hidden, **like)
    teacher = torch.randn(args.rows, args.hidden, **like)
    entries = {
        "head products alone": head_products,
        "topk_tail_divergence on chunks of the heads' products": head_topk,
    }
    if GPU:
        entries["Liger fused linear JSD, full vocabulary"] = head_liger
    print(
        f"\n| from hidden states, H = {args.hidden}, student's head frozen | ms (median) | extra MiB |"
    )
    print("|---|---|---|")
    for name, function in entries.items():
        call = functools.partial(function, student, student_head, teacher, teacher_head, args.k)
        print(f"| {name} | {attempt(call_row, call, max(3, args.repeat // 5))} |", flush=True)


def print_resources(architecture) -> None:
    command = [kernels.find_nvcc(), *kernels.NVCC_FLAGS, f"-arch={architecture}"]
    command += ["-Xptxas", "-v", "-o", os.devnull, str(kernels.SOURCE)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    print(run.stderr)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=8192 if GPU else 64)
    parser.add_argument("--vocab", type=int, default=151_936 if GPU else 32_000)
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16" if GPU else "float32"
    )
    parser.add_argument(
        "--hidden", type=int, default=2048 if GPU else 128, help="width of the second table's heads"
    )
    parser.add_argument("--repeat", type=int, default=50 if GPU else 5)
    parser.add_argument(
        "--resources",
        metavar="ARCH",
        help="print what each kernel uses on this architecture, and end",
    )
    args = parser.parse_args()
    if args.resources:
        print_resources(args.resources)
        return
    if GPU:
        p = torch.cuda.get_device_properties(0)
        chip = f"{p.name}, {p.multi_processor_count} SMs, L2 {p.L2_cache_size >> 20} MiB"
        print(f"{chip}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    else:
        print(
            f"No CUDA device: the plain-PyTorch reference on {torch.get_num_threads()} CPU threads."
        )
        print("These are no figures of the kernel.")
    dtype = getattr(torch, args.dtype)
    logits_table(args, dtype)
    heads_table(args, dtype)


if __name__ == "__main__":
    main()
