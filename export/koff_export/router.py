"""Picks a memory by the prompt: the one under which the prompt itself is least surprising."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from koff_export.runtime import Runtime

BARE = "none"  # the backbone alone; no memory has this name
AUTO = "auto"


@dataclass(frozen=True)
class Choice:
    """A picked memory, and why.

    Attributes:
        memory: The memory's name; None for the bare backbone.
        losses: Nats per token of the prompt, by memory, "none" among them; empty for a prompt too short.
    """

    memory: str | None
    losses: dict[str, float] = field(default_factory=dict)


def choose(names: Iterable[str], loss: Callable[[str | None], float]) -> Choice:
    """The lowest of `loss(name)` over the bare backbone and all names; the former wins a tie."""
    losses = {BARE: loss(None), **{name: loss(name) for name in names}}
    best = min(losses, key=losses.__getitem__)
    return Choice(None if best == BARE else best, losses)


def route(runtime: Runtime, tokens: Sequence[int]) -> Choice:
    """Reads the prompt once under every memory of the bundle, and once under none.

    A memory with tokens of its own reads the prompt by them; its nats too are told per token of the backbone.

    Args:
        runtime: An open bundle.
        tokens: The prompt in the backbone's tokens, with `bos` if the model wants it. One token tells
            nothing: it gets no memory.

    Raises:
        KoffError: a damaged memory, or a prompt that leaves no room at all. Memories that leave none are
            passed over.
    """
    if len(tokens) < 2:
        return Choice(None)
    runtime.reread()  # a memory may have come or gone since

    for name in (names := runtime.memories):
        runtime.memory(name)
    # readings that begin with different tokens are compared by all of them: the first one has to be said too
    bos, eos = runtime.manifest.bos, runtime.manifest.eos
    divided = any(runtime.words(name) > runtime.vocab_size for name in names)
    lead = eos[:1] if divided and tokens[0] != bos else []

    def loss(name: str | None) -> float:
        mine = tokens
        if runtime.words(name) > runtime.vocab_size:
            text = runtime.tokenizer.decode(tokens, skip_special_tokens=False)
            mine = runtime.encode(text, name, bos=tokens[0] == bos)
        return runtime.score([[*lead, *mine]], name)[0] / (len(lead) + len(tokens) - 1)

    room = len(lead) + 1
    return choose([name for name in names if runtime.room(tokens, name, room) == room], loss)
