"""What `memory add` makes of its options: a recipe of one domain around a finished bundle."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml

from koff_export.bundle import Manifest
from koff_export.errors import KoffError
from koff_export.files import read_json, write_json
from koff_prune.bundling import MEMORY_LEARN
from koff_prune.formats import lora_slots
from koff_prune.memory import memory_of_folder
from koff_prune.needs import check_context, steps_of
from koff_prune.numerics import CHECKED
from koff_prune.progress import say
from koff_prune.reading import load_recipe, read_yaml
from koff_prune.recipe import Domain, Recipe

# Keys of a recipe that are not a memory's: --set of these would do nothing, or another option's work.
_NOT_A_MEMORYS = {
    "cut": "the backbone of a bundle does not change",
    "structure": "the backbone of a bundle does not change",
    "compare": "nothing is compared",
    "memory.tokens": "a bundle's vocabulary does not change",
    "export": "the bundle keeps its formats",
    "model.source": "the model is the bundle's",
    "model.revision": "the model is the bundle's",
    "model.config": "the model is the bundle's",
    "learn.gates": "no mask is learned",
    "learn.tokens": "how much is trained is said by --tokens",
    "learn.settle_tokens": "how much is trained is said by --tokens",
}


def _check_overrides(overrides: list[str]) -> None:
    for item in overrides:
        key = item.partition("=")[0].strip()
        for refused, why in _NOT_A_MEMORYS.items():
            if f"{key}.".startswith(f"{refused}."):
                raise KoffError(f"--set {item}: {why}; leave it out")


def recipe_of(
    bundle: Path, manifest: Manifest, name: str, data: Path, tokens: int, overrides: list[str] | None
) -> Recipe:
    """A recipe whose memory is as the bundle's others and learned as they were, with no gates to learn.

    Args:
        bundle: The bundle's folder.
        manifest: The bundle's.
        name: Of the new memory.
        data: Texts (a file or folder), or a YAML file with a domain (`source: …`).
        tokens: To train on.
        overrides: `dotted.key=value` of a recipe.

    Raises:
        KoffError: The data are not there or no domain, windows have no positions, or the tokens make no step.
    """
    if tokens < 1:
        raise KoffError(f"--tokens: {tokens} is not above 0; name the tokens to train on")
    _check_overrides(overrides or [])
    in_yaml = data.suffix in (".yaml", ".yml")
    if in_yaml:
        domain = read_yaml(data)[0]
        if isinstance(domain, dict) and "source" not in domain and set(domain) == {name}:
            domain = domain[name]  # as it stands under `domains:` in a recipe
        for key in domain if isinstance(domain, dict) else ():
            if key in Recipe.model_fields:
                raise KoffError(
                    f"{data}: must hold one domain ({', '.join(Domain.model_fields)}), and `{key}` is of a"
                    " whole recipe; leave it out, or give it as --set"
                )
    else:
        domain = {"source": str(data.resolve())}
    others = list(manifest.domains)
    memory = {}
    if others:
        memory = memory_of_folder(bundle / "memories" / others[0]).model_dump(mode="json")
        memory = {part: "none" if value is None else value for part, value in memory.items()}
    known = manifest.told.get("learn", {})  # not in bundles of earlier versions
    learn = {key: known[key] for key in MEMORY_LEARN if key in known} if isinstance(known, dict) else {}
    made = {
        "version": 1, "model": {"source": str(bundle.resolve())}, "domains": {name: domain},
        **({"memory": memory} if memory else {}),
        "learn": {"window": min(512, manifest.window), **learn, "tokens": 0, "settle_tokens": tokens},
        "evaluate": {"window": manifest.window},
        "scoring": {"window": min(512, manifest.window)},
    }  # fmt: skip
    try:
        recipe = load_recipe(data.resolve(), overrides, text=yaml.safe_dump(made, sort_keys=False))
    except KoffError as error:  # lines and keys of a recipe that nobody wrote
        told = re.sub(r"(?m)^recipe .*?, line \d+: ", f"{data}: " if in_yaml else "", str(error))
        raise KoffError(told.replace(f"domains.{name}.", "") if in_yaml else told) from error
    if manifest.context is not None:
        check_context(recipe, manifest.context)
    if not steps_of(tokens, recipe.learn, 1):
        step = recipe.learn.window * recipe.learn.batch
        raise KoffError(
            f"--tokens: {tokens} make no step of {step} (learn.window x learn.batch);"
            " raise it, or lower learn.batch"
        )
    return recipe


@contextmanager
def in_words_of_add(name: str) -> Iterator[None]:
    """A mistake in what `memory add` was given is told by its options, not by keys of a recipe."""
    try:
        yield
    except KoffError as error:
        told = str(error)
        for key in (f"`domains.{name}.source.path`", f"domains.{name}.source"):
            told = told.replace(key, "--data")
        raise KoffError(told) from error


def same_work(work: Path, recipe: Recipe, text: str) -> None:
    """What an interrupted training left is gone on with if it is of the same recipe and text, else dropped.

    Args:
        work: Its folder.
        recipe: Of this training.
        text: Digest of its tokens: the files that the recipe names may have changed.
    """
    stamp, mine = work / "recipe.json", {"recipe": recipe.digest(), "text": text}
    if stamp.exists() and read_json(stamp) != mine:
        say("an interrupted training of another recipe or text is dropped")
        shutil.rmtree(work)
    work.mkdir(exist_ok=True)
    write_json(stamp, mine)


def check_length(manifest: Manifest, name: str, kv_tokens: int) -> None:
    """Before anything is trained or replaced: a cache that leaves no room for text is no memory."""
    if manifest.context is not None and kv_tokens + CHECKED > manifest.context:
        raise KoffError(
            f"memory '{name}': a cache of {kv_tokens} leaves no room for {CHECKED} tokens of text in"
            f" {manifest.context} positions; lower memory.kv.tokens, or compose fewer"
        )


def check_slots(manifest: Manifest, name: str, tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    """Before anything is trained or replaced: the graph takes LoRA where it was exported with slots."""
    if manifest.graph is None:
        return
    end = ".lora_A.weight"
    slots = {i.removesuffix(end) for i in manifest.graph.inputs if i.endswith(end)}
    if missing := lora_slots(tensors.get("lora", {})).keys() - slots:
        lacking, there = (
            ", ".join(sorted({m.rpartition(".")[2] for m in some})) for some in (missing, slots)
        )
        raise KoffError(
            f"memory '{name}': the bundle's ONNX graph has no slots for a LoRA around {lacking}; "
            + (f"set memory.lora.target=[{there}]" if there else "set memory.lora=none")
            + ", or export the bundle again with a memory that has it"
        )
