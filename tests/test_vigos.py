"""ViGOS's pieces on worked examples: spans, who marks which token, clips, contexts, and the real script."""

import json
import math

import pytest
import torch
from conftest import flags, run_script

import common
import toy
import vigos

ROW = {"problem": "<image>How many?", "images": ["picture"], "answer": "47", "solution": "40 + 7 = 47.", "reference": "40 + 7 = 47."}


def pieces(text: str) -> list[str]:
    return text.replace(" ", "\u0120").split("|")


@pytest.mark.parametrize("text, description, reasoning", [
    ("A| 3|.|</|description|>|<think>|3|</|think|>|\\|boxed|{|3|}|END", (0, 3), (7, 16)),
    ("A| 3.</|description|><|think>|3</|think|>|\\boxed|{3|}.|END", (0, 1), (5, 11)),  # a token that holds a part of a tag belongs to no span
    ("A|</description>| hm |<think>|3|</think>|so |\\boxed{|{|3|}|}|\\boxed{4}|END", (0, 1), (4, 12)),  # the first box, braces matched
])  # fmt: skip
def test_spans(text, description, reasoning):
    found = vigos.find_spans(pieces(text))
    assert (found.description, found.reasoning) == (description, reasoning)


@pytest.mark.parametrize("text", [
    "", "A|<think>|3|</think>|\\boxed{3}", "A|</description>|3|</think>|\\boxed{3}", "A|</description>|<think>|3|\\boxed{3}", "A|</description>|<think>|3|</think>|3",
    " |</description>|<think>|3|</think>|\\boxed{3}", "A|</description>|<think>| |</think>|\\boxed{3}", "A|</description>|<think>|3|</think>|\\boxed{ }",
    "A|</description>|<think>|3|</think>|\\boxed{3", "<think>|3|</think>|A|</description>|\\boxed{3}",
])  # fmt: skip
def test_answers_out_of_form(text):
    assert vigos.find_spans(pieces(text) if text else []) is None


def test_spans_of_real_tokens(tiny, tiny_rows):
    tokenizer = common.Processor(str(tiny / "student")).tokenizer
    for i in range(12):
        text = toy.respond(tiny_rows[i], "see-first").removeprefix("<description>")
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        spans = vigos.find_spans(tokenizer.convert_ids_to_tokens(ids))
        d, r = (tokenizer.decode(ids[first:last]) for first, last in (spans.description, spans.reasoning))
        whole_d, whole_r = text.split("</description>")[0], text.split("<think>")[1]
        assert whole_d.startswith(d) and len(whole_d) - len(d) <= 1  # this tokenizer has a token ".</", which is a part of the tag,
        assert whole_r.endswith(r) and len(whole_r) - len(r) <= 3  # and one ">The"


def test_who_marks_what():
    response = common.Response(list(range(9)), [0.0] * 9, True)
    good = vigos.Sample(ROW, {}, response, spans=vigos.Spans((0, 3), (5, 8)))
    bad = vigos.Sample(ROW, {}, response)
    assert vigos.marked(good, vigos.Args()) == {"perception": (0, 3), "reasoning": (5, 8)}
    assert vigos.marked(good, vigos.Args(mark_end=True)) == {"perception": (0, 3), "reasoning": (5, 9)}
    assert vigos.marked(bad, vigos.Args()) == {"reference": (0, 9)} == vigos.marked(good, vigos.Args(method="opsd"))


def test_who_sees_what(tiny, tiny_rows):
    processor = common.Processor(str(tiny / "student"))
    row = tiny_rows[0] | {"reference": tiny_rows[0]["solution"]}
    texts = {name: processor.render(context(row)) for name, context in vigos.contexts(vigos.Args()).items()}
    question = row["problem"].replace("<image>", "")
    assert [row["solution"] in texts[name] for name in ("question", "perception", "reasoning", "reference")] == [False, False, True, True]
    assert [question in texts[name] for name in ("question", "perception", "reasoning", "reference")] == [True, False, True, True]
    assert all(text.count("<|image_pad|>") == 1 and text.endswith("assistant\n<description>") for text in texts.values())
    assert vigos.FORMAT == toy.SEE_FIRST  # what the embedded default's models are trained with
    sliced = vigos.contexts(vigos.Args(reasoning_prefix="slice"))["reasoning"](row)
    assert processor.render(sliced).endswith("assistant\n<think>")


def test_a_clipped_token_has_no_gradient():
    z, y = torch.randn(40, 30, requires_grad=True), torch.randn(40, 30)
    reverse = torch.arange(40) % 2 == 1
    plain, limited = (dict(zip(vigos.TERMS, vigos.terms(z, y, torch.zeros(40, dtype=torch.long), reverse, vigos.Args(clip=c)))) for c in (0.0, 0.8))
    for name, kl in (("forward", common.kl(y.log_softmax(-1), z.log_softmax(-1))), ("reverse", common.kl(z.log_softmax(-1), y.log_softmax(-1)))):
        torch.testing.assert_close(plain[name], kl)
        torch.testing.assert_close(limited[name], kl.clamp(max=0.8))
        norm = torch.autograd.grad(limited[name].sum(), z, retain_graph=True)[0].norm(dim=-1)
        assert 0 < (kl > 0.8).sum() < 40 and ((norm == 0) == (kl > 0.8)).all()
        mine = reverse if name == "reverse" else ~reverse
        assert torch.equal(limited["clipped"][mine] > 0, (kl > 0.8)[mine])
    entries = dict(zip(vigos.TERMS, vigos.terms(z, y, torch.zeros(40, dtype=torch.long), reverse, vigos.Args(clip=0.1, clip_entries=True))))
    q, p = y.softmax(-1), z.softmax(-1)
    torch.testing.assert_close(entries["forward"], (q * (q / p).log()).clamp(max=0.1).sum(-1))


@pytest.mark.parametrize("changes", [{}, {"reasoning_prefix": "slice", "mark_end": ""}, {"method": "opsd", "divergence": "top_k", "support": 20},
                                     {"method": "opsd", "divergence": "sampled"}], ids=str)  # fmt: skip
def test_real_runs(tiny, tmp_path, changes):
    argv = [part for part in flags(tiny, tmp_path / "run", teacher=None, **changes) if part]
    result = run_script("vigos.py", *argv)
    assert result.returncode == 0, result.stderr
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"reference", "tokens_reference", "clipped_reference", "out_of_form", "acc@1", "entropy"} <= set(last)
    assert last["out_of_form"] == 1 and last["tokens_reference"] == 1 and math.isfinite(last["reference"])  # an untrained model
    if not changes:
        two = run_script("vigos.py", *[x if x != str(tmp_path / "run") else str(tmp_path / "two") for x in argv], torchrun=2)
        assert two.returncode == 0, two.stderr


@pytest.mark.parametrize("message, changes", [
    ("must not be negative", {"clip": -1}), ("--divergence would have no effect", {"divergence": "jsd"}), ("--teacher would have no effect", {"teacher": "x"}),
    ("--fallback would have no effect", {"method": "opsd", "fallback": "forward_kl"}), ("--updates above 1", {"updates": 2}),
    ("--column-reference", {"column_reference": "nothing"}), ("--support would have no effect", {"support": 5}),
])  # fmt: skip
def test_bad_settings(tiny, tmp_path, message, changes):
    result = run_script("vigos.py", *flags(tiny, tmp_path / "run", **{"teacher": None} | changes))
    assert result.returncode != 0 and message in result.stderr + result.stdout, result.stderr
    assert not (tmp_path / "run").exists()
