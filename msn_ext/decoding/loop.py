"""The decoding loop: prefill, then steps, until every row has ended."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from .criteria import Progress, ask_rows, ask_together
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
                if progress.asks_rows:
                    ask_rows(request, runner.decoder, counts, remaining, progress)
                before = progress.totals
                progress.add(counts)
                if request.criteria and not progress.asks_rows:
                    ask_together(request, runner.decoder, remaining, progress)
                outputs.add(result.outputs, before, before, progress.totals)
                over = not any(remaining) or progress.all_ended
                if stream is not None:
                    ended = [
                        over or (settled == total and not (left or request.ends_together))
                        for settled, total, left in zip(
                            progress.settled, progress.totals, remaining
                        )
                    ]
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
