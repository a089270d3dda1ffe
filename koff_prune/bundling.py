"""From a finished run to a bundle, and from a bundle back to a model."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

import koff_prune
from koff_export.bundle import Manifest, check_files, open_manifest, write_manifest
from koff_export.errors import KoffError
from koff_export.files import read_json, sha256_file, staged_dir
from koff_export.genai import write_genai_config
from koff_export.hub import FOR_TORCH, local
from koff_prune.attach import attach, attach_memory, saved_memory
from koff_prune.bundle_places import ADDING, shipped, unlisted
from koff_prune.card import card
from koff_prune.chat import tokens
from koff_prune.compose import compose
from koff_prune.cut import load_backbone
from koff_prune.formats import tell_memory, write_gguf, write_onnx
from koff_prune.lock import alone
from koff_prune.memory import MEMORY_FILES, RECOVERY, kind_of, load_memory, memory_of_folder, save_memory
from koff_prune.merge import folding
from koff_prune.narrow import narrow, tell_narrowed, write_own_tokens
from koff_prune.numerics import accuracy, checked_numerics
from koff_prune.plan import Plan
from koff_prune.progress import say
from koff_prune.recipe import Memory
from koff_prune.seals import SEAL, check_seal
from koff_prune.units import read_units, token_parameters
from koff_prune.weights import INDEX, Weights, copy_weights, has_weights

if TYPE_CHECKING:
    from koff_prune.run import Run

_TOKENS = 1 << 31  # more than any vocabulary has
GRAPHS = 4  # what an export of ONNX graphs makes; it rises with that, and older bundles are then made anew
# What a bundle remembers of the recipe's `learn`, so that a memory added later is trained as its first ones.
MEMORY_LEARN = ("window", "batch", "loss", "rates", "warmup", "gradient_checkpointing")
# Of generation_config.json, what torch's `generate` reads and these do not.
_PASSES_OVER = {
    "koff-run": ("no_repeat_ngram_size", "bad_words_ids"),
    "onnxruntime-genai": ("no_repeat_ngram_size", "bad_words_ids", "suppress_tokens"),
}


def write_bundle(run: Run, merge: str | None = None) -> Path:
    """Writes `bundle/`, or `bundle-<domain>/`: aside first, renamed when whole.

    Args:
        run: With its backbone and memories.
        merge: A domain whose memory becomes part of the backbone and the graphs; no other is in the bundle.

    Returns:
        The bundle's folder.

    Raises:
        KoffError: It would take the place of a bundle that was given more memories, or is being given one.
    """
    export = run.recipe.export
    target = run.folder / ("bundle" if merge is None else f"bundle-{merge}")
    stamp: dict[str, Any] = {
        "export": export.model_dump(mode="json", exclude={"merged_vocabulary"}),
        **({"merge": merge} if merge else {}),
        **({"vocabulary": export.merged_vocabulary} if merge and export.merged_vocabulary else {}),
        **({"graphs": GRAPHS} if "onnx" in export.formats else {}),
    }
    if _told(target).get("numerics", {}).get("asked") == stamp:
        return target
    with alone(target) if target.is_dir() else nullcontext():
        return _write_bundle(run, target, merge, stamp)


def _told(target: Path) -> dict[str, Any]:
    told: dict[str, Any] = read_json(target / "koff.json") if (target / "koff.json").exists() else {}
    return told


def _write_bundle(run: Run, target: Path, merge: str | None, stamp: dict[str, Any]) -> Path:
    recipe = run.recipe
    added = [
        name
        for name, told in _told(target).get("domains", {}).items()
        if name not in recipe.domains or {"trained", "composed", "unpacked"} & told.keys()
    ]
    if (target / "koff.json").exists():
        added += [name for name in unlisted(target, open_manifest(target)) if name not in recipe.domains]
    unfinished = [place.name.removeprefix(ADDING) for place in target.glob(f"{ADDING}*")]
    if unfinished:
        raise KoffError(
            f"{target}: is to be written anew, and `koff-prune memory add` of {', '.join(unfinished)} is not"
            " finished there; finish it, or `koff-prune memory remove` it"
        )
    if added:
        raise KoffError(
            f"{target}: is to be written anew, and holds memories that were added to it: {', '.join(added)};"
            " `koff-prune memory pack` and `remove` them first, and `unpack` them into the new one"
        )
    plan = Plan.load(run.folder / "plan.json")
    domains = list(recipe.domains) if (run.folder / "memories").exists() else []
    with staged_dir(target) as aside, run.timed("exporting"):
        backbone, memories = run.folder / "backbone", run.folder / "memories"
        check_seal(memories, str(memories))
        sums = check_seal(backbone, str(backbone))
        weights = {INDEX, *(file.name for file in Weights.open(backbone).files)}
        for file in backbone.iterdir():
            if file.is_dir():  # of a tokenizer with several chat templates
                shutil.copytree(file, aside / file.name)
            elif file.name not in {SEAL, *weights}:
                shutil.copy2(file, aside / file.name)
        folded = [RECOVERY] if recipe.cut.recover is not None else []
        folded += [merge] if merge is not None else []
        fold = folding([memories / name for name in folded]) if folded else None
        coverage = recipe.export.merged_vocabulary
        narrowed = narrow(run, merge, coverage, aside)
        dense, rows = (narrowed.dense, narrowed.rows) if narrowed else (run.dense, None)
        same = copy_weights(backbone, aside, recipe.export.shard_bytes, fold, rows)
        known = {name: digest for name, digest in sums.items() if same and name in weights}
        shutil.copy2(run.folder / "plan.json", aside / "plan.json")
        if merge is None:
            for name in domains:
                shutil.copytree(memories / name, aside / "memories" / name)
                if run.dense.own is not None:
                    write_own_tokens(run, name, aside / "memories" / name)
        else:
            place = memories / merge
            section, tensors = memory_of_folder(place), load_memory(place)
            domains = [merge] if section.kv is not None else []
            for name in domains:  # what is left beside the weights: the learned KV
                save_memory(aside / "memories" / name, {"kv": tensors["kv"]}, section.only("kv"), "")
        formats = recipe.export.formats if merge is None else []
        recovery = memories / RECOVERY / MEMORY_FILES["lora"]
        told = {name: tell_memory(aside / "memories" / name, name, formats) for name in domains}
        tokenizer, config = dense.tokenizer, dense.config
        # an answer ends where torch's ends, and where memories have learned to end
        eos = _ids(config.eos_token_id) + _ids(tokenizer.eos_token_id)
        if (aside / "generation_config.json").exists():
            generation = read_json(aside / "generation_config.json")
            eos += _ids(generation.get("eos_token_id"))
            for who, keys in _PASSES_OVER.items():
                asked = {key: generation.get(key) for key in keys}
                if unread := [key for key, value in asked.items() if value not in (None, 0, [])]:
                    say(f"generation_config.json: {who} passes over {', '.join(unread)}")
        manifest: dict[str, Any] = {
            "koff_prune": koff_prune.__version__,
            "model": run.model_identity,
            "plan": plan.digest,
            "recovery": sha256_file(recovery) if recipe.cut.recover is not None else None,
            "parameters": plan.parameters,
            "sparsity": {"target": plan.target, "realised": plan.realised, "of": plan.of},
            "window": recipe.evaluate.window,
            "bos": dense.bos,
            "eos": list(dict.fromkeys(eos)),
            "context": config.max_position_embeddings,
            "domains": told,
            "learn": recipe.learn.model_dump(mode="json", include=set(MEMORY_LEARN)),
            "graph": None,
            "gguf": None,
            "merged": merge,
            "numerics": {"asked": stamp},
        }
        if merge and narrowed:
            manifest["vocabulary"] = tell_narrowed(run, narrowed, merge, aside)
            manifest["parameters"] = _parameters(plan, config, manifest["vocabulary"])
        if "onnx" in recipe.export.formats:
            read = {name: run.domains[name].scoring for name in ([merge] if merge else recipe.domains)}
            if narrowed:
                read = {name: narrowed.windows(windows) for name, windows in read.items()}
            listed = domains if merge is None else []
            manifest["graph"] = write_onnx(aside, listed, recipe.export, merge, read)
            if any(domain.get("tokens") for domain in told.values()):
                say("no genai_config.json: onnxruntime-genai has one tokenizer for all memories")
            elif not write_genai_config(aside, manifest):
                say("no genai_config.json: onnxruntime-genai wants equally many KV heads in every layer")
        if "gguf" in recipe.export.formats:
            manifest["gguf"] = write_gguf(aside, told, recipe.export)
        (aside / "README.md").write_text(card(run, plan, manifest), encoding="utf-8")
        write_manifest(aside, manifest, known)
        if manifest["graph"]:
            say("checking ONNX against torch")
            manifest["numerics"]["onnx_logits"] = checked_numerics(aside, str(target))
            measured = domains if merge is None else [merge]
            texts = {name: run.domains[name].heldout[:1] for name in measured}
            if merge and narrowed:
                texts = {name: narrowed.windows(windows) for name, windows in texts.items()}
            elif own := run.dense.own:
                texts = {name: own.numbered(windows, name) for name, windows in texts.items()}
            first = {name: tokens(windows[0]).tolist() for name, windows in texts.items()}
            manifest["numerics"]["precision"] = accuracy(aside, first)
            if "fused" in manifest["graph"]:
                manifest["numerics"]["fused"] = accuracy(aside, first, "fused")
            write_manifest(aside, manifest, known)
    return target


def _parameters(plan: Plan, config: Any, narrowed: Mapping[str, Any] | None) -> dict[str, int]:
    """A plan's, less what left a merged bundle with tokens: the manifest's `vocabulary`, if it has one."""
    gone = narrowed.get("counted", narrowed["of"]) - narrowed["kept"] if narrowed else 0
    return {**plan.parameters, "slim": plan.parameters["slim"] - gone * token_parameters(config)}


def _narrowed(folder: Path, manifest: Manifest, config: Any) -> Mapping[str, Any] | None:
    """A manifest's `vocabulary`, checked; see `narrow.tell_narrowed`."""
    told: Any = manifest.told.get("vocabulary")
    if told is None:
        return None
    if not (
        manifest.merged
        and isinstance(told, dict)
        and told.get("kept") == config.vocab_size
        and type(told.get("of")) is int
        and config.vocab_size <= told["of"] <= _TOKENS
        and type(told.get("counted", 0)) is int
        and 0 <= told.get("counted", 0) <= told["of"]
        and isinstance(told.get("perplexity"), float | None)
    ):
        raise KoffError(
            f"{folder}: koff.json tells another vocabulary than config.json; fetch the bundle again"
        )
    return told


