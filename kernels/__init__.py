"""The Top-K-plus-tail divergence of a student and a teacher over a large vocabulary.

PTD-PO, arXiv 2606.07000, Eq. 13-17.

    from kernels import topk_tail_divergence
    divergence = topk_tail_divergence(student_logits, teacher_logits, k=100)       # [N, V], [N, V] -> [N]
    (weights * divergence).sum().backward()

`reference.py` says what is computed, in plain PyTorch; CPU tensors use it. CUDA tensors use `topk_tail.cu`, which is
compiled with nvcc when it is first called (some seconds; kept in CLEANOPD_CACHE or ~/.cache/cleanopd).
KERNELS=reference forces the reference. This folder needs torch and nothing else of this project: copy it whole.
"""

import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from . import reference
from .reference import KINDS, OUTSIDE, SUPPORTS

MAX_K = 1024  # as in topk_tail.cu, like the widths below
STATS = 5
DENSE = 3
METRICS = ("student_tail", "teacher_tail", "overlap", "gap_bound", "tail_floored", "bad")
NVCC_FLAGS = ("-O3", "-std=c++17", "-ftz=true", "-shared", "-Xcompiler", "-fPIC")


def topk_tail_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    k: int = 100,
    kind: str = "jsd",
    beta: float = 0.5,
    support: str = "union",
    outside: str = "tail",
    valid_vocab: int | None = None,
    given: Tensor | None = None,
    inplace: bool = False,
    return_metrics: bool = False,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """One divergence a row, differentiable in the student's logits; the teacher and the support are constants.

    student_logits  [N, V] float32 or bfloat16 (CPU: any floating dtype), rows contiguous, any stride between rows
    teacher_logits  [N, V'] same dtype and device; both are cut to the shared vocabulary, beyond which the student's
                    gradient is 0
    k               size of each Top-K set, 1 .. 1024
    kind            jsd: beta KL(teacher || M) + (1 - beta) KL(student || M), M = beta teacher + (1 - beta) student
                    forward_kl: KL(teacher || student)        reverse_kl: KL(student || teacher)
    beta            of jsd, strictly between 0 and 1 (the limits are the two KLs, scaled: choose them by kind)
    support         union of both Top-K sets, the student's, the teacher's, or given
    outside         tail: one bucket holds all other tokens
                    renormalised: they are left out and the rest sums to one
                    raw: they are left out, nothing is rescaled; the divergence can then be negative
    valid_vocab     cut the vocabulary here (padding columns); default: the smaller of the two
    given           [N, M] int64 token ids for support="given" (-1: none; k is not used), M <= 1024
    inplace         CUDA: the backward pass writes the gradient over student_logits; nobody may read them afterwards
    return_metrics  also a dict of [N] tensors without gradient:
                    student_tail, teacher_tail  the mass outside the support
                    overlap                     the share of one Top-K set that is in the other
                    gap_bound                   a proven bound of the full divergence minus this one (jsd with tail;
                                                inf otherwise)
                    tail_floored                whether forward KL met its floor of 1e-30
                    bad                         whether the row has no distribution

    Returns [N] float32 (float64 for float64 logits), in nats. A row that is no distribution (NaN, +inf, or -inf
    throughout, on either side) gives NaN, in its gradient too, and is marked in metrics["bad"]; other rows are not
    affected. A KL is +inf where its second distribution rules out (-inf) a token of the support that its first allows;
    reverse KL's gradient is then NaN.
    On CUDA, call it once before capturing a CUDA graph: the first call compiles.
    Raises ValueError or TypeError, naming the argument, on input that this cannot hold for.
    """
    valid = _check(
        student_logits, teacher_logits, k, kind, beta, support, outside, valid_vocab, given
    )
    rows, vocab = student_logits.shape
    if inplace and rows > 1 and student_logits.stride(0) < vocab:
        raise ValueError(
            "inplace=True, and the rows of student_logits share memory "
            f"(stride {student_logits.stride()}): call .contiguous()"
        )
    choice = os.environ.get("KERNELS", "")
    if choice not in ("", "reference"):
        raise ValueError(
            f"KERNELS={choice}: the only value it can have is 'reference' "
            "(unset it to use the CUDA kernel)"
        )
    options = (k, kind, beta, support, outside, valid, given)
    if student_logits.is_cuda and choice != "reference":
        value, metrics = fused(student_logits, teacher_logits, *options, inplace)
    else:
        value, metrics = reference.divergence(student_logits, teacher_logits, *options)
    if return_metrics:
        return value, metrics
    return value


