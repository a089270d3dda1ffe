"""What gates may start from, judged by the bare plan: compensated, nothing trained, on text not scored on.

python benchmarks/starts.py RECIPE RESULT.json --out RUN --sparsity 0.12,0.25

`surgeon` stands there three times: its costs as independence has them (mend 0), as each unit's own Fisher
information corrects them (1), and half of the way (0.5, what the tool uses). A folder of a run of the same
recipe lends its scoring pass.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from koff_export.files import write_json
from koff_prune import surgeon
from koff_prune.compensate import Compensation
from koff_prune.cut import cut
from koff_prune.evaluate import window_losses
from koff_prune.memory import Memories
from koff_prune.plan import make_plan
from koff_prune.reading import load_recipe
from koff_prune.recipe import Memory
from koff_prune.run import Run
from koff_prune.scores import removal_costs

WINDOWS = 24  # training windows a domain, the last ones, which a short training does not reach
STARTS = [("fisher", 0.5), ("curvature", 0.5), ("surgeon", 0.0), ("surgeon", 0.5), ("surgeon", 1.0)]


def bare_loss(run: Run, model: object) -> float:
    """Mean nats per token over the domains, memories off."""
    bare = Memories(model, Memory(lora=None, kv=None), {}, 0)  # type: ignore[arg-type]
    losses = [window_losses(bare, b.train[-WINDOWS:], None, batch=8) for b in run.domains.values()]
    return sum(sum(of) / len(of) for of in losses) / len(losses)


def main() -> None:
    """See the module's own words."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sparsity", default="0.12,0.25")
    args = parser.parse_args()
    rows = []
    with Run(load_recipe(args.recipe), args.out, resume=True) as run:
        recipe = run.recipe
        solve = Compensation(run.statistics.second, recipe.cut.ridge, run.units)
        dense = bare_loss(run, run.fresh())
        for start, surgeon.MEND in STARTS:
            costs = removal_costs(
                start, run.dense.model, run.units, recipe.structure, run.statistics, recipe.cut.ridge
            )
            for sparsity in map(float, args.sparsity.split(",")):
                structure = recipe.structure.model_copy(update={"sparsity": sparsity})
                plan = make_plan(
                    costs, run.units, structure, model=run.model_identity, method=start, ranking="global"
                )
                damage = bare_loss(run, cut(run.fresh(), plan, solve)) - dense
                row = {"start": start, "sparsity": sparsity, "damage": round(damage, 4)}
                if start == "surgeon":
                    row["mend"] = surgeon.MEND
                rows.append(row)
                print(row, flush=True)
        write_json(
            args.result,
            {
                "command": f"python benchmarks/starts.py {args.recipe} --sparsity {args.sparsity}",
                "what": "nats per token that a bare compensated plan costs, mean over domains",
                "seed": recipe.seed, "dense": round(dense, 4), "dtype": recipe.model.dtype, "rows": rows,
            },
        )  # fmt: skip


if __name__ == "__main__":
    main()
