"""kernels/topk_tail.cu against float64, on the CPU wherever pytest runs and on a GPU where there is one."""

import functools
import itertools
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import kernels
from kernels import reference, topk_tail_divergence
from kernels.reference import KINDS, OUTSIDE, SUPPORTS

import pytest
import torch
from kernel_cases import adversarial, build_for_cpu, compare, ordinary, run, stable_top_k

DTYPES = (torch.float32, torch.bfloat16)
pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None, reason="g++ compiles the kernel for the CPU"
)
GPU = pytest.param(
    "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
)


@pytest.fixture(scope="module")
def cpu_library(tmp_path_factory):
    """A function that gives the CPU's build, made when it is first asked for: on a GPU nothing may need it."""
    folder = tmp_path_factory.mktemp("kernel")
    return functools.cache(lambda: build_for_cpu(kernels.SOURCE, folder / "topk_tail.so"))


@pytest.fixture(params=["cpu", GPU])
def device(request):
    return request.param


@pytest.fixture
def lib(device, cpu_library):
    # torch.empty is filled with NaN, so that a forgotten element shows
    previous = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_flush_denormal(True)  # as nvcc's -ftz=true does
    yield cpu_library() if device == "cpu" else kernels.library(torch.device("cuda"))
    torch.set_flush_denormal(False)
    torch.use_deterministic_algorithms(previous)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_supports_and_outsides(lib, device, dtype, kind):
    z, y = ordinary(6, 5003, dtype=dtype, device=device)
    generator = torch.Generator().manual_seed(0)
    given = torch.randint(-1, 5003, (6, 80), generator=generator).to(
        device
    )  # with repetitions and gaps
    for support, outside, beta in itertools.product(
        SUPPORTS, OUTSIDE, (0.5, 0.1) if kind == "jsd" else (0.5,)
    ):
        options = {"kind": kind, "beta": beta, "support": support, "outside": outside}
        if support == "given":
            options["given"] = given
        compare(lib, z, y, k=50, label=f"{support} {outside} {beta}", **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "n, v, k",
    [(1, 32_000, 100), (3, 151_936, 100), (2, 152_064, 1024), (2, 32_000, 1024), (4, 1003, 1), (3, 1003, 1002),
     (3, 1000, 1000), (5, 7, 3), (2, 1, 1), (2, 2, 1), (3, 513, 512), (2, 40_000, 257)],
)  # fmt: skip
def test_shapes(lib, device, dtype, n, v, k):
    z, y = ordinary(n, v, seed=v, dtype=dtype, device=device)
    for kind in KINDS if v < 40_000 else ("jsd",):
        compare(lib, z, y, k=k, kind=kind, label=kind)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_offsets_and_shared_vocabularies(lib, device, dtype):
    for width, offset in ((5008, 0), (5008, 8), (5001, 0), (5011, 3)):  # aligned rows and others
        z, y = (
            x[:, offset : offset + 4993] for x in ordinary(4, width, dtype=dtype, device=device)
        )
        compare(lib, z, y, k=50, label=f"stride {width}, offset {offset}")
    z, y = ordinary(4, 5000, dtype=dtype, device=device)
    for valid in (4999, 4992, 64):
        compare(lib, z, y, k=50, valid_vocab=valid, label=f"valid_vocab {valid}")
    compare(lib, z, y[:, :4000].contiguous(), k=50, label="a smaller teacher")
    compare(lib, z[:, :4000].contiguous(), y, k=50, label="a larger teacher")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", adversarial(20_000))
def test_adversarial_rows(lib, device, dtype, name):
    v = 20_000
    z, y = (x[None].to(device, dtype) for x in adversarial(v)[name])
    for k in (1, 100, 1024):
        for kind in KINDS if not y.isinf().any() else ("jsd", "forward_kl"):
            compare(lib, z, y, k=k, kind=kind, label=f"{kind}, k = {k}")
        compare(lib, z, y, k=k, outside="renormalised", valid_vocab=v - 1, label=f"k = {k}, cut")
        compare(lib, y, z, k=k, label=f"swapped, k = {k}")
        if not y.isinf().any():
            # with the teacher's support alone nothing of its tail is taken back, or computed once more
            compare(
                lib,
                z,
                y,
                k=k,
                kind="reverse_kl",
                support="teacher",
                label=f"the teacher's support, k = {k}",
            )


