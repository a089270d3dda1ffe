"""Reads one memory, an `.onnx_adapter`, and refuses what does not fit the graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnxruntime as ort

from koff_export.errors import KoffError
from koff_export.graph import TOKEN_SLOTS, is_kv_slot
from koff_export.session import first_line


class Options(ort.RunOptions):
    """Keeps its memory alive, which ONNX Runtime's own do not: one may be evicted while an answer runs."""

    adapter: ort.LoraAdapter | None = None


@dataclass(frozen=True)
class Adapter:
    """One memory in memory.

    Attributes:
        kv_tokens: Length P of its learned KV, 0 without one.
        own_tokens: How many tokens it has of its own.
        mapped: As ONNX Runtime takes it for a call, on the disk; not there with `tensors`.
        tensors: Its parts by the name of their slots, if they were asked for.
        file: What the tensors lie in.
    """

    kv_tokens: int
    own_tokens: int
    mapped: ort.LoraAdapter | None = None
    tensors: Mapping[str, ort.OrtValue] = field(default_factory=dict)
    file: ort.AdapterFormat | None = None


def open_adapter(path: Path, name: str, slots: Mapping[str, Any], parts: bool = False) -> Adapter:
    """Opens the memory `name`.

    Args:
        path: The `.onnx_adapter` file.
        name: The memory's name, for messages.
        parts: Hold its tensors, instead of leaving them to ONNX Runtime.
        slots: The slots by name, as `InferenceSession.get_overridable_initializers` describes them.

    Raises:
        KoffError: the file is damaged, or its tensors do not fit the slots or one another.
    """
    try:
        file = ort.AdapterFormat.read_adapter(str(path))
        parameters = file.get_parameters()
        found = {key: (value.shape(), value.data_type()) for key, value in parameters.items()}
        if not parts:
            adapter = ort.LoraAdapter()
            adapter.Load(str(path))
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        raise KoffError(f"cannot read the memory {path}: {first_line(error)}") from error
    foreign = f"the memory {name!r} belongs to another backbone"
    sizes: dict[str, int] = {}
    for key, (shape, dtype) in found.items():
        slot = slots.get(key)
        if slot is None or dtype != slot.type or len(shape) != len(slot.shape):
            raise KoffError(f"{foreign}: this graph has no slot {key!r} of its kind")
        for want, got in zip(slot.shape, shape, strict=True):
            # A number is fixed; a name ("memory", "rank_3") is free, but the same wherever it stands.
            if got != (want if isinstance(want, int) else sizes.setdefault(str(want), got)):
                raise KoffError(f"{foreign}: its {key!r} has the shape {shape} where {slot.shape} is needed")
    kv_slots, token_slots = set(filter(is_kv_slot, slots)), {key for key in TOKEN_SLOTS if key in slots}
    halves = found.keys() - kv_slots - token_slots
    partners = {key.replace(".lora_A.", ".lora_B.") for key in halves}
    partners |= {key.replace(".lora_B.", ".lora_A.") for key in halves}
    wholes = (kv_slots, token_slots)
    if partners != halves or any((found.keys() & whole) not in (set(), whole) for whole in wholes):
        raise KoffError(f"the memory {name!r} is incomplete: fetch it again")
    length, own = sizes.get("memory", 0), max(1, sizes.get("tokens", 1)) - 1
    return Adapter(length, own, None, parameters, file) if parts else Adapter(length, own, adapter)
