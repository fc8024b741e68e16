"""One step of decoding: draft, one forward pass, verify, commit."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel

from msn_ext import ops
from msn_ext.ops import MAX_NODES

from .attention import KernelAttention, MaskAttention, TreeContext
from .cache import TreeCache
from .drafters.protocol import Draft, Drafter, Verified
from .drafters.tree import DraftTree
from .processors import Texts
from .support import rope_types
from .verification import as_compared, greedy

REREADING = {"phi3", "phimoe", "phi4_multimodal"}
"""Families that read the text anew where 'longrope' switches its factors."""

AT_FIRST = 1536
"""Slots behind the prompt that a cache of fixed slots begins with; they double as they are used up.
"""

Targets = Callable[[Tensor, Tensor, LogitsProcessorList, Texts], Tensor]


def longrope_boundary(config, input_ids: Tensor, offsets: Tensor, max_new_tokens: int) -> int:
    """The slot where 'longrope' switches its factors for the whole batch; 0: not on the way.

    Raises:
        ValueError: it lies on the way of several rows.
    """
    if "longrope" not in rope_types(config):
        return 0
    batch, prompt = input_ids.shape
    boundary = (
        config.rope_parameters.get("original_max_position_embeddings")
        or config.max_position_embeddings
    )
    boundary += int(offsets.min())
    if not prompt - 1 < boundary < prompt + max_new_tokens:
        return 0
    if batch > 1:
        raise ValueError(
            f"rope_type='longrope' changes its factors at {boundary} tokens, in the middle of this"
            " batch, and rows that grow at their own pace would not switch together; generate row"
            " by row, or stop before"
        )
    return boundary


@dataclass
class Gained:
    """What one forward pass gave.

    Attributes:
        tokens: int64 [B, N]; row b gained ``tokens[b, :counts[b]]``.
        status: int64 [3, B], all that the host has to read: ``counts``, the tokens that each row
            may still gain (0: finished), and whether a gained token is none of the vocabulary (a
            draw from probabilities that hold NaN).
    """

    tokens: Tensor
    status: Tensor

    def read(self) -> Gained:
        """The same, its status on the host."""
        return Gained(self.tokens, self.status.cpu())


class Decoder:
    """The state of a batch that is being decoded; all of it on the model's device, changed in
    place.

    ``history[b, :lengths[b]]`` are the tokens so far, without padding. The last one is the root of
    the next tree: its key and value are not cached yet. Positions are logical: left padding has
    none.

    Args:
        model: a causal language model.
        attention: how it attends to a tree, from :func:`.support.attention_for`.
        input_ids: int64 [B, P], left-padded prompts.
        offsets: int64 [B], how much of each is padding.
        drafter: where the guesses come from; it is started here.
        targets: the next token after every node (:mod:`.verification`).
        processors: of the logits, as :func:`.processors.followed` gives them.
        max_new_tokens: tokens to gain per row, exactly unless an end-of-text token comes first.
        eos_token_ids: int64 [E]; what ends a row.
        room: slots for the text, all of them from the beginning, so that every step has the same
            shapes, until :meth:`make_room` gives the cache more of them; None: as many as are
            needed, by and by.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        attention: KernelAttention | MaskAttention,
        input_ids: Tensor,
        offsets: Tensor,
        drafter: Drafter,
        targets: Targets,
        processors: LogitsProcessorList,
        max_new_tokens: int,
        eos_token_ids: Tensor,
        room: int | None = None,
    ):
        batch, prompt = input_ids.shape
        self._model = weakref.ref(
            model
        )  # recordings of its steps stay as long as the model does, and no longer
        self.drafter, self._attention = drafter, attention
        self.targets, self._processors = targets, processors
        self._config = model.config.get_text_config(decoder=True)
        self._room = room
        self._cache = TreeCache(self._config, fixed=room and min(room, prompt + AT_FIRST))
        self._forwards_all_logits = not model._supports_logits_to_keep()
        self._history = input_ids.new_zeros(batch, room or prompt + max_new_tokens + MAX_NODES)
        self._prompts = input_ids.new_zeros(batch, room or prompt)
        self._offsets, self._eos = offsets.clone(), eos_token_ids.clone()
        self._lengths, self._prompt_lengths, self._remaining, self._last_position = (
            offsets.new_empty(4, batch).unbind()
        )
        self.begin(input_ids, offsets, max_new_tokens, eos_token_ids)

    @property
    def model(self) -> PreTrainedModel:
        return self._model()

    def begin(
        self, input_ids: Tensor, offsets: Tensor, max_new_tokens: int, eos_token_ids: Tensor
    ) -> None:
        """Other prompts, as many of them and of end-of-text tokens, that fit into the room."""
        batch, prompt = input_ids.shape
        device = input_ids.device
        self._input_ids = input_ids
        self._prompts[:, :prompt] = input_ids
        self._offsets.copy_(offsets)
        self._eos.copy_(eos_token_ids)
        self._cache.clear()
        self.drafter.start(batch, self._config.vocab_size, device)
        columns = torch.arange(prompt, device=device)
        self._history.zero_()
        self._history[:, :prompt] = input_ids.gather(
            1, (columns + offsets[:, None]).clamp(max=prompt - 1)
        )
        self._lengths.copy_(prompt - offsets)
        self._prompt_lengths.copy_(self._lengths)
        self._remaining.fill_(max_new_tokens)
        # The last position that plain decoding would compute. Nodes beyond it are computed there
        # (tables of learned positions end somewhere); what they say is never used.
        self._last_position.copy_((self._lengths + max_new_tokens - 2).clamp(min=0))
        # Slots of the longest row before its root, a bound that needs no word from the device.
        self._longest = prompt - 1
        self._shallow_until = longrope_boundary(self._config, input_ids, offsets, max_new_tokens)
        # transformers forgets the cache of these when the factors switch, and reads the text anew.
        self._rereads = (
            self._shallow_until and self._config.model_type in REREADING and not bool(offsets.any())
        )

    def make_room(self) -> bool:
        """Give the cache more slots where this step, behind one that nobody has read, might not
        fit; whether it moved.
        """
        return self._cache.fit(min(self._room, self._longest + 2 * MAX_NODES), self._room)

    def _straddles(self, depth: int) -> bool:
        """Whether a draft of this depth might reach across the longrope boundary: then nothing is
        drafted.
        """
        return self._longest < self._shallow_until <= self._longest + depth

    def _roots(self) -> Tensor:
        """The last token of every row, int64 [B, 1]."""
        return self._history.gather(1, self._lengths[:, None] - 1)

    def _chain(self, guesses: Tensor | None = None) -> Draft:
        """The root and ``guesses`` [B, n] (none: plain decoding), one below the other."""
        tokens = self._roots() if guesses is None else torch.cat([self._roots(), guesses], dim=1)
        return Draft.shaped(tokens, DraftTree.chain(tokens.shape[1]).tensors(tokens.device))

    @torch.no_grad()
    def prefill(self) -> Gained:
        """The first pass: the prompt, and behind it a chain of guesses, checked like any tree."""
        guesses = self.drafter.first(self._history, self._lengths)
        draft = self._chain(None if self._straddles(guesses.shape[1]) else guesses)
        return self._read(torch.cat([self._input_ids, draft.tokens[:, 1:]], dim=1), draft)

    def _read(self, ids: Tensor, draft: Draft) -> Gained:
        """A pass over whole texts, padding included, that end in a draft that is a chain."""
        total = ids.shape[1]
        self._cache.at_start(total)
        columns = torch.arange(total, device=ids.device)
        padded = bool((self._offsets > 0).any())
        positions = (
            (columns - self._offsets[:, None]).clamp(min=0).minimum(self._last_position[:, None])
        )
        mask = (columns >= self._offsets[:, None]).long() if padded else None
        with self._attention.reading():
            logits = self._forward(ids, positions, mask, keep=len(draft))
        return self._finish(draft, positions[:, -len(draft) :], logits, self._prefix())

    @torch.no_grad()
    def step(self) -> Gained:
        """Every later pass: a tree behind the cached prefix."""
        if self._rereads and self._longest == self._shallow_until:
            return self._read(self._history[:, : self._longest + 1], self._chain())
        if self._straddles(self.drafter.max_depth):
            draft = self._chain()
        else:
            draft = self.drafter.propose(self._history, self._lengths)
        draft.tokens[:, :1] = self._roots()
        if (
            self.targets is not greedy
        ):  # what could not be drawn, if nobody has read yet that it could not
            draft.tokens.clamp_(max=self._config.vocab_size - 1)
        prefix = self._prefix()
        self._cache.at(prefix, len(draft), self._longest + len(draft))
        # Padding nodes have depth -1; they are computed at the root's position and never used.
        depth = draft.depth.clamp(min=0)
        positions = ((self._lengths - 1)[:, None] + depth).minimum(self._last_position[:, None])
        context = TreeContext(prefix, self._offsets, draft.ancestors)
        with self._attention.checking(context, self._cache.end, self.model.dtype) as mask:
            logits = self._forward(draft.tokens, positions, mask, keep=len(draft))
        return self._finish(draft, positions, logits, prefix)

    def _prefix(self) -> Tensor:
        """Slots of each row before its root, int64 [B]."""
        return self._lengths - 1 + self._offsets

    def _forward(self, ids: Tensor, positions: Tensor, mask, keep: int) -> Tensor:
        """Logits [B, keep, V] of the last ``keep`` tokens."""
        limit = {} if self._forwards_all_logits else {"logits_to_keep": keep}
        return self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            return_dict=True,
            **limit,
        ).logits[:, -keep:]

    def _finish(self, draft: Draft, positions: Tensor, logits: Tensor, prefix: Tensor) -> Gained:
        """Verify, commit, and show the drafter what came of it; no host sync."""
        guesses = None
        if self.targets is greedy and not self._processors:
            checked = ops.verify_logits(as_compared(logits), draft.tokens, draft.parents)
            guesses, targets, accepted, path, _, continuation = checked
        else:
            texts = Texts(draft, self._history, self._lengths, self._prompts, self._offsets)
            targets = self.targets(logits, positions, self._processors, texts)
            accepted, path, _, continuation = ops.verify_tree(draft.tokens, targets, draft.parents)
        self._cache.commit(prefix, path, accepted)
        self.drafter.observe(
            Verified(
                draft,
                logits,
                targets,
                path,
                accepted,
                continuation,
                self._history,
                self._lengths,
                guesses,
            )
        )

        text = self._history, self._lengths, self._remaining
        return Gained(
            *ops.advance_text(*text, targets, path, accepted, self._eos, logits.shape[-1])
        )

    @property
    def cache_bytes(self) -> int:
        return self._cache.nbytes

    def advance(self, longest_gain: int) -> None:
        """Tell the decoder how many tokens the longest row has gained in all (the host's bound)."""
        self._longest = self._input_ids.shape[1] - 1 + longest_gain

    def row(self, b: int) -> Tensor:
        """Prompt (padding included) and new tokens of one row, int64 [length]."""
        new = self._history[b, int(self._prompt_lengths[b]) : int(self._lengths[b])]
        return torch.cat([self._input_ids[b], new])

    def cut(self, b: int, count: int) -> None:
        """Take back the last ``count`` tokens of row b and finish it."""
        self._lengths[b] -= count
        self._remaining[b] = 0

    def sequences(self, longest_gain: int, pad: int) -> Tensor:
        """Prompts and new tokens, int64 [B, P + longest_gain], ``pad`` behind the shorter rows."""
        columns = torch.arange(longest_gain, device=self._history.device)
        new = self._history.gather(1, self._prompt_lengths[:, None] + columns)
        ended = columns >= (self._lengths - self._prompt_lengths)[:, None]
        return torch.cat([self._input_ids, new.masked_fill(ended, pad)], dim=1)
