"""How a PEFT adapter says that it is gated: trained for noise alone, while the text stays the base
model's.
"""

from __future__ import annotations

NAME = "msn_ext"


def gated_noise(config) -> dict | None:
    """Return for which noise an adapter was trained, by its PEFT config: ``length`` and
    ``content``; None: it is not gated.
    """
    found = (getattr(config, "auto_mapping", None) or {}).get(NAME)
    return found if isinstance(found, dict) and found.get("gated") else None


def mark_gated(config, length: int, content: str | int) -> None:
    """Write into an adapter's PEFT config that it is gated, and for which noise."""
    # The one field that PEFT keeps in its file as it is and does not use where the task is known.
    config.auto_mapping = (config.auto_mapping or {}) | {
        NAME: {"gated": True, "length": length, "content": content}
    }
