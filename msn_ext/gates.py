"""How a PEFT adapter says that it is gated: trained for noise alone, while the text stays the base
model's.
"""

from __future__ import annotations

from typing import Any

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


def why_not_gated(config) -> str | None:
    """Return the setting of an adapter's PEFT config that a gate cannot keep from the text, if any:
    it needs a LoRA whose effect is a sum that can be left out.
    """
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        return f"peft_type={kind!r}"
    plain: dict[str, Any] = {"bias": "none", "use_dora": False, "lora_bias": False}
    names = ("modules_to_save", "trainable_token_indices", "alora_invocation_tokens")
    plain |= dict.fromkeys(("layer_replication", *names))
    for name, usual in plain.items():
        if (value := getattr(config, name, usual)) not in (usual, [], ()):
            return f"{name}={value!r}"
    return None
