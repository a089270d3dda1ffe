"""The bundle, format 1: its manifest `koff.json`, and the checks before anything in it is believed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from koff_export.errors import KoffError, no_bundle
from koff_export.files import read_json, safe_join, sha256_file, write_json

FORMAT = 1
MANIFEST = "koff.json"
_LARGEST = 1e300  # of numbers: JSON's may be larger than any float
MERGED_KV = "onnx/merged.onnx_adapter"  # what a merged bundle's cache in place begins with
# Kinds of file a bundle may hold. What is not here (pickles, scripts, libraries) could run code when opened.
_SUFFIXES = (
    ".json", ".safetensors", ".onnx", ".onnx.data", ".onnx_adapter", ".gguf", ".md", ".txt", ".jinja",
    ".model",
)  # fmt: skip
LICENCES = tuple(name + end for name in ("LICENSE", "NOTICE", "USE_POLICY") for end in ("", ".md", ".txt"))
# Memories may be dropped into a finished bundle; every other file must be in the manifest.
_OPEN_FOLDERS = ("memories/", "onnx/memories/", "gguf/memories/")


@dataclass(frozen=True)
class Domain:
    """One domain's memory, as the manifest tells it.

    Attributes:
        kv_tokens: Length P of the learned KV; 0 without one.
        lora_rank: Rank r; 0 without LoRA.
        lora_alpha: The scale is alpha / rank.
        rope: "post": keys are stored with their rotation applied.
        parameters: Size of the memory.
        adapter: Path of the `.onnx_adapter` in the bundle, or None without an ONNX graph.
        gguf, peft: Paths of its LoRA as a GGUF adapter, and of the PEFT folder; or None.
        tokens, tokenizer: How many it has of its own, and the path of the tokenizer.json that makes them.
    """

    kv_tokens: int = 0
    lora_rank: int = 0
    lora_alpha: float = 0
    rope: str = "post"
    parameters: int = 0
    adapter: str | None = None
    gguf: str | None = None
    peft: str | None = None
    tokens: int = 0
    tokenizer: str | None = None


@dataclass(frozen=True)
class Graph:
    """The ONNX graph, as `koff_export.onnx.GraphInfo`.

    `precisions` maps a name ("fp32") to the path of the portable graph; `fused` does so for the fused
    profile, and is empty in a bundle without it; `in_place` does so for the fused graph whose cache is
    written where it stands. That has no slots for the learned KV: its cache begins with it.
    """

    layers: int
    kv_heads: list[int]
    head_dim: int
    vocab_size: int
    inputs: list[str]
    outputs: list[str]
    precisions: dict[str, str]
    fused: dict[str, str] = field(default_factory=dict)
    in_place: dict[str, str] = field(default_factory=dict)

    @property
    def profiles(self) -> dict[str, dict[str, str]]:
        """The profiles at hand, the portable one, where it is there, first: paths by precision."""
        every = {"portable": self.precisions, "fused": self.fused, "in_place": self.in_place}
        return {name: paths for name, paths in every.items() if paths}

    def choose(self, profile: str | None, precision: str | None) -> tuple[str, str]:
        """Those asked for; None takes the last profile, the fastest, and float32 where it is there.

        Raises:
            KoffError: there is no such one.
        """
        profile = profile or [*self.profiles][-1]
        if profile not in self.profiles:
            raise KoffError(f"the bundle has no profile {profile!r}; it has: {', '.join(self.profiles)}")
        paths = self.profiles[profile]
        precision = precision or ("fp32" if "fp32" in paths else next(iter(paths)))
        if precision not in paths:
            raise KoffError(f"the bundle has no precision {precision!r}; it has: {', '.join(paths)}")
        return profile, precision


@dataclass(frozen=True)
class Gguf:
    """The backbone for llama.cpp: path, type of its matrices, llama.cpp's name of the architecture."""

    model: str
    type: str
    architecture: str


