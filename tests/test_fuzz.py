"""Damaged and hostile files of every kind that is read: success or one sentence, never a traceback.

`KOFF_FUZZ=2000 pytest tests/test_fuzz.py` repeats docs/reliability.md; the default is what fits into seconds.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_helpers import tiny_config
from run_helpers import recipe_of
from text_helpers import merging_tokenizer

import koff_prune as package
from koff_export.bundle import check_files, open_manifest
from koff_export.errors import KoffError
from koff_export.runtime import Runtime
from koff_prune.bundle_memories import pack_memory, unpack_memory
from koff_prune.cut import load_backbone
from koff_prune.memory import KvMemory, load_memory, memory_of_folder
from koff_prune.models import open_dense
from koff_prune.plan import Plan
from koff_prune.reading import load_recipe
from koff_prune.recipe import ModelSection

CASES = int(os.environ.get("KOFF_FUZZ", "40"))
ODD = (
    "-1",
    "1e999",
    "99999999999999999999",
    "null",
    '"../../x"',
    "[]",
    "{}",
    '"\\u0000"',
    "true",
    "0.5",
    "NaN",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("place")
    config = tiny_config(num_hidden_layers=2, tie_word_embeddings=True)
    package.apply(recipe_of(folder, config, export={"formats": ["safetensors", "onnx"]}), folder / "run")
    pack_memory(folder / "run" / "bundle", "law", folder / "law.koffmem")
    return folder


def mutate(data: bytes, chance: random.Random, *, head: int | None = None) -> bytes:
    """One to four changes: bytes flipped, cut, doubled or inserted, or a value replaced by an odd one."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        end = min(len(changed), head or len(changed))
        at = chance.randrange(max(1, end))
        kind = chance.randrange(6)
        if kind == 0 and changed:
            changed[min(at, len(changed) - 1)] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del changed[at : at + chance.choice((1, 3, 17, len(changed)))]
        elif kind == 2:
            changed[at:at] = changed[at : at + 20]
        elif kind == 3:
            changed[at:at] = chance.randbytes(chance.choice((1, 8, 64)))
        elif kind == 4:
            changed[at : at + 8] = struct.pack("<q", chance.choice((-1, 0, 1 << 40, (1 << 63) - 1)))
        else:
            text = bytes(changed)
            spots = [i for i in range(end) if text[i : i + 1] in b":,"]
            if spots:
                spot = chance.choice(spots) + 1
                stop = spot
                while stop < len(text) and text[stop : stop + 1] not in b",}]\n":
                    stop += 1
                changed[spot:stop] = chance.choice(ODD).encode()
    return bytes(changed)


def listing(root: Path) -> dict[str, int]:
    return {str(p.relative_to(root)): p.stat().st_size for p in root.rglob("*") if p.is_file()}


def fuzz(file: Path, read: Callable[[], Any], seed: str, root: Path, *, head: int | None = None) -> int:
    """Damages `file` CASES times; returns how often it was read all the same. The file is as before then."""
    whole, chance, read_anyway = file.read_bytes(), random.Random(seed), 0
    others = {k: v for k, v in listing(root).items() if root / k != file}
    try:
        for n in range(CASES):
            file.write_bytes(mutate(whole, chance, head=head))
            try:
                read()
                read_anyway += 1
            except KoffError as error:
                said = str(error)
                assert said.strip() and "Traceback" not in said, f"case {n}"
                assert len(said) < 2000, f"case {n}: {said[:300]}"
            after = {k: v for k, v in listing(root).items() if root / k != file and not k.endswith(".lock")}
            assert {k: v for k, v in others.items() if not k.endswith(".lock")} == after, f"case {n}"
    finally:
        file.write_bytes(whole)
    return read_anyway


def test_recipes(place: Path) -> None:
    file = place / "recipe.yaml"
    fuzz(file, lambda: load_recipe(file), "recipe", place)


def test_plans(place: Path) -> None:
    file = place / "run" / "plan.json"
    assert fuzz(file, lambda: Plan.load(file), "plan", place) < CASES


def test_manifests(place: Path) -> None:
    bundle = place / "run" / "bundle"
    fuzz(bundle / "koff.json", lambda: check_files(bundle, open_manifest(bundle)), "manifest", place)


@pytest.mark.parametrize("name", ["kv.safetensors", "adapter_model.safetensors", "adapter_config.json"])
def test_memories(place: Path, name: str) -> None:
    folder = place / "run" / "bundle" / "memories" / "law"

    def read() -> None:
        tensors = load_memory(folder)
        memory_of_folder(folder)
        KvMemory.from_tensors(tensors["kv"])

    fuzz(folder / name, read, name, place, head=400)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_backbones(place: Path, tmp_path: Path, name: str) -> None:
    bundle = tmp_path / "bundle"  # a copy: a bundle's weights are the run's own file by another name
    shutil.copytree(place / "run" / "bundle", bundle)
    fuzz(bundle / name, lambda: load_backbone(bundle), name, tmp_path, head=600)


@pytest.mark.parametrize("name", ["onnx/model.onnx", "onnx/memories/law.onnx_adapter", "koff.json"])
def test_the_device_runtime(place: Path, name: str) -> None:
    """Checksums are not compared here: what they would catch has to be caught without them too."""
    bundle = place / "run" / "bundle"

    def read() -> None:
        Runtime.open(bundle, verify=False, threads=1).memory("law")

    fuzz(bundle / name, read, name, place)


def test_packed_memories(place: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(place / "run" / "bundle", bundle)
    file = tmp_path / "law.koffmem"
    shutil.copy(place / "law.koffmem", file)
    manifest = json.loads((bundle / "koff.json").read_text())
    manifest["plan"] = "0" * 64  # nothing is taken in, so that every case begins alike
    (bundle / "koff.json").write_text(json.dumps(manifest))
    assert fuzz(file, lambda: unpack_memory(file, bundle), "packed", tmp_path) == 0


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF model with its tokenizer, alone in a folder."""
    folder = tmp_path_factory.mktemp("gguf")
    config = tiny_config(num_hidden_layers=2, vocab_size=259)
    recipe = recipe_of(
        folder, config, structure={"widths": "uniform"}, export={"formats": ["safetensors", "gguf"]}
    )
    merging_tokenizer().save_pretrained(folder / "model")  # transformers reads no GGUF without merges
    package.apply(recipe, folder / "run")
    (folder / "alone").mkdir()
    return Path(shutil.copy(folder / "run" / "bundle" / "gguf" / "model.gguf", folder / "alone"))


def test_gguf_models(gguf: Path, tmp_path: Path) -> None:
    """Headers, metadata and tensor tables; weights are behind them. What is readable is converted."""

    def read() -> None:
        section = ModelSection(source=str(gguf), dtype="float32")
        assert open_dense(section, cache=tmp_path).model.num_parameters() < 10**8

    read()
    assert fuzz(gguf, read, "gguf", gguf.parent, head=6000) < CASES
