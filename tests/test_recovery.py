"""What all domains recover together: trained beside their memories, and part of the backbone in a bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_helpers import logits, tiny_config, tiny_memory, tiny_model, token_ids
from run_helpers import koff_prune, mistake, recipe_of
from safetensors.torch import load_file

import koff_prune as package
from koff_export.cli import main as koff_run
from koff_export.files import read_json
from koff_prune import load_backbone, load_bundle
from koff_prune.learn import LearnTrainer
from koff_prune.memory import RECOVERY, Memories, load_memory
from koff_prune.recipe import Lora

IDS = token_ids(2, 12)


def around(recover: Lora | None, **parts: bool) -> Memories:
    """Every LoRA random, those of domains and the shared one."""
    prefills = {"law": token_ids(5), "code": token_ids(5, seed=1)}
    memories = Memories(tiny_model(), tiny_memory(**parts), prefills, 0, recover)
    generator = torch.Generator().manual_seed(1)
    for name in memories.names:
        parts_of = memories.tensors(name)
        memories.load(
            name,
            {
                part: {k: 0.3 * torch.randn(t.shape, generator=generator) for k, t in tensors.items()}
                for part, tensors in parts_of.items()
            },
        )
    return memories


@pytest.mark.parametrize("parts", [{}, {"lora": False}, {"kv": False}], ids=["both", "kv", "lora"])
def test_it_stays_attached_whichever_memory_is(parts: dict[str, bool]) -> None:
    """Without it, the other memories and the bare model compute what they would alone."""
    with_it, dense = around(Lora(rank=2, alpha=4, target=["q_proj", "down_proj"]), **parts), tiny_model()
    with torch.no_grad():
        plain = dense(input_ids=IDS).logits
        with with_it.off():
            assert torch.equal(with_it.base(input_ids=IDS, use_cache=False).logits, plain)
    bare = logits(with_it, IDS, None)
    assert (bare - plain).abs().max() > 1e-3
    law = logits(with_it, IDS, "law")
    folded = around(None, **parts)
    for name in folded.domains:
        folded.load(name, with_it.tensors(name))
    for key, a in with_it.tensors(RECOVERY)["lora"].items():
        if ".lora_A." in key:
            module = key.removeprefix("base_model.model.").split(".lora_A.")[0]
            b = with_it.tensors(RECOVERY)["lora"][key.replace(".lora_A.", ".lora_B.")]
            layer: Any = folded.base.get_submodule(module)
            layer.weight.data += 4 / 2 * b @ a
    torch.testing.assert_close(logits(folded, IDS, None), bare, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(folded, IDS, "law"), law, rtol=1e-4, atol=1e-4)
    own = [*with_it.lora_parameters(), *with_it.kv_parameters()]
    assert all(p.requires_grad for p in own)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return recipe_of(
        tmp_path_factory.mktemp("place"),
        tiny_config("qwen2", num_hidden_layers=2, tie_word_embeddings=True, intermediate_size=256),
        structure={"units": ["ffn_neurons", "kv_groups"], "sparsity": 0.2, "of": "blocks"},
        cut={"compensate": "least_squares", "recover": {"rank": 4, "alpha": 8}},
        learn={"rates": {"lora": 0.05, "kv": 0.2}},
        compare=[{"method": "dense", "trained_with": "same"}, {"method": "wanda", "trained_with": "same"}],
        export={"formats": ["safetensors", "onnx"]},
    )


@pytest.fixture(scope="module")
def run(recipe: Path) -> Path:
    package.apply(recipe, recipe.parent / "run")
    return recipe.parent / "run"


def rows_of(run: Path) -> list[dict[str, Any]]:
    return list(read_json(run / "report.json")["rows"])


@pytest.mark.parametrize("memory", [None, "law", "code"])
def test_a_bundle_scores_what_the_report_says(
    run: Path, memory: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """The report's rows have it beside the backbone, the bundle in its weights."""
    row = next(
        r for r in rows_of(run) if r["method"] == "koff" and (r["memory"] == "none") == (memory is None)
    )
    domain = memory or "law"
    lines = run / "domains" / f"{domain}.heldout.jsonl"
    capsys.readouterr()
    options = ["--score", str(lines), "--json", *(["--memory", memory] if memory else [])]
    assert koff_run([str(run / "bundle"), *options]) == 0
    assert json.loads(capsys.readouterr().out)["perplexity"] == pytest.approx(
        row["perplexity"][domain], rel=1e-3
    )


