"""transformers' processors of logits, on the nodes of a draft: temperature, top-p, repetition
penalty, …
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
    WatermarkLogitsProcessor,
)

from .drafters import Draft
from .grammars import Grammar, GrammarFollower

ROWS = 64  # of logits that are processed at a time, some of it in float64
PREFIX_FREE = frozenset(
    {
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
        MinPLogitsWarper,
        TopHLogitsWarper,
        TypicalLogitsWarper,
        EpsilonLogitsWarper,
        EtaLogitsWarper,
        InfNanRemoveLogitsProcessor,
        LogitNormalization,
        SuppressTokensLogitsProcessor,
    }
)
"""Processors of logits whose result does not depend on the text before."""
PREFIX_BOUND = frozenset(
    {
        RepetitionPenaltyLogitsProcessor,
        NoRepeatNGramLogitsProcessor,
        NoBadWordsLogitsProcessor,
        SequenceBiasLogitsProcessor,
        MinLengthLogitsProcessor,
        MinNewTokensLengthLogitsProcessor,
        ExponentialDecayLengthPenalty,
        ForcedBOSTokenLogitsProcessor,
        ForcedEOSTokenLogitsProcessor,
        SuppressTokensAtBeginLogitsProcessor,
        PrefixConstrainedLogitsProcessor,
        EncoderRepetitionPenaltyLogitsProcessor,
        EncoderNoRepeatNGramLogitsProcessor,
        WatermarkLogitsProcessor,
    }
)
"""Processors whose result depends on nothing but the text before and the logits."""
REFUSED = {
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": "runs the model itself, token by token",
    "ClassifierFreeGuidanceLogitsProcessor": "needs the logits of two texts",
    "DiaClassifierFreeGuidanceLogitsProcessor": "needs the logits of two texts",
    "SynthIDTextWatermarkLogitsProcessor": "remembers which contexts it has seen",
}
"""Processors that cannot be declared ``stateless`` either, and why."""

_Processor = TypeVar("_Processor")


def stateless(processor: _Processor) -> _Processor:
    """Declare that a processor of logits is a function of ``(input_ids, scores)`` alone, row by
    row, so that :func:`msn_ext.generate` may ask it about guesses, several of one row at a time.

    Args:
        processor: a class, an object or a function, which gets ``stateless = True``. Can be used as
            a decorator.
    """
    processor.stateless = True  # type: ignore[attr-defined]
    return processor


def checked_processors(processors: LogitsProcessorList, rows: int) -> LogitsProcessorList:
    """Return the processors as they apply to the nodes of ``rows`` rows.

    Raises:
        ValueError: one of them cannot be followed; says why.
    """
    found, known = LogitsProcessorList(), PREFIX_FREE | PREFIX_BOUND
    for processor in processors:
        name = getattr(processor, "__name__", type(processor).__name__)
        if type(processor).__name__ in REFUSED:
            raise ValueError(f"{name} {REFUSED[name]}; msn_ext.generate cannot follow it")
        if isinstance(processor, Grammar):
            found.append(GrammarFollower(processor, rows))
            continue
        if type(processor) not in known and not getattr(processor, "stateless", False):
            names = ", ".join(sorted(kind.__name__ for kind in known))
            raise ValueError(
                f"{type(processor).__name__} may keep a state from token to token, which guesses"
                f" would spoil; msn_ext.generate supports {names}, and what is declared with"
                " msn_ext.stateless"
            )
        _check_encoder_rows(processor, rows)
        ignored = getattr(processor, "prompt_ignore_length", None)
        if isinstance(ignored, Tensor):  # transformers' own, of padding
            if ignored.shape != (rows,):
                raise ValueError(
                    f"prompt_ignore_length has shape {list(ignored.shape)}; expected [{rows}], one"
                    " number per row"
                )
            if not ignored.any():
                processor = RepetitionPenaltyLogitsProcessor(processor.penalty)
        found.append(processor)
    return found


def _check_encoder_rows(processor, rows: int) -> None:
    """Raise ValueError where a processor's own texts are not as many as divide the rows."""
    if type(processor) is EncoderRepetitionPenaltyLogitsProcessor:
        own = len(processor.encoder_input_ids)
    elif type(processor) is EncoderNoRepeatNGramLogitsProcessor:
        own = processor.batch_size
    else:
        return
    if rows % own:
        raise ValueError(f"encoder_input_ids has {own} rows; expected {rows}, as input_ids has")


def at_once(processor: LogitsProcessor) -> bool:
    """Return whether it can run on all nodes at once: it does not look at the text before, or only
    for which tokens are in it.
    """
    if type(processor) is RepetitionPenaltyLogitsProcessor:
        return processor.prompt_ignore_length is None
    return type(processor) in PREFIX_FREE


