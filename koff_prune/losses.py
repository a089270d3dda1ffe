"""Held-out losses of the report's rows, kept on disk.

Under a trimmed vocabulary (`structure.vocabulary`) every loss is told by the tokens that the dense model's
own tokenizer makes of the same text: perplexities compare with the dense model's, and with other runs'.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from koff_export.files import read_json, write_json
from koff_prune import ranks
from koff_prune.arms import Arm
from koff_prune.device import on_device
from koff_prune.domains import learned_tokens
from koff_prune.evaluate import read_losses, total_nats, window_losses
from koff_prune.memory import Memories
from koff_prune.pages import finite
from koff_prune.progress import bar
from koff_prune.recipe import Memory
from koff_prune.retokenise import read_again
from koff_prune.stages import cut_arm
from koff_prune.vocabulary import KEPT

if TYPE_CHECKING:
    from koff_prune.models import Dense
    from koff_prune.run import Run


def bare(dense: Dense) -> Memories:
    """A dense model without a memory, on the device; `dense` forgets it."""
    return Memories(on_device(dense.take()), Memory(lora=None, kv=None), {}, 0, own=dense.own)


def losses_of(
    run: Run, arm: Arm, folder: Path, attached: bool, *, main: bool = False
) -> dict[str, list[float]]:
    """Held-out nats per token, per domain and window, memories attached or off; kept on disk."""
    path = folder / ("losses.json" if attached else "losses-off.json")
    if arm == Arm("dense"):
        return _kept(run, path, arm.method, lambda: bare(run.whole), whole=True)
    return _kept(run, path, arm.method, lambda: cut_arm(run, arm, folder, keep_backbone=main), attached)


def trimmed_losses(run: Run, attached: bool = False) -> dict[str, list[float]]:
    """The same of the dense model that has lost tokens and no more; `attached`: each domain has its own."""
    path = run.folder / "rows" / "vocabulary" / ("losses.json" if attached else "losses-off.json")
    return _kept(run, path, "dense, trimmed", lambda: bare(run.dense), attached)


def _kept(
    run: Run,
    path: Path,
    label: str,
    make: Callable[[], Memories],
    attached: bool = False,
    whole: bool = False,
) -> dict[str, list[float]]:
    """The losses in a file, measured first where it is not there."""
    if not ranks.agree(path.exists()):
        memories = make()
        total = sum(b.heldout.numel() for b in run.domains.values())
        with ranks.turn():
            if not path.exists():
                result = {}
                with bar(f"evaluating {label}", total) as progress, run.timed("evaluating", path.parent):
                    for name, blocks in run.domains.items():
                        who = name if attached else None
                        result[name] = text_losses(
                            run, memories, blocks.heldout, name, who, progress, whole=whole
                        )
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, finite(result))
    return read_losses(path, {name: len(blocks.heldout) for name, blocks in run.domains.items()})


def text_losses(
    run: Run,
    memories: Memories,
    windows: torch.Tensor,
    text: str | None,
    domain: str | None,
    progress: Callable[[int], None] | None = None,
    *,
    whole: bool = False,
) -> list[float]:
    """Of each window, nats per token as the dense model's own tokenizer counts them.

    Args:
        run: Whose tokenizers these are.
        memories: Around the model to be judged.
        windows: int64 [n, window], of the run's tokenizer.
        text: The domain that they are of, and whose tokens they have; None for none.
        domain: Whose memory to attach; None for none.
        progress: As for `window_losses`.
        whole: The model has its whole vocabulary, and reads the windows' text by it.
    """
    if run.dense is run.whole:
        return window_losses(memories, windows, domain, progress)
    rows = _whole(run, windows)
    counts = _counts(rows)
    own = memories.own
    if own is not None and (text is None or text != domain):
        there = own.rows(domain).tolist()
        rows = read_again(
            windows, dict(zip(there, there, strict=True)), run.dense.tokenizer, own.readers[domain]
        )
    elif not whole:
        losses = window_losses(memories, windows, domain, progress)
        return [
            value * n / max(1, m) for value, n, m in zip(losses, learned_tokens(windows), counts, strict=True)
        ]
    return [
        total_nats(memories, row, domain, progress) / max(1, count)
        for row, count in zip(rows, counts, strict=True)
    ]


def predicted_tokens(run: Run, windows: torch.Tensor) -> list[int]:
    """Of each window, how many tokens are predicted, as the dense model's own tokenizer counts them."""
    return learned_tokens(windows) if run.dense is run.whole else _counts(_whole(run, windows))


def heldout_counts(run: Run) -> dict[str, list[int]]:
    """`predicted_tokens` of every domain's held-out windows."""
    return {name: predicted_tokens(run, blocks.heldout) for name, blocks in run.domains.items()}


def _whole(run: Run, windows: torch.Tensor) -> list[torch.Tensor]:
    kept = read_json(run.folder / "vocabulary" / KEPT)
    return read_again(windows, dict(enumerate(kept)), run.dense.tokenizer, run.whole.tokenizer)


def _counts(rows: list[torch.Tensor]) -> list[int]:
    return [learned_tokens(row[None])[0] for row in rows]