def _ids(value: int | list[int] | None) -> list[int]:
    return [value] if isinstance(value, int) else list(value or [])


def load_bundle(
    folder: str | Path,
    memory: str | None = None,
    dtype: torch.dtype | None = None,
    *,
    weights: Sequence[float] | None = None,
) -> PreTrainedModel:
    """Opens a bundle as an ordinary causal LM whose `generate` works, with one memory attached, or several.

    Args:
        folder: The bundle, or its place on the hub: "hf://org/name".
        memory: A domain's name, or several as in "python+math"; None for the backbone alone.
        dtype: Cast the backbone to this.
        weights: Of each of several memories' LoRA; default: equal, 1 in sum. See `compose.compose`.

    Raises:
        KoffError: Not a bundle, a damaged one, no such memory, or weights that do not fit.
    """
    folder = local(folder, FOR_TORCH)
    manifest = open_manifest(folder)
    if memory is None and manifest.merged in manifest.domains:
        memory = manifest.merged  # what is left of it: the learned KV
    if memory is None:
        return load_backbone(folder, dtype)
    names = [memory] if memory in manifest.domains else memory.split("+")
    for name in names:
        if name not in manifest.domains:
            raise KoffError(
                f"memory '{name}': not in {folder}; it has {', '.join(manifest.domains) or 'none'}"
            )
    model = load_backbone(folder, dtype)
    if len(names) == 1 and weights is None:
        attached = attach(model, names[0], *saved_memory(folder, manifest, names[0]))
    else:
        attached = attach(model, memory, *compose_saved(model, folder, manifest, names, weights))
    attached.base.__dict__["koff_memories"] = attached  # keeps the KV alive with the model
    return attached.base


