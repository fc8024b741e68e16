"""The decoder: the state of a batch, and the forward passes that it is decoded by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from msn_ext import ops
from msn_ext.ops import MAX_NODES

from .drafters import Draft, DraftTree, NoiseDrafter, Verified, as_compared
from .drafters.checks import checked_chain, checked_draft, is_others
from .forward import ForwardPass
from .forward.fused import FusedForward, FusedPlan
from .forward.native import NativeForward
from .forward.packed import PackedPlan
from .forward.protocol import Answers
from .forward.transformers import TransformersForward
from .grammars import FORCED, GrammarFollower
from .native_steps import NativeSteps, can_draft
from .outputs import Outputs
from .past import KeysValues, reused_of
from .processors import PREFIX_FREE, Texts, processed
from .request import Request
from .support import longrope_tokens, looks_ahead
from .verification import Sampler, greedy

RECOMPUTING = {"phi3", "phimoe", "phi4_multimodal"}
"""Families whose cache transformers drops where 'longrope' switches its factors, to compute the
text anew.
"""

AT_FIRST = 1536
"""Slots after the prompt that a cache of fixed slots begins with; they double as they are used up.
"""

READ_ON = 64
"""Tokens that are read at once after rows that have ended."""


@dataclass
class PassResult:
    """The tokens that one forward pass gained.

    Attributes:
        tokens: int64 [B, N]; row b gained ``tokens[b, :counts[b]]``.
        status: int64 [3, B], all that the host has to read: ``counts``, the tokens that each row
            may still gain (0: finished), and whether it is of no use: a gained token is none of the
            vocabulary (a draw from probabilities that hold NaN), or a prompt gave NaN; to which
            :mod:`.drafters.checks` adds its own.
        outputs: what the tokens were taken from, of those that the request keeps.
    """

    tokens: Tensor
    status: Tensor
    outputs: Outputs = field(default_factory=dict)

    def but(self, wrong: Tensor | None) -> PassResult:
        """Return the same, which says that the proposal was wrong where it was, int64 []."""
        if wrong is not None:
            self.status[2] += wrong
        return self

    def to_host(self) -> PassResult:
        """Return the same with its status on the host."""
        return PassResult(self.tokens, self.status.cpu(), self.outputs)


class Decoder:
    """The state of a batch that is being decoded; all of it on the model's device, changed in
    place.

    ``history[b, :lengths[b]]`` are the tokens so far by positions, without padding. The last one is
    the root of the next tree: its key and value are not cached yet. Prompts and cache have slots
    (:class:`.request.Request` tells the two apart).

    Args:
        request: what to decode; its drafter is started here.
        room: slots for the text, all of them from the beginning, so that every step has the same
            shapes, until :meth:`make_room` gives the cache more of them; None: as many as are
            needed, when they are.
    """

    def __init__(self, request: Request, room: int | None = None):
        batch, prompt = request.input_ids.shape
        self.drafter = request.drafter
        self.targets, self._processors = request.targets, request.processors
        self._grammars = [p for p in self._processors if isinstance(p, GrammarFollower)]
        self._config = request.model.config.get_text_config(decoder=True)
        self._vocabulary = self._config.vocab_size
        self._room, self._kept = room, request.outputs
        if isinstance(self.targets, Sampler):
            self.targets.may_wait = room is None  # with one, steps may be captured
        self._pass: ForwardPass
        fixed = room and min(room, prompt + AT_FIRST)
        by_model = request.model, request.attention, fixed, request.noise_adapter
        if isinstance(request.native_plan, PackedPlan):
            self._pass = NativeForward(request.native_plan, batch, request.noise_adapter)
        elif isinstance(request.native_plan, FusedPlan):
            self._pass = FusedForward(request.native_plan, *by_model)
        else:
            self._pass = TransformersForward(*by_model)
        ids, offsets = request.input_ids, request.offsets
        columns = room or prompt + request.max_new_tokens + MAX_NODES
        self._history = ids.new_zeros(batch, columns)
        self._prompts = ids.new_zeros(batch, room or prompt)
        self._offsets, self._eos = offsets.clone(), request.eos_token_ids.clone()
        self._lengths, self._prompt_lengths, self._remaining, self._last_position = (
            offsets.new_empty(4, batch).unbind()
        )
        self.begin(request)

    def begin(self, request: Request) -> None:
        """Begin with the prompts of a request that has as many rows and end-of-text tokens, and
        fits into the room.
        """
        input_ids, offsets = request.input_ids, request.offsets
        batch, prompt = input_ids.shape
        device = input_ids.device
        self._prompt_slots = prompt
        self._prompts[:, :prompt] = input_ids
        self._offsets.copy_(offsets)
        self._eos.copy_(request.eos_token_ids)
        self._pass.clear()
        self._past_slots = request.past_slots
        if request.past is not None and request.past_slots:
            reused = reused_of(request.past, request.past_slots)
            self._pass.load(reused, request.past_slots, offsets)
        if isinstance(self.drafter, NoiseDrafter):
            self.drafter.use_noise(request.noise_adapter)
        self.drafter.start(batch, self._vocabulary, device)
        self._checks = is_others(self.drafter)
        columns = torch.arange(prompt, device=device)
        self._history.zero_()
        self._history[:, :prompt] = input_ids.gather(
            1, (columns + offsets[:, None]).clamp(max=prompt - 1)
        )
        self._lengths.copy_(prompt - offsets)
        self._prompt_lengths.copy_(self._lengths)
        self._remaining.fill_(request.max_new_tokens)
        # The last position that plain decoding would compute. Nodes beyond it are computed there
        # (tables of learned positions end somewhere); what they say is never used.
        self._last_position.copy_((self._lengths + request.max_new_tokens - 2).clamp(min=0))
        # The slot of the root in the longest row, or a later one: the host's bound, which needs no
        # word from the device.
        self._last_root = prompt - 1
        self._looks_ahead = looks_ahead(self._config)
        self._boundary = request.longrope_boundary
        self._recomputes = (
            self._boundary and self._config.model_type in RECOMPUTING and not bool(offsets.any())
        )
        self._native_steps = self._steps_in_cpp()

    def _steps_in_cpp(self) -> NativeSteps | None:
        """Return what runs the steps of this request; None: they are run by ops."""
        forward = self._pass
        if not (isinstance(forward, NativeForward) and forward.verifies):
            return None
        if self._boundary or self._kept or not can_draft(self.drafter):
            return None
        if not self._greedily and not self._draws_by_logits:
            return None
        return NativeSteps(
            forward,
            self.drafter,
            self._vocabulary,
            None if self._greedily else self._drawn,
            history=self._history,
            lengths=self._lengths,
            remaining=self._remaining,
            last_position=self._last_position,
            ends=self._eos,
        )

    def make_room(self) -> bool:
        """Give the cache more slots where the next step might not fit, after one whose result the
        host does not know yet; return whether the cache moved.
        """
        assert self._room is not None, "only a decoder with a room has to make more"
        return self._pass.make_room(min(self._room, self._last_root + 2 * MAX_NODES), self._room)

    def _straddles(self, depth: int) -> bool:
        """Return whether a draft of this depth might reach across the longrope boundary; nothing is
        drafted then.
        """
        return self._last_root < self._boundary <= self._last_root + depth

    def _roots(self) -> Tensor:
        """Return the last token of every row, int64 [B, 1]."""
        return self._history.gather(1, self._lengths[:, None] - 1)

    def _chain(self, guesses: Tensor | None = None) -> Draft:
        """Return the root and ``guesses`` [B, n] (none: plain decoding), one below the other."""
        tokens = self._roots() if guesses is None else torch.cat([self._roots(), guesses], dim=1)
        return Draft.shaped(tokens, DraftTree.chain(tokens.shape[1]).tensors(tokens.device))

    @torch.no_grad()
    def prefill(self) -> PassResult:
        """Run the first pass: the prompt, and after it a chain of guesses, checked like a tree."""
        guesses, wrong = self.drafter.first(self._history, self._lengths), None
        if self._checks:
            texts = self._history
            guesses, wrong = checked_chain(guesses, self.drafter, texts, self._vocabulary)
        self._follow_texts(self._lengths)
        if self._grammars and guesses.shape[1]:
            guesses = self._grammars[0].opening(guesses)
        alone = self._looks_ahead or self._straddles(guesses.shape[1])
        draft = self._chain(None if alone else guesses)
        prompts = self._prompts[:, : self._prompt_slots]
        ids = torch.cat([prompts, draft.tokens[:, 1:]], dim=1)
        return self._prefill(ids, draft, self._past_slots).but(wrong)

    def _prefill(self, ids: Tensor, draft: Draft, start: int = 0) -> PassResult:
        """Run whole texts [B, slots], padding included, that end in a draft that is a chain; the
        first ``start`` slots are cached.
        """
        positions = self._positions(ids.shape[1])
        logits = self._pass.read(ids, positions, self._offsets, len(draft), start)
        self._columns = logits.shape[-1]
        at = positions[:, -len(draft) :]
        result = self._verify(draft, at, Answers(logits), self._prefix())
        # NaN at padding reaches every token's hidden state, and by that all of a row's logits,
        # whatever processors make of them.
        result.status[2] |= logits[:, 0, 0].isnan()
        return result

    def _positions(self, slots: int) -> Tensor:
        columns = torch.arange(slots, device=self._offsets.device)
        return (columns - self._offsets[:, None]).clamp(min=0).minimum(self._last_position[:, None])

    def step(self) -> PassResult:
        """Run a later pass: a tree after the cached prefix."""
        if self._native_steps is not None:
            return PassResult(*self._native_steps.step(self._last_root))
        return self._step_by_ops()

    @torch.no_grad()
    def _step_by_ops(self) -> PassResult:
        if self._recomputes and self._last_root == self._boundary:
            return self._prefill(self._history[:, : self._last_root + 1], self._chain())
        wrong, depth = None, self.drafter.max_depth
        self._follow_texts(self._lengths)
        if self._straddles(max(depth, FORCED) if self._grammars else depth):
            draft = self._chain()
        else:
            draft = self.drafter.propose(self._history, self._lengths)
            if self._checks:
                texts = self._history
                draft, wrong = checked_draft(draft, self.drafter, texts, self._vocabulary)
            if self._grammars and depth:
                draft = self._grammars[0].with_forced(draft)
        # The root may be what could not be drawn, where the host does not know yet of that.
        positions, prefix = ops.place_tree(
            draft.tokens,
            self._history,
            self._lengths,
            self._offsets,
            self._last_position,
            draft.depth,
            self._vocabulary,
        )
        end = self._last_root + len(draft)
        answers = self._pass.check(
            draft.tokens,
            positions,
            prefix,
            self._offsets,
            draft.ancestors,
            end,
            draft.tails,
            draft.parents if self._greedily else None,
        )
        return self._verify(draft, positions, answers, prefix).but(wrong)

    @property
    def _greedily(self) -> bool:
        """Whether the largest logits are the next tokens, as they are."""
        return self.targets is greedy and not self._processors

    @property
    def _draws_by_logits(self) -> bool:
        """Whether the next tokens are draws that no text is asked for."""
        free = all(type(processor) in PREFIX_FREE for processor in self._processors)
        return isinstance(self.targets, Sampler) and free

    def _drawn(self, logits: Tensor, positions: Tensor) -> Tensor:
        """Return the next tokens of a step where :attr:`_draws_by_logits`."""
        nobody_asks = cast(Texts, None)
        return self.targets(logits, positions, self._processors, nobody_asks)

    def _follow_texts(self, lengths: Tensor) -> None:
        """Let grammars know the texts of these lengths; waits for the device."""
        for grammar in self._grammars:
            grammar.advance(self._history, lengths)

    def _prefix(self) -> Tensor:
        """Return the slots of each row before its root, int64 [B]."""
        return self._lengths - 1 + self._offsets

    def _verify(
        self, draft: Draft, positions: Tensor, answers: Answers, prefix: Tensor
    ) -> PassResult:
        """Verify a draft, commit what is accepted, and show it to the drafter; no host sync."""
        guesses = None
        if self._greedily:
            guesses, targets, accepted, path, _, continuation = (
                answers.verified
                or ops.verify_logits(as_compared(answers.logits), draft.tokens, draft.parents)
            )
        else:
            texts = Texts(
                draft,
                self._history,
                self._lengths,
                self._prompts,
                self._offsets,
                self._remaining,
                self._eos,
            )
            targets = self.targets(answers.logits, positions, self._processors, texts)
            accepted, path, _, continuation = ops.verify_tree(draft.tokens, targets, draft.parents)
        self._pass.commit(prefix, path, accepted)
        verified = Verified(
            draft,
            lambda: answers.logits,
            targets,
            path,
            accepted,
            continuation,
            self._history,
            self._lengths,
            guesses,
        )
        self.drafter.observe(verified)
        outputs = {}
        if self._kept:
            outputs = self._outputs_of_path(draft, answers.logits, path, accepted)
        tokens, status = ops.advance_text(
            self._history,
            self._lengths,
            self._remaining,
            targets,
            path,
            accepted,
            self._eos,
            self._columns,
        )
        return PassResult(tokens, status, outputs)

    def _outputs_of_path(
        self, draft: Draft, logits: Tensor, path: Tensor, accepted: Tensor
    ) -> Outputs:
        path = path[:, : int(accepted.max())].clamp(min=0)
        rows = torch.arange(len(path), device=path.device)[:, None]
        tokens = draft.tokens.gather(1, path)
        return self._outputs(tokens, logits[rows, path], self._lengths)

    def _outputs(self, tokens: Tensor, logits: Tensor, lengths: Tensor) -> Outputs:
        """Return the outputs after each of the tokens [B, n], a chain whose first is the texts'
        last.
        """
        logits = logits.to(torch.float32)
        outputs = {"logits": logits, "scores": logits}
        if self._processors and "scores" in self._kept:
            chain = Draft.shaped(tokens, DraftTree.chain(tokens.shape[1]).tensors(tokens.device))
            going, endless = torch.ones_like(lengths), self._eos[:0]
            texts = Texts(
                chain, self._history, lengths, self._prompts, self._offsets, going, endless
            )
            self._follow_texts(lengths)
            scores = torch.empty_like(logits)
            for places, those in processed(logits, self._processors, texts, every=True):
                scores.flatten(0, 1)[places] = those
            outputs["scores"] = scores
        return {name: outputs[name] for name in self._kept}

    @property
    def cache_bytes(self) -> int:
        return self._pass.nbytes

    def advance(self, longest_gain: int) -> None:
        """Tell the decoder how many tokens the longest row has gained in all (the host's bound)."""
        self._last_root = self._prompt_slots - 1 + longest_gain

    def row(self, b: int) -> Tensor:
        """Return the prompt (padding included) and the new tokens of one row, int64 [slots]."""
        new = self._history[b, int(self._prompt_lengths[b]) : int(self._lengths[b])]
        return torch.cat([self._prompts[b, : self._prompt_slots], new])

    def cut(self, b: int, count: int) -> None:
        """Take back the last ``count`` tokens of row b and finish it."""
        self._lengths[b] -= count
        self._remaining[b] = 0

    @torch.no_grad()
    def read_on(self, sequences: Tensor) -> Iterator[tuple[int, Outputs]]:
        """Read what rows that ended before others lack of the sequences, int64 [B, slots + 1], but
        for the last token: their last one and the padding after it, as plain decoding reads them.
        Yield the first new token that some outputs are of, and the outputs.
        """
        slots, start = sequences.shape[1] - 1, int(self._prefix().min())
        for b, offset in enumerate(self._offsets.tolist() if start < slots else ()):
            self._history[b, : slots + 1 - offset] = sequences[b, offset:]
        while start < slots:
            ids = sequences[:, : min(slots, start + READ_ON)]
            keep = ids.shape[1] - start
            positions = self._positions(ids.shape[1])
            logits = self._pass.read(
                ids, positions, self._offsets, keep if self._kept else 1, start
            )
            if self._kept:
                its = self._outputs(ids[:, start:], logits, start + 1 - self._offsets)
                yield start + 1 - self._prompt_slots, its
            start += keep

    def cached(self, sequences: Tensor) -> Iterable[KeysValues]:
        """Return by layer the keys and values of all slots of the sequences, int64 [B, slots + 1],
        but for the last one, whose token nobody has read; all others have been (:meth:`read_on`).
        None of them where 'longrope' has other factors for longer texts.
        """
        slots = sequences.shape[1] - 1
        first_factors = longrope_tokens(self._config)
        if first_factors and slots > first_factors + int(self._offsets.min()):
            return ()
        return self._pass.cached(slots)

    def sequences(self, new_tokens: int, pad: int) -> Tensor:
        """Return prompts and new tokens, int64 [B, P + new_tokens], with ``pad`` after the shorter
        rows.
        """
        columns = torch.arange(new_tokens, device=self._history.device)
        new = self._history.gather(1, self._prompt_lengths[:, None] + columns)
        ended = columns >= (self._lengths - self._prompt_lengths)[:, None]
        prompts = self._prompts[:, : self._prompt_slots]
        return torch.cat([prompts, new.masked_fill(ended, pad)], dim=1)
