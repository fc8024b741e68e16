"""What SGLang is told of the algorithm: NGRAM in everything but its name and its worker."""

from __future__ import annotations

import inspect
from typing import Any

from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from sglang.srt.speculative.spec_registry import CustomSpecAlgo

from msn_ext.ops import MAX_NODES

from .drafts import named_habits

# A registered algorithm answers these itself; a platform's NGRAM worker is none of ours.
OWN = ("create_worker", "handle_server_args", "get_platform_worker_cls")


def check_settings(server_args: Any) -> None:
    """Raise ValueError where an option of the command line, or ``MSN_HABITS``, cannot be right;
    SGLang calls this.
    """
    width = server_args.speculative_num_draft_tokens
    if width is not None and not 2 <= width <= MAX_NODES:
        raise ValueError(
            f"--speculative-num-draft-tokens is {width}; expected 2 to {MAX_NODES}, the last token"
            " of the text included"
        )
    if server_args.speculative_ngram_capacity < 0:
        raise ValueError(
            f"--speculative-ngram-capacity is {server_args.speculative_ngram_capacity}; expected 0"
            " or more tokens of finished answers to draft from"
        )
    if server_args.speculative_adaptive:
        raise ValueError("--speculative-adaptive is set; expected not: trees have one width")
    named_habits()


class _Declared:
    """The arguments of the server, with what the rules of NGRAM declare about them."""

    def __init__(self, server_args: Any):
        self._server_args, self._resolved_overrides = server_args, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._server_args, name)


class LikeNgram(CustomSpecAlgo):
    """Answers every question about an algorithm as NGRAM does, which it is but for its drafts."""

    def handle_server_args(self, server_args: Any) -> None:
        # SGLang's rules declare, and notes only what a plug-in assigns.
        declared = _Declared(server_args)
        SpeculativeAlgorithm.NGRAM.handle_server_args(declared)
        for _, fields in declared._resolved_overrides:
            for name, value in fields.items():
                setattr(server_args, name, value)

    def get_platform_worker_cls(self) -> None:
        return None


def _as_ngram(name: str):
    def answer(self, *arguments, **named):
        return getattr(SpeculativeAlgorithm.NGRAM, name)(*arguments, **named)

    return answer


for _name, _value in vars(SpeculativeAlgorithm).items():
    if inspect.isfunction(_value) and not _name.startswith("_") and _name not in OWN:
        setattr(LikeNgram, _name, _as_ngram(_name))


def register_algorithm(name: str) -> None:
    """Make ``--speculative-algorithm name`` known to SGLang in this process."""

    @SpeculativeAlgorithm.register(
        name, supports_overlap=True, validate_server_args=check_settings, spec_class=LikeNgram
    )
    def worker(server_args: Any) -> type:
        from .worker import MsnWorker  # imports SGLang's kernels, which only a scheduler needs

        return MsnWorker