@dataclass(frozen=True)
class Manifest:
    """The content of koff.json.

    Attributes:
        format: Always 1 here.
        koff_prune: Version that wrote the bundle.
        model: The dense model: source, revision, config_sha256.
        plan: Digest of the plan.
        parameters: Counts: dense, slim.
        sparsity: target, realised, of.
        window: Evaluation window, in tokens, `bos` counted.
        bos: Token that starts every window and prompt, or None.
        eos: Tokens that end a text.
        domains: Memories by domain name.
        graph: The ONNX graph, or None in a bundle without one.
        gguf: The GGUF files, or None in a bundle without them.
        merged: The domain whose memory is part of the backbone and the graphs, or None.
        context: Positions of the model, memory and text together; None if unknown.
        numerics: What was measured at export.
        files: By path: {"sha256", "size"}.
        told: All of it, as it stands there.
    """

    format: int
    koff_prune: str
    model: dict[str, Any]
    plan: str
    parameters: dict[str, int]
    sparsity: dict[str, Any]
    window: int
    bos: int | None
    eos: list[int]
    domains: dict[str, Domain]
    graph: Graph | None
    gguf: Gguf | None = None
    merged: str | None = None
    context: int | None = None
    numerics: dict[str, Any] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    told: dict[str, Any] = field(default_factory=dict)


class _Reader:
    """Takes typed values out of one JSON object, and says where a wrong one stands."""

    def __init__(self, value: Any, where: str) -> None:
        self.where = where
        if not isinstance(value, dict):
            raise KoffError(f"{where} is not a JSON object: the bundle is damaged or foreign")
        self.value: dict[str, Any] = value

    def fail(self, key: str, wanted: str) -> KoffError:
        return KoffError(f"{self.where}: key {key!r} is not {wanted}: the bundle is damaged or foreign")

    def count(self, key: str, default: int | None = None, least: int = 0) -> int:
        found = self.value.get(key, default)
        if type(found) is not int or not least <= found < 1 << 62:
            raise self.fail(key, f"a whole number of at least {least}")
        return found

    def maybe_count(self, key: str) -> int | None:
        return None if self.value.get(key) is None else self.count(key)

    def number(self, key: str, default: float) -> float:
        found = self.value.get(key, default)
        if type(found) not in (int, float) or not abs(found) < _LARGEST:
            raise self.fail(key, "a number")
        return found

    def text(self, key: str, default: str | None = None) -> str:
        found = self.value.get(key, default)
        if not isinstance(found, str):
            raise self.fail(key, "a text")
        return found

    def maybe_text(self, key: str) -> str | None:
        return None if self.value.get(key) is None else self.text(key)

    def mapping(self, key: str) -> dict[str, Any]:
        found = self.value.get(key, {})
        if not isinstance(found, dict):
            raise self.fail(key, "a JSON object")
        return found

    def items(self, key: str, kind: type) -> list[Any]:
        found = self.value.get(key, [])
        if not isinstance(found, list) or not all(type(item) is kind for item in found):
            raise self.fail(key, f"a list of {kind.__name__}")
        return found


def _domain(name: str, value: Any, where: str) -> Domain:
    # Names become file names and command words.
    if not name.isprintable() or name in ("", "none") or name[0] == "." or {"/", "\\"} & set(name):
        raise KoffError(f"{where}: {name!r} is no name for a domain: the bundle is damaged or hostile")
    r = _Reader(value, f"{where}, domain {name!r}")
    return Domain(
        kv_tokens=r.count("kv_tokens", 0),
        lora_rank=r.count("lora_rank", 0),
        lora_alpha=r.number("lora_alpha", 0),
        rope=r.text("rope", "post"),
        parameters=r.count("parameters", 0),
        adapter=r.maybe_text("adapter"),
        gguf=r.maybe_text("gguf"),
        peft=r.maybe_text("peft"),
        tokens=r.count("tokens", 0),
        tokenizer=r.maybe_text("tokenizer"),
    )


