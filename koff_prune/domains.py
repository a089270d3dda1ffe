"""From documents to token blocks: split by document, shuffle, tokenise, pack.

Which document is on which side, and in which order they come, depends on keys, texts and the seed alone: not
on the order of files, nor on how many tokens are asked for. Long documents are divided into pieces that are
shuffled too, so that a small budget still sees many documents.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from koff_export.errors import KoffError
from koff_prune.chat import Chat, chat_tokens, tokens
from koff_prune.documents import describe, documents
from koff_prune.progress import say
from koff_prune.recipe import Domain, Recipe
from koff_prune.spool import Place, Spool, Texts, shuffled_pieces
from koff_prune.tensor_file import TensorFile, save_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "DomainBlocks",
    "Sides",
    "count_tokens",
    "documents",
    "load_blocks",
    "load_domain",
    "save_blocks",
    "split_documents",
]
_MANY = 4  # passes over a domain's text above which more of the same is worth a word
_BATCH = 32  # pieces tokenised at once
_FEW = 1024  # pieces that are looked at in any case
_COUNTED, _COUNTED_PIECE = 5_000_000, 4096  # tokens that tell of a vocabulary; characters of their pieces
_PIECE = 8  # characters of a piece for every token of a window, so that most windows lie within one piece


@dataclass
class DomainBlocks:
    """The token blocks of one domain, all int64 token ids.

    Tokens of a chat that are read and not learned stand as -1 - id (`chat.tokens_and_labels`).

    Attributes:
        name: The domain.
        train: [n, learn.window]; enough for the token budget where the text suffices, to be cycled where not.
        scoring: [k, scoring.window], the start of the training text, k * window <= scoring.tokens.
        heldout: [m, evaluate.window], m * window <= evaluate.tokens.
        heldout_documents: Of each held-out window, the document that its first token is from: its place among
            the domain's held-out documents in the order of their digests, which no seed changes.
        prefill: [memory.kv.tokens], the start of the training text; empty without a learned cache.
        digest: sha256 over every document's key, text and side, whether it was tokenised or not.
        documents: How many were read, were duplicates, leaked (their key is held out elsewhere in the domain,
            so they were dropped), are in train and heldout, and of these gave tokens (*_used).
    """

    name: str
    train: torch.Tensor
    scoring: torch.Tensor
    heldout: torch.Tensor
    heldout_documents: list[int]
    prefill: torch.Tensor
    digest: str
    documents: dict[str, int]

    @property
    def heldout_counts(self) -> list[int]:
        """Of each held-out window, how many tokens are predicted."""
        return learned_tokens(self.heldout)


def learned_tokens(windows: torch.Tensor) -> list[int]:
    """Of each window [n, window], how many tokens are predicted; in a chat, the assistant's alone."""
    return (windows[:, 1:] >= 0).sum(1).tolist()


@dataclass
class _Document:
    """Where a text is, the keys it came with, those that a recipe gave, and whether it is held out."""

    place: Place
    keys: set[str | None] = field(default_factory=set)  # None: the text itself
    given: set[str] = field(default_factory=set)
    held: bool = False


@dataclass
class Sides:
    """The documents of a domain after the split; texts in shuffled order."""

    train: Texts
    heldout: Texts
    digest: str
    counts: dict[str, int]


