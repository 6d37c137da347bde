"""Would the tests of topk_tail.cu notice? Each mutation deletes a barrier, a tail term, a fix-up or a check.

A mutated source is compiled for the CPU and put through a few of test_kernel.py's comparisons; a wrong number, a race,
a read out of bounds or a deadlock counts as found. `pytest -m slow tests/test_kernel_mutations.py -rA` lists them with
what found them.
"""

import re
import shutil
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import kernels

import pytest
import torch
from kernel_cases import adversarial, build_for_cpu, compare, ordinary, run

SOURCE = kernels.SOURCE.read_text()
BARRIERS = [m.start() for m in re.finditer(r"__syncthreads\(\);", SOURCE)]

# what -> (text in the source, what stands there instead)
MUTATIONS = {
    "no tail in the divergence": ("value += tail.term;", ""),
    "no tail in the mean slope": ("abar += tail.slope;", ""),
    "no gradient outside the support": ("outer = p_tail > 0 ? tail.slope / p_tail - abar : 0;", ""),
    "the tail's slope is not centred": ("tail.slope / p_tail - abar", "tail.slope / p_tail"),
    "the support's slopes are not centred": ("log_qs[i] - exp(log_ps[i]) * abar", "log_qs[i]"),
    "no fix-up of the support": (
        "if (v >= 0) store_one(weight * at_support",
        "if (v < -1) store_one(weight * at_support",
    ),
    "the fix-up is not weighted": ("store_one(weight * at_support", "store_one(at_support"),
    "the fix-up reaches duplicates": ("if (v >= 0) store_one", "if (v >= -1) store_one"),
    "the teacher's winners stay in the student's tail": (
        "if (!in_first) p_extra += exp(log_p);",
        "",
    ),
    "the student's winners stay in the teacher's tail": (
        "if (is_union && !in_second) q_extra += exp(log_q);",
        "",
    ),
    "a token of both sets counts twice": ("if (i >= a && in_first) v = -1;", "if (false) v = -1;"),
    "the tail is a difference without digits": (
        "p_tail < 0.1 * zs[LOW] || q_tail < 0.1 * ys[LOW]",
        "false",
    ),
    "losers of the list are not in the low sum": (
        "(i < k ? high : low) += x;",
        "if (i < k) high += x;",
    ),
    "losers outside the list are not in the low sum": ("others += __expf(x[i] - row_max);", ""),
    "clean groups are not in the low sum": ("low += dirty >> r & 1 ? 0.0f : sum[r];", ""),
    "dirty groups count twice": ("low += dirty >> r & 1 ? 0.0f : sum[r];", "low += sum[r];"),
    "no fallback when the list overflows": (
        "if (count > LIST) {",
        "if (count > LIST) count = LIST;\n        if (false) {",
    ),
    "the list overflows": ("if (slot < LIST) list[slot] = key;", "list[slot] = key;"),
    "ties rank by the larger index": (
        "bits | 0x80000000u) << 32 | index_key(index)",
        "bits | 0x80000000u) << 32 | (unsigned)index",
    ),
    "ties do not count as members": ("value == kth_value && index <= kth_index", "false"),
    "negative zero is smaller than zero": ("value == 0.0f ? 0.0f : value", "value"),
    "negative logits are ordered as positive ones": (
        "bits & 0x80000000u ? ~bits : bits | 0x80000000u",
        "bits | 0x80000000u",
    ),
    "the last columns are forgotten": ("if (r == 0 && t < valid % W) {", "if (false) {"),
    "the last columns are forgotten in the sums": (
        "    if (t < valid % W) {\n        const float x[1]",
        "    if (false) {\n        const float x[1]",
    ),
    "the last columns have no gradient": (
        "        if (t < valid % W) {\n            const int i",
        "        if (false) {\n            const int i",
    ),
    "the last columns are not zeroed": (
        "if (t < valid % W) store_one(0.0f, out, units * W + t);",
        "",
    ),
    "columns beyond the vocabulary are not zeroed": (
        "for (int i = valid + t; i < vocab; i += THREADS) store_one(0.0f, out, i);",
        "",
    ),
    "sums are not rescaled to a new maximum": ("sum *= __expf(finite(peak) - finite(top));", ""),
    "-inf is no finite reference": ("return fmaxf(peak, -FLT_MAX);", "return peak;"),
    "half a warp is summed": (
        "for (int o = 16; o; o >>= 1) x += __shfl_xor_sync",
        "for (int o = 8; o; o >>= 1) x += __shfl_xor_sync",
    ),
    "rows without a distribution pass": ("if (!(total > 0 && total < INFINITY)) {", "if (false) {"),
    "the raw forward KL keeps its linear terms": (
        "if (kind == FORWARD_KL) value += q_inside - p_inside;",
        "",
    ),
    "the raw reverse KL keeps its linear terms": (
        "if (kind == REVERSE_KL) value += p_inside - q_inside;",
        "",
    ),
    "renormalised is not": ("if (outside == RENORMALISED) {", "if (false) {"),
    "the floor has a gradient": ("if (floored) tail.slope = 0;", ""),
    "a tail too small for float32 is lost": ("if (low < 1e-25) {", "if (false) {"),
    "units without winners are looked for winners": ("make_key(top, -1) < threshold", "true"),
    "the upstream's sign is lost": ("* sign_of(weight)", "* fabsf(sign_of(weight))"),
    "unaligned rows are read as aligned": (
        "const auto kernel = aligned<T>(logits, stride) ?",
        "const auto kernel = true ?",
    ),
    "unaligned results are written as aligned": (
        "const bool wide = aligned<T>(logits, stride) && aligned<T>(result, result_stride);",
        "const bool wide = true;",
    ),
}


