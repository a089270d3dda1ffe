"""Compares the plans of two methods without training anything: how much do they agree on what to remove?

python examples/compare_plans.py recipes/smollm2/quickstart.yaml fisher wanda
"""

import sys
import tempfile
from pathlib import Path

from koff_prune import load_recipe
from koff_prune.arms import Arm
from koff_prune.run import Run
from koff_prune.stages import plan_arm

recipe = load_recipe(sys.argv[1])
first, second = sys.argv[2:4]
with tempfile.TemporaryDirectory() as folder, Run(recipe, Path(folder) / "run", resume=False) as run:
    plans = {name: plan_arm(run, Arm(name, "global"), run.folder / name) for name in (first, second)}
    gone = {
        name: {
            (i, j)
            for i, (layer, have) in enumerate(zip(plan.layers, run.units.layers, strict=True))
            for j in set(range(have.ffn_neurons)) - set(layer["ffn_neurons"])
        }
        for name, plan in plans.items()
    }
    shared = len(gone[first] & gone[second]) / max(1, len(gone[first]))
    print(f"{shared:.1%} of the {len(gone[first]):,} neurons that {first} removes, {second} removes too")
