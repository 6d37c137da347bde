"""Worker of test_distributed.py and the test_*_exact.py: gradients of one update on eight fixed rollouts, by layout.

    python tests/gradients.py TINY OUT LAYOUTS

LAYOUTS: a JSON list of [shares, tokens of a micro-batch, chunk, method, settings]. Shares like [8, 0] say how many of
the rollouts each rank holds; settings are set in the method's Args. gradients_METHOD.py beside this file holds
`gradient(tiny, processor, rows, shares, micro, chunk, settings)`.
"""

import importlib
import json
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
import common  # noqa: E402

CORRECT = [True, False, False, False, True, True, False, True]  # of the rollouts, in groups of two


def fixed_samples(processor, rows, contexts: dict, tokens_of=None) -> list[common.Sample]:
    """Eight responses of 3 to 12 tokens, drawn once for all layouts. tokens_of: fn(i) -> other token ids, or None."""
    generator = torch.Generator().manual_seed(5)
    samples = []
    for i in range(8):
        n = int(torch.randint(3, 13, (), generator=generator))
        ids = torch.randint(0, processor.vocab - 20, (n,), generator=generator).tolist()
        ids = tokens_of and tokens_of(i) or ids
        row = rows[i] | ({"hint": ""} if i == 3 else {}) | {"reference": rows[i]["solution"]}
        views = {name: context(row) for name, context in contexts.items()}
        prompts = {name: processor.encode(view) for name, view in views.items() if view is not None}
        response = common.Response(ids, True, "", [-1.0] * len(ids))
        samples.append(common.Sample(row, prompts, response, CORRECT[i], 0.0, (-1.0) ** i))
    return samples


def fixed_rows(tiny, processor) -> list[dict]:
    """The tiny data's rows with all of their columns."""
    args = common.Args(data=f"{tiny}/rows.parquet")
    args.column_solution, args.column_hint, args.column_text_problem = (
        "solution",
        "hint",
        "text_problem",
    )
    data = common.load_rows(args, processor, {}, "problem images answer solution hint text_problem")
    return [data[i] for i in range(8)]


def stale(log_p, ids):
    """Log-probs of an older policy, for updates after the first: they move every ratio, some past its clip."""
    return log_p + 0.1 * (ids % 7 - 3)


def start(args, processor, teacher: str | None, load=common.Run.load) -> common.Run:
    """A run with its models, that is not going to sample or take steps."""
    args.engine = "none"
    common.ENGINES["none"] = lambda *_: None
    run = common.Run.__new__(common.Run)
    run.args, run.settings, run.own, run.step, run.total = args, {}, {}, 1, 1
    load(run, processor, teacher)
    return run


def mine(samples: list, shares: list[int]) -> list:
    """This rank's share."""
    first = sum(shares[: common.rank()])
    return samples[first : first + shares[common.rank()]]


def result(run) -> dict:
    named = run.student.named_parameters()
    whole = {name: common.full_tensor(p.grad).clone() for name, p in named if p.grad is not None}
    return {"gradient": whole, "norm": common.grad_norm(run.student).item()}


def main() -> None:
    tiny, out, layouts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    common.start_ranks(common.Args())
    processor = common.Processor(f"{tiny}/student")
    rows = fixed_rows(tiny, processor)
    results = []
    for *layout, method, settings in layouts:
        worker = importlib.import_module(f"gradients_{method}")
        results.append(worker.gradient(tiny, processor, rows, *layout, settings))
    if common.rank() == 0:
        torch.save(results, out)


if __name__ == "__main__":
    common.launch(main)
