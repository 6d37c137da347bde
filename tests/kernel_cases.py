"""Running topk_tail.cu from tests, on a GPU or compiled with g++ against cuda_on_cpu.h; the rows it is tried on."""

import subprocess
from pathlib import Path

import kernels
from kernels import reference

import torch

HERE = Path(__file__).parent
WARNINGS = ("-Wall", "-Wextra", "-Wno-unknown-pragmas")
GXX = ("g++", "-std=c++17", "-O1", "-fPIC", "-shared", *WARNINGS, "-I", str(HERE), "-x", "c++")


def build_for_cpu(source: Path, target: Path, warnings=True):
    """The library of a .cu source for the CPU.

    Raises CalledProcessError where it does not compile, RuntimeError at a warning.
    """
    run = subprocess.run(
        [*GXX, str(source), "-o", str(target)], capture_output=True, text=True, check=True
    )
    if run.stderr and warnings:
        raise RuntimeError(run.stderr)
    return kernels.load(target)


def run(lib, z, y, upstream=None, inplace=False, **options):
    """-> divergence [N], metrics {name: [N]}, the support's token ids [N, E], gradient [N, V]."""
    choices = {"k": 100, "kind": "jsd", "beta": 0.5, "support": "union", "outside": "tail"}
    names = {*choices, "valid_vocab", "given"}
    assert names >= set(options), options
    chosen = [options.get(name, default) for name, default in choices.items()]
    given = options.get("given")
    valid = kernels._check(z, y, *chosen, options.get("valid_vocab"), given)
    value, metrics, index, at_support, dense = kernels.launch_forward(
        lib, z, y, *chosen, valid, given
    )
    gradient = z if inplace else torch.full(z.shape, torch.nan, dtype=z.dtype, device=z.device)
    upstream = torch.ones(len(z), device=z.device) if upstream is None else upstream
    kernels.launch_backward(lib, upstream, z, valid, index, at_support, dense, gradient)
    return value, dict(zip(kernels.METRICS, metrics.unbind(1), strict=True)), index, gradient


def stable_top_k(x, k):
    """The k largest by (value descending, index ascending), as sets."""
    order = torch.sort(x.float(), dim=-1, descending=True, stable=True).indices
    return [set(row) for row in order[:, :k].tolist()]


def compare(lib, z, y, k=100, kind="jsd", outside="tail", support="union", label="", **options):
    """Holds one call against float64 mathematics on the kernel's own support, and the support against a stable sort."""
    valid = options.get("valid_vocab") or min(z.shape[1], y.shape[1])
    value, metrics, index, gradient = run(
        lib, z, y, k=k, kind=kind, outside=outside, support=support, **options
    )
    support_sets = [{v for v in row if v >= 0} for row in index.tolist()]
    if support != "given":
        students, teachers = stable_top_k(z[:, :valid], k), stable_top_k(y[:, :valid], k)
        union = [a | b for a, b in zip(students, teachers, strict=True)]
        wanted = {"union": union, "student": students, "teacher": teachers}[support]
        assert support_sets == wanted, f"{label}: support"
    beta = options.get("beta", 0.5)
    exact = dict(
        kind=kind,
        outside=outside,
        beta=beta,
        valid_vocab=valid,
        support="given",
        given=index.long(),
    )
    wanted, exact_metrics = reference.divergence(z.double(), y.double(), **exact)
    slope = reference.gradient(z.double(), y.double(), **exact)

    close = (value - wanted).abs() <= 1e-5 * wanted.abs() + 1e-8
    assert ((value == wanted) | close).all(), (
        f"{label}: D {value.tolist()} instead of {wanted.tolist()}"
    )
    for name in ("student_tail", "teacher_tail"):
        got, want = metrics[name].double(), exact_metrics[name]
        close = (got - want).abs() <= 1e-5 * want + 1e-20
        assert close.all(), f"{label}: {name} {got.tolist()} instead of {want.tolist()}"
    tolerance = 4e-3 if z.dtype == torch.bfloat16 else 1e-5
    norm, error = slope.norm(dim=-1), (gradient.double() - slope).norm(dim=-1)
    # Where student and teacher nearly agree, the float32 log-sum-exps limit the difference of their log-probabilities
    # to some 1e-8.
    limit = torch.where(
        wanted.abs() < 1e-6, max(tolerance, 1e-3) * norm + 1e-7, tolerance * norm + 1e-12
    )
    assert (error <= limit).all(), f"{label}: gradient off by {(error / norm).tolist()}"
    assert (gradient[:, valid:] == 0).all(), f"{label}: gradient beyond the shared vocabulary"
    if z.dtype == torch.float32 and outside != "raw":
        sums, sizes = gradient.double().sum(-1).abs(), gradient.double().abs().sum(-1)
        assert (sums <= 1e-5 * sizes + 1e-12).all(), f"{label}: row sum"