def compose_saved(
    model: PreTrainedModel,
    folder: Path,
    manifest: Manifest,
    names: Sequence[str],
    weights: Sequence[float] | None,
) -> tuple[dict[str, dict[str, torch.Tensor]], Memory]:
    """`compose` of a bundle's own memories."""
    return compose(model, [saved_memory(folder, manifest, name) for name in names], weights)


def verify(folder: str | Path) -> dict[str, Any]:
    """Re-checks a bundle: files and checksums, plan, parameters, memories, and torch against ONNX Runtime.

    Returns:
        What was measured.

    Raises:
        KoffError: The first thing that is wrong.
    """
    folder = local(folder)
    manifest = open_manifest(folder)
    check_files(folder, manifest)
    if strangers := unlisted(folder, manifest):
        say(f"not in koff.json, and not checked: the memories {', '.join(strangers)}")
    if not has_weights(folder):
        raise shipped(folder, "the weights that ONNX is checked against; its files are as koff.json says")
    plan = Plan.load(folder / "plan.json")
    if plan.digest != manifest.plan:
        raise KoffError(f"{folder}: plan.json is not the plan that koff.json names; export the bundle again")
    model = load_backbone(folder)
    units = read_units(model)
    slim = units.parameters
    parameters = _parameters(plan, model.config, _narrowed(folder, manifest, model.config))
    if slim != parameters["slim"]:
        raise KoffError(
            f"{folder}: the backbone has {slim} parameters, plan.json and koff.json say {parameters['slim']}"
        )
    for i, (layer, kept) in enumerate(zip(units.layers, plan.layers, strict=True)):
        if (layer.ffn_neurons, layer.kv_groups) != (len(kept["ffn_neurons"]), len(kept["kv_groups"])):
            raise KoffError(f"{folder}: layer {i} of the backbone is not as wide as plan.json says")
    result: dict[str, Any] = {
        "files": len(manifest.files),
        "parameters": parameters,
        "sparsity": plan.realised,
        "of": plan.of,
        "memories": {},
    }
    told = {"parameters": parameters,
            "sparsity": {"target": plan.target, "realised": plan.realised, "of": plan.of}}  # fmt: skip
    for key, value in told.items():
        if manifest.told.get(key) != value:
            raise KoffError(f"{folder}: koff.json tells other {key} than plan.json; fetch the bundle again")
    for name, domain in manifest.domains.items():
        result["memories"][name] = kind_of(load_memory(folder / "memories" / name))
        model = attach_memory(model, folder / "memories" / name).unwrap()
        true = tell_memory(folder / "memories" / name, name, [])
        for key in ("parameters", "lora_rank", "lora_alpha", "kv_tokens"):
            if getattr(domain, key) != true[key]:
                raise KoffError(
                    f"{folder}: koff.json tells {key} {getattr(domain, key)} of memory '{name}', which has"
                    f" {true[key]}; fetch the bundle again"
                )
    if manifest.graph is not None:
        del model, units  # the comparison holds one model at a time
        result["onnx_logits"] = checked_numerics(folder, str(folder))
    return result
