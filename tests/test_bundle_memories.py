"""Memories of a finished bundle: added, shipped alone, taken out; the backbone does not change by a byte."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_helpers import tiny_config, token_ids
from run_helpers import koff_prune, mistake, recipe_of
from safetensors.torch import load_file, save_file

import koff_prune as package
from koff_export.bundle import check_files, open_manifest, set_domain
from koff_export.errors import KoffError
from koff_export.files import read_json, sha256_file
from koff_export.runtime import Runtime
from koff_export.ship import ship
from koff_prune import attach_memory, load_backbone, load_bundle
from koff_prune.learn import LearnTrainer
from koff_prune.lock import alone
from koff_prune.packing import PACKED
from koff_prune.router import Router

KEYS = ("learn.window=16", "learn.batch=2", "learn.checkpoint_steps=4", "learn.rates.lora=0.05",
        "learn.rates.kv=0.2", "evaluate.tokens=64", "scoring.tokens=64", "scoring.window=16")  # fmt: skip
SETTINGS = ("--tokens", "640", *(part for key in KEYS for part in ("--set", key)))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("place")
    config = tiny_config("qwen2", num_hidden_layers=2, tie_word_embeddings=True)
    package.apply(recipe_of(folder, config, export={"formats": ["safetensors", "onnx"]}), folder / "run")
    (folder / "sea").mkdir()
    for n in range(40):
        (folder / "sea" / f"{n}.txt").write_text(f"any return of court {n} of any return of court {n}\n")
    return folder


@pytest.fixture
def bundle(place: Path, tmp_path: Path) -> Path:
    shutil.copytree(place / "run" / "bundle", tmp_path / "bundle")
    return tmp_path / "bundle"


def sums(bundle: Path) -> dict[str, str]:
    """Checksums of everything that is no memory and no manifest."""
    return {
        p.relative_to(bundle).as_posix(): sha256_file(p)
        for p in bundle.rglob("*")
        if p.is_file() and "memories" not in p.parts and p.name != "koff.json" and not p.name.startswith(".")
    }


def add(capsys: pytest.CaptureFixture[str], place: Path, bundle: Path, *more: str, name: str = "sea") -> Any:
    return koff_prune(
        capsys, "memory", "add", bundle, "--name", name, "--data", place / "sea", *SETTINGS, *more
    )


def test_a_memory_is_added(place: Path, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It helps on its text, runs in torch and ONNX alike, is listed; every other file is as it was."""
    before, running = sums(bundle), Runtime.open(bundle)
    answer = add(capsys, place, bundle)
    assert answer.code == 0, answer.err
    assert sums(bundle) == before
    check_files(bundle, open_manifest(bundle))
    assert not list(bundle.glob(".adding-*"))
    told = json.loads(koff_prune(capsys, "memory", "inspect", bundle, "sea").out)
    assert told["heldout"]["nats"] < told["heldout"]["without"] - 0.1
    assert (told["lora_rank"], told["kv_tokens"]) == (2, 4), "as in the bundle's other memories"
    ids = token_ids(1, 9)
    with torch.no_grad():
        expected = load_bundle(bundle, "sea", torch.float32)(input_ids=ids).logits[0].numpy()
    for runtime in (running, Runtime.open(bundle)):  # the one was open before the memory was there
        assert np.abs(runtime.logits(ids[0].tolist(), "sea") - expected).max() < 1e-3
    listed = koff_prune(capsys, "memory", "list", bundle).out
    assert all(name in listed for name in ("law", "code", "sea"))
    assert koff_prune(capsys, "verify", bundle).code == 0


