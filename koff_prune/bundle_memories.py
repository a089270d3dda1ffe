"""Memories of a finished bundle: one more trained on its backbone, taken out, shipped alone.

The backbone's files are read and never written. Whatever is interrupted leaves a bundle that is whole: files
come before the manifest's entry and go after it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from koff_export import genai
from koff_export.bundle import Domain as Told
from koff_export.bundle import Manifest, check_file, open_manifest, set_domain
from koff_export.errors import KoffError
from koff_export.files import disk_errors, fsync_path, recover_below, staged_dir
from koff_prune.adding import check_length, check_slots, in_words_of_add, recipe_of, same_work
from koff_prune.attach import attach, attach_memory
from koff_prune.bundle_places import ADDING, beside, check_places, shipped, unlisted
from koff_prune.bundling import MEMORY_LEARN, compose_saved
from koff_prune.compose import equal_weights
from koff_prune.cut import load_backbone
from koff_prune.device import on_device
from koff_prune.domains import load_domain
from koff_prune.evaluate import mean_nats, window_losses
from koff_prune.formats import tell_memory, write_gguf_memory, write_onnx_memory
from koff_prune.learn import Phase, spends, train
from koff_prune.lock import alone
from koff_prune.memory import Memories, load_memory, save_memory
from koff_prune.needs import steps_of
from koff_prune.numerics import TOLERANCE, numerics
from koff_prune.packing import extract, pack
from koff_prune.progress import bar, say
from koff_prune.weights import Weights, has_weights

# what the manifest tells beyond sizes, where it is known
_MORE = ("heldout", "trained", "composed", "unpacked")
_COMPOSED, _UNPACKED = ".composed", ".unpacked"  # where a memory is put together before it moves in


def list_memories(bundle: Path) -> list[dict[str, Any]]:
    """What the manifest tells of every memory, with the bytes of its files."""
    manifest = open_manifest(bundle)
    return [{"name": name, **vars(told), "bytes": _bytes(manifest, name)}
            for name, told in manifest.domains.items()]  # fmt: skip


def inspect_memory(bundle: Path, name: str) -> dict[str, Any]:
    """One memory in full: sizes, plan, files, and the held-out loss where it was measured.

    Raises:
        KoffError: No such memory.
    """
    manifest = open_manifest(bundle)
    told = _told(bundle, manifest, name)
    raw = manifest.told["domains"][name]
    return {"name": name, **vars(told), **{k: v for k, v in raw.items() if k in _MORE},
            "plan": manifest.plan, "bytes": _bytes(manifest, name),
            "files": {f: manifest.files[f] for f in _files(manifest, name)}}  # fmt: skip


def add_memory(
    bundle: Path,
    name: str,
    data: Path,
    *,
    tokens: int = 32_768,
    overrides: list[str] | None = None,
    replace: bool = False,
) -> dict[str, Any]:
    """Trains one more memory on a bundle's backbone, which does not change by a byte.

    Args:
        bundle: The bundle's folder.
        name: Of the new memory.
        data: Texts (a file or folder), or a YAML file with a domain (`source: …`).
        tokens: To train on.
        overrides: `dotted.key=value` of a recipe, such as learn.window=256 or memory.lora.rank=4. What they
            leave open is as in the bundle's other memories, and learned as they were.
        replace: A memory of this name may be there; it is, until the new one is finished.

    Returns:
        What the manifest tells of it, with the held-out loss with and without it.

    Raises:
        KoffError: The name is taken, the data are too few, or the bundle is damaged.
    """
    manifest = open_manifest(bundle)
    _check_name(bundle, manifest, name, replace)
    with in_words_of_add(name):
        recipe = recipe_of(bundle, manifest, name, data, tokens, overrides)
    _check_files(bundle, manifest, [])
    with _changing(bundle):
        manifest = open_manifest(bundle)  # as it is by now
        _check_name(bundle, manifest, name, replace)
        work = bundle / f"{ADDING}{name}"
        tokenizer = AutoTokenizer.from_pretrained(bundle, local_files_only=True, trust_remote_code=False)
        with in_words_of_add(name):
            blocks = load_domain(name, recipe.domains[name], tokenizer, recipe, bos=manifest.bos)
        model = on_device(load_backbone(bundle))
        memories = Memories(model, recipe.memory, {name: blocks.prefill}, recipe.seed)
        check_slots(manifest, name, memories.tensors(name))
        same_work(work, recipe, blocks.digest)
        learn = recipe.learn
        with bar(f"training {name}", steps_of(tokens, learn, 1) * learn.window * learn.batch) as progress:
            train(
                memories, {name: blocks.train}, learn, Phase(tokens, 0.0, 1.0), work, seed=recipe.seed,
                report=lambda step, loss, _: progress(learn.window * learn.batch, f"loss {loss:.3f}"),
            )  # fmt: skip
        if spends(learn):
            tensors = memories.tensors(name)
            del model, memories
            memories = attach(on_device(load_backbone(bundle)), name, tensors, recipe.memory)
        losses = [window_losses(memories, blocks.heldout, who) for who in (name, None)]
        means = [mean_nats(values, blocks.heldout_counts) for values in losses]
        with staged_dir(work / "memory") as aside:
            save_memory(aside, memories.tensors(name), recipe.memory, str(manifest.model.get("source", "")))
        more = {
            "heldout": {"nats": means[0], "without": means[1], "tokens": blocks.heldout.numel()},
            "trained": {"tokens": steps_of(tokens, learn, 1) * learn.window * learn.batch,
                        "text": blocks.digest, **learn.model_dump(mode="json", include=set(MEMORY_LEARN))},
        }  # fmt: skip
        told = _publish(bundle, manifest, name, work / "memory", more)
        shutil.rmtree(work)
    return told


def compose_memory(
    bundle: Path, name: str, of: list[str], weights: list[float] | None = None, *, replace: bool = False
) -> dict[str, Any]:
    """Writes several memories of a bundle as one more, which devices run like any other.

    Args:
        bundle: The bundle's folder.
        name: Of the new memory.
        of: Names of its parts.
        weights: Of each part's LoRA; default: equal, 1 in sum.
        replace: A memory of this name may be there.

    Returns:
        What the manifest tells of it.

    Raises:
        KoffError: The name is taken, a part is missing or named twice, or the weights do not fit.
    """
    if len(of) < 2 or len(set(of)) < len(of):
        raise KoffError(f"--of {'+'.join(of)}: name two memories or more, each once")
    manifest = open_manifest(bundle)
    _check_name(bundle, manifest, name, replace)
    for part in of:
        _told(bundle, manifest, part)
    _check_files(bundle, manifest, of)
    with _changing(bundle):
        manifest = open_manifest(bundle)  # as it is by now
        _check_name(bundle, manifest, name, replace)
        check_length(manifest, name, sum(_told(bundle, manifest, part).kv_tokens for part in of))
        place = bundle / _COMPOSED
        weights = weights or equal_weights([_told(bundle, manifest, part).lora_rank > 0 for part in of])
        try:
            tensors, memory = compose_saved(load_backbone(bundle), bundle, manifest, of, weights)
            with staged_dir(place) as aside:
                save_memory(aside, tensors, memory, str(manifest.model.get("source", "")))
            more = {"composed": {"of": of, "weights": weights}}
            return _publish(bundle, manifest, name, place, more)
        finally:
            shutil.rmtree(place, ignore_errors=True)


def remove_memory(bundle: Path, name: str) -> None:
    """Takes a memory out of a bundle, first its entry, then its files; or what an addition left half-made.

    Raises:
        KoffError: No such memory.
    """
    with _changing(bundle):
        manifest = open_manifest(bundle)
        check_places(bundle, manifest, name)
        work = bundle / f"{ADDING}{name}"
        begun = work.is_dir()
        shutil.rmtree(work, ignore_errors=True)
        if begun and name in manifest.domains:
            say(f"{name}: its unfinished replacement is gone, and it is as it was; once more removes it too")
            return
        if name not in unlisted(bundle, manifest) and not begun:
            _told(bundle, manifest, name)
            set_domain(bundle, name, None)
        shutil.rmtree(bundle / "memories" / name, ignore_errors=True)
        for file in beside(bundle, name):
            file.unlink(missing_ok=True)


def pack_memory(bundle: Path, name: str, target: Path) -> Path:
    """Writes one memory as one file, which `unpack_memory` puts into a bundle of the same plan.

    The file is a zip archive without compression: the memory's files, and a table of their checksums.

    Raises:
        KoffError: No such memory, a damaged one, or the target is there already.
    """
    manifest = open_manifest(bundle)
    check_places(bundle, manifest, name)
    _told(bundle, manifest, name)
    if not has_weights(bundle):
        raise shipped(bundle, "what a memory is packed from")
    if target.exists():
        raise KoffError(f"{target}: is there already; remove it or name another file")
    if not target.parent.is_dir():
        raise KoffError(f"{target}: there is no folder {target.parent}; make it, or name another file")
    files = [f for f in _files(manifest, name) if f.startswith("memories/")]
    for file in files:
        check_file(bundle, manifest, file)
    contents = {
        "format": 1, "name": name, "plan": manifest.plan, "model": manifest.model,
        "backbone": Weights.open(bundle).digest(), "told": manifest.told["domains"][name],
        "files": {Path(f).name: manifest.files[f] for f in files},
    }  # fmt: skip
    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with disk_errors(target):
        try:
            pack(aside, contents, [bundle / file for file in files])
            aside.rename(target)
        finally:
            aside.unlink(missing_ok=True)
    return target


def unpack_memory(packed: Path, bundle: Path, *, replace: bool = False) -> dict[str, Any]:
    """Puts a packed memory into a bundle whose plan it was trained for.

    Raises:
        KoffError: Not a packed memory, a damaged or hostile one, of another plan, or the name is taken.
    """
    with _changing(bundle):
        manifest = open_manifest(bundle)
        place = bundle / _UNPACKED
        try:
            with staged_dir(place) as aside:
                contents = extract(packed, aside)
            name = contents["name"]
            if contents["plan"] != manifest.plan:
                raise KoffError(
                    f"{packed}: memory '{name}' is of plan {contents['plan'][:12]}, {bundle} of"
                    f" {manifest.plan[:12]}; a memory fits the backbone that it was trained on alone"
                )
            if contents.get("backbone") != Weights.open(bundle).digest():
                raise KoffError(
                    f"{packed}: memory '{name}' was trained on other weights than {bundle}'s, of the same"
                    " plan; a memory fits the backbone that it was trained on alone"
                )
            _check_name(bundle, manifest, name, replace)
            attach_memory(load_backbone(bundle), place)  # refuses the shapes of another backbone
            if tell_memory(place, name, []).get("tokens", 0) != contents["told"].get("tokens", 0):
                raise KoffError(f"{packed}: has other tokens than it says; fetch it again")
            more = {k: v for k, v in contents["told"].items() if k in _MORE}
            more["unpacked"] = True  # whatever made it, this bundle's own run did not
            return _publish(bundle, manifest, name, place, more)
        finally:
            shutil.rmtree(place, ignore_errors=True)


def _check_name(bundle: Path, manifest: Manifest, name: str, replace: bool) -> None:
    check_places(bundle, manifest, name)
    if not has_weights(bundle):
        raise shipped(bundle, "what a memory is made with")
    taken = next((n for n in manifest.domains if n.casefold() == name.casefold()), None)
    if taken not in (None, name):  # many disks do not tell case apart
        raise KoffError(f"memory '{name}': {bundle} has '{taken}', which differs only in case; name another")
    if taken and not replace:
        raise KoffError(f"memory '{name}': {bundle} has it already; name another, or use --replace")


def _publish(
    bundle: Path, manifest: Manifest, name: str, source: Path, more: dict[str, Any]
) -> dict[str, Any]:
    """Moves a memory's files into the bundle and enters it; one that ONNX disagrees with changes nothing."""
    formats = [f for f, there in (("onnx", manifest.graph), ("gguf", manifest.gguf)) if there]
    told = {**tell_memory(source, name, formats), **more}
    check_length(manifest, name, told["kv_tokens"])
    check_slots(manifest, name, load_memory(source))
    try:
        json.dumps(told, allow_nan=False, ensure_ascii=False).encode()
    except ValueError as error:
        raise KoffError(
            f"memory '{name}': what is told of it cannot be written ({error}); {bundle} is as it was"
        ) from error
    others: dict[Path, Path] = {}  # files of other formats: where they are written, where they belong
    try:
        if manifest.graph is not None:
            aside = source.with_name(f".{name}.onnx_adapter.tmp")
            others[aside] = bundle / told["adapter"]
            write_onnx_memory(source, aside, manifest.graph.layers)
            say("checking ONNX against torch")
            worst = numerics(bundle, (source, aside))["offered"]
            if not worst <= TOLERANCE:
                raise KoffError(
                    f"memory '{name}': ONNX differs from torch by {worst:.2g}, more than {TOLERANCE};"
                    f" {bundle} is as it was"
                )
        if manifest.gguf is not None and told["gguf"]:
            aside = source.with_name(f".{name}.gguf.tmp")
            others[aside] = bundle / told["gguf"]
            write_gguf_memory(load_backbone(bundle), manifest.gguf.architecture, source, aside)
        with staged_dir(bundle / "memories" / name) as folder:
            shutil.copytree(source, folder, dirs_exist_ok=True)
            for path in (*others, *folder.iterdir()):
                fsync_path(path)
            # everything is written: from here on there are only renames, and an old one's entry goes first
            if name in manifest.domains:
                set_domain(bundle, name, None)
            # a kill leaves a memory that other formats lack, and none that they have still
            for target in beside(bundle, name):
                target.unlink(missing_ok=True)
        for aside, target in others.items():
            target.parent.mkdir(exist_ok=True)
            aside.rename(target)
    finally:
        for aside in others:
            aside.unlink(missing_ok=True)
    set_domain(bundle, name, told)
    _tell_of_genai(bundle, manifest, name, told["kv_tokens"])
    return told


