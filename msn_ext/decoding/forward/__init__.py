"""What a forward pass is, two ways (:mod:`.protocol`); what it computes, as data (:mod:`.plan`)."""

from .protocol import ForwardPass

__all__ = ["ForwardPass"]
