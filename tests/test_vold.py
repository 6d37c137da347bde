"""VOLD: the estimators' gradients, masks, the teacher's tokens, the three stages as a user runs them, and refusals."""

import json
import re
import shutil
from types import SimpleNamespace

import common
import vold

import pytest
import torch
from conftest import flags, refusal, run_script
from safetensors.torch import load_file

VOCABULARY = 12
INSTRUCTION = vold.PRESETS["toy"]["instruction"]


def estimate_gradients(z, y, ids, estimator):
    """Gradient of the estimate at each sampled token, [N, V]: one row of logits z [V] for all of them."""
    rows = z.expand(len(ids), -1).clone().requires_grad_()
    log_p = common.gather(rows.log_softmax(-1), ids)
    log_q = common.gather(y.expand(len(ids), -1).log_softmax(-1), ids)
    return torch.autograd.grad(vold.distance(log_p, log_q, estimator).sum(), rows)[0]


EXACT = {
    "k1": lambda p, q: torch.zeros_like(p),
    "k2": lambda p, q: p * ((p / q).log() - (p * (p / q).log()).sum()),  # of KL(p || q), by hand
    "k3": lambda p, q: p - q,  # of KL(q || p)
}


@pytest.mark.parametrize("estimator", EXACT)
def test_eq_3_the_mean_gradient_of_the_estimators(estimator):
    generator = torch.Generator().manual_seed(0)
    z, y = torch.randn(2, VOCABULARY, dtype=torch.float64, generator=generator)
    p, q = z.softmax(-1), y.softmax(-1)
    exact = EXACT[estimator](p, q)
    each = estimate_gradients(z, y, torch.arange(VOCABULARY), estimator)
    # The expectation, summed over the vocabulary.
    torch.testing.assert_close(p @ each, exact, rtol=1e-10, atol=1e-12)
    n = 200_000
    drawn = each[torch.multinomial(p, n, replacement=True, generator=generator)]
    error = (drawn.mean(0) - exact).norm()
    assert error < 4 * (drawn.var(0).sum() / n).sqrt()  # what sampling comes to, and no more
    if estimator == "k2":
        r = z.clone().requires_grad_()
        kl = common.kl(r.log_softmax(-1), y.log_softmax(-1))
        torch.testing.assert_close(torch.autograd.grad(kl, r)[0], exact, rtol=1e-10, atol=1e-12)


def test_eq_6_the_mask():
    correct = [True, False, False, False, True, True]
    assert vold.distilled(correct, 2, "response").tolist() == [0, 1, 1, 1, 0, 0]  # 1 - r
    assert vold.distilled(correct, 2, "group").tolist() == [0, 0, 1, 1, 0, 0]
    assert vold.distilled(correct, 2, "none").tolist() == [1] * 6
    assert vold.distilled(correct, 3, "group").tolist() == [0] * 6


def test_kdrls_falling_beta():
    args = vold.Args(beta=5e-3, beta_decay=5e-5, beta_min=1e-3)
    found = [vold.beta(args, step) for step in (1, 2, 81, 500)]
    assert found == pytest.approx([5e-3, 4.95e-3, 1e-3, 1e-3])


def test_a_response_that_was_cut_off_is_wrong():
    done, cut = (
        common.Sample(
            {"problem": "", "answer": "4"}, {}, common.Response([1], finished, "\\boxed{4}")
        )
        for finished in (True, False)
    )
    common.reward_answers([done, cut], 2)
    assert (done.correct, cut.correct, done.reward, cut.reward) == (True, False, 1.0, 0.0)


# =============================================================================================== the teacher's tokens
@pytest.fixture(scope="module")
def processors(tiny):
    return [common.Processor(str(tiny / name)) for name in ("student", "tagged", "text-only")]


