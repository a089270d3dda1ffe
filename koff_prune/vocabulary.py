"""A vocabulary without the tokens that no domain uses: which stay, and the dense model without the others."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel

from koff_export.errors import KoffError
from koff_export.files import read_json, sha256_file, write_json, write_text
from koff_prune.models import Dense, check_embeddings, config_sha256
from koff_prune.own_tokens import OwnTokens
from koff_prune.pretrained import load
from koff_prune.tokenizer_file import number_tokens, read_tokenizer, staying, trim_tokenizer

ASKED = "structure.vocabulary"
KEPT = "kept.json"  # the tokens that stay, by the ids of the whole tokenizer, in their new order
OWN = "own.json"  # of a divided vocabulary: how many of these are the backbone's, and each domain's own
_BACKBONE, DIVIDED = Path("backbone"), Path("memories")  # where its tokenizers are
MARK = "vocabulary_sha256"  # of a trimmed model's config: two of one size are not the same network
_IDS = ("_token_id", "_token_ids", "suppress_tokens")  # what the keys of a config that hold token ids end in
_WORDS = ("bad_words_ids", "force_words_ids", "sequence_bias")  # of several tokens each
_NAMED = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")  # tokens with a name of their own


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
    needed = _needed(dense, counts)
    dense.tokenizer.save_pretrained(str(folder))
    kept = trim_tokenizer(folder, covering(counts, coverage), needed, dense.config.vocab_size, key)
    _check_read_back(folder, dense, range(len(kept)), key)
    write_text(folder / KEPT, json.dumps(kept))


def write_divided(dense: Dense, counts: Mapping[str, torch.Tensor], coverage: float, folder: Path) -> None:
    """The same, divided: tokens that one domain alone keeps are its own, behind those of the backbone.

    Args: see `write_vocabulary`.

    Raises:
        KoffError: The tokenizer cannot be trimmed.
    """
    needed, size = _needed(dense, counts), dense.config.vocab_size
    dense.tokenizer.save_pretrained(str(folder))
    data = read_tokenizer(folder, ASKED)
    by_domain = {
        name: staying(data, covering({name: count}, coverage), needed, size) for name, count in counts.items()
    }
    owners = Counter(token for kept in by_domain.values() for token in kept)
    shared = staying(data, (token for token, count in owners.items() if count > 1), needed, size)
    own = {name: sorted(by_domain[name] - shared) for name in sorted(by_domain)}
    order = [*sorted(shared), *chain.from_iterable(own.values())]
    new = {old: n for n, old in enumerate(order)}
    readers = {DIVIDED / name: [*shared, *tokens] for name, tokens in own.items()}
    for place, tokens in {Path(): order, _BACKBONE: shared, **readers}.items():
        _write_numbered(dense, {old: new[old] for old in tokens}, folder / place)
    write_json(folder / OWN, {"shared": len(shared), "own": {name: len(ids) for name, ids in own.items()}})
    write_text(folder / KEPT, json.dumps(order))


def write_reader(dense: Dense, domain: str | None, folder: Path) -> list[int]:
    """Writes the tokenizer of what is read with a memory, or (None) without one, as a bundle numbers it.

    Args:
        dense: With a divided vocabulary.
        domain: Whose memory.
        folder: Exists.

    Returns:
        Its tokens by their ids in the run.
    """
    assert dense.own is not None
    there: list[int] = dense.own.rows(domain).tolist()
    _write_numbered(dense, {old: n for n, old in enumerate(there)}, folder)
    return there


def _write_numbered(dense: Dense, new: Mapping[int, int], folder: Path) -> None:
    """Writes the tokenizer with some tokens alone, numbered anew in any order."""
    dense.tokenizer.save_pretrained(str(folder))
    number_tokens(folder, new, spelled=True)
    _check_read_back(folder, dense, new.values(), ASKED)


def _needed(dense: Dense, counts: Mapping[str, torch.Tensor]) -> set[int]:
    """Tokens that configurations and the tokenizer name.

    Raises:
        KoffError: A text has a token that the model has no embedding for.
    """
    check_embeddings(max(int(count.nonzero()[-1]) for count in counts.values()), dense.config)
    needed = {number for source in _configs(dense) for number in _token_ids(source.to_dict())}
    return needed | {
        n for name in _NAMED if (n := getattr(dense.tokenizer, f"{name}_token_id", None)) is not None
    }


def _check_read_back(folder: Path, dense: Dense, wanted: Iterable[int], key: str) -> None:
    """Raises KoffError where a trimmed tokenizer is opened with other tokens than it was left."""
    wanted = set(wanted)
    if set((read_back := _open_tokenizer(folder, dense.source)).get_vocab().values()) != wanted:
        raise KoffError(
            f"{key}: the model's tokenizer has {len(read_back):,} tokens after it was trimmed"
            f" to {len(wanted):,}, so it cannot be; leave it out"
        )


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


def trimmed(dense: Dense, folder: Path, divided: bool = False) -> Dense:
    """The dense model with the vocabulary that `write_vocabulary` left in `folder`; nothing is read yet.

    Raises:
        KoffError: The folder is damaged.
    """
    kept = read_json(folder / KEPT)
    if (folder / OWN).exists() != divided:
        raise KoffError(f"{folder / OWN}: is missing or foreign; remove {folder}, and --resume makes it anew")
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
        own=_divided(folder, len(kept), dense.source) if divided else None,
    )


def _divided(folder: Path, kept: int, source: str) -> OwnTokens:
    """What `write_divided` left."""
    told = read_json(folder / OWN)
    ends = list(accumulate(told["own"].values(), initial=told["shared"]))
    spans = dict(zip(told["own"], pairwise(ends), strict=True))
    if ends[-1] != kept:
        raise KoffError(f"{folder / OWN}: is damaged; remove {folder}, and --resume makes it again")
    readers = {name: _open_tokenizer(folder / DIVIDED / name, source) for name in spans}
    return OwnTokens(told["shared"], spans, {None: _open_tokenizer(folder / _BACKBONE, source), **readers})


def _take_rows(model: Any, rows: torch.Tensor) -> None:
    """Leaves these rows of a model's embedding and head, in place; on any device, the meta device too."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight is embedding.weight
    set_rows(model, embedding.weight[rows], None if tied else head.weight[rows])


def set_rows(model: Any, embedding: torch.Tensor, head: torch.Tensor | None) -> None:
    """Gives a model another embedding and head, [tokens, hidden] each, in place; None: a tied one."""
    table, matrix = model.get_input_embeddings(), model.get_output_embeddings()
    table.weight = nn.Parameter(embedding, requires_grad=False)
    table.num_embeddings = matrix.out_features = len(embedding)
    table.padding_idx = None if table.padding_idx is None else model.config.pad_token_id
    matrix.weight = table.weight if head is None else nn.Parameter(head, requires_grad=False)
    for part in (model, model.model):
        if hasattr(part, "vocab_size"):
            part.vocab_size = len(embedding)
