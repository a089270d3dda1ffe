"""A part of a bundle for a device: it answers as the whole one does, and holds nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from export_helpers import BOS, Exported

from koff_export.bundle import check_files, open_manifest, set_domain, write_manifest
from koff_export.cli import main as koff_run
from koff_export.errors import KoffError
from koff_export.fused import export_fused
from koff_export.quantize import quantize
from koff_export.runtime import Runtime
from koff_export.ship import ship

PROMPT = [BOS, *range(40, 60)]


@pytest.fixture(scope="module")
def whole(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shared bundle with fused graphs and int8 beside."""
    folder = tmp_path_factory.mktemp("whole") / "bundle"
    shutil.copytree(exported.folder, folder)
    model, onnx = exported.model, folder / "onnx"
    export_fused(model, onnx / "fused.onnx", onnx / "model.onnx")
    export_fused(model, onnx / "in_place.onnx", onnx / "fused.onnx", in_place=True)
    graph = json.loads((folder / "koff.json").read_text())["graph"]
    beside = None
    for key, stem in (("precisions", "model"), ("fused", "fused"), ("in_place", "in_place")):
        int8 = onnx / f"{stem}_int8.onnx"
        quantize(onnx / f"{stem}.onnx", int8, 8, beside)
        beside, path = int8, f"onnx/{stem}_int8.onnx"
        graph[key] = {"fp32": f"onnx/{stem}.onnx", "int8": path, "int8_dynamic": path}
    manifest = json.loads((folder / "koff.json").read_text())
    del manifest["files"], manifest["format"]
    (folder / "NOTICE").write_text("of the weights")
    (folder / "generation_config.json").write_text(json.dumps({"suppress_tokens": list(range(9, 300))}))
    write_manifest(folder, {**manifest, "graph": graph})
    return folder


@pytest.mark.parametrize(
    ("precision", "profile"), [("int8_dynamic", None), ("int8", "portable"), ("fp32", "fused")]
)
def test_it_answers_as_the_whole_bundle(
    whole: Path, precision: str, profile: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (whole / "LICENSE").write_text("put there by hand")
    part = ship(whole, tmp_path / "part", precision, profile, ["law", "math"])
    (whole / "LICENSE").unlink()
    assert {(part / name).read_text() for name in ("LICENSE", "NOTICE")} == {
        "put there by hand",
        "of the weights",
    }
    check_files(part, open_manifest(part))
    ours, theirs = (Runtime.open(folder, *asked, threads=1, profile=p)
                    for folder, asked, p in ((part, (), None), (whole, (precision,), profile)))  # fmt: skip
    assert (ours.precision, ours.profile) == (precision, profile or "in_place")
    assert set(ours.memories) == {"law", "math"}
    for memory in (None, "law", "math"):
        assert ours.logits(PROMPT, memory).tobytes() == theirs.logits(PROMPT, memory).tobytes()
    answers = [list(r.generate_tokens(PROMPT, "law", 8)) for r in (ours, theirs)]
    assert answers[0] == answers[1] and max(answers[0]) < 9, "what generation_config.json asks for"
    assert koff_run([str(part), "--prompt", "the law", "--max-new-tokens", "3", "--threads", "1"]) == 0
    assert capsys.readouterr().out
    graphs = {path.name for path in (part / "onnx").glob("*.onnx")}
    assert len(graphs) == 1 and not list(part.rglob("*.safetensors"))
    if precision != "fp32":
        assert not (part / "onnx/model.onnx.data").exists(), "float32 weights stay at home"


def test_a_folder_that_comes_while_it_is_copied_is_left_alone(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, mine = shutil.copyfile, tmp_path / "part" / "mine.txt"

    def meanwhile(*args: Any, **kwargs: Any) -> Any:
        mine.parent.mkdir(exist_ok=True)
        mine.write_text("mine")
        return copy(*args, **kwargs)

    monkeypatch.setattr(shutil, "copyfile", meanwhile)
    with pytest.raises(KoffError, match="came to be there meanwhile"):
        ship(whole, tmp_path / "part", "int8", None, ["law"])
    assert mine.read_text() == "mine" and [p.name for p in tmp_path.iterdir()] == ["part"]


def test_what_cannot_be_shipped_is_told(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for asked, says in (
        (("there", "int8"), "exists already"),
        (("new", "int3"), "no precision 'int3'; it has: fp32, int8"),
        (("new", "int8", "swift"), "no profile 'swift'"),
        (("new", "int8", None, ["sea"]), "no memory 'sea'; it has: law, math, music"),
    ):
        with pytest.raises(KoffError, match=says):
            ship(whole, tmp_path / asked[0], *asked[1:])  # type: ignore[arg-type]
    damaged = Path(shutil.copytree(whole, tmp_path / "damaged"))
    (damaged / "onnx/memories/law.onnx_adapter").write_bytes(b"?")
    with pytest.raises(KoffError, match=r"law.onnx_adapter' has 1 bytes"):
        ship(damaged, tmp_path / "new", "int8")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("told", [None, {"kv_tokens": 999}])
def test_a_memory_that_changes_meanwhile_does_not_mix_two_manifests(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: dict[str, int] | None
) -> None:
    """What is shipped is told by the manifest whose checksums it was copied under."""
    folder = Path(shutil.copytree(whole, tmp_path / "folder"))
    known = json.loads((folder / "koff.json").read_text())["domains"]["law"]
    copy = shutil.copyfile

    def changing(source: Path, target: Path) -> None:
        copy(source, target)
        if str(source).endswith("law.onnx_adapter"):
            set_domain(folder, "law", {**known, **told} if told else None)

    monkeypatch.setattr(shutil, "copyfile", changing)
    part = ship(folder, tmp_path / "part", "int8")
    assert json.loads((part / "koff.json").read_text())["domains"]["law"]["kv_tokens"] == known["kv_tokens"]
    Runtime.open(part, threads=1).memory("law")


def test_what_was_dropped_in_is_shipped_too(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "folder"))
    shutil.copy(folder / "onnx/memories/law.onnx_adapter", folder / "onnx/memories/sea.onnx_adapter")
    for memories in (None, ["sea"]):
        part = ship(folder, tmp_path / f"part-{bool(memories)}", "fp32", memories=memories)
        check_files(part, open_manifest(part))
        runtime = Runtime.open(part, threads=1)
        assert set(runtime.memories) == set(memories or ["law", "math", "music", "sea"])
        wanted = Runtime.open(folder, threads=1).logits(PROMPT, "law")
        assert runtime.logits(PROMPT, "sea").tobytes() == wanted.tobytes()
    with pytest.raises(KoffError, match="inside of"):
        ship(folder, folder / "phone", "fp32")
    assert not (folder / "phone").exists()
