"""PTD-PO's part of gradients.py."""

import dataclasses

import common
import ptdpo

import gradients
import torch
from gradients import fixed_samples, mine, result, stale, start

ROW = {field.name for field in dataclasses.fields(ptdpo.Optimizer)}  # of OPTIMIZERS


def settings_of(settings: dict) -> ptdpo.Args:
    """Args with these settings, among which may be some of a row of OPTIMIZERS."""
    args = ptdpo.Args(group=2)
    for name in settings.keys() - ROW:
        setattr(args, name, settings[name])
    return args


def row_of(args: ptdpo.Args, settings: dict) -> ptdpo.Optimizer:
    changes = {name: settings[name] for name in settings.keys() & ROW}
    return dataclasses.replace(ptdpo.OPTIMIZERS[args.optimizer], **changes)


def samples_of(processor, rows, settings: dict) -> list:
    """The fixed rollouts, with F's and the failing groups' marked."""
    args = settings_of(settings)
    samples = fixed_samples(processor, rows, ptdpo.contexts(args))
    below, failed = ptdpo.route(gradients.CORRECT, 2, args.tau)
    for s, is_below, fails in zip(samples, below, failed):
        s.below_tau = is_below
        s.tutored = (fails or args.tutor_all) and "tutor" in s.prompts
    return samples


def gradient(tiny, processor, rows, shares, micro, chunk, settings) -> dict:
    args, before = settings_of(settings), dict(ptdpo.OPTIMIZERS)
    args.student, args.micro_tokens, args.loss_chunk = f"{tiny}/student", micro, chunk
    ptdpo.OPTIMIZERS[args.optimizer] = row_of(args, settings)
    run = start(args, processor, args.student)
    with torch.no_grad():  # the student has moved on from the reference
        for parameter in run.student.parameters():
            parameter.mul_(1.02)
    micros = ptdpo.score(mine(samples_of(processor, rows, settings), shares), run, args)
    for m in micros:
        m.old = stale(m.old, m.ids) if args.updates > 1 else None
    ptdpo.weigh(micros, run, args)

    def without_a_step(*everything) -> dict:
        run.backward(*everything)
        return {}

    run.update = without_a_step
    log = ptdpo.update(micros, run, args)
    ptdpo.OPTIMIZERS.update(before)
    size = common.all_sum(sum(m.in_f.sum() for m in micros)).item()
    return result(run) | {"tutored": size, "log": log}
