"""Reopold's part of gradients.py."""

import dataclasses
import functools

import common
import reopold

from gradients import fixed_samples, mine, result, stale, start

ZOOM = '{"name": "crop_image", "arguments": {"bbox_2d": [0.3, 0.0, 0.7, 1.0], "target_image": 1}}'


def samples_of(processor, rows, settings: dict) -> list:
    """With calls, two of three responses are cut into turns by a part of the image, or by an error message."""
    args = reopold.Args(**{key: value for key, value in settings.items() if key == "calls"})
    samples = fixed_samples(processor, rows, reopold.contexts(args))
    for i, s in enumerate(samples):
        places = (i % 3, 3)[: args.calls] if i % 4 else ()
        ids, mask, start, prompt = [], [], 0, s.prompts["question"]
        seen = prompt
        for at in (*places, len(s.response.ids)):
            own = s.response.ids[start:at]
            ids, mask, start = ids + own, mask + [True] * len(own), at
            seen = reopold.join(seen, common.Prompt(own))
            if at < len(s.response.ids):
                text, images, _ = reopold.answer_call(ZOOM if at < 3 else "{", s.row["images"])
                turn = reopold.next_turn(processor, text, images)
                ids, mask = ids + turn.ids, mask + [False] * len(turn.ids)
                seen = reopold.join(seen, turn)
        s.response = common.Response(ids, True, "", s.response.log_probs, mask)
        s.prompts["question"] = dataclasses.replace(seen, ids=prompt.ids)
    return samples


def gradient(tiny, processor, rows, shares, micro, chunk, settings) -> dict:
    settings = dict(settings)
    progress = settings.pop("progress", 0.0)  # share of the run's steps that is behind it
    paths = dict(student=f"{tiny}/student", teacher=f"{tiny}/teacher")
    args = reopold.Args(**paths, micro_tokens=micro, loss_chunk=chunk)
    for name, value in settings.items():
        setattr(args, name, value)
    run = start(args, processor, args.teacher if args.method != "grpo" else None)
    run.step, run.total = round(100 * progress) + 1, 100
    micros = reopold.score(mine(samples_of(processor, rows, settings), shares), run, args)
    for m in micros:
        m.old = stale(m.old, m.ids) if args.updates > 1 and m.old is not None else m.old
    reopold.weigh(micros, run, args)
    run.backward(micros, reopold.TERMS, functools.partial(reopold.terms, args=args), reopold.extras)
    kept = common.all_sum(sum(m.kept.sum() for m in micros))
    return result(run) | {"kept": kept.item()}
