"""Cut on disk, layer by layer and shard by shard: the bytes of the cut in memory, and nothing half done."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_helpers import (
    SHAPES,
    logits,
    memories_on,
    random_plan,
    tiny_config,
    tiny_memory,
    tiny_shape,
    token_ids,
)
from run_helpers import koff_prune, recipe_of
from safetensors.torch import load_file, save_file
from text_helpers import tiny_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from koff_export.errors import KoffError
from koff_export.files import read_json, sha256_file
from koff_prune import load_backbone
from koff_prune.compensate import Compensation
from koff_prune.cut import cut, cut_on_disk, save_backbone
from koff_prune.memory import save_memory
from koff_prune.merge import folding
from koff_prune.models import Dense, open_dense
from koff_prune.plan import Plan
from koff_prune.recipe import ModelSection
from koff_prune.scores import collect
from koff_prune.units import KINDS, read_units
from koff_prune.weights import copy_weights

INDEX = "model.safetensors.index.json"
SHARD = 20_000

# Runs koff-prune in a process of its own that kills itself where the second file of weights begins.
KILLED = """
import os, signal
import koff_prune.weights as weights
begun = []
def dying(write):
    def dies(*given):
        begun.append(given)
        if len(begun) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        write(*given)
    return dies
weights._write_file, weights._link = dying(weights._write_file), dying(weights._link)
from koff_prune.cli import main
main()
"""


def saved(model: PreTrainedModel, folder: Path, dtype: str = "float32", shard: str = "20KB") -> Dense:
    """A model as a Hugging Face folder, opened again."""
    model.save_pretrained(folder, max_shard_size=shard)
    tiny_tokenizer().save_pretrained(folder)
    return open_dense(ModelSection(source=str(folder), dtype=dtype))  # type: ignore[arg-type]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """What safetensors itself reads in a folder's files."""
    result: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found = load_file(file)
        assert not set(found) & set(result)
        result |= found
    return result


def same_tensors(a: Path, b: Path) -> None:
    one, other = tensors_of(a), tensors_of(b)
    assert set(one) == set(other)
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("compensate", [False, True], ids=["exact", "compensated"])
@pytest.mark.parametrize("widths", ["per_layer", "uniform"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_cut_on_disk_is_the_cut_in_memory(
    shape: str, widths: str, compensate: bool, tmp_path: Path
) -> None:
    dtype = "bfloat16" if widths == "uniform" else "float32"  # the weights are stored as float32
    dense = saved(tiny_shape(shape), tmp_path / "dense", dtype, "20KB" if compensate else "1GB")
    assert dense.weights is not None and (len(dense.weights.files) > 1) == compensate
    units = read_units(dense.skeleton())
    plan = random_plan(units, widths=widths)
    solve = None
    if compensate:
        solve = Compensation(
            collect(dense.open(), units, KINDS, token_ids(6, 16, seed=9)).second, 0.01, units
        )
    save_backbone(cut(dense.open(), plan, solve), tmp_path / "memory")
    cut_on_disk(dense.skeleton, dense.weights, plan, tmp_path / "disk", solve)
    assert "model" not in dense.__dict__, "the dense weights were loaded"
    files = sorted(p.name for p in (tmp_path / "memory").iterdir())
    assert files == ["config.json", "generation_config.json", "model.safetensors"]
    assert [sha256_file(tmp_path / "memory" / f) for f in files] == [
        sha256_file(tmp_path / "disk" / f) for f in files
    ]

    cut_on_disk(dense.skeleton, dense.weights, plan, tmp_path / "shards", solve, SHARD)
    shards = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(shards) > 2 and shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    for shard in shards:
        found = load_file(shard)
        assert len(found) == 1 or sum(t.nbytes for t in found.values()) <= SHARD
    same_tensors(tmp_path / "memory", tmp_path / "shards")
    index = read_json(tmp_path / "shards" / INDEX)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(tmp_path / "memory").values())
    ids = token_ids(1, 12)
    opened = [load_backbone(tmp_path / name) for name in ("memory", "shards")]
    if widths == "uniform":
        opened.append(AutoModelForCausalLM.from_pretrained(tmp_path / "shards", dtype=torch.bfloat16))
    with torch.no_grad():
        said = [model(input_ids=ids, use_cache=False).logits for model in opened]
    assert all(torch.equal(found, said[0]) for found in said)


def test_a_tied_head_may_be_stored_twice_and_not_otherwise(tmp_path: Path) -> None:
    """Equal copies are one tensor; unlike ones are two, of which a cut would lose one."""
    dense = saved(tiny_shape("llama-tied-mha-biases"), tmp_path / "m", shard="1GB")
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    section = ModelSection(source=str(tmp_path / "m"), dtype="float32")
    assert dense.weights is not None and open_dense(section).weights is not None
    tensors["lm_head.weight"][3] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(KoffError, match="set tie_word_embeddings to false"):
        open_dense(section)


def hostile(name: Any) -> Callable[[Path], None]:
    """Sends one tensor of the index elsewhere."""

    def edit(folder: Path) -> None:
        data = read_json(folder / INDEX)
        data["weight_map"]["model.norm.weight"] = name
        (folder / INDEX).write_text(json.dumps(data))

    return edit


def another_file(folder: Path) -> None:
    first = sorted(folder.glob("*.safetensors"))[0].name
    hostile(first)(folder)


def cut_short(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-4])


DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    *((hostile(n), "hostile") for n in ("../secret.safetensors", "/secret.safetensors", "a/b.safetensors",
                                        "..\\secret.safetensors", "C:s.safetensors", "config.json", "")),
    (hostile(None), "weight_map"),
    (hostile("model-00009-of-00009.safetensors"), "lacks 1 of its weight files such as model-00009"),
    (another_file, "lacks model.norm.weight"),
    (cut_short, "not a whole safetensors file"),
    (lambda f: (f / INDEX).write_text("[]"), "weight_map"),
    (lambda f: (f / INDEX).write_text('{"weight_map": {}}'), "weight_map"),
    (lambda f: (f / INDEX).write_text("{"), "not valid JSON"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "says"), DAMAGES, ids=[str(n) for n in range(len(DAMAGES))])
def test_a_damaged_or_hostile_index_is_one_sentence(
    damage: Callable[[Path], object], says: str, tmp_path: Path
) -> None:
    model = tiny_shape("llama")
    save_file({"model.norm.weight": torch.ones(32)}, tmp_path / "secret.safetensors")
    saved(model, tmp_path / "dense")
    save_backbone(cut(model, random_plan(read_units(model))), tmp_path / "backbone", SHARD)
    for folder in (tmp_path / "dense", tmp_path / "backbone"):
        damage(folder)
    with pytest.raises(KoffError, match=says):
        load_backbone(tmp_path / "backbone")
    with pytest.raises(KoffError, match=says):
        open_dense(ModelSection(source=str(tmp_path / "dense"), dtype="float32"))


def test_a_memory_merged_into_a_sharded_backbone(tmp_path: Path) -> None:
    model = tiny_shape("qwen2-tied")
    cut(model, random_plan(read_units(model)))
    save_backbone(model, tmp_path / "backbone", SHARD)
    memories = memories_on(model, ("law",), kv=False)
    save_memory(tmp_path / "law", memories.tensors("law"), tiny_memory(kv=False), "somewhere")
    ids = token_ids(1, 12)
    wanted = logits(memories, ids, "law")
    (tmp_path / "bundle").mkdir()
    shutil.copy(tmp_path / "backbone" / "config.json", tmp_path / "bundle")
    copy_weights(tmp_path / "backbone", tmp_path / "bundle", SHARD, folding([tmp_path / "law"]))
    files = sorted(p.name for p in (tmp_path / "bundle").iterdir())
    assert len(files) > 3 and set(files) <= {p.name for p in (tmp_path / "backbone").iterdir()}
    with torch.no_grad():
        found = load_backbone(tmp_path / "bundle")(input_ids=ids, use_cache=False).logits
    assert (found - wanted).abs().max() < 1e-4


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Magnitude pruning and nothing else: no score of it needs a text, no stage the whole model."""
    return recipe_of(
        tmp_path_factory.mktemp("place"),
        tiny_config("qwen3", num_hidden_layers=2, intermediate_size=96),
        memory={"lora": "none", "kv": "none"},
        cut={"compensate": "none"},
        learn={"tokens": 0, "settle_tokens": 0, "gates": {"form": "straight_through", "start": "magnitude"}},
        export={"formats": ["safetensors"], "shard_gb": SHARD / 1e9},
    )


@pytest.fixture(scope="module")
def whole(recipe: Path) -> Path:
    """That recipe's run, in which nobody could have loaded the dense model."""
    import koff_prune as package

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("the dense model was loaded")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AutoModelForCausalLM, "from_pretrained", never)
        package.export(recipe, recipe.parent / "whole")
    return recipe.parent / "whole"


