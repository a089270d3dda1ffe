"""A run directory: which recipe it belongs to, what is finished in it, and everything that stages share.

Every arrow between stages is a file here, written aside and renamed, so that a stage either is finished or is
not.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from filelock import FileLock, Timeout

from koff_export.errors import KoffError
from koff_export.files import (
    disk_errors,
    read_json,
    recover,
    recover_below,
    sha256_file,
    staged_dir,
    write_json,
    write_text,
)
from koff_prune import ranks
from koff_prune.architecture import native_dtype
from koff_prune.chat import tokens
from koff_prune.places import check_finished, differences, is_moved, local_paths, unfinished
from koff_prune.progress import bar, say
from koff_prune.reading import read_yaml
from koff_prune.recipe import Recipe
from koff_prune.tensor_file import save_tensors

if TYPE_CHECKING:
    from koff_prune.domains import DomainBlocks
    from koff_prune.models import Dense
    from koff_prune.scores import Statistics
    from koff_prune.units import Units

PACKAGES = ("koff-prune", "torch", "transformers", "peft", "torch-pruning", "optimum", "accelerate",
            "datasets",
            "onnx", "onnxruntime", "safetensors", "numpy")  # fmt: skip


def versions() -> dict[str, str]:
    """Of everything that a result may depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


