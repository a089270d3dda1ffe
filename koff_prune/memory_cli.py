"""`koff-prune memory …`: memories of a finished bundle."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    help="Memories of a finished bundle: add, list, inspect, compose, remove, pack, unpack, cartridge.",
)


@app.callback()
def _every_command() -> None:
    from koff_prune.progress import quiet

    quiet()


def _is_bundle(folder: Path) -> Path:
    """Tells what is no bundle before torch is imported."""
    from koff_export.bundle import open_manifest

    open_manifest(folder)
    return folder


Bundle = Annotated[Path, typer.Argument(help="The bundle's folder.", show_default=False, callback=_is_bundle)]
Name = Annotated[str, typer.Argument(help="The memory's name.", show_default=False)]
Replace = Annotated[bool, typer.Option("--replace", help="Take the place of a memory of this name.")]


@app.command()
def add(
    bundle: Bundle,
    name: Annotated[str, typer.Option("--name", help="Of the new memory.")],
    data: Annotated[Path, typer.Option("--data", help="Texts, or a YAML file with `source: …`.")],
    tokens: Annotated[int, typer.Option("--tokens", help="To train on.")] = 32_768,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key; repeatable."),
    ] = None,
    replace: Replace = False,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, max=1024, help="Processor cores.")
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, … [default: a GPU].")] = None,
) -> None:
    """Train one more memory on the bundle's backbone, which stays as it is. Goes on where it was stopped."""
    from koff_prune import api
    from koff_prune.bundle_memories import add_memory

    api.set_threads(threads)
    api.set_device(device)
    try:
        told = add_memory(bundle, name, data, tokens=tokens, overrides=set_, replace=replace)
    except KeyboardInterrupt:
        print("interrupted: run the same command again to continue", file=sys.stderr)
        raise typer.Exit(130) from None
    held = told["heldout"]
    print(f"{name}: held-out loss {held['nats']:.3f} nats with it, {held['without']:.3f} without")


@app.command("list")
def list_(bundle: Bundle) -> None:
    """The memories of a bundle."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from koff_prune.bundle_memories import list_memories

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("memory", "parameters", "LoRA rank", "KV tokens", "bytes"):
        table.add_column(column, justify="left" if column == "memory" else "right")
    for m in list_memories(bundle):
        table.add_row(m["name"], f"{m['parameters']:,}", str(m["lora_rank"]), str(m["kv_tokens"]),
                      f"{m['bytes']:,}")  # fmt: skip
    Console().print(table)


@app.command()
def inspect(bundle: Bundle, name: Name) -> None:
    """Everything that is known of one memory, as JSON."""
    from koff_prune.bundle_memories import inspect_memory

    print(json.dumps(inspect_memory(bundle, name), indent=2))


@app.command()
def compose(
    bundle: Bundle,
    name: Annotated[str, typer.Option("--name", help="Of the new memory.")],
    of: Annotated[str, typer.Option("--of", help="Its parts, as in python+math.")],
    weights: Annotated[
        str | None, typer.Option("--weights", help="Of each part's LoRA: 0.7,0.3 [default: equal].")
    ] = None,
    replace: Replace = False,
) -> None:
    """Write several memories as one more: LoRA added with weights, caches side by side. Trains nothing."""
    from koff_export.errors import KoffError
    from koff_prune.bundle_memories import compose_memory

    try:
        numbers = [float(part) for part in weights.split(",")] if weights else None
    except ValueError as error:
        raise KoffError(f"--weights: {weights!r} is not a list of numbers; write them as 0.7,0.3") from error
    told = compose_memory(bundle, name, of.replace(",", "+").split("+"), numbers, replace=replace)
    print(f"{name}: rank {told['lora_rank']}, {told['kv_tokens']} KV tokens")


@app.command()
def remove(bundle: Bundle, name: Name) -> None:
    """Take a memory out of a bundle."""
    from koff_prune.bundle_memories import remove_memory

    remove_memory(bundle, name)


@app.command()
def pack(
    bundle: Bundle,
    name: Name,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File [default: NAME.koffmem].")] = None,
) -> None:
    """Write one memory as one file that can be shipped alone."""
    from koff_prune.bundle_memories import pack_memory

    print(pack_memory(bundle, name, out or Path(f"{name}.koffmem")))


@app.command()
def unpack(
    file: Annotated[Path, typer.Argument(help="From `memory pack`.", show_default=False)],
    bundle: Bundle,
    replace: Replace = False,
) -> None:
    """Put a packed memory into a bundle of the same plan."""
    from koff_prune.bundle_memories import unpack_memory

    unpack_memory(file, bundle, replace=replace)


@app.command()
def cartridge(
    bundle: Bundle,
    name: Name,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder [default: NAME-cartridge].")] = None,
) -> None:
    """Write a memory's learned cache as a PEFT Cartridge."""
    from koff_prune.cartridge import write_cartridge

    target = out or Path(f"{name}-cartridge")
    left_out = write_cartridge(bundle, name, target)
    print(f"{target}{': the cache alone, without the LoRA it was learned with' if left_out else ''}")
