"""The shared pieces: the chunked vocabulary loss, flat tokens, encoding, answers, data order."""

import math

import common

import pytest
import torch
from gradients import fixed_rows


# ------------------------------------------------------- the vocabulary, in chunks
def problem(dtype, n=23, v=37, h=8):
    torch.manual_seed(0)
    hidden = [torch.randn(n, h, dtype=dtype, requires_grad=True) for _ in range(2)]
    head = torch.randn(v, h, dtype=dtype, requires_grad=True)
    frozen = [
        (torch.randn(n, 5, dtype=dtype), torch.randn(v + 6, 5, dtype=dtype)) for _ in range(2)
    ]  # wider, more padding rows
    ids, weights = torch.randint(0, v - 2, (n,)), torch.rand(2, n, dtype=dtype)
    return hidden, head, frozen, ids, weights


def two_terms(a, b, c, d, ids):
    """A term with both student contexts and both teachers, and one with gathered ids."""
    a, b, c, d = (z.log_softmax(-1) for z in (a, b, c, d))
    return common.kl(a, (b.detach() + c - d).log_softmax(-1)) + common.kl(b, d), -common.gather(
        a, ids
    )


@pytest.mark.parametrize("chunk", [1, 7, 23, 1000])
def test_vocab_loss_equals_the_whole_logits(chunk):
    """Loss, terms and gradients are those of autograd through whole logits, for every chunk size."""
    hidden, head, frozen, ids, weights = problem(torch.float64)
    vocab = 35  # fewer than either head has
    loss, terms = common.vocab_loss(two_terms, weights, hidden, head, frozen, [ids], vocab, chunk)
    (3 * loss).backward()
    ours = [loss.detach(), terms, *(x.grad.clone() for x in (*hidden, head))]
    for x in (*hidden, head):
        x.grad = None
    logits = [x @ head[:vocab].T for x in hidden] + [x @ w[:vocab].T for x, w in frozen]
    whole = torch.stack(two_terms(*logits, ids))
    total = (weights * whole).sum()
    (3 * total).backward()
    for got, expected in zip(
        ours, [total.detach(), whole.detach(), *(x.grad for x in (*hidden, head))]
    ):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
    assert head.grad[vocab:].abs().max() == 0 and head.grad[:vocab].abs().max() > 1e-2


def test_vocab_loss_passes_gradcheck():
    torch.manual_seed(0)
    hidden = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    head = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    target = torch.randn(4, 5, dtype=torch.float64).log_softmax(-1)

    def loss(hidden, head):
        return common.vocab_loss(
            lambda z, q: (common.kl(z.log_softmax(-1), q),),
            torch.ones(1, 4, dtype=torch.float64),
            [hidden],
            head,
            extras=[target],
            chunk=3,
        )[0]

    assert torch.autograd.gradcheck(loss, (hidden, head))


def test_vocab_loss_in_bfloat16_is_close_to_float64():
    """bfloat16 states and heads, float32 terms: loss within 1 %, gradients within 3 %, and no worse in tiny chunks."""
    hidden, head, frozen, ids, weights = problem(torch.bfloat16)
    results = {}
    for name, dtype, chunk in (
        ("bf16", torch.bfloat16, 23),
        ("bf16, chunks of 1", torch.bfloat16, 1),
        ("float64", torch.float64, 23),
    ):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (*hidden, head)]
        pairs = [(x.to(dtype), w.to(dtype)) for x, w in frozen]
        loss, _ = common.vocab_loss(
            two_terms, weights.float(), leaves[:2], leaves[2], pairs, [ids], 35, chunk
        )
        loss.backward()
        results[name] = [loss.detach(), *(x.grad for x in leaves)]
    for name in ("bf16", "bf16, chunks of 1"):
        for i, (got, expected) in enumerate(zip(results[name], results["float64"])):
            assert (got.double() - expected.double()).norm() < (
                0.01 if i == 0 else 0.03
            ) * expected.double().norm(), (name, i)


def test_vocab_loss_needs_a_quarter_of_the_naive_memory():
    """At a real vocabulary; the full-size table comes from bench_loss.py."""
    from bench_loss import compare

    results = compare(tokens=64, width=64, chunk=4, repeats=1)
    assert results["chunked"]["MiB"] < results["naive"]["MiB"] / 4, results
    for key in ("loss", "gradient"):
        assert results["chunked"][key] == pytest.approx(results["naive"][key], rel=1e-5), results


