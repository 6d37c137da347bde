"""ViGOS's pieces on worked examples: spans, who marks which token, clips, contexts, and the real script."""

import json
import math
import shutil

import datasets
import pytest
import torch
import transformers
from conftest import flags, run_script
from exact import read

import common
import toy
import vigos

ROW = {"problem": "<image>How many?", "images": ["picture"], "answer": "47", "solution": "40 + 7 = 47.", "reference": "40 + 7 = 47."}


def pieces(text: str) -> list[str]:
    return text.replace(" ", "\u0120").split("|")


# Responses as their tokens, parted by |; a blank stands for the space of a byte-level token. Then d and r, a as ranges of tokens; None: out of form.
RESPONSES = [
    ("A| 3|.|</description>|<think>|3|</think>|\\boxed{|3|}|END", (0, 3), (5, 10)),  # every tag one token
    ("A| 3|.|</|description|>|<think>|3|</|think|>|\\|boxed|{|3|}|END", (0, 3), (7, 16)),  # tags of several tokens
    ("A|<|/|desc|ription|>|<|th|ink|>|3|<|/th|ink|>|\\bo|xed{|3|}|END", (0, 1), (10, 19)),
    ("A| 3.</|description|><|think>|3|</think>|\\boxed|{3|}.|END", (0, 1), (5, 10)),  # a token with a part of a tag is in neither
    ("A| 3|.</description><think>4| 5|</think>|\\boxed{3}|END", (0, 2), (3, 6)),  # two tags and text in one token
    ("A|</description>| hm |<think>|3|</think>|so |\\boxed{|{|3|}|}|END", (0, 1), (4, 12)),  # text between the tags; nested braces
    ("A|</description>|<think>|3|</think>|\\boxed{\\frac{1}{|2}|}|END", (0, 1), (3, 8)),
    ("A|</description>|<think>|3|</think>|\\boxed{3}| or |\\boxed{4}|END", (0, 1), (3, 6)),  # two boxes: up to the first
    ("A|</description>|<think>|\\boxed{2}|?|</think>|\\boxed{3}|END", (0, 1), (3, 7)),  # a box inside the reasoning is no answer
    ("A|</description>|<think>|3|</think>|\\boxed{<think>}|END", (0, 1), (3, 6)),  # a tag inside the answer
    ("A|</description>|<think>|a|</think>|b|</think>|\\boxed{3}|END", (0, 1), (3, 8)),  # closed twice
    ("A|<think>|B|</description>|<think>|3|</think>|\\boxed{3}|END", (0, 3), (5, 8)),  # a thought before the description ends belongs to it
    ("A|</description>|<think>|3|</think>|\\boxed{3}", (0, 1), (3, 6)),  # no end token
    ("</description>|A|<think>|3|</think>|\\boxed{3}|END", None, None),  # empty description
    (" |</description>|<think>|3|</think>|\\boxed{3}|END", None, None),  # blank
    ("A|</description>|<think>|</think>|\\boxed{3}|END", None, None),  # empty think
    ("A|</description>|<think>| |</think>|\\boxed{3}|END", None, None),
    ("A|</description>|<think>|3|</think>|\\boxed{|}|END", None, None),  # empty box
    ("A|</description>|<think>|3|</think>|\\boxed{ }|END", None, None),
    ("A|<think>|3|</think>|\\boxed{3}|END", None, None),  # a missing tag, each in turn
    ("A|</description>|3|</think>|\\boxed{3}|END", None, None),
    ("A|</description>|<think>|3|\\boxed{3}|END", None, None),
    ("A|</description>|<think>|3|</think>|3|END", None, None),
    ("<think>|3|</think>|A|</description>|\\boxed{3}|END", None, None),  # wrong order
    ("A|</description>|</think>|3|<think>|\\boxed{3}|END", None, None),
    ("\\boxed{3}|A|</description>|<think>|3|</think>|END", None, None),
    ("A", None, None),  # cut off in each place
    ("A|</desc", None, None),
    ("A|</description>", None, None),
    ("A|</description>|<thi", None, None),
    ("A|</description>|<think>|3", None, None),
    ("A|</description>|<think>|3|</think", None, None),
    ("A|</description>|<think>|3|</think>|\\box", None, None),
    ("A|</description>|<think>|3|</think>|\\boxed{3", None, None),
    ("A|</description>|<think>|3|</think>|\\boxed{{3}", None, None),  # a brace too few
    ("END", None, None),
]


