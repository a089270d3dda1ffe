"""Tokens taken out of a saved byte-pair encoding.

It makes a token by merges. What stays is closed under them: with a token stays all that its merges pass
through. So whatever the whole tokenizer reads by tokens that stay, the trimmed one reads by the same tokens:
of the merges that are possible at any step the first is among those that stay. A token that is gone is read
in pieces, and any text can be read as before.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from koff_export.errors import KoffError
from koff_export.files import read_json, write_json, write_text

_SPARE = ("unused", "reserved")  # in the names of added tokens that nothing was trained on
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_SLOW = ("vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json")  # tell of the whole vocabulary


def trim_tokenizer(
    folder: Path, wanted: Iterable[int], needed: Iterable[int], rows: int, key: str
) -> list[int]:
    """Takes tokens out of a saved tokenizer, in place; those that stay are numbered anew, in their order.

    Args:
        folder: What `save_pretrained` wrote.
        wanted: Ids that stay; with them stays what their merges pass through.
        needed: Ids that configurations name; some may be none of the tokenizer's.
        rows: Of the model's embedding; tokens from this id on have none, and go.
        key: Of the recipe, which asks for it.

    Returns:
        All ids that stay, ascending.

    Raises:
        KoffError: The tokenizer is no byte-pair encoding of the plain kind.
    """
    kept = sorted(staying(read_tokenizer(folder, key), wanted, needed, rows))
    number_tokens(folder, {old: n for n, old in enumerate(kept)})
    return kept


def read_tokenizer(folder: Path, key: str) -> dict[str, Any]:
    """The tokenizer.json of a folder.

    Raises:
        KoffError: It is no byte-pair encoding of the plain kind; `key` of the recipe asks for it.
    """
    path = folder / "tokenizer.json"
    data: dict[str, Any] = read_json(path) if path.is_file() else {}
    model = data.get("model") or {}
    if model.get("type") != "BPE" or any(
        model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout")
    ):
        raise KoffError(
            f"{key}: the model's tokenizer is no plain byte-pair encoding, and no other kind"
            " can be trimmed; leave it out"
        )
    return data


def staying(data: Mapping[str, Any], wanted: Iterable[int], needed: Iterable[int], rows: int) -> set[int]:
    """What stays with the tokens that are wanted and needed: see `trim_tokenizer`."""
    model = data["model"]
    known = {*model["vocab"].values(), *(token["id"] for token in data["added_tokens"])}
    return (_closed(model, wanted) | set(needed) | _always(data)) & known & set(range(rows))


def number_tokens(folder: Path, new: Mapping[int, int], spelled: bool = False) -> None:
    """Leaves some tokens in a saved tokenizer, in place, and numbers them anew.

    Args:
        folder: What `save_pretrained` wrote.
        new: The numbers of those that stay, by their old ones.
        spelled: Whether the numbers of added tokens may lie anywhere, and not behind all others alone.
    """
    path = folder / "tokenizer.json"
    data = read_json(path)
    model = data["model"]
    vocab: dict[str, int] = model["vocab"]
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    model["vocab"] = {text: new[old] for text, old in vocab.items() if old in new}
    model["merges"] = [
        merge
        for merge, pair in zip(model["merges"], pairs, strict=True)
        if all(text in model["vocab"] for text in (*pair, "".join(pair)))
    ]
    gone = {token["content"] for token in data["added_tokens"] if token["id"] not in new}
    data["added_tokens"] = [
        {**token, "id": new[token["id"]]} for token in data["added_tokens"] if token["id"] in new
    ]
    if spelled:  # one that the model lacks is numbered by where it comes
        model["vocab"] |= {token["content"]: token["id"] for token in data["added_tokens"]}
    for part in _processors(data.get("post_processor")):
        for special in part.get("special_tokens", {}).values():
            special["ids"] = [new[old] for old in special["ids"]]
        for name in {"sep", "cls"} & set(part):
            part[name] = [part[name][0], new[part[name][1]]]
    if isinstance(padding := data.get("padding"), dict):
        padding["pad_id"] = new[padding["pad_id"]]
    write_text(path, json.dumps(data, ensure_ascii=False))
    _trim_settings(folder / "tokenizer_config.json", new, gone)
    for name in _SLOW:
        (folder / name).unlink(missing_ok=True)


def _closed(model: Mapping[str, Any], wanted: Iterable[int]) -> set[int]:
    """These tokens, and all that the merges pass through on the way to them."""
    vocab: dict[str, int] = model["vocab"]
    texts = {number: text for text, number in vocab.items()}
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    ranks = {tuple(pair): rank for rank, pair in enumerate(pairs)}
    result = set()
    for token in wanted:
        result.add(token)
        parts = list(texts.get(token, ""))
        passed = set(parts)
        while len(parts) > 1:
            rank, at = min((ranks.get(pair, math.inf), n) for n, pair in enumerate(pairwise(parts)))
            if rank == math.inf:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
            passed.add(parts[at])
        if len(parts) == 1:  # else no merge leads to it: it is found as a whole word
            result |= {vocab[text] for text in passed if text in vocab}
    return result


def _always(data: Mapping[str, Any]) -> set[int]:
    """What stays whether it occurs or not: what spells any text, and the tokens that have a part to play."""
    model = data["model"]
    vocab: dict[str, int] = model["vocab"]
    if model.get("byte_fallback"):
        kept = {vocab[text] for n in range(256) if (text := f"<0x{n:02X}>") in vocab}
    else:
        kept = {number for text, number in vocab.items() if len(text) == 1}
    kept |= {vocab[text] for text in [model.get("unk_token")] if text in vocab}
    kept |= {
        token["id"]
        for token in data["added_tokens"]
        if not any(word in token["content"].lower() for word in _SPARE)
    }
    for part in _processors(data.get("post_processor")):
        kept |= {number for special in part.get("special_tokens", {}).values() for number in special["ids"]}
        kept |= {part[name][1] for name in {"sep", "cls"} & set(part)}
    if isinstance(padding := data.get("padding"), dict):
        kept.add(padding["pad_id"])
    return kept


def _processors(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A post-processor's parts, however deep they stand."""
    if part is None:
        return []
    return [part, *(found for inner in part.get("processors", []) for found in _processors(inner))]


def _trim_settings(path: Path, new: Mapping[int, int], gone: set[str]) -> None:
    """What tokenizer_config.json tells of tokens, without those that are gone: it would bring them back."""
    settings = read_json(path)
    for name, told in list(settings.items()):
        text = told.get("content") if isinstance(told, dict) else told
        if isinstance(text, str) and text in gone:
            del settings[name]
    if isinstance(told := settings.get("added_tokens_decoder"), dict):
        settings["added_tokens_decoder"] = {
            str(new[int(old)]): token for old, token in told.items() if int(old) in new
        }
    for name in _LISTS:
        if isinstance(told := settings.get(name), list):
            settings[name] = [token for token in told if token not in gone]
    write_json(path, settings)
