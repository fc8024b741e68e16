"""What SGLang does around drafts, by plain PyTorch: verification of a mask's trees by a model's
logits, as the sources of SGLang 0.5.23 have it (`reconstruct_tree.py`, `ngram_worker.py`).
"""

import torch


def links(mask) -> tuple[list[int], list[int], list[int]]:
    """Return depth, first child and next sibling of every node (-1: none) of a mask [N, N], as
    SGLang reads them off: a node's parent is the last node before it that its row marks.
    """
    n = len(mask)
    above = [[j for j in range(i) if mask[i][j]] for i in range(n)]
    parent = [nodes[-1] if nodes else -1 for nodes in above]
    child = [next((k for k in range(i + 1, n) if mask[k][i]), -1) for i in range(n)]
    sibling = [
        next((k for k in range(i + 1, n) if parent[k] == parent[i]), -1) if parent[i] >= 0 else -1
        for i in range(n)
    ]
    return [len(nodes) for nodes in above], child, sibling


def tree_logits(model, prefix: list[int], tokens: list[int], mask, depth: list[int]):
    """Return the model's logits [N, V] at a tree's nodes behind a prefix, in one pass."""
    size, n = len(prefix), len(tokens)
    seen = torch.ones(size + n, size + n, dtype=torch.bool).tril()
    seen[size:, size:] = torch.as_tensor(mask).bool()
    places = torch.tensor([[*range(size), *(size + d for d in depth)]])
    bias = torch.zeros(1, 1, *seen.shape, dtype=model.dtype)
    bias.masked_fill_(~seen, torch.finfo(model.dtype).min)
    with torch.no_grad():
        ids = torch.tensor([[*prefix, *tokens]])
        return model(ids, attention_mask=bias, position_ids=places).logits[0, size:]


def accepted(tokens: list[int], child: list[int], sibling: list[int], draw) -> list[int]:
    """Return the nodes on the path that ``draw(node)``, the model's token after a node, takes."""
    path = [0]
    while True:
        token, node = draw(path[-1]), child[path[-1]]
        while node >= 0 and tokens[node] != token:
            node = sibling[node]
        if node < 0:
            return path
        path.append(node)


def plain_text(model, prompt: list[int], new: int) -> list[int]:
    """Return the greedy continuation, by transformers."""
    ids = torch.tensor([prompt])
    got = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False
    )
    return got[0, len(prompt) :].tolist()