def test_impossible_tokens(lib, device):
    z, y = ordinary(3, 5000, device=device)
    z[:, y[0].argmax()] = -torch.inf
    _, _, index, gradient = run(lib, z, y, kind="forward_kl")
    value = run(lib, z, y, kind="forward_kl")[0]
    exact = dict(kind="forward_kl", support="given", given=index.long())
    assert value.isinf().tolist() == [True, False, False] or value.isinf().all()
    slope = reference.gradient(z.double(), y.double(), **exact)
    assert ((gradient - slope).norm(dim=-1) < 1e-5 * slope.norm(dim=-1)).all()
    z[:, 100:] = -torch.inf  # no tail but the teacher's: the floor of forward KL
    options = {"kind": "forward_kl", "support": "given"}
    value, metrics, index, _ = run(
        lib, z, y, given=torch.arange(100, device=device).repeat(3, 1), **options
    )
    wanted, exact_metrics = reference.divergence(
        z.double(), y.double(), given=index.long(), **options
    )
    assert (
        metrics["tail_floored"].tolist()
        == [1, 1, 1]
        == exact_metrics["tail_floored"].int().tolist()
    )
    torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=0)


def test_rows_without_a_distribution_are_nan_and_alone(lib, device):
    clean, y = ordinary(9, 5000, device=device)
    z, teacher = clean.clone(), y.clone()
    z[1, 3], z[2, 4999], z[3], z[4, 0] = torch.nan, torch.inf, -torch.inf, torch.nan
    z[8] = torch.tensor(torch.nan).copysign(torch.tensor(-1.0))
    teacher[6, 77] = torch.nan
    bad = [False, True, True, True, True, False, True, False, True]
    for support in SUPPORTS:
        options = {"support": support}
        if support == "given":
            options["given"] = torch.arange(50, device=device).repeat(9, 1)
        value, metrics, _, gradient = run(lib, z, teacher, **options)
        good, _, _, good_gradient = run(lib, clean, y, **options)
        assert (
            (metrics["bad"] > 0).tolist()
            == value.isnan().tolist()
            == gradient.isnan().all(-1).tolist()
            == bad
        )
        keep = torch.tensor(bad, device=device).logical_not()
        assert torch.equal(value[keep], good[keep]) and torch.equal(
            gradient[keep], good_gradient[keep]
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_upstream_in_place_and_twice(lib, device, dtype):
    z, y = ordinary(5, 5003, dtype=dtype, device=device)
    upstream = torch.tensor([1.0, -0.25, 0.0, 1e-3, torch.nan], device=device)
    once, twice = run(lib, z, y, upstream), run(lib, z, y, upstream)
    results = [(value, *metrics.values(), *rest) for value, metrics, *rest in (once, twice)]
    for a, b in zip(*results, strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    plain = run(lib, z, y)[3].double()
    tolerance = 8e-3 if dtype == torch.bfloat16 else 1e-5
    for i in (0, 1, 3):
        assert (once[3][i].double() - upstream[i] * plain[i]).norm() <= tolerance * (
            upstream[i] * plain[i]
        ).norm()
    assert (once[3][2] == 0).all() and once[3][4].isnan().all()
    wide = torch.full((5, 5008), 7.0, dtype=dtype, device=device)
    wide[:, :5003] = z
    apart = run(lib, wide[:, :5003], y, upstream)[3]
    in_place = run(lib, wide[:, :5003], y, upstream, inplace=True)[3]
    assert (
        torch.equal(in_place.nan_to_num(7.0), apart.nan_to_num(7.0))
        and (wide[:, 5003:] == 7.0).all()
    )


def test_metrics(lib, device):
    z, y = ordinary(6, 5000, device=device)
    value, metrics, _, _ = run(lib, z, y, k=50)
    wanted, exact = reference.divergence(z.double(), y.double(), k=50)
    for name in ("student_tail", "teacher_tail", "overlap", "gap_bound"):
        torch.testing.assert_close(metrics[name].double(), exact[name], rtol=1e-5, atol=1e-12)
    full = reference.divergence(z.double(), y.double(), k=5000)[0]
    assert (full - value <= metrics["gap_bound"] + 1e-7).all() and (full >= value - 1e-7).all()
    shared = [
        len(a & b) / 50 for a, b in zip(stable_top_k(z, 50), stable_top_k(y, 50), strict=True)
    ]
    torch.testing.assert_close(metrics["overlap"].cpu(), torch.tensor(shared))
    assert (metrics["bad"] == 0).all() and (metrics["tail_floored"] == 0).all()
    assert run(lib, z, y, support="student")[1]["overlap"].isnan().all()
    assert run(lib, z, y, kind="forward_kl")[1]["gap_bound"].isinf().all()


def test_a_support_without_mass(lib, device):
    """Renormalised: nothing to divide by where nothing is listed, and a mass too small for a float64 where it is."""
    z, y = ordinary(2, 5000, device=device)
    nothing = torch.full((2, 8), -1, device=device)
    value, metrics, _, gradient = run(
        lib, z, y, support="given", outside="renormalised", given=nothing
    )
    assert (value == 0).all() and (gradient == 0).all() and (metrics["bad"] == 0).all()
    z[:, :10] = -3000.0 + torch.arange(10, device=device)
    compare(
        lib,
        z,
        y,
        support="given",
        outside="renormalised",
        given=torch.arange(10, device=device).repeat(2, 1),
    )


def test_no_rows(lib, device):
    z, y = ordinary(1, 100, device=device)
    value, metrics, index, gradient = run(lib, z[:0], y[:0], k=5)
    assert value.shape == (0,) and gradient.shape == (0, 100)


# -------------------------------------------------------------------------------------------------------- the operator
@pytest.fixture(scope="module")
def operator(cpu_library):
    """The operator with the CPU's build behind it, registered once: autograd, fake tensors and compile as on a GPU."""
    original = kernels.library
    kernels.library = lambda device: cpu_library() if device.type == "cpu" else original(device)
    for op in (kernels._forward, kernels._backward, kernels._backward_inplace):
        op.register_kernel("cpu")(op._init_fn)
    yield kernels.fused
    kernels.library = original


def arguments(z, y, k=20, kind="jsd", support="union", given=None, inplace=False):
    return z, y, k, kind, 0.5, support, "tail", min(z.shape[1], y.shape[1]), given, inplace


def test_operator_differentiates(operator, device):
    z, y = ordinary(5, 1001, device=device)
    weights = torch.linspace(-1, 2, 5, device=device)
    leaf, exact = z.clone().requires_grad_(), z.double().requires_grad_()
    value, metrics = operator(*arguments(leaf, y))
    (weights * value).sum().backward()
    wanted = reference.divergence(exact, y.double(), 20)[0]
    (weights * wanted).sum().backward()
    torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-4, atol=1e-8)
    assert not any(x.requires_grad for x in metrics.values())
    given = torch.arange(30, device=device).repeat(5, 1)
    repeated = torch.cat([given, given], dim=1)  # a token that is listed twice counts once
    values = [operator(*arguments(z, y, support="given", given=x))[0] for x in (given, repeated)]
    assert torch.equal(*values)


def test_operator_in_place(operator, device):
    z, y = ordinary(5, 1001, device=device)
    hidden, head = (
        torch.randn(5, 8, device=device, requires_grad=True),
        torch.randn(8, 1001, device=device),
    )
    gradients = []
    for inplace in (False, True):
        logits = hidden @ head
        value, _ = operator(*arguments(logits, y, inplace=inplace))
        kept = logits.detach().clone()
        gradients.append(torch.autograd.grad(value.sum(), hidden)[0])
        assert torch.equal(logits.detach(), kept) == (not inplace)
    assert torch.equal(*gradients)


def test_operator_passes_torchs_own_checks(operator, device):
    z, y = ordinary(3, 300, device=device)
    given = torch.arange(10, device=device).repeat(3, 1)
    ops = torch.ops.cleanopd
    torch.library.opcheck(ops.topk_tail, arguments(z.clone().requires_grad_(), y))
    # the overlap of a given support is NaN, which equals nothing
    without_equality = ("test_schema", "test_faketensor", "test_autograd_registration")
    args = arguments(z.bfloat16(), y.bfloat16(), support="given", given=given)
    torch.library.opcheck(ops.topk_tail, args, test_utils=without_equality)
    value, _, *state = ops.topk_tail(*arguments(z, y))
    torch.library.opcheck(ops.topk_tail_backward, (torch.ones_like(value), z, 300, *state))
    torch.library.opcheck(ops.topk_tail_backward_, (torch.ones_like(value), z.clone(), 300, *state))


def test_operator_compiles(operator, device):
    z, y = ordinary(4, 500, device=device)

    def loss(z, y):
        return (operator(*arguments(2.0 * z, y))[0] * torch.arange(4, device=device)).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    gradients = []
    for function in (loss, compiled):
        leaf = z.clone().requires_grad_()
        function(leaf, y).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_call_on_another_stream_and_in_a_graph():
    """What a user calls, against float64 on the CPU; then on a stream of its own, and replayed from a graph."""
    z, y = ordinary(5, 5000)
    leaf = z.double().requires_grad_()
    wanted, wanted_metrics = topk_tail_divergence(leaf, y.double(), return_metrics=True)
    wanted.sum().backward()

    student, teacher = z.cuda().requires_grad_(), y.cuda()

    def step():
        value, metrics = topk_tail_divergence(student, teacher, return_metrics=True)
        (gradient,) = torch.autograd.grad(value.sum(), student)
        return value.detach(), gradient, metrics

    value, gradient, metrics = step()
    torch.testing.assert_close(value.double().cpu(), wanted.detach(), rtol=1e-5, atol=1e-8)
    error = (gradient.double().cpu() - leaf.grad).norm(dim=-1)
    assert (error <= 1e-5 * leaf.grad.norm(dim=-1)).all()
    assert metrics.keys() == wanted_metrics.keys()
    for name, x in metrics.items():
        assert x.dtype == (torch.bool if name in ("tail_floored", "bad") else torch.float32)
        torch.testing.assert_close(
            x.double().cpu(), wanted_metrics[name].double(), rtol=1e-5, atol=1e-12
        )

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        aside = step()  # also the warm-up that a capture wants
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    for again in (aside, captured):
        assert torch.equal(again[0], value) and torch.equal(again[1], gradient)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_more_than_two_to_the_31_elements():
    n = 2**31 // 151_936 + 2
    z = torch.zeros(n, 151_936, dtype=torch.bfloat16, device="cuda")
    z[-1, ::7], z[-1, 5] = 1.0, 9.0
    last, y = z[-1:].clone(), z.flip(0)[:1].expand(n, -1).roll(1, dims=1)
    leaf = z.requires_grad_()
    d = topk_tail_divergence(leaf, y, inplace=True)
    gradient = torch.autograd.grad(d.sum(), leaf)[0][-1:]
    exact = last.double().cpu(), y[:1].double().cpu()
    torch.testing.assert_close(
        d[-1:].double().cpu(), reference.divergence(*exact)[0], rtol=1e-5, atol=1e-8
    )
    slope = reference.gradient(*exact)
    assert (gradient.double().cpu() - slope).norm() < 4e-3 * slope.norm()


# --------------------------------------------------------------------------------------------------------- wrong input
def test_wrong_input():
    z, y = ordinary(3, 50)
    given = torch.zeros(3, 4, dtype=torch.int64)
    wrong = [
        (ValueError, "one of jsd", dict(kind="js")),
        (ValueError, "one of union", dict(support="both")),
        (ValueError, "one of tail", dict(outside="none")),
        (ValueError, "beta=0", dict(beta=0)),
        (ValueError, "beta=1.0", dict(beta=1.0)),
        (ValueError, "k=0", dict(k=0)),
        (ValueError, "k=51", dict(k=51)),
        (
            ValueError,
            "k=1025",
            dict(k=1025, student_logits=torch.zeros(3, 2000), teacher_logits=torch.zeros(3, 2000)),
        ),
        (ValueError, "k=5", dict(k=5, valid_vocab=4)),
        (ValueError, "valid_vocab=51", dict(valid_vocab=51)),
        (ValueError, "valid_vocab=0", dict(valid_vocab=0)),
        (ValueError, "need one another", dict(support="given")),
        (ValueError, "need one another", dict(given=given)),
        (ValueError, "int64", dict(support="given", given=given.int())),
        (ValueError, r"\[2, 4\]", dict(support="given", given=given[:2])),
        (ValueError, "token id 50", dict(support="given", given=given + 50)),
        (
            ValueError,
            "must be .rows, vocabulary",
            dict(student_logits=z[None], teacher_logits=y[None]),
        ),
        (ValueError, "3 rows and teacher_logits 2", dict(teacher_logits=y[:2])),
        (ValueError, "contiguous", dict(student_logits=torch.zeros(50, 3).T)),
        (ValueError, "meta", dict(teacher_logits=y.to("meta"))),
        (TypeError, "bfloat16", dict(teacher_logits=y.bfloat16())),
        (TypeError, "int64", dict(student_logits=z.long())),
        (ValueError, "share memory", dict(student_logits=z[:1].expand(3, -1), inplace=True)),
    ]
    for error, message, change in wrong:
        with pytest.raises(error, match=message):
            topk_tail_divergence(**{"student_logits": z, "teacher_logits": y, "k": 5} | change)


def test_the_choice_of_the_implementation(monkeypatch):
    z, y = ordinary(3, 50)
    monkeypatch.setenv("KERNELS", "fast")
    with pytest.raises(ValueError, match="KERNELS=fast"):
        topk_tail_divergence(z, y, k=5)
    monkeypatch.setenv("KERNELS", "reference")
    assert topk_tail_divergence(z, y, k=5).shape == (3,)


def test_finding_nvcc(monkeypatch, tmp_path):
    for name in ("PATH", "CUDA_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="(?s)CUDA toolkit.*pip install.*KERNELS=reference"):
        kernels.find_nvcc()
    with pytest.raises(RuntimeError, match="8.0 or newer"):
        kernels._library((7, 5))

    class Nvidia:  # as pip's nvidia-cuda-nvcc lies there
        submodule_search_locations = [str(tmp_path / "nvidia")]

    nvcc = tmp_path / "nvidia" / "cu13" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("")
    nvcc.chmod(0o755)
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: Nvidia)
    assert kernels.find_nvcc() == str(nvcc)


# ----------------------------------------------------------------------------------------------------------- compiling
def nvcc_or_skip():
    try:
        return kernels.find_nvcc()
    except RuntimeError:
        pytest.skip("no nvcc")


@pytest.mark.parametrize("architecture", [pytest.param("sm_80", marks=pytest.mark.slow), "sm_90"])
def test_compiles_without_warnings_or_spills(architecture, tmp_path):
    strict = ["-Xcompiler", "-Wall,-Wextra", "-Xptxas", "-v", f"-arch={architecture}"]
    command = [
        nvcc_or_skip(),
        *kernels.NVCC_FLAGS,
        *strict,
        "-o",
        tmp_path / "x.so",
        kernels.SOURCE,
    ]
    report = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = (report.stdout + report.stderr).splitlines()
    assert not [line for line in lines if "warning" in line.lower()]
    spills = [line for line in lines if "spill" in line]
    assert len(spills) >= 14 and all(
        "0 bytes spill stores, 0 bytes spill loads" in line for line in spills
    )


@pytest.mark.slow
def test_two_ranks_compile_at_once(tmp_path):
    nvcc = nvcc_or_skip()
    with ThreadPoolExecutor() as pool:
        cards = ["sm_80", "sm_80", "sm_90"]
        one, again, other = pool.map(lambda card: kernels.build(nvcc, card, tmp_path), cards)
    assert one == again != other and set(tmp_path.iterdir()) == {one, other}
    before = one.stat().st_mtime_ns
    kernels.load(kernels.build(nvcc, "sm_80", tmp_path))
    assert one.stat().st_mtime_ns == before  # not compiled a second time


def test_a_failed_compilation_leaves_nothing(tmp_path, monkeypatch):
    nvcc = nvcc_or_skip()
    broken = tmp_path / "broken.cu"
    broken.write_text("this is not C++")
    monkeypatch.setattr(kernels, "SOURCE", broken)
    with pytest.raises(RuntimeError, match="KERNELS=reference"):
        kernels.build(nvcc, "sm_80", tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_the_folder_alone(tmp_path):
    """Copied into another project, with torch and nothing else of this one."""
    theirs = tmp_path / "their_losses"
    shutil.copytree(
        Path(kernels.__file__).parent, theirs, ignore=shutil.ignore_patterns("__pycache__")
    )
    code = """if True:
        import torch, sys
        from their_losses import topk_tail_divergence
        z = torch.randn(3, 50, requires_grad=True)
        topk_tail_divergence(z, torch.randn(3, 50), k=5).sum().backward()
        assert z.grad.abs().sum() > 0
        assert not {'transformers', 'numpy.testing', 'common'} & set(sys.modules)
    """
    subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, check=True, env={**os.environ, "PYTHONPATH": ""}
    )


def test_agrees_with_trl():
    trl = pytest.importorskip(
        "trl.experimental.iw_opd.iw_opd_trainer", reason="trl is not installed"
    )
    z, y = ordinary(6, 2000)
    for k in (1, 20, 100):
        options = {"beta": 0.5, "reduction": "sum", "top_k": k, "add_tail": True}
        theirs = trl.IWOPDTrainer.generalized_jsd_loss(z[None], y[None], **options)
        torch.testing.assert_close(topk_tail_divergence(z, y, k=k).sum(), theirs, rtol=1e-4, atol=0)


@pytest.mark.slow
def test_the_bench_runs():
    small = "--rows 4 --vocab 500 --k 20 --repeat 1 --hidden 16".split()
    command = [sys.executable, "-m", "kernels.bench", *small]
    table = subprocess.run(
        command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True
    ).stdout
    assert torch.cuda.is_available() or "No CUDA device" in table
    assert not torch.cuda.is_available() or "topk_tail.cu" in table
    assert "out of memory" not in table and "torch.compile failed" not in table
    for entry in ("copy bandwidth", "reference.py", "eager, full vocabulary", "torch.compile", "torch.topk",
                  "head products alone", "on chunks of the heads' products"):  # fmt: skip
        assert entry in table