def _tell_of_genai(bundle: Path, manifest: Manifest, name: str, kv_tokens: int) -> None:
    """A learned cache takes positions of which onnxruntime-genai knows nothing; its file is not rewritten."""
    told = genai.positions(bundle)
    if manifest.context and told and (left := manifest.context - kv_tokens) < told:
        say(
            f"{genai.CONFIG} says {told} positions, and memory '{name}' leaves {left}: there, set max_length"
            f" to {left} at most"
        )


@contextmanager
def _changing(bundle: Path) -> Iterator[None]:
    """Alone in a bundle, and rid of what a kill has left half-made there.

    Raises:
        KoffError: There is no bundle, or another process is at work in it.
    """
    open_manifest(bundle)
    with alone(bundle):
        recover_below(bundle)
        for place in (bundle / _COMPOSED, bundle / _UNPACKED):
            shutil.rmtree(place, ignore_errors=True)
        for kind in ("onnx_adapter", "gguf"):
            for file in bundle.rglob(f".*.{kind}.tmp"):
                file.unlink()
        yield


def _told(bundle: Path, manifest: Manifest, name: str) -> Told:
    if name not in manifest.domains:
        raise KoffError(f"memory '{name}': not in {bundle}; it has {', '.join(manifest.domains) or 'none'}")
    return manifest.domains[name]


def _check_files(bundle: Path, manifest: Manifest, names: list[str]) -> None:
    """The backbone's, and those of some memories; not genai's, which users edit and nothing here reads."""
    folders = tuple(f"memories/{name}/" for name in names)
    for file in manifest.files:
        if ("/" not in file and file != genai.CONFIG) or file.startswith(folders):
            check_file(bundle, manifest, file)


def _files(manifest: Manifest, name: str) -> list[str]:
    told = manifest.domains[name]
    return [f for f in manifest.files if f.startswith(f"memories/{name}/") or f in (told.adapter, told.gguf)]


def _bytes(manifest: Manifest, name: str) -> int:
    return sum(manifest.files[f]["size"] for f in _files(manifest, name))