def load_domain(
    name: str,
    domain: Domain,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    *,
    bos: int | None,
    cache: Path | None = None,
) -> DomainBlocks:
    """Reads, splits, tokenises and packs one domain.

    Args:
        name: Its name, for messages.
        domain: Its part of the recipe.
        tokenizer: The dense model's; its end-of-text token is put between documents.
        recipe: Says how many tokens are needed.
        bos: Token id that every window starts with, or None.
        cache: Replaces the cache folder of packages.

    Raises:
        KoffError: No documents, or too little text on either side; says how much there is and what to mend.
    """
    if tokenizer.eos_token_id is None:
        raise KoffError("model.source: its tokenizer has no end-of-text token to put between documents")
    sides = split_documents(name, domain, seed=recipe.seed, cache=cache)
    learn, scoring, evaluate = recipe.learn, recipe.scoring, recipe.evaluate
    lead = 0 if bos is None else 1
    mine = (learn.tokens + learn.settle_tokens) * domain.weight
    budget = math.ceil(mine / recipe.step_batches) + scoring.tokens
    train_windows = math.ceil(budget / learn.window)
    scoring_windows = max(1, scoring.tokens // scoring.window)
    heldout_windows = max(1, evaluate.tokens // evaluate.window)
    prefill = recipe.memory.kv.tokens if recipe.memory.kv else 0
    least = {
        "learn.window": learn.window - lead,
        _size_key("scoring", scoring): scoring_windows * (scoring.window - lead),
        "memory.kv.tokens": max(0, prefill - lead),
    }
    key = max(least, key=least.__getitem__)
    wanted = max(train_windows * (learn.window - lead), least[key])
    train, sources = _stream(sides.train, tokenizer, wanted, _PIECE * learn.window, recipe.seed, bos)
    _need(name, "training", train, sides.train, key, least[key])
    wanted = heldout_windows * (evaluate.window - lead)
    heldout, owners = _stream(sides.heldout, tokenizer, wanted, _PIECE * evaluate.window, recipe.seed, bos)
    _need(name, "held-out", heldout, sides.heldout, _size_key("evaluate", evaluate), wanted)
    passes = (mine / recipe.step_batches) / max(1, len(train) // (learn.window - lead) * learn.window)
    if passes > _MANY:
        say(
            f"domain {name}: its {len(train):,} training tokens are read {passes:.0f} times; lower"
            f" learn.tokens, or give more text in domains.{name}.source"
        )
    used = {"train_used": len(sources.unique()), "heldout_used": len(owners.unique())}
    start = train if bos is None else torch.cat([torch.tensor([bos]), train])
    held = _windows(heldout, evaluate.window, heldout_windows, bos)
    digests = [hashlib.sha256(text.encode()).hexdigest() for text in sides.heldout]
    place = torch.tensor(sorted(range(len(digests)), key=digests.__getitem__)).argsort()
    first = place[_windows(owners, evaluate.window - lead, heldout_windows, None)[:, 0]]
    return DomainBlocks(
        name=name,
        train=_learnable(name, _windows(train, learn.window, train_windows, bos)),
        scoring=_learnable(name, _windows(train, scoring.window, scoring_windows, bos)),
        heldout=_learnable(name, held),
        heldout_documents=first[_says(held)].tolist(),
        prefill=tokens(start[:prefill]).clone(),
        digest=sides.digest,
        documents={**sides.counts, **used},
    )


def count_tokens(texts: Texts, tokenizer: PreTrainedTokenizerBase, most: int = _COUNTED) -> torch.Tensor:
    """How often each token occurs in (at `most` so many tokens of) texts, int64 [vocabulary]."""
    ids, _ = _stream(texts, tokenizer, most, _COUNTED_PIECE, 0, None)
    return tokens(ids).bincount(minlength=max(tokenizer.get_vocab().values()) + 1)


def split_documents(name: str, domain: Domain, *, seed: int, cache: Path | None = None) -> Sides:
    """Reads all documents of a domain, drops exact duplicates and divides them.

    A document is held out when any source that has its text holds it out. One whose key, given by `key` or
    `query`, is held out anywhere in the domain is never trained on.

    Raises:
        KoffError: No documents, or none on one of the sides.
    """
    found: dict[str, _Document] = {}  # by the digest of the text
    spool = Spool()
    read = 0
    many = isinstance(domain.source, list)
    for i, source in enumerate(domain.sources):
        given = source.key is not None or source.query is not None
        for key, text in _of(f"domains.{name}.source" + f"[{i}]" * many, documents(source, cache=cache)):
            read += 1
            key, text = _encodable(key), _encodable(text)
            held = _share(key) < domain.split.heldout if source.use == "split" else source.use == "heldout"
            digest = hashlib.sha256(text.encode()).hexdigest()
            if (document := found.get(digest)) is None:
                document = found[digest] = _Document(spool.add(text))
            document.held |= held
            document.keys.add(None if key == text else key)
            if given:
                document.given.add(key)
    heldout_keys: set[str] = set()
    for document in found.values():
        if document.held:  # under whichever of its keys; other texts of the others stay out as well
            heldout_keys |= document.given
    sides: dict[bool, list[tuple[str, Place]]] = {False: [], True: []}
    lines, leaks = [], 0
    for digest, document in found.items():
        if not document.held and not heldout_keys.isdisjoint(document.given):
            leaks += 1
            continue
        keys = (spool.read(document.place) if key is None else key for key in document.keys)
        key = min(keys)  # whichever source came first
        order = hashlib.sha256(f"{seed}\n{key}\n{digest}".encode()).hexdigest()
        sides[document.held].append((order, document.place))
        side = "heldout" if document.held else "train"
        lines.append(f"{side} {hashlib.sha256(key.encode()).hexdigest()} {digest}\n")
    _need_documents(name, domain, sides)
    train, heldout = (Texts(spool, [at for _, at in sorted(sides[held])]) for held in (False, True))
    counts = {
        "read": read,
        "duplicates": read - len(found),
        "leaks": leaks,
        "train": len(train),
        "heldout": len(heldout),
    }
    whole = hashlib.sha256()
    for line in sorted(lines):
        whole.update(line.encode())
    return Sides(train, heldout, whole.hexdigest(), counts)


def _of(place: str, found: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Documents as they come; a complaint names the recipe's key first."""
    try:
        yield from found
    except KoffError as error:
        raise KoffError(f"{place}: {error}") from error


def _encodable(text: str) -> str:
    """Without the halves of characters that some files and file names hold, which no tokenizer takes."""
    if text.isascii() or isinstance(text, Chat):
        return text
    return text.encode("utf-8", "replace").decode()


def _share(key: str) -> float:
    """A key's place in [0, 1), evenly spread."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big") / 2**48


def _need_documents(name: str, domain: Domain, sides: dict[bool, list[tuple[str, Place]]]) -> None:
    total = len(sides[False]) + len(sides[True])
    if not total:
        sources = ", ".join(describe(source) for source in domain.sources)
        raise KoffError(f"domain '{name}': {sources} gives no documents; mend domains.{name}.source")
    for held, side in ((True, "held out"), (False, "left to train on")):
        if not sides[held]:
            raise KoffError(
                f"domain '{name}': of its {total} documents none is {side}; give more documents, "
                f"mend domains.{name}.split.heldout (now {domain.split.heldout}) or a source's `use`"
            )


def _stream(
    texts: Texts, tokenizer: PreTrainedTokenizerBase, wanted: int, size: int, seed: int, bos: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of shuffled pieces of about `size` characters, each followed by end-of-text.

    Returns:
        `wanted` ids or all there are, and of each id the index of its document; both int64 [tokens].
    """
    most = max(_FEW, _PIECE * wanted // size)
    while True:  # the first of the shuffled pieces: all of them may be more than the memory holds
        shuffled = heapq.nsmallest(most, shuffled_pieces(texts, size, seed))
        ids, owners = _tokenised(shuffled, texts.spool, tokenizer, wanted, bos)
        if len(ids) >= wanted or len(shuffled) < most:
            keep = max(wanted, 0)
            return torch.tensor(ids[:keep], dtype=torch.long), torch.tensor(owners[:keep], dtype=torch.long)
        most *= 8  # they were short


def _tokenised(
    shuffled: list[tuple[str, int, Place]], spool: Spool, tokenizer: PreTrainedTokenizerBase, wanted: int,
    bos: int | None,
) -> tuple[list[int], list[int]]:  # fmt: skip
    """Token ids of pieces until there are `wanted`, and whose they are."""
    ids: list[int] = []
    owners: list[int] = []
    for start in range(0, len(shuffled), _BATCH):
        if len(ids) >= wanted:
            break
        batch = [(owner, spool.read(place)) for _, owner, place in shuffled[start : start + _BATCH]]
        # split_special_tokens: a text that spells a control token is text.
        plain = [piece for _, piece in batch if not isinstance(piece, Chat)]
        encoded = iter(tokenizer(
            plain, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False,
            verbose=False,
        )["input_ids"] if plain else [])  # fmt: skip
        for owner, piece in batch:
            if isinstance(piece, Chat):
                row = [*_without(bos, chat_tokens(piece, tokenizer)), -1 - tokenizer.eos_token_id]
            else:
                row = [*next(encoded), tokenizer.eos_token_id]
            ids += row
            owners += [owner] * len(row)
    return ids, owners


def _without(bos: int | None, row: list[int]) -> list[int]:
    """A conversation without the first token that its template writes and every window has already."""
    return row[1:] if bos is not None and row and row[0] in (bos, -1 - bos) else row


def _size_key(section: str, asked: Any) -> str:
    """Which key of a section decides how much text it needs: one window is needed at least."""
    return f"{section}.{'tokens' if asked.tokens >= asked.window else 'window'}"


def _need(name: str, side: str, stream: torch.Tensor, texts: Texts, key: str, needed: int) -> None:
    if len(stream) < needed:
        raise KoffError(
            f"domain '{name}': its {side} text is too short, {len(stream)} tokens in {len(texts)} documents "
            f"where {key} needs {needed}; lower {key}, or give more text in domains.{name}.source"
        )


def _windows(stream: torch.Tensor, window: int, most: int, bos: int | None) -> torch.Tensor:
    """The first windows of a stream, [n, window] with n <= most, each starting with `bos` if there is one."""
    body = window - (bos is not None)
    count = min(most, len(stream) // body)
    block = stream[: count * body].view(count, body)
    return block.clone() if bos is None else torch.cat([torch.full((count, 1), bos), block], dim=1)


def _says(windows: torch.Tensor) -> torch.Tensor:
    """Which windows have a token to learn, bool [n]: in a chat, some hold none of the assistant's."""
    return (windows[:, 1:] >= 0).any(1)


def _learnable(name: str, windows: torch.Tensor) -> torch.Tensor:
    kept = windows[_says(windows)]
    if len(windows) and not len(kept):
        raise KoffError(
            f"domain '{name}': none of its first {len(windows)} windows holds a word of the assistant's; give"
            " more conversations, or raise learn.window"
        )
    return kept


_TENSORS = ("train", "scoring", "heldout", "prefill")


def save_blocks(blocks: DomainBlocks, folder: Path) -> Path:
    """Writes `folder/<name>.safetensors`: the ids as int32, everything else as JSON in its metadata.

    Raises:
        KoffError: The disk is full or may not be written.
    """
    path = Path(folder) / f"{blocks.name}.safetensors"
    rest = {f.name: getattr(blocks, f.name) for f in fields(blocks) if f.name not in _TENSORS}
    tensors = {name: getattr(blocks, name).to(torch.int32) for name in _TENSORS}
    save_tensors(tensors, path, {"domain": json.dumps(rest)})
    return path


def load_blocks(path: Path) -> DomainBlocks:
    """Reads what `save_blocks` wrote.

    Raises:
        KoffError: The file is missing, cut short, changed, or of another kind.
    """
    file = TensorFile(path)
    try:
        rest: dict[str, Any] = json.loads(file.notes["domain"])
        blocks: dict[str, Any] = {name: file[name].long() for name in _TENSORS}
        return DomainBlocks(**rest, **blocks)
    except (KeyError, ValueError, TypeError) as error:
        raise KoffError(f"{path} holds no token blocks of a domain: it is damaged or foreign") from error
