"""The model's guesses on any device, and the same ones on every device."""

import torch
from torch import Tensor

from msn_ext.ops import EDGES, GUESSES


def top_guesses(logits: Tensor) -> Tensor:
    """Return what :func:`msn_ext.ops.top_guesses` does, by PyTorch alone: SGLang's PyTorch may have
    CUDA where msn_ext was built without.

    Where equals are cut in two after the eighth, all of them are left out, since each process of a
    tensor-parallel server has to draft the same tree, and ``topk`` may choose among equals.

    Args:
        logits: [..., V], V at least 1.

    Returns:
        int32 [..., 8], likeliest first, the lowest token of equals; -1: none.
    """
    k = min(GUESSES + 1, logits.shape[-1])
    values, tokens = logits.float().topk(k)
    tokens, order = tokens.sort(-1)  # by token, then by value without disturbing equals
    values, order = values.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    tokens = tokens.gather(-1, order)
    if k > GUESSES:
        cut = values[..., GUESSES:]
        values, tokens = values[..., :GUESSES], tokens[..., :GUESSES]
        left_out = values <= cut
    else:
        left_out = torch.zeros_like(tokens, dtype=torch.bool)
    probability = values.softmax(-1)
    edges = torch.tensor(EDGES, device=logits.device)
    guesses = tokens * 16 + torch.bucketize(probability, edges, right=True)
    guesses = guesses.masked_fill(left_out, -1).to(torch.int32)
    return torch.nn.functional.pad(guesses, (0, GUESSES - guesses.shape[-1]), value=-1)
