"""Several tokens per forward pass from Hugging Face causal language models, with unchanged output."""

import torch  # noqa: F401  # before _C, which shares torch's OpenMP threads

from msn_ext import _C

build_info = _C.build_info
__version__ = build_info()["version"]
