"""Puts a saved memory around a backbone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from koff_export.bundle import Manifest, open_manifest
from koff_export.errors import KoffError
from koff_export.hub import FOR_TORCH, local
from koff_prune.memory import Memories, load_memory, memory_of_folder
from koff_prune.own_tokens import OwnTokens
from koff_prune.pretrained import short
from koff_prune.recipe import Memory
from koff_prune.vocabulary import set_rows


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


def load_tokenizer(bundle: str | Path, memory: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of what a bundle reads with a memory, or (None) without one.

    Args:
        bundle: Its folder, or its place on the hub: "hf://org/name".
        memory: One of its; where that has tokens of its own, they are behind the backbone's.

    Raises:
        KoffError: Not a bundle, or no such memory.
    """
    folder = local(bundle, FOR_TORCH)
    manifest = open_manifest(folder)
    if memory is not None and memory not in manifest.domains:
        raise KoffError(f"memory '{memory}': not in {folder}; it has {', '.join(manifest.domains) or 'none'}")
    if memory is not None and manifest.domains[memory].tokens:
        folder = folder / "memories" / memory
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise whatever a damaged file leads them to
        reason = short(error)
        raise KoffError(f"{folder}: its tokenizer cannot be read ({reason}); fetch it again") from error
    return cast(PreTrainedTokenizerBase, tokenizer)


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
    own = len(tensors["tokens"].get("embedding", ())) if "tokens" in tensors else 0
    if (rank, length, own) != (told.lora_rank, told.kv_tokens, told.tokens):
        raise KoffError(
            f"{folder}: has a LoRA of rank {rank}, a cache of {length} and {own} tokens, and koff.json tells"
            f" of {told.lora_rank}, {told.kv_tokens} and {told.tokens}; fetch the memory again"
        )
    return tensors, memory


def attach(
    model: PreTrainedModel, name: str, tensors: Mapping[str, Mapping[str, torch.Tensor]], memory: Memory
) -> Memories:
    """`attach_memory` of tensors in hand: `lora`, `kv` and `tokens` by their names, and their section."""
    prefill = torch.zeros(memory.kv.tokens if memory.kv else 1, dtype=torch.long)
    own, shrink = _grow(model, name, tensors["tokens"]) if "tokens" in tensors else (None, None)
    try:
        memories = Memories(model, memory, {name: prefill}, 0, own=own)
        if shrink is not None:
            memories.undo.append(shrink)
        memories.load(name, tensors)
    except ValueError as error:  # PEFT finds no such modules
        if shrink is not None:
            shrink()
        reason = str(error).splitlines()[0][:200]
        raise KoffError(f"memory {name}: does not fit this backbone ({reason})") from error
    memories.activate(name)
    return memories


def _grow(
    model: PreTrainedModel, name: str, rows: Mapping[str, torch.Tensor]
) -> tuple[OwnTokens, Callable[[], None]]:
    """Puts a memory's own tokens behind the backbone's, in place; returns whose they are, and the way back.

    Args:
        model: The backbone.
        name: Of the memory.
        rows: `embedding`, and `head` where that is not tied, [tokens, hidden] each.
    """
    wrapped: Any = model
    table, matrix = wrapped.get_input_embeddings().weight, wrapped.get_output_embeddings().weight
    before = {"embedding": table, **({} if matrix is table else {"head": matrix})}
    fits = rows.keys() == before.keys() and len(set(map(len, rows.values()))) == 1
    if not fits or any(rows[key].shape[1:] != old.shape[1:] for key, old in before.items()):
        raise KoffError(f"memory {name}: its tokens do not fit this backbone; fetch the memory again")
    grown = {key: torch.cat([old, rows[key].to(old)]) for key, old in before.items()}
    left, whole = len(table), len(grown["embedding"])

    def change(to: Mapping[str, torch.Tensor]) -> None:
        set_rows(model, to["embedding"], to.get("head"))
        model.config.vocab_size = len(to["embedding"])

    change(grown)
    return OwnTokens(left, {name: (left, whole)}, {}), lambda: change(before)
