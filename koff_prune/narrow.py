"""A bundle with fewer tokens than its run: one domain's alone, or those that no memory has of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, GenerationConfig

from koff_export.files import read_json, sha256_file, write_json, write_text
from koff_prune.attach import attach_memory
from koff_prune.cut import load_backbone
from koff_prune.device import on_device
from koff_prune.domains import count_tokens, split_documents
from koff_prune.evaluate import mean_nats, perplexity, read_losses, total_nats
from koff_prune.losses import predicted_tokens
from koff_prune.memory import FILES, Memories
from koff_prune.models import Dense
from koff_prune.pages import finite
from koff_prune.progress import bar, say
from koff_prune.recipe import Memory
from koff_prune.retokenise import read_again
from koff_prune.vocabulary import KEPT, renumber, trim_config, trimmed, write_reader, write_vocabulary
from koff_prune.weights import EMBEDDINGS, HEAD, Weights

if TYPE_CHECKING:
    from koff_prune.run import Run

KEY = "export.merged_vocabulary"


@dataclass(frozen=True)
class Narrowed:
    """A run's dense model with a bundle's tokens.

    Attributes:
        dense: Its tokenizer and configuration are the bundle's.
        rows: Of the run's embedding, those that stay, int64 [tokens].
        own: The run's tokenizer.
    """

    dense: Dense
    rows: torch.Tensor
    own: Any

    def read(self, windows: torch.Tensor) -> list[torch.Tensor]:
        """Windows of the run, int64 [n, window], as the narrowed tokenizer reads their text."""
        numbers = {old: new for new, old in enumerate(self.rows.tolist())}
        return read_again(windows, numbers, self.own, self.dense.tokenizer)

    def windows(self, windows: torch.Tensor) -> torch.Tensor:
        """The same, as long as they were, int64 [at most n, window]: longer ones are cut, shorter ones go."""
        rows = self.read(windows)
        size = min(windows.shape[1], max(map(len, rows)))
        return torch.stack([row[:size] for row in rows if len(row) >= size])


def narrow(run: Run, domain: str | None, coverage: float | None, bundle: Path) -> Narrowed | None:
    """Leaves some tokens in a bundle's tokenizer and configurations; its weights are the caller's.

    Args:
        run: Whose backbone it is.
        domain: Whose memory is merged; None for none. The own tokens of others leave.
        coverage: Of the merged domain's text, see `vocabulary.covering`; None: no token leaves for it.
        bundle: Being written; holds the backbone's config.json, generation_config.json and tokenizer.

    Returns:
        None where every token stays.

    Raises:
        KoffError: The tokenizer cannot be trimmed, or the text is no longer the run's.
    """
    if domain is not None and coverage is not None:
        say(f"domain {domain}: counting tokens")
        sides = split_documents(domain, run.recipe.domains[domain], seed=run.recipe.seed)
        run.check_texts({domain: sides.digest})
        counts = count_tokens(sides.train, run.dense.reader(domain))
        write_vocabulary(run.dense, {domain: counts}, coverage, bundle, KEY)
    elif run.dense.own is not None:
        write_text(bundle / KEPT, json.dumps(write_reader(run.dense, domain, bundle)))
    else:
        return None
    kept, mark = read_json(bundle / KEPT), sha256_file(bundle / KEPT)
    new = {old: n for n, old in enumerate(kept)}
    result = Narrowed(trimmed(run.dense, bundle), torch.tensor(kept), run.dense.tokenizer)
    config = AutoConfig.from_pretrained(bundle, local_files_only=True, trust_remote_code=False)
    _change(bundle / "config.json", config, lambda: trim_config(config, new, mark))
    if (bundle / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(bundle, local_files_only=True)
        _change(bundle / "generation_config.json", generation, lambda: renumber(generation, new))
    (bundle / KEPT).unlink()
    return result


def _change(path: Path, config: Any, work: Callable[[], object]) -> None:
    """Writes what `work` changes of a configuration; all else in its file stays as it is."""
    before = config.to_dict()
    work()
    changed = {key: value for key, value in config.to_dict().items() if value != before.get(key)}
    write_json(path, {**read_json(path), **changed})


def write_own_tokens(run: Run, domain: str, folder: Path) -> None:
    """Puts a domain's own tokens beside its memory: their rows, and the tokenizer of what is read with it.

    Args:
        run: With its backbone.
        domain: One of its.
        folder: Of the memory, in a bundle.
    """
    assert run.dense.own is not None
    weights = Weights.open(run.folder / "backbone").with_rows(torch.arange(*run.dense.own.spans[domain]))
    names = {"embedding": EMBEDDINGS, "head": HEAD}
    rows = weights.read(name for name in names.values() if name in weights.entries)
    tensors = {key: rows[name].contiguous() for key, name in names.items() if name in rows}
    save_file(tensors, folder / FILES["tokens"], metadata={"format": "pt"})
    write_reader(run.dense, domain, folder)
    for place in (path for path in folder.iterdir() if path.is_dir()):
        shutil.rmtree(place)  # further chat templates: they are the bundle's


def tell_narrowed(run: Run, narrowed: Narrowed, domain: str, bundle: Path) -> dict[str, Any]:
    """What a manifest tells of a narrowed bundle: tokens kept, of how many, and its held-out perplexity.

    That is by the dense model's own tokens, as the report's. `counted` are those that plan.json counts.

    Args:
        run: Whose held-out text it is.
        narrowed: From `narrow`.
        domain: Whose memory is merged.
        bundle: With its weights, and what is left of the memory.
    """
    windows = run.domains[domain].heldout
    counts = predicted_tokens(run, windows)
    memory = bundle / "memories" / domain
    model = on_device(load_backbone(bundle))
    if memory.is_dir():
        memories, attached = attach_memory(model, memory), domain
    else:
        memories, attached = Memories(model, Memory(lora=None, kv=None), {}, 0), None
    rows = narrowed.read(windows)
    with bar(f"evaluating {domain}", sum(map(len, rows))) as progress:
        nats = [
            total_nats(memories, row, attached, progress) / max(1, count)
            for row, count in zip(rows, counts, strict=True)
        ]
    found = perplexity(mean_nats(nats, counts))
    kept, of = len(narrowed.rows), run.dense.config.vocab_size
    before = ""
    if (run.folder / "losses.json").is_file():
        sizes = {name: len(blocks.heldout) for name, blocks in run.domains.items()}
        whole = read_losses(run.folder / "losses.json", sizes)[domain]
        before = f" (with all {perplexity(mean_nats(whole, counts)):.2f})"
    say(f"{kept:,} of {of:,} tokens stay: perplexity {found:.2f} on held-out {domain}{before}")
    own = run.dense.own
    return {"kept": kept, "of": of, "counted": own.shared if own else of, "perplexity": finite(found)}
