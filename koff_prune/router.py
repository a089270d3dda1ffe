"""Picks a memory by the prompt, in torch; `koff_export.router` is the same without it."""

from __future__ import annotations

from pathlib import Path

import torch

from koff_export.bundle import open_manifest
from koff_export.router import Choice, choose
from koff_prune.attach import attach, load_tokenizer, saved_memory
from koff_prune.cut import load_backbone
from koff_prune.evaluate import total_nats
from koff_prune.memory import Memories
from koff_prune.recipe import Memory


class Router:
    """A bundle opened to pick memories from; the backbone is loaded once.

    Args:
        bundle: The bundle's folder.
        dtype: Cast the backbone to this.

    Raises:
        KoffError: Not a bundle, or a damaged one.
    """

    def __init__(self, bundle: str | Path, dtype: torch.dtype | None = None) -> None:
        self.folder = Path(bundle)
        self.manifest = open_manifest(self.folder)
        self.model = load_backbone(self.folder, dtype)
        self.tokenizer = load_tokenizer(self.folder)

    def choose(self, prompt: str) -> Choice:
        """The memory under which the prompt has the lowest loss; None where the bare backbone is best."""
        ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        bos = self.manifest.bos
        if bos is not None and ids[:1] != [bos]:
            ids = [bos, *ids]
        return self.choose_tokens(ids)

    def choose_tokens(self, tokens: list[int]) -> Choice:
        """As `choose`, of token ids; a single one gets no memory, and none is picked that leaves no room."""
        if len(tokens) < 2:
            return Choice(None)
        merged, context = self.manifest.merged, self.manifest.context
        # as `koff_export.router.route` has it
        divided = any(told.tokens for told in self.manifest.domains.values())
        lead = self.manifest.eos[:1] if divided and tokens[0] != self.manifest.bos else []

        def loss(name: str | None) -> float:
            name = name or (merged if merged in self.manifest.domains else None)  # what is left of it: the KV
            if name is None:
                attached = Memories(self.model, Memory(lora=None, kv=None), {}, 0)
            else:
                attached = attach(self.model, name, *saved_memory(self.folder, self.manifest, name))
            mine = tokens
            if name is not None and self.manifest.domains[name].tokens:
                text = str(self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False))
                reader = load_tokenizer(self.folder, name)
                mine = reader(text, add_special_tokens=False)["input_ids"]
            try:
                row = torch.tensor([*lead, *mine])
                return total_nats(attached, row, name) / (len(lead) + len(tokens) - 1)
            finally:
                self.model = attached.unwrap()

        fitting = [
            name
            for name, told in self.manifest.domains.items()
            if context is None or len(lead) + len(tokens) + told.kv_tokens < context
        ]
        return choose([] if merged else fitting, loss)
