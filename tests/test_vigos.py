"""ViGOS's pieces on worked examples: spans, who marks which token, clips, contexts, and the real script."""

import json
import math
import shutil

import common
import vigos

import datasets
import pytest
import torch
import transformers
from conftest import flags, run_script
from gradients import start
from gradients_vigos import IN_FORM, teach_form

ROW = {
    "problem": "<image>How many?",
    "images": ["picture"],
    "answer": "47",
    "reference": "40 + 7 = 47.",
}


def pieces(text: str) -> list[str]:
    return text.replace(" ", "\u0120").split("|")


# Responses as their tokens, parted by |; a blank stands for the space of a byte-level token.
# Then d and r, a as ranges of tokens; None: out of form.
RESPONSES = [
    (
        "A| 3|.|</description>|<think>|3|</think>|\\boxed{|3|}|END",
        (0, 3),
        (5, 10),
    ),  # every tag one token
    (
        "A| 3|.|</|description|>|<think>|3|</|think|>|\\|boxed|{|3|}|END",
        (0, 3),
        (7, 16),
    ),  # tags of several tokens
    ("A|<|/|desc|ription|>|<|th|ink|>|3|<|/th|ink|>|\\bo|xed{|3|}|END", (0, 1), (10, 19)),
    (
        "A| 3.</|description|><|think>|3|</think>|\\boxed|{3|}.|END",
        (0, 1),
        (5, 10),
    ),  # a token with a part of a tag is in neither
    (
        "A| 3|.</description><think>4| 5|</think>|\\boxed{3}|END",
        (0, 2),
        (3, 6),
    ),  # two tags and text in one token
    (
        "A|</description>| hm |<think>|3|</think>|so |\\boxed{|{|3|}|}|END",
        (0, 1),
        (4, 12),
    ),  # text between the tags; nested braces
    ("A|</description>|<think>|3|</think>|\\boxed{\\frac{1}{|2}|}|END", (0, 1), (3, 8)),
    (
        "A|</description>|<think>|3|</think>|\\boxed{3}| or |\\boxed{4}|END",
        (0, 1),
        (3, 6),
    ),  # two boxes: up to the first
    (
        "A|</description>|<think>|\\boxed{2}|?|</think>|\\boxed{3}|END",
        (0, 1),
        (3, 7),
    ),  # a box inside the reasoning is no answer
    (
        "A|</description>|<think>|3|</think>|\\boxed{<think>}|END",
        (0, 1),
        (3, 6),
    ),  # a tag inside the answer
    (
        "A|</description>|<think>|a|</think>|b|</think>|\\boxed{3}|END",
        (0, 1),
        (3, 8),
    ),  # closed twice
    (
        "A|<think>|B|</description>|<think>|3|</think>|\\boxed{3}|END",
        (0, 3),
        (5, 8),
    ),  # a thought before the description ends belongs to it
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
    model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="A")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))


@pytest.mark.parametrize("text, description, reasoning", RESPONSES)
def test_spans(vocabulary, text, description, reasoning):
    ids = vocabulary.convert_tokens_to_ids(pieces(text))
    found = vigos.find_spans(vocabulary.convert_ids_to_tokens(ids))
    if description is None:
        assert found is None
        return
    expected = [[i in range(*span) for i in range(len(ids))] for span in (description, reasoning)]
    assert list(found) == expected


def test_an_empty_response_has_no_spans():
    assert vigos.find_spans([]) is None


def test_spans_of_real_tokens(tiny, tiny_rows):
    processor = common.Processor(str(tiny / "student"))
    for row in tiny_rows:
        solution, answer = row["solution"], row["answer"]
        text = f"{solution}</description>\n<think>{solution}</think>\n\\boxed{{{answer}}}"
        ids = [*processor.tokenize(text), processor.tokenizer.eos_token_id]
        spans = vigos.find_spans(processor.tokenizer.convert_ids_to_tokens(ids))
        parts = []
        for span in spans:
            kept = [token for token, inside in zip(ids, span) if inside]
            parts.append(processor.tokenizer.decode(kept))
        whole = text.split("</description>")[0], text.split("<think>")[1]
        # this tokenizer has tokens such as ".</", which hold a part of the tag
        assert whole[0].startswith(parts[0]) and len(whole[0]) - len(parts[0]) <= 1
        assert whole[1].endswith(parts[1]) and len(whole[1]) - len(parts[1]) <= 3


