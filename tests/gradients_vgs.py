"""VGS's part of gradients.py."""

import functools

import vgs

from gradients import fixed_samples, mine, result, stale, start


def samples_of(processor, rows) -> list:
    return fixed_samples(processor, rows, vgs.contexts(vgs.Args()))


def gradient(tiny, processor, rows, shares, micro, chunk, settings) -> dict:
    paths = dict(student=f"{tiny}/student", teacher=f"{tiny}/teacher")
    args = vgs.Args(**paths, lambda_lp=0.5, eta=0.7, micro_tokens=micro, loss_chunk=chunk, group=2)
    for name, value in settings.items():
        setattr(args, name, value)
    run = start(args, processor, args.teacher)
    micros = vgs.score(mine(samples_of(processor, rows), shares), run, args)
    for m in micros:
        m.old = stale(m.old, m.ids) if args.updates > 1 else None
    eta = vgs.measure_eta(micros, run, args)["eta"] if vgs.has_eta(args) else None
    run.own = {}
    vgs.weigh(micros, run, args)
    run.backward(micros, vgs.TERMS, functools.partial(vgs.terms, args=args), vgs.extras)
    return result(run) | {"eta": eta}
