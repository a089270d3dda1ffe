"""The model card of a bundle, README.md: true of it as it was exported, whatever comes to it later."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from koff_export.files import read_json
from koff_prune.evaluate import perplexities
from koff_prune.losses import heldout_counts
from koff_prune.pages import infinite
from koff_prune.plan import Plan

if TYPE_CHECKING:
    from koff_prune.run import Run


def card(run: Run, plan: Plan, manifest: dict[str, Any]) -> str:
    """The model card; neither a local path nor a file of a package is a hub's id."""
    domains, merge, narrowed = manifest["domains"], manifest["merged"], manifest.get("vocabulary")
    source = run.recipe.model.source
    on_hub = isinstance(source, str) and not Path(source).exists()
    name = run.model_identity["source"]
    beside = (
        f"with the memory of {merge} in it" if merge else f"with {'' if domains else 'no '}memories beside it"
    )
    tokens, users = run.whole.config.vocab_size, f"{merge} uses" if narrowed else "its domains use"
    own = run.dense.own if not merge else None
    kept = narrowed["kept"] if narrowed else own.shared if own else run.dense.config.vocab_size
    users = "two domains or more use" if own else users
    lines = [
        "---", "library_name: koff-prune", *([f"base_model: {name}"] if on_hub else []), "---", "",
        f"# {name}, {plan.removed}", "",
        f"A backbone of {manifest['parameters']['slim']:,} parameters (dense: {plan.parameters['dense']:,})"
        f" cut by koff-prune (KOFF, arXiv 2605.29075), {beside}."
        + (" What all domains recovered together is part of it." if run.recipe.cut.recover else "")
        + (f" It has {kept:,} of {tokens:,} tokens, those that {users}, and reads others in pieces."
           if kept < tokens else "")
        + (" Each memory has tokens of its own, and so its own tokenizer." if own else ""), "",
    ]  # fmt: skip
    lines += ["The licence of the dense model holds for it too: add it where it does not lie here.", ""]
    if domains and not merge:
        lines += ["As it was exported it had these memories; koff.json tells which there are by now"
                  " (`koff-prune memory list`).", ""]  # fmt: skip
    if domains:
        more = (" own tokens |", " --- |") if own else ("", "")
        lines += [f"| memory | parameters | LoRA rank | KV tokens |{more[0]}",
                  f"| --- | --- | --- | --- |{more[1]}"]  # fmt: skip
    lines += [
        f"| {name} | {d['parameters']:,} | {d['lora_rank']} | {d['kv_tokens']} |"
        + (f" {d['tokens']:,} |" if own else "")
        for name, d in domains.items()
    ]
    table = [("with its memory", "losses.json"), ("memories off", "losses-off.json")][: 1 if merge else 2]
    found = [(label, infinite(read_json(run.folder / f))) for label, f in table if (run.folder / f).exists()]
    counts = heldout_counts(run)
    by = ", by the dense model's tokens" if kept < tokens else ""
    if found:
        columns = [merge] if merge else [*found[0][1], "gmean"]
        lines += ["", f"Perplexity on held-out text{by}, measured then:", "", f"| | {' | '.join(columns)} |",
                  "| --- |" + " --- |" * len(columns)]  # fmt: skip
        for label, losses in found:
            values = perplexities(losses, counts)
            if narrowed:
                values[merge] = infinite(narrowed["perplexity"])
            lines.append(f"| {label} | " + " | ".join(f"{values[name]:.2f}" for name in columns) + " |")
    memory = "" if merge or not domains else ', memory="…"'
    lines += ["", "```python", f"from koff_prune import load_bundle{', load_tokenizer' if own else ''}",
              f'model = load_bundle("this folder"{memory})',
              *([f'tokenizer = load_tokenizer("this folder"{memory})'] if own else []),
              "```", ""]  # fmt: skip
    return "\n".join(lines)
