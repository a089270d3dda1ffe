"""A bundle made by `koff-prune apply`: verified, equal in torch and ONNX, and every tampering told."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hub_helpers import hub_snapshot
from model_helpers import tiny_config, token_ids
from peft import PeftModel
from run_helpers import Answer, koff_prune, mistake, recipe_of
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from koff_export.bundle import write_manifest
from koff_export.cli import main as koff_run
from koff_export.errors import KoffError
from koff_export.files import read_json
from koff_export.router import route
from koff_export.runtime import Runtime
from koff_export.ship import ship
from koff_prune import apply, load_backbone, load_bundle
from koff_prune.plan import Plan
from koff_prune.router import Router

MEMORIES = (None, "law", "code")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("place")
    recipe = recipe_of(
        folder,
        tiny_config("qwen2", num_hidden_layers=2, tie_word_embeddings=True, intermediate_size=256),
        structure={
            "units": ["ffn_neurons", "kv_groups"],
            "sparsity": 0.2,
            "of": "blocks",
            "widths": "per_layer",
        },
        learn={"rates": {"lora": 0.05, "kv": 0.2}},  # so that memories say something
        export={"formats": ["safetensors", "onnx"], "onnx": {"precision": ["fp32", "int8"]}},
    )
    import koff_prune as package

    package.apply(recipe, folder / "run")
    return folder


@pytest.fixture(scope="module")
def bundle(place: Path) -> Path:
    return place / "run" / "bundle"


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


def test_verify_passes(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = koff_prune(capsys, "verify", bundle)
    assert answer.code == 0, answer.err
    told = json.loads(answer.out)
    assert told["memories"] == {"law": "lora+kv", "code": "lora+kv"}
    assert set(told["onnx_logits"]) == {"none", "law", "code"}
    assert all(worst < 1e-3 for worst in told["onnx_logits"].values())
    assert told["sparsity"] == pytest.approx(0.2, abs=0.002)


def test_what_is_saved_in_few_bits_is_compared_in_float32(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of(
        tmp_path,
        model={"dtype": "bfloat16"},
        learn={"rates": {"lora": 0.05, "kv": 0.2}},
        export={"formats": ["safetensors", "onnx"]},
    )
    assert koff_prune(capsys, "apply", recipe, "--out", tmp_path / "run").code == 0
    assert next(load_backbone(tmp_path / "run/bundle").parameters()).dtype == torch.bfloat16
    answer = koff_prune(capsys, "verify", tmp_path / "run/bundle")
    assert answer.code == 0, answer.err
    assert max(json.loads(answer.out)["onnx_logits"].values()) < 1e-4


def test_the_manifest_tells_what_few_bits_cost(bundle: Path, place: Path) -> None:
    told = read_json(bundle / "koff.json")["numerics"]["precision"]
    assert set(told) == {"fp32", "int8", "int8_dynamic"}
    assert told["int8"]["kl"] < told["int8_dynamic"]["kl"] < 5e-2
    assert told["fp32"]["kl"] == 0 < told["int8"]["kl"] < 1e-2
    total = count = 0.0
    for name in ("law", "code"):
        lines = (place / "run" / "domains" / f"{name}.heldout.jsonl").read_text().splitlines()
        nats, tokens = Runtime.open(bundle, "int8").score([json.loads(lines[0])["tokens"]], name)
        total, count = total + nats, count + tokens
    assert told["int8"]["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)


def test_the_backbone_is_what_plan_json_says(bundle: Path) -> None:
    plan = Plan.load(bundle / "plan.json")
    model = load_backbone(bundle)
    assert sum(p.numel() for p in model.parameters()) == plan.parameters["slim"]
    for layer, kept in zip(model.model.layers, plan.layers, strict=True):
        assert layer.mlp.up_proj.out_features == len(kept["ffn_neurons"])
        assert layer.self_attn.k_proj.out_features == 8 * len(kept["kv_groups"])
    manifest = read_json(bundle / "koff.json")
    assert manifest["format"] == 1 and manifest["plan"] == plan.digest
    assert {d["kv_tokens"] for d in manifest["domains"].values()} == {4}
    int8 = "onnx/model_int8.onnx"
    wanted = {"fp32": "onnx/model.onnx", "int8": int8, "int8_dynamic": int8}
    assert manifest["graph"]["precisions"] == wanted
    card = (bundle / "README.md").read_text()
    assert "# model, " in card and "Perplexity" in card and "| law |" in card
    assert "base_model" not in card, "a local path is no hub id"
    for path in bundle.rglob("*"):
        assert path.is_dir() or str(place).encode() not in path.read_bytes(), f"{path} tells a local path"
    assert manifest["model"]["source"] == "model"


@pytest.mark.parametrize("memory", MEMORIES)
def test_koff_run_scores_what_the_report_says(
    place: Path, memory: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = read_json(place / "run" / "report.json")["rows"]
    row = next(r for r in rows if r["method"] == "koff" and (r["memory"] == "none") == (memory is None))
    for domain in ("law", "code") if memory is None else (memory,):
        lines = place / "run" / "domains" / f"{domain}.heldout.jsonl"
        options = ["--score", str(lines), "--json", *(["--memory", memory] if memory else [])]
        capsys.readouterr()
        assert koff_run([str(place / "run" / "bundle"), *options]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["perplexity"] == pytest.approx(row["perplexity"][domain], rel=1e-3)
        assert found["windows"] == 8


def test_weights_may_stay_on_the_disk(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [str(place / "run/bundle"), "--memory", "law", "--json", "--score"]
    command.append(str(place / "run/domains/law.heldout.jsonl"))
    found = []
    for option in ([], ["--mapped"]):
        assert koff_run([*command, *option]) == 0
        found.append(json.loads(capsys.readouterr().out)["perplexity"])
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert koff_run([*command, "--mapped", "--precision", "int8"]) == 2
    assert "mapped: int8" in capsys.readouterr().err


@pytest.mark.parametrize("memory", MEMORIES)
def test_greedy_tokens_and_logits_are_torchs(bundle: Path, memory: str | None) -> None:
    runtime = Runtime.open(bundle)
    model = load_bundle(bundle, memory)
    for seed in range(3):
        ids = token_ids(1, 3 + seed, seed=seed)
        with torch.no_grad():
            wanted = model.generate(
                ids, max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=1
            )
            logits = model(input_ids=ids, use_cache=False).logits[0].numpy()
        assert np.abs(runtime.logits(ids[0].tolist(), memory) - logits).max() < 1e-3
        assert greedy(runtime, ids[0].tolist(), memory, 16) == wanted[0].tolist()


def greedy(runtime: Runtime, tokens: list[int], memory: str | None, count: int) -> list[int]:
    for _ in range(count):
        tokens = [*tokens, int(runtime.logits(tokens, memory)[-1].argmax())]
    return tokens


def test_memories_differ_and_a_batch_generates(bundle: Path) -> None:
    ids = token_ids(2, 6)
    found = []
    for memory in MEMORIES:
        model = load_bundle(bundle, memory)
        with torch.no_grad():
            found.append(model(input_ids=ids, use_cache=False).logits)
            assert model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None).shape == (2, 9)
    for n in range(3):
        assert (found[n] - found[n - 1]).abs().max() > 1e-2


def test_peft_opens_a_memorys_folder(bundle: Path, place: Path) -> None:
    dense = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    with pytest.raises(RuntimeError, match="size mismatch"):  # it was cut to another shape
        PeftModel.from_pretrained(dense, bundle / "memories" / "law")
    opened = PeftModel.from_pretrained(load_backbone(bundle), bundle / "memories" / "law")
    assert any("lora_B" in n for n, _ in opened.named_parameters())


@pytest.mark.parametrize("shape", ["llama", "qwen3"])
def test_stock_programs_open_a_uniform_bundle(tmp_path: Path, shape: str) -> None:
    """transformers opens the backbone and PEFT a memory of LoRA alone: the same logits as `load_bundle`'s."""
    recipe = recipe_of(
        tmp_path,
        tiny_config(shape, num_hidden_layers=2),
        structure={"widths": "uniform"},
        memory={"kv": "none"},
    )
    folder = apply(recipe, tmp_path / "run") / "bundle"
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    ids = token_ids(2, 9)
    with torch.no_grad():
        bare = stock(input_ids=ids).logits
        assert torch.equal(bare, load_bundle(folder)(input_ids=ids).logits)
        found = PeftModel.from_pretrained(stock, folder / "memories" / "law")(input_ids=ids).logits
        assert (found - load_bundle(folder, "law")(input_ids=ids).logits).abs().max() < 1e-5
        assert (found - bare).abs().max() > 1e-3
    assert AutoTokenizer.from_pretrained(folder, local_files_only=True)("any court")["input_ids"]


