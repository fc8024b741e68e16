"""What a forward pass is (:mod:`.protocol`), three of them; what they compute, as data
(:mod:`.plan`).
"""

from .protocol import ForwardPass

__all__ = ["ForwardPass"]