def test_who_marks_what():
    def of(spans, finished=True, **settings) -> dict:
        found = vigos.marks(
            spans, common.Response(list(range(9)), finished), vigos.Args(**settings)
        )
        return {
            name: [i for i, marked in enumerate(mask) if marked] for name, mask in found.items()
        }

    spans = [i < 3 for i in range(9)], [i in (5, 6) for i in range(9)]
    good = {"perception": [0, 1, 2], "reasoning": [5, 6], "reference": []}
    bad = {"perception": [], "reasoning": [], "reference": list(range(9))}
    assert of(spans) == good == of(spans, finished=False, mark_end=True)
    assert of(spans, mark_end=True) == good | {"reasoning": [5, 6, 8]}
    assert of(None) == bad == of(spans, method="opsd") == of(None, mark_end=True)


def test_who_sees_what(tiny, tiny_rows):
    """On token ids: perception has no token of the question, the student none of the reference, all one image."""
    processor = common.Processor(str(tiny / "student"))
    row = tiny_rows[0] | {"reference": ["9 Zebras", "8 Lions"]}
    contexts = vigos.contexts(vigos.Args())
    ids = {name: processor.encode(context(row)).ids for name, context in contexts.items()}

    def holds(name: str, text: str) -> bool:
        part = processor.tokenize(text)
        return any(ids[name][i : i + len(part)] == part for i in range(len(ids[name])))

    names = ("question", "perception", "reasoning", "reference")
    # its first word has another token at the beginning of a turn
    words = row["problem"].replace("<image>", "").split(" ", 1)[1]
    assert tuple(ids) == names
    assert [holds(name, " " + words) for name in names] == [True, False, True, True]
    assert [holds(name, " 9 Zebras") for name in names] == [False, False, True, True]
    assert not any(holds(name, "Lions") for name in names)  # of several right answers, the first
    assert [holds(name, "inside <think></think>") for name in names] == [True, False, True, True]
    opening = processor.tokenize("assistant\n<description>")
    image = ids["question"].count(processor.image_id)
    assert image > 0
    for found in ids.values():
        assert found.count(processor.image_id) == image and found[-len(opening) :] == opening
    asked = set(processor.tokenize(words))
    template = processor.render(common.Context([common.message("user", "", 1)], row["images"]))
    allowed = set(processor.tokenize(template + "<description>"))
    assert not (asked & set(ids["perception"])) - allowed
    sliced = vigos.contexts(vigos.Args(reasoning_prefix="slice"))["reasoning"](row)
    text = processor.render(sliced)
    assert text.endswith("assistant\n<think>") and "escri" not in text and "9 Zebras" in text