def test_a_name_that_is_taken_needs_replace(
    place: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused with the mend; with --replace the new one takes the old one's place."""
    taken = add(capsys, place, bundle, name="law")
    assert taken.code == 2 and "--replace" in taken.err and taken.err.count("\n") == 1
    old = sha256_file(bundle / "memories/law/kv.safetensors")
    assert add(capsys, place, bundle, "--replace", "--set", "memory.kv.tokens=6", name="law").code == 0
    assert sha256_file(bundle / "memories/law/kv.safetensors") != old
    assert open_manifest(bundle).domains["law"].kv_tokens == 6
    check_files(bundle, open_manifest(bundle))


def test_a_lora_that_the_graph_has_no_slots_for_is_told_before_it_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = {"lora": {"rank": 2, "alpha": 4, "target": ["q_proj", "v_proj"]}}
    recipe = recipe_of(tmp_path, memory=memory, export={"formats": ["safetensors", "onnx"]})
    package.apply(recipe, tmp_path / "run")
    (tmp_path / "sea").mkdir()
    for n in range(40):
        (tmp_path / "sea" / f"{n}.txt").write_text(f"any return of court {n} of any return of court {n}\n")
    bundle = tmp_path / "run" / "bundle"
    asked = "memory.lora.target=[q_proj, up_proj]"
    told = add(capsys, tmp_path, bundle, "--set", asked)
    mistake(told, "'sea'", "no slots for a LoRA around up_proj", "memory.lora.target=[q_proj, v_proj]")
    assert "training" not in told.err and not list(bundle.glob(".adding-*"))
    assert add(capsys, tmp_path, bundle).code == 0


def test_a_replacement_leaves_nothing_of_the_old_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One without LoRA has no GGUF adapter, and the old one's would be taken for its."""
    structure = {"units": ["ffn_neurons"], "sparsity": 0.1, "widths": "uniform", "round_to": 1}
    recipe = recipe_of(tmp_path, structure=structure, export={"formats": ["safetensors", "gguf"]})
    package.apply(recipe, tmp_path / "run")
    bundle = tmp_path / "run" / "bundle"
    assert (bundle / "gguf/memories/law.gguf").exists()
    shutil.copytree(tmp_path / "law", tmp_path / "sea")
    assert add(capsys, tmp_path, bundle, "--replace", "--set", "memory.lora=none", name="law").code == 0
    assert not (bundle / "gguf/memories/law.gguf").exists()
    assert koff_prune(capsys, "verify", bundle).code == 0


def test_an_interrupted_addition_goes_on(
    place: Path, bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bundle stays whole and unchanged; the same command ends as an uninterrupted one does."""
    twin = bundle.with_name("twin")
    shutil.copytree(bundle, twin)
    manifest = (bundle / "koff.json").read_bytes()
    save = LearnTrainer._save_checkpoint

    def stops(self: LearnTrainer, *args: Any, **kwargs: Any) -> None:
        save(self, *args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(LearnTrainer, "_save_checkpoint", stops)
    stopped = add(capsys, place, bundle)
    assert stopped.code == 130 and "run the same command again" in stopped.err
    assert (bundle / "koff.json").read_bytes() == manifest
    check_files(bundle, open_manifest(bundle))
    monkeypatch.setattr(LearnTrainer, "_save_checkpoint", save)
    assert add(capsys, place, bundle).code == 0
    assert add(capsys, place, twin).code == 0
    for file in ("kv.safetensors", "adapter_model.safetensors"):
        assert sha256_file(bundle / "memories/sea" / file) == sha256_file(twin / "memories/sea" / file)


def test_an_addition_whose_text_was_changed_begins_anew(
    place: Path, bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command and its paths are the same; what was trained on the old text is not the new memory."""
    data = bundle.with_name("data")
    shutil.copytree(place / "sea", data)
    command = ("memory", "add", bundle, "--name", "sea", "--data", data, *SETTINGS)

    def fails(*_: object) -> None:
        raise KoffError("after the training")

    with monkeypatch.context() as patch:
        patch.setattr("koff_prune.bundle_memories._publish", fails)
        assert koff_prune(capsys, *command).code == 2
    for file in data.iterdir():
        file.write_text(file.read_text()[::-1])
    twin = bundle.with_name("twin")
    shutil.copytree(bundle, twin, ignore=shutil.ignore_patterns(".adding-*"))
    again = koff_prune(capsys, *command)
    assert again.code == 0 and "of another recipe or text is dropped" in again.err, again.err
    assert koff_prune(capsys, *(twin if part is bundle else part for part in command)).code == 0
    kv = "memories/sea/kv.safetensors"
    assert sha256_file(bundle / kv) == sha256_file(twin / kv)


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("adapter_config.json", "adapter_config.json or adapter_model.safetensors is missing"),
        ("kv.safetensors", "a cache of 0 and 0 tokens, and koff.json tells of"),
    ],
)
def test_half_a_memory_is_none(bundle: Path, file: str, says: str) -> None:
    """As of a copy that was stopped."""
    (bundle / "memories/law" / file).unlink()
    for asked in ("law", "law+code"):
        with pytest.raises(KoffError, match=says):
            load_bundle(bundle, asked)
    with pytest.raises(KoffError, match=says):
        Router(bundle).choose_tokens([5, 6, 7])