TEXTS = [
    "<think>\n1+1=2.</think>\n\n\\boxed{2}",
    "<think></think>",
    "so <think>3</think> and <think>4",
    "no tag <thin> here",
    "</think>",
    "\u00e9<think>\u00e9</think>\u00e9",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_the_teacher_reads_its_own_tags(processors, text):
    student, teacher, _ = processors
    tags = vold.tags_of(student, teacher)
    assert tags == ["</think>", "<think>"]
    ids = student.tokenizer(text, add_special_tokens=False)["input_ids"]
    ids.append(student.tokenizer.eos_token_id)
    theirs, places = vold.reread(ids, student, teacher, tags)
    assert teacher.tokenizer.decode(theirs) == student.tokenizer.decode(ids)
    number = {tag: teacher.tokenizer.convert_tokens_to_ids(tag) for tag in tags}
    written = [number[tag] for tag in re.findall("</?think>", text)]
    assert written == [i for i in theirs if i in number.values()]
    assert len(places) == len(ids) and places[-1] == len(theirs) - 1  # the end of the turn is known
    assert all(theirs[place] == token for token, place in zip(ids, places) if place >= 0)
    unknown = [token for token, place in zip(ids, places) if place < 0]
    assert (unknown != []) == ("think>" in text)
    if "think>" not in text:
        assert (theirs, places) == (ids, list(range(len(ids))))


def test_one_family_has_nothing_to_map(processors):
    student, _, teacher = processors
    assert vold.tags_of(student, teacher) == []


def test_tokenizers_that_differ_are_refused_by_name(tiny, tmp_path, processors):
    student, tagged, teacher = processors
    folder = tmp_path / "other"
    shutil.copytree(tiny / "text-only", folder)
    table = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = table["model"]["vocab"]
    inverse = {i: token for token, i in vocabulary.items()}
    vocabulary[inverse[300]], vocabulary[inverse[301]] = 301, 300
    (folder / "tokenizer.json").write_text(json.dumps(table))
    with pytest.raises(common.UserError, match="differ in 2 tokens") as refused:
        vold.tags_of(student, common.Processor(str(folder)))
    assert str(sorted([inverse[300], inverse[301]])) in refused.value.code
    with pytest.raises(common.UserError, match="differ in 2 tokens.*</think>"):
        vold.tags_of(tagged, teacher)  # the student writes tokens that the teacher has not


def test_a_teacher_with_pieces_of_its_own_is_refused(processors):
    """It would split the student's text otherwise; an added token is cut out of the text before, and mapped."""
    student, _, teacher = processors
    table = teacher.tokenizer.get_vocab()
    added = {"<|new|>": len(table)}
    tokenizer = SimpleNamespace(
        get_vocab=lambda: table | added | {"zzqx": len(table) + 1}, added_tokens_encoder=added
    )
    with pytest.raises(common.UserError, match=r"differ in 1 tokens: \['zzqx'\]"):
        vold.tags_of(student, SimpleNamespace(name="other", tokenizer=tokenizer))


QWEN3 = (  # what matters of its template: a text-only model's takes the question from a string alone
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_text_only_teacher_sees_the_question(tiny):
    context = vold.question({"problem": "<image>How many?"}, vold.Args())
    teacher, sighted = (common.Processor(str(tiny / name)) for name in ("tagged", "student"))
    teacher.tokenizer.chat_template = sighted.tokenizer.chat_template = QWEN3
    assert "user\nHow many?<|im_end|>" in teacher.render(context)
    teacher.check(context, 500)
    with pytest.raises(ValueError, match="leaves out"):  # no prompt loses its question silently
        sighted.check(context, 500)


def test_the_teacher_reads_the_question_in_its_own_template(tiny, tiny_rows, processors):
    student, teacher = processors[0], common.Processor(str(tiny / "tagged"))
    opened = QWEN3.replace("<|im_start|>assistant", "<|im_start|>assistant\n<think>")
    teacher.tokenizer.chat_template = opened
    args, read = vold.Args(), []

    def hidden(batch):
        read.append(batch["input_ids"])
        return torch.zeros(len(batch["cols"]), 4)

    run = SimpleNamespace(processor=student, reader=teacher, tags=vold.tags_of(student, teacher))
    run.teacher, run.head = hidden, torch.zeros(teacher.vocab, 4)
    response = student.tokenize("4") + [student.tokenizer.eos_token_id]
    sample = common.Sample(tiny_rows[0], {}, common.Response(response))
    known, log_q = vold.teacher_log_probs([sample], run, args)
    context = vold.question(tiny_rows[0], args)
    assert read[0].tolist() == [teacher.encode(context).ids + response]
    assert teacher.encode(context).ids != student.encode(context).ids
    assert known.tolist() == [1.0] * len(response)
    assert log_q.exp().tolist() == pytest.approx([1 / teacher.vocab] * len(response))
    known, log_q = vold.teacher_log_probs(
        [], run, args
    )  # a rank without work reads with the others
    assert len(read) == 2 and known.tolist() == log_q.tolist() == []


# =============================================================================================== the real script
def arguments(tiny, output, **changes):
    values = dict(
        teacher=tiny / "tagged",
        column_text="text_problem",
        trace_data=tiny / "rows.parquet",
        trace_column="text_problem",
        trace_rows=9,
        sft_steps=2,
        sft_save_every=1,
        sft_batch=4,
        prompts=4,
        group=2,
        eval_rows=4,
        measure_share=1,
    )
    return ["vold.py", *flags(tiny, output, **values | changes)]


def write_traces(tiny, folder, **settings):
    """Traces that ended, as a trained teacher writes them: an untrained one rarely stops. The sixth was cut off."""
    import datasets

    rows = datasets.load_dataset("parquet", data_files=str(tiny / "rows.parquet"), split="train")
    folder.mkdir(parents=True)
    records = []
    for i in range(9):
        text = f"<think>{rows[i]['solution']}</think>\n\\boxed{{{rows[i]['answer']}}}"
        record = {"index": i, "problem": rows[i]["text_problem"], "response": text}
        records.append(record | {"finished": i != 5})
    halves = {"records-0.jsonl": records[::2], "records-1.jsonl": records[1::2]}
    for name, half in halves.items():
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in half))
    made_from = {"instruction": INSTRUCTION} | settings
    (folder / "made_from.json").write_text(json.dumps(made_from))
    return records


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights_of(folder):
    return (folder / "final" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("ranks", [0, 2])
def test_all_stages(tiny, tmp_path, ranks):
    # Hot and long enough for an untrained model to end sometimes.
    argv = arguments(tiny, tmp_path / "run", max_response=120, temperature=2.0, save_every=1)
    result = run_script(*argv, ranks=ranks)
    assert result.returncode == 0, result.stderr
    assert "traces of 9 questions, 0 written before" in result.stdout
    before = load_file(tiny / "student" / "model.safetensors")
    for stage in ("sft", "rl"):
        after = load_file(tmp_path / "run" / stage / "final" / "model.safetensors")
        tower = [key for key in before if ".visual." in key]
        assert tower and all(torch.equal(before[key], after[key]) for key in tower)  # it is frozen
        rest = [key for key in before if key not in tower]
        assert any(not torch.equal(before[key], after[key]) for key in rest)
        before = after
    last = lines_of(tmp_path / "run" / "rl")[-1]
    named = {"kl_wrong", "distilled_tokens", "distilled_responses", "distillation_share"}
    assert named | {"grad_norm_grpo", "acc@1", "reward", "distance", "clipped"} <= set(last)
    assert 0 < last["distilled_responses"] <= 1 and last["beta"] == 0.1
    settings = json.loads((tmp_path / "run" / "rl" / "args.json").read_text())
    assert settings["student"] == str(tmp_path / "run" / "sft" / "final")


def test_the_same_line_goes_on_with_the_stage_that_is_not_finished(tiny, tmp_path):
    import datasets

    run, asked = tmp_path / "run", tmp_path / "asked.parquet"
    rows = datasets.load_dataset("parquet", data_files=str(tiny / "rows.parquet"), split="train")
    rows.select(range(9)).to_parquet(asked)
    traces = dict(trace_data=asked, traces=tmp_path / "traces", trace_rows=0, max_response=8)
    argv = arguments(tiny, run, save_every=1, **traces)
    made_from = dict(teacher=str(tiny / "tagged"), trace_data=str(asked), trace_split="train")
    made_from |= dict(trace_column="text_problem", trace_rows=0, max_response=8)
    made_from |= dict(temperature=1.0, top_p=1.0, top_k=0, seed=0, max_prompt=1024)
    write_traces(tiny, tmp_path / "traces", **made_from)
    first = run_script(*argv)
    assert first.returncode == 0 and "all 9 traces are there" in first.stdout, first.stderr
    assert "8 of 9 traces ended" in first.stdout
    finals = {stage: weights_of(run / stage) for stage in ("sft", "rl")}

    done = run_script(*argv)
    assert done.returncode == 0 and "rl/final is there: this run is finished" in done.stdout
    shutil.rmtree(run / "rl" / "final")  # killed in rl
    again = run_script(*argv)
    assert again.returncode == 0, again.stderr
    assert "sft/final is there: traces and sft are finished" in again.stdout
    assert again.stdout.count("going on after step 1") == 1
    assert weights_of(run / "rl") == finals["rl"]
    shutil.rmtree(run / "rl")  # killed in sft
    shutil.rmtree(run / "sft" / "final")
    again = run_script(*argv)
    assert again.returncode == 0 and "going on after step 1" in again.stdout, again.stderr
    assert {stage: weights_of(run / stage) for stage in ("sft", "rl")} == finals

    shutil.rmtree(run / "rl")
    assert "other settings (sft_lr 5e-05 -> 0.5, dtype 'float32' -> 'bfloat16')" in refusal(
        argv[0], [*argv[1:], "--sft-lr", "0.5", "--dtype", "bfloat16"]
    )


def traces_arguments(tiny, output, **changes):
    return arguments(tiny, output, stage="traces", rollout_batch=2, **changes)


def test_traces_go_on_where_they_stopped_on_any_number_of_ranks(tiny, tmp_path):
    folder = tmp_path / "run" / "traces"
    argv = traces_arguments(tiny, tmp_path / "run")
    result = run_script(*argv)
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "run" / "sft").exists() and not (tmp_path / "run" / "rl").exists()
    file = folder / "records-0.jsonl"
    lines = file.read_text().split("\n")[:-1]
    whole = vold.read_records(folder)
    assert len(lines) == 9
    assert whole[0].keys() == {"index", "problem", "images", "response", "finished"}

    file.write_text("\n".join([*lines[:4], lines[4][:30]]))  # killed in the middle of a line
    kept = sorted((json.loads(line) for line in lines[:4]), key=lambda record: record["index"])
    assert vold.read_records(folder) == kept
    two = run_script(*argv, ranks=2)
    assert two.returncode == 0 and "9 questions, 4 written before" in two.stdout, two.stderr
    assert (folder / "records-1.jsonl").exists()
    assert vold.read_records(folder) == whole  # the same ones: a seed a row
    ended = [part.read_text()[-1] for part in folder.glob("records-*.jsonl")]
    assert ended == ["\n", "\n"]
    one = run_script(*argv)
    assert one.returncode == 0 and "all 9 traces are there" in one.stdout, one.stderr
    other = refusal(*traces_arguments(tiny, tmp_path / "run", seed=1)[:1], argv[1:] + ["--seed", 1])
    assert "made with other settings (seed 0 -> 1)" in other


