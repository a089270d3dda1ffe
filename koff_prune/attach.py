"""Puts a saved memory around a backbone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel

from koff_export.bundle import Manifest
from koff_export.errors import KoffError
from koff_prune.memory import Memories, load_memory, memory_of_folder
from koff_prune.recipe import Memory


def attach_memory(model: PreTrainedModel, path: str | Path) -> Memories:
    """Puts a saved memory around a backbone and activates it.

    Args:
        model: From `load_backbone`; its modules get wrapped in place.
        path: A memory's folder, such as `bundle/memories/de`.

    Returns:
        The Memories; `.base` is the model with the memory on, `.activate(None)` takes it off.

    Raises:
        KoffError: The memory was trained for another plan.
    """
    path = Path(path)
    return attach(model, path.name, load_memory(path), memory_of_folder(path))


def saved_memory(
    bundle: Path, manifest: Manifest, name: str
) -> tuple[dict[str, dict[str, torch.Tensor]], Memory]:
    """The tensors and the section of a bundle's own memory, whole as its manifest tells it.

    Raises:
        KoffError: A part is missing, as of a copy that was stopped, or damaged.
    """
    folder, told = bundle / "memories" / name, manifest.domains[name]
    tensors, memory = load_memory(folder), memory_of_folder(folder)
    rank, length = memory.lora.rank if memory.lora else 0, memory.kv.tokens if memory.kv else 0
    if (rank, length) != (told.lora_rank, told.kv_tokens):
        raise KoffError(
            f"{folder}: has a LoRA of rank {rank} and a cache of {length}, and koff.json tells of"
            f" {told.lora_rank} and {told.kv_tokens}; fetch the memory again"
        )
    return tensors, memory


def attach(
    model: PreTrainedModel, name: str, tensors: Mapping[str, Mapping[str, torch.Tensor]], memory: Memory
) -> Memories:
    """`attach_memory` of tensors in hand: `lora` and `kv` by their file names, and their section."""
    prefill = torch.zeros(memory.kv.tokens if memory.kv else 1, dtype=torch.long)
    try:
        memories = Memories(model, memory, {name: prefill}, 0)
    except ValueError as error:  # PEFT finds no such modules
        reason = str(error).splitlines()[0][:200]
        raise KoffError(f"memory {name}: does not fit this backbone ({reason})") from error
    memories.load(name, tensors)
    memories.activate(name)
    return memories