@pytest.fixture(scope="module")
def vocabulary():
    """A tokenizer that has exactly the tokens of RESPONSES."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = sorted({piece for text, *_ in RESPONSES for piece in pieces(text)})
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="A")))


@pytest.mark.parametrize("text, description, reasoning", RESPONSES)
def test_spans(vocabulary, text, description, reasoning):
    ids = vocabulary.convert_tokens_to_ids(pieces(text))
    found = vigos.find_spans(vocabulary.convert_ids_to_tokens(ids))
    assert (found and found.description, found and found.reasoning) == (description, reasoning)


def test_an_empty_response_has_no_spans():
    assert vigos.find_spans([]) is None


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
    good = vigos.Sample(ROW, {}, response, spans=vigos.Spans((0, 3), (5, 7)))
    bad = vigos.Sample(ROW, {}, response)
    assert vigos.marked(good, vigos.Args()) == {"perception": [0, 1, 2], "reasoning": [5, 6]}
    assert vigos.marked(good, vigos.Args(mark_end=True)) == {"perception": [0, 1, 2], "reasoning": [5, 6, 8]}
    assert vigos.marked(bad, vigos.Args()) == {"reference": list(range(9))} == vigos.marked(good, vigos.Args(method="opsd"))


def test_who_sees_what(tiny, tiny_rows):
    """On token ids: the perception teacher has no token of the question, the student none of the reference, and all see one image."""
    processor = common.Processor(str(tiny / "student"))
    row = tiny_rows[0] | {"reference": "9 Zebras"}
    ids = {name: processor.encode(context(row)).ids for name, context in vigos.contexts(vigos.Args()).items()}

    def holds(name: str, text: str) -> bool:
        part = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        return any(ids[name][i : i + len(part)] == part for i in range(len(ids[name])))

    names = ("question", "perception", "reasoning", "reference")
    words = row["problem"].replace("<image>", "").split(" ", 1)[1]  # its first word has another token at the beginning of a turn
    assert [holds(name, " " + words) for name in names] == [True, False, True, True]
    assert [holds(name, " 9 Zebras") for name in names] == [False, False, True, True]
    assert [holds(name, "inside <think></think>") for name in names] == [True, False, True, True]
    opening = processor.tokenizer("assistant\n<description>", add_special_tokens=False)["input_ids"]
    image = ids["question"].count(processor.image_id)
    assert all(found.count(processor.image_id) == image > 0 and found[-len(opening) :] == opening for found in ids.values())
    asked = set(processor.tokenizer(words, add_special_tokens=False)["input_ids"])
    template = processor.render(common.Context([common.user_message("", 1)], row["images"]))
    assert not (asked & set(ids["perception"])) - set(processor.tokenizer(template + "<description>", add_special_tokens=False)["input_ids"])
    assert vigos.FORMAT == toy.SEE_FIRST  # what the embedded default's teacher is trained with
    sliced = vigos.contexts(vigos.Args(reasoning_prefix="slice"))["reasoning"](row)
    assert processor.render(sliced).endswith("assistant\n<think>") and "escri" not in processor.render(sliced)


def test_normalisers_are_those_of_the_whole_update(tiny, tiny_rows):
    """10 tokens of d, 6 of r and a, 5 of an answer out of form, in two micro-batches: the weights are 1/10, 1/6 and 2/5."""
    processor = common.Processor(str(tiny / "student"))
    spans = (vigos.Spans((0, 4), (6, 8)), vigos.Spans((0, 6), (7, 11)), None)
    samples = []
    for i, (found, n) in enumerate(zip(spans, (9, 12, 5))):
        prompts = {name: processor.encode(context(tiny_rows[i] | {"reference": "7"})) for name, context in vigos.contexts(vigos.Args()).items()}
        samples.append(vigos.Sample(tiny_rows[i], prompts, common.Response(list(range(n)), [0.0] * n, True), spans=found))
    models = common.Models(processor, *[None] * 4, processor.vocab, common.Model(str(tiny / "student"), torch.float32))
    args = vigos.Args(micro_tokens=350)
    micros = vigos.score(samples, models, args)
    vigos.weigh(micros, args)
    part, weights = torch.cat([m.part for m in micros]), torch.cat([m.weights for m in micros], dim=-1)
    assert len(micros) == 2 and [int((part == i).sum()) for i in (-1, 0, 1, 2)] == [9 + 12 - 10 - 6, 10, 6, 5]
    for i, (row, weight) in enumerate(((0, 1 / 10), (0, 1 / 6), (1, 2 / 5))):
        torch.testing.assert_close(weights[row, part == i], torch.full((int((part == i).sum()),), weight))
    assert not weights[:, part == -1].any() and not weights[2:].any() and not weights[1, part < 2].any() and not weights[0, part == 2].any()


def test_leakage_by_hand():
    """Two tokens, two wrong answers. log q - log p = .5, -1: s = .5, 1. c_A = log(.4 / .2), 0; c_I = log(.4 / .1), log(.3 / .2)."""
    q = torch.tensor([0.4, 0.3]).log()
    student, wrong = q - torch.tensor([0.5, -1.0]), torch.tensor([[0.1, 0.2], [0.3, 0.6]]).log()
    a, both = vigos.leakage(student, q, wrong, torch.tensor([0.1, 0.2]).log()).tolist()
    assert a == pytest.approx(0.5 * math.log(2)) and both == pytest.approx(a + 0.5 * math.log(4) + math.log(1.5))


def test_leakage_of_a_teacher_that_ignores_the_answer_or_the_image():
    student, q, other = (torch.randn(30).sigmoid().log() for _ in range(3))
    deaf = vigos.leakage(student, q, q.repeat(4, 1), other)  # the same with every answer
    blind = vigos.leakage(student, q, other.repeat(4, 1), q)  # the same with every image
    nothing = vigos.leakage(student, q, q[None, :][:0], other)  # is told no answer
    assert deaf[1] > 0 and nothing[1] > 0 and blind[1] > 0
    torch.testing.assert_close(torch.stack([100 * deaf[0] / deaf[1], 100 * nothing[0] / nothing[1], 100 * blind[0] / blind[1]]),
                               torch.tensor([0.0, 0.0, 100.0]), atol=1e-4, rtol=0)


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


def run_flags(tiny, output, **changes) -> list[str]:
    """As conftest.flags, for a method without a separate teacher."""
    return [f"--conflict-data={changes.pop('conflict_data', tiny / 'conflict')}", *flags(tiny, output, **{"teacher": None} | changes)]


@pytest.mark.parametrize("changes", [{}, {"lora": 4}, {"method": "opsd", "divergence": "top_k", "support": 20}], ids=str)  # fmt: skip
def test_real_runs(tiny, tmp_path, changes):
    result = run_script("vigos.py", *run_flags(tiny, tmp_path / "run", **changes))
    assert result.returncode == 0, result.stderr
    first, *_, last = (json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert {"score", "prior", "acc@1"} <= set(first) & set(last)
    assert {"reference", "tokens_reference", "clipped_reference", "out_of_form", "entropy", "description_length", "reasoning_length"} <= set(last)
    assert last["out_of_form"] == 1 and last["tokens_reference"] == 1 and math.isfinite(last["reference"])  # an untrained model
    assert "100% of the answers are out of form" in result.stdout + result.stderr
    trained = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "run" / "final").state_dict()
    before = transformers.AutoModelForImageTextToText.from_pretrained(tiny / "student").state_dict()
    changed = {name for name in before if not torch.equal(before[name], trained[name])}
    assert set(trained) == set(before) and changed
    assert not changes.get("lora") or all(name.endswith("proj.weight") for name in changed)


@pytest.mark.parametrize("changes", [{}, {"lora": 4, "dtype": "bfloat16", "gradient_checkpointing": True}], ids=str)
def test_two_ranks_with_answers_in_form(tiny, parrot, tmp_path, changes):
    changes, more = {name: x for name, x in changes.items() if x is not True}, ["--gradient-checkpointing"] * bool(changes)
    result = run_script("vigos.py", *run_flags(tiny, tmp_path / "run", student=parrot, max_response=48, **changes), *more, torchrun=2)
    assert result.returncode == 0, result.stderr
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["tokens_perception"] > 0 and last["tokens_reasoning"] > 0 and last["perception"] > 0 and last["out_of_form"] < 1
    assert last["description_length"] > 2 and last["reasoning_length"] > 2


def test_with_the_adapters_off_it_is_the_initial_model(tiny, tiny_rows):
    """Bit for bit, whatever the adapters are; with them on it is the merged checkpoint."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        args, processor = vigos.Args(student=str(tiny / "student"), dtype="float32", lora=4), common.Processor(str(tiny / "student"))
        models = common.load_models(args, processor, args.student, 1)
    finally:
        torch.distributed.destroy_process_group()
    batch = processor.batch([processor.encode(vigos.question(tiny_rows[0]))], [[5, 6, 7]])
    initial = common.Model(str(tiny / "student"), torch.float32)
    with torch.no_grad():
        for name, parameter in models.student.named_parameters():
            parameter.add_(0.1 if ".lora_B." in name else 0.0)
        before, off, on = initial(batch), models.teacher(batch), models.student(batch)
        initial.lm.load_state_dict(dict(models.student.weights()), strict=False)
        merged = initial(batch)
    assert torch.equal(off, before) and not torch.allclose(on, before, atol=1e-3)
    torch.testing.assert_close(on, merged, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def parrot(tiny, tmp_path_factory):
    """The tiny student, trained for some seconds to write the form, whatever it is asked."""
    folder = tmp_path_factory.mktemp("parrot")
    shutil.copytree(tiny / "student", folder / "student")
    rows = common.Rows(str(tiny / "rows.parquet"), "train", {"problem": "problem"})
    lessons = [rows[i] | {"doubted": rows[i]["problem"]} for i in range(24)]
    toy.train(folder / "student", lessons, [(200, {"describe_first": 1, "told_answer": 1})], "parrot", batch=8)
    return folder / "student"


def palr_run(tiny, student, output, torchrun=0, **changes):
    """Greedy, since ranks sample with seeds of their own."""
    values = {name: None for name in ("teacher", "data", "prompts", "max_steps", "eval_every")} | {"student": student, "max_response": 48, "eval_rows": 0, "top_k": 1}
    result = run_script("vigos.py", "--palr", *flags(tiny, output, **values | changes), torchrun=torchrun)
    return result, json.loads((output / "palr.json").read_text()) if result.returncode == 0 else None


def test_leakage_of_a_real_run(tiny, parrot, tmp_path):
    """Wrong answers of the student's own: no leakage into a description by a teacher that was not told, some into all else."""
    result, found = palr_run(tiny, parrot, tmp_path / "run", top_k=0, temperature=0.3)
    assert result.returncode == 0, result.stderr
    assert found["responses"] == 24 and found["used"] == 24 - found["out_of_form"] > 12 and found["wrong_answers"] == pytest.approx(4, abs=0.3)
    assert found["palr"]["vigos"]["description"] == 0 < found["palr"]["vigos"]["reasoning"] < 99
    assert 0 < found["palr"]["opsd"]["description"] < 99 and found["palr"]["opsd"]["reasoning"] == found["palr"]["vigos"]["reasoning"]
    assert 0 < found["palr"]["vigos"]["both"] < found["palr"]["opsd"]["both"] < 99


def test_leakage_against_float64(tiny, parrot, tmp_path):
    """The whole of --palr recomputed token by token: the student is not the teacher, wrong answers come from a column; two ranks agree."""
    data = datasets.load_dataset("parquet", data_files=str(tiny / "rows.parquet"), split="train")
    data.add_column("others", [["77", row["answer"], None, " ", "88"] for row in data]).to_parquet(tmp_path / "rows.parquet")
    moved = common.Model(str(parrot), torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator) * parameter.std() if parameter.numel() > 1 else 0.0)
    processor = common.Processor(str(parrot))
    common.save_checkpoint(moved.lm, processor, tmp_path / "moved")
    settings = dict(teacher=parrot, column_wrong="others", eval_data=tmp_path / "rows.parquet")
    result, found = palr_run(tiny, tmp_path / "moved", tmp_path / "one", **settings)
    assert result.returncode == 0, result.stderr
    assert found["wrong_answers"] == 2 and found["used"] > 12

    rows = common.Rows(str(tmp_path / "rows.parquet"), "train", {"problem": "problem", "reference": "answer"})
    engine = common.HFEngine(str(tmp_path / "moved"), processor, common.Args(dtype="float32", max_response=48))
    student, teacher = (common.Model(str(name), torch.float64).lm for name in (tmp_path / "moved", parrot))
    sums = {(method, part): [0.0, 0.0] for method in ("opsd", "vigos") for part in ("description", "reasoning")}
    used = 0
    for i, response in enumerate(engine.generate([processor.encode(vigos.question(rows[j])) for j in range(24)], 0.0)):
        spans, row, image = vigos.find_spans(processor.tokenizer.convert_ids_to_tokens(response.ids)), rows[i], rows[(i + 1) % 24]["images"]
        used += spans is not None
        if spans is None:
            continue

        def probabilities(lm, context):
            with torch.no_grad():
                return read(lm, processor.encode(context), response.ids, processor.image_id, processor.vocab)[range(len(response.ids)), response.ids]

        p = probabilities(student, vigos.question(row))
        q = {"image": probabilities(teacher, vigos.image_alone(row)), "told": probabilities(teacher, vigos.privileged(row))}
        other = {"image": probabilities(teacher, vigos.image_alone(row | {"images": image})), "told": probabilities(teacher, vigos.privileged(row | {"images": image}))}
        misled = sum(probabilities(teacher, vigos.privileged(row | {"reference": answer})) for answer in ("77", "88")) / 2
        for method, part in sums:
            view = "image" if (method, part) == ("vigos", "description") else "told"
            for t in range(*getattr(spans, part)):
                s = abs((q[view][t] / p[t]).log())
                by_answer = max(0.0, (q[view][t] / misled[t]).log()) if view == "told" else 0.0
                sums[method, part][0] += float(s * by_answer)
                sums[method, part][1] += float(s * (by_answer + max(0.0, (q[view][t] / other[view][t]).log())))
    assert used == found["used"]
    for method in ("opsd", "vigos"):
        parts = [sums[method, part] for part in ("description", "reasoning")]
        expected = [100 * a / both for a, both in (*parts, [sum(x) for x in zip(*parts)])]
        assert list(found["palr"][method].values()) == pytest.approx(expected, rel=1e-3, abs=1e-6)

    result, two = palr_run(tiny, tmp_path / "moved", tmp_path / "two", torchrun=2, micro_tokens=400, **settings)
    assert two["used"] == found["used"] and two["palr"]["opsd"] == pytest.approx(found["palr"]["opsd"], rel=1e-3)


