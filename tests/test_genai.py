"""Bundles opened by onnxruntime-genai, through the example that shows how."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from model_helpers import tiny_config
from run_helpers import koff_prune, recipe_of

from koff_export.bundle import open_manifest
from koff_export.errors import KoffError
from koff_export.genai import write_genai_config
from koff_export.runtime import Runtime

EXAMPLE = Path(__file__).parents[1] / "examples" / "run_in_genai.py"


@pytest.fixture(scope="module", params=["portable", "fused"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import koff_prune as package

    folder = tmp_path_factory.mktemp("place")
    recipe = recipe_of(
        folder,
        tiny_config("qwen3", num_hidden_layers=2, intermediate_size=128, head_dim=16),
        learn={"rates": {"lora": 0.05, "kv": 0.2}},  # so that memories say something
        export={
            "formats": ["safetensors", "onnx"],
            "onnx": {"profiles": list(dict.fromkeys(["portable", request.param]))},
        },
    )
    asked = folder / "model" / "generation_config.json"
    asked.write_text(json.dumps({**json.loads(asked.read_text()), "repetition_penalty": 1.3}))
    package.export(recipe, folder / "run")
    return folder


def genai_graph(bundle: Path) -> str:
    """The graph that genai opens."""
    told: str = json.loads((bundle / "genai_config.json").read_text())["model"]["decoder"]["filename"]
    return told


def test_genai_leaves_the_memory_its_positions(place: Path) -> None:
    told = json.loads((place / "run/bundle/genai_config.json").read_text())
    manifest = open_manifest(place / "run/bundle")
    longest = max(domain.kv_tokens for domain in manifest.domains.values())
    assert longest > 0 and manifest.context is not None
    assert told["search"]["max_length"] == told["model"]["context_length"] == manifest.context - longest
    assert told["search"]["repetition_penalty"] == 1.3


@pytest.mark.parametrize("memory", ["none", "law", "code"])
def test_genai_answers_as_koff_run(place: Path, memory: str) -> None:
    bundle = place / "run" / "bundle"
    done = subprocess.run(
        [sys.executable, EXAMPLE, bundle, memory, "the court"], capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = [int(token) for token in done.stdout.splitlines()[0].split()]
    runtime = Runtime.open(bundle)
    ids = runtime.encode("the court")
    profiles = runtime.manifest.graph.profiles  # type: ignore[union-attr]
    assert genai_graph(bundle) in profiles["fused" if "fused" in profiles else "portable"].values()
    ours = list(runtime.generate_tokens(ids, None if memory == "none" else memory, 24))
    assert ours and answer[: len(ours)] == ours and len(answer) - len(ours) in (0, 1)  # genai keeps the eos


def test_layers_of_unlike_heads_get_no_config(tmp_path: Path) -> None:
    manifest = {
        "graph": {"kv_heads": [2, 1], "precisions": {"fp32": "onnx/model.onnx"}},
        "eos": [1],
        "bos": None,
    }
    assert not write_genai_config(tmp_path, manifest)
    assert not list(tmp_path.iterdir())


def test_heads_are_the_graphs_where_the_config_tells_them_by_layer(tmp_path: Path) -> None:
    """A Llama with 3 of 4 KV groups in every layer says so by layer, and 4 as a whole."""
    config = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    manifest = {
        "graph": {"kv_heads": [3, 3], "precisions": {"fp32": "onnx/model.onnx"}, "head_dim": 4, "layers": 2,
                  "vocab_size": 9},
        "bos": 1, "eos": [2], "context": 64, "domains": {},
    }  # fmt: skip
    assert write_genai_config(tmp_path, manifest)
    decoder = json.loads((tmp_path / "genai_config.json").read_text())["model"]["decoder"]
    assert (decoder["num_attention_heads"], decoder["num_key_value_heads"]) == (6, 3)


def test_a_merged_memory_is_in_every_graph(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["export", place / "recipe.yaml", "--out", place / "run", "--resume", "--merge", "law"]
    assert koff_prune(capsys, *command).code == 0
    merged = place / "run" / "bundle-law"
    answer = koff_prune(capsys, "verify", merged)
    assert answer.code == 0, answer.err
    whole = Runtime.open(place / "run" / "bundle", profile="portable")
    ids = whole.encode("the court")
    wanted = list(whole.generate_tokens(ids, "law", 16))
    profiles = whole.manifest.graph.profiles  # type: ignore[union-attr]
    assert {*profiles} in ({"portable"}, {"portable", "fused", "in_place"})
    for profile in profiles:
        assert list(Runtime.open(merged, profile=profile).generate_tokens(ids, None, 16)) == wanted, profile
    if "in_place" in profiles:
        (merged / "onnx/merged.onnx_adapter").write_bytes(b"another")
        with pytest.raises(KoffError, match=r"merged\.onnx_adapter"):
            Runtime.open(merged).logits(ids)
