"""A bundle's learned cache as a PEFT Cartridge, for programs that know PEFT and not this tool.

PEFT keeps one flat tensor with the same KV width in every layer, and a model wears either a Cartridge or a
LoRA: so this is for plans that leave every layer as many KV groups, and holds the cache alone.
"""

from __future__ import annotations

from pathlib import Path

from peft import CartridgeConfig, TaskType
from peft.tuners.cartridge.utils import prompt_embeddings_from_past_key_values
from safetensors.torch import save_file

from koff_export.bundle import check_file, open_manifest
from koff_export.errors import KoffError
from koff_export.files import read_json, staged_dir
from koff_export.limits import has_windows
from koff_prune.bundle_memories import inspect_memory
from koff_prune.memory import MEMORY_FILES, KvMemory, load_memory


def write_cartridge(bundle: Path, name: str, target: Path) -> bool:
    """Writes a memory's learned cache as a folder that `PeftModel.from_pretrained(backbone, folder)` opens.

    Args:
        bundle: A finished bundle.
        name: Of the memory.
        target: A new folder: adapter_config.json and adapter_model.safetensors.

    Returns:
        Whether the memory has a LoRA too, which is not in there.

    Raises:
        KoffError: No such memory, no cache in it, layers of differing KV width or of sliding attention, or a
            target that is there.
    """
    files = inspect_memory(bundle, name)["files"]
    if target.exists():
        raise KoffError(f"{target}: is there already; remove it or name another folder")
    manifest, folder = open_manifest(bundle), f"memories/{name}"
    for file in files:
        check_file(bundle, manifest, file)
    tensors = load_memory(bundle / folder)
    if "kv" not in tensors:
        raise KoffError(
            f"memory {name}: has no learned cache; its LoRA in {bundle / folder} is PEFT's already"
        )
    memory = KvMemory.from_tensors(tensors["kv"])
    layers = [memory.layer(i) for i in range(len(memory.keys))]
    heads = sorted({key.shape[0] for key, _ in layers})
    if len(heads) > 1:
        raise KoffError(
            f"memory {name}: its layers have {heads[0]} to {heads[-1]} KV heads, and a Cartridge has one"
            " width; keep units at [ffn_neurons], or widths uniform"
        )
    if has_windows(read_json(bundle / "config.json")):
        raise KoffError(
            f"memory {name}: some layers look back through a sliding window, and with a Cartridge in front"
            " transformers gives them another one; open it with koff_prune.load_bundle"
        )
    cache = [(key.detach()[None], value.detach()[None]) for key, value in layers]
    config = CartridgeConfig(
        task_type=TaskType.CAUSAL_LM, num_virtual_tokens=memory.tokens, num_frozen_tokens=1,
        num_layers=len(layers), num_attention_heads=heads[0], token_dim=heads[0] * layers[0][0].shape[-1],
        base_model_name_or_path=manifest.model.get("source", ""), inference_mode=True,
    )  # fmt: skip
    with staged_dir(target, new=True) as aside:
        flat = prompt_embeddings_from_past_key_values(cache, num_virtual_tokens=memory.tokens)
        save_file({"prompt_embeddings": flat.contiguous()}, aside / MEMORY_FILES["lora"])
        config.save_pretrained(str(aside))
    return "lora" in tensors
