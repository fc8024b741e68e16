"""Several tokens per forward pass from Hugging Face causal language models, with unchanged output.

``generate`` decodes, and gives an ``MSNGenerateOutput`` if asked; ``BestFirst`` drafts what is most
probable, also from a ``Corpus``, ``DraftTree`` is the shape of a fixed draft (arXiv 2406.17404,
section 3.3), a ``Drafter`` a source of guesses of your own, which gives a ``Draft`` and is shown
what was ``Verified``. ``grammar`` compiles what an answer has to follow, ``stateless`` declares a
processor of logits that may be asked about guesses. ``NoisyCollator`` puts noise into training
batches (section 3.1), ``add_noise`` puts it into a trainer that is there already,
``lowest_loss_starts`` finds places for it (appendix A). ``prepare`` packs a model's weights in
place for decoding on a CPU, ``unprepare`` undoes it; ``build_info()`` says what this installation
was built with; the kernels are in ``msn_ext.ops``.
"""

import importlib

__all__ = [
    "BestFirst",
    "Corpus",
    "Draft",
    "DraftTree",
    "Drafter",
    "MSNGenerateOutput",
    "NoisyCollator",
    "Verified",
    "add_noise",
    "build_info",
    "generate",
    "grammar",
    "lowest_loss_starts",
    "prepare",
    "stateless",
    "unprepare",
]

# Imported when first used, so that `msn --help` need not wait for torch and transformers.
_HOMES = dict.fromkeys(
    (
        "BestFirst",
        "Corpus",
        "Draft",
        "DraftTree",
        "Drafter",
        "Verified",
        "grammar",
        "prepare",
        "stateless",
        "unprepare",
    ),
    "decoding",
)
_HOMES |= dict.fromkeys(("MSNGenerateOutput", "generate"), "generation")
_HOMES |= dict.fromkeys(("NoisyCollator", "add_noise", "lowest_loss_starts"), "training")


def build_info() -> dict:
    """Version, compiler, CUDA version (None: CPU only), CUDA architectures, CPU instruction set."""
    from msn_ext.ops import _C

    return _C.build_info()


def __getattr__(name: str):
    if name == "__version__":
        return build_info()["version"]
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__():
    return sorted([*globals(), *__all__])
