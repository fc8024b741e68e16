"""Put noise into the batches of a collator (arXiv 2406.17404, sections 3.1 and 3.2)."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import warnings
from collections.abc import Callable, Mapping, MutableMapping
from typing import cast

import torch
from torch import Tensor

from msn_ext import ops

from .layouts import branch, check_branches, labels_of_noise, replace, sample_bounds, unmark

LAYOUTS = ("replace", "branch")
CONTENTS: dict[str | int, float] = {"ahead": 0.0, "random": 1.0, "mixed": 0.5, "self": 0.0}
"""Share of noise tokens drawn from the vocabulary; the others come from the text before them."""
GOLDEN = 0x9E3779B97F4A7C15  # odd, so that seeds stay apart


class Starts(dict[str, int]):
    """Starts of the noise of samples, in tokens from the first one, by :func:`identity`."""


def identity(tokens: Tensor) -> str:
    """Name a sample by its tokens, int64 [n]."""
    return hashlib.blake2b(tokens.cpu().contiguous().numpy().tobytes(), digest_size=16).hexdigest()


class NoisyCollator:
    """Adds noise to the batches of the collator that a trainer already uses; labels stay clean.

    In the response part (labels other than -100) of every sample, ``segments`` segments of
    ``length`` input tokens become noise: the model learns to predict the right next token although
    the tokens just before it are wrong (arXiv 2406.17404, Eq. 3 to 5). What is drawn depends on
    ``seed``, the epoch and the sample's tokens, not on batches or workers. For a trainer's own
    loop, :func:`msn_ext.add_noise` does all that follows in one line; in a loop of your own call
    :meth:`set_epoch`, and evaluate under :meth:`paused`.

    Args:
        inner: makes a batch of samples; the batch has int64 ``input_ids`` and ``labels`` [B, T] and
            may have ``attention_mask`` [B, T], ``position_ids`` [B, T] or ``cu_seq_lens_q``, by
            which packed samples are told apart.
        length: tokens of a segment, 1 to 64 (L of the paper); a shorter response becomes noise as a
            whole.
        segments: per sample, 1 to 256; fewer where there is no room.
        layout: ``"replace"``: in place, segments do not overlap (the paper). ``"branch"``: the
            clean text stays, segments stand after it, and a mask lets each see the text before its
            start and itself; the clean text and some 24 segments are learned in one pass. The batch
            then has ``position_ids`` and a mask [B, 1, T', T'], one byte each (a dict of them for
            models with sliding windows).
        content: ``"ahead"``: tokens of the text before (Eq. 4); ``"random"``: of the vocabulary;
            ``"mixed"``: half of each; ``"self"``: what the model guesses there, by
            :func:`msn_ext.add_noise` only; a token id: that token throughout, a mask.
        location: ``"random"``, or what :func:`lowest_loss_starts` found, for the first segment
            (appendix A).
        keep_token_ids: tokens that are neither replaced nor drawn, such as those that stand for an
            image.
        seed: None: ``torch.initial_seed()``, which ``set_seed`` of transformers sets.
        config: the model's; the branch layout masks as its attention needs it, and random content
            needs its vocabulary.

    Attributes:
        gated: whether the noise is learned by a gate: where a batch has no labels, all of its text
            may have noise beside it, and labels only count the noise tokens.
        annotate: whether batches say where their noise is (:data:`.layouts.ANNOTATIONS`), and leave
            the mask of branches to be made of it on the model's device. Off, since models do not
            take it.
        config: of the model's text.
        keep: ``keep_token_ids``, int64 [k].

    Raises:
        ValueError: an argument is none of the above, or a batch lacks labels.
    """

    tokenizer: object  # where ``inner`` has one: a trainer saves its collator's beside the model

    def __init__(
        self,
        inner: Callable,
        *,
        length: int = 4,
        segments: int = 1,
        layout: str = "replace",
        content: str | int = "ahead",
        location: str | Starts = "random",
        keep_token_ids: tuple[int, ...] = (),
        seed: int | None = None,
        config=None,
    ):
        if not callable(inner):
            raise ValueError(
                f"inner is {inner!r}; expected a collator: a function of a list of samples"
            )
        _check_noise(length, segments, layout, content, location)
        if config is None and (layout == "branch" or CONTENTS.get(content, 1.0)):
            needs = "layout='branch'" if layout == "branch" else f"content={content!r}"
            raise ValueError(f"config is None; {needs} needs the model's: config=model.config")
        self.config = config and config.get_text_config(decoder=True)
        if isinstance(content, int) and content >= self.config.vocab_size:
            raise ValueError(
                f"content is {content!r}; expected a token below {self.config.vocab_size}, the"
                " model's vocabulary"
            )
        if layout == "branch":
            check_branches(self.config)
        self.inner, self.length, self.segments, self.layout = inner, length, segments, layout
        self.content, self.location = content, location
        self.seed = torch.initial_seed() if seed is None else seed
        self.keep = torch.tensor(sorted(set(keep_token_ids)), dtype=torch.int64)
        # In shared memory: workers that live on from epoch to epoch see both change.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._paused = torch.zeros((), dtype=torch.bool).share_memory_()
        self.annotate = self.gated = False

    def set_epoch(self, epoch: int) -> None:
        """Draw other noise from now on; call it before a pass over the data begins."""
        self._epoch.fill_(epoch)

    @contextlib.contextmanager
    def paused(self):
        """Leave the batches of ``inner`` as they are within this context.

        A loader with workers has to be iterated within it, too.
        """
        before = bool(self._paused)
        self._paused.fill_(True)
        try:
            yield self
        finally:
            self._paused.fill_(before)

    def __call__(self, samples) -> Mapping:
        batch = self.inner(samples)
        if self._paused:
            return batch
        if self.content == "self" and not self.annotate:
            raise ValueError(
                "content='self' needs the model, which a collator has not; expected"
                " add_noise(trainer, …)"
            )
        if not isinstance(batch, Mapping):
            raise ValueError(
                f"inner gave a {type(batch).__name__}; expected a dict with input_ids and labels"
            )
        if self.gated and "input_ids" in batch and "labels" not in batch:
            batch = dict(batch) | {"labels": batch["input_ids"]}
        if missing := {"input_ids", "labels"} - set(batch):
            raise ValueError(
                f"inner gave a batch without {' and '.join(sorted(missing))}, but"
                f" {', '.join(map(str, batch))}; expected labels, -100 where a token is no part of"
                " a response"
            )
        noisy = self._noisy(dict(batch))
        # A BatchEncoding stays one, with what that can do.
        result = cast(MutableMapping, copy.copy(batch))
        for name in set(result) - set(noisy):
            del result[name]
        result.update(noisy)
        return result

    def _noisy(self, batch: dict) -> dict:
        """Return a collated batch with noise in it; the tensors that came stay as they are."""
        ids, labels = batch["input_ids"], batch["labels"]
        if labels.shape != ids.shape:
            raise ValueError(
                f"labels has shape {list(labels.shape)}; expected that of input_ids,"
                f" {list(ids.shape)}"
            )
        samples = sample_bounds(batch)
        starts = torch.full((len(samples), self.segments), -1, dtype=torch.int64, device=ids.device)
        if isinstance(self.location, Starts):
            known = [_known_start(self.location, ids, *bounds) for bounds in samples.tolist()]
            starts[:, 0] = torch.tensor(known, device=ids.device)
        share = CONTENTS.get(self.content, 0.0)
        vocabulary = self.config.vocab_size if share else 0
        seed = (self.seed * GOLDEN + int(self._epoch)) % 2**64  # the kernel mixes its bits
        seed -= 2**64 if seed >= 2**63 else 0
        apart = self.layout == "replace"
        keep = self.keep.to(ids.device)
        starts, noise = ops.draw_noise(
            ids, labels, samples, keep, starts, seed, self.length, share, vocabulary, apart
        )
        if isinstance(self.content, int):
            noise = torch.where(noise >= 0, self.content, noise)
        lay_out = replace if self.layout == "replace" else branch
        batch = lay_out(batch, samples, starts, noise)
        if self.gated:
            batch["labels"] = labels_of_noise(batch["noise_depth"])
        if not self.annotate:
            unmark(batch, self.config, self.length)
        return batch


def _check_noise(length, segments, layout, content, location) -> None:
    for name, value, most in (("length", length, 64), ("segments", segments, 256)):
        if not (type(value) is int and 1 <= value <= most):
            raise ValueError(f"{name} is {value!r}; expected 1 to {most}")
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; expected {' or '.join(map(repr, LAYOUTS))}")
    if not (type(content) is int and content >= 0) and content not in CONTENTS:
        raise ValueError(
            f"content is {content!r}; expected one of {', '.join(map(repr, CONTENTS))}, or a"
            " token id"
        )
    if location != "random" and not isinstance(location, Starts):
        raise ValueError(
            f"location is {location!r}; expected 'random' or what lowest_loss_starts() returns"
        )


def _known_start(location: Starts, ids: Tensor, row: int, begin: int, end: int) -> int:
    """Return the column where a sample's noise begins; -1: not known."""
    start = location.get(identity(ids[row, begin:end]), -1)
    if start < 0:
        warnings.warn(
            "location knows no start of some samples, whose noise is at random places; they"
            " have no response, or the batches of lowest_loss_starts() were others (without"
            " attention_mask a sample is a row with its padding)",
            stacklevel=2,
        )
    return -1 if start < 0 else begin + start
