"""VOLD's pieces: the estimators' gradients, masks, the teacher's tokens, the three stages as a user runs them, and what they refuse."""

import json
import re
import shutil

import pytest
import torch
from conftest import flags, refusal, run_script
from safetensors.torch import load_file

import common
import vold

VOCABULARY = 12
INSTRUCTION = vold.PRESETS["toy"]["instruction"]


def estimate_gradients(z, y, ids, estimator):
    """Gradient of the estimate at each sampled token, [N, V]: one row of logits z [V] for all of them."""
    rows = z.expand(len(ids), -1).clone().requires_grad_()
    log_p, log_q = (common.gather(x.log_softmax(-1), ids) for x in (rows, y.expand(len(ids), -1)))
    return torch.autograd.grad(vold.distance(log_p, log_q, estimator).sum(), rows)[0]


@pytest.mark.parametrize("estimator, exact", [
    ("k1", lambda p, q: torch.zeros_like(p)),
    ("k2", lambda p, q: p * ((p / q).log() - (p * (p / q).log()).sum())),  # of KL(p || q), by hand
    ("k3", lambda p, q: p - q),  # of KL(q || p)
])  # fmt: skip
def test_eq_3_the_mean_gradient_of_the_estimators(estimator, exact):
    generator = torch.Generator().manual_seed(0)
    z, y = torch.randn(2, VOCABULARY, dtype=torch.float64, generator=generator)
    p, q = z.softmax(-1), y.softmax(-1)
    each = estimate_gradients(z, y, torch.arange(VOCABULARY), estimator)
    torch.testing.assert_close(p @ each, exact(p, q), rtol=1e-10, atol=1e-12)  # the expectation, summed over the vocabulary
    n = 200_000
    drawn = each[torch.multinomial(p, n, replacement=True, generator=generator)]
    error = (drawn.mean(0) - exact(p, q)).norm()
    assert error < 4 * (drawn.var(0).sum() / n).sqrt()  # and what sampling comes to: k2's standard error and no more
    if estimator == "k2":
        r = z.clone().requires_grad_()
        kl = common.kl(r.log_softmax(-1), y.log_softmax(-1))
        torch.testing.assert_close(torch.autograd.grad(kl, r)[0], exact(p, q), rtol=1e-10, atol=1e-12)


def test_eq_6_the_mask():
    correct = [True, False, False, False, True, True]
    assert vold.distilled(correct, 2, "response") == [False, True, True, True, False, False]  # 1 - r
    assert vold.distilled(correct, 2, "group") == [False, False, True, True, False, False]
    assert vold.distilled(correct, 2, "none") == [True] * 6
    assert vold.distilled(correct, 3, "group") == [False] * 6


def test_kdrls_falling_beta():
    args = vold.Args(beta=5e-3, beta_decay=5e-5, beta_min=1e-3)
    assert [vold.beta(args, step) for step in (1, 2, 81, 500)] == pytest.approx([5e-3, 4.95e-3, 1e-3, 1e-3])


def test_a_response_that_was_cut_off_is_wrong():
    done, cut = (common.Sample({"answer": "4"}, {}, common.Response([1], [0.0], finished, "\\boxed{4}")) for finished in (True, False))
    common.reward_answers([done, cut], 2)
    assert (done.correct, cut.correct, done.reward, cut.reward) == (True, False, 1.0, 0.0)


# ------------------------------------------------------------------------------------------------------------- the teacher's tokens
@pytest.fixture(scope="module")
def processors(tiny):
    return [common.Processor(str(tiny / name)) for name in ("student", "tagged", "text-only")]


@pytest.mark.parametrize("text", ["<think>\n1+1=2.</think>\n\n\\boxed{2}", "<think></think>", "so <think>3</think> and <think>4", "no tag <thin> here",
                                  "</think>", "\u00e9<think>\u00e9</think>\u00e9", ""])  # fmt: skip
def test_the_teacher_reads_its_own_tags(processors, text):
    student, teacher, _ = processors
    tags = vold.tags_of(student, teacher)
    assert set(tags) == {"<think>", "</think>"}
    ids = student.tokenizer(text, add_special_tokens=False)["input_ids"] + [student.tokenizer.eos_token_id]
    theirs, places = vold.reread(ids, student, teacher, tags)
    assert teacher.tokenizer.decode(theirs) == student.tokenizer.decode(ids)
    assert [tags[tag] for tag in re.findall("</?think>", text)] == [i for i in theirs if i in tags.values()]
    assert len(places) == len(ids) and places[-1] == len(theirs) - 1  # the end of the turn is known
    assert all(theirs[place] == token for token, place in zip(ids, places) if place >= 0)
    pieces = "".join(student.tokenizer.decode([token]) for token, place in zip(ids, places) if place < 0)
    assert (pieces != "") == ("think>" in text and "<thin>" not in text)
    if "think>" not in text:
        assert (theirs, places) == (ids, list(range(len(ids))))


