"""Run drafters over a text that is known, with what the model says at the nodes they ask for.

Accept lengths are settled by the text that greedy decoding gives and by the model's answers at the
nodes of the drafts, so all drafters can run side by side on one text, and what they ask for is
computed in one forward pass: a node is known by the place where its path leaves the text and by its
tokens from there, and is computed once for all. Of a node's logits the 16 largest are kept, which
is more than any drafter looks at; the rest counts as minus infinity.
"""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

from msn_ext import ops
from msn_ext.decoding import BestFirst, Draft, DraftTree, Verified
from msn_ext.decoding.cache import TreeCache
from msn_ext.decoding.drafters.sources import SOURCES, Adjacency
from msn_ext.generation import drafter_for
from msn_ext.ops import MAX_NODES

KEPT = 16
BUDGETS = (8, 16, 32, 64)
ABLATIONS = (*SOURCES, "foresight")
DRAFTS = (
    "paper",
    "jacobi",
    "lookup",
    "suffix",
    "recycling",
    "lookahead",
    *(f"auto@{budget}" for budget in BUDGETS),
    *(f"auto@64-{name}" for name in ABLATIONS),
    *(f"auto@{budget}-rejected" for budget in (8, 64)),
)


def make_drafter(name: str):
    """Return a drafter of :data:`DRAFTS`, or "jacobi@N": a chain of N guesses. "auto@N-rejected"
    forgets what the model says after rejected guesses.
    """
    if name.startswith("jacobi@"):
        return drafter_for(DraftTree.chain(1 + int(name.removeprefix("jacobi@"))), None)
    if not name.startswith("auto@"):
        return drafter_for(name, None)
    budget, _, without = name.removeprefix("auto@").partition("-")
    if without == "rejected":
        return AcceptedAlone(int(budget))
    options = {"foresight": 0.0} if without == "foresight" else {}
    return BestFirst(
        int(budget), sources=tuple(source for source in SOURCES if source != without), **options
    )


class AcceptedAdjacency(Adjacency):
    """Remembers what the model says after accepted tokens alone; of one row."""

    def update(self, verified: Verified, guesses: Tensor) -> None:
        path = verified.path[0, : int(verified.accept_length)]
        draft, nodes = verified.draft, torch.arange(len(path))
        ops.remember_guesses(
            self.adjacency,
            verified.history,
            verified.lengths,
            draft.tokens[:, path],
            (nodes - 1).int(),
            nodes[None],
            guesses[:, path].contiguous(),
        )


class AcceptedAlone(BestFirst):
    """Best-first drafting that forgets what the model says after rejected guesses."""

    def start(self, batch: int, vocabulary: int, device: torch.device) -> None:
        super().start(batch, vocabulary, device)
        self.adjacency = AcceptedAdjacency(device)


