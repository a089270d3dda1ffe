"""The command line: every mistake is one line and exit code 2, and leaves nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from run_helpers import koff_prune, mistake, recipe_of
from transformers import AutoModelForCausalLM, GPT2Config

from koff_prune import __version__, documents
from koff_prune.learn import LearnTrainer


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("place")
    recipe_of(folder)
    return folder


def empty(folder: Path) -> bool:
    return not folder.exists() or not [p for p in folder.iterdir() if p.name != ".lock"]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("learn.tokns=5", "did you mean `learn.tokens`"),
        ("learn.tokens=many", "must be a whole number"),
        ("structure.sparsity=1.5", "less than 1"),
        ("domains.law.source=nowhere", "nowhere"),
        ("model.source=./nowhere", "nowhere"),
    ],
)
def test_a_mistake_in_the_recipe(
    place: Path, tmp_path: Path, override: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    mistake(koff_prune(capsys, "apply", place / "recipe.yaml", "--out", out, "--set", override), says)
    assert empty(out)


def test_two_mistakes_are_two_lines(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = koff_prune(
        capsys, "learn", place / "recipe.yaml", "--out", tmp_path / "out",
        "--set", "learn.tokens=many", "--set", "structure.sparsity=2",
    )  # fmt: skip
    assert answer.code == 2
    assert [line[:7] for line in answer.err.splitlines()] == ["error: "] * 2


def test_a_missing_or_foreign_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mistake(koff_prune(capsys, "plan", tmp_path / "none.yaml"), "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    mistake(koff_prune(capsys, "plan", tmp_path / "list.yaml"), "must be a mapping")


def test_a_domain_named_twice(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (place / "recipe.yaml").read_text().replace("domains:\n", "domains:\n  law: {source: code}\n")
    (place / "twice.yaml").write_text(text)
    mistake(koff_prune(capsys, "plan", place / "twice.yaml"), "law")


def test_folders_that_belong_to_others(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, recipe = tmp_path / "out", place / "recipe.yaml"
    assert koff_prune(capsys, "learn", recipe, "--out", out).code == 0
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.name != ".lock"}
    mistake(koff_prune(capsys, "learn", recipe, "--out", out), "--resume")
    mistake(
        koff_prune(capsys, "learn", recipe, "--out", out, "--resume", "--set", "seed=9"), "another recipe"
    )
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.name != ".lock"}
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("mine")
    for flags in ([], ["--resume"]):
        mistake(koff_prune(capsys, "learn", recipe, "--out", foreign, *flags), "not empty")
    assert [p.name for p in foreign.iterdir() if p.name != ".lock"] == ["thesis.tex"]
    (tmp_path / "file").write_text("")
    mistake(koff_prune(capsys, "learn", recipe, "--out", tmp_path / "file"), "file")


def test_a_folder_that_cannot_be_made(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    answer = koff_prune(capsys, "apply", place / "recipe.yaml", "--out", tmp_path / "file" / "run")
    mistake(answer, "file", "folder")


def test_two_at_once(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """While one process works, another is turned away and harms nothing, and the first ends well."""
    out, recipe = tmp_path / "out", place / "recipe.yaml"
    command = [sys.executable, "-m", "koff_prune", "plan", str(recipe), "--out", str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as first:
        while not (out / "run.json").exists() and first.poll() is None:
            time.sleep(0.01)
        mistake(koff_prune(capsys, "apply", recipe, "--out", out, "--resume"), "another koff-prune")
        _, errors = first.communicate(timeout=200)
    assert first.returncode == 0, errors
    assert koff_prune(capsys, "plan", recipe, "--out", tmp_path / "alone").code == 0
    assert (out / "plan.json").read_bytes() == (tmp_path / "alone" / "plan.json").read_bytes()


def test_out_of_memory_names_what_lowers_it(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def greedy(*args: object, **kwargs: object) -> torch.Tensor:
        return torch.empty(1 << 50)  # what the allocator says is its own

    with monkeypatch.context() as patch:
        patch.setattr("koff_prune.learner.head_loss", greedy)
        answer = koff_prune(capsys, "plan", place / "recipe.yaml", "--out", tmp_path / "out")
    mistake(answer, "out of memory", "learn.batch", "learn.gradient_checkpointing", "scoring.window")
    assert koff_prune(capsys, "plan", place / "recipe.yaml", "--out", tmp_path / "out", "--resume").code == 0
    with monkeypatch.context() as patch:
        patch.setattr("koff_prune.api.analyze", greedy)
        mistake(koff_prune(capsys, "analyze", tmp_path / "out"), "out of memory", "evaluate.window")


def test_a_text_that_goes_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Between its listing and its reading, and between a run and its resumption: a sentence, nothing lost."""
    recipe, out = recipe_of(tmp_path), tmp_path / "out"
    gone, text = tmp_path / "code" / "7.txt", (tmp_path / "code" / "7.txt").read_bytes()
    read = documents.text_of

    def vanishing(path: Path) -> str:
        if path.parent == gone.parent:  # its folder has been listed
            gone.unlink(missing_ok=True)
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(documents, "text_of", vanishing)
        mistake(koff_prune(capsys, "learn", recipe, "--out", out), "cannot read", "7.txt", "no such file")
    assert not list((out / "domains").glob("code*"))
    gone.write_bytes(text)
    assert koff_prune(capsys, "learn", recipe, "--out", out, "--resume").code == 0
    (tmp_path / "code").rename(tmp_path / "elsewhere")
    mistake(koff_prune(capsys, "cut", recipe, "--out", out, "--resume"), "domains", "code", "no such file")
    assert (out / "gates.safetensors").exists()
    (tmp_path / "elsewhere").rename(tmp_path / "code")
    assert koff_prune(capsys, "cut", recipe, "--out", out, "--resume").code == 0


