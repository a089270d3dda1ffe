"""Picks a memory for a text by itself: the one under which the text's beginning is likeliest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from koff_export.errors import KoffError

if TYPE_CHECKING:
    from koff_export.runtime import Runtime

TOKENS = 64  # of the text's beginning; more cost more and hardly decide otherwise


def losses(runtime: Runtime, tokens: Sequence[int]) -> dict[str, float]:
    """Nats per predicted token of the beginning of `tokens` under every memory, the lowest first.

    Raises:
        KoffError: the bundle has no memory, or there are fewer than two tokens.
    """
    if not runtime.memories:
        raise KoffError("the bundle has no memory to pick: leave out --memory auto")
    if len(tokens) < 2:
        raise KoffError("one token decides nothing: give a longer text, or name a memory")
    found = {}
    for name in runtime.memories:
        total, count = runtime.score([tokens[:TOKENS]], name)
        found[name] = total / count
    return dict(sorted(found.items(), key=lambda item: item[1]))


def route(runtime: Runtime, tokens: Sequence[int]) -> str:
    """The name of the memory under which the beginning of `tokens` is likeliest."""
    return next(iter(losses(runtime, tokens)))
