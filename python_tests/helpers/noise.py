"""Models with a gated noise adapter, drafters that propose tails, and what PEFT's own model says of
noise rows.
"""

import random

import torch

from helpers.families import tiny_model
from helpers.trainers import with_adapter
from msn_ext import Draft
from msn_ext.decoding import BestFirst
from msn_ext.gates import mark_gated


def gated(model, std: float = 0.3, **settings):
    """A PEFT model whose adapter is gated, and changes what the model says."""
    dtype = model.dtype
    model = with_adapter(model, **settings).eval()
    generator = torch.Generator().manual_seed(7)
    for name, x in model.named_parameters():
        if "lora_" in name:
            x.data = (
                torch.randn(x.shape, generator=generator, dtype=torch.float64)
                .mul_(std)
                .to(torch.float64 if dtype == torch.float64 else x.dtype)
            )
    mark_gated(model.peft_config["default"], 2, "ahead")
    return model


def gated_tiny(family: str, seed: int = 3, dtype=torch.float64, settings=None, **its):
    return gated(tiny_model(family, seed, dtype, **(settings or {})), **its)


def random_tails(rng: random.Random, tokens, parents, vocabulary: int, chains=3, length=2):
    """A draft with tails at random nodes, and none here and there."""
    nodes = tokens.shape[1]
    ends = [[rng.randrange(-1, nodes) for _ in range(chains)] for _ in tokens]
    noise = torch.tensor([[rng.randrange(vocabulary) for _ in range(chains * length)]])
    noise = noise.to(tokens.device)
    ends = torch.tensor(ends, device=tokens.device)
    return Draft.with_tails(tokens, parents, ends, length, noise)


class WithTails:
    """Best-first drafting, with tails at random nodes: a drafter of somebody else's."""

    def __init__(self, seed: int, budget: int = 12, chains: int = 3, length: int = 2):
        self._best, self._rng = BestFirst(budget), random.Random(seed)
        self._shape = dict(chains=chains, length=length)
        self.max_depth, self.tails = self._best.max_depth + length, 0

    def start(self, batch, vocabulary, device):
        self._vocabulary = vocabulary
        self._best.start(batch, vocabulary, device)

    def first(self, history, lengths):
        return self._best.first(history, lengths)

    def propose(self, history, lengths):
        draft = self._best.propose(history, lengths)
        return random_tails(self._rng, draft.tokens, draft.parents, self._vocabulary, **self._shape)

    def observe(self, verified):
        self.tails += verified.draft.tails
        assert int(verified.path.max()) < len(verified.draft) - verified.draft.tails
        self._best.observe(verified)


class CapturableTails(BestFirst):
    """The same of fixed places, without a question to the device, so that steps are captured."""

    def __init__(self, budget):
        super().__init__(budget, tails=False)

    def propose(self, history, lengths):
        draft = super().propose(history, lengths)
        nodes = len(draft)
        ends = torch.arange(4, device=history.device).expand(len(lengths), 4) * 3 % (nodes + 1)
        tokens = history.gather(1, (lengths[:, None] - 2).clamp(min=0))
        return Draft.with_tails(draft.tokens, draft.parents, ends, 2, tokens)

    def observe(self, verified):
        super().observe(verified)

    def observe_step(self, report, nodes, gained, seconds):
        super().observe_step(report, nodes, gained, seconds)

    def plan(self):
        return super().plan()

    def forget(self):
        super().forget()


class OnlyNoise:
    """Takes away, where it arises, what the adapter adds to rows that are not noise."""

    def __init__(self, model, noise):
        self._model, self._noise = model, noise

    def __enter__(self):
        noise = self._noise

        def only_noise(module, inputs, output):
            rows = noise.view(*noise.shape, 1) if output.dim() == 3 else noise.view(-1, 1)
            return torch.where(rows, output, torch.zeros_like(output))

        self._hooks = [
            module.register_forward_hook(only_noise)
            for name, module in self._model.named_modules()
            if ".lora_B." in name
        ]
        assert self._hooks

    def __exit__(self, *_):
        for hook in self._hooks:
            hook.remove()


@torch.no_grad()
def by_peft(model, text: list[int], draft: Draft, row: int):
    """Return the logits [N, V] of one row's draft after a text, which ends before the root: every
    node by itself, with its path behind the text and noise rows alone given the adapter, as PEFT's
    own model computes them.
    """
    nodes, found = len(draft), []
    bits = draft.ancestors.expand(len(draft.tokens), nodes, -1)[row].tolist()
    for node in range(nodes):
        path = [j for j in range(node) if bits[node][j // 64] >> j % 64 & 1] + [node]
        ids = torch.tensor([text + draft.tokens[row, path].tolist()])
        noise = [False] * len(text) + [j >= nodes - draft.tails for j in path]
        positions = torch.arange(ids.shape[1])[None]
        with OnlyNoise(model, torch.tensor([noise])):
            logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        found.append(logits[0, -1])
    return torch.stack(found)


def laid_out(draft: Draft, lengths):
    """Return positions int64 [B, N] of a draft behind texts, and -1 as 0."""
    depth = draft.depth.expand(len(draft.tokens), -1).clamp(min=0).long()
    return lengths[:, None] + depth
