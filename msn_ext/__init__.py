"""Several tokens per forward pass from Hugging Face causal language models, with unchanged output.

``generate`` decodes (arXiv 2406.17404, section 3.3); ``DraftTree`` is the shape of a draft;
``build_info()`` says what this installation was built with; the kernels are in ``msn_ext.ops``.
"""

import torch  # noqa: F401  # before _C, which shares torch's OpenMP threads

from msn_ext import _C

from .decoding import DraftTree
from .generation import MSNGenerateOutput, generate

__all__ = ["DraftTree", "MSNGenerateOutput", "build_info", "generate"]


def build_info() -> dict:
    """Version, compiler, CUDA version (None: CPU only), CUDA architectures, CPU instruction set."""
    return _C.build_info()


__version__ = build_info()["version"]