def test_which_traces_are_learned_from(tiny, tmp_path):
    records = write_traces(tiny, tmp_path / "traces")

    def read(folder="traces", instruction=INSTRUCTION):
        return vold.read_traces(tmp_path / folder, vold.Args(instruction=instruction))

    assert [r["index"] for r in read()] == [0, 1, 2, 3, 4, 6, 7, 8]
    assert not records[5]["finished"]
    with pytest.raises(common.UserError, match="0 of 0 traces ended.*--stage traces"):
        read("nowhere")
    with pytest.raises(common.UserError, match="other settings .instruction.*Be brief"):
        read(instruction="Be brief.")
    for file in (tmp_path / "traces").glob("records-*"):
        file.write_text(file.read_text().replace("true", "false"))
    with pytest.raises(common.UserError, match="0 of 9 traces ended within --max-response"):
        read()


def test_a_trace_ends_and_its_control_tokens_stay_text(processors):
    student, args = processors[0], vold.Args()
    end = student.tokenizer.eos_token
    trace = {"index": 0, "problem": "a", "response": f"one{end}two"}
    ids = vold.imitated(trace, student, args).response.ids
    assert ids[-1] == student.tokenizer.eos_token_id and ids.count(ids[-1]) == 1
    assert student.tokenizer.decode(ids) == f"one{end}two{end}"


