"""What the test_*_exact.py share: one sequence at a time through transformers' model, in float64."""

import torch


def read(lm, prompt, ids, image_id, vocab, observations=()):
    """Next-token probabilities [T, V] for the tokens ids after the prompt, with what tools answered between them."""
    tokens, before = list(prompt.ids), []
    for t, token in enumerate(ids):
        for o in observations:
            tokens += o.prompt.ids if o.at == t else []
        before.append(len(tokens) - 1)
        tokens.append(token)
    tokens = torch.tensor([tokens])
    inputs = {"input_ids": tokens} | ({"mm_token_type_ids": (tokens == image_id).int()} if image_id is not None else {})
    shown = [p for p in [prompt, *(o.prompt for o in observations)] if p.pixels is not None]
    if shown:
        inputs |= {"pixel_values": torch.cat([p.pixels for p in shown]).double(), "image_grid_thw": torch.cat([p.grid for p in shown])}
    return lm(**inputs).logits[0, before, :vocab].softmax(-1)
