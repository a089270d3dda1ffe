"""Files are whole or absent, and foreign ones are read with suspicion."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from koff_export.errors import KoffError
from koff_export.files import (
    check_safetensors,
    fsync_path,
    read_json,
    recover,
    recover_below,
    safe_join,
    staged_dir,
    write_json,
)

EXPORT = str(Path(__file__).parents[2] / "export")


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_windows_opens_no_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There a folder cannot be synced, and a file must be open for writing."""
    opened = os.open

    def as_there(path: str, flags: int, *mode: int) -> int:
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        assert flags & os.O_RDWR or flags & os.O_CREAT
        return opened(path, flags, *mode)

    monkeypatch.setattr("koff_export.files._WINDOWS", True)
    monkeypatch.setattr("koff_export.files.os.open", as_there)
    write_json(tmp_path / "a.json", {"a": 1})
    assert read_json(tmp_path / "a.json") == {"a": 1}
    fsync_path(tmp_path / "a.json")


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "bundle"
    for text in ("old", "new"):
        with staged_dir(target) as stage:
            (stage / "sub").mkdir()
            (stage / "sub" / text).write_text(text)
            assert not (target / "sub" / text).exists()
        assert names(target / "sub") == [text] and names(target.parent) == ["bundle"]


def test_a_folder_behind_a_link_is_replaced_where_it_lies(tmp_path: Path) -> None:
    (tmp_path / "large").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "bundle").symlink_to(tmp_path / "large", target_is_directory=True)
    for text in ("old", "new"):
        with staged_dir(tmp_path / "run" / "bundle") as stage:
            (stage / text).write_text(text)
        assert names(tmp_path / "large") == [text] and names(tmp_path / "run") == ["bundle"]
    assert (tmp_path / "run" / "bundle").is_symlink()
    (tmp_path / "run" / ".bundle.999999.old").symlink_to(tmp_path / "large", target_is_directory=True)
    recover_below(tmp_path / "run")  # of an earlier version
    assert names(tmp_path / "large") == ["new"] and names(tmp_path / "run") == ["bundle"]


def test_a_failure_leaves_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    with staged_dir(target) as stage:
        (stage / "old").write_text("x")
    for error in (ValueError("mine"), KeyboardInterrupt()):
        with pytest.raises(type(error)), staged_dir(target) as stage:
            (stage / "new").write_text("x")
            raise error
    assert names(target) == ["old"] and names(tmp_path) == ["bundle"]


@pytest.mark.parametrize("moment", ["in the block", "between the renames"])
def test_a_killed_run_leaves_the_old_or_the_new_folder(tmp_path: Path, moment: str) -> None:
    target = tmp_path / "bundle"
    with staged_dir(target) as stage:
        (stage / "old").write_text("x")
    code = f"""
import os, sys, pathlib; sys.path.insert(0, {EXPORT!r})
from koff_export.files import staged_dir
rename = pathlib.Path.rename
def dying(self, to):
    if self.name.endswith(".tmp"): os.kill(os.getpid(), 9)
    return rename(self, to)
if {moment!r} == "between the renames": pathlib.Path.rename = dying
with staged_dir({str(target)!r}) as stage:
    (stage / "new").write_text("x")
    if {moment!r} == "in the block": os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    recover(target)
    assert names(target) == ["old"] and names(tmp_path) == ["bundle"]


def test_what_killed_runs_left_anywhere_is_cleared(tmp_path: Path) -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True)
    pid, mine = int(dead.stdout), os.getppid()
    deep = tmp_path / "rows" / "arm"
    (deep / f".memories.{pid}.old").mkdir(parents=True)
    (deep / f".memories.{pid}.tmp").mkdir()
    for name in ("plan.json", f".plan.json.{pid}.tmp", f".plan.json.{mine}.tmp", ".notes.tmp"):
        (deep / name).write_text("x")
    recover_below(tmp_path)
    assert names(deep) == sorted([f".plan.json.{mine}.tmp", ".notes.tmp", "memories", "plan.json"])


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "x"),
        RuntimeError(f"I/O: {os.strerror(errno.ENOSPC)} (28)"),
        RuntimeError("Failed to write :1248 bytes to x.onnx_adapter"),  # ONNX Runtime's words
        RuntimeError("[enforce fail at inline_container.cc:626] . unexpected pos 704 vs 598"),  # torch's
    ],
)
def test_a_full_disk_is_one_sentence(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(KoffError, match="the disk is full"), staged_dir(tmp_path / "b"):
        raise error
    assert names(tmp_path) == []


def test_a_file_in_the_way_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "b").write_text("x")
    with pytest.raises(KoffError, match="is a file"), staged_dir(tmp_path / "b"):
        pass
    with pytest.raises(KoffError, match="not a folder"), staged_dir(tmp_path / "b" / "c"):
        pass


def test_json_is_written_whole_and_read_with_suspicion(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": "ü"})
    with pytest.raises(ValueError):
        write_json(path, {"a": float("nan")})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": "ü"} and names(tmp_path) == ["x.json"]
    with pytest.raises(KoffError, match="larger than 3 bytes"):
        read_json(path, max_bytes=3)
    for content in (b"{", b"\xff\xfe", b"[" * 200_000):
        path.write_bytes(content)
        with pytest.raises(KoffError, match="not valid JSON"):
            read_json(path)
    with pytest.raises(KoffError, match="cannot read"):
        read_json(tmp_path / "absent")


def test_paths_stay_below_the_root(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to("/etc")
    assert safe_join(tmp_path, "a/b.json") == tmp_path / "a/b.json"
    for name in ("", "/etc/passwd", "../x", "a/../../x", "out/passwd", "a\\b", "C:/x", "a\0b"):
        with pytest.raises(KoffError, match="leads out of"):
            safe_join(tmp_path, name)


def test_safetensors_headers_are_checked_against_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(
        {"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}, path, metadata={"format": "pt"}
    )
    assert check_safetensors(path) == {"a": ("F32", (2, 3)), "b": ("BF16", (4,))}
    good = path.read_bytes()

    def rewritten(**header: object) -> bytes:
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + bytes(24)

    entry = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
    bad = [
        good[:-1],
        good[:4],
        good + b"x",
        b"",
        b"\x80\x04pickle" * 9,
        (1 << 60).to_bytes(8, "little") + good[8:],
    ]
    bad += [rewritten(a={**entry, **change}) for change in (
        {"shape": [2, 4]}, {"shape": [-2, -3]}, {"shape": [2, 3.0]}, {"dtype": "X"},
        {"data_offsets": [8, 32]}, {"data_offsets": [0]}, {"shape": None},
    )]  # fmt: skip
    bad += [rewritten(a=entry, b=entry), rewritten(a=[1])]
    for content in bad:
        path.write_bytes(content)
        with pytest.raises(KoffError, match="not a whole safetensors file"):
            check_safetensors(path)
    path.write_bytes(rewritten(a=entry))
    check_safetensors(path)
