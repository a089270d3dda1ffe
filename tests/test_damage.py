"""Files of a run that were lost, damaged or swapped before it goes on: made again, or one sentence."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from run_helpers import koff_prune, recipe_of

import koff_prune as package
from koff_export.files import read_json, sha256_file, write_json
from koff_prune.checkpoints import whole_checkpoints
from koff_prune.learn import LearnTrainer


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe, its finished run `whole`, and `stopped`: the same after its second checkpoint."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("place")
    recipe = recipe_of(folder, compare=["magnitude"])
    package.compare(recipe, folder / "whole")
    save = LearnTrainer._save_checkpoint

    def stops(self: LearnTrainer, model: object, trial: object) -> None:
        save(self, model, trial)
        if self.state.global_step == 4:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LearnTrainer, "_save_checkpoint", stops)
        with pytest.raises(KeyboardInterrupt):
            package.compare(recipe, folder / "stopped")
    return folder


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def one_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))


def emptied(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("optimizer.pt", Path.unlink),
        ("optimizer.pt", emptied),
        ("scheduler.pt", cut_short),
        ("state.safetensors", one_bit),
        ("trainer_state.json", lambda path: path.write_text(path.read_text().replace(": 4", ": 3"))),
        ("complete", cut_short),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, harm: Callable[[Path], object]
) -> None:
    """The one before it is gone on from, and the run ends as it would have."""
    out = tmp_path / "run"
    shutil.copytree(place / "stopped", out)
    checkpoints = whole_checkpoints(out / "checkpoints" / "learning")
    assert [p.name for p in checkpoints] == ["checkpoint-2", "checkpoint-4"]
    harm(checkpoints[-1] / name)
    answer = koff_prune(capsys, "compare", place / "recipe.yaml", "--out", out, "--resume")
    assert answer.code == 0, answer.err
    assert f"{name} is damaged" in " ".join(answer.err.split()), answer.err
    for file in ("gates.safetensors", "plan.json", "memories/law/kv.safetensors", "losses.json"):
        assert sha256_file(out / file) == sha256_file(place / "whole" / file), file


def another_plan(out: Path, place: Path) -> str:
    recipe = place / "recipe.yaml"
    package.plan(package.load_recipe(recipe, ["structure.sparsity=0.05"]), place / "other", resume=True)
    shutil.copy(place / "other" / "plan.json", out / "plan.json")
    return "is another run's plan (target is 0.05, here 0.1)"


def another_text(out: Path, place: Path) -> str:
    (out / "domains" / "law.safetensors").unlink()
    for file in sorted((place / "law").iterdir()):
        file.write_text(file.read_text() + "more")
    return "domains.law.source: the text has changed since the run"


def fewer_losses(out: Path, place: Path) -> str:
    losses = read_json(out / "losses.json")
    write_json(out / "losses.json", {**losses, "law": losses["law"][:-1]})
    return "losses.json: is damaged; remove it, and --resume makes it again"


def half_of_the_losses(out: Path, place: Path) -> str:
    cut_short(out / "losses.json")
    return "losses.json: is damaged; remove it, and --resume makes it again"


def no_gates(out: Path, place: Path) -> str:
    cut_short(out / "gates.safetensors")
    (out / "plan.json").unlink()
    return "gates.safetensors: is missing or damaged; remove it, and --resume makes it again"


def another_gate(out: Path, place: Path) -> str:
    one_bit(out / "gates.safetensors")
    (out / "plan.json").unlink()
    return "gates.safetensors: is missing or damaged; remove it, and --resume makes it again"


def other_tokens(out: Path, place: Path) -> str:
    one_bit(out / "domains" / "law.safetensors")
    return "law.safetensors: is missing or damaged; remove it, and --resume makes it again"


def other_documents(out: Path, place: Path) -> str:
    path = out / "domains" / "law.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"heldout_documents\\": [', b'"heldout_documents\\":[ ', 1))
    return "law.safetensors: is missing or damaged; remove it, and --resume makes it again"


def another_moment(out: Path, place: Path) -> str:
    path = out / "statistics.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    shutil.rmtree(out / "rows")
    return "statistics.safetensors: is missing or damaged; remove it, and --resume makes it again"


def no_learned_cache(out: Path, place: Path) -> str:
    (out / "learned" / "law" / "kv.safetensors").unlink()
    shutil.rmtree(out / "memories")
    return "law/kv.safetensors: is missing or damaged; remove"


def nothing_learned(out: Path, place: Path) -> str:
    shutil.rmtree(out / "learned")
    shutil.rmtree(out / "memories")
    return "learned/law: is missing or damaged; remove"


def another_learned_weight(out: Path, place: Path) -> str:
    one_bit(out / "learned" / "law" / "adapter_model.safetensors")
    shutil.rmtree(out / "memories")
    (out / "losses.json").unlink()
    return "law/adapter_model.safetensors: is missing or damaged; remove"


def another_memory(out: Path, place: Path) -> str:
    one_bit(out / "memories" / "law" / "kv.safetensors")
    (out / "losses.json").unlink()
    return "law/kv.safetensors: is missing or damaged; remove"


def another_backbone(out: Path, place: Path) -> str:
    one_bit(out / "backbone" / "model.safetensors")
    (out / "losses-off.json").unlink()
    return "backbone/model.safetensors: is missing or damaged; remove"


def a_list(out: Path, place: Path) -> str:
    (out / "run.json").write_text("[]")
    return "run.json: is damaged, or of a later version"


@pytest.mark.parametrize(
    "harm",
    [
        another_plan, another_text, fewer_losses, half_of_the_losses, no_gates, another_gate, a_list,
        other_tokens, other_documents, another_moment, no_learned_cache, nothing_learned,
        another_learned_weight, another_memory, another_backbone,
    ],
)  # fmt: skip
def test_what_is_not_this_runs_is_told(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], harm: Callable[[Path, Path], str]
) -> None:
    """In one sentence that names the file, instead of a report on something else."""
    out = tmp_path / "run"
    shutil.copytree(place / "whole", out)
    texts = {path: path.read_bytes() for path in (place / "law").iterdir()}
    says = harm(out, place)
    answer = koff_prune(capsys, "compare", place / "recipe.yaml", "--out", out, "--resume")
    for path, text in texts.items():
        path.write_bytes(text)
    assert answer.code == 2 and says in " ".join(answer.err.split()), answer.err
    assert "Traceback" not in answer.err


@pytest.mark.parametrize("file", ["backbone/model.safetensors", "memories/law/adapter_model.safetensors"])
def test_a_changed_bit_is_not_exported(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    """And what is removed, as the sentence says, is made again as it was."""
    out = tmp_path / "run"
    shutil.copytree(place / "whole", out)
    one_bit(out / file)
    export = ("export", place / "recipe.yaml", "--out", out, "--resume")
    answer = koff_prune(capsys, *export)
    stage = out / file.partition("/")[0]
    said = "".join(answer.err.split())
    assert answer.code == 2 and "".join(f"remove {stage}, and --resume".split()) in said, answer.err
    assert not (out / "bundle").exists()
    shutil.rmtree(stage)
    answer = koff_prune(capsys, *export)
    assert answer.code == 0, answer.err
    assert sha256_file(out / file) == sha256_file(place / "whole" / file)
    assert not list((out / "bundle").rglob("complete"))


def test_what_cannot_matter_is_made_again(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Seconds and a log that are none, and other windows for `koff-run --score`."""
    out = tmp_path / "run"
    shutil.copytree(place / "whole", out)
    windows = (out / "domains" / "law.heldout.jsonl").read_bytes()
    one_bit(out / "domains" / "law.heldout.jsonl")
    (out / "times.json").write_text("[]")
    (out / "checkpoints" / "settling" / "log.json").write_text('[{"step": 1}]')
    (out / "losses.json").unlink()
    assert koff_prune(capsys, "compare", place / "recipe.yaml", "--out", out, "--resume").code == 0
    assert (out / "domains" / "law.heldout.jsonl").read_bytes() == windows
    assert sha256_file(out / "losses.json") == sha256_file(place / "whole" / "losses.json")


def test_rows_of_another_point_are_not_a_points(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sub-run's rows copied over another's are measured again."""
    sweep = ("compare", place / "recipe.yaml", "--out", tmp_path / "sweep", "--sparsity", "0.05,0.1")
    assert koff_prune(capsys, *sweep).code == 0
    found = read_json(tmp_path / "sweep" / "sweep.json")
    one, other = (tmp_path / "sweep" / "seed-0" / f"sparsity-{s}" / "rows.json" for s in ("0.05", "0.1"))
    shutil.copy(one, other)
    assert koff_prune(capsys, *sweep, "--resume").code == 0
    again = read_json(tmp_path / "sweep" / "sweep.json")
    assert again["points"] == found["points"]
    near = koff_prune(capsys, *sweep[:-1], "0.1,0.1000000001", "--resume")
    assert near.code == 2 and "too near to one another" in near.err
