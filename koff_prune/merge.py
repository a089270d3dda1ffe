"""LoRA made part of the backbone: nothing to attach, nothing to pay at run time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from koff_prune.formats import lora_slots
from koff_prune.memory import load_memory, memory_of_folder


def folding(folders: Sequence[Path]) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """A function from a backbone's tensor and its name to the same with the LoRA of saved memories in it.

    W + alpha / r * B A is summed in float32, over the memories, and comes out so.

    Args:
        folders: The memories'; those without LoRA change nothing.
    """
    updates: dict[str, list[tuple[float, torch.Tensor, torch.Tensor]]] = {}
    for folder in folders:
        lora = memory_of_folder(folder).lora
        if lora is not None:
            for module, (a, b) in lora_slots(load_memory(folder)["lora"]).items():
                updates.setdefault(f"{module}.weight", []).append((lora.alpha / lora.rank, a, b))

    def fold(name: str, weight: torch.Tensor) -> torch.Tensor:
        for scale, a, b in updates.get(name, ()):
            weight = weight.float() + scale * (b.float() @ a.float())
        return weight

    return fold
