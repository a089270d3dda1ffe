"""Compares the plans of two methods without training anything: how much do they agree on what to remove?

python examples/compare_plans.py recipes/smollm2/quickstart.yaml fisher wanda
"""

import argparse
import sys
import tempfile
from pathlib import Path

from koff_prune import KoffError, load_recipe
from koff_prune.arms import Arm
from koff_prune.recipe import BASELINES
from koff_prune.run import Run
from koff_prune.stages import plan_arm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("recipe")
    for name in ("first", "second"):
        parser.add_argument(name, choices=BASELINES)
    asked = parser.parse_args()
    recipe, methods = load_recipe(asked.recipe), (asked.first, asked.second)
    with tempfile.TemporaryDirectory() as folder, Run(recipe, Path(folder) / "run", resume=False) as run:
        plans = {name: plan_arm(run, Arm(name, "global"), run.folder / name) for name in methods}
        for kind in recipe.structure.units:
            gone = {
                name: {
                    (i, j)
                    for i, (layer, have) in enumerate(zip(plan.layers, run.units.layers, strict=True))
                    for j in set(range(have.count(kind))) - set(layer[kind])
                }
                for name, plan in plans.items()
            }
            one, other = gone[asked.first], gone[asked.second]
            shared = len(one & other) / max(1, len(one))
            print(f"{shared:.1%} of the {len(one):,} {kind} that {asked.first} removes,"
                  f" {asked.second} removes too")  # fmt: skip


if __name__ == "__main__":
    try:
        main()
    except (KoffError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
