"""The ops that benchmarks/ops.py times, by topic: their eager equivalents and their cases."""

from . import drafting, fused, layers, noise, tree
from .common import CONTEXTS, MODELS, NODES, Case, Model

CASES = tree.CASES | drafting.CASES | noise.CASES | fused.CASES | layers.CASES
"""By op: what yields cases for a model, numbers of nodes, lengths of context, and a device."""

__all__ = ["CASES", "CONTEXTS", "MODELS", "NODES", "Case", "Model"]
