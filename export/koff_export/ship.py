"""What a device needs of a bundle: a graph in one precision, tokenizer and memories; no weights for torch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from koff_export.bundle import LICENCES, MERGED_KV, Manifest, check_file, open_manifest, write_manifest
from koff_export.errors import NO_GRAPH, KoffError
from koff_export.files import safe_join, staged_dir
from koff_export.graph import check_onnx
from koff_export.hub import FOR_DEVICES, local

_TEXT = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json",
    *LICENCES,
)  # fmt: skip


def ship(
    bundle: str | os.PathLike[str],
    target: str | os.PathLike[str],
    precision: str,
    profile: str | None = None,
    memories: Sequence[str] | None = None,
) -> Path:
    """Copies what `koff-run` needs into a bundle of its own, which opens in that precision by itself.

    Args:
        bundle: With ONNX graphs, a folder or "hf://org/name"; what is copied is checked against its sha256.
        target: A folder that is not there yet.
        precision: One of the bundle's.
        profile: "portable", "fused" or "in_place"; None: the last that the bundle has, the fastest.
        memories: To take along; None: all, those that were dropped in among them. More can be later.

    Returns:
        The target.

    Raises:
        KoffError: No such precision, profile or memory, the target exists, or a file is missing or changed.
    """
    source, target = local(bundle, FOR_DEVICES), Path(target)
    manifest = open_manifest(source)
    if target.exists():
        raise KoffError(f"{target} exists already: choose another folder, or remove it")
    if manifest.graph is None:
        raise KoffError(f"{source} {NO_GRAPH}")
    profile, precision = manifest.graph.choose(profile, precision)
    file = manifest.graph.profiles[profile][precision]
    if target.resolve().is_relative_to(source.resolve()):
        raise KoffError(f"{target} is inside of {source}: choose a folder elsewhere")
    added = {path.name.removesuffix(".onnx_adapter"): path.relative_to(source).as_posix()
             for path in sorted((source / "onnx/memories").glob("[!.]*.onnx_adapter"))}  # fmt: skip
    added = {name: path for name, path in added.items() if name not in manifest.domains}
    names = [*manifest.domains, *added] if memories is None else list(memories)
    for name in names:
        if name not in manifest.domains and name not in added:
            known = ", ".join([*manifest.domains, *added])
            raise KoffError(f"the bundle has no memory {name!r}; it has: {known}")
    dropped = [added[name] for name in names if name in added]  # with no sha256 to be checked against
    names = [name for name in names if name not in added]
    graph = check_file(source, manifest, file)
    data = [path.relative_to(source).as_posix() for path in check_onnx(graph, source)]
    told = [manifest.domains[name] for name in names]
    parts = (part for domain in told for part in (domain.adapter, domain.tokenizer))
    wanted = [file, *data, *(path for path in parts if path is not None)]
    wanted += [name for name in (*_TEXT, MERGED_KV) if name in manifest.files]
    with staged_dir(target, new=True) as aside:
        for name in wanted:
            path = aside / name
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(check_file(source, manifest, name), path)
        unlisted = [n for n in LICENCES if n not in manifest.files and (source / n).exists()]
        for name in (*dropped, *unlisted):
            path = aside / name
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(safe_join(source, name), path)
        (aside / "README.md").write_text(_card(manifest, bool(names or dropped)), encoding="utf-8")
        write_manifest(aside, _told(manifest.told, profile, precision, names))
    return target


def _card(manifest: Manifest, some: bool) -> str:
    """README.md of what was copied: the bundle's own tells of torch, which opens nothing here."""
    memory = " --memory …" if some and not manifest.merged else ""
    beside = "with memories in onnx/memories/" if some else "without memories"
    beside = f"with the memory of {manifest.merged} in it" if manifest.merged else beside
    told = manifest.told.get("vocabulary")
    narrow = f" It has the tokens that {manifest.merged} uses, and reads others in pieces." if told else ""
    return "\n".join([
        "---", "library_name: koff-prune", "---", "",
        f"# {manifest.model.get('source')}, cut by koff-prune, for devices", "",
        f"A graph for ONNX Runtime, {beside} (KOFF, arXiv 2605.29075).{narrow}", "",
        "```", f'koff-run this-folder{memory} --prompt "…"', "```", "",
    ])  # fmt: skip


def _told(told: dict[str, Any], profile: str, precision: str, names: Sequence[str]) -> dict[str, Any]:
    """The manifest of what was copied. The precision asked for comes first: it is what opens by itself."""
    key = "precisions" if profile == "portable" else profile
    paths = told["graph"][key]
    same = [name for name, path in paths.items() if path == paths[precision] and name != precision]
    graph = {
        k: v for k, v in told["graph"].items() if k not in ("precisions", "fused", "in_place", "javascript")
    }
    graph |= {"precisions": {}, key: {name: paths[name] for name in (precision, *same)}}
    domains = {name: {**told["domains"][name], "gguf": None, "peft": None} for name in names}
    if told.get("merged") in told["domains"]:  # says how long the learned KV is that the graph holds
        domains.setdefault(told["merged"], {**told["domains"][told["merged"]], "gguf": None, "peft": None})
    rest = {k: v for k, v in told.items() if k not in ("format", "files", "gguf")}
    return {**rest, "graph": graph, "domains": domains}