def test_the_teacher_of_a_trained_student_has_to_be_named(tiny, tmp_path):
    (tmp_path / "args.json").write_text('{"student": "the-initial-one"}')
    with pytest.raises(common.UserError, match="was trained from 'the-initial-one': name that with --teacher"):
        vigos.check_settings(*common.parse_args(vigos.Args, vigos.PRESETS, ["--preset", "toy", "--palr", "--student", f"{tmp_path}/final"]))


@pytest.mark.parametrize("message, wrong", [("row 9 of", [None] * 9 + ["12, 34"] * 15), ("no row of", [[]] * 12 + [None] * 12)], ids=["text", "empty"])
def test_wrong_answers_have_to_be_lists(tiny, tmp_path, message, wrong):
    data = datasets.load_dataset("parquet", data_files=str(tiny / "rows.parquet"), split="train")
    data.add_column("others", wrong).to_parquet(tmp_path / "rows.parquet")
    result, _ = palr_run(tiny, tiny / "student", tmp_path / "run", eval_data=tmp_path / "rows.parquet", column_wrong="others")
    assert result.returncode != 0 and message in result.stderr and "others" in result.stderr and "Traceback" not in result.stderr


def test_leakage_of_nothing_is_no_zero(tiny, tmp_path):
    result, _ = palr_run(tiny, tiny / "student", tmp_path / "run", max_response=4)
    assert result.returncode != 0 and "none of the 24 responses can be used: 24 are out of form" in result.stderr


