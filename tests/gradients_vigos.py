"""ViGOS's part of gradients.py."""

import common
import vigos

import torch
from gradients import fixed_rows, fixed_samples, mine, result, start

# from <description> on
IN_FORM = "The digits are {0},3.</description>\n<think>{0}+3.</think>\n\\boxed{{7}} and more"


def samples_of(processor, rows, args) -> list:
    """Eight fixed responses, of which every third is out of form."""

    def tokens_of(i: int) -> list[int] | None:
        if i % 3 == 0:
            return None
        return [*processor.tokenize(IN_FORM.format(i)), processor.tokenizer.eos_token_id]

    return fixed_samples(processor, rows, vigos.contexts(args), tokens_of)


def gradient(tiny, processor, rows, shares, micro, chunk, settings) -> dict:
    args = vigos.Args(student=f"{tiny}/student", micro_tokens=micro, loss_chunk=chunk)
    for name, value in settings.items():
        setattr(args, name, value)
    run = start(args, processor, args.student, vigos.load_models)
    with torch.no_grad():  # the student has moved on from the initial model
        for name, parameter in run.student.named_parameters():
            if not args.lora:
                parameter.mul_(1.02)
            elif ".lora_B." in name:
                parameter.add_(0.02)
    samples = samples_of(processor, rows, args)
    for s in samples:
        spans = vigos.find_spans(processor.tokenizer.convert_ids_to_tokens(s.response.ids))
        s.marks = vigos.marks(spans, s.response, args)

    def backward_alone(*parts) -> dict:
        run.backward(*parts)
        return {}

    run.update = backward_alone
    micros = vigos.score(mine(samples, shares), run, args)
    vigos.weigh(micros, run, args)
    log = vigos.update(micros, run, args)
    named = run.student.named_parameters()
    adapters = {name: common.full_tensor(p).clone() for name, p in named if ".lora_" in name}
    return result(run) | {"log": log, "adapters": adapters}


def teach_form(tiny, folder) -> None:
    """Write a copy of the tiny student that was trained for some seconds to answer in form, whatever it is asked."""
    processor = common.Processor(f"{tiny}/student")
    model = common.Model(f"{tiny}/student", torch.float32)
    prompts, responses = [], []
    for row in fixed_rows(tiny, processor):
        text = f"{row['solution']}</description>\n<think>{row['solution']}</think>\n\\boxed{{{row['answer']}}}"
        for context in (vigos.question, vigos.privileged):
            prompts.append(processor.encode(context(row | {"reference": row["answer"]})))
            ids = [*processor.tokenize(text), processor.tokenizer.eos_token_id]
            responses.append(common.Response(ids))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(120):
        part = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(step))[:8]
        batch = processor.batch([prompts[i] for i in part], [responses[i] for i in part])
        ids = torch.tensor([token for i in part for token in responses[i].ids])
        logits = model(batch, lambda hidden, head: hidden @ head.T)
        torch.nn.functional.cross_entropy(logits, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    common.save_checkpoint(model.lm, processor, folder)