def test_advantages_of_equal_rewards_are_exactly_zero():
    """The mean of some of them is not the reward itself in float32."""
    for group in range(2, 17):
        for reward in (0.1, 0.9, 1 / 3, 1.0):
            rewards = torch.full((2 * group,), reward)
            assert not common.group_advantages(rewards, group).any(), (group, reward)
    for rewards in ([1.0, 0, 0, 1], [1, 0, 0, 1], [True, False, False, True]):
        found = common.group_advantages(torch.tensor(rewards), 4)
        expected = torch.tensor([0.866, -0.866, -0.866, 0.866])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def test_what_the_clip_cuts():
    """At 0.8 .. 1.3: only what would go on in the direction that it has gone too far in."""
    ratio = torch.tensor([0.5, 0.5, 1.0, 1.0, 1.5, 1.5, 1.5])
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 0.0])
    found, cut = common.clipped_surrogate(ratio.log(), torch.zeros(7), advantages, 0.2, 0.3)
    expected = torch.tensor([0.5, -0.8, 1.0, -1.0, 1.3, -1.5, 0.0])
    torch.testing.assert_close(found, expected)
    assert cut.tolist() == [0, 1, 0, 0, 1, 0, 0]


def test_quantile_is_torchs():
    x, q = torch.randn(101), [0.0, 0.1, 0.4, 0.7, 0.999, 1.0]
    torch.testing.assert_close(common.quantile(x, q), x.quantile(torch.tensor(q)))
    assert common.quantile(torch.arange(6.0), [0.4, 0.7]).tolist() == [2.0, 3.5]


@pytest.mark.parametrize("shape", [(2, 7), (1, 1), (1, 9), (7,)], ids=str)
def test_vocab_loss_refuses_weights_that_would_broadcast(shape):
    hidden, head = torch.randn(7, 4), torch.randn(11, 4)
    with pytest.raises(ValueError, match=r"weights \[.*\] for 1 terms a token"):
        common.vocab_loss(lambda z: (z.logsumexp(-1),), torch.ones(shape), [hidden], head, chunk=3)


def test_vocab_loss_of_no_tokens_is_zero_with_zero_gradients():
    hidden, head = torch.zeros(0, 8, requires_grad=True), torch.randn(37, 8, requires_grad=True)
    loss, terms = common.vocab_loss(lambda z: (z.logsumexp(-1),), torch.zeros(1, 0), [hidden], head)
    loss.backward()
    assert (
        loss.item() == 0
        and terms.shape == (1, 0)
        and not head.grad.any()
        and hidden.grad.shape == (0, 8)
    )


def test_vocab_terms_are_those_of_the_loss():
    hidden, head, frozen, ids, weights = problem(torch.float32)
    _, terms = common.vocab_loss(two_terms, weights, hidden, head, frozen, [ids], 35, 7)
    again = common.vocab_terms(two_terms, [(x, head) for x in hidden] + frozen, [ids], 35, 5)
    torch.testing.assert_close(terms, again)


def test_kl_and_entropy_of_certain_and_impossible_tokens():
    a = torch.tensor([[0.0, -math.inf], [math.log(0.5), math.log(0.5)]], requires_grad=True)
    b = torch.tensor([[math.log(0.25), math.log(0.75)], [math.log(0.25), math.log(0.75)]])
    torch.testing.assert_close(
        common.kl(a, b), torch.tensor([math.log(4), math.log(2 / math.sqrt(3))])
    )
    torch.testing.assert_close(common.entropy(a), torch.tensor([0.0, math.log(2)]))
    common.kl(a, b).sum().backward()
    assert a.grad.isfinite().all()
    assert (
        common.kl(b, a.detach())[0] == math.inf
    )  # mass where the other has none: infinite, not hidden


# ------------------------------------------------------- flat tokens, encoding
def sample(length: int, prompt: int = 0) -> common.Sample:
    return common.Sample(
        {"index": 0}, {"x": common.Prompt([1] * prompt)}, common.Response([5] * length)
    )


def groups_of(lengths: list[int], limit: int, monkeypatch) -> list[list[int]]:
    """Lengths of the sequences in each micro-batch."""
    monkeypatch.setattr(common, "Micro", lambda part, *_: [len(s.response.ids) for s in part])
    return common.make_micros([sample(n) for n in lengths], ["x"], None, limit)