def test_eq_4_sft_logs_the_mean_over_all_tokens_on_any_number_of_ranks(tiny, tmp_path, processors):
    student = processors[0]
    records = write_traces(tiny, tmp_path / "traces")
    logs = []
    for ranks in (0, 2):
        folder = tmp_path / f"run-{ranks}"
        changes = dict(stage="sft", traces=tmp_path / "traces", sft_steps=1, sft_batch=8)
        result = run_script(*arguments(tiny, folder, **changes), ranks=ranks)
        assert result.returncode == 0, result.stderr
        assert not (folder / "rl").exists()
        logs.append(lines_of(folder / "sft")[-1])
    assert logs[1]["loss"] == pytest.approx(logs[0]["loss"], abs=2e-6)
    assert logs[1]["grad_norm"] == pytest.approx(logs[0]["grad_norm"], rel=1e-4)
    assert "sampler_gap" not in logs[0] and logs[0]["entropy"] > 0
    lm = common.Model(str(tiny / "student"), torch.float64).lm
    total = count = 0
    args = vold.Args(instruction=INSTRUCTION)
    for r in [record for record in records if record["finished"]]:
        prompt = student.encode(vold.question(r, args)).ids
        ids = student.tokenizer(r["response"], add_special_tokens=False)["input_ids"]
        ids.append(student.tokenizer.eos_token_id)
        tokens = torch.tensor([prompt + ids])
        inputs = dict(input_ids=tokens, mm_token_type_ids=torch.zeros_like(tokens))
        with torch.no_grad():
            log_p = lm(**inputs).logits[0, :, : student.vocab].log_softmax(-1)
        for t, token in enumerate(ids):
            total -= log_p[len(prompt) + t - 1, token].item()
        count += len(ids)
    assert logs[0]["loss"] == pytest.approx(total / count, rel=1e-5)


