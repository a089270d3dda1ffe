"""Windows of tokens as another tokenizer reads their text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch

_LINE, _BYTES = "<0x0A>", 4  # a line's end as a byte; the most of a character's


def read_again(windows: torch.Tensor, numbers: Mapping[int, int], own: Any, other: Any) -> list[torch.Tensor]:
    """Windows as another tokenizer reads their text; of a chat, what is read alone stays so.

    Args:
        windows: int64 [n, window] of a tokenizer, see `DomainBlocks`.
        numbers: The other's ids of its control tokens, and of any other tokens.
        own: The tokenizer that they are of.
        other: The one that is to read them.

    Returns:
        Of each window, int64 [as many tokens as it takes]; without a character that its end cuts in two.
    """
    special = set(own.added_tokens_decoder) & set(numbers)
    # one that puts a space in front of all text reads what goes on a word as if it began one: a line's end,
    # which is a byte of its own there, stands before it instead
    lead = other("\n", add_special_tokens=False)["input_ids"]
    if other.convert_ids_to_tokens(lead) != ["▁", _LINE]:
        lead = []
    before = [own.convert_tokens_to_ids(_LINE)] if lead else []

    def kind(token: int) -> tuple[bool, bool]:
        return token < 0, (token if token >= 0 else -1 - token) in special

    result = []
    for row in windows.tolist():
        ids: list[int] = []
        for (read, control), run in groupby(row, kind):
            said = [-1 - token if read else token for token in run]
            if control:
                found = [numbers[token] for token in said]
            else:
                text = _decoded(own, _whole_characters(own, said), before)
                found = other(
                    text, add_special_tokens=False, split_special_tokens=True, verbose=False
                )["input_ids"][len(lead) :]  # fmt: skip
            ids += [-1 - token for token in found] if read else found
        result.append(torch.tensor(ids, dtype=torch.long))
    return result


def _decoded(tokenizer: Any, ids: list[int], before: Sequence[int] = ()) -> str:
    return str(tokenizer.decode([*before, *ids], clean_up_tokenization_spaces=False))


def _whole_characters(tokenizer: Any, ids: list[int]) -> list[int]:
    """Tokens without those of a character at either end that is cut in two."""
    for forward in (True, False):
        for gone in range(min(_BYTES, len(ids))):
            rest = ids[gone:] if forward else ids[: len(ids) - gone]
            text = _decoded(tokenizer, rest)
            if not (text.startswith if forward else text.endswith)("\ufffd"):
                ids = rest
                break
    return ids
