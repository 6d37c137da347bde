"""Ten steps of every method: the losses of golden.json, which a change of the mathematics would move.

golden.json holds what these runs gave when it was written. Another machine rounds otherwise, so they agree to 1e-3.
After a change that is meant to move them, the failing test prints the new ones. And twice (slow), with the same bits.
"""

import json
from pathlib import Path

import pytest
from conftest import flags, in_tiny, run_script

TEXT = dict(teacher="text-only", data="text.parquet", column_text="text_problem")
RUNS = {  # method -> (what is compared, settings)
    "vgs.py": ("std", dict()),
    "ptdpo.py": ("ptd", dict(teacher=None, group=2)),
    "vold.py": ("kl_wrong", dict(stage="rl", mask="none", group=2, **TEXT)),
    "vigos.py": (
        "reference",
        dict(teacher=None, column_reference="solution", conflict_data="", method="opsd"),
    ),
    "reopold.py": ("log_ratio", dict(updates=1)),
}
GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text())


@pytest.mark.parametrize(
    "runs", [1, pytest.param(2, marks=pytest.mark.slow)], ids=["once", "twice"]
)
@pytest.mark.parametrize("script", RUNS)
def test_ten_steps(script, runs, tiny, tmp_path):
    loss, settings = RUNS[script]
    settings = in_tiny(tiny, settings) | dict(eval_data="", max_steps=10, lr=1e-3, warmup=0)
    found = []
    for name in ("one", "two")[:runs]:
        result = run_script(script, *flags(tiny, tmp_path / name, **settings))
        assert result.returncode == 0, result.stderr
        folder = tmp_path / name / ("rl" if script == "vold.py" else "")
        samples = [sample["ids"] for sample in read(folder / "samples.jsonl")]
        weights = (folder / "final" / "model.safetensors").read_bytes()
        found.append((read(folder / "metrics.jsonl"), samples, weights))
    assert found[0] == found[-1]
    values = [line[loss] for line in found[0][0] if line["step"] > 0]
    golden = pytest.approx(GOLDEN[script], rel=1e-3, abs=1e-5)
    assert values == golden, json.dumps({script: values})


def read(file: Path) -> list[dict]:
    """Without the seconds."""
    records = [json.loads(line) for line in file.read_text().split("\n")[:-1]]
    return [{key: x for key, x in record.items() if "seconds" not in key} for record in records]