def test_micro_batches_cover_everything_once_and_sort_by_length(monkeypatch):
    groups = groups_of([5, 9, 4, 7, 7, 1, 3], 15, monkeypatch)
    assert groups == [[1, 3, 4], [5, 7], [7], [9]]
    assert groups_of([20, 3], 10, monkeypatch) == [
        [3],
        [20],
    ]  # one that is longer than the limit goes by itself
    assert groups_of([], 3, monkeypatch) == []


def test_contexts_count_towards_the_limit_of_a_micro_batch(monkeypatch):
    monkeypatch.setattr(common, "Micro", lambda part, *_: len(part))
    samples = [
        common.Sample(
            {}, {"x": common.Prompt([1]), "y": common.Prompt([1] * 3)}, common.Response([5])
        )
        for _ in range(4)
    ]
    assert common.make_micros(samples, ["x"], None, 8) == [4]
    assert common.make_micros(samples, ["x", "y"], None, 16) == [2, 2]


def test_micro_batches_of_a_rank_with_less_work_are_filled_up_with_empty_ones(monkeypatch):
    monkeypatch.setattr(common, "all_gather_object", lambda x: [x, 3])  # another rank has three
    assert groups_of([5, 9, 4], 10, monkeypatch) == [[4, 5], [9], []]
    assert groups_of([], 10, monkeypatch) == [[], [], []]


def test_micro_spreads_numbers_over_sampled_tokens(tiny):
    """Two responses, the second with a tool's two tokens in its middle, and an empty micro-batch."""
    processor = common.Processor(str(tiny / "text-only"))
    responses = [common.Response([10, 11], log_probs=[-1.0, -2.0])]
    responses += [
        common.Response([12, 13, 14, 15], log_probs=[-3.0, -4.0], mask=[True, False, False, True])
    ]
    prompt = {"x": common.Prompt([1, 2, 3])}
    samples = [
        common.Sample({"index": i}, prompt, r, advantage=float(i)) for i, r in enumerate(responses)
    ]
    m = common.Micro(samples, ["x"], processor)
    assert m.ids.tolist() == [10, 11, 12, 15] and m.length.tolist() == [2, 2, 2, 2]
    assert m.response.tolist() == [0, 0, 1, 1] and m.advantage.tolist() == [0, 0, 1, 1]
    assert m.sampled.tolist() == [-1, -2, -3, -4] and m.spread([7, 8]).tolist() == [7, 7, 8, 8]
    assert m.batch["rows"].tolist() == [0, 0, 1, 1] and m.batch["cols"].tolist() == [2, 3, 2, 5]
    empty = common.Micro([], ["x", "x"], processor)
    assert (
        len(empty.ids) == len(empty.length) == len(empty.sampled) == 0
        and len(empty.batch["input_ids"]) == 1
    )


def test_message_places_images_where_they_are_marked():
    def kinds(message):
        return ["*" if item["type"] == "image" else item["text"] for item in message["content"]]

    assert kinds(common.message("user", "<image>How many?", 1)) == ["*", "How many?"]
    assert kinds(common.message("user", "How many?", 1)) == ["*", "How many?"]
    assert kinds(common.message("user", "Is <image> like <image>?", 2)) == [
        "Is ",
        "*",
        " like ",
        "*",
        "?",
    ]
    assert kinds(common.message("user", "<image>\nHow many?", 0)) == ["How many?"]
    assert kinds(common.message("user", "Is <image> odd?", 2)) == [
        "*",
        "*",
        "Is  odd?",
    ]  # marks and images disagree: in front