class Run:
    """One recipe in one folder.

    Args:
        recipe: Checked.
        folder: The run directory; made if missing.
        resume: Whether a run of the same recipe may be continued there.

    Attributes:
        recipe: As given, with `model.dtype: auto` resolved for this run.
        digest: Of the recipe as given.

    Raises:
        KoffError: The folder holds another run, or this one without `resume`, or another process works in it.
    """

    def __init__(self, recipe: Recipe, folder: Path, *, resume: bool) -> None:
        self.recipe, self.folder, self.digest = recipe, Path(folder), recipe.digest()
        self._statistics: Statistics | None = None
        self._lock = FileLock(self.folder / ".lock")
        with ranks.turn():
            if not ranks.rank():
                self._take()
            try:
                self._enter(resume or ranks.rank() > 0)
            except BaseException:
                self.close()
                raise

    def _take(self) -> None:
        with disk_errors(self.folder):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, FileNotFoundError) as error:
                raise KoffError(f"{self.folder}: cannot be made a folder; choose another --out") from error
            try:
                self._lock.acquire(timeout=0)
            except Timeout as error:
                raise KoffError(
                    f"{self.folder}: another koff-prune is at work there; wait or use --out"
                ) from error

    def _enter(self, resume: bool) -> None:
        stamp = self.folder / "run.json"
        recover(stamp)
        if stamp.exists():
            seen = read_json(stamp)
            if not isinstance(seen, dict) or seen.get("format") != 1 or "versions" not in seen:
                raise KoffError(f"{stamp}: is damaged, or of a later version; choose another --out")
            known = seen.get("recipe") == self.digest
            moved = not known and is_moved(self.recipe, seen.get("recipe"), seen.get("paths"))
            if not (moved or (known and resume)) and self._barely_begun():
                stamp.unlink()  # of a recipe that was refused, and has been mended since
            elif not known and not moved:
                differs = differences(self.folder / "recipe.yaml", self.recipe)
                raise KoffError(
                    f"{self.folder}: holds a run of another recipe{differs};"
                    " choose another --out, or remove the folder"
                )
            elif not resume:
                raise KoffError(
                    f"{self.folder}: holds a run of this recipe; continue it with --resume, or choose --out"
                )
            else:
                self._keep_order()
                if moved:
                    self._settle_here(stamp, seen)
            recover_below(self.folder)  # here alone: in a folder that is no run, nothing is ours to remove
        elif (self.folder / "sweep-of.json").exists():
            raise KoffError(
                f"{self.folder}: is a sweep; name its --sparsity, --seed or --tokens, or choose another --out"
            )
        elif any(p.name != ".lock" for p in self.folder.iterdir()):
            raise KoffError(f"{self.folder}: is not empty and holds no run; choose another --out")
        if not stamp.exists():  # first of all files: whatever a kill leaves is known as this run's
            write_json(
                stamp,
                {
                    "format": 1,
                    "recipe": self.digest,
                    "paths": local_paths(self.recipe),
                    "dtype": native_dtype(self.recipe.model.dtype),
                    "versions": versions(),
                },
            )
        if not (self.folder / "recipe.yaml").exists():
            self._write_recipe()
        # resolved once: a run that moves to another machine goes on in the type that it began in
        if self.recipe.model.dtype == "auto":
            model = self.recipe.model.model_copy(update={"dtype": read_json(stamp).get("dtype", "auto")})
            self.recipe = self.recipe.model_copy(update={"model": model})

    def _write_recipe(self) -> None:
        resolved = yaml.safe_dump(self.recipe.model_dump(mode="json"), sort_keys=False)
        write_text(self.folder / "recipe.yaml", resolved)

    def _keep_order(self) -> None:
        """Takes the domains in the order that the run began with: windows are drawn by it."""
        order: list[str] = []
        with suppress(KoffError):  # of a run that was killed before it was written
            told = read_yaml(self.folder / "recipe.yaml")[0]
            order = list(told["domains"]) if isinstance(told, dict) else []
        if set(order) == set(self.recipe.domains):
            domains = {name: self.recipe.domains[name] for name in order}
            self.recipe = self.recipe.model_copy(update={"domains": domains})

    def _settle_here(self, stamp: Path, seen: dict[str, Any]) -> None:
        """Makes the run the moved recipe's; whether the weights are the same is seen when they are read."""
        say(f"{self.folder}: was begun where the project lay before; going on with its files here")
        self._write_recipe()
        write_json(stamp, {**seen, "recipe": self.digest, "paths": local_paths(self.recipe)})

    def _barely_begun(self) -> bool:
        """Whether there is nothing but what a recipe says and the texts it reads; then those are removed."""
        texts, resolved = ("domains", "vocabulary"), self.folder / "recipe.yaml"
        if not {p.name for p in self.folder.iterdir()} <= {"run.json", ".lock", *texts, resolved.name}:
            return False
        for name in texts:
            shutil.rmtree(self.folder / name, ignore_errors=True)
        resolved.unlink(missing_ok=True)
        return True

    def close(self) -> None:
        """Lets another process in."""
        self._lock.release()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @cached_property
    def dense(self) -> Dense:
        """The dense model, with the tokens that the recipe keeps; see `fresh` for one that may be changed."""
        if self.recipe.structure.vocabulary is None:
            return self.whole
        from koff_prune.seals import check_seal
        from koff_prune.vocabulary import trimmed

        folder = self.folder / "vocabulary"
        with ranks.turn():
            if not folder.exists():
                self._trim_vocabulary(folder)
            check_seal(folder, str(folder))
            self._check_vocabulary(folder)
        return trimmed(self.whole, folder, self.recipe.memory.tokens)

    def _trim_vocabulary(self, folder: Path) -> None:
        from koff_prune.domains import count_tokens, split_documents
        from koff_prune.seals import seal
        from koff_prune.vocabulary import write_divided, write_vocabulary

        coverage, counts = self.recipe.structure.vocabulary, {}
        assert coverage is not None
        for name, domain in self.recipe.domains.items():
            say(f"domain {name}: counting tokens")
            counts[name] = count_tokens(split_documents(name, domain, seed=0).train, self.whole.tokenizer)
        write = write_divided if self.recipe.memory.tokens else write_vocabulary
        with staged_dir(folder) as aside:
            write(self.whole, counts, coverage, aside)
            self._check_vocabulary(aside)
            seal(aside, folder.name)

    def _check_vocabulary(self, folder: Path) -> None:
        """Notes in run.json which tokens stay; refuses others that took their place."""
        from koff_prune.vocabulary import KEPT

        told, mark = read_json(self.folder / "run.json"), sha256_file(folder / KEPT)
        if told.get("vocabulary", mark) != mark:
            raise KoffError(
                f"structure.vocabulary: other tokens stay than when the run in {self.folder} began, for the"
                " text has changed; choose another --out"
            )
        if "vocabulary" not in told and not ranks.rank():
            write_json(self.folder / "run.json", {**told, "vocabulary": mark})

    @cached_property
    def whole(self) -> Dense:
        """The dense model as the recipe names it, with every token."""
        from koff_prune.models import open_dense

        say(f"model: {_short(self.recipe.model.source)}")
        stamp = self.folder / "run.json"
        told = read_json(stamp)
        known = told.get("weights")  # None in a run of an earlier version on a hub model
        dense = open_dense(self.recipe.model, known=known)
        if known not in (None, dense.fingerprint):
            place = _short(self.recipe.model.source)
            raise KoffError(
                f"model.source: the weights at {place} have changed since the run in {self.folder} began;"
                " choose another --out"
            )
        if known is None and not ranks.rank():
            write_json(stamp, {**told, "weights": dense.fingerprint})
        return dense

    def fresh(self) -> Any:
        """The dense model, to be wrapped or cut."""
        return self.dense.take()

    @cached_property
    def units(self) -> Units:
        """The units of the dense model; what goes with memories is trimmed too."""
        from koff_prune.units import read_units, token_parameters

        units, dense, each = read_units(self.dense.outline()), self.dense, token_parameters(self.dense.config)
        left = dense.own.shared if dense.own is not None else dense.config.vocab_size
        backbone = units.parameters - (dense.config.vocab_size - left) * each
        return replace(units, parameters=backbone, trimmed=(self.whole.config.vocab_size - left) * each)

    @property
    def model_identity(self) -> dict[str, Any]:
        """What plan.json and the manifest say about the dense model."""
        d = self.dense
        return {"source": d.source, "revision": d.revision, "config_sha256": d.config_sha256}

    @cached_property
    def domains(self) -> dict[str, DomainBlocks]:
        """Token blocks of every domain, read once and kept in the run directory."""
        with ranks.turn():
            return self._read_domains()

    def _read_domains(self) -> dict[str, DomainBlocks]:
        from koff_prune.domains import load_blocks, load_domain, save_blocks
        from koff_prune.leaks import sentences, shared_text
        from koff_prune.models import check_embeddings

        result, fresh, own = {}, False, self.dense.own
        folder = self.folder / "domains"
        for name, domain in self.recipe.domains.items():
            path = folder / f"{name}.safetensors"
            if not path.exists():
                say(f"domain {name}: reading and tokenising")
                blocks = load_domain(name, domain, self.dense.reader(name), self.recipe, bos=self.dense.bos)
                parts = (blocks.train, blocks.scoring, blocks.heldout, blocks.prefill)
                largest = max(int(tokens(part).max()) for part in parts if part.numel())
                check_embeddings(largest, self.dense.config)
                folder.mkdir(exist_ok=True)
                save_blocks(blocks, folder)
                fresh = True
            result[name] = load_blocks(path)
        for name, blocks in result.items():
            lines = folder / f"{name}.heldout.jsonl"
            # the very windows of the report, for `koff-run --score`
            held = (blocks.heldout if own is None else own.numbered(blocks.heldout, name)).tolist()
            text = "".join(json.dumps({"tokens": w}) + "\n" for w in held)
            if not lines.exists() or lines.read_bytes() != text.encode():
                write_text(lines, text)
        self.check_texts({name: blocks.digest for name, blocks in result.items()})
        if fresh:
            for sentence in sentences(shared_text(result, self.dense.in_common)):
                say(sentence)
        return result

    def check_texts(self, digests: dict[str, str]) -> None:
        """Notes in run.json which texts the run is of; refuses others that took their place."""
        told = read_json(self.folder / "run.json")
        known = told.get("texts", {})
        for name, digest in digests.items():
            if known.get(name, digest) != digest:
                raise KoffError(
                    f"domains.{name}.source: the text has changed since the run in {self.folder} began;"
                    " choose another --out"
                )
        if known != digests and not ranks.rank():
            write_json(self.folder / "run.json", {**told, "texts": digests})

    @property
    def statistics(self) -> Statistics:
        """One pass of the dense model over the scoring text of all domains, kept in the run directory.

        Every asking takes a turn: the first process may have asked inside another one, where nobody waits.
        """
        from koff_prune.device import on_device
        from koff_prune.scores import Statistics, collect

        with ranks.turn():
            path = self.folder / "statistics.safetensors"
            if not path.exists():
                windows = [w for blocks in self.domains.values() for w in blocks.scoring]
                with bar("scoring units", sum(len(w) for w in windows)) as progress, self.timed("score"):
                    kinds, seed = self.recipe.structure.units, self.recipe.seed
                    found = collect(on_device(self.fresh()), self.units, kinds, windows, progress, seed)
                save_tensors(found.tensors(), path)
            if self._statistics is None:
                self._statistics = Statistics.open(path)
        return self._statistics

    @contextmanager
    def timed(self, stage: str, folder: Path | None = None) -> Iterator[None]:
        """Adds the block's seconds to times.json under `stage`."""
        if ranks.rank():
            yield
            return
        begun = time.monotonic()

        def add() -> None:
            path = (folder or self.folder) / "times.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            times = read_json(path) if path.exists() else {}
            if not isinstance(times, dict) or not all(isinstance(t, int | float) for t in times.values()):
                times = {}
            write_json(path, {**times, stage: round(times.get(stage, 0.0) + time.monotonic() - begun, 1)})

        try:
            yield
        except BaseException:
            with suppress(KoffError):  # a full disk: what did not fit is told, and not this
                add()
            raise
        add()


def finished_run(folder: Path) -> Run:
    """Opens the run directory of a run whose memories are trained.

    Raises:
        KoffError: There is none.
    """
    from koff_prune.reading import load_recipe

    missing = check_finished(folder)
    recipe = load_recipe(folder / "recipe.yaml", check_files=False)
    if recipe.memory.kind == "none":
        raise KoffError(
            f"{folder}: is a run without memories, and this is about them; give its recipe a `memory`"
        )
    if missing:
        raise unfinished(folder, missing[0])
    return Run(recipe, folder, resume=True)


def _short(source: Any) -> str:
    return source if isinstance(source, str) else f"{source.package}:{Path(source.file).name}"