@pytest.mark.parametrize("message, argv", [
    ("must not be negative", "--clip -1"), ("nothing would be learned", "--weight-perception 0 --weight-reasoning 0 --weight-reference 0"), ("--divergence would have no effect", "--divergence jsd"), ("--teacher would have no effect", "--teacher x"),
    ("--fallback would have no effect", "--method opsd --fallback forward_kl"), ("--updates above 1", "--updates 2"),
    ("--support would have no effect", "--support 5"), ("--lora-targets would have no effect", "--lora-targets q_proj"), ("--lora is -1", "--lora -1"),
    ("--wrong-samples would have no effect", "--wrong-samples 5"), ("--wrong-samples would have no effect", "--palr --column-wrong x --wrong-samples 5"),
    ("--lr would have no effect", "--palr --lr 1"), ("--column-reference has to be --column-answer", "--palr --column-reference solution"),
    ("name them with --eval-data", "--palr --eval-data="), ("--column-position would have no effect", "--conflict-data= --column-position x"),
    ("must be at least 1", "--palr --wrong-answers 0"), ("name that as well", "--eval-data= --conflict-data x"),
    ("--clip-entries would have no effect", "--method opsd --divergence sampled --clip-entries"),
    ("--fallback would have no effect", "--weight-reference 0 --fallback forward_kl"), ("--mark-end would have no effect", "--weight-reasoning 0 --mark-end"),
])  # fmt: skip
def test_bad_settings(message, argv):
    with pytest.raises(common.UserError, match=message):
        vigos.check_settings(*common.parse_args(vigos.Args, vigos.PRESETS, ["--preset", "toy", *argv.split()]))