DIFFICULT = (
    "student constant",
    "10,000 ties at the boundary",
    "-inf at first",
    "both almost certain, of one token",
    "disjoint",
    "negative zero",
    "winners in one group",
    "both almost certain, of two tokens",
    "a gap of 100",
)


def examine(lib):
    """A selection of test_kernel.py in some seconds; raises where something is wrong."""
    torch.set_flush_denormal(True)
    rows = adversarial(20_000)

    def pair(name, dtype):
        return [x[None].to(dtype) for x in rows[name]]

    given = torch.randint(-1, 5003, (4, 80), generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        z, y = ordinary(4, 5003, dtype=dtype)
        for kind in kernels.KINDS:
            for outside in kernels.OUTSIDE:
                compare(lib, z, y, k=50, kind=kind, outside=outside)
            compare(lib, z, y, kind=kind, support="given", given=given)
        compare(lib, z, y, k=50, outside="renormalised", support="student")
        compare(lib, z[:, :5000].contiguous(), y, k=50, valid_vocab=4990)
        compare(lib, *ordinary(2, 1000, dtype=dtype), k=1000)
        compare(lib, *ordinary(2, 1003, dtype=dtype), k=900)
        for name in DIFFICULT:
            compare(lib, *pair(name, dtype))
            compare(lib, *pair(name, dtype), k=1, outside="renormalised", valid_vocab=19_999)
        compare(lib, *pair("a gap of 100", dtype), kind="reverse_kl", support="teacher")
        compare(lib, *pair("the teacher's winner is all that the student's leaves", dtype), k=1)
        assert (
            run(lib, *(x[:, :5000].contiguous() for x in (z, y)), inplace=True, k=50)[3]
            .isfinite()
            .all()
        )
    z, y = ordinary(3, 5000)
    z[0, 7], z[1] = torch.nan, torch.tensor(torch.nan).copysign(torch.tensor(-1.0))
    assert run(lib, z, y)[0].isnan().tolist() == [True, True, False]
    z, y = ordinary(3, 5003)
    upstream = torch.tensor([1.0, -2.0, 0.0])
    plain, weighted = run(lib, z, y)[3], run(lib, z, y, upstream)[3]
    torch.testing.assert_close(weighted, upstream[:, None] * plain, rtol=1e-4, atol=1e-9)
    z[:, 100:] = -torch.inf
    compare(lib, z, y, kind="forward_kl", support="given", given=torch.arange(100).repeat(3, 1))


def found(mutated, folder):
    """What gave the mutation away, or None."""
    folder.mkdir()
    source = folder / "mutated.cu"
    source.write_text(mutated)
    lib = build_for_cpu(source, folder / "mutated.so", warnings=False)
    try:
        examine(lib)
    except (AssertionError, RuntimeError) as error:
        return str(error).strip().splitlines()[0]
    return None


def cases():
    for i, at in enumerate(BARRIERS):
        yield (
            f"barrier {i + 1} of {len(BARRIERS)}",
            SOURCE[:at] + SOURCE[at + len("__syncthreads();") :],
        )
    for name, (old, new) in MUTATIONS.items():
        assert SOURCE.count(old) == 1, (
            f"{name}: the source has changed, and this mutation with it: {old}"
        )
        yield name, SOURCE.replace(old, new)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ compiles the kernel for the CPU")
def test_every_mutation_is_found(tmp_path):
    examine(build_for_cpu(kernels.SOURCE, tmp_path / "unchanged.so"))
    named = list(cases())
    sources = [source for _, source in named]
    folders = [tmp_path / str(i) for i in range(len(named))]
    spawn = get_context("spawn")
    with ProcessPoolExecutor(
        2, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        results = list(pool.map(found, sources, folders))
    missed = []
    for (name, _), result in zip(named, results, strict=True):
        print(f"{name}: {result or 'NOT FOUND'}")
        if not result:
            missed.append(name)
    assert len(named) > 40 and not missed, missed
