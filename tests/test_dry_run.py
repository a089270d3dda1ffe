"""`plan --dry-run`: what a recipe would do, told from a config.json alone and at once."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from run_helpers import koff_prune, mistake, recipe_of


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("place")
    recipe_of(folder)
    return folder


def test_dry_run_needs_a_config_alone(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_bytes((place / "model" / "config.json").read_bytes())
    recipe = yaml.safe_load((place / "recipe.yaml").read_text())
    recipe["model"] = {"source": "some/model", "config": "config.json"}
    recipe["domains"] = {"law": {"source": "not-here-yet.txt"}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    answer = koff_prune(capsys, "plan", "--dry-run", tmp_path / "recipe.yaml")
    assert answer.code == 0, answer.err
    for word in ("ffn_neurons", "kv_groups (not pruned)", "dense model", "backbone", "one memory", "RAM"):
        assert word in answer.out, word
    assert "not here yet: " in answer.out and "not-here-yet.txt" in answer.out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "recipe.yaml"]
    answer = koff_prune(
        capsys, "plan", "--dry-run", tmp_path / "recipe.yaml", "--set", "structure.sparsity=0.9"
    )
    mistake(answer, "at most 0.")


LARGE = sorted((Path(__file__).parents[1] / "recipes").glob("*/languages.yaml"))


@pytest.mark.parametrize("recipe", LARGE, ids=lambda p: p.parent.name)
def test_dry_run_tells_what_devices_hold(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The parts add up, the dense model is whole everywhere, and a share of the batch is all that shrinks."""
    found = {}
    for devices in (1, 4, 8):
        answer = koff_prune(capsys, "plan", "--dry-run", recipe, "--devices", devices, "--tflops", 50)
        assert answer.code == 0, answer.err
        sizes = {name: float(size) for size, name in re.findall(r"([\d.]+) GiB ([a-z' ]+):", answer.out)}
        whole = re.search(rf"([\d.]+) GiB on each of {devices}", answer.out)
        rate = re.search(rf"{devices} x 50 TFLOP/s / that = ([\d,]+) tokens/s", answer.out)
        assert whole and rate
        host, scoring = (
            sizes.pop("in the host's memory while scoring"),
            sizes.pop("on each before learning and while evaluating"),
        )
        assert scoring == sizes["dense model"]
        assert sum(sizes.values()) == pytest.approx(float(whole[1]), abs=0.05) and host > 0
        assert re.search(r"tokens in [1-9][\d.,]* (seconds|minutes|hours)", answer.out)
        assert "unproven" in answer.out and "do not divide" not in answer.out
        found[devices] = (sizes, int(rate[1].replace(",", "")))
    parameters = re.search(r"dense model +([\d,]+) parameters", answer.out)
    assert parameters is not None
    weights = int(parameters[1].replace(",", "")) * 2 / 2**30  # bfloat16
    one, eight = found[1][0], found[8][0]
    assert one["dense model"] == eight["dense model"] == pytest.approx(weights, abs=0.01)
    assert eight["activations"] == pytest.approx(one["activations"] / 8, abs=0.01)
    assert {k: v for k, v in one.items() if k != "activations"} == {
        k: v for k, v in eight.items() if k != "activations"
    }
    assert found[8][1] == pytest.approx(8 * found[1][1], rel=1e-3)
    answer = koff_prune(capsys, "plan", "--dry-run", recipe, "--devices", 8, "--shard")
    shared = float(re.findall(r"([\d.]+) GiB dense model:", answer.out)[0])
    assert weights / 8 < shared < weights / 2
    packed = koff_prune(capsys, "plan", "--dry-run", recipe, "--devices", 1, "--set", "learn.base=nf4")
    assert float(re.findall(r"([\d.]+) GiB dense model:", packed.out)[0]) < weights / 2
    bare = koff_prune(capsys, "plan", "--dry-run", recipe, "--devices", 8, "--set", "cut.compensate=none")
    assert f"{host:.2f} GiB in the host's memory" in bare.out, "scoring collects them all the same"
    answer = koff_prune(capsys, "plan", "--dry-run", recipe, "--devices", 3)
    assert "do not divide over 3" in answer.out
    answer = koff_prune(capsys, "plan", "--dry-run", recipe, "--shard")
    assert answer.code == 2 and "give their number" in answer.err
    answer = koff_prune(
        capsys, "plan", "--dry-run", recipe, "--devices", 2, "--shard", "--set", "learn.base=nf4"
    )
    assert answer.code == 2 and "learn.base: nf4" in answer.err


def test_dry_run_imports_nothing_heavy() -> None:
    """In under five seconds, on any machine: most of the time would go into importing torch."""
    code = (
        "import sys; from koff_prune.cli import main\n"
        f"sys.argv = ['koff-prune', 'plan', '--dry-run', {str(LARGE[0])!r}, '--devices', '8']\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'torch_pruning', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize(
    ("config", "kind", "says"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "onnx", "cannot hold the rotation dynamic"),
        ({"hidden_act": "relu2"}, "onnx", "not relu2; leave onnx out"),
        ({"model_type": "qwen3"}, "gguf", "set structure.widths: uniform, or leave gguf out"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "gguf", "rope scaling 'yarn'"),
        ({"head_dim": 8}, "onnx", "wants heads of a multiple of 16, not of 8; leave fused out"),
    ],
)
def test_dry_run_knows_what_a_format_cannot_hold(
    place: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    config: dict[str, object],
    kind: str,
    says: str,
) -> None:
    """From a config.json as it came, of whatever age; in the words in which learning tells."""
    sizes = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "head_dim": 16,
             "hidden_act": "silu", "max_position_embeddings": 512}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    changes = [
        f"model.source={tmp_path}",
        f"export.formats=[safetensors, {kind}]",
        "export.onnx.profiles=[portable, fused]",
    ]
    command = ["plan", "--dry-run", place / "recipe.yaml", *(part for c in changes for part in ("--set", c))]
    answer = koff_prune(capsys, *command)
    assert answer.code == 0, answer.err
    (tmp_path / "config.json").write_text(json.dumps({**sizes, **config}))
    mistake(koff_prune(capsys, *command), says)


def test_dry_run_refuses_tokens_that_make_no_step(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--dry-run", place / "recipe.yaml", "--set", "learn.tokens=1"]
    mistake(koff_prune(capsys, *command), "learn.tokens: 1 make no step")


def test_devices_belong_to_a_dry_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mistake(koff_prune(capsys, "plan", place / "recipe.yaml", "--devices", 2), "--dry-run")


def test_dry_run_counts_one_memory_rightly(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from model_helpers import tiny_model

    from koff_prune.memory import Memories
    from koff_prune.needs import dry_plan, memory_parameters
    from koff_prune.reading import load_recipe

    recipe = load_recipe(place / "recipe.yaml")
    found = dry_plan(recipe)
    model = tiny_model(num_hidden_layers=2)
    full = Memories(model, recipe.memory, {"law": torch.arange(4)}, 0).count("law")
    removed = 96 - sum(found["plan"].widths_of("ffn_neurons"))
    assert memory_parameters(recipe, found["units"], found["plan"]) == full - removed * 2 * 3
