"""VOLD's part of gradients.py."""

import common
import vold

from gradients import CORRECT, fixed_samples, mine, result, stale, start

TAGGED = "<think>\n1+1=2.</think>\n\\boxed{2}"  # of the second response: one token of the teacher's for <think>
STEP = 3  # where beta has fallen twice


def samples_of(processor, rows) -> list:
    def tokens_of(i):
        return processor.tokenizer(TAGGED)["input_ids"] if i == 1 else None

    return fixed_samples(processor, rows, vold.contexts(vold.Args()), tokens_of)


def gradient(tiny, processor, rows, shares, micro, chunk, settings) -> dict:
    paths = dict(student=f"{tiny}/student", teacher=f"{tiny}/tagged")
    args = vold.Args(**paths, micro_tokens=micro, loss_chunk=chunk, group=2)
    for name, value in settings.items():
        setattr(args, name, value)
    teaches = args.beta > 0 and args.stage != "sft"
    run = start(args, processor, args.teacher if teaches else None)
    run.step = STEP
    samples = samples_of(processor, rows)
    if args.stage == "sft":
        micros = common.make_micros(mine(samples, shares), ["question"], processor, micro, False)
        vold.weigh_imitation(micros)
        run.backward(micros, *vold.objective(run, args))
        return result(run)
    if teaches:
        run.reader = common.Processor(args.teacher)
        run.tags = vold.tags_of(processor, run.reader)
    for s, kept in zip(samples, vold.distilled(CORRECT, 2, args.mask).tolist()):
        s.distilled = kept
    micros = vold.score(mine(samples, shares), run, args)
    for m in micros:
        m.old = stale(m.old, m.ids) if args.updates > 1 else None
    vold.weigh(micros, run, args)
    share = vold.measure_share(micros, run, args)
    run.backward(micros, *vold.objective(run, args))
    return result(run) | {"share": share}
