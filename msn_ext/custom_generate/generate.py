"""Decoding by msn_ext, for transformers: `model.generate(custom_generate=FOLDER)`, and every model
whose folder this one lies in, both with `trust_remote_code=True`. The output stays the same.
"""

from msn_ext.generation import generate_as_transformers as generate

__all__ = ["generate"]
