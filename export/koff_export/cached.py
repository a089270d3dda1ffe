"""What the graph has read of some texts that share a memory: past keys and values, a row for each text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import onnxruntime as ort

from koff_export.errors import KoffError
from koff_export.graph import is_kv_slot

if TYPE_CHECKING:
    from koff_export.runtime import Runtime

_VALUE = ort.OrtValue.ortvalue_from_numpy
CHUNK = 256  # tokens a call while a text is read: bounds the logits, [chunk, vocabulary] float32
_STEP = 256  # tokens that a cache in place grows by, at least


class Cache(Protocol):
    """Either kind of cache."""

    def read(self, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Appends tokens to every row; returns their logits, [rows, count, vocabulary].

        Args:
            ids: int64 [rows, count].
            mask: int64 [rows, tokens of text read so far and now]: 0 for padding, 1 for text.
            positions: int64 [rows, count], of the text alone.
        """

    def join(self, caches: Sequence[Any]) -> None:
        """Takes over caches of this kind, of one row each and of one length."""

    def rewind(self, length: int) -> None:
        """Forgets all but so many tokens of text."""


class CacheOfGraph:
    """For graphs with slots: a call takes a cache and hands back a longer one."""

    def __init__(self, runtime: Runtime, memory: str | None, rows: int = 1) -> None:
        self.runtime, self.options = runtime, runtime.run_options(memory)
        self.words = runtime.words(memory)
        self.past = {
            name: _VALUE(np.repeat(value.numpy(), rows, 0)) for name, value in runtime.empty_cache.items()
        }

    def read(self, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """See `Cache`."""
        values = {name: _VALUE(np.ascontiguousarray(a)) for name, a in _feeds(ids, mask, positions).items()}
        logits, *present = self.runtime.run({**values, **self.past}, self.options)
        if logits.shape()[-1] != self.words:
            raise KoffError("the graph has other tokens than koff.json says: fetch the bundle again")
        self.past = dict(zip(self.past, present, strict=True))
        return np.asarray(logits.numpy())

    def join(self, caches: Sequence[Any]) -> None:
        """See `Cache`."""
        for name in self.past:
            self.past[name] = _VALUE(np.concatenate([cache.past[name].numpy() for cache in caches]))

    def rewind(self, length: int) -> None:
        """See `Cache`."""
        kept = {name: np.ascontiguousarray(v.numpy()[:, :, :length]) for name, v in self.past.items()}
        self.past = {name: _VALUE(array) for name, array in kept.items()}


class CacheInPlace:
    """For graphs without slots for a learned KV: a block of memory that begins with it and is filled up.

    A call writes its keys and values where they stay: no copy of all that was read before is made.
    """

    def __init__(self, runtime: Runtime, memory: str | None, rows: int = 1) -> None:
        self.runtime, self.rows = runtime, rows
        self._binding = runtime.io_binding()
        # the binding keeps nothing alive: neither this nor the blocks
        self._adapter = runtime.adapter(memory)
        self._words = runtime.words(memory)
        kv = {}
        for name, value in self._adapter.tensors.items() if self._adapter else ():
            if is_kv_slot(name):
                kv[name] = value.numpy()
            else:
                self._binding.bind_ortvalue_input(name, value)
        self.front = self.length = next(iter(kv.values())).shape[2] if kv else 0
        self._blocks: dict[str, ort.OrtValue] = {}
        self._past = {
            name: np.repeat(kv.get(_slot(name), empty.numpy()), rows, 0)
            for name, empty in runtime.empty_cache.items()
        }
        self._capacity = 0

    def read(self, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """See `Cache`."""
        end = self.length + ids.shape[1]
        if end > self._capacity:
            self._grow(end)
        seen = np.ones((self.rows, self.front), np.int64)
        feeds = _feeds(ids, np.concatenate([seen, mask], 1), positions + self.front)
        values = {name: _VALUE(np.ascontiguousarray(array)) for name, array in feeds.items()}
        for name, value in values.items():
            self._binding.bind_ortvalue_input(name, value)
        logits = np.empty((*ids.shape, self._words), next(iter(self._past.values())).dtype)
        target = _VALUE(logits)
        self._binding.bind_ortvalue_output("logits", target)
        self.runtime.run_bound(self._binding)
        self.length = end
        return logits

    def join(self, caches: Sequence[Any]) -> None:
        """See `Cache`."""
        self.length = caches[0].length
        for name in self._past:
            self._past[name] = np.concatenate([cache._past[name][:, :, : self.length] for cache in caches])
        self._grow(self.length)

    def rewind(self, length: int) -> None:
        """See `Cache`."""
        self.length = self.front + length

    def _grow(self, least: int) -> None:
        """Moves what was read into a larger block: twice as large, so that a long text is copied seldom."""
        capacity = max(least + _STEP, 2 * self._capacity)
        larger: dict[str, np.ndarray] = {}
        for name, old in self._past.items():
            rows, heads, _, size = old.shape
            larger[name] = np.zeros((rows, heads, capacity, size), old.dtype)
            larger[name][:, :, : self.length] = old[:, :, : self.length]
        self._capacity, self._past = capacity, larger  # all of it, or nothing if the memory does not do
        self._blocks = {name: _VALUE(block) for name, block in larger.items()}
        for name, value in self._blocks.items():
            self._binding.bind_ortvalue_input(name, value)
            self._binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)


class CachedText:
    """One text on its way through the graph: its tokens so far, and their cache.

    Attributes:
        answers: How many answers have gone on with it: the last one alone may.
    """

    def __init__(self, runtime: Runtime, memory: str | None) -> None:
        self.runtime, self.memory, self.answers = runtime, memory, 0
        self._restart()

    def _restart(self) -> None:
        self.cache: Cache = self.runtime.cache(self.memory)
        self._adapter = self.runtime.loaded(self.memory)
        self.tokens: list[int] = []

    def read(self, tokens: Sequence[int]) -> np.ndarray:
        """Appends `tokens`; returns their logits, float32 [len(tokens), vocabulary]."""
        start, end = len(self.tokens), len(self.tokens) + len(tokens)
        mask, positions = np.ones((1, end), np.int64), np.arange(start, end, dtype=np.int64)[None]
        logits = self.cache.read(np.array([tokens], dtype=np.int64), mask, positions)
        self.tokens += tokens
        return logits[0].astype(np.float32, copy=False)

    def turn_to(self, tokens: Sequence[int]) -> Sequence[int]:
        """Forgets all but what `tokens` begin with; returns those still to be read, at least the last one."""
        if self.runtime.loaded(self.memory) is not self._adapter:  # another goes by that name by now
            self._restart()
        common = 0
        while common < min(len(self.tokens), len(tokens) - 1) and self.tokens[common] == tokens[common]:
            common += 1
        if common < len(self.tokens):
            self.cache.rewind(common)
            del self.tokens[common:]
        return tokens[common:]


def _feeds(ids: np.ndarray, mask: np.ndarray, positions: np.ndarray) -> dict[str, np.ndarray]:
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def _slot(past: str) -> str:
    """The slot whose place a cache in place has, of the learned KV."""
    return past.replace("past_key_values", "memory")