def ordinary(n, v, seed=0, dtype=torch.float32, device="cpu"):
    """Rows as language models have them: a broad bulk, a decaying head, and peaks from flat to all but certain."""
    generator = torch.Generator().manual_seed(seed)
    z = 2.2 * torch.randn(n, v, generator=generator)
    head = torch.linspace(6, 0, min(v, 400))
    for i in range(n):
        z[i, torch.randperm(v, generator=generator)[: len(head)]] += head
        z[i, torch.randint(v, (1,), generator=generator)] += (
            torch.linspace(0, 22, n)[i] if n > 1 else 4.0
        )
    y = 0.9 * z + torch.randn(n, v, generator=generator)
    return z.to(device, dtype), y.to(device, dtype)


def nearly_certain(noise, other):
    """The part of `adversarial` in which one token has nearly all of the mass."""
    v = len(noise)
    rows = {}
    peak = noise.clone()
    peak[17] = 18.5 + noise.logsumexp(-1)  # 1 - p_max = 1e-8
    rows["student almost certain"] = (peak, other)
    rows["teacher almost certain"] = (other, peak)
    rows["both almost certain, of one token"] = (peak, peak + 0.1 * other)
    elsewhere = other.clone()
    elsewhere[v - 3] = 40.0
    rows["both almost certain, of two tokens"] = (peak, elsewhere)
    second = torch.full((v,), -25.0)
    second[3], second[v - 3] = 0.0, -3.0
    rows["the teacher's winner is all that the student's leaves"] = (second, elsewhere)
    # What is left beside such a peak is too little for float32 exponentials, or for float64 ones of the row.
    for gap in (88.0, 100.0, 300.0):
        far = noise.clone()
        far[7] = gap
        rows[f"a gap of {gap:.0f}"] = (other, far)
    return rows


def adversarial(v, seed=0):
    """name -> (student row, teacher row) [v], float32: what selections and sums get wrong. v >= 20,000."""
    generator = torch.Generator().manual_seed(seed)
    noise, other = torch.randn(2, v, generator=generator)
    rows = {
        "student constant": (torch.zeros(v), other),
        "both constant": (torch.ones(v), torch.full((v,), -2.0)),
    }
    ties = torch.where(torch.randperm(v, generator=generator) < 10_000, 1.5, -noise.abs())
    ties[torch.randperm(v, generator=generator)[:50]] = 3.0
    rows["10,000 ties at the boundary"] = (ties, other)
    rows["ascending"] = (torch.linspace(-9, 9, v), other)
    rows["descending"] = (torch.linspace(9, -9, v), other)
    contiguous = noise.clone()
    contiguous[7000:7200] += 12
    rows["winners side by side"] = (contiguous, other)
    group = noise.clone()
    for width in (4, 8):  # float32 and bfloat16 units; 512 threads, 8 groups each
        units = torch.arange(v) // width
        group[(units % 512 == 5) & (units // 512 % 8 == 3)] += 12
    rows["winners in one group"] = (group, other)
    late = noise.clone()
    late[:5000] = -torch.inf
    rows["-inf at first"] = (late, other)
    single, lonely = torch.full((v,), -torch.inf), noise.clone()
    single[v // 2] = 3.0
    lonely[v // 2] += 1.0
    rows["one finite logit"] = (single, lonely)
    rows["masked with the lowest float"] = (
        torch.where(noise > 2.5, noise, torch.finfo(torch.float32).min),
        noise,
    )
    rows |= nearly_certain(noise, other)
    rows["teacher equals student"] = (noise, noise + 3.0)
    rows["nearly equal"] = (3 * noise, 3 * noise + 1e-3 * other)
    rows["disjoint"] = (
        torch.where(noise > 0, 9 + noise, noise - 9),
        torch.where(noise > 0, noise - 9, 9 + noise),
    )
    rows["far from zero"] = (noise + 1000.0, other - 1000.0)
    rows["large"] = (100 * noise, 80 * noise + 20 * other)
    rows["negative zero"] = (torch.where(noise > 1, 0.0, torch.where(noise > 0, -0.0, -1.0)), other)
    return rows
