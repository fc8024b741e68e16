"""Show the steps of best-first decoding: their draft trees and what the model accepted of them.

``record_answer`` decodes and keeps a :class:`Step` of every forward pass; ``as_text`` and
``as_svg`` show one of them, ``as_html`` all.
"""

from .html import as_html
from .outline import SOURCES
from .recording import TAIL, Answer, Recorder, Step, record, record_answer
from .svg import as_svg
from .text import as_text

__all__ = [
    "SOURCES",
    "TAIL",
    "Answer",
    "Recorder",
    "Step",
    "as_html",
    "as_svg",
    "as_text",
    "record",
    "record_answer",
]