def test_it_is_in_the_backbone_and_no_memory_of_a_bundle(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert koff_prune(capsys, "verify", run / "bundle").code == 0
    manifest = read_json(run / "bundle" / "koff.json")
    assert list(manifest["domains"]) == ["law", "code"]
    assert not list((run / "bundle").rglob(f"*{RECOVERY}*"))
    assert "recovered together" in (run / "bundle" / "README.md").read_text()
    before = load_file(run / "backbone" / "model.safetensors")
    after = load_file(run / "bundle" / "model.safetensors")
    tensors, scale = load_memory(run / "memories" / RECOVERY)["lora"], 8 / 4
    for name, weight in before.items():
        module = "base_model.model." + name.removesuffix(".weight")
        if f"{module}.lora_A.weight" in tensors:
            update = tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]
            assert update.abs().max() > 0
            weight = weight + scale * update
        torch.testing.assert_close(after[name], weight, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        bare = load_backbone(run / "bundle")(input_ids=IDS).logits
        assert (load_bundle(run / "bundle", memory="law")(input_ids=IDS).logits - bare).abs().max() > 1e-3


def test_a_bundles_backbone_recovers_no_more(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "sea.txt").write_text("any return of court\n" * 200)
    more = koff_prune(
        capsys, "memory", "add", run / "bundle", "--name", "sea", "--data", tmp_path / "sea.txt",
        "--set", "cut.recover.rank=2",
    )  # fmt: skip
    mistake(more, "cut.recover", "does not change")


def test_rivals_and_the_ceiling_have_it_too(run: Path) -> None:
    for row in ("dense_trained-lora+kv_none", "wanda_global_trained-lora+kv_least_squares"):
        assert (run / "rows" / row / "memories" / RECOVERY).is_dir()
    dense, off = (r for r in rows_of(run) if r["method"] == "dense" and r["memory"] == "none")
    assert dense["trained_with"] is None and off["trained_with"] == "lora+kv"
    assert off["perplexity"] != dense["perplexity"]
    told = read_json(run / "report.json")["offloaded"]["nats"]["worth_to_dense"]["value"]
    ceiling = next(r for r in rows_of(run) if r["method"] == "dense" and r["memory"] != "none")
    worth = torch.tensor(off["perplexity"]["gmean"] / ceiling["perplexity"]["gmean"]).log()
    assert told == pytest.approx(float(worth), abs=1e-3), "memories' worth, not what all domains recover"


def test_a_run_that_is_stopped_goes_on_to_the_same(
    recipe: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = LearnTrainer._save_checkpoint

    def stops(self: LearnTrainer, *args: Any, **kwargs: Any) -> None:
        save(self, *args, **kwargs)
        raise RuntimeError("stopped behind a checkpoint")

    for stage in ("learn", "cut"):
        with monkeypatch.context() as patch:
            patch.setattr(LearnTrainer, "_save_checkpoint", stops)
            with pytest.raises(RuntimeError, match="stopped"):
                package.apply(recipe, tmp_path / "run", resume=True)
        if stage == "learn":
            package.learn(recipe, tmp_path / "run", resume=True)
    package.cut(recipe, tmp_path / "run", resume=True)
    for name in ("law", RECOVERY):
        for part, tensors in load_memory(run / "memories" / name).items():
            again = load_memory(tmp_path / "run" / "memories" / name)[part]
            assert all(torch.equal(tensors[k], again[k]) for k in tensors)


def test_without_memories_there_is_nothing_to_train_it_beside(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing = ("--set", "memory.lora=none", "--set", "memory.kv=none", "--set", "learn.settle_tokens=0")
    mistake(koff_prune(capsys, "plan", recipe, "--dry-run", *nothing), "cut.recover", "give a memory")
    shown = koff_prune(capsys, "plan", recipe, "--dry-run", "--devices", "1")
    assert shown.code == 0 and "recovery" in shown.out
    without = koff_prune(capsys, "plan", recipe, "--dry-run", "--devices", "1", "--set", "cut.recover=none")
    assert without.code == 0 and "recovery" not in without.out