VARIANTS = [
    {"beta": 0},
    {"mask": "none", "updates": 2, "ratio": "sequence"},
    {"mask": "group", "estimator": "k3"},
    {"teacher": "text-only", "kl_tokens": "sum", "beta_decay": 0.01, "beta_min": 0.05},
    {"dtype": "bfloat16"},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_rl_in_every_variant(tiny, tmp_path, changes):
    named = {"teacher": tiny / changes["teacher"]} if "teacher" in changes else {}
    argv = arguments(tiny, tmp_path / "run", stage="rl", **changes | named)
    result = run_script(*argv)
    assert result.returncode == 0, result.stderr
    first, last = lines_of(tmp_path / "run" / "rl")[-2:]
    assert ("distilled_tokens" in last) == (changes.get("beta") != 0) and last["grad_norm"] >= 0
    if "beta_decay" in changes:
        assert (first["beta"], last["beta"]) == pytest.approx((0.1, 0.09))
    assert not (tmp_path / "run" / "sft").exists()


REFUSED = [
    ("--group is 1; it must lie in [2, inf]", {"group": 1}),
    ("--beta is -1", {"beta": -1}),
    ("--clip-low is 1.5", {"clip_low": 1.5}),
    ("--sft-batch is 0", {"sft_batch": 0}),
    ("--prompts 4 has to be a multiple of ranks x updates, 1 x 3", {"updates": 3}),
    ("--freeze-vision is False", {"freeze_vision": False}),
    ("has no chat template", {"teacher": "silent"}),
    ("has no column 'nothing'", {"column_text": "nothing"}),
    ("differ in", {"student": "tagged", "teacher": "text-only"}),
]


@pytest.mark.parametrize("message, changes", REFUSED, ids=[message for message, _ in REFUSED])
def test_what_rl_cannot_use_stops_before_any_stage(tiny, tmp_path, message, changes):
    if changes.get("teacher") == "silent":
        shutil.copytree(tiny / "tagged", tiny / "silent", dirs_exist_ok=True)
        (tiny / "silent" / "chat_template.jinja").unlink()
    models = {name: tiny / changes[name] for name in ("student", "teacher") if name in changes}
    script, *argv = arguments(tiny, tmp_path / "run", **changes | models)
    assert message in refusal(script, argv)
    assert not (tmp_path / "run" / "traces").exists() and not (tmp_path / "run" / "sft").exists()


def test_the_models_of_a_stage_are_gone_before_the_next(tiny, tmp_path, monkeypatch):
    """The traces' engine is closed and freed, and sft's student with its optimizer, before the next models are made."""
    import gc
    import weakref

    closed, made, alive, students = [], [], [], []
    load_model = common.load_model

    def load(name, args, trained, **more):
        gone = [student() is None for student in students]
        assert all(gone), f"{name} is loaded beside the student of the stage before"
        model = load_model(name, args, trained, **more)
        if trained and args.stage == "sft":
            students.append(weakref.ref(model))
        return model

    class Engine(common.HFEngine):
        def __init__(self, name, processor, args):
            alive.append(sum(engine() is not None for engine in made))
            super().__init__(name, processor, args)
            made.append(weakref.ref(self))

        def close(self):
            closed.append(len(made))

    monkeypatch.setitem(common.ENGINES, "hf", Engine)
    monkeypatch.setattr(common, "load_model", load)
    argv = arguments(tiny, tmp_path / "run", max_response=120, temperature=2.0, eval_data="")
    gc.disable()  # it would come by chance, and late
    try:
        result = run_script(*argv)
    finally:
        gc.enable()
    assert result.returncode == 0, result.stderr
    assert len(students) == 1 and len(made) == 3 and closed == [1, 2, 3] and alive == [0, 0, 0]
