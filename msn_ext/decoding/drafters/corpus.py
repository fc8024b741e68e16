"""Texts of a user's own to draft from: indexed once, saved, then mapped into memory."""

from __future__ import annotations

import array
import os
import struct
import warnings
from collections.abc import Iterable, Sequence

import numpy
import torch
from torch import Tensor

from msn_ext import ops
from msn_ext.ops import SUFFIXES
from msn_ext.paths import replacing
from msn_ext.terminal import progress_bar

MOST_SLOTS = 1 << 24
"""Per length of n-grams: 512 MB in all. A larger corpus loses more and more of its older ones."""
CHUNK = 1 << 22
"""Tokens that are indexed at once, widened to int64."""

_MAGIC = b"msn_ext corpus\r\n"  # the line end shows whether somebody sent the file as text
_VERSION = 2  # 1 hashed n-grams from their newest token back
# Magic, version, vocabulary, tokens, slots; tokens and suffixes follow, int32.
_HEADER = struct.Struct("<16s4q16x")


class Corpus:
    """Texts in which best-first drafting looks for the n-grams that the text at hand does not have.

    Made by :meth:`build` or :meth:`load`.

    Attributes:
        vocabulary: ``vocab_size`` of the models that it is for.
        tokens: int32 [T], the texts one after the other, -1 between them.
        suffixes: int32 [8, S], where their n-grams stood last, as :func:`msn_ext.ops.draft_tree`
            takes it.
    """

    def __init__(self, vocabulary: int, tokens: Tensor, suffixes: Tensor):
        self.vocabulary, self.tokens, self.suffixes = vocabulary, tokens, suffixes
        self._copies: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @property
    def heads(self) -> Tensor:
        """An older name of ``suffixes``."""
        return self.suffixes

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return _HEADER.size + self.tokens.nbytes + self.suffixes.nbytes

    @classmethod
    def build(
        cls, documents: Iterable[Sequence[int] | Tensor], vocabulary: int, progress: bool = True
    ) -> Corpus:
        """Index some texts; where several hold an n-gram, the last one counts.

        Args:
            documents: tokens of each text, asked for one by one; empty ones are left out.
            vocabulary: of the tokens, the model's ``vocab_size``.
            progress: show bars on stderr.

        Raises:
            ValueError: a text is no sequence of tokens of this vocabulary, or all together hold
                none or 2^31.
        """
        if type(vocabulary) is not int or not 1 <= vocabulary < 1 << 31:
            raise ValueError(f"vocabulary is {vocabulary!r}; expected the model's vocab_size")
        collected = array.array("i")  # grows in place
        with progress_bar(
            unit=" tokens", unit_scale=True, desc="reading", leave=False, disable=not progress
        ) as bar:
            for at, text in enumerate(documents):
                tokens = _checked(text, vocabulary, f"documents[{at}]")
                if collected and len(tokens):
                    collected.append(-1)
                collected.frombytes(tokens.numpy().tobytes())
                if len(collected) >= 1 << 31:
                    raise ValueError(
                        f"documents hold {len(collected)} tokens and more; expected fewer than 2^31"
                    )
                bar.update(len(tokens))
        if not collected:
            raise ValueError("documents hold no token; expected at least one")
        tokens = torch.frombuffer(collected, dtype=torch.int32)
        return cls(vocabulary, tokens, _index(tokens, progress))

    def save(self, path: str | os.PathLike) -> None:
        """Write the file whole or not at all, also through a symbolic link; who has mapped an older
        one keeps that.

        Raises:
            OSError: it cannot be written, or there is something else than a file; names the path.
        """
        header = _HEADER.pack(
            _MAGIC, _VERSION, self.vocabulary, len(self.tokens), self.suffixes.shape[1]
        )
        with replacing(path) as unfinished, open(unfinished, "wb") as file:
            file.write(header)
            for part in (self.tokens, self.suffixes):
                part.numpy().tofile(file)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Corpus:
        """Map a file that :meth:`save` wrote into memory: nothing is read before it is looked up,
        and all processes share it. A damaged table or token makes wrong guesses and does no harm.

        Raises:
            OSError: it cannot be opened.
            ValueError: it is no corpus, not a whole one, or one of another version; names the file.
        """
        with open(path, "rb") as file:
            header, size = file.read(_HEADER.size), os.fstat(file.fileno()).st_size
            if not header.startswith(_MAGIC):
                raise ValueError(
                    f"{path} is no corpus: expected a file that msn corpus or Corpus.save wrote"
                )
            if len(header) < _HEADER.size:
                raise ValueError(
                    f"{path} is cut short: it has {size} bytes; expected a header of {_HEADER.size}"
                )
            _, version, vocabulary, tokens, slots = _HEADER.unpack(header)
            if version != _VERSION:
                raise ValueError(
                    f"{path} is a corpus of version {version}; this msn_ext reads version"
                    f" {_VERSION}: build it again (msn corpus)"
                )
            if not (1 <= vocabulary < 1 << 31 and 1 <= tokens < 1 << 31 and 1 <= slots < 1 << 31):
                raise ValueError(
                    f"{path} is damaged: its header says {vocabulary=}, {tokens=}, {slots=}"
                )
            expected = _HEADER.size + 4 * (tokens + len(SUFFIXES) * slots)
            if size != expected:
                what = "cut short" if size < expected else "damaged"
                raise ValueError(f"{path} is {what}: it has {size} bytes; expected {expected}")
            mapped = numpy.memmap(file, "<i4", "r", _HEADER.size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that nobody may write there: nobody does
            whole = torch.from_numpy(mapped)
        return cls(vocabulary, whole[:tokens], whole[tokens:].view(len(SUFFIXES), slots))

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return ``tokens`` and ``suffixes`` on a device: the memory itself on the CPU, else a
        copy, the same one every time.
        """
        device = torch.device(device)
        if device.type == "cpu":
            return self.tokens, self.suffixes
        if device not in self._copies:
            self._copies[device] = self.tokens.to(device), self.suffixes.to(device)
        return self._copies[device]


def _checked(text: Sequence[int] | Tensor, vocabulary: int, name: str) -> Tensor:
    """Return the tokens of a text, int32 [n] on the CPU."""
    try:
        tokens = torch.as_tensor(text, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} is no sequence of tokens: {error}") from error
    if tokens.dim() == 1 and not len(tokens):
        return tokens.to("cpu", torch.int32)
    if tokens.dim() != 1 or tokens.dtype not in (
        torch.int64,
        torch.int32,
        torch.int16,
        torch.uint8,
        torch.int8,
    ):
        raise ValueError(
            f"{name} has shape {list(tokens.shape)} and dtype {tokens.dtype}; expected whole"
            " numbers [n]"
        )
    wrong = (tokens < 0) | (tokens >= vocabulary)
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        raise ValueError(f"{name}[{at}] is {int(tokens[at])}; expected 0 to {vocabulary - 1}")
    return tokens.to("cpu", torch.int32)


def _slots(tokens: int) -> int:
    """Return half as many as tokens, rounded up to a power of two.

    An n-gram whose slot a later one took is missed, but every context is looked up by eight: of 10
    million tokens of Python, 97 % were found again with one slot for 1.15 tokens, 92 % with one for
    2.3, 98 % with one for 0.58, at 32, 18 and 60 bytes a token.
    """
    return min(1 << (max(tokens // 2, 1) - 1).bit_length(), MOST_SLOTS)


def _index(tokens: Tensor, progress: bool) -> Tensor:
    """Return the suffixes of all tokens, int32 [8, S], indexed chunk by chunk."""
    suffixes = torch.zeros(1, len(SUFFIXES), _slots(len(tokens)), dtype=torch.int32, device="cpu")
    with progress_bar(
        total=len(tokens),
        unit=" tokens",
        unit_scale=True,
        desc="indexing",
        leave=False,
        disable=not progress,
    ) as bar:
        first = 0
        for begin in range(0, len(tokens), CHUNK):
            # Places count from the chunk's first token: earlier ones are negative, and an empty
            # slot ends at 0 again.
            suffixes += first
            first = max(0, begin - SUFFIXES[-1])
            suffixes -= first
            chunk = tokens[first : begin + CHUNK].long()
            ops.index_suffixes(
                suffixes,
                chunk[None],
                chunk.new_tensor([begin - first]),
                chunk.new_tensor([len(chunk)]),
            )
            bar.update(first + len(chunk) - begin)
        suffixes += first
    return suffixes[0]