@pytest.mark.parametrize(("key", "value"), [("use_rslora", True), ("alpha_pattern", {"q_proj": 32})])
def test_a_lora_of_another_kind_is_not_read_as_a_plain_one(bundle: Path, key: str, value: Any) -> None:
    file = bundle / "memories/law/adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(KoffError, match=f"has {key}, and a memory is a plain LoRA"):
        attach_memory(load_backbone(bundle), file.parent)


def test_a_cache_of_no_length_is_told(bundle: Path) -> None:
    file = bundle / "memories/law/kv.safetensors"
    save_file({name: t[:, :1].contiguous() for name, t in load_file(file).items()}, file)
    with pytest.raises(KoffError, match="its cache has 1 positions"):
        attach_memory(load_backbone(bundle), file.parent)


def test_what_was_measured_of_a_memory_goes_with_it(bundle: Path) -> None:
    before = read_json(bundle / "koff.json")["numerics"]["onnx_logits"]
    set_domain(bundle, "law", None)
    assert read_json(bundle / "koff.json")["numerics"]["onnx_logits"].keys() == before.keys() - {"law"}
    assert "law" in before


def test_a_memory_learns_as_the_bundles_first_ones_did(
    place: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rates, window and batch are the run's own where nothing else is said, as are rank and KV tokens."""
    short = (part for key in KEYS[5:] for part in ("--set", key))
    sea = ("memory", "add", bundle, "--name", "sea", "--data", place / "sea", "--tokens", "64", *short)
    assert koff_prune(capsys, *sea, "--set", "learn.rates.kv=0.5").code == 0
    told = json.loads(koff_prune(capsys, "memory", "inspect", bundle, "sea").out)["trained"]
    assert (told["tokens"], told["window"], told["batch"]) == (64, 16, 2)
    assert told["rates"] == {"lora": 0.002, "kv": 0.5}
    data = json.loads((bundle / "koff.json").read_text())
    data["learn"]["rates"]["lora"] = 0.25  # as a run with this rate would have left it
    (bundle / "koff.json").write_text(json.dumps(data))
    assert koff_prune(capsys, *sea, "--replace").code == 0
    told = json.loads(koff_prune(capsys, "memory", "inspect", bundle, "sea").out)["trained"]
    assert told["rates"] == {"lora": 0.25, "kv": 0.005}


def test_a_replacement_that_fails_leaves_the_old_one(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full while the new files are written costs nothing."""
    import koff_export.onnx
    import koff_prune.bundle_memories as target

    before = {p: sha256_file(p) for p in bundle.rglob("*") if p.is_file() and not p.name.startswith(".")}

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    for owner, name in ((koff_export.onnx, "write_adapter"), (target.shutil, "copytree")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            answer = koff_prune(
                capsys, "memory", "compose", bundle, "--name", "law", "--of", "law+code", "--replace"
            )
        assert answer.code == 2 and "Traceback" not in answer.err
        found = {p: sha256_file(p) for p in bundle.rglob("*") if p.is_file() and not p.name.startswith(".")}
        assert found == before
        assert not [p for p in bundle.rglob(".*") if p.name != ".lock"]


def test_a_replacement_that_onnx_disagrees_with_leaves_the_old_one(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import koff_prune.bundle_memories as target

    before = {p: sha256_file(p) for p in bundle.rglob("*") if p.is_file() and not p.name.startswith(".")}
    monkeypatch.setattr(target, "TOLERANCE", -1.0)  # no difference is small enough
    answer = koff_prune(capsys, "memory", "compose", bundle, "--name", "law", "--of", "law+code", "--replace")
    assert answer.code == 2 and "ONNX differs from torch" in answer.err and "as it was" in answer.err
    found = {p: sha256_file(p) for p in bundle.rglob("*") if p.is_file() and not p.name.startswith(".")}
    assert found == before
    assert not [p for p in bundle.rglob(".*") if p.name != ".lock"]


def test_a_memory_travels_alone(place: Path, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Packed, taken out, unpacked: the same bytes. A bundle of another plan refuses it."""
    file, law = bundle.with_name("law.koffmem"), bundle / "memories/law/kv.safetensors"
    before = {p.name: sha256_file(p) for p in law.parent.iterdir()}
    manifest = json.loads((bundle / "koff.json").read_text())
    assert koff_prune(capsys, "memory", "pack", bundle, "law", "-o", file).code == 0
    assert koff_prune(capsys, "memory", "remove", bundle, "law").code == 0
    assert not law.parent.exists() and "law" not in open_manifest(bundle).domains
    check_files(bundle, open_manifest(bundle))
    answer = koff_prune(capsys, "memory", "unpack", file, bundle)
    assert answer.code == 0, answer.err
    assert {p.name: sha256_file(p) for p in law.parent.iterdir()} == before
    again = json.loads((bundle / "koff.json").read_text())
    assert again["domains"]["law"] == {**manifest["domains"]["law"], "unpacked": True}
    assert again["files"] == manifest["files"]

    changed = {**again, "plan": "0" * 64}
    (bundle / "koff.json").write_text(json.dumps(changed))
    other = koff_prune(capsys, "memory", "unpack", file, bundle, "--replace")
    assert other.code == 2 and "of plan" in other.err and other.err.count("\n") == 1


def test_a_pack_knows_no_times_and_other_weights(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes of files of any age; refused where weights differ under one plan."""
    files = [bundle.with_name(name) for name in ("one.koffmem", "other.koffmem")]
    assert koff_prune(capsys, "memory", "pack", bundle, "law", "-o", files[0]).code == 0
    for n, path in enumerate((bundle / "memories/law").iterdir()):
        os.utime(path, (n * 6e9, n * 6e9))  # 1970, 2160, ...
    monkeypatch.setattr("time.time", lambda: 1e5)
    assert koff_prune(capsys, "memory", "pack", bundle, "law", "-o", files[1]).code == 0
    assert files[0].read_bytes() == files[1].read_bytes()
    weights = load_file(bundle / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] + 0.5
    save_file(weights, bundle / "model.safetensors", metadata={"format": "pt"})
    answer = koff_prune(capsys, "memory", "unpack", files[0], bundle, "--replace")
    mistake(answer, "trained on other weights than")


def test_a_disk_that_is_full_is_not_the_packs_fault(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, opened = bundle.with_name("law.koffmem"), Path.open
    assert koff_prune(capsys, "memory", "pack", bundle, "law", "-o", file).code == 0

    def full(self: Path, mode: str = "r", *rest: Any, **more: Any) -> Any:
        if mode == "xb":
            raise OSError(28, "No space left on device", str(self))
        return opened(self, mode, *rest, **more)

    monkeypatch.setattr(Path, "open", full)
    mistake(
        koff_prune(capsys, "memory", "unpack", file, bundle, "--replace"), "cannot write", "the disk is full"
    )
    assert not list(bundle.glob(".unpacked*"))


def rewritten(file: Path, change: Any) -> Path:
    """The packed memory with its table and members changed by `change(table, members)`."""
    with zipfile.ZipFile(file) as archive:
        members = {n: archive.read(n) for n in archive.namelist()}
    table = json.loads(members.pop(PACKED))
    options = change(table, members) or {}
    bad = file.with_name("bad.koffmem")
    with zipfile.ZipFile(bad, "w", options.get("compression", zipfile.ZIP_STORED)) as archive:
        archive.writestr(PACKED, json.dumps(table))
        for n, data in members.items():
            archive.writestr(n, data)
    return bad


def escape(table: Any, members: Any) -> None:
    members["../../evil.safetensors"] = members.pop("kv.safetensors")
    table["files"]["../../evil.safetensors"] = table["files"].pop("kv.safetensors")


def pickled(table: Any, members: Any) -> None:
    members["evil.pkl"] = b"x"
    table["files"]["evil.pkl"] = {"size": 1, "sha256": ""}


def flip(table: Any, members: Any) -> None:
    data = members["kv.safetensors"]
    members["kv.safetensors"] = data[:-1] + bytes([data[-1] ^ 1])


def rename(table: Any, members: Any) -> None:
    table["name"] = "../law"


def lie(table: Any, members: Any) -> None:
    table["files"]["kv.safetensors"]["size"] = 1 << 40


def odd_rank(table: Any, members: Any) -> None:
    retold(table, members, r="eight")


def odd_target(table: Any, members: Any) -> None:
    retold(table, members, target_modules=["no_such_module"])


def no_number(table: Any, members: Any) -> None:
    table["told"]["heldout"] = {"nats": float("nan")}


def half_a_letter(table: Any, members: Any) -> None:
    table["told"]["heldout"] = {"text": "\ud800"}


def other_weights(table: Any, members: Any) -> None:
    table["backbone"] = "0" * 64


def retold(table: Any, members: Any, **changes: Any) -> None:
    """Changes the LoRA's config as somebody who knows the format would, checksum and all."""
    config = {**json.loads(members["adapter_config.json"]), **changes}
    data = members["adapter_config.json"] = json.dumps(config).encode()
    table["files"]["adapter_config.json"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def squeeze(table: Any, members: Any) -> dict[str, int]:
    return {"compression": zipfile.ZIP_DEFLATED}


def squeeze_lzma(table: Any, members: Any) -> dict[str, int]:
    return {"compression": zipfile.ZIP_LZMA}


TAMPERED = [
    escape,
    pickled,
    flip,
    rename,
    lie,
    squeeze,
    squeeze_lzma,
    odd_rank,
    odd_target,
    no_number,
    half_a_letter,
]


@pytest.mark.parametrize("change", [*TAMPERED, other_weights])
def test_a_hostile_pack_is_refused(
    bundle: Path, capsys: pytest.CaptureFixture[str], change: Any, tmp_path: Path
) -> None:
    """One sentence, and nothing is written anywhere."""
    file = tmp_path / "law.koffmem"
    assert koff_prune(capsys, "memory", "pack", bundle, "law", "-o", file).code == 0
    assert koff_prune(capsys, "memory", "remove", bundle, "law").code == 0
    bad = rewritten(file, change)
    before = sorted(p for p in tmp_path.rglob("*") if not p.name.startswith("."))
    answer = koff_prune(capsys, "memory", "unpack", bad, bundle)
    assert answer.code == 2 and answer.err.count("\n") == 1, answer.err
    assert sorted(p for p in tmp_path.rglob("*") if not p.name.startswith(".")) == before
    assert not list(bundle.glob(".unpacked*"))


def test_an_export_does_not_throw_added_memories_away(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another precision writes the bundle anew: what the run did not make has to be taken out by hand."""
    run = tmp_path / "run"
    shutil.copytree(place / "run", run)
    made = koff_prune(capsys, "memory", "compose", run / "bundle", "--name", "both", "--of", "law+code")
    assert made.code == 0 and not made.err.count("pip install")
    again = ("export", place / "recipe.yaml", "--out", run, "--resume")
    assert koff_prune(capsys, *again).code == 0, "as it was asked for before"
    more = (*again, "--set", "export.onnx.precision=[fp32, int8]")
    refused = koff_prune(capsys, *more)
    assert refused.code == 2 and "both" in refused.err and "pack" in refused.err
    assert (run / "bundle" / "memories" / "both").is_dir()
    packed = tmp_path / "both.koffmem"
    assert koff_prune(capsys, "memory", "pack", run / "bundle", "both", "-o", packed).code == 0
    assert koff_prune(capsys, "memory", "remove", run / "bundle", "both").code == 0
    with alone(run / "bundle"):  # as a memory that is being added holds it
        assert koff_prune(capsys, *again).code == 0, "nothing to write"
        refused = koff_prune(capsys, *more)
    assert refused.code == 2 and "another koff-prune is at work" in refused.err
    assert koff_prune(capsys, *more).code == 0
    assert koff_prune(capsys, "memory", "unpack", packed, run / "bundle").code == 0
    assert Runtime.open(run / "bundle", precision="int8").memories == ["law", "code", "both"]


def test_an_export_keeps_a_memory_that_was_dropped_in(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file in one of the open folders is enough for a device to have a memory, and is in no manifest."""
    run = tmp_path / "run"
    shutil.copytree(place / "run", run)
    mine = run / "bundle/onnx/memories/mine.onnx_adapter"
    shutil.copy(mine.with_name("law.onnx_adapter"), mine)
    again = (
        "export",
        place / "recipe.yaml",
        "--out",
        run,
        "--resume",
        "--set",
        "export.onnx.precision=[fp16]",
    )
    refused = koff_prune(capsys, *again)
    assert refused.code == 2 and "added to it: mine" in refused.err, refused.err
    assert mine.is_file()
    assert koff_prune(capsys, "memory", "remove", run / "bundle", "mine").code == 0
    assert not mine.exists() and koff_prune(capsys, *again).code == 0


@pytest.mark.parametrize("linked", ["memories", "onnx/memories"])
def test_memories_that_lie_elsewhere_are_left_alone(
    bundle: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, linked: str
) -> None:
    """A bundle whose folder is a link out of it gets nothing deleted or written there."""
    file, victim = tmp_path / "law.koffmem", tmp_path / "victim"
    assert koff_prune(capsys, "memory", "pack", bundle, "law", "-o", file).code == 0
    (bundle / linked).rename(victim)
    (victim / "thesis.txt").write_text("years of work")
    (bundle / linked).symlink_to(victim)
    before = sorted(victim.rglob("*"))
    for command in (
        ("remove", bundle, "law"), ("unpack", file, bundle, "--replace"),
        ("compose", bundle, "--name", "both", "--of", "law+code"),
    ):  # fmt: skip
        refused = koff_prune(capsys, "memory", *command)
        assert refused.code == 2 and refused.err.count("\n") == 1, refused.err
        assert "leads out of" in refused.err
    assert sorted(victim.rglob("*")) == before


def test_what_a_killed_removal_left_can_be_removed(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    set_domain(bundle, "law", None)  # the entry goes first; then it was killed
    assert "law" in Runtime.open(bundle).memories
    assert koff_prune(capsys, "memory", "remove", bundle, "law").code == 0
    assert "law" not in Runtime.open(bundle).memories and not (bundle / "memories" / "law").exists()
    gone = koff_prune(capsys, "memory", "remove", bundle, "law")
    assert gone.code == 2 and "not in" in gone.err


def test_a_merged_memory_stays_where_it_is(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(place / "run", run)
    again = ("export", place / "recipe.yaml", "--out", run, "--resume", "--merge", "law")
    assert koff_prune(capsys, *again).code == 0
    before = sorted((run / "bundle-law").rglob("[!.]*"))
    for command in (("remove",), ("pack", "-o", tmp_path / "law.koffmem")):
        refused = koff_prune(capsys, "memory", command[0], run / "bundle-law", "law", *command[1:])
        assert refused.code == 2 and "without --merge" in refused.err, refused.err
    assert sorted((run / "bundle-law").rglob("[!.]*")) == before


def test_a_shipped_bundle_says_what_it_cannot_do(
    place: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    phone = ship(bundle, tmp_path / "phone", "fp32")
    for answer in (koff_prune(capsys, "verify", phone), add(capsys, place, phone)):
        assert answer.code == 2 and answer.err.count("\n") == 1, answer.err
        assert "was shipped for devices" in answer.err and "original" in answer.err


@pytest.mark.parametrize("kind", ["t5", "clip"])
def test_a_bundle_cannot_ask_to_run_its_own_code(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A type with a config class in transformers and no causal LM makes it ask, and run what it finds."""
    (bundle / "modeling_evil.py").write_text("raise SystemExit('was run')")
    config = json.loads((bundle / "config.json").read_text())
    config |= {"model_type": kind, "auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}}
    (bundle / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    with pytest.raises(KoffError, match=f"{kind}' has no known units"):
        load_bundle(bundle)


def test_a_cache_without_room_for_text_takes_no_ones_place(
    place: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [p for p in (bundle / "memories").rglob("*") if p.is_file()]
    before = [sha256_file(p) for p in files]
    context = json.loads((bundle / "koff.json").read_text())["context"]
    long = add(capsys, place, bundle, "--replace", "--set", f"memory.kv.tokens={context - 10}", name="law")
    assert long.code == 2 and "positions; lower it" in long.err and "training" not in long.err
    assert files and [sha256_file(p) for p in files] == before
    assert koff_prune(capsys, "verify", bundle).code == 0


def test_a_longer_cache_than_genai_knows_of_is_told(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    context = json.loads((bundle / "koff.json").read_text())["context"]
    compose = ("memory", "compose", bundle, "--of", "law+code", "--name")
    both = koff_prune(capsys, *compose, "both")
    says = f"says {context - 4} positions, and memory 'both' leaves {context - 8}: there, set max_length"
    assert both.code == 0 and says in " ".join(both.err.split()), both.err
    capsys.readouterr()
    alike = koff_prune(capsys, "memory", "pack", bundle, "law", "-o", bundle.with_name("law.koffmem"))
    assert alike.code == 0, alike.err
    alike = koff_prune(capsys, "memory", "unpack", bundle.with_name("law.koffmem"), bundle, "--replace")
    assert alike.code == 0 and "max_length" not in alike.err


def test_genais_file_may_be_edited(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It may name another graph, as the docs say; memories come and go all the same."""
    packed = bundle.with_name("law.koffmem")
    assert koff_prune(capsys, "memory", "pack", bundle, "law", "-o", packed).code == 0
    for content in ('{"model": {"context_length": 16, "decoder": {"filename": "other.onnx"}}}', "{}", "no"):
        (bundle / "genai_config.json").write_text(content)
        made = koff_prune(
            capsys, "memory", "compose", bundle, "--of", "law+code", "--name", "both", "--replace"
        )
        assert made.code == 0, made.err
        made = koff_prune(capsys, "memory", "unpack", packed, bundle, "--replace")
        assert made.code == 0, made.err


def test_the_card_stays_true(place: Path, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of memories that come and go it does not tell; of what was shipped, how it is run."""
    card = (bundle / "README.md").read_text()
    assert "koff.json tells which there are by now" in card and 'memory="…"' in card
    assert koff_prune(capsys, "memory", "remove", bundle, "law").code == 0
    check_files(bundle, open_manifest(bundle))
    shipped = bundle.with_name("shipped")
    assert koff_prune(capsys, "ship", bundle, "--precision", "fp32", "--out", shipped).code == 0
    card = (shipped / "README.md").read_text()
    assert "koff-run this-folder --memory" in card and "load_bundle" not in card
    check_files(shipped, open_manifest(shipped))


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        (("law+law",), "--of law+law: name two memories or more, each once"),
        (("law",), "name two memories or more"),
        (("law+code", "--weights", "0,0"), "must be finite, and not all of them 0"),
        (("law+code", "--weights", "nan,1"), "must be finite"),
        (("law+code", "--weights", "1"), "must be 2 numbers"),
    ],
)
def test_parts_that_make_no_sense_are_told(
    bundle: Path, capsys: pytest.CaptureFixture[str], parts: tuple[str, ...], says: str
) -> None:
    mistake(koff_prune(capsys, "memory", "compose", bundle, "--name", "both", "--of", *parts), says)


@pytest.mark.parametrize("key", ["learn.window", "evaluate.window"])
def test_a_window_without_positions_is_told(
    place: Path, bundle: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    mistake(add(capsys, place, bundle, "--set", f"{key}=4096"), f"{key}: 4096 is more than the model's")


def test_a_memory_told_wrongly_is_found(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = json.loads((bundle / "koff.json").read_text())
    law = {**told["domains"]["law"], "parameters": 7}
    for change, says in (
        ({"parameters": {**told["parameters"], "dense": 7}}, "koff.json tells other parameters"),
        ({"sparsity": {**told["sparsity"], "realised": 0.5}}, "koff.json tells other sparsity"),
        ({"domains": {**told["domains"], "law": law}}, "parameters 7 of"),
    ):
        (bundle / "koff.json").write_text(json.dumps({**told, **change}))
        mistake(koff_prune(capsys, "verify", bundle), says)


def test_what_was_unpacked_or_is_being_added_stays_too(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, packed = tmp_path / "run", tmp_path / "law.koffmem"
    shutil.copytree(place / "run", run)
    assert koff_prune(capsys, "memory", "pack", run / "bundle", "law", "-o", packed).code == 0
    export = (
        "export",
        place / "recipe.yaml",
        "--out",
        run,
        "--resume",
        "--set",
        "export.formats=[safetensors]",
    )
    (run / "bundle" / ".adding-sea").mkdir()
    refused = koff_prune(capsys, *export)
    assert refused.code == 2 and "sea" in refused.err
    assert koff_prune(capsys, "memory", "remove", run / "bundle", "sea").code == 0, "what the sentence tells"
    assert not (run / "bundle" / ".adding-sea").exists()
    assert koff_prune(capsys, "memory", "unpack", packed, run / "bundle", "--replace").code == 0
    (run / "bundle" / ".adding-code").mkdir()  # as of a replacement that was stopped
    dropped = koff_prune(capsys, "memory", "remove", run / "bundle", "code")
    assert dropped.code == 0 and "it is as it was" in dropped.err
    assert "code" in open_manifest(run / "bundle").domains
    assert not (run / "bundle" / ".adding-code").exists(), "nothing of it is left"
    assert koff_prune(capsys, "memory", "remove", run / "bundle", "code").code == 0
    assert "code" not in open_manifest(run / "bundle").domains
    refused = koff_prune(capsys, *export)
    assert refused.code == 2 and "law" in refused.err


def test_mistakes_are_told(place: Path, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names, data and bundles that cannot be: one sentence each."""
    cases = [
        ("memory", "add", bundle, "--name", "../x", "--data", place / "sea"),
        ("memory", "add", bundle, "--name", "none", "--data", place / "sea"),
        ("memory", "add", bundle, "--name", "LAW", "--data", place / "sea"),
        ("memory", "add", bundle, "--name", "x", "--data", place / "nothing"),
        ("memory", "add", place, "--name", "x", "--data", place / "sea"),
        ("memory", "inspect", bundle, "x"),
        ("memory", "remove", bundle, "x"),
        ("memory", "pack", bundle, "x"),
        ("memory", "pack", bundle, "law", "-o", bundle / "no" / "law.koffmem"),
        ("memory", "unpack", place / "sea" / "0.txt", bundle),
    ]
    for case in cases:
        answer = koff_prune(capsys, *case)
        assert answer.code == 2 and "Traceback" not in answer.err, case
        assert answer.err.count("\n") == 1, answer.err


@pytest.mark.parametrize(
    ("data", "tokens", "says"),
    [
        ("nothing", "64", "--data is "),
        ("short", "64", "give more text in --data"),
        ("sea", "3", "--tokens: 3 make no step of "),
    ],
)
def test_a_mistake_of_add_is_told_by_its_options(
    place: Path,
    bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    data: str,
    tokens: str,
    says: str,
) -> None:
    """And nothing is left in the bundle."""
    shutil.copytree(place / "sea", tmp_path / "sea")
    (tmp_path / "short").mkdir()
    for n in range(20):
        (tmp_path / "short" / f"{n}.txt").write_text(f"court {n}")
    options = ("--name", "x", "--data", tmp_path / data, "--tokens", tokens, "--set", "evaluate.tokens=4096")
    answer = koff_prune(capsys, "memory", "add", bundle, *options)
    assert answer.code == 2 and says in answer.err, answer.err
    assert "domains." not in answer.err and "settle_tokens" not in answer.err
    assert not list(bundle.glob(".adding-*"))


@pytest.mark.parametrize(
    "item",
    ["cut.recover={rank: 4}", "structure.sparsity=0.3", "learn.settle_tokens=9", "learn.gates.start=fisher"],
)
def test_add_refuses_what_is_not_a_memorys(
    place: Path, bundle: Path, capsys: pytest.CaptureFixture[str], item: str
) -> None:
    """A key that would do nothing is not passed over in silence."""
    answer = add(capsys, place, bundle, "--set", item)
    assert answer.code == 2 and f"--set {item}: " in answer.err and answer.err.count("\n") == 1, answer.err


def test_a_kill_while_a_memory_is_replaced_leaves_none_that_is_half_old(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its files for torch are new by then: what ONNX has of the old one must not answer for it."""
    code = (
        "import os, sys, pathlib\n"
        "from koff_prune.bundle_memories import compose_memory\n"
        "old = pathlib.Path.rename\n"
        "def rename(self, target):\n"
        "    if str(target).endswith('law.onnx_adapter'): os._exit(9)\n"
        "    return old(self, target)\n"
        "pathlib.Path.rename = rename\n"
        "compose_memory(pathlib.Path(sys.argv[1]), 'law', ['law', 'code'], replace=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, bundle], capture_output=True, check=False)
    assert done.returncode == 9, done.stderr.decode()
    assert "law" not in Runtime.open(bundle).memories
    checked = koff_prune(capsys, "verify", bundle)
    assert checked.code == 0 and "not checked: the memories law" in checked.err
    assert koff_prune(capsys, "memory", "remove", bundle, "law").code == 0
    assert not [p for p in bundle.rglob(".*") if p.name != ".lock"], "what the kill left is gone"


def test_a_mistyped_bundle_makes_no_folder(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "law.koffmem"
    assert koff_prune(capsys, "memory", "pack", bundle, "law", "-o", file).code == 0
    for command in (("remove", tmp_path / "typo/b", "law"), ("unpack", file, tmp_path / "typo/b")):
        mistake(koff_prune(capsys, "memory", *command), "typo")
        assert not (tmp_path / "typo").exists()


def test_a_bundle_that_tells_of_no_memories_takes_one(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "law.koffmem"
    assert koff_prune(capsys, "memory", "pack", bundle, "law", "-o", file).code == 0
    for name in ("law", "code"):
        assert koff_prune(capsys, "memory", "remove", bundle, name).code == 0
    told = json.loads((bundle / "koff.json").read_text())
    del told["domains"]
    (bundle / "koff.json").write_text(json.dumps(told))
    assert koff_prune(capsys, "memory", "unpack", file, bundle).code == 0
    assert Runtime.open(bundle).memories == ["law"]
