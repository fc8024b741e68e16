"""Show one step of best-first decoding: its draft tree and what the model accepted of it.

``record`` decodes and keeps a :class:`Step` of every forward pass; ``as_text`` and ``as_svg`` show
one of them.
"""

from .outline import SOURCES
from .recording import TAIL, Recorder, Step, record
from .svg import as_svg
from .text import as_text

__all__ = ["SOURCES", "TAIL", "Recorder", "Step", "as_svg", "as_text", "record"]