# -------------------------------------------------------------------------------------------------------------- checks
def _check(student, teacher, k, kind, beta, support, outside, valid_vocab, given) -> int:
    """The vocabulary to use, or an error that names the argument."""
    _check_choice("kind", kind, KINDS)
    _check_choice("support", support, SUPPORTS)
    _check_choice("outside", outside, OUTSIDE)
    _check_logits("student_logits", student)
    _check_logits("teacher_logits", teacher)
    _check_pair(student, teacher)
    shared = min(student.shape[1], teacher.shape[1])
    valid = shared if valid_vocab is None else valid_vocab
    if not 1 <= valid <= shared:
        raise ValueError(
            f"valid_vocab={valid}: it must lie between 1 and {shared}, the columns that both logits have"
        )
    if kind == "jsd" and not 0 < beta < 1:
        raise ValueError(
            f"beta={beta}: it must lie strictly between 0 and 1; "
            "for a KL set kind='forward_kl' or 'reverse_kl'"
        )
    if (support == "given") != (given is not None):
        raise ValueError("given=[N, M] token ids and support='given' need one another")
    largest = min(MAX_K, valid)
    if given is not None:
        _check_given(given, student, valid)
    elif not 1 <= k <= largest:
        raise ValueError(
            f"k={k}: it must lie between 1 and {largest} (at most {MAX_K}, and at most the vocabulary)"
        )
    return valid


def _check_choice(name, value, allowed) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: one of {', '.join(allowed)}")


def _check_logits(name, logits) -> None:
    if logits.dim() != 2:
        raise ValueError(
            f"{name} has shape {list(logits.shape)}: "
            "it must be [rows, vocabulary]; flatten the leading dimensions"
        )
    if not logits.dtype.is_floating_point:
        raise TypeError(f"{name} is {logits.dtype}: it must be floating point")
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        raise ValueError(
            f"{name} has stride {logits.stride()}: its rows must be contiguous; call .contiguous()"
        )


def _check_pair(student, teacher) -> None:
    rows = student.shape[0]
    if teacher.shape[0] != rows:
        raise ValueError(
            f"student_logits has {rows} rows and teacher_logits {teacher.shape[0]}: one row a token, in both"
        )
    if student.device != teacher.device:
        raise ValueError(
            f"student_logits is on {student.device} and teacher_logits on {teacher.device}: move one of them"
        )
    if student.dtype != teacher.dtype:
        raise TypeError(
            f"student_logits is {student.dtype} and teacher_logits {teacher.dtype}: cast one of them"
        )
    if student.is_cuda and student.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(
            f"student_logits is {student.dtype}: "
            "the kernel has code for float32 and bfloat16; cast, or set KERNELS=reference"
        )


def _check_given(given, student, valid) -> None:
    rows = student.shape[0]
    fits = given.dim() == 2 and given.shape[0] == rows and 1 <= given.shape[1] <= MAX_K
    if given.dtype != torch.int64 or not fits:
        raise ValueError(
            f"given is {given.dtype} {list(given.shape)}: "
            f"it must be int64 [{rows}, M] with 1 <= M <= {MAX_K}"
        )
    if given.device != student.device:
        raise ValueError(
            f"given is on {given.device} and the logits on {student.device}: move one of them"
        )
    if given.is_cuda:
        torch._assert_async((given < valid).all())  # without waiting for the device
    elif given.numel() and given.max() >= valid:
        raise ValueError(
            f"given holds the token id {int(given.max())}: ids must be below {valid}, the shared vocabulary"
        )


# ------------------------------------------------------------------------------- the operator, for autograd and compile
def fused(*arguments) -> tuple[Tensor, dict[str, Tensor]]:
    """topk_tail.cu as a differentiable operator: D [N] and the metrics. Arguments as of `_forward`, after `_check`."""
    value, metrics, *_ = torch.ops.cleanopd.topk_tail(*arguments)
    named = dict(zip(METRICS, metrics.unbind(1), strict=True))
    named["tail_floored"] = named["tail_floored"] > 0
    named["bad"] = named["bad"] > 0
    return value, named