def test_an_unknown_memory_is_told(bundle: Path) -> None:
    with pytest.raises(KoffError, match="memory 'sea': not in .*; it has law, code"):
        load_bundle(bundle, "sea")


def stamped(folder: Path, **changes: Any) -> None:
    """Writes the manifest again, checksums and all, as somebody who knows the format would."""
    manifest = {k: v for k, v in read_json(folder / "koff.json").items() if k not in ("format", "files")}
    write_manifest(folder, {**manifest, **changes})


def edit_plan(folder: Path) -> None:
    data = read_json(folder / "plan.json")
    data["layers"][0]["ffn_neurons"] = data["layers"][0]["ffn_neurons"][1:]
    (folder / "plan.json").write_text(json.dumps(data))


def other_plan(folder: Path) -> None:
    data = read_json(folder / "plan.json")
    data["layers"][0]["ffn_neurons"] = data["layers"][0]["ffn_neurons"][1:]
    fields = {k: v for k, v in data.items() if k not in ("format", "digest")}
    Plan(**fields).save(folder / "plan.json")
    stamped(folder)


def edit_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))


def stamped_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    state = load_file(file)
    state["model.norm.weight"] = state["model.norm.weight"] * 1.5
    save_file(state, file, metadata={"format": "pt"})
    stamped(folder)


