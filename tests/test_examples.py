"""The scripts under examples/: what they say to a mistake. What they show is tested where it belongs."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path

import pytest
from run_helpers import Answer, mistake, recipe_of

import koff_prune as package

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    structure = {"units": ["ffn_neurons", "kv_groups"], "sparsity": 0.25}
    recipe = recipe_of(folder, structure=structure, export={"formats": ["safetensors", "onnx"]})
    package.apply(recipe, folder / "run")
    return folder


def run(script: str, *arguments: object) -> int:
    """Exit code of an example, run in this process."""
    if script == "run_in_genai.py" and importlib.util.find_spec("onnxruntime_genai") is None:
        pytest.skip("onnxruntime-genai is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        try:
            runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        except SystemExit as end:
            return 0 if end.code is None else end.code if isinstance(end.code, int) else 1
    return 0


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_missing_argument_is_told(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(script) == 2
    assert "the following arguments are required" in capsys.readouterr().err


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_is_not_there_is_told(
    script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    more = {"use_bundle.py": ("law", "the"), "run_in_genai.py": ("law", "the"), "ort_model.py": (),
            "run_on_device.py": ("the",), "compare_plans.py": ("fisher", "wanda"),
            "torch_pruning_script.py": ("nowhere.txt",)}[script]  # fmt: skip
    code = run(script, "nowhere", *more)
    mistake(Answer(code, *capsys.readouterr()), "nowhere")
    assert not list(tmp_path.iterdir())


def test_a_memory_that_is_not_there_is_told(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for script in ("use_bundle.py", "run_in_genai.py"):
        code = run(script, place / "run" / "bundle", "nope", "the court")
        mistake(Answer(code, *capsys.readouterr()), "nope", "law")


def test_plans_are_compared_by_every_kind_of_unit(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("compare_plans.py", place / "recipe.yaml", "fisher", "fisher") == 0
    out = capsys.readouterr().out
    assert "100.0% of the" in out and "ffn_neurons that fisher removes" in out and "kv_groups that" in out
    assert run("compare_plans.py", place / "recipe.yaml", "fisher", "koff") == 2


def test_a_bundle_answers_in_torch_and_on_a_device(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("use_bundle.py", place / "run" / "bundle", "law", "the court") == 0
    assert run("run_on_device.py", place / "run" / "bundle", "the court") == 0
    assert {"no memory", "law", "code"} <= {
        line.partition(":")[0] for line in capsys.readouterr().out.splitlines()
    }
