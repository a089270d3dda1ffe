"""One text and the cache that holds what the graph has read of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort

if TYPE_CHECKING:
    from koff_export.runtime import Runtime


class CachedText:
    """One text on its way through the graph: its cache, one row, and how many tokens it holds."""

    def __init__(self, runtime: Runtime, memory: str | None) -> None:
        self.runtime = runtime
        self.options = runtime.run_options(memory)
        self.past = runtime.empty_cache
        self.length = 0

    def read(self, tokens: Sequence[int]) -> np.ndarray:
        """Appends `tokens`; returns their logits, float32 [len(tokens), vocabulary]."""
        end = self.length + len(tokens)
        feeds = {
            "input_ids": np.array([tokens], dtype=np.int64),
            "attention_mask": np.ones((1, end), dtype=np.int64),
            "position_ids": np.arange(self.length, end, dtype=np.int64)[None],
        }
        values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()}
        logits, *present = self.runtime.run({**values, **self.past}, self.options)
        self.past = dict(zip(self.past, present, strict=True))
        self.length = end
        return logits.numpy()[0].astype(np.float32, copy=False)