@pytest.fixture
def run_of(tiny):
    """settings -> a run on the tiny student, with its settings."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )

    def begin(**settings):
        args = vigos.Args(student=str(tiny / "student"), dtype="float32", **settings)
        processor = common.Processor(args.student)
        return start(args, processor, args.student, vigos.load_models), args

    yield begin
    torch.distributed.destroy_process_group()


def test_normalisers_are_those_of_the_whole_update(run_of, tiny_rows):
    """10 tokens of d, 6 of r and a, 5 of an answer out of form, in two micro-batches: 1/10, 1/6 and 2/5."""
    run, args = run_of(micro_tokens=350)

    def mask(n: int, *span) -> list[bool]:
        return [i in range(*span) for i in range(n)]

    spans = (mask(9, 0, 4), mask(9, 6, 8)), (mask(12, 0, 6), mask(12, 7, 11)), None
    samples = []
    for row, found, n in zip(tiny_rows, spans, (9, 12, 5)):
        views = vigos.contexts(args).items()
        prompts = {name: run.processor.encode(fn(row | {"reference": "7"})) for name, fn in views}
        samples.append(
            common.Sample(row, prompts, common.Response(list(range(n)), log_probs=[0.0] * n))
        )
        samples[-1].marks = vigos.marks(found, samples[-1].response, args)
    micros = vigos.score(samples, run, args)
    vigos.weigh(micros, run, args)
    assert len(micros) == 2 and set(micros[0].weights) == {"forward", "reference"}
    forward, reference = (
        torch.cat([m.weights[name] for m in micros]) for name in micros[0].weights
    )
    taught = torch.zeros(26)
    for name, weights, count, value in (
        ("perception", forward, 10, 1 / 10),
        ("reasoning", forward, 6, 1 / 6),
        ("reference", reference, 5, 2 / 5),
    ):
        mine = torch.cat([m.marks[name] for m in micros])
        assert mine.sum() == count
        torch.testing.assert_close(weights[mine > 0], torch.full((count,), value))
        taught += mine
    assert taught.max() == 1 and not forward[taught == 0].any() and not reference[taught == 0].any()
    assert (forward > 0).sum() == 16 and (reference > 0).sum() == 5


def test_each_token_has_its_own_teachers_hidden_state(run_of, tiny_rows):
    """Token by token, from passes of one response alone; zero where nobody marks it; slice reads r and a alone."""
    for prefix in ("full", "slice"):
        run, args = run_of(reasoning_prefix=prefix, micro_tokens=10_000)
        processor, samples = run.processor, []
        for i, row in enumerate(tiny_rows[:3]):
            ids = processor.tokenize(IN_FORM.format(i)) if i else [5, 6, 7]
            views = vigos.contexts(args).items()
            prompts = {name: processor.encode(fn(row | {"reference": "7"})) for name, fn in views}
            response = common.Response(ids, log_probs=[0.0] * len(ids))
            samples.append(common.Sample(row, prompts, response))
            spans = vigos.find_spans(processor.tokenizer.convert_ids_to_tokens(ids))
            samples[-1].marks = vigos.marks(spans, response, args)
        (m,) = vigos.score(samples, run, args)
        start = 0
        for s in m.samples:
            for t in range(len(s.response.ids)):
                names = [name for name in vigos.TEACHERS if s.marks[name][t]]
                got = m.teacher[0][start + t]
                if not names:
                    assert not got.any()
                    continue
                first = 0
                if names == ["reasoning"] and prefix == "slice":
                    first = s.marks["reasoning"].index(True)
                read = common.Response(s.response.ids[first:])
                with torch.no_grad():
                    hidden = run.teacher(processor.batch([s.prompts[names[0]]], [read]))
                torch.testing.assert_close(got, hidden[t - first], rtol=1e-3, atol=1e-3)
            start += len(s.response.ids)


def test_a_clipped_token_has_no_gradient():
    z, y = torch.randn(40, 30, requires_grad=True), torch.randn(40, 30)
    ids = torch.zeros(40, dtype=torch.long)

    def found(**settings) -> dict:
        return dict(zip(vigos.TERMS, vigos.terms(z, y, ids, vigos.Args(**settings))))

    plain, limited = found(clip=0.0), found(clip=0.8)
    forward = common.kl(y.log_softmax(-1), z.log_softmax(-1))
    reverse = common.kl(z.log_softmax(-1), y.log_softmax(-1))
    for name, kl in (("forward", forward), ("reference", reverse)):
        torch.testing.assert_close(plain[name], kl)
        torch.testing.assert_close(limited[name], kl.clamp(max=0.8))
        norm = torch.autograd.grad(limited[name].sum(), z, retain_graph=True)[0].norm(dim=-1)
        assert 0 < (kl > 0.8).sum() < 40 and ((norm == 0) == (kl > 0.8)).all()
        assert torch.equal(limited[f"{name}_clipped"] > 0, kl > 0.8)
        assert not plain[f"{name}_clipped"].any()
    q, p = y.softmax(-1), z.softmax(-1)
    parts = q * (q / p).log()
    limit = parts.amax(-1).mean().item()
    entries, cut = found(clip=limit, clip_entries=True), (parts > limit).any(-1)
    torch.testing.assert_close(entries["forward"], parts.clamp(max=limit).sum(-1))
    assert 0 < cut.sum() < 40 and torch.equal(entries["forward_clipped"] > 0, cut)


def run_flags(tiny, output, **changes) -> list[str]:
    """As conftest.flags, for a method without a separate teacher."""
    changes = {"teacher": None, "conflict_data": tiny / "conflict"} | changes
    return flags(tiny, output, **changes)


CHANGES = [
    {},
    {"lora": 4, "eval_data": ""},
    {"method": "opsd", "divergence": "top_k", "support": 1000},
]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_real_runs(tiny, tmp_path, changes):
    result = run_script("vigos.py", *run_flags(tiny, tmp_path / "run", **changes))
    assert result.returncode == 0, result.stderr
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    first, *_, last = (json.loads(line) for line in lines)
    measured = {"score", "prior"} if "eval_data" in changes else {"score", "prior", "acc@1"}
    assert measured == {"score", "prior", "acc@1"} & set(first) & set(last)
    logged = {"reference", "tokens_reference", "clipped_reference", "out_of_form", "entropy"}
    assert logged <= set(last) and "description_length" not in last
    assert last["out_of_form"] == 1 and last["tokens_reference"] == 1  # an untrained model
    assert math.isfinite(last["reference"]) and "perception" not in last
    noted = "100% of the answers are out of form" in result.stdout + result.stderr
    assert noted == ("method" not in changes)  # OPSD marks them all the same
    auto = transformers.AutoModelForImageTextToText
    trained = auto.from_pretrained(tmp_path / "run" / "final").state_dict()
    before = auto.from_pretrained(tiny / "student").state_dict()
    changed = {name for name in before if not torch.equal(before[name], trained[name])}
    assert set(trained) == set(before) and changed
    assert not changes.get("lora") or all(name.endswith("proj.weight") for name in changed)


def test_prior_and_score_are_of_their_own_questions(tiny):
    args = vigos.Args(conflict_data=str(tiny / "conflict"))
    found = vigos.load_conflicts(args, common.Processor(str(tiny / "student")))
    data = datasets.load_from_disk(str(tiny / "conflict"))
    positions = [str(x) for x in data["position"]]
    for name, wanted in (("prior", {"1"}), ("score", {"2", "3"})):
        rows = [found[name][i]["index"] for i in range(len(found[name]))]
        assert rows and rows == [i for i, position in enumerate(positions) if position in wanted]


@pytest.fixture(scope="module")
def parrot(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parrot") / "student"
    teach_form(tiny, folder)
    return folder


@pytest.mark.parametrize("lora", [pytest.param(0, marks=pytest.mark.slow), 4])
def test_two_ranks_with_answers_in_form(tiny, parrot, tmp_path, lora):
    more = ["--gradient-checkpointing"] if lora else []
    changes = {"lora": 4, "dtype": "bfloat16"} if lora else {}
    changes |= dict(student=parrot, max_response=64)
    argv = run_flags(tiny, tmp_path / "run", **changes)
    result = run_script("vigos.py", *argv, *more, ranks=2)
    assert result.returncode == 0, result.stderr
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["tokens_perception"] > 0 and last["tokens_reasoning"] > 0
    assert last["perception"] > 0 and last["out_of_form"] < 1
    assert last["description_length"] > 2 and last["reasoning_length"] > 2


def test_with_the_adapters_off_it_is_the_initial_model(run_of, tiny, tiny_rows):
    """Bit for bit, whatever the adapters are; with them on it is the merged checkpoint."""
    run, _ = run_of(lora=4)
    prompt = run.processor.encode(vigos.question(tiny_rows[0]))
    batch = run.processor.batch([prompt], [common.Response([5, 6, 7])])
    initial = common.Model(str(tiny / "student"), torch.float32)
    with torch.no_grad():
        for name, parameter in run.student.named_parameters():
            parameter.add_(0.1 if ".lora_B." in name else 0.0)
        before, off, on = initial(batch), run.teacher(batch), run.student(batch)
        initial.lm.load_state_dict(dict(run.student.weights()), strict=False)
        merged = initial(batch)
    assert torch.equal(off, before) and not torch.allclose(on, before, atol=1e-3)
    torch.testing.assert_close(on, merged, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "message, changes",
    [
        ("--updates is 2; it must lie in [1, 1]", {"updates": 2}),
        ("--support is 0; it must lie in [1, 1024]", {"support": 0}),
        ("--clip is -1.0", {"clip": -1}),
        ("its teacher is --student", {"teacher": "some/model"}),
        ("--column-reference", {"column_reference": "nothing"}),
        ("nowhere.json", {"conflict_data": "nowhere.json"}),
        ("has no column 'place'", {"column_position": "place"}),
        ("needs a position of 1, 2 or 3", {"column_position": "answer"}),
    ],
)
def test_what_does_not_fit_is_named(tiny, tmp_path, message, changes):
    result = run_script("vigos.py", *run_flags(tiny, tmp_path / "run", **changes))
    assert result.returncode != 0 and message in result.stderr + result.stdout, result.stderr
    assert "Traceback" not in result.stderr


def test_an_empty_reference_is_named_by_its_row(tiny, tmp_path):
    data = datasets.load_dataset("parquet", data_files=str(tiny / "rows.parquet"), split="train")
    data = data.add_column("told", [" " if i == 5 else "7" for i in range(24)])
    data.to_parquet(tmp_path / "rows.parquet")
    changes = dict(data=tmp_path / "rows.parquet", column_reference="told")
    result = run_script("vigos.py", *run_flags(tiny, tmp_path / "run", **changes))
    said = result.stderr + result.stdout
    assert result.returncode != 0 and "row 5: there is no reference (column 'told')" in said


def test_a_tokenizer_without_room_for_the_tags_is_refused(tiny, tmp_path):
    """One that writes words alone: < is unknown to it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    shutil.copytree(tiny / "student", tmp_path / "student")
    old = common.Processor(str(tiny / "student")).tokenizer
    special = [token.content for token in old.added_tokens_decoder.values()]
    vocabulary = ["?", "description", "think", "boxed", *special]
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    new = PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="?",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=old.chat_template,
    )
    new.save_pretrained(tmp_path / "student")
    argv = run_flags(tiny, tmp_path / "run", student=tmp_path / "student")
    result = run_script("vigos.py", *argv)
    assert result.returncode != 0 and "cannot write the tags" in result.stderr + result.stdout