@torch.library.custom_op("cleanopd::topk_tail", mutates_args=(), device_types="cuda")
def _forward(
    student: Tensor,
    teacher: Tensor,
    k: int,
    kind: str,
    beta: float,
    support: str,
    outside: str,
    valid: int,
    given: Tensor | None,
    inplace: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    lib = library(student.device)
    return launch_forward(lib, student, teacher, k, kind, beta, support, outside, valid, given)


@_forward.register_fake
def _(student, teacher, k, kind, beta, support, outside, valid, given, inplace):
    return _outputs(student, k, support, given)


@torch.library.custom_op("cleanopd::topk_tail_backward", mutates_args=(), device_types="cuda")
def _backward(
    upstream: Tensor,
    student: Tensor,
    valid: int,
    index: Tensor,
    at_support: Tensor,
    dense: Tensor,
) -> Tensor:
    lib = library(student.device)
    result = torch.empty_like(student, memory_format=torch.contiguous_format)
    launch_backward(lib, upstream, student, valid, index, at_support, dense, result)
    return result


@_backward.register_fake
def _(upstream, student, valid, index, at_support, dense):
    return torch.empty_like(student, memory_format=torch.contiguous_format)


@torch.library.custom_op(
    "cleanopd::topk_tail_backward_", mutates_args=("student",), device_types="cuda"
)
def _backward_inplace(
    upstream: Tensor,
    student: Tensor,
    valid: int,
    index: Tensor,
    at_support: Tensor,
    dense: Tensor,
) -> None:
    lib = library(student.device)
    launch_backward(lib, upstream, student, valid, index, at_support, dense, student)


def _setup_context(ctx, inputs, output) -> None:
    student, *_, valid, _, inplace = inputs
    _, metrics, index, at_support, dense = output
    ctx.mark_non_differentiable(metrics, index, at_support, dense)
    ctx.save_for_backward(student, index, at_support, dense)
    ctx.valid = valid
    ctx.inplace = inplace


def _autograd(ctx, upstream, *_):
    student, *state = ctx.saved_tensors
    if ctx.inplace:
        gradient = student.detach()
        torch.ops.cleanopd.topk_tail_backward_(upstream, gradient, ctx.valid, *state)
    else:
        gradient = torch.ops.cleanopd.topk_tail_backward(upstream, student, ctx.valid, *state)
    return gradient, *[None] * 9  # for the other inputs


_forward.register_autograd(_autograd, setup_context=_setup_context)


# ----------------------------------------------------------------------------------------------------------- launching
def _outputs(
    student: Tensor, k: int, support: str, given: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Divergence [N], metrics [N, 6], the support's token ids [N, E] (-1: none), the gradient there, dense [N, 3]."""
    n = student.shape[0]
    entries = k
    if support == "union":
        entries = 2 * k
    elif given is not None:
        entries = given.shape[1]
    return (
        student.new_empty(n, dtype=torch.float32),
        student.new_empty(n, len(METRICS), dtype=torch.float32),
        student.new_empty(n, entries, dtype=torch.int32),
        student.new_empty(n, entries, dtype=torch.float32),
        student.new_empty(n, DENSE, dtype=torch.float64),
    )


def launch_forward(
    lib, student, teacher, k, kind, beta, support, outside, valid, given
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Runs row_stats and row_loss; the results of `_outputs`."""
    outputs = _outputs(student, k, support, given)
    n = student.shape[0]
    if given is not None:
        given = _once(given)
        k = given.shape[1]
    tops = student.new_empty(2, n, k, dtype=torch.int32)
    stats = student.new_empty(2, n, STATS, dtype=torch.float64)
    _launch(
        lib.topk_tail_forward,
        student,
        student.dtype == torch.bfloat16,
        student,
        student.stride(0),
        teacher,
        teacher.stride(0),
        n,
        valid,
        k,
        KINDS.index(kind),
        beta,
        SUPPORTS.index(support),
        OUTSIDE.index(outside),
        given,
        tops,
        stats,
        *outputs,
    )
    return outputs


def _once(given: Tensor) -> Tensor:
    """Each token id of a row once, as int32; -1 where it is repeated.

    >>> _once(torch.tensor([[7, 3, 7]]))
    tensor([[ 3,  7, -1]], dtype=torch.int32)
    """
    given = given.sort(-1).values
    repeated = given[:, 1:] == given[:, :-1]
    given[:, 1:].masked_fill_(repeated, -1)
    return given.int()


def launch_backward(lib, upstream, student, valid, index, at_support, dense, result) -> None:
    """Runs row_grad; result [N, V] may be student itself."""
    n, vocab = student.shape
    _launch(
        lib.topk_tail_backward,
        student,
        student.dtype == torch.bfloat16,
        upstream.float().contiguous(),
        student,
        student.stride(0),
        n,
        valid,
        vocab,
        dense,
        index,
        at_support,
        index.shape[1],
        result,
        result.stride(0),
    )


def _launch(function, like: Tensor, *arguments) -> None:
    if like.shape[0] == 0:
        return
    raw = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
    if like.is_cuda:
        with torch.cuda.device(like.device):
            status = function(*raw, torch.cuda.current_stream().cuda_stream)
    else:  # the tests' build for the CPU
        status = function(*raw, None)
    if status:
        raise RuntimeError(f"{function.__name__}: {function.text(status).decode()}")


# ----------------------------------------------------------------------------------------------------------- compiling
SOURCE = Path(__file__).with_name("topk_tail.cu")


def library(device: torch.device) -> ctypes.CDLL:
    """The kernels for this device's architecture, compiled if they are not in the cache."""
    return _library(torch.cuda.get_device_capability(device))


@functools.cache
def _library(capability: tuple[int, int]) -> ctypes.CDLL:
    if capability < (8, 0):
        raise RuntimeError(
            f"the kernel needs compute capability 8.0 or newer, this GPU has {capability}; "
            "set KERNELS=reference"
        )
    major, minor = capability
    return load(build(find_nvcc(), f"sm_{major}{minor}"))


def find_nvcc() -> str:
    """On PATH, under CUDA_HOME, or from NVIDIA's pip packages; an error that says how to get it otherwise."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    roots = [Path(home)]
    packages = importlib.util.find_spec("nvidia")
    if packages is not None:
        for folder in packages.submodule_search_locations:
            roots += sorted(Path(folder).glob("cu*"))
    nvcc = shutil.which("nvcc")
    for root in roots:
        nvcc = nvcc or shutil.which("nvcc", path=root / "bin")
    if nvcc is None:
        version = ".".join((torch.version.cuda or "13.0").split(".")[:2])
        raise RuntimeError(
            "nvcc was not found, and the CUDA kernel is compiled with it on first use. Either\n"
            f"  install the CUDA toolkit {version} and put nvcc on PATH or set CUDA_HOME, or (CUDA 13)\n"
            f"  pip install 'nvidia-cuda-nvcc=={version}.*' 'nvidia-cuda-cccl=={version}.*' "
            f"'nvidia-cuda-runtime=={version}.*', or\n"
            "  set KERNELS=reference to use the slower plain-PyTorch version."
        )
    return nvcc


def build(nvcc: str, architecture: str, cache: Path | None = None) -> Path:
    """Compiles topk_tail.cu unless this source, compiler and architecture already were.

    Safe when several ranks do it at once. Raises RuntimeError with the compiler's messages.
    """
    if cache is None:
        home = os.environ.get("CLEANOPD_CACHE") or Path.home() / ".cache" / "cleanopd"
        cache = Path(home) / "kernels"
    command = [nvcc, *NVCC_FLAGS, f"-arch={architecture}"]
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    identity = "\0".join([SOURCE.read_text(), version, platform.machine(), *command])
    key = hashlib.sha256(identity.encode()).hexdigest()[:16]
    target = cache / f"topk_tail-{architecture}-{key}.so"
    if target.exists():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(suffix=".so", dir=cache)
    os.close(handle)
    try:
        command += ["-o", unfinished, str(SOURCE)]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(
                f"nvcc could not compile {SOURCE}; set KERNELS=reference to go on without\n"
                f"{run.stdout}{run.stderr}"
            )
        os.chmod(unfinished, 0o755)
        os.replace(
            unfinished, target
        )  # whole or not at all; whoever comes second puts the same there
    finally:
        Path(unfinished).unlink(missing_ok=True)
    return target


def load(path: Path) -> ctypes.CDLL:
    """The shared library with its signatures."""
    lib = ctypes.CDLL(str(path))
    i, i64, f64, p = ctypes.c_int, ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
    logits = [
        i,
        p,
        i64,
        p,
        i64,
    ]  # bfloat16 or not, the student and its stride, the teacher and its stride
    sizes = [i64, i, i]  # rows, valid, k
    codes = [i, f64, i, i]  # kind, beta, support, outside
    buffers = [p] * 9  # given, scratch, outputs, the stream
    lib.topk_tail_forward.argtypes = logits + sizes + codes + buffers
    lib.topk_tail_backward.argtypes = [i, p, p, i64, i64, i, i, p, p, p, i, p, i64, p]
    lib.topk_tail_status_text.argtypes = [i]
    lib.topk_tail_status_text.restype = ctypes.c_char_p
    for function in (lib.topk_tail_forward, lib.topk_tail_backward):
        function.restype = i
        function.text = lib.topk_tail_status_text
    return lib
