"""What the test_*_exact.py share: one sequence at a time through transformers' model, in float64."""

import torch


def read(lm, prompt, ids, image_id, vocab, mask=None):
    """Next-token probabilities [T, V] for the tokens ids after the prompt, or for those of them that mask says."""
    first = len(prompt.ids) - 1
    before = [first + t for t in range(len(ids)) if mask is None or mask[t]]
    tokens = torch.tensor([prompt.ids + ids])
    inputs = {"input_ids": tokens}
    if image_id is not None:
        inputs["mm_token_type_ids"] = (tokens == image_id).int()
    if prompt.pixels is not None:
        inputs |= {"pixel_values": prompt.pixels.double(), "image_grid_thw": prompt.grid}
    return lm(**inputs).logits[0, before, :vocab].softmax(-1)
