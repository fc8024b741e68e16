"""The decoding loop: prefill, then steps, until every row has ended."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .decoder import Decoder
from .drafters import Drafter
from .drafters.checks import TOKENS, TREE, error_of
from .outputs import TokenOutputs
from .past import fill
from .ranks import one_clock
from .request import Request
from .runner import runner_for
from .streaming import streaming


@dataclass
class Decoded:
    """The output of a request.

    Attributes:
        sequences: int64 [B, P + new], prompts included, finished rows padded; on the model's
            device.
        counts: int64 [passes, B] on the host, the tokens that each pass gained.
        outputs: what each new token was taken from, as far as the request keeps it.
    """

    sequences: Tensor
    counts: Tensor
    outputs: TokenOutputs

    def accept_lengths(self) -> tuple[Tensor, ...]:
        """Return per row an int64 tensor with one entry a pass that gained something."""
        return tuple(row[row > 0] for row in self.counts.T)

    def output(self, name: str) -> tuple[Tensor, ...] | None:
        """Return the "logits" or "scores" of each new token, [B, V]; None: not kept."""
        return self.outputs.of(name, int(self.counts.sum(0).max()))


def decode(request: Request) -> Decoded:
    """Decode all rows of a request.

    Raises:
        ValueError: another call decodes with the drafter, the drafter refuses to start, or the
            model's probabilities hold NaN.
    """
    progress, outputs = Progress(request), TokenOutputs()
    one = one_clock(request.ranks)
    with one, exclusive(request.drafter), runner_for(request) as runner:
        with streaming(request) as stream:
            pending = runner.prefill()
            while True:
                # A row that a criterion cuts would not be cut in a step that is under way.
                ahead = runner.runs_ahead and not request.criteria
                following = runner.step() if ahead else None
                result = pending.result()
                counts, remaining, invalid = result.status.tolist()  # all that the host reads here
                if any(invalid):
                    raise _error(request, invalid)
                if request.criteria:
                    _ask_criteria(request, runner.decoder, counts, remaining, progress)
                before = progress.totals
                progress.add(counts)
                outputs.add(result.outputs, before, before, progress.totals)
                over = not any(remaining) or progress.all_ended
                if stream is not None:
                    ended = [over or not (left or request.ends_together) for left in remaining]
                    stream.put(result.tokens, counts, progress.settled, ended)
                if over:
                    break
                runner.decoder.advance(progress.longest)
                pending = following or runner.step()
        sequences = runner.decoder.sequences(progress.new_tokens, request.pad_token_id)
        if request.past is not None or request.outputs:
            for first, read in runner.decoder.read_on(sequences):
                count = next(iter(read.values())).shape[1]
                begin = [max(first, total) for total in progress.totals]
                ends = [max(first + count, at) for at in begin]
                outputs.add(read, [first] * len(begin), begin, ends)
        if request.past is not None:
            fill(request.past, runner.decoder.cached(sequences))
    return Decoded(sequences, progress.counts(), outputs)


class Progress:
    """The tokens that the rows have gained, counted on the host.

    Attributes:
        totals: by row, the tokens that it has gained.
        ends: by row, its tokens where a criterion ended it, ``max_new_tokens`` where none has; a
            row still gains some where rows end together.
    """

    def __init__(self, request: Request):
        rows = len(request.input_ids)
        self.totals = [0] * rows
        self.ends = [request.max_new_tokens] * rows
        self._passes: list[list[int]] = []

    def add(self, counts: list[int]) -> None:
        """Count the tokens, by row, of one more pass."""
        self._passes.append(counts)
        self.totals = [total + count for total, count in zip(self.totals, counts)]

    @property
    def longest(self) -> int:
        return max(self.totals)

    @property
    def all_ended(self) -> bool:
        """Whether every row has come as far as the last one that a criterion ended."""
        return min(self.totals) >= max(self.ends)

    @property
    def settled(self) -> list[int]:
        """By row, the tokens that stay whatever comes: where rows end together, one may be ahead of
        the end.
        """
        least = max(map(min, self.totals, self.ends))
        return [min(total, least) for total in self.totals]

    @property
    def new_tokens(self) -> int:
        """New tokens of the output."""
        return min(self.longest, max(self.ends))

    def counts(self) -> Tensor:
        """Return what every pass gained of the output, int64 [passes, B]."""
        nothing = [0] * len(self.totals)
        totals = torch.tensor([nothing, *self._passes], dtype=torch.int64, device="cpu").cumsum(0)
        return totals.clamp(max=self.new_tokens).diff(dim=0)


_busy: set[int] = set()
_busy_lock = threading.Lock()


@contextlib.contextmanager
def exclusive(drafter: Drafter) -> Iterator[None]:
    """Within: no other call decodes with ``drafter``."""
    with _busy_lock:
        if id(drafter) in _busy:
            raise ValueError(
                f"draft is a {type(drafter).__name__} that another call decodes with; expected one"
                " of its own"
            )
        _busy.add(id(drafter))
    try:
        yield
    finally:
        with _busy_lock:
            _busy.discard(id(drafter))


def _error(request: Request, invalid: list[int]) -> ValueError:
    if wrong := max(invalid) & (TOKENS | TREE):
        vocabulary = request.model.config.get_text_config(decoder=True).vocab_size
        return error_of(wrong, request.drafter, vocabulary)
    return _no_token(request, invalid.index(1))


def _no_token(request: Request, row: int) -> ValueError:
    message = f"the model's probabilities for row {row} hold NaN or infinity; no token can be drawn"
    if bool(request.offsets.any()):
        message += (
            "; at left padding transformers' eager attention gives NaN in float64, where"
            " attn_implementation='sdpa' or prompts one by one do not"
        )
    return ValueError(message)


def _ask_criteria(
    request: Request,
    decoder: Decoder,
    counts: list[int],
    remaining: list[int],
    progress: Progress,
) -> None:
    """Ask after every token that a pass gained, up to the first one that ends its row.

    ``counts`` and ``remaining``, by row, are the pass's, which ``progress`` does not have yet.
    Where rows end together, ``progress.ends`` is set; else the row is cut, and ``counts`` and
    ``remaining`` are corrected.
    """
    for b, count in enumerate(counts):
        if not count or progress.totals[b] >= progress.ends[b]:
            continue
        ids = decoder.row(b)[None]
        for kept in range(1, count + 1):
            seen = ids[:, : ids.shape[1] - count + kept]
            if not any(bool(torch.as_tensor(ask(seen, None)).all()) for ask in request.criteria):
                continue
            if request.ends_together:
                progress.ends[b] = progress.totals[b] + kept
            else:
                decoder.cut(b, count - kept)
                counts[b], remaining[b] = kept, 0
            break