def test_magnitude_needs_no_dense_model_in_memory(whole: Path, recipe: Path) -> None:
    from koff_prune.plan import make_plan
    from koff_prune.reading import load_recipe
    from koff_prune.scores import score_units

    dense = open_dense(load_recipe(recipe).model)
    units, structure = read_units(dense.model), load_recipe(recipe).structure
    scores = score_units("magnitude", dense.model, units, structure, None)
    plan = Plan.load(whole / "plan.json")
    wanted = make_plan(scores, units, structure, model=plan.model, method="koff", ranking="global")
    assert plan == wanted
    save_backbone(cut(dense.model, plan), whole / "backbone-in-memory")
    same_tensors(whole / "backbone-in-memory", whole / "bundle")
    shutil.rmtree(whole / "backbone-in-memory")


def test_a_sharded_bundle_is_checked_file_by_file(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Path(shutil.copytree(whole / "bundle", tmp_path / "bundle"))
    shards = sorted(p.name for p in bundle.glob("model-*.safetensors"))
    assert len(shards) > 2 and not (bundle / "model.safetensors").exists()
    assert {*shards, INDEX} <= set(read_json(bundle / "koff.json")["files"])
    assert koff_prune(capsys, "verify", bundle).code == 0
    data = bytearray((bundle / shards[1]).read_bytes())
    data[-1] ^= 1
    (bundle / shards[1]).write_bytes(bytes(data))
    answer = koff_prune(capsys, "verify", bundle)
    assert answer.code == 2 and shards[1] in answer.err


def test_exporting_again_in_files_of_another_size(
    whole: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(whole, tmp_path / "run"))
    asked = ["--out", out, "--resume", "--set", "export.shard_gb=1"]
    answer = koff_prune(capsys, "export", recipe, *asked)
    assert answer.code == 0, answer.err
    assert [p.name for p in (out / "bundle").glob("*.safetensors")] == ["model.safetensors"]
    assert not (out / "bundle" / INDEX).exists()
    same_tensors(out / "bundle", whole / "bundle")


def test_a_kill_between_two_files_leaves_no_half_backbone(whole: Path, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    command = ["export", str(recipe), "--out", str(out), "--resume", "--threads", "1"]
    for stage in ("backbone", "bundle"):
        done = subprocess.run(
            [sys.executable, "-c", KILLED, *command], capture_output=True, text=True, timeout=200
        )
        assert done.returncode == -9, done.stderr
        assert not (out / stage).exists() and list(out.glob(f".{stage}.*.tmp/model-00001-of-*"))
        if stage == "backbone":  # whole this time; then the bundle's copy of it is killed
            done = subprocess.run([sys.executable, "-m", "koff_prune", "cut", *command[1:]], timeout=200)
            assert done.returncode == 0
    done = subprocess.run([sys.executable, "-m", "koff_prune", *command], timeout=200)
    assert done.returncode == 0
    assert not list(out.glob(".*.tmp"))
    assert (
        read_json(out / "bundle" / "koff.json")["files"] == read_json(whole / "bundle" / "koff.json")["files"]
    )