def edit_memory(folder: Path) -> None:
    file = folder / "memories" / "law" / "kv.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def foreign_memory(folder: Path) -> None:
    file = folder / "memories" / "law" / "kv.safetensors"
    save_file({k: t[:, :, :4].contiguous() for k, t in load_file(file).items()}, file)
    stamped(folder)


def swapped_adapter(folder: Path) -> None:
    adapters = folder / "onnx" / "memories"
    (adapters / "law.onnx_adapter").write_bytes((adapters / "code.onnx_adapter").read_bytes())
    stamped(folder)


def cut_adapter(folder: Path) -> None:
    file = folder / "onnx" / "memories" / "law.onnx_adapter"
    file.write_bytes(file.read_bytes()[:100])
    stamped(folder)


def newer_format(folder: Path) -> None:
    data = read_json(folder / "koff.json")
    (folder / "koff.json").write_text(json.dumps({**data, "format": 2}))


TAMPERINGS: list[tuple[Callable[[Path], object], str]] = [
    (edit_plan, "plan.json"),
    (other_plan, "plan.json is not the plan that koff.json names"),
    (edit_weights, "model.safetensors"),
    (stamped_weights, "ONNX differs from torch"),
    (edit_memory, "kv.safetensors"),
    (foreign_memory, "kv|KV"),
    (swapped_adapter, "with memory law ONNX differs from torch"),
    (cut_adapter, "law"),
    (newer_format, "format"),
    (lambda f: (f / "plan.json").unlink(), "plan.json"),
    (lambda f: (f / "koff.json").write_text("{"), "koff.json"),
    (lambda f: shutil.rmtree(f / "onnx" / "memories"), "onnx"),
    (lambda f: (f / "extra.pkl").write_bytes(b"x"), "extra.pkl"),
    (lambda f: stamped(f, parameters={"dense": 1, "slim": 1}, plan="0"), "plan.json"),
]


