"""Many prompts at once, each with a memory of its own: one call of the graph serves all that share one."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Unpack

import numpy as np

from koff_export.cached import CHUNK, Cache
from koff_export.errors import KoffError
from koff_export.sampling import How, Picker, check_length, sampling_of
from koff_export.text import stop_tokens, stream_text, until_stop

if TYPE_CHECKING:
    from koff_export.runtime import Runtime


class _Rows:
    """Texts of one memory on their way through the graph, padded on the left to one length."""

    def __init__(self, runtime: Runtime, memory: str | None, prompts: Sequence[Sequence[int]]) -> None:
        self.runtime, self.memory = runtime, memory
        # a fused graph takes many tokens behind others of one text only; a single token of many
        self.fused = runtime.profile != "portable"
        longest = max(map(len, prompts))
        # padding is token 0 at position 0, and the mask hides it from all that follows
        self.pending = np.array([[0] * (longest - len(p)) + list(p) for p in prompts], np.int64)
        self.mask = np.array([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], np.int64)
        self.cache = runtime.cache(memory, len(prompts))

    def read(self) -> np.ndarray:
        """Reads what is pending; the logits after its last token, float32 [rows, vocabulary]."""
        rows, count = self.pending.shape
        feeds = self.pending, self.mask, np.maximum(self.mask.cumsum(1) - 1, 0)[:, -count:]
        front = self.runtime.kv_tokens(self.memory)
        if count == 1 or not self.fused or (front == 0 and count * rows <= CHUNK):
            last = _read(self.cache, *feeds)
        else:
            caches = [self.runtime.cache(self.memory) for _ in range(rows)]
            each = [_read(cache, *(array[i : i + 1] for array in feeds)) for i, cache in enumerate(caches)]
            last = np.concatenate(each)
            self.cache.join(caches)
        return last.astype(np.float32, copy=False)

    def append(self, tokens: Sequence[int], going: Sequence[bool]) -> None:
        """The next token of every row; padding, which takes no position, where a row has come to its end."""
        self.pending = np.array(tokens, np.int64)[:, None]
        self.mask = np.concatenate([self.mask, np.array(going, np.int64)[:, None]], 1)


def _read(cache: Cache, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The logits after the last column, [rows, vocabulary]; of no more than CHUNK tokens at a time."""
    rows, count = ids.shape
    start, step = mask.shape[1] - count, max(1, CHUNK // rows)
    for at in range(0, count, step):
        end = min(at + step, count)
        logits = cache.read(ids[:, at:end], mask[:, : start + end], positions[:, at:end])
    return logits[:, -1]


def generate_batch(
    runtime: Runtime,
    prompts: Sequence[str],
    memories: Sequence[str | None],
    max_new_tokens: int = 128,
    *,
    stop: Sequence[str] = (),
    rows: int = 8,
    first: int = 0,
    **how: Unpack[How],
) -> list[str]:
    """The answers to many prompts, each with a memory of its own.

    Args:
        runtime: An open bundle.
        prompts: Texts.
        memories: Of every prompt; None for the bare backbone.
        max_new_tokens: Upper bound of every answer.
        stop: An answer ends before the first of these.
        rows: Prompts in one call of the graph. More are faster and take more memory.
        first: Number of the first prompt, where these go on with others: each number draws for itself.
        how: See `koff_export.sampling.How`; every prompt draws for itself.

    Raises:
        KoffError: as `Runtime.generate`, or the lists differ in length.
    """
    check_length(max_new_tokens)
    sampling = sampling_of(runtime, how)
    if isinstance(prompts, str) or len(prompts) != len(memories) or rows < 1:
        raise KoffError(
            "a batch needs a list of prompts, one memory (or None) for each, and rows of at least 1"
        )
    ids = [runtime.encode(*pair) for pair in zip(prompts, memories, strict=True)]
    for tokens, memory in zip(ids, memories, strict=True):
        runtime.check_tokens(tokens, memory, min(1, max_new_tokens))
    answers = [""] * len(prompts)
    for memory in dict.fromkeys(memories):
        ends = {*runtime.manifest.eos, *stop_tokens(runtime.tokenizer_of(memory), stop)}
        # texts of like length go together, for padding is computed too
        mine = sorted((i for i, m in enumerate(memories) if m == memory), key=lambda i: len(ids[i]))
        for some in (mine[at : at + rows] for at in range(0, len(mine), rows)):
            limits = [runtime.room(ids[i], memory, max_new_tokens) for i in some]
            pickers = [sampling.picker(ids[i], runtime.words(memory), first + i) for i in some]
            found = _generate_rows(runtime, [ids[i] for i in some], memory, limits, pickers, ends)
            for i, tokens in zip(some, found, strict=True):
                pieces = stream_text(runtime.tokenizer_of(memory), ids[i], iter(tokens))
                answers[i] = "".join(until_stop(pieces, stop))
    return answers


def _generate_rows(
    runtime: Runtime,
    prompts: Sequence[Sequence[int]],
    memory: str | None,
    max_new_tokens: Sequence[int],
    pickers: Sequence[Picker],
    ends: Collection[int],
) -> list[list[int]]:
    """New tokens after each of `prompts` under one memory, to one of `ends` (left out)."""
    answers: list[list[int]] = [[] for _ in prompts]
    going = [limit > 0 for limit in max_new_tokens]
    rows = _Rows(runtime, memory, prompts) if any(going) else None
    while rows is not None and any(going):
        logits, tokens = rows.read(), [0] * len(prompts)
        for i, answer in enumerate(answers):
            if not going[i]:
                continue
            tokens[i] = pickers[i].pick(logits[i])
            if tokens[i] in ends:
                going[i] = False
            else:
                answer.append(tokens[i])
                going[i] = len(answer) < max_new_tokens[i]
        rows.append(tokens, going)
    return answers