class Teacher:
    """The model's answers after every token of a text, and after paths that leave it.

    Args:
        model: full attention in every layer, which takes a dense mask.
        text: prompt and greedy continuation.
    """

    def __init__(self, model, text: list[int]):
        self._model, self._text = model, text
        self._cache = TreeCache(model.config.get_text_config(decoder=True))
        # place, path -> tokens and logits [KEPT]
        self._known: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
        ids = torch.tensor([text], device=model.device)
        self._cache._reserve(len(text) + MAX_NODES)
        self._cache.at_start(len(text))
        hidden = model.base_model(
            input_ids=ids,
            position_ids=torch.arange(len(text), device=model.device)[None],
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state
        self._hidden = hidden[0]

    def say(self, start: int, paths: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Return the keys of the nodes that follow ``text[: start + 1]`` by ``paths``, of which
        the root's is empty.
        """
        keys = []
        for path in paths:
            on = 0
            while (
                on < len(path)
                and start + 1 + on < len(self._text)
                and path[on] == self._text[start + 1 + on]
            ):
                on += 1
            keys.append((start + on, *path[on:]))
        return keys

    def learn(self, keys: set[tuple[int, ...]]) -> None:
        """Compute what is not known yet: nodes on the text at once, then at most 256 others a
        forward pass.
        """
        new = [key for key in keys if key not in self._known]
        on = [key[0] for key in new if len(key) == 1]
        if on:
            self._keep([(place,) for place in on], self._model.lm_head(self._hidden[on]))
        needed: dict[tuple[int, ...], int] = {}  # with all their ancestors, parents first
        for key in sorted((key for key in new if len(key) > 1), key=len):
            for end in range(2, len(key) + 1):
                if key[:end] not in needed:
                    needed[key[:end]] = len(needed)
            if len(needed) > MAX_NODES - 40:
                self._compute(needed)
                needed = {}
        self._compute(needed)

    def _compute(self, needed: dict[tuple[int, ...], int]) -> None:
        if not needed:
            return
        length, count, device = len(self._text), len(needed), self._model.device
        mask = torch.zeros(count, length + count, dtype=torch.bool)
        for key, node in needed.items():
            mask[node, : key[0] + 1] = True
            if len(key) > 2:
                mask[node, length:] = mask[needed[key[:-1]], length:]
            mask[node, length + node] = True
        self._cache.at(torch.tensor([length], device=device), count, length + count)
        logits = self._model(
            input_ids=torch.tensor([[key[-1] for key in needed]], device=device),
            attention_mask=mask[None, None].to(device),
            position_ids=torch.tensor([[key[0] + len(key) - 1 for key in needed]], device=device),
            past_key_values=self._cache,
            use_cache=True,
        ).logits
        self._keep(list(needed), logits[0])

    def _keep(self, keys: list[tuple[int, ...]], logits: Tensor) -> None:
        values, tokens = logits.float().topk(KEPT, dim=-1)
        for key, *row in zip(keys, tokens.cpu(), values.cpu()):
            self._known[key] = tuple(row)

    def __getitem__(self, keys: list[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
        """Tokens [N, KEPT] and logits [N, KEPT]."""
        tokens, values = zip(*(self._known[key] for key in keys))
        return torch.stack(tokens), torch.stack(values)


def replay(
    drafter, teacher: Teacher, text: list[int], prompt: int, vocabulary: int, scratch: Tensor
) -> Generator:
    """Run a drafter over a known text; yield the keys of the nodes of each pass, return the accept
    lengths.

    The loop is that of ``msn_ext.decoding.Decoder``, with the model's answers from ``teacher``.
    """
    history = torch.zeros(1, len(text) + MAX_NODES, dtype=torch.int64)
    history[0, :prompt] = torch.tensor(text[:prompt])
    length = prompt
    drafter.start(1, vocabulary, torch.device("cpu"))
    accept_lengths = []
    while length < len(text):
        lengths = torch.tensor([length])
        if accept_lengths:
            draft = drafter.propose(history, lengths)
        else:
            guesses = drafter.first(history, lengths)
            chain = DraftTree.chain(1 + guesses.shape[1]).tensors(torch.device("cpu"))
            draft = Draft.shaped(torch.cat([history[:, length - 1 : length], guesses], 1), chain)
        parents, tokens = (
            draft.parents.expand(draft.tokens.shape)[0].tolist(),
            draft.tokens[0].tolist(),
        )
        paths = [()]
        for node in range(1, len(tokens)):
            alive = parents[node] >= 0 and paths[parents[node]] is not None
            paths.append((*paths[parents[node]], tokens[node]) if alive else None)
        keys = teacher.say(length - 1, [path or () for path in paths])
        yield set(keys)
        best, values = teacher[keys]
        targets = best[:, 0].clone()
        # The text is right, also where two logits are as good as equal.
        for node, key in enumerate(keys):
            if len(key) == 1 and key[0] + 1 < len(text):
                targets[node] = text[key[0] + 1]
        logits = scratch[: len(keys)]
        logits.scatter_(1, best, values)
        accepted, path, _, continuation = ops.verify_tree(
            draft.tokens, targets[None], draft.parents
        )
        known = targets[None], path, accepted, continuation, history, lengths
        drafter.observe(Verified(draft, lambda: logits[None], *known))
        logits.scatter_(1, best, -torch.inf)
        gained = min(int(accepted), len(text) - length)
        history[0, length : length + gained] = torch.tensor(text[length : length + gained])
        length += gained
        accept_lengths.append(gained)
    return accept_lengths


def replay_all(
    drafters: dict, model, text: list[int], prompt: int, scratch: Tensor
) -> dict[str, list[int]]:
    """Return the accept lengths of every drafter; what all of them ask for next is computed
    together.

    Args:
        drafters: by name, each an object of its own.
        text: the prompt's tokens, so many, and what follows.
        scratch: float32 [256, vocabulary], minus infinity throughout, as it is afterwards.
    """
    teacher = Teacher(model, text)
    results: dict[str, list[int]] = {}
    running = {
        name: replay(drafter, teacher, text, prompt, scratch.shape[1], scratch)
        for name, drafter in drafters.items()
    }
    while running:
        asked: set[tuple[int, ...]] = set()
        for name, run in list(running.items()):
            try:
                asked |= next(run)
            except StopIteration as stop:
                results[name] = stop.value
                del running[name]
        teacher.learn(asked)
    return {name: results[name] for name in drafters}