def _graph(value: Any, where: str) -> Graph:
    r = _Reader(value, f"{where}, graph")
    graph = Graph(
        layers=r.count("layers", least=1),
        kv_heads=r.items("kv_heads", int),
        head_dim=r.count("head_dim", least=1),
        vocab_size=r.count("vocab_size", least=1),
        inputs=r.items("inputs", str),
        outputs=r.items("outputs", str),
        precisions=r.mapping("precisions"),
        fused=r.mapping("fused"),
        in_place=r.mapping("in_place"),
    )
    if len(graph.kv_heads) != graph.layers or min(graph.kv_heads, default=0) < 1:
        raise r.fail("kv_heads", "one count of at least 1 per layer")
    named = {"precisions": graph.precisions, "fused": graph.fused, "in_place": graph.in_place}
    if not any(named.values()):
        raise r.fail("precisions", "a map of names to paths")
    for key, paths in named.items():
        if not all(isinstance(path, str) for path in paths.values()):
            raise r.fail(key, "a map of names to paths")
    return graph


def _gguf(value: Any, where: str) -> Gguf:
    r = _Reader(value, f"{where}, gguf")
    return Gguf(*map(r.text, ("model", "type", "architecture")))


def open_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """Reads and checks `folder`/koff.json. Unknown keys are left alone: a later format-1 writer may add some.

    Raises:
        KoffError: no bundle, a newer format, or a value of the wrong kind.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise no_bundle(Path(folder), MANIFEST)
    where = os.fspath(path)
    r = _Reader(read_json(path), where)
    version = r.count("format", least=1)
    if version > FORMAT:
        raise KoffError(
            f"{where} has format {version} and this version reads up to {FORMAT}: update this program"
        )
    files = r.mapping("files")
    for name, entry in files.items():
        f = _Reader(entry, f"{where}, file {name!r}")
        f.text("sha256")
        f.count("size")
    return Manifest(
        format=version,
        koff_prune=r.text("koff_prune", ""),
        model=r.mapping("model"),
        plan=r.text("plan", ""),
        parameters=r.mapping("parameters"),
        sparsity=r.mapping("sparsity"),
        window=r.count("window", least=2),
        bos=r.maybe_count("bos"),
        eos=r.items("eos", int),
        domains={name: _domain(name, value, where) for name, value in r.mapping("domains").items()},
        graph=None if r.value.get("graph") is None else _graph(r.value["graph"], where),
        gguf=None if r.value.get("gguf") is None else _gguf(r.value["gguf"], where),
        merged=r.maybe_text("merged"),
        context=r.maybe_count("context"),
        numerics=r.mapping("numerics"),
        files=files,
        told=r.value,
    )


def _walk(folder: Path) -> list[str]:
    """POSIX paths of all files below `folder`, sorted; hidden ones are left out (nothing reads them)."""
    found: list[str] = []
    for base, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        seen = (Path(base) / name for name in names if not name.startswith("."))
        found += [path.relative_to(folder).as_posix() for path in seen]
    return sorted(found)


def write_manifest(
    folder: str | os.PathLike[str], manifest: dict[str, Any], known: Mapping[str, str] | None = None
) -> None:
    """Adds `format` and every file's sha256 (`known`, or read) and size, and writes `folder`/koff.json.

    Raises:
        KoffError: the disk refuses, or a value is of a kind that `open_manifest` would refuse.
    """
    root = Path(folder)
    sums = {name: (known or {}).get(name) for name in _walk(root) if name != MANIFEST}
    files = {name: _entry(root / name, found) for name, found in sums.items()}
    write_json(root / MANIFEST, {"format": FORMAT, **manifest, "files": files})
    open_manifest(root)


def set_domain(folder: str | os.PathLike[str], name: str, told: dict[str, Any] | None) -> None:
    """Enters one memory and its files into `folder`/koff.json, or (None) takes them out.

    No other entry changes, so that what is damaged elsewhere stays found. The files themselves are the
    caller's: there before the memory is entered, deleted after it is taken out.

    Raises:
        KoffError: the disk refuses, or the name or a value is of a kind that `open_manifest` would refuse.
    """
    root = Path(folder)
    if told is not None:
        _domain(name, told, os.fspath(root / MANIFEST))
    manifest = {"domains": {}, "files": {}, **open_manifest(root).told}
    old = manifest["domains"].pop(name, {})
    gone = f"{(told or old).get('peft') or f'memories/{name}'}/"
    beside = {entry.get(kind) for entry in (old, told or {}) for kind in ("adapter", "gguf")}
    files = {
        path: entry
        for path, entry in manifest["files"].items()
        if not path.startswith(gone) and path not in beside
    }
    if isinstance(measured := (manifest.get("numerics") or {}).get("onnx_logits"), dict):
        measured.pop(name, None)  # of the memory that was
    if told is not None:
        manifest["domains"][name] = told
        mine = [p for p in _walk(root) if p.startswith(gone) or p in (told.get("adapter"), told.get("gguf"))]
        for path in mine:
            _check_kind(path)
            files[path] = _entry(root / path)
    write_json(root / MANIFEST, {**manifest, "files": files})


def _entry(path: Path, known: str | None = None) -> dict[str, Any]:
    return {"sha256": known or sha256_file(path), "size": path.stat().st_size}


def _check_kind(name: str) -> None:
    if not name.endswith(_SUFFIXES) and name.rsplit("/", 1)[-1] not in LICENCES:
        raise KoffError(
            f"the bundle holds {name!r}, a kind of file that no bundle has and that could run code: remove it"
        )


def check_file(folder: str | os.PathLike[str], manifest: Manifest, name: str, *, hashes: bool = True) -> Path:
    """Checks one file that the manifest lists; returns its path.

    Raises:
        KoffError: not listed, missing, of the wrong size or (with `hashes`) content, or out of the folder.
    """
    _check_kind(name)
    path = safe_join(folder, name)
    entry = manifest.files.get(name)
    if entry is None:
        raise KoffError(f"{name!r} is not listed in {MANIFEST}: the bundle was changed, fetch it again")
    if not path.is_file():
        raise KoffError(f"the bundle's file {name!r} is missing: fetch the bundle again")
    if (size := path.stat().st_size) != entry["size"]:
        more = f"{size} bytes instead of {entry['size']}"
        raise KoffError(f"the bundle's file {name!r} has {more}: fetch it again")
    if hashes and sha256_file(path) != entry["sha256"]:
        raise KoffError(f"the bundle's file {name!r} has another sha256 than {MANIFEST} says: fetch it again")
    return path


def check_files(
    folder: str | os.PathLike[str],
    manifest: Manifest,
    *,
    hashes: bool = True,
    only: Iterable[str] | None = None,
) -> None:
    """Checks the bundle's files against the manifest: those in `only`, or all and that there are no others.

    Memories may be added to a finished bundle, so unlisted files are accepted in `memories/` and
    `onnx/memories/`; so are notes (*.md) and licences. Files that could run code are refused everywhere.

    Raises:
        KoffError: see `check_file`; or an unlisted file, or a kind of file that no bundle has.
    """
    root = Path(folder)
    if only is None:
        for name in _walk(root):
            _check_kind(name)
            safe_join(root, name)
            extra = name.startswith(_OPEN_FOLDERS) or name.endswith(".md") or name in LICENCES
            if name not in manifest.files and name != MANIFEST and not extra:
                raise KoffError(f"the bundle holds {name!r}, which {MANIFEST} does not list: remove it")
    for name in manifest.files if only is None else only:
        check_file(root, manifest, name, hashes=hashes)
