"""Weights on the disk: one safetensors file, or several with an index, read and written a tensor at a time.

What is read is a view of the file's own pages and costs no memory of the process; what is written goes out as
it comes, behind a header that is known before the first tensor. So a model of any size passes through.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from koff_export.errors import KoffError
from koff_export.files import check_safetensors, read_json, write_json
from koff_prune.tensor_file import sum_of

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"  # one tensor where the config ties them
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_AGAIN = "it is damaged, so write or fetch it again"
_PART = 1 << 24  # elements that are cast and written at once


@dataclass(frozen=True)
class Entry:
    """Where one tensor is: its file, its dtype as the format spells it, its shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Weights:
    """The weights of one folder. Only headers are in memory.

    Attributes:
        entries: By name, file after file, as they are stored.
        rows: Of the embedding and the head, which are there for a reader; None: all.
    """

    entries: dict[str, Entry]
    rows: torch.Tensor | None = None

    @classmethod
    def open(cls, folder: Path) -> Weights:
        """Reads the index, if there is one, and the header of every file.

        Raises:
            KoffError: No weights there, a file is missing or damaged, or the index names files elsewhere.
        """
        if (folder / WEIGHTS).is_file():
            mapped: dict[str, list[str] | None] = {WEIGHTS: None}
        elif (folder / INDEX).is_file():
            mapped = _read_index(folder / INDEX)
        else:
            raise KoffError(f"{folder}: holds no weights ({WEIGHTS} or {INDEX} is needed)")
        entries: dict[str, Entry] = {}
        for file, names in mapped.items():
            header = check_safetensors(folder / file)
            wanted = header if names is None else set(names)
            if absent := sorted(set(wanted) - set(header)):
                raise KoffError(f"{folder / file}: lacks {absent[0]}, which {INDEX} says it holds: {_AGAIN}")
            entries |= {
                name: Entry(folder / file, *header[name]) for name in _stored(folder / file) if name in wanted
            }
        return cls(entries)

    def with_rows(self, rows: torch.Tensor) -> Weights:
        """The same with these rows alone of the embedding and the head, int64 [tokens]."""
        entries = {
            name: replace(entry, shape=(len(rows), *entry.shape[1:])) if name in (EMBEDDINGS, HEAD) else entry
            for name, entry in self.entries.items()
        }
        return Weights(entries, rows if self.rows is None else self.rows[rows])

    @property
    def files(self) -> list[Path]:
        """The files that hold them."""
        return list(dict.fromkeys(entry.file for entry in self.entries.values()))

    @property
    def layout(self) -> dict[str, list[str]]:
        """By file, the names of its tensors as they are stored."""
        return {
            file.name: [name for name, entry in self.entries.items() if entry.file == file]
            for file in self.files
        }

    def read(self, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
        """These tensors, or all: views of the files' pages, which go when the tensors go."""
        wanted = list(self.entries if names is None else names)
        result = {}
        for file in dict.fromkeys(self.entries[name].file for name in wanted):
            with safe_open(file, framework="pt") as opened:
                here = (name for name in wanted if self.entries[name].file == file)
                result.update({name: opened.get_tensor(name) for name in here})
        if self.rows is not None:
            result |= {name: result[name][self.rows] for name in {EMBEDDINGS, HEAD} & set(result)}
        return {name: result[name] for name in wanted}

    def one_by_one(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor in the order of the files, each gone before the next."""
        for name in self.entries:
            yield name, self.read([name])[name]

    def digest(self) -> str:
        """Hex SHA-256 of every tensor by name, whichever files they stand in; all of them are read."""
        sums = {name: sum_of(tensor) for name, tensor in self.one_by_one()}
        return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()

    def check_head(self, config: PretrainedConfig, name: str) -> None:
        """Refuses a head of its own under a config that ties it: transformers leaves it, a cut would drop it.

        Raises:
            KoffError: So it is; names the mend.
        """
        if not (getattr(config, "tie_word_embeddings", False) and {EMBEDDINGS, HEAD} <= set(self.entries)):
            return
        one, other = self.read([EMBEDDINGS, HEAD]).values()
        if not torch.equal(one, other):
            raise KoffError(
                f"model.source '{name}': its config.json ties the head to the embedding, and its weights hold"
                " another head; set tie_word_embeddings to false there"
            )

    def fit(self, model: PreTrainedModel) -> bool:
        """Whether these are a model's weights by name and shape: nothing to be renamed or converted.

        Args:
            model: On any device.
        """
        for name, wanted in model.state_dict().items():
            have = self.entries.get(name)
            if have is None and name == HEAD and model.config.tie_word_embeddings:
                continue
            if have is None or have.shape != tuple(wanted.shape) or have.dtype not in _DTYPES:
                return False
        return True

    @contextmanager
    def fill(self, layer: nn.Module, i: int) -> Iterator[None]:
        """Gives decoder layer `i`, on the meta device, its weights, in its dtype, for the block's length."""
        own, prefix = layer.state_dict(), layer_prefix(i)
        read = self.read(prefix + name for name in own)
        layer.load_state_dict(
            {name: read.pop(prefix + name).to(empty.dtype) for name, empty in own.items()}, assign=True
        )
        try:
            yield
        finally:
            layer.to("meta")


def layer_prefix(i: int) -> str:
    """What the names of decoder layer `i`'s tensors begin with."""
    return f"model.layers.{i}."


def layer_of(name: str) -> int | None:
    """The decoder layer that a tensor belongs to, or None."""
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["model", "layers"] else None


def _stored(file: Path) -> list[str]:
    """Names in the order of their bytes."""
    with safe_open(file, framework="pt") as opened:
        names: list[str] = opened.offset_keys()
    return names


def _read_index(path: Path) -> dict[str, list[str] | None]:
    """By file, the tensors that an index says it holds."""
    data = read_json(path)
    mapped = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(mapped, dict) or not mapped or not all(isinstance(f, str) for f in mapped.values()):
        raise KoffError(f"{path}: its weight_map does not tell the file of every tensor: {_AGAIN}")
    files: dict[str, list[str] | None] = {}
    for name, file in sorted(mapped.items(), key=lambda item: item[1]):
        if set("/\\:\0") & set(file) or not file.endswith(".safetensors"):
            raise KoffError(
                f"{path}: {file!r} is no .safetensors file of this folder: it is damaged or hostile"
            )
        names = files.setdefault(file, [])
        assert names is not None
        names.append(name)
    if absent := [file for file in files if not (path.parent / file).is_file()]:
        raise KoffError(
            f"{path.parent} lacks {len(absent)} of its weight files such as {absent[0]}: fetch it again"
        )
    return files


def has_weights(folder: Path) -> bool:
    """Whether a folder holds weights, in one file or several."""
    return (folder / WEIGHTS).is_file() or (folder / INDEX).is_file()


def write_weights(
    folder: Path,
    like: Mapping[str, torch.Tensor],
    tensors: Iterable[tuple[str, torch.Tensor]],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes one file where everything fits into `shard_bytes`, else several and an index.

    The caller writes into a folder that is renamed when whole; nothing here is safe against a kill by itself.

    Args:
        folder: Must exist.
        like: Names, dtypes and shapes of what is to come, in that order; on the meta device, say.
        tensors: The same names with their content, in any floating-point dtype; cast as they are written.
        shard_bytes: A tensor that is larger gets a file of its own.
    """
    files = _shards(like, shard_bytes)
    coming = iter(tensors)
    for file, shard in files.items():
        _write_file(folder / file, shard, coming)
    if len(files) > 1:
        total = {"total_size": sum(t.nbytes for t in like.values()),
                 "total_parameters": sum(t.numel() for t in like.values())}  # fmt: skip
        mapped = {name: file for file, shard in files.items() for name in shard}
        write_json(folder / INDEX, {"metadata": total, "weight_map": mapped})


def _shards(like: Mapping[str, torch.Tensor], shard_bytes: int) -> dict[str, dict[str, torch.Tensor]]:
    """By file, the tensors that `write_weights` puts there."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in like.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    count = len(shards)
    files = [WEIGHTS] if count == 1 else [f"model-{n + 1:05}-of-{count:05}.safetensors" for n in range(count)]
    return dict(zip(files, shards, strict=True))


def _write_file(
    path: Path, like: Mapping[str, torch.Tensor], coming: Iterator[tuple[str, torch.Tensor]]
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in like.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, wanted in like.items():
            found, tensor = next(coming)
            if found != name or tensor.shape != wanted.shape:
                raise AssertionError(f"{found} {tuple(tensor.shape)} came for {name} {tuple(wanted.shape)}")
            _write(file, tensor.detach(), wanted.dtype)
            del tensor  # before the next one is made


def _write(file: BinaryIO, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    for part in tensor.reshape(-1).split(_PART):
        file.write(part.to("cpu", dtype).view(torch.uint8).numpy().data)


def copy_weights(
    source: Path,
    target: Path,
    shard_bytes: int = SHARD_BYTES,
    change: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
    rows: torch.Tensor | None = None,
) -> bool:
    """Writes a folder's weights into another, a tensor at a time; files that would be the same are linked.

    Args:
        source: Holds the weights, in files that are replaced and never written into.
        target: Gets them, in their dtypes.
        shard_bytes: See `write_weights`.
        change: From each tensor's name and content to what is written in its place; None leaves all.
        rows: See `Weights.with_rows`; None leaves all.

    Returns:
        Whether the files are the same.
    """
    weights = Weights.open(source) if rows is None else Weights.open(source).with_rows(rows)
    if strange := [name for name, entry in weights.entries.items() if entry.dtype not in _DTYPES]:
        raise KoffError(f"{source}: {strange[0]} is of no floating-point type: {_AGAIN}")
    like = {
        name: torch.empty(entry.shape, dtype=_DTYPES[entry.dtype], device="meta")
        for name, entry in weights.entries.items()
    }
    if (
        change is None
        and rows is None
        and weights.layout == {file: list(shard) for file, shard in _shards(like, shard_bytes).items()}
    ):
        for name in [file.name for file in weights.files] + [INDEX] * (source / INDEX).is_file():
            _link(source / name, target / name)
        return True
    tensors = weights.one_by_one()
    changed = ((name, change(name, tensor) if change else tensor) for name, tensor in tensors)
    write_weights(target, like, changed, shard_bytes)
    return False


def _link(source: Path, target: Path) -> None:
    """A second name of the same file, or a copy where the file system has no such thing."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copy2(source, target)
