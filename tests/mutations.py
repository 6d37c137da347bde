"""Small faults in the methods and common.py, one at a time, and the tests that have to find them.

    python tests/mutations.py [--jobs 2] [--only TEXT]       the better part of an hour; exit status 1 if one survives

A fault names a file, a function, a rewrite of its syntax tree and which of the places that the rewrite fits. No local
name is mentioned, so that a renamed variable breaks nothing; test_readme.py checks that every fault still fits.
"""

import argparse
import ast
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLIPPED = {
    ast.Gt: ast.LtE,
    ast.Lt: ast.GtE,
    ast.GtE: ast.Lt,
    ast.LtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
MODULES = ("common", "torch", "math", "dist")  # what stands before their dots is no value
ARITHMETIC = {
    "add": (ast.Add, ast.Sub),
    "subtract": (ast.Sub, ast.Add),
    "multiply": (ast.Mult, ast.Div),
    "divide": (ast.Div, ast.Mult),
}


def called(node) -> str:
    """The last part of the name of what a call calls: common.kl(...) -> kl."""
    if not isinstance(node, ast.Call):
        return ""
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def rewrite(how: str, node):
    """The node as the fault makes it, or None where the rewrite does not fit.

    add, subtract, multiply, divide   the opposite operator        flip    the opposite comparison
    minus                             without its minus            and     or for and
    not                               without its not              number  the constant plus 1
    swap NAME                         a call of NAME with its first two arguments exchanged
    drop NAME                         x for x.NAME(...), and for NAME(x, ...)
    """
    kind, _, name = how.partition(" ")
    if kind in ARITHMETIC and isinstance(node, ast.BinOp):
        old, new = ARITHMETIC[kind]
        return ast.BinOp(node.left, new(), node.right) if isinstance(node.op, old) else None
    if kind == "flip" and isinstance(node, ast.Compare) and type(node.ops[0]) in FLIPPED:
        return ast.Compare(node.left, [FLIPPED[type(node.ops[0])]()], node.comparators)
    if kind == "minus" and isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return node.operand
    if kind == "not" and isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return node.operand
    if kind == "and" and isinstance(node, ast.BoolOp) and isinstance(node.op, ast.And):
        return ast.BoolOp(ast.Or(), node.values)
    if kind == "number" and isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return ast.Constant(node.value + 1)
    if kind == "swap" and called(node) == name and len(node.args) > 1:
        return ast.Call(node.func, [node.args[1], node.args[0], *node.args[2:]], node.keywords)
    if kind == "drop" and called(node) == name:
        is_method = isinstance(node.func, ast.Attribute)
        if is_method and getattr(node.func.value, "id", "") not in MODULES:
            return node.func.value
        return node.args[0]
    return None


class Rewriter(ast.NodeTransformer):
    """Rewrites the nth place, in the order of the source, that fits."""

    def __init__(self, how: str, nth: int):
        self.how, self.nth, self.seen = how, nth, 0

    def visit(self, node):
        if not isinstance(node, ast.AST):
            return node
        new = rewrite(self.how, node)
        if new is not None:
            self.seen += 1
            if self.seen == self.nth:
                return new
        return self.generic_visit(node)


def mutated(source: str, function: str, how: str, nth: int) -> str:
    """The source with the fault in it. Raises LookupError where it does not fit."""
    tree = ast.parse(source)
    *owner, name = function.split(".")
    scope = tree
    for part in owner:
        scope = next(n for n in scope.body if isinstance(n, ast.ClassDef) and n.name == part)
    places = [n for n in scope.body if isinstance(n, ast.FunctionDef) and n.name == name]
    if len(places) != 1:
        raise LookupError(f"there is no function {function}")
    (place,) = places
    worker = Rewriter(how, nth)
    place.body = [worker.visit(statement) for statement in place.body]
    if worker.seen < nth:
        raise LookupError(
            f"{function} has {worker.seen} places for {how!r}, and none is number {nth}"
        )
    return ast.unparse(ast.fix_missing_locations(tree))


# (file, function, rewrite, which place, tests that have to find it)
FAULTS = []


def faults(file: str, tests: str, table: dict[str, str]):
    """table: function -> rewrites, each with its place: "swap kl 1, add 2"."""
    for function, listed in table.items():
        for one in listed.split(", "):
            how, _, nth = one.rpartition(" ")
            FAULTS.append((file, function, how, int(nth), tests.split()))


faults(
    "vgs.py",
    "test_vgs_equations.py test_vgs_exact.py test_rollouts.py test_distributed.py",
    {
        "contexts": "flip 2, and 1",
        "visual_target": "add 1, subtract 1, drop detach 1",
        "divergences": "swap kl 1, swap kl 2, swap kl 3",
        "visual_dependency": "swap kl 1",
        "steering": "flip 1, flip 2, flip 3, flip 4, divide 1, multiply 1, add 1",
        "terms": "flip 1, swap kl 1, swap clipped_surrogate 1",
        "rollout": "flip 1",
        "weigh": "subtract 1, minus 1, divide 2, multiply 1, multiply 2, drop all_sum 1",
        "measure_eta": "divide 1, flip 1, flip 2",
    },
)
faults(
    "ptdpo.py",
    "test_ptdpo.py test_ptdpo_exact.py test_distributed.py",
    {
        "tutored": "flip 1, and 1",
        "well_formed": "and 1, not 1",
        "route": "flip 1, not 1, divide 1",
        "terms": "flip 1, swap clipped_surrogate 1, swap k3 1",
        "reward": "add 1, multiply 1, multiply 2",
        "informative": "flip 1",
        "weigh": "minus 1, subtract 1, flip 1, divide 3, multiply 1, multiply 3, drop all_sum 1, drop clamp 1",
    },
)
faults(
    "vold.py",
    "test_vold.py test_vold_exact.py test_distributed.py",
    {
        "distance": "subtract 1, divide 1, swap k3 1",
        "distilled": "subtract 1, flip 1, flip 2",
        "beta": "subtract 1, subtract 2, multiply 1",
        "terms": "flip 1, swap clipped_surrogate 1",
        "weigh": "minus 1, multiply 1, multiply 2, divide 2, divide 3, flip 1, flip 2, drop all_sum 1",
        "weigh_imitation": "minus 1, divide 1, drop all_sum 1",
    },
)
faults(
    "vigos.py",
    "test_vigos.py test_vigos_exact.py test_distributed.py",
    {
        "find_spans": "flip 1, flip 2, flip 3, flip 4, add 1",
        "shares": "subtract 1, multiply 1",
        "jsd": "add 1, divide 1",
        "limited": "flip 1, drop clamp 1, drop clamp 2",
        "terms": "flip 1, flip 2, flip 3",
        "marks": "flip 1, and 1",
        "weigh": "flip 1, multiply 1, multiply 2, divide 1, drop all_sum 1",
    },
)
faults(
    "reopold.py",
    "test_reopold.py test_reopold_exact.py test_turns.py test_distributed.py",
    {
        "lowest_reward": "subtract 1, divide 1",
        "reward_of": "subtract 1, drop detach 1, drop clamp 1",
        "terms": "flip 1, swap kl 1, swap kl 2, swap clipped_surrogate 1",
        "explores": "subtract 1, divide 1, flip 1, flip 2, and 1",
        "weigh": "subtract 1, minus 1, flip 2, flip 3, drop all_sum 1",
        "image_of": "subtract 1",
        "crop_image": "multiply 1",
        "join": "add 1, add 2",
        "Turns.extend": "subtract 1, and 1",
    },
)
faults(
    "common.py",
    "test_common.py test_rollouts.py test_vgs_exact.py test_distributed.py",
    {
        "group_advantages": "subtract 1, divide 1, drop double 1",
        "clipped_surrogate": "drop minimum 1, subtract 1, add 1, drop clamp 1, flip 1",
        "token_means": "multiply 1, divide 1",
        "Processor.batch": "subtract 1, add 1",
        "Processor.ids_of": "flip 2",
        "Sampler.__call__": "flip 1",
        "Run.backward": "multiply 1",
        "Run.draw": "multiply 1",
        "Run.update": "not 1, subtract 1",
        "make_optimizer": "flip 1, flip 2",
    },
)
faults(
    "kernels/vocab.py",
    "test_common.py test_vgs_exact.py test_distributed.py",
    {
        "kl": "subtract 1, multiply 1, drop masked_fill 1, drop exp 1",
        "entropy": "minus 1",
        "_VocabLoss.forward": "multiply 1",
    },
)
faults(
    "common.py",
    "test_ptdpo_exact.py test_vigos.py",
    {
        "k3": "subtract 1, subtract 2",
        "sequence_old": "subtract 1, divide 1, subtract 2",
    },
)
faults(
    "common.py",
    "test_resume.py test_folders.py test_stops.py",
    {
        "Run.begin": "flip 1, flip 2",
        "Run.save": "flip 2, flip 3",
        "Run.check_same": "and 1, flip 1",
        "Run.steps": "flip 7, not 1",
        "Run.need_room": "flip 1",
        "on_signal": "not 1",
    },
)
faults("common.py", "test_untrusted.py", {"open_images": "flip 1, not 1"})
faults("common.py", "test_evaluate.py test_rows.py", {"Run.evaluate": "flip 1, divide 1"})
faults(
    "tools/scores.py",
    "test_scores.py",
    {
        "pass_at": "subtract 1, subtract 2, divide 1",
        "majority": "flip 1, flip 2, divide 1",
        "vote": "subtract 1",
        "mean": "multiply 1, divide 1, flip 1",
        "balanced": "divide 1",
        "of_samples": "divide 1, flip 1",
        "over_sets": "divide 1, flip 1",
    },
)
faults(
    "tools/rules.py",
    "test_scores.py",
    {
        "number_is_near": "subtract 1, flip 3",
        "counts_are_same": "not 1, flip 1",
        "anls": "subtract 1, divide 1, flip 1",
        "edit_distance": "flip 1, add 4",
    },
)
faults(
    "tools/benchmarks.py",
    "test_benchmarks.py",
    {
        "convert": "not 1",
        "hallusionbench": "flip 1, flip 2",
        "mathvista": "flip 1",
        "dynamath": "flip 1",
    },
)


def check(table):
    """Raises LookupError at the first fault that does not fit any more, ValueError at one that changes nothing."""
    sources = {file: (ROOT / file).read_text() for file, *_ in table}
    plain = {file: ast.unparse(ast.parse(source)) for file, source in sources.items()}
    for file, function, how, nth, _ in table:
        if mutated(sources[file], function, how, nth) == plain[file]:
            raise ValueError(f"{file}, {function}: {how} {nth} changes nothing")


def copy_of(root: Path, folder: Path) -> Path:
    skipped = shutil.ignore_patterns(".git", "runs", "__pycache__", "*.egg-info", ".*_cache")
    shutil.copytree(root, folder, ignore=skipped)
    return folder


def found_by(fault, folder: Path) -> str | None:
    """The test file that fails with the fault in it, or None."""
    file, function, how, nth, tests = fault
    source = (ROOT / file).read_text()
    (folder / file).write_text(mutated(source, function, how, nth))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    try:
        for test in tests:
            command = [sys.executable, "-m", "pytest", "-n", "0", "-x", "-q", f"tests/{test}"]
            done = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, timeout=1800
            )
            if done.returncode == 1:
                return test
            if done.returncode:
                raise RuntimeError(f"{test} cannot be run: {done.stdout.decode()[-500:]}")
    finally:
        (folder / file).write_text(source)
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", default="", help="faults whose line holds this text")
    args = parser.parse_args()
    check(FAULTS)
    chosen = [f for f in FAULTS if args.only in " ".join(map(str, f[:4]))]
    survivors = []
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(args.jobs) as pool:
        folders = [copy_of(ROOT, Path(scratch, str(i))) for i in range(args.jobs)]

        def one(fault):
            folder = folders.pop()
            try:
                test = found_by(fault, folder)
            finally:
                folders.append(folder)
            print(*fault[:4], "->", test or "SURVIVES", flush=True)
            return fault if test is None else None

        survivors = [fault for fault in pool.map(one, chosen) if fault]
    print(f"{len(chosen)} faults, {len(survivors)} of them not found")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