def test_an_unreachable_sparsity(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    sets = ["--set", "structure.sparsity=0.9"]
    mistake(
        koff_prune(capsys, "apply", place / "recipe.yaml", "--out", out, *sets),
        "structure.sparsity 0.9",
        "at most 0.",
    )
    assert not (out / "gates.safetensors").exists(), "told only after the training"
    # the folder holds nothing that could be lost: the mended recipe may have it
    assert koff_prune(capsys, "plan", place / "recipe.yaml", "--out", out).code == 0
    mistake(koff_prune(capsys, "plan", place / "recipe.yaml", "--out", out, *sets), "another recipe")


def test_too_short_a_text(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets = ["--set", "evaluate.tokens=4000000"]
    mistake(
        koff_prune(capsys, "learn", place / "recipe.yaml", "--out", tmp_path / "o", *sets),
        "held-out",
        "too short",
    )
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "nothing").mkdir()
    sets = ["--set", f"domains.law.source={tmp_path / 'nothing'}"]
    answer = koff_prune(capsys, "learn", place / "recipe.yaml", "--out", tmp_path / "q", *sets)
    mistake(answer, "the folder is empty")
    sets = ["--set", f"domains.law.source={tmp_path / 'empty.txt'}"]
    mistake(koff_prune(capsys, "learn", place / "recipe.yaml", "--out", tmp_path / "p", *sets), "empty.txt")


def test_models_that_cannot_be_cut(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=258))
    gpt2.save_pretrained(tmp_path / "gpt2")
    sets = ["--set", f"model.source={tmp_path / 'gpt2'}"]
    mistake(koff_prune(capsys, "learn", place / "recipe.yaml", "--out", tmp_path / "o", *sets), "gpt2")
    mistake(koff_prune(capsys, "plan", "--dry-run", place / "recipe.yaml", *sets), "gpt2")
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in (place / "model").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    sets = ["--set", f"model.source={broken}"]
    mistake(koff_prune(capsys, "learn", place / "recipe.yaml", "--out", tmp_path / "p", *sets), "safetensors")
    (tmp_path / "x.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    sets = ["--set", f"model.source={tmp_path / 'x.gguf'}"]
    mistake(koff_prune(capsys, "learn", place / "recipe.yaml", "--out", tmp_path / "q", *sets), "GGUF")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    mistake(
        koff_prune(capsys, "learn", place / "recipe.yaml", "--out", tmp_path / "closed" / "out"), "permission"
    )


@pytest.mark.parametrize(
    "victim",
    [
        "recipe.yaml",
        "statistics.safetensors",
        "costs-surgeon.safetensors",
        "gates.safetensors",
        "plan.json",
    ],
)
def test_a_full_disk_when_a_file_is_renamed(
    place: Path,
    tmp_path: Path,
    victim: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    replace = os.replace

    def full(source: str, target: str) -> None:
        if Path(target).name == victim:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    out = tmp_path / "out"
    monkeypatch.setattr(os, "replace", full)
    mistake(koff_prune(capsys, "cut", place / "recipe.yaml", "--out", out), "the disk is full")
    assert not (out / victim).exists() and not [p for p in out.rglob("*") if p.name.endswith(".tmp")]
    monkeypatch.setattr(os, "replace", replace)
    assert koff_prune(capsys, "cut", place / "recipe.yaml", "--out", out, "--resume").code == 0
    assert (out / "backbone" / "model.safetensors").exists()


@pytest.mark.parametrize("where", ["cut_on_disk", "save_memory"])
def test_a_full_disk_inside_a_stage(
    place: Path,
    tmp_path: Path,
    where: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import koff_prune.stages as stages

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(stages, where, full)
        mistake(koff_prune(capsys, "cut", place / "recipe.yaml", "--out", out), "the disk is full")
    assert not (out / "backbone").exists()
    assert not [p for p in out.iterdir() if ".tmp" in p.name]


def test_a_full_disk_inside_a_checkpoint(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(self: LearnTrainer, *args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(LearnTrainer, "_save", full)
        mistake(koff_prune(capsys, "learn", place / "recipe.yaml", "--out", out), "the disk is full")
    assert koff_prune(capsys, "learn", place / "recipe.yaml", "--out", out, "--resume").code == 0


def test_an_interruption_says_how_to_continue(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(self: LearnTrainer, *args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LearnTrainer, "train", stop)
    answer = koff_prune(capsys, "learn", place / "recipe.yaml", "--out", tmp_path / "out")
    assert answer.code == 130 and "--resume" in answer.err and "Traceback" not in answer.err


def test_apply_prints_the_table(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = koff_prune(
        capsys, "apply", place / "recipe.yaml", "--out", tmp_path / "out", "--set", "compare=[wanda]"
    )
    assert answer.code == 0, answer.err
    for word in (
        "dense",
        "koff",
        "wanda",
        "law",
        "code",
        f"bundle: {tmp_path / 'out' / 'bundle'}",
        "report.html",
    ):
        assert word in answer.out.replace("\n", ""), word


def test_schema_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    answer = koff_prune(capsys, "schema")
    assert json.loads(answer.out)["properties"]["learn"]
    answer = koff_prune(capsys, "--help")
    for command in ("apply", "learn", "plan", "cut", "export", "compare", "schema", "verify"):
        assert command in answer.out
        assert koff_prune(capsys, command, "--help").code == 0
    answer = koff_prune(capsys, "--version")
    assert answer.code == 0 and answer.out == f"koff-prune {__version__}\n"
    answer = koff_prune(capsys, "aply")
    assert answer.code == 2 and "Traceback" not in answer.err


def test_help_needs_neither_torch_nor_a_second() -> None:
    code = "import sys; from koff_prune.cli import main\ntry: main()\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'transformers', 'numpy', 'koff_prune.api'} & set(sys.modules)"
    for arguments in (["--help"], ["apply", "--help"]):
        begun = time.monotonic()
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert time.monotonic() - begun < 5  # under a second on an idle machine


@pytest.mark.parametrize(
    ("command", "says"),
    [("compare RECIPE --sparsity 12", "12.0 is out of range"), ("export RECIPE --merge x", "no such domain")],
)
def test_options_about_a_recipe_are_checked_before_torch_is_imported(
    place: Path, command: str, says: str
) -> None:
    code = (
        "import sys\nfrom koff_prune.cli import main\n"
        "try: main()\nexcept SystemExit as end: code = end.code\n"
        "assert code == 2 and 'torch' not in sys.modules"
    )
    arguments = command.replace("RECIPE", str(place / "recipe.yaml")).split()
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0 and says in done.stderr, done.stderr


def test_an_interruption_while_it_is_imported_is_one_word() -> None:
    code = (  # what a shell starts with & ignores SIGINT
        "import builtins, os, signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from koff_prune.__main__ import main\nmake = builtins.__import__\n"
        "def slow(name, *rest):\n    if name == 'typer': os.kill(os.getpid(), signal.SIGINT)\n"
        "    return make(name, *rest)\nbuiltins.__import__ = slow\nmain()\n"
    )
    done = subprocess.run([sys.executable, "-c", code, "schema"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_public_names_are_functions_whatever_was_imported_before() -> None:
    code = "import koff_prune, koff_prune.learn, koff_prune.plan, koff_prune.cut, koff_prune.compare\n"
    code += "from koff_prune.learn import train\n"
    code += "assert all(callable(getattr(koff_prune, n)) for n in koff_prune.__all__ if n != '__version__')\n"
    code += "from koff_prune import learn, plan, cut, compare\nassert learn.__module__ == 'koff_prune.api'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_optimum_cli_has_the_same_commands(tmp_path: Path) -> None:
    """`optimum-cli koff` comes with the installed package: its help, options, sentences and exit codes."""
    cli = [sys.executable, "-c", "from optimum.commands.optimum_cli import main; main()"]
    told = subprocess.run([*cli, "koff", "compare", "--help"], capture_output=True, text=True)
    assert told.returncode == 0 and "--sparsity" in told.stdout and "optimum-cli koff compare" in told.stdout
    made = subprocess.run([*cli, "koff", "schema"], capture_output=True, text=True)
    assert json.loads(made.stdout)["title"] == "Recipe"
    lost = subprocess.run(
        [*cli, "koff", "apply", tmp_path / "none.yaml", "--resume"], capture_output=True, text=True
    )
    assert lost.returncode == 2
    assert lost.stderr.splitlines()[-1].startswith("error: recipe") and "Traceback" not in lost.stderr


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("plan", "--tflops", "5"), "--tflops"),
        (("compare", "--sparsity", ""), "--sparsity: '' is not a list of numbers"),
        (("learn", "--device", "meta"), "--device: 'meta' cannot be used"),
        (
            ("plan", "--dry-run", "--set", "structure.units=[kv_groups]", "--set", "structure.sparsity=0.01"),
            "add ffn_neurons to structure.units",
        ),
    ],
)
def test_what_would_be_passed_over_or_help_nobody_is_told(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: tuple[str, ...], says: str
) -> None:
    name, *options = command
    out = () if "--dry-run" in options else ("--out", tmp_path / "o")
    answer = koff_prune(capsys, name, place / "recipe.yaml", *out, *options)
    mistake(answer, says)
    assert "round_to 1, or" not in answer.err and "are 0.0000" not in answer.err


def test_a_log_has_lines_and_no_frames(place: Path, tmp_path: Path) -> None:
    """Also where FORCE_COLOR says that every file is a terminal."""
    with (tmp_path / "log").open("w") as log:
        done = subprocess.run(
            [sys.executable, "-m", "koff_prune", "plan", place / "recipe.yaml", "--out", tmp_path / "out"],
            stderr=log, stdout=subprocess.PIPE, env={**os.environ, "FORCE_COLOR": "1"},
        )  # fmt: skip
    told = (tmp_path / "log").read_text()
    assert done.returncode == 0, told
    assert "learning …" in told and "\x1b" not in told and "\r" not in told
