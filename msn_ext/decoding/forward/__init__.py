"""What a forward pass is, two ways (:mod:`.protocol`); what one computes, as data (:mod:`.plan`)."""

from .protocol import ForwardPass

__all__ = ["ForwardPass"]
