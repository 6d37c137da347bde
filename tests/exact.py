"""What the test_*_exact.py share: one sequence at a time through transformers' model, in float64."""

import torch


def read(lm, prompt, ids, image_id, vocab):
    """Next-token probabilities [T, V] for the tokens ids after the prompt."""
    tokens = torch.tensor([prompt.ids + ids])
    inputs = {"input_ids": tokens} | ({"mm_token_type_ids": (tokens == image_id).int()} if image_id is not None else {})
    if prompt.pixels is not None:
        inputs |= {"pixel_values": prompt.pixels.double(), "image_grid_thw": prompt.grid}
    start = len(prompt.ids) - 1
    return lm(**inputs).logits[0, start : start + len(ids), :vocab].softmax(-1)