@dataclass
class Texts:
    """The texts up to the nodes of a draft, for the processors of logits that ask for them.

    Attributes:
        draft: of B rows and N nodes.
        history, lengths: as a :class:`.drafters.Drafter` has them, before the draft was checked.
        prompts: int64 [B, P or more], of which the first ``offsets`` [B] of a row are padding.
        remaining: int64 [B], tokens that the rows may still gain; 0: nobody asks about it any more.
        ends: int64 [E], the tokens that end a row.
    """

    draft: Draft
    history: Tensor
    lengths: Tensor
    prompts: Tensor
    offsets: Tensor
    remaining: Tensor
    ends: Tensor

    def before(self, vocabulary: int) -> Tensor:
        """Mark the tokens that the texts have up to the root, padding included: bool [B,
        vocabulary + 1], the last column rubbish.
        """
        text = torch.cat([self.prompts, self.history], dim=1)
        slots, positions = (
            torch.arange(x.shape[1], device=text.device) for x in (self.prompts, self.history)
        )
        there = torch.cat([slots < self.offsets[:, None], positions < self.lengths[:, None]], dim=1)
        found = torch.zeros(len(text), vocabulary + 1, dtype=torch.bool, device=text.device)
        return found.scatter_(1, torch.where(there, text, vocabulary).clamp_(max=vocabulary), True)

    def seen(self, before: Tensor, places: slice) -> Tensor:
        """Mark the same up to some of the B * N nodes, bool [R, vocabulary]."""
        batch, nodes = self.draft.tokens.shape
        node = torch.arange(batch * nodes, device=before.device)[places]
        row, node = node // nodes, node % nodes
        bits = self.draft.ancestors.expand(batch, nodes, -1)[row, node]
        bits = (bits[..., None] >> torch.arange(64, device=bits.device) & 1).flatten(1)[:, :nodes]
        rubbish = before.shape[1] - 1
        above = torch.where(bits > 0, self.draft.tokens[row], rubbish).clamp_(max=rubbish)
        return before[row].scatter_(1, above, True)[:, :rubbish]

    def by_depth(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Go row by row and depth by depth: the row, the places of its nodes among all B * N,
        int64 [R], and the texts up to them, int64 [R, L], as transformers has them, with padding in
        front. Waits for the device; padding, tails and rows that have ended have none.
        """
        device, shape = self.history.device, self.draft.tokens.shape
        lengths, offsets = self.lengths.tolist(), self.offsets.tolist()
        remaining = self.remaining.tolist()
        rows = zip(
            *(
                x.expand(shape).tolist()
                for x in (self.draft.tokens, self.draft.parents, self.draft.depth)
            )
        )
        for b, (tokens, parents, depths) in enumerate(rows):
            if not remaining[b]:
                continue
            before = torch.cat([self.prompts[b, : offsets[b]], self.history[b, : lengths[b]]])
            paths: list[list[int]] = [[]]
            for node in range(1, len(tokens)):
                if parents[node] < 0:  # padding, or a tail, whose depth is that of its chain
                    depths[node] = -1
                paths.append([*paths[parents[node]], tokens[node]] if depths[node] > 0 else [])
            for depth in sorted(set(depths) - {-1}):
                nodes = [node for node in range(len(tokens)) if depths[node] == depth]
                after = torch.tensor(
                    [paths[node] for node in nodes], dtype=torch.int64, device=device
                ).view(len(nodes), depth)
                places = torch.tensor(nodes, device=device) + b * len(tokens)
                yield b, places, torch.cat([before.expand(len(nodes), -1), after], dim=1)


def processed(
    logits: Tensor, processors: LogitsProcessorList, texts: Texts, every: bool = False
) -> Iterator[tuple[slice | Tensor, Tensor]]:
    """Yield places of nodes among all B * N, and their logits as the processors leave them, float32
    [R, V]: of the nodes that plain decoding might come to, or of ``every`` one.
    """
    logits = logits.flatten(0, 1)
    if all(map(at_once, processors)):
        yield from processed_at_once(logits, processors, texts)
        return
    last, reached = None, _Reached(texts)
    masks = {
        id(follower): follower.masks(texts.draft)
        for follower in processors
        if isinstance(follower, GrammarFollower)
    }
    for row, places, text in texts.by_depth():
        if row != last:
            last, own = row, _of_row(processors, row, len(texts.lengths))
        if not every:
            asked = reached.asked(places)
            places, text = places[asked], text[asked]
        if not len(places):
            continue
        scores = logits[places].float()
        for processor in own:
            if isinstance(processor, GrammarFollower):
                scores = processor.grammar.applied(scores, masks[id(processor)][places])
            else:
                scores = processor(cast(torch.LongTensor, text), cast(torch.FloatTensor, scores))
        reached.go_on(places, scores)
        yield places, scores


class _Reached:
    """Which nodes of a draft plain decoding might come to. About others it would never ask, and a
    processor may have no answer: their own token, or one above, has no probability or is an end.
    """

    def __init__(self, texts: Texts):
        shape = texts.draft.tokens.shape
        self._tokens = texts.draft.tokens.flatten()
        first = torch.arange(shape[0], device=self._tokens.device)[:, None] * shape[1]
        parents = texts.draft.parents.expand(shape)
        self._parents = torch.where(parents < 0, -1, parents + first).flatten()
        self._nodes = self._parents < 0  # roots, and padding
        self._ended = (~self._nodes) & torch.isin(self._tokens, texts.ends)

    def asked(self, places: Tensor) -> Tensor:
        """Return of which of the places [R] the next token is asked for, bool [R]."""
        return self._nodes[places] & ~self._ended[places]

    def go_on(self, places: Tensor, scores: Tensor) -> None:
        """Note by the scores [R, V] after the nodes at the places which come after them."""
        at = torch.full_like(self._parents, -1)
        at[places] = torch.arange(len(places), dtype=at.dtype, device=at.device)
        below = (self._parents >= 0).logical_and_(at[self._parents] >= 0).nonzero()[:, 0]
        above = at[self._parents[below]].long()
        possible = ~scores.isneginf()
        possible |= ~possible.any(1, keepdim=True)  # then any token may be taken
        self._nodes[below] = possible[above, self._tokens[below]]


def processed_at_once(
    logits: Tensor, processors: LogitsProcessorList, texts: Texts
) -> Iterator[tuple[slice, Tensor]]:
    """Process the logits of all nodes [B * N, V], :data:`ROWS` of them at a time."""
    before = (
        None
        if all(type(processor) in PREFIX_FREE for processor in processors)
        else texts.before(logits.shape[-1])
    )
    for begin in range(0, len(logits), ROWS):
        places = slice(begin, begin + ROWS)
        scores = logits[places].float()
        text = scores.new_zeros(len(scores), 1, dtype=torch.int64)
        for processor in processors:
            if type(processor) is RepetitionPenaltyLogitsProcessor:
                penalised = torch.where(
                    scores < 0, scores * processor.penalty, scores / processor.penalty
                )
                assert before is not None, "this one is not free of the text before"
                scores = torch.where(texts.seen(before, places), penalised, scores)
            else:
                scores = processor(text, scores)
        yield places, scores


def _of_row(processors: LogitsProcessorList, row: int, rows: int) -> LogitsProcessorList:
    """Return the same; of those that tell the rows of a batch apart, what is meant for this one."""
    found = LogitsProcessorList()
    for processor in processors:
        ignored = getattr(processor, "prompt_ignore_length", None)
        if isinstance(ignored, Tensor):
            processor = RepetitionPenaltyLogitsProcessor(processor.penalty, int(ignored[row]))
        elif type(processor) is PrefixConstrainedLogitsProcessor:
            allowed = processor._prefix_allowed_tokens_fn
            processor = PrefixConstrainedLogitsProcessor(
                functools.partial(_allowed_in_row, allowed, row), 1
            )
        elif type(processor) is EncoderRepetitionPenaltyLogitsProcessor:
            own = processor.encoder_input_ids
            processor = functools.partial(_with_text, processor, own[row * len(own) // rows])
        elif type(processor) is EncoderNoRepeatNGramLogitsProcessor:
            processor = copy.copy(processor)
            processor.generated_ngrams = [
                processor.generated_ngrams[row * processor.batch_size // rows]
            ]
            processor.batch_size = 1
        found.append(processor)
    return found


def _with_text(
    penalty: EncoderRepetitionPenaltyLogitsProcessor, own: Tensor, text: Tensor, scores: Tensor
) -> Tensor:
    """Return scores [R, V] after texts [R, L] as a penalty of the tokens ``own`` [K] leaves them:
    transformers before 5.20 leaves out all rows but as many as it has texts of its own.
    """
    penalty = copy.copy(penalty)
    penalty.encoder_input_ids = cast(torch.LongTensor, own.expand(len(scores), -1))
    return penalty(cast(torch.LongTensor, text), cast(torch.FloatTensor, scores))


def _allowed_in_row(allowed: Callable[[int, Tensor], list[int]], row: int, _, text: Tensor):
    return allowed(row, text)