@pytest.mark.parametrize("message, changes", [
    ("--column-reference", {"column_reference": "nothing"}), ("names 'nothing'", {"lora": 4, "lora_targets": "q_proj,nothing"}),
    ("names 'lm_head'", {"lora": 4, "lora_targets": "lm_head"}), ("That was --conflict-data", {"conflict_data": "nowhere.json"}),
    ("has no column 'place'", {"column_position": "place"}), ("needs a position of 1, 2 or 3", {"column_position": "answer"}),
])  # fmt: skip
def test_data_that_does_not_fit(tiny, tmp_path, message, changes):
    result = run_script("vigos.py", *run_flags(tiny, tmp_path / "run", **changes))
    assert result.returncode != 0 and message in result.stderr + result.stdout, result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "run").exists()


def test_an_empty_reference_is_named_by_its_row(tiny, tmp_path):
    data = datasets.load_dataset("parquet", data_files=str(tiny / "rows.parquet"), split="train")
    data.add_column("told", [" " if i == 5 else "7" for i in range(24)]).to_parquet(tmp_path / "rows.parquet")
    result = run_script("vigos.py", *run_flags(tiny, tmp_path / "run", data=tmp_path / "rows.parquet", column_reference="told"))
    assert result.returncode != 0 and "row 5: the reference is empty (column 'told')" in result.stderr + result.stdout


def test_a_tokenizer_without_room_for_the_tags_is_refused(tiny, tmp_path):
    """One that writes words alone: < is unknown to it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    shutil.copytree(tiny / "student", tmp_path / "student")
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["?", "description", "think", "boxed", *toy.SPECIAL])}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    old = common.Processor(str(tiny / "student")).tokenizer
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", eos_token="<|im_end|>", pad_token="<|endoftext|>",
                            chat_template=old.chat_template).save_pretrained(tmp_path / "student")  # fmt: skip
    result = run_script("vigos.py", *run_flags(tiny, tmp_path / "run", student=tmp_path / "student"))
    assert result.returncode != 0 and "cannot write the tags" in result.stderr + result.stdout, result.stderr


def test_questions_that_hold_their_answer_are_counted(tmp_path):
    """A number as a part of another is none."""
    rows = [{"problem": "Is 3 more than 2?", "answer": "3"}, {"problem": "Is it 31?", "answer": "3"}, {"problem": "(A) one (B) two", "answer": "B"}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    assert vigos.count_given_away(common.Rows(str(tmp_path / "rows.parquet"), "train", {"problem": "problem", "answer": "answer"})) == 2