def test_one_family_has_nothing_to_map(processors):
    student, _, teacher = processors
    assert vold.tags_of(student, teacher) == {}


def test_tokenizers_that_differ_are_refused_by_name(tiny, tmp_path, processors):
    student, _, teacher = processors
    folder = tmp_path / "other"
    shutil.copytree(tiny / "text-only", folder)
    table = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = table["model"]["vocab"]
    inverse = {i: token for token, i in vocabulary.items()}
    vocabulary[inverse[300]], vocabulary[inverse[301]] = 301, 300
    (folder / "tokenizer.json").write_text(json.dumps(table))
    with pytest.raises(common.UserError, match="differ in 2 tokens: 300 is"):
        vold.tags_of(student, common.Processor(str(folder)))
    with pytest.raises(common.UserError, match="differ in 2 tokens.*None"):
        vold.tags_of(common.Processor(str(tiny / "tagged")), teacher)  # the student writes tokens that the teacher has not


QWEN3 = (  # what matters of its template: a text-only model's takes the question from a string, and from nothing else
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_text_only_teacher_sees_the_question(tiny):
    context = vold.question({"problem": "<image>How many?"}, vold.Args())
    teacher, sighted = (common.Processor(str(tiny / name)) for name in ("tagged", "student"))
    teacher.tokenizer.chat_template = sighted.tokenizer.chat_template = QWEN3
    assert "user\nHow many?<|im_end|>" in teacher.render(context) and teacher.complaint(context, 500) is None
    assert "leaves out a part of the prompt ('How many?')" in sighted.complaint(context, 500)  # and no prompt loses its question silently


def test_the_teacher_reads_the_question_in_its_own_template(tiny, tiny_rows, processors, monkeypatch):
    student, teacher, args = processors[0], common.Processor(str(tiny / "tagged")), vold.Args(group=1)
    teacher.tokenizer.chat_template = QWEN3.replace("<|im_start|>assistant", "<|im_start|>assistant\n<think>")
    context = vold.question(tiny_rows[0], args)
    monkeypatch.setattr(common, "sample_responses", lambda engine, rows, contexts, args, kind: [
        kind(rows[0], {"question": student.encode(context)}, common.Response([1], [0.0], True))])
    models = common.Models(student, *[None] * 4, 0)
    (sample,) = vold.rollout([tiny_rows[0]], models, vold.Reader(teacher, {}), args)
    assert sample.prompts["teacher"].ids == teacher.encode(context).ids != sample.prompts["question"].ids == student.encode(context).ids


# ------------------------------------------------------------------------------------------------------------------- the real script
def arguments(tiny, output, **changes):
    values = dict(teacher=tiny / "tagged", column_text="text_problem", trace_data=tiny / "rows.parquet", trace_column="text_problem", trace_rows=9,
                  ignore_images="", sft_steps=2, sft_batch=4, prompts=4, group=2, eval_rows=4, measure_share=1) | changes
    return ["vold.py", *(part for part in flags(tiny, output, **values) if part != "")]


def cold_start(tiny, folder):
    """Traces that ended, as a trained teacher writes them: an untrained one never stops."""
    rows = common.Rows(str(tiny / "rows.parquet"), "train", {"problem": "problem"})
    folder.mkdir(parents=True)
    records = [{"row": i, "problem": rows[i]["text_problem"], "answer": rows[i]["answer"], "finished": i != 5,
                "response": f"<think>{rows[i]['solution']}</think>\n\\boxed{{{rows[i]['answer'] if i % 2 else 'x'}}}"} for i in range(9)]
    (folder / "records-0.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (folder / "made_from.json").write_text(json.dumps({"instruction": INSTRUCTION}))
    return records


@pytest.mark.parametrize("ranks", [0, 2])
def test_all_stages(tiny, tmp_path, ranks):
    argv = arguments(tiny, tmp_path / "run", max_response=40, temperature=3.0)  # hot enough for an untrained model to end sometimes
    result = run_script(*argv, torchrun=ranks)
    assert result.returncode == 0, result.stderr
    assert "traces for 9 questions" in result.stdout and "stage 1" in result.stdout and "stage 2" in result.stdout
    before = load_file(tiny / "student" / "model.safetensors")
    for stage in ("sft", "rl"):
        after = load_file(tmp_path / "run" / stage / "final" / "model.safetensors")
        tower = [key for key in before if ".visual." in key]
        assert tower and all(torch.equal(before[key], after[key]) for key in tower), "the vision tower is frozen"
        assert any(not torch.equal(before[key], after[key]) for key in before if key not in tower)
        before = after
    last = json.loads((tmp_path / "run" / "rl" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"kl_wrong", "distilled_tokens", "distilled_responses", "distillation_share", "grad_norm_grpo", "acc@1", "reward"} <= set(last)
    assert 0 < last["distilled_responses"] <= 1
    refused = run_script(*argv)  # both stages are there
    assert refused.returncode != 0 and "rl already holds a run" in refused.stderr
    shutil.rmtree(tmp_path / "run" / "rl")  # as if stage 2 had failed
    other = run_script(*argv, "--sft-lr", "0.5", "--lora", "4")
    assert other.returncode != 0 and "was trained with other settings (sft_lr, lora)" in other.stderr
    again = run_script(*argv)
    assert again.returncode == 0 and "is there: going on with stage 2" in again.stdout and "stage 1," not in again.stdout, again.stderr
    assert json.loads((tmp_path / "run" / "rl" / "args.json").read_text())["student"] == str(tmp_path / "run" / "sft" / "final")


def test_traces_go_on_where_they_stopped_and_broken_ones_are_named(tiny, tmp_path):
    argv = arguments(tiny, tmp_path / "run", stage="traces", **dict.fromkeys(
        ("max_steps", "prompts", "group", "eval_data", "eval_split", "eval_rows", "eval_every", "data", "student", "micro_tokens", "sft_steps", "sft_batch",
         "measure_share", "column_text")))  # fmt: skip
    result = run_script(*argv)
    assert result.returncode == 0, result.stderr
    records = tmp_path / "run" / "traces" / "records-0.jsonl"
    lines = records.read_text().splitlines(keepends=True)
    records.write_text("".join(lines[:4]) + lines[4][:30])  # killed in the middle of a line
    again = run_script(*argv)
    assert again.returncode == 0 and "4 of them written before" in again.stdout, again.stderr
    assert sorted(json.loads(line)["row"] for line in records.read_text().splitlines()) == sorted(json.loads(line)["row"] for line in lines)
    records.write_text(lines[0] + lines[1][:30] + "\n" + lines[2])  # and damaged in the middle of the file
    broken = run_script(*argv)
    assert broken.returncode != 0 and "records-0.jsonl, line 2" in broken.stderr


def test_which_traces_are_learnt_from(tiny, tmp_path, processors):
    records = cold_start(tiny, tmp_path / "traces")
    def read(folder="traces", **changes):
        return [r["row"] for r in vold.read_traces(tmp_path / folder, processors[0], vold.Args(**{"instruction": INSTRUCTION} | changes))]

    assert read() == [0, 1, 2, 3, 4, 6, 7, 8] and records[5]["finished"] is False
    assert read(right_traces_only=True) == [1, 3, 7]
    with pytest.raises(common.UserError, match="holds no traces"):
        read("nowhere")
    with pytest.raises(common.UserError, match="was written for another --instruction"):
        read(instruction="Be brief.")
    with pytest.raises(common.UserError, match="row 0: the prompt has"):
        read(max_prompt=5)
    file = tmp_path / "traces" / "records-0.jsonl"
    file.write_text("".join(json.dumps(r | {"answer": None}) + "\n" for r in records))
    with pytest.raises(common.UserError, match="needs answers"):
        read(right_traces_only=True)


def sft_arguments(tiny, output, traces, **changes):
    drop = dict.fromkeys(("teacher", "trace_data", "trace_column", "trace_rows", "ignore_images", "column_text", "data", "prompts", "group", "max_steps",
                          "measure_share"))  # fmt: skip
    return arguments(tiny, output, stage="sft", traces=traces, **drop | changes)


def test_eq_4_stage_1_logs_the_mean_over_all_tokens_on_any_number_of_ranks(tiny, tmp_path, processors):
    student = processors[0]
    records = cold_start(tiny, tmp_path / "traces")
    kept = [r for r in records if r["finished"]]
    logs = []
    for ranks in (0, 2):
        result = run_script(*sft_arguments(tiny, tmp_path / f"run-{ranks}", tmp_path / "traces", sft_steps=1, sft_batch=8), torchrun=ranks)
        assert result.returncode == 0, result.stderr
        logs.append(json.loads((tmp_path / f"run-{ranks}" / "sft" / "metrics.jsonl").read_text().splitlines()[-1]))
    assert logs[1]["nll"] == pytest.approx(logs[0]["nll"], abs=2e-6) and logs[1]["grad_norm"] == pytest.approx(logs[0]["grad_norm"], rel=1e-4)
    lm = common.Model(str(tiny / "student"), torch.float64).lm
    total = count = 0
    args = vold.Args(instruction=INSTRUCTION)
    for r in kept:
        prompt = student.encode(vold.question(r, args)).ids
        ids = student.tokenizer(r["response"], add_special_tokens=False)["input_ids"] + [student.tokenizer.eos_token_id]
        tokens = torch.tensor([prompt + ids])
        with torch.no_grad():
            log_p = lm(input_ids=tokens, mm_token_type_ids=torch.zeros_like(tokens)).logits[0, :, : student.vocab].log_softmax(-1)
        total -= sum(log_p[len(prompt) + t - 1, token].item() for t, token in enumerate(ids))
        count += len(ids)
    assert logs[0]["nll"] == pytest.approx(total / count, rel=1e-5)


def rl_arguments(tiny, output, **changes):
    return arguments(tiny, output, stage="rl", **dict.fromkeys(("trace_data", "trace_column", "trace_rows", "sft_steps", "sft_batch")) | changes)


@pytest.mark.parametrize("changes", [
    {"beta": 0, "measure_share": None, "teacher": None}, {"mask": "none", "updates": 2, "ratio": "sequence"}, {"mask": "group", "estimator": "k3"},
    {"teacher": "text-only", "kl_tokens": "sum", "beta_decay": 0.01, "beta_min": 0.05}, {"lora": 4, "dtype": "bfloat16"},
])  # fmt: skip
def test_stage_2_in_every_variant(tiny, tmp_path, changes):
    changes = changes | ({"teacher": tiny / "text-only"} if changes.get("teacher") else {})
    result = run_script(*rl_arguments(tiny, tmp_path / "run", **changes))
    assert result.returncode == 0, result.stderr
    last = json.loads((tmp_path / "run" / "rl" / "metrics.jsonl").read_text().splitlines()[-1])
    assert ("distilled_tokens" in last) == (changes.get("beta") != 0) and last["grad_norm"] >= 0


@pytest.mark.parametrize("message, changes", [
    ("--ignore-images", {"ignore_images": None, "no_ignore_images": ""}), ("at least 2", {"group": 1}), ("must not be negative", {"beta": -1}),
    ("--mask would have no effect", {"beta": 0, "mask": "none", "measure_share": None, "teacher": None}),
    ("--teacher would have no effect", {"beta": 0, "measure_share": None}), ("--beta-min would have no effect", {"beta_min": 0.1}),
    ("--freeze-vision would have no effect", {"freeze_vision": ""}), ("--sft-lr would have no effect", {"sft_lr": 1}),
    ("--column-text NAME", {"column_text": "nothing"}), ("is a text-only model", {"student": "tagged"}),
])  # fmt: skip
def test_bad_settings(tiny, tmp_path, message, changes):
    changes = changes | ({"student": tiny / "tagged"} if "student" in changes else {})
    script, *argv = rl_arguments(tiny, tmp_path / "run", **changes)
    assert message in refusal(script, argv)
    assert not (tmp_path / "run").exists()


def test_images_are_refused_whatever_their_column_is_called(tiny, tmp_path):
    import datasets

    data = datasets.load_dataset("parquet", data_files=str(tiny / "rows.parquet"), split="train")
    data.rename_column("images", "picture").to_parquet(tmp_path / "rows.parquet")
    result = run_script(*rl_arguments(tiny, tmp_path / "run", ignore_images=None, no_ignore_images="", data=tmp_path / "rows.parquet"))
    assert result.returncode != 0 and "has images (column 'picture')" in result.stderr


def test_stage_1_needs_traces_that_end(tiny, tmp_path):
    nothing = run_script(*sft_arguments(tiny, tmp_path / "run", None))
    assert nothing.returncode != 0 and "--stage sft needs the folder of traces" in nothing.stderr
    records = cold_start(tiny, tmp_path / "traces")
    (tmp_path / "traces" / "records-0.jsonl").write_text("".join(json.dumps(r | {"finished": False}) + "\n" for r in records))
    long = run_script(*sft_arguments(tiny, tmp_path / "run", tmp_path / "traces"))
    assert long.returncode != 0 and "9 traces, 9 reached --max-response" in long.stderr and "nothing is left to learn from" in long.stderr


def test_an_answer_that_no_response_can_give_is_named(tiny, tmp_path):
    import datasets

    data = datasets.load_dataset("parquet", data_files=str(tiny / "rows.parquet"), split="train")
    data = data.map(lambda row, i: {"answer": "\\frac{1" if i == 3 else row["answer"]}, with_indices=True)
    data.to_parquet(tmp_path / "rows.parquet")
    result = run_script(*rl_arguments(tiny, tmp_path / "run", data=tmp_path / "rows.parquet"))
    assert result.returncode != 0 and "row 3: the answer" in result.stderr and "cannot be written inside" in result.stderr
