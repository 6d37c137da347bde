"""Worker of test_distributed.py and the test_*_exact.py: gradients of one update on eight fixed rollouts, for several layouts.

python tests/gradients.py TINY OUT LAYOUTS   with LAYOUTS a JSON list of [shares, tokens of a micro-batch, chunk, file, settings]: shares like
[8, 0], how many of the rollouts each rank holds; file: vgs, ptdpo, vold, vigos or reopold; settings: what is set in its Args.
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import common  # noqa: E402
import ptdpo  # noqa: E402
import reopold  # noqa: E402
import vgs  # noqa: E402
import vigos  # noqa: E402
import vold  # noqa: E402

TAGGED = "<think>\n1+1=2.</think>\n\\boxed{2}"  # a response of vold's, whose teacher has one token for <think>
IN_FORM = "The digits are {0},3.</description>\n<think>{0}+3.</think>\n\\boxed{{7}} and more"  # vigos's, from <description> on

ZOOM = '{"name": "crop_image", "arguments": {"bbox_2d": [0.3, 0.0, 0.7, 1.0], "target_image": 1}}'
CORRECT = [True, False, False, False, True, True, False, True]  # of ptdpo's and vold's rollouts, in groups of two


def fixed_samples(processor, rows, count: int, file: str = "vgs", settings: dict | None = None) -> list[common.Sample]:
    """Responses of 3 to 12 tokens, drawn once for all layouts."""
    generator = torch.Generator().manual_seed(5)
    settings = settings or {}
    contexts = {"vgs": lambda: vgs.contexts(vgs.Args(method="vgs")), "ptdpo": lambda: ptdpo.contexts(ptdpo.Args(**settings)),
                "vold": lambda: vold.contexts(vold.Args(**settings)), "vigos": lambda: vigos.contexts(vigos.Args(**settings)),
                "reopold": lambda: {"question": reopold.with_tools if settings.get("calls") else reopold.question}}[file]()
    samples = []
    for i in range(count):
        n = int(torch.randint(3, 13, (), generator=generator))
        ids = torch.randint(0, processor.vocab - 20, (n,), generator=generator).tolist()
        row = rows[i] | ({"hint": ""} if i == 3 else {}) | {"reference": rows[i]["solution"]}
        if file == "vold" and i == 1:
            ids = processor.tokenizer(TAGGED)["input_ids"]
            n = len(ids)
        if file == "vigos" and i % 3:  # every third one is out of form
            ids = processor.tokenizer(IN_FORM.format(i))["input_ids"] + [processor.tokenizer.eos_token_id]
            n = len(ids)
        views = {name: view for name, context in contexts.items() if (view := context(row)) is not None}
        prompts, response = {name: processor.encode(view) for name, view in views.items()}, common.Response(ids, [-1.0] * n, True)
        for at in (i % 3, 3)[: settings.get("calls", 0)] if i % 4 else ():  # a part of the image, and an error message
            text, images, failed = common.answer_call(ZOOM if at < 3 else "{", row["images"])
            turn = processor.next_turn(common.user_message(text, len(images)), images)
            response.observations.append(common.Observation(at, turn, text, failed))
        kind = {"vgs": common.Sample, "ptdpo": ptdpo.Sample, "vold": vold.Sample, "vigos": vigos.Sample,
                "reopold": common.Sample}[file]
        samples.append(kind(row, prompts, response, CORRECT[i], 0.0, (-1.0) ** i))
    return samples


def stale(log_p, ids):
    """Log-probs of an older policy, for updates after the first: they move every ratio, some past its clip."""
    return log_p + 0.1 * (ids % 7 - 3)


def vgs_gradient(tiny, processor, rows, shares, micro, chunk, settings) -> dict:
    args = vgs.Args(student=f"{tiny}/student", teacher=f"{tiny}/teacher", lambda_lp=0.5, micro_tokens=micro, loss_chunk=chunk,
                    group=2, **settings)
    models = common.load_models(args, processor, args.teacher, updates=1)
    micros = vgs.score(mine(fixed_samples(processor, rows, 8), shares), models, args)
    for m in micros:
        m.old = stale(m.old, m.ids) if args.updates > 1 else m.old
    eta = vgs.measure_eta(micros, models, args)["eta"] if vgs.uses_eta(args) else None
    vgs.weigh(micros, args, eta=0.7)
    vgs.accumulate(micros, models, args)
    return result(models) | {"eta": eta}


def ptdpo_gradient(tiny, processor, rows, shares, micro, chunk, settings) -> dict:
    args = ptdpo.Args(student=f"{tiny}/student", micro_tokens=micro, loss_chunk=chunk, group=2, **settings)
    ptdpo.check_settings(args, set())
    models = common.load_models(args, processor, args.student, updates=1)
    with torch.no_grad():  # the student has moved on from the reference
        for parameter in models.student.parameters():
            parameter.mul_(1.02)
    samples = fixed_samples(processor, rows, 8, "ptdpo", settings)
    below, failed = ptdpo.route(CORRECT, 2, args.tau)
    for s, in_failing_group, fails in zip(samples, below, failed):
        s.failing, s.tutored = in_failing_group, (fails or args.tutor_all) and "tutor" in s.prompts
    micros = ptdpo.score(mine(samples, shares), models, args)
    for m in micros:
        m.old = stale(m.old, m.ids) if args.updates > 1 else m.old
    ptdpo.weigh(micros, args)
    ptdpo.accumulate(micros, models, args)
    return result(models) | {"tutored": common.all_sum(torch.tensor(float(sum(ptdpo.tutored_tokens(m) for m in micros)))).item()}


def vold_gradient(tiny, processor, rows, shares, micro, chunk, settings) -> dict:
    traces = settings.get("stage") == "sft"
    args = vold.Args(student=f"{tiny}/student", teacher=f"{tiny}/tagged", freeze_vision=True, micro_tokens=micro, loss_chunk=chunk, group=2,
                     **settings)
    teacher = common.Processor(args.teacher)
    reader = vold.Reader(teacher, vold.tags_of(processor, teacher)) if vold.distils(args) and not traces else None
    models = common.load_models(args, processor, args.teacher if reader else None, updates=1)
    samples = fixed_samples(processor, rows, 8, "vold", settings)
    if traces:
        micros = common.make_micros(common.Micro, mine(samples, shares), ["question"], processor, micro, images=False)
        return {"tokens": vold.imitate(micros, models, args).item()} | result(models)
    for s, correct, kept in zip(samples, CORRECT, vold.distilled(CORRECT, 2, args.mask)):
        s.correct, s.distilled = correct, kept
        s.prompts["teacher"] = teacher.encode(vold.question(s.row, args))
    micros = vold.score(mine(samples, shares), models, reader, args)
    for m in micros:
        m.old = stale(m.old, m.ids) if args.updates > 1 else m.old
    vold.weigh(micros, args, step=3)
    share = vold.measure_share(micros, models, args)
    vold.accumulate(micros, models, args)
    return result(models) | {"share": share, "log": vold.statistics(micros, args)}


def vigos_gradient(tiny, processor, rows, shares, micro, chunk, settings) -> dict:
    args = vigos.Args(student=f"{tiny}/student", micro_tokens=micro, loss_chunk=chunk, **settings)
    models = common.load_models(args, processor, args.student, updates=1)
    with torch.no_grad():  # the student has moved on from the initial model
        for name, parameter in models.student.named_parameters():
            if not args.lora:
                parameter.mul_(1.02)
            elif ".lora_B." in name:
                parameter.add_(0.02)
    samples = fixed_samples(processor, rows, 8, "vigos", settings)
    for s in samples:
        s.spans = vigos.find_spans(processor.tokenizer.convert_ids_to_tokens(s.response.ids))
    micros = vigos.score(mine(samples, shares), models, args)
    vigos.weigh(micros, args)
    vigos.accumulate(micros, models, args)
    adapters = {name: common.whole(p).clone() for name, p in models.student.named_parameters() if ".lora_" in name}
    return result(models) | {"log": vigos.statistics(micros, args), "adapters": adapters}


def reopold_gradient(tiny, processor, rows, shares, micro, chunk, settings) -> dict:
    settings = dict(settings)
    done = settings.pop("progress", 0.0)  # share of the run's steps that is behind it
    args = reopold.Args(student=f"{tiny}/student", teacher=f"{tiny}/teacher", micro_tokens=micro, loss_chunk=chunk, **settings)
    models = common.load_models(args, processor, args.teacher, updates=1)
    micros = reopold.score(mine(fixed_samples(processor, rows, 8, "reopold", settings), shares), models, args)
    reopold.remember(micros, models, args)
    for m in micros:
        m.old = stale(m.old, m.ids) if args.updates > 1 else m.old
    reopold.weigh(micros, args, done)
    reopold.accumulate(micros, models, args)
    kept = sum((m.weights[0] != 0).sum() for m in micros)
    return result(models) | {"log": reopold.statistics(micros, args), "kept": common.all_sum(kept).item()}


def mine(samples: list, shares: list[int]) -> list:
    first = sum(shares[: common.rank()])
    return samples[first : first + shares[common.rank()]]


def result(models) -> dict:
    whole = {name: common.whole(p.grad).clone() for name, p in models.student.named_parameters() if p.grad is not None}
    return {"gradient": whole, "norm": common.grad_norm(models.student).item()}


def main() -> None:
    tiny, out, layouts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    common.start_distributed(vgs.Args())
    processor, rows = common.Processor(f"{tiny}/student"), common.Rows(f"{tiny}/rows.parquet", "train", {"problem": "problem"})
    functions = {"vgs": vgs_gradient, "ptdpo": ptdpo_gradient, "vold": vold_gradient, "vigos": vigos_gradient, "reopold": reopold_gradient}
    results = [functions[file](tiny, processor, rows, *layout, settings) for *layout, file, settings in layouts]
    if common.rank() == 0:
        torch.save(results, out)


if __name__ == "__main__":
    common.launch(main)
