"""A vocabulary without the tokens that no domain uses: they leave the embedding, the head and the tokenizer.

Byte-pair encoding makes a token by merges. What stays is closed under them: with a token stays all that its
merges pass through. So whatever the whole tokenizer reads by tokens that stay, the trimmed one reads by the
same tokens: of the merges that are possible at any step the first is among those that stay. A token that is
gone is read in pieces, and any text can be read as before.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel

from koff_export.errors import KoffError
from koff_export.files import read_json, sha256_file, write_json, write_text
from koff_prune.models import Dense, check_embeddings, config_sha256
from koff_prune.pretrained import load

ASKED = "structure.vocabulary"
KEPT = "kept.json"  # the tokens that stay, by the ids of the whole tokenizer, ascending
_LINE, _BYTES = "<0x0A>", 4  # a line's end as a byte; the most of a character's
MARK = "vocabulary_sha256"  # of a trimmed model's config: two of one size are not the same network
_IDS = ("_token_id", "_token_ids", "suppress_tokens")  # what the keys of a config that hold token ids end in
_WORDS = ("bad_words_ids", "force_words_ids", "sequence_bias")  # of several tokens each
_SPARE = ("unused", "reserved")  # in the names of added tokens that nothing was trained on
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_NAMED = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")  # tokens with a name of their own
_SLOW = ("vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json")  # tell of the whole vocabulary


def covering(counts: Mapping[str, torch.Tensor], coverage: float) -> list[int]:
    """The fewest tokens, the commonest of any domain first, that make this share of every domain's text.

    Args:
        counts: By domain, how often each token occurs, int64 [vocabulary].
        coverage: In (0, 1].

    Returns:
        Ascending ids.
    """
    share = torch.stack([count.double() / count.sum().clamp_min(1) for count in counts.values()])
    order = share.amax(0).sort(descending=True, stable=True).indices
    whole = torch.stack([count[order].cumsum(0) for count in counts.values()])
    need = torch.tensor([math.ceil(coverage * int(count.sum())) for count in counts.values()])
    enough = (whole >= need[:, None]).all(0)
    return sorted(order[: int(enough.int().argmax()) + 1].tolist())


def trim_tokenizer(
    folder: Path, wanted: Iterable[int], needed: Iterable[int], rows: int, key: str = ASKED
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
    path = folder / "tokenizer.json"
    data = read_json(path) if path.is_file() else {}
    model = data.get("model") or {}
    if model.get("type") != "BPE" or any(
        model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout")
    ):
        raise KoffError(
            f"{key}: the model's tokenizer is no plain byte-pair encoding, and no other kind"
            " can be trimmed; leave it out"
        )
    vocab: dict[str, int] = model["vocab"]
    known = {*vocab.values(), *(token["id"] for token in data["added_tokens"])}
    kept = (_closed(model, wanted) | set(needed) | _always(data)) & known & set(range(rows))
    new = {old: n for n, old in enumerate(sorted(kept))}
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
    return sorted(kept)


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


def write_vocabulary(
    dense: Dense, counts: Mapping[str, torch.Tensor], coverage: float, folder: Path, key: str = ASKED
) -> None:
    """Writes the trimmed tokenizer and `KEPT` into a folder that is renamed when whole.

    Args:
        dense: With its whole vocabulary.
        counts: See `covering`, int64 [at least the tokenizer's length].
        coverage: The same.
        folder: Exists.
        key: Of the recipe, which asks for it.

    Raises:
        KoffError: The tokenizer cannot be trimmed.
    """
    check_embeddings(max(int(count.nonzero()[-1]) for count in counts.values()), dense.config)
    dense.tokenizer.save_pretrained(str(folder))
    needed = {number for source in _configs(dense) for number in _token_ids(source.to_dict())}
    needed |= {n for name in _NAMED if (n := getattr(dense.tokenizer, f"{name}_token_id", None)) is not None}
    kept = trim_tokenizer(folder, covering(counts, coverage), needed, dense.config.vocab_size, key)
    if len(read_back := _open_tokenizer(folder, dense.source)) != len(kept):
        raise KoffError(
            f"{key}: the model's tokenizer has {len(read_back):,} tokens after it was trimmed"
            f" to {len(kept):,}, so it cannot be; leave it out"
        )
    write_text(folder / KEPT, json.dumps(kept))


def _open_tokenizer(folder: Path, name: str) -> Any:
    return load(AutoTokenizer, str(folder), name, local_files_only=True)


def _configs(dense: Dense) -> list[Any]:
    """The configurations of the model and of how it generates."""
    return [dense.config, dense.outline().generation_config]


def _token_ids(told: Mapping[str, Any]) -> set[int]:
    """The token ids that a configuration names, those it would only suppress aside."""
    found: set[int] = set()
    for key, value in told.items():
        if key.endswith(_IDS[:2]):
            found |= {n for n in (value if isinstance(value, list) else [value]) if isinstance(n, int)}
    return found


def renumber(config: Any, new: Mapping[int, int]) -> None:
    """Numbers the tokens that a configuration names anew; a list forgets those that are gone."""
    for key, value in config.to_dict().items():
        if key.endswith(_IDS) and isinstance(value, int):
            setattr(config, key, new.get(value))
        elif key.endswith(_IDS) and isinstance(value, list):
            setattr(config, key, [new[n] for n in value if n in new])
        elif key in _WORDS and value is not None:
            words = [word for word in value if all(n in new for n in word)] if key != "sequence_bias" else []
            setattr(config, key, [[new[n] for n in word] for word in words] or None)


def trim_config(config: PretrainedConfig, new: Mapping[int, int], mark: str) -> PretrainedConfig:
    """A model's configuration, in place, for the tokens that stay.

    Args:
        config: Of the model.
        new: Their numbers, by the old ones.
        mark: The sha256 of the `KEPT` that tells them.
    """
    renumber(config, new)
    config.vocab_size = len(new)
    setattr(config, MARK, mark)
    return config


def trimmed(dense: Dense, folder: Path) -> Dense:
    """The dense model with the vocabulary that `write_vocabulary` left in `folder`; nothing is read yet.

    Raises:
        KoffError: The folder is damaged.
    """
    kept = read_json(folder / KEPT)
    rows = torch.tensor(kept)
    new = {old: n for n, old in enumerate(kept)}
    mark = sha256_file(folder / KEPT)

    def trim(model: PreTrainedModel) -> PreTrainedModel:
        trim_config(model.config, new, mark)  # in place: the layers hold it too
        if model.generation_config is not None:
            renumber(model.generation_config, new)
        _take_rows(model, rows)
        return model

    config = trim_config(copy.deepcopy(dense.config), new, mark)
    return dataclasses.replace(
        dense,
        config=config,
        open=lambda: trim(dense.take()),
        skeleton=lambda: trim(dense.skeleton()),
        weights=None if dense.weights is None else dense.weights.with_rows(rows),
        tokenizer=_open_tokenizer(folder, dense.source),
        config_sha256=config_sha256(config),
        bos=None if dense.bos is None else new[dense.bos],
    )


def _take_rows(model: Any, rows: torch.Tensor) -> None:
    """Leaves these rows of a model's embedding and head, in place; on any device, the meta device too."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight is embedding.weight
    embedding.weight = nn.Parameter(embedding.weight[rows], requires_grad=False)
    embedding.num_embeddings = len(rows)
    embedding.padding_idx = None if embedding.padding_idx is None else model.config.pad_token_id
    head.weight = embedding.weight if tied else nn.Parameter(head.weight[rows], requires_grad=False)
    head.out_features = len(rows)
    for part in (model, model.model):
        if hasattr(part, "vocab_size"):
            part.vocab_size = len(rows)


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
