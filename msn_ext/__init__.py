"""Several tokens per forward pass from Hugging Face causal language models, with unchanged output.

``generate`` decodes, and gives an ``MSNGenerateOutput`` if asked; ``BestFirst`` drafts what is most
probable, also from a ``Corpus`` and by a model's
``Habits``, ``DraftTree`` is the shape of a fixed draft (arXiv 2406.17404,
section 3.3), a ``Drafter`` a source of guesses of your own, which gives a ``Draft`` and is shown
what was ``Verified``. ``grammar`` compiles what an answer has to follow, ``stateless`` declares a
processor of logits that may be asked about guesses. ``NoisyCollator`` puts noise into training
batches (section 3.1), ``add_noise`` puts it into a trainer that is there already,
``lowest_loss_starts`` finds places for it (appendix A). ``prepare`` packs a model's weights in
place for decoding on a CPU, ``unprepare`` undoes it; ``build_info()`` says what this installation
was built with; the kernels are in ``msn_ext.ops``.
"""

import importlib
import os
from importlib.util import find_spec

if find_spec("msn_ext._C") is None:
    raise ImportError(
        f"msn_ext is not compiled in {os.path.dirname(__path__[0])}, for this Python at least; if"
        " that is its source, run `pip install .` there and use Python in another folder"
    )

__all__ = [
    "BestFirst",
    "Corpus",
    "Draft",
    "DraftTree",
    "Drafter",
    "Habits",
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
        "Habits",
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
    return _module("ops")._C.build_info()


def _module(name: str):
    """Return a module of the package; say what to do where what it needs is not installed."""
    try:
        return importlib.import_module(f".{name}", __name__)
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "transformers"):
            raise
        raise ModuleNotFoundError(
            f"msn_ext needs {error.name}, which is not installed; run: pip install {error.name}",
            name=error.name,
        ) from error


def __getattr__(name: str):
    if name == "__version__":
        from importlib.metadata import version  # torch, which _C.build_info() needs, takes seconds

        return version(__name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_module(_HOMES[name]), name)


def __dir__():
    return sorted([*globals(), *__all__])