@pytest.mark.parametrize(
    ("tamper", "says"), TAMPERINGS, ids=[f.__name__ + str(n) for n, (f, _) in enumerate(TAMPERINGS)]
)
def test_tampering_is_one_sentence(
    copy: Path, tamper: Callable[[Path], object], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tamper(copy)
    one_sentence(koff_prune(capsys, "verify", copy), says)


def one_sentence(answer: Answer, says: str) -> None:
    import re

    assert answer.code == 2, answer.err
    lines = [line for line in answer.err.splitlines() if "Loading weights" not in line]
    assert len(lines) == 1 and lines[0].startswith("error: "), answer.err
    assert re.search(says, lines[0]), lines[0]
    assert "Traceback" not in answer.err and answer.out == ""


def test_a_bundle_is_verified_out_of_the_hubs_cache(copy: Path, tmp_path: Path) -> None:
    hub_snapshot(copy, tmp_path / "hub")
    cache = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def python(*arguments: str) -> str:
        command, env = [sys.executable, *arguments], {**os.environ, **cache}
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert json.loads(python("-m", "koff_prune", "verify", "hf://someone/slim"))["memories"]
    python("-c", "import koff_prune; koff_prune.load_bundle('hf://someone/slim', memory='law')")


def test_what_is_no_bundle_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one_sentence(koff_prune(capsys, "verify", tmp_path / "nothing"), "nothing")
    one_sentence(koff_prune(capsys, "verify", tmp_path), "koff.json")
    with pytest.raises(KoffError):
        load_bundle(tmp_path)


def test_exporting_other_formats_again(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`export` is no part of what a run is: the same run exports anew."""
    shutil.copytree(place / "run", place / "plain")
    answer = koff_prune(
        capsys, "export", place / "recipe.yaml", "--out", place / "plain", "--resume",
        "--set", "export.formats=[safetensors]",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    manifest = read_json(place / "plain" / "bundle" / "koff.json")
    assert manifest["graph"] is None and not (place / "plain" / "bundle" / "onnx").exists()
    assert koff_prune(capsys, "verify", place / "plain" / "bundle").code == 0


def test_an_answer_ends_where_torchs_ends(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model of conversations often ends its turns with a token that config.json does not name."""
    run = place / "turns"
    shutil.copytree(place / "run", run)
    path = run / "backbone" / "generation_config.json"
    told = read_json(path) if path.exists() else {}
    own = read_json(run / "bundle" / "koff.json")["eos"]
    path.write_text(json.dumps({**told, "eos_token_id": [*own, 105]}))
    (run / "backbone" / "complete").unlink()  # on purpose
    export = ("export", place / "recipe.yaml", "--out", run, "--resume")
    assert koff_prune(capsys, *export, "--set", "export.formats=[safetensors]").code == 0
    assert read_json(run / "bundle" / "koff.json")["eos"] == [*own, 105]


def test_a_bundle_whose_graphs_an_older_export_made_is_made_anew(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(place / "run", place / "older")
    manifest = place / "older" / "bundle" / "koff.json"
    export = ("export", place / "recipe.yaml", "--out", place / "older", "--resume")
    made = read_json(manifest)
    for graphs, anew in ((made["numerics"]["asked"]["graphs"], False), (1, True)):
        made["numerics"]["asked"]["graphs"] = graphs
        manifest.write_text(json.dumps(made))
        before = manifest.stat().st_ino
        assert koff_prune(capsys, *export).code == 0
        assert (manifest.stat().st_ino != before) == anew
    assert koff_prune(capsys, "verify", place / "older" / "bundle").code == 0


def test_one_memory_merged_computes_the_same_without_slots(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = koff_prune(
        capsys, "export", place / "recipe.yaml", "--out", place / "run", "--resume", "--merge", "law"
    )
    assert answer.code == 0, answer.err
    merged = place / "run" / "bundle-law"
    assert koff_prune(capsys, "verify", merged).code == 0
    card = (merged / "README.md").read_text()
    assert "with the memory of law in it" in card and "code" not in card.split("```")[0]
    assert "memories off" not in card, "nobody can take it off"
    ids = token_ids(20).tolist()
    whole, baked = Runtime.open(place / "run" / "bundle"), Runtime.open(merged)
    assert baked.memories == []
    assert np.abs(whole.logits(ids, "law") - baked.logits(ids)).max() < 1e-3
    assert np.abs(whole.logits(ids) - baked.logits(ids)).max() > 1e-2
    assert greedy(baked, ids, None, 8) == greedy(whole, ids, "law", 8)
    with torch.no_grad():
        torch_says = load_bundle(merged)(input_ids=torch.tensor([ids])).logits[0].numpy()
    assert np.abs(torch_says - baked.logits(ids)).max() < 1e-3
    here, there = Router(merged, torch.float32).choose_tokens(ids), route(baked, ids)  # nothing to pick
    assert here.memory is there.memory is None and set(here.losses) == set(there.losses) == {"none"}
    assert here.losses["none"] == pytest.approx(there.losses["none"], abs=1e-3)
    assert read_json(merged / "koff.json")["numerics"]["precision"]["int8"]["kl"] > 0
    ship(merged, tmp_path / "part", "fp32", memories=[])  # what is merged comes along
    assert greedy(Runtime.open(tmp_path / "part"), ids, None, 8) == greedy(whole, ids, "law", 8)
    # it takes no other memory
    told = koff_prune(capsys, "memory", "add", merged, "--name", "more", "--data", place / "law")
    one_sentence(told, "exported without --merge")


def test_a_lora_alone_that_is_merged_is_shipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_of(tmp_path, memory={"kv": "none"}, export={"formats": ["safetensors", "onnx"]})
    assert koff_prune(capsys, "apply", recipe, "--out", tmp_path / "run").code == 0
    merging = ("export", recipe, "--out", tmp_path / "run", "--resume", "--merge", "law")
    assert koff_prune(capsys, *merging).code == 0
    merged, ids = tmp_path / "run" / "bundle-law", token_ids(20).tolist()
    answer = koff_prune(capsys, "ship", merged, "--precision", "fp32", "--out", tmp_path / "part")
    assert answer.code == 0, answer.err
    assert np.array_equal(Runtime.open(tmp_path / "part").logits(ids), Runtime.open(merged).logits(ids))


def test_a_cast_leaves_the_rotation_as_it_was(bundle: Path) -> None:
    """Frequencies in 8 bits turn the fast pairs by a radian and more at position 1,000."""
    exact, cast = load_bundle(bundle, "law"), load_bundle(bundle, "law", torch.bfloat16)
    assert cast.dtype == torch.bfloat16
    assert torch.equal(cast.model.rotary_emb.inv_freq, exact.model.rotary_emb.inv_freq)


def test_a_bundle_in_torch_moves_with_its_memory(bundle: Path) -> None:
    moved, ids = load_bundle(bundle, "law").to("meta"), token_ids(1, 9)
    assert moved(input_ids=ids.to("meta")).logits.device.type == "meta"


def test_a_licence_goes_with_the_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_of(tmp_path, export={"formats": ["safetensors"]})
    for name in ("LICENSE", "NOTICE.txt"):
        (tmp_path / "model" / name).write_text(f"{name} of the weights")
    assert koff_prune(capsys, "apply", recipe, "--out", tmp_path / "run").code == 0
    bundle = tmp_path / "run" / "bundle"
    for name in ("LICENSE", "NOTICE.txt"):
        assert (bundle / name).read_text() == f"{name} of the weights"
    assert koff_prune(capsys, "verify", bundle).code == 0


def test_a_tokenizer_with_several_chat_templates_is_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.chat_template = {"default": "{{ messages[0].content }}", "tool_use": "tools"}
    tokenizer.save_pretrained(tmp_path / "model")
    answer = koff_prune(capsys, "apply", recipe, "--out", tmp_path / "run")
    assert answer.code == 0, answer.err
    bundle = tmp_path / "run" / "bundle"
    assert koff_prune(capsys, "verify", bundle).code == 0
    assert AutoTokenizer.from_pretrained(bundle).chat_template == tokenizer.chat_template


def test_a_graph_that_differs_from_torch_is_not_exported(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(place / "run", tmp_path / "run"))
    shutil.rmtree(run / "bundle")
    monkeypatch.setattr("koff_prune.numerics.TOLERANCE", -1.0)  # no difference is small enough
    told = koff_prune(capsys, "export", place / "recipe.yaml", "--out", run, "--resume")
    mistake(told, "ONNX differs from torch by", "leave onnx out of export.formats")
    assert not (run / "bundle").exists()


def test_a_domain_that_is_not_there_is_not_merged(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = koff_prune(
        capsys, "export", place / "recipe.yaml", "--out", place / "run", "--resume", "--merge", "art"
    )
    one_sentence(answer, "it has law, code")


EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize(
    ("script", "arguments", "expected"),
    [
        ("use_bundle.py", ("{bundle}", "law", "the"), "the"),
        ("run_on_device.py", ("{bundle}", "the"), "no memory: "),
        ("compare_plans.py", ("{recipe}", "fisher", "fisher"), "100.0% of the"),
    ],
)
def test_the_examples_run(place: Path, script: str, arguments: tuple[str, ...], expected: str) -> None:
    recipe = next(place.glob("*.yaml"))
    filled = [a.format(bundle=place / "run" / "bundle", recipe=recipe) for a in arguments]
    done = subprocess.run(
        [sys.executable, EXAMPLES / script, *filled], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout


def test_a_part_is_shipped(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle, part = place / "run/bundle", tmp_path / "part"
    command = ("ship", bundle, "--precision", "int8_dynamic", "--memory", "law", "--out", part)
    assert koff_prune(capsys, *command).code == 0
    scored = ["--memory", "law", "--json", "--score", str(place / "run/domains/law.heldout.jsonl")]
    told = []
    for folder, options in ((part, []), (bundle, ["--precision", "int8_dynamic"])):
        assert koff_run([str(folder), *options, *scored]) == 0
        told.append(json.loads(capsys.readouterr().out))
    assert told[0] == told[1] and told[0]["precision"] == "int8_dynamic"
    mistake(koff_prune(capsys, *command), "exists already")
    mistake(koff_prune(capsys, "memory", "pack", part, "law", "-o", tmp_path / "law.koffmem"), "shipped")
    assert not (tmp_path / "law.koffmem").exists()


@pytest.mark.parametrize(
    ("config", "onnx", "says"),
    [
        ({"hidden_act": "mish"}, {}, "not mish; leave onnx out"),
        ({"hidden_act": "gelu"}, {"profiles": ["portable", "fused"]}, "silu, not gelu; leave fused out"),
    ],
)
def test_what_no_graph_holds_is_told_before_anything_is_learned(
    config: dict[str, Any],
    onnx: dict[str, Any],
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    export = {"formats": ["safetensors", "onnx"], "onnx": onnx}
    recipe = recipe_of(tmp_path, tiny_config(head_dim=16, **config), export=export)
    mistake(koff_prune(capsys, "export", recipe, "--out", tmp_path / "run"), says)
    assert not (tmp_path / "run" / "checkpoints").exists()
