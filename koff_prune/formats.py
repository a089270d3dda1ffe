"""What a bundle holds beside safetensors: the ONNX graph and its adapters, the GGUF files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

from koff_export.bundle import MERGED_KV
from koff_export.session import INT8_DYNAMIC
from koff_prune.cut import load_backbone
from koff_prune.memory import load_memory, memory_of_folder
from koff_prune.progress import say
from koff_prune.recipe import Export

GGUF_MODEL = "gguf/model.gguf"


def lora_slots(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """PEFT's names to module paths of the plain model: (A [r, in], B [out, r])."""
    result: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, half = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        result.setdefault(module, {})[half] = tensor
    return {module: (pair["lora_A"], pair["lora_B"]) for module, pair in result.items()}


def tell_memory(folder: Path, name: str, formats: Sequence[str]) -> dict[str, Any]:
    """What the manifest says of a saved memory in a bundle of these formats."""
    memory, tensors = memory_of_folder(folder), load_memory(folder)
    own = tensors.get("tokens", {})
    tokens: dict[str, Any] = {}
    if own:
        tokens = {"tokens": len(own.get("embedding", ())), "tokenizer": f"memories/{name}/tokenizer.json"}
    return {
        "kv_tokens": memory.kv.tokens if memory.kv else 0,
        "lora_rank": memory.lora.rank if memory.lora else 0,
        "lora_alpha": memory.lora.alpha if memory.lora else 0,
        "rope": "post",
        "parameters": sum(t.numel() for part in tensors.values() for t in part.values()),
        "adapter": f"onnx/memories/{name}.onnx_adapter" if "onnx" in formats else None,
        "gguf": f"gguf/memories/{name}.gguf" if "gguf" in formats and memory.lora else None,
        "peft": f"memories/{name}",
        **tokens,
    }


def write_onnx(
    folder: Path,
    domains: Sequence[str],
    export: Export,
    merged: str | None = None,
    texts: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, Any]:
    """Writes onnx/ into a bundle; returns what the manifest's `graph` says.

    Args:
        folder: The bundle.
        domains: Whose memories get an adapter.
        export: The recipe's section.
        merged: The domain whose LoRA the backbone already has and whose KV, if any, the graph is to hold.
        texts: By domain, windows int64 [windows, window] that 4 bits are rounded on.
    """
    from koff_export.fused import export_fused
    from koff_export.onnx import export_onnx, write_adapter, write_required
    from koff_export.quantize import BITS, quantize

    model = load_backbone(folder)
    fused = "fused" in export.onnx.profiles
    places = {name: folder / "memories" / name for name in domains}
    tensors = [load_memory(place) for place in places.values()]
    modules = sorted({module for part in tensors for module in lora_slots(part.get("lora", {}))})
    say("writing the ONNX graph")
    baked = None if merged is None else _kv_of(folder / "memories" / merged, model)
    own_tokens = any("tokens" in part for part in tensors)
    info = export_onnx(model, folder, lora_modules=modules, baked=baked, own_tokens=own_tokens)
    for name, place in places.items():
        write_onnx_memory(place, folder / "onnx" / "memories" / f"{name}.onnx_adapter", info.layers)
    few = {str(name): BITS[name] for name in export.onnx.precision if name != "fp32"}
    precisions = _paths("model", few)
    told = {**vars(info), "precisions": precisions}
    profiles = {"portable": precisions}
    if fused:
        say("writing the fused graph")
        export_fused(model, folder / "onnx/fused.onnx", folder / "onnx/model.onnx", baked=baked)
        profiles["fused"] = told["fused"] = _paths("fused", few)
        export_fused(model, folder / "onnx/in_place.onnx", folder / "onnx/fused.onnx", in_place=True)
        profiles["in_place"] = told["in_place"] = _paths("in_place", few)
        if baked is not None and baked[0][0].shape[1] > 0:
            write_adapter(folder / MERGED_KV, {}, baked)
    del model
    keeps = export.onnx.int4_keeps
    rounded = None
    if "int4" in few and export.onnx.int4_rounding == "gptq":
        from koff_prune.rounding import round_matrices

        rounded = round_matrices(folder, texts or {}, keeps)
    for name, bits in few.items():
        say(f"quantising to {name}")
        beside = None  # weights that an earlier profile has are read from there
        for paths in profiles.values():
            quantize(folder / paths["fp32"], folder / paths[name], bits, beside, keeps, rounded)
            beside = folder / paths[name]
    if export.onnx.javascript:
        copies = {path: write_required(folder, path) for path in set(precisions.values())}
        told["javascript"] = {name: copies[path] for name, path in precisions.items()}
    return told


def _paths(graph: str, few: Iterable[str]) -> dict[str, str]:
    """Where a graph stands in a bundle, by precision."""
    paths = {"fp32": f"onnx/{graph}.onnx", **{name: f"onnx/{graph}_{name}.onnx" for name in few}}
    return paths | ({INT8_DYNAMIC: paths["int8"]} if "int8" in paths else {})


def _kv_of(memory: Path, model: PreTrainedModel) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A merged memory's learned KV by layer, of length 0 where it has none."""
    attentions = [layer.self_attn for layer in model.model.layers]
    if not memory.exists():
        empty = [torch.zeros(a.k_proj.out_features // a.head_dim, 0, a.head_dim) for a in attentions]
        return [(e, e) for e in empty]
    kv = load_memory(memory)["kv"]
    return [(kv[f"layers.{i}.key"], kv[f"layers.{i}.value"]) for i in range(len(attentions))]


def write_onnx_memory(memory: Path, target: Path, layers: int) -> None:
    """Writes a saved memory as the `.onnx_adapter` of a graph of so many layers."""
    from koff_export.onnx import write_adapter

    section, tensors = memory_of_folder(memory), load_memory(memory)
    scale = section.lora.alpha / section.lora.rank if section.lora else 0.0
    slots, kv = lora_slots(tensors.get("lora", {})), tensors.get("kv")
    pairs = None
    if kv is not None:
        pairs = [(kv[f"layers.{i}.key"], kv[f"layers.{i}.value"]) for i in range(layers)]
    lora = {module: (a, b, scale) for module, (a, b) in slots.items()}
    write_adapter(target, lora, pairs, tensors.get("tokens"))


def write_gguf(folder: Path, domains: Mapping[str, Mapping[str, Any]], export: Export) -> dict[str, Any]:
    """Writes gguf/ into a bundle; returns what the manifest's `gguf` says."""
    from koff_export.gguf import export_gguf

    model = load_backbone(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    say("writing GGUF")
    arch = export_gguf(model, tokenizer, folder / GGUF_MODEL, export.gguf.type)
    for name, told in domains.items():
        if told["gguf"]:
            write_gguf_memory(model, arch, folder / "memories" / name, folder / told["gguf"])
    short = [name for name, told in domains.items() if told["kv_tokens"]]
    if short:
        say(f"GGUF holds no learned KV: there, {', '.join(short)} are their LoRA alone")
    return {"model": GGUF_MODEL, "type": export.gguf.type, "architecture": arch}


def write_gguf_memory(model: PreTrainedModel, arch: str, memory: Path, target: Path) -> None:
    """Writes a saved memory's LoRA as the GGUF adapter of a backbone written as `arch`."""
    from koff_export.gguf import export_gguf_lora

    section = memory_of_folder(memory)
    assert section.lora is not None
    export_gguf_lora(model, arch, lora_slots(load_memory(memory)["lora"]), section.lora.alpha, target)
