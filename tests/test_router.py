"""A memory picked by the prompt: the one under which it has the lowest loss, in torch and on a device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_helpers import tiny_config
from run_helpers import recipe_of

import koff_prune as package
from koff_export.cli import main as koff_run
from koff_export.router import choose, route
from koff_export.runtime import Runtime
from koff_prune import Router

PROMPTS = {"law": "the court shall hear of any party", "code": "def f x return if else ( ) :"}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("place")
    recipe = recipe_of(
        folder, tiny_config("qwen2", num_hidden_layers=2, tie_word_embeddings=True),
        learn={"tokens": 3072, "rates": {"lora": 0.02, "kv": 0.1}},
        export={"formats": ["safetensors", "onnx"]},
    )  # fmt: skip
    package.apply(recipe, folder / "run")
    return folder / "run" / "bundle"


def test_the_lowest_loss_wins_and_a_tie_goes_to_the_bare_backbone() -> None:
    assert choose(["a", "b"], {None: 3.0, "a": 2.0, "b": 1.0}.__getitem__).memory == "b"
    assert choose(["a"], lambda name: 1.0).memory is None
    assert choose([], lambda name: 1.0).losses == {"none": 1.0}


@pytest.mark.parametrize("name", PROMPTS)
def test_each_domains_prompt_picks_its_memory(bundle: Path, name: str) -> None:
    """Memories that were trained on unlike text tell it apart; torch and the device agree."""
    runtime = Runtime.open(bundle)
    device = route(runtime, runtime.encode(PROMPTS[name]))
    router = Router(bundle, torch.float32)
    here = router.choose(PROMPTS[name])
    assert device.memory == here.memory == name
    assert set(here.losses) == {"none", "law", "code"}
    for key, loss in here.losses.items():
        assert device.losses[key] == pytest.approx(loss, abs=1e-3)
    assert router.choose(PROMPTS[name]).losses == here.losses, "it is left as it was"


def test_one_token_tells_nothing(bundle: Path) -> None:
    runtime = Runtime.open(bundle)
    assert route(runtime, [5]).memory is None and Router(bundle).choose_tokens([5]).losses == {}


def test_a_memory_that_leaves_no_room_is_passed_over_in_torch_as_on_a_device(bundle: Path) -> None:
    """One token must fit behind the memory and the prompt; the bare backbone is held to the context alone."""
    runtime, router = Runtime.open(bundle), Router(bundle, torch.float32)
    context = router.manifest.context
    assert context is not None
    assert {told.kv_tokens for told in router.manifest.domains.values()} == {4}
    for behind, names in ((1, {"none", "law", "code"}), (0, {"none"}), (-1, {"none"})):
        prompt = [5] * (context - 4 - behind)
        here, device = router.choose_tokens(prompt), route(runtime, prompt)
        assert set(here.losses) == set(device.losses) == names


def test_koff_run_picks_for_each_prompt(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pick is told aside; the answer is the one of that memory."""

    def run(*options: str) -> tuple[int, str, str]:
        code = koff_run([str(bundle), "--max-new-tokens", "4", *options])
        return (code, *capsys.readouterr())

    code, answer, told = run("--memory", "auto", "--prompt", PROMPTS["code"])
    assert code == 0 and told == "memory: code\n"
    assert answer == run("--memory", "code", "--prompt", PROMPTS["code"])[1]
    lines = iter([PROMPTS["law"] + "\n", "/memory auto\n", PROMPTS["law"] + "\n", PROMPTS["code"] + "\n"])
    monkeypatch.setattr(
        "sys.stdin", type("Lines", (), {"isatty": lambda s: False, "__iter__": lambda s: lines})()
    )
    assert run()[2] == "memory: law\nmemory: code\n"
    code, answer, told = run("--memory", "auto", "--score", str(bundle / "README.md"))
    assert code == 2 and told.startswith("error: --memory auto") and answer == ""
