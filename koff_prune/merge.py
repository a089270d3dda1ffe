"""One domain's memory made part of the backbone: nothing to attach, nothing to pay at run time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from koff_prune.cut import load_backbone, save_backbone
from koff_prune.formats import lora_slots
from koff_prune.memory import load_memory, memory_of_folder, save_memory
from koff_prune.weights import INDEX, SHARD_BYTES, Weights


def merge_memory(memory: Path, bundle: Path, name: str, shard_bytes: int = SHARD_BYTES) -> None:
    """Adds a saved memory's LoRA to the backbone in `bundle`; its learned KV, if any, goes beside it.

    W + alpha / r * B A is summed in float32 and rounded to the backbone's dtype once.

    Args:
        memory: The memory's folder, outside of the bundle.
        bundle: Holds the backbone; gets memories/`name` with the KV alone.
        name: The domain.
        shard_bytes: See `write_weights`.
    """
    section, tensors = memory_of_folder(memory), load_memory(memory)
    if section.lora is not None:
        model, scale = load_backbone(bundle), section.lora.alpha / section.lora.rank
        for module, (a, b) in lora_slots(tensors["lora"]).items():
            weight: Any = model.get_submodule(module).weight
            weight.data = (weight.data.float() + scale * (b.float() @ a.float())).to(weight.dtype)
        for file in (*Weights.open(bundle).files, bundle / INDEX):
            file.unlink(missing_ok=True)  # the loaded tensors live in the old files' pages
        save_backbone(model, bundle, shard_bytes)
    if section.kv is not None:
        save_memory(bundle / "memories" / name, {"kv": tensors["kv"]}, section.only("kv"), "")
