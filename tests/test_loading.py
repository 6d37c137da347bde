"""A node's memory holds one copy of a model while it is loaded, however many ranks there are."""

import json

import common
from tools import toy

import pytest
import torch
from conftest import run_script

SIZES = [
    pytest.param(256, 8, 20_000, 2, id="20 million on 2", marks=pytest.mark.slow),
    pytest.param(1024, 46, 20_000, 2, id="600 million on 2", marks=pytest.mark.slow),
    pytest.param(1024, 46, 20_000, 4, id="600 million on 4", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("hidden, layers, vocab, ranks", SIZES)
def test_one_copy_in_all(tiny, tmp_path, hidden, layers, vocab, ranks):
    """At most 1.3 copies besides the shards; and every rank's shards are the checkpoint's weights."""
    processor = common.Processor(str(tiny / "student"))
    model = toy.make_model("qwen3_vl", processor.tokenizer, hidden, layers, 64, vocab)
    model.to(
        torch.bfloat16
    )  # as checkpoints come, so that float32 is a copy and not the file itself
    expected = {name: p.detach().double().sum().item() for name, p in model.named_parameters()}
    model.save_pretrained(tmp_path / "model")
    del model
    result = run_script(
        "tests/loading.py", tmp_path / "model", tmp_path / "found.json", torchrun=ranks
    )
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    print(f"peak {found['peak'] / found['copy']:.2f} copies of {found['copy'] / 4:,.0f} parameters")
    for name, value in expected.items():
        assert found["sums"][name] == pytest.approx(value, rel=1e-9, abs=1e-9), name
    slack = 30e6 * ranks  # of processes that have just begun
    assert found["peak"] <= (1.3 + 1) * found["copy"] + slack, found["peak"] / found["copy"]