def test_prompts_equal_the_transformers_processor(tiny, tiny_rows):
    """Expanded placeholders and pixels as transformers' own Qwen3VLProcessor makes them, where it can be built."""
    processor = common.Processor(str(tiny / "student"))
    row = tiny_rows[0]
    prompt = processor.encode(
        common.Context([common.message("user", row["problem"], 1)], row["images"])
    )
    width, height = row["images"][0].size
    tokens = (width // 32) * (height // 32)
    assert prompt.ids.count(processor.image_id) == tokens == 3
    assert prompt.pixels.shape == (tokens * 4, 3 * 2 * 16 * 16) and prompt.grid.tolist() == [
        [1, height // 16, width // 16]
    ]


def test_batch_points_at_the_positions_that_predict_the_response(tiny):
    """cols hold, for every response token, the position before it; the tokens there are checked by decoding."""
    processor = common.Processor(str(tiny / "text-only"))
    prompts = [common.Prompt([1, 2, 3]), common.Prompt([4, 5, 6, 7, 8])]
    batch = processor.batch(prompts, [common.Response([10, 11]), common.Response([12])])
    assert batch["input_ids"].tolist() == [
        [1, 2, 3, 10, 11, processor.tokenizer.pad_token_id],
        [4, 5, 6, 7, 8, 12],
    ]
    assert "attention_mask" not in batch
    assert batch["rows"].tolist() == [0, 0, 1] and batch["cols"].tolist() == [2, 3, 4]
    assert batch["input_ids"][batch["rows"], batch["cols"] + 1].tolist() == [10, 11, 12]


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_log_probs_do_not_depend_on_padding_or_neighbours(family, tmp_path):
    """Alone or in a batch with longer sequences and another image, a response has the same hidden states."""
    from conftest import make_tiny

    make_tiny(tmp_path, family)
    processor = common.Processor(str(tmp_path / "student"))
    rows, model = (
        fixed_rows(tmp_path, processor),
        common.Model(str(tmp_path / "student"), torch.float32),
    )
    contexts = [
        common.Context([common.message("user", rows[i]["problem"], 1)], rows[i]["images"])
        for i in range(2)
    ]
    contexts.append(common.Context([common.message("user", rows[0]["problem"] + " " * 9, 0)]))
    prompts = [processor.encode(c) for c in contexts]
    responses = [common.Response(ids) for ids in ([40, 41, 42], [50], [60, 61, 62, 63, 64])]
    with torch.no_grad():
        together = model(processor.batch(prompts, responses))
        alone = torch.cat([model(processor.batch([p], [r])) for p, r in zip(prompts, responses)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------- answers
@pytest.mark.parametrize(
    "text, answer",
    [
        (r"<reason>2 + 2</reason> \boxed{4}", "4"),
        (r"\boxed{3} no, \boxed{4}", "4"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{4} and \boxed{5", "4"),  # cut off: the last complete one
        (r"\boxed {4}", "4"),
        ("<reason>none fits</reason> (c)", "(c)"),
        ("<reason>none fits</reason>", None),
        ("so it is 4", None),
        ("", None),
    ],
)
def test_extract_answer(text, answer):
    assert common.extract_answer(text) == answer


@pytest.mark.parametrize(
    "prediction, answer, right",
    [
        ("12", "12", True),
        ("12.0", "12", True),
        ("1,200", "1200", True),
        ("-3", "\u22123", True),
        ("3/4", "0.75", True),
        (r"\frac{1}{2}", "0.5", True),
        ("12", "13", False),
        ("0.3333", "1/3", False),
        ("50\\%", "50", True),
        ("1/0", "1", False),
        ("B", "(B)", True),
        ("(b)", "B", True),
        ("B: blue", "B", True),
        ("B) blue", "(B)", True),
        ("because", "B", False),
        ("A", "B", False),
        (r"\text{Yes}", "yes", True),
        ("No.", "No", True),
        ("x^2+1", "1+x^2", True),
        ("x^2", "x^3", False),
        ("(1, 2)", "(1,2)", True),
        ("", "1", False),
        (None, "1", False),
        ("4", r"the answer is \boxed{4}", True),
        ("9" * 400, "9" * 399 + "8", False),
        ("__import__('os').system('true')", "0", False),
    ],
)
def test_is_correct(prediction, answer, right):
    assert common.is_correct(prediction, answer) is right


# ------------------------------------------------------- data order, schedule
def test_any_of_several_answers_is_right():
    assert (
        common.is_correct("US", ["USA", "US"])
        and common.is_correct("1200", ["1,200"])
        and not common.is_correct("UK", ["USA", "US"])
    )
    assert not common.is_correct("x", []) and not common.is_correct(None, ["x"])


def test_where_a_gpu_is_the_default_is_the_papers_first_setting(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for file, preset in (
        ("vgs", "2b"),
        ("vold", "3b"),
        ("ptdpo", "2b"),
        ("vigos", "3b"),
        ("reopold", "visual-3b"),
    ):
        method = __import__(file)
        assert common.parse_args(method.Args, method.PRESETS, method.RANGES, []).preset == preset


def test_data_order_repeats_nothing_within_an_epoch_and_depends_on_the_seed():
    order = common.data_order(10, 4, seed=0)
    drawn = [i for _ in range(5) for i in next(order)]
    assert sorted(drawn[:10]) == list(range(10)) and sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:], "every epoch has an order of its own"
    assert (
        drawn[:4]
        == next(common.data_order(10, 4, seed=0))
        != next(common.data_order(10, 4, seed=1))
    )


def test_questions_of_an_update_are_the_same_on_any_number_of_ranks(monkeypatch):
    """Three batches of 8 in two updates: each update's four questions, shared out, numbered through the run."""
    rows = [{"name": i} for i in range(20)]

    def draw(rank, ranks, skipped=0):
        monkeypatch.setattr(common, "rank", lambda: rank)
        monkeypatch.setattr(common, "world_size", lambda: ranks)
        run = common.Run.__new__(common.Run)
        run.args, run.train, run.order = (
            common.Args(prompts=8, updates=2),
            rows,
            common.data_order(20, 8, 0),
        )
        run.drawn = skipped
        for _ in range(skipped):
            next(run.order)
        return [part for _ in range(3 - skipped) for part in common.split(run.draw(), 2)]

    one, first, second = draw(0, 1), draw(0, 2), draw(1, 2)
    assert [a + b for a, b in zip(first, second)] == one and len(first[0]) == 2
    assert [row["draw"] for part in one for row in part] == list(range(24)) and draw(
        0, 1, skipped=2
    ) == one[4:]


@pytest.mark.parametrize(
    "schedule, expected",
    [
        ("constant", [0, 1 / 3, 2 / 3, 1, 1, 1, 1]),
        ("linear", [0, 1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0, 1 / 3, 2 / 3, 1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
    ],
)
def test_schedules(schedule, expected):
    model = torch.nn.Linear(2, 2)
    optimizer, scheduler = common.make_optimizer(
        model, common.Args(lr=1.0, warmup=3, schedule=schedule), updates=7
    )
    seen = []
    for _ in range(7):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert seen == pytest.approx(expected)
    assert (
        optimizer.param_groups[0]["weight_decay"] == 0.01
        and optimizer.param_groups[1]["weight_decay"] == 0
    )  # biases do not decay


def test_update_clips_steps_and_stops():
    """A gradient of norm 5 is cut to 1 and cleared; one that is not finite leaves the weights as they are."""
    run = common.Run.__new__(common.Run)
    run.args, run.step, run.student = (
        common.Args(grad_clip=1.0),
        7,
        torch.nn.Linear(2, 1, bias=False),
    )
    run.optimizer = torch.optim.SGD(run.student.parameters(), lr=1.0)
    run.schedule = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda step: 1.0)
    m = common.Micro.__new__(common.Micro)
    m.samples, m.response, m.old = [common.Sample({"index": 4}, {}, None)], torch.tensor([0]), None
    m.sampled, m.weights = torch.tensor([-1.5]), {"loss": torch.ones(1)}
    m.terms = {"loss": torch.ones(1), "log_p": torch.tensor([-1.0]), "entropy": torch.ones(1)}

    def backward(gradient, loss=2.0):
        def run_backward(*_):
            run.student.weight.grad = torch.tensor([gradient])
            return torch.tensor(loss)

        return run_backward

    before = run.student.weight.detach().clone()
    run.backward = backward([3.0, 4.0])
    log = run.update([m], ("loss",), None, None)
    assert log == {"loss": 2.0, "grad_norm": 5.0, "lr": 1.0, "entropy": 1.0, "sampler_gap": 0.5}
    torch.testing.assert_close(before - run.student.weight.detach(), torch.tensor([[0.6, 0.8]]))
    assert run.student.weight.grad is None or not run.student.weight.grad.any()
    after = run.student.weight.detach().clone()
    for bad in (math.nan, math.inf):
        run.backward = backward([bad, 1.0])
        with pytest.raises(common.UserError) as e:
            run.update([m], ("loss",), None, None)
        assert "step 7: not finite: the gradient" in e.value.code and torch.equal(
            run.student.weight, after
        )
    m.terms["loss"] = torch.tensor([math.nan])
    with pytest.raises(common.UserError) as e:
        run.update([m], ("loss",), None, None)
    assert "rank 0: loss of row 4" in e.value.code and torch.equal(run.student.weight, after)


def test_means_over_ranks():
    assert common.mean_over_ranks({"a": [True, False], "b": [], "c": [3]}) == {"a": 0.5, "c": 3.0}
    values = {"x": torch.tensor([1.0, 2.0, 4.0])}
    assert common.token_means(values, torch.tensor([1.0, 0.0, 3.0])) == {"x": 13 / 4}
    assert common.token_means(values, torch.zeros(3)) == {}
