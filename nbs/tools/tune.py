"""CAPO's settings beside GRPO on a seed that is not reported: tune.py FOLDER

Trains GRPO and a grid of CAPO's settings for 200 steps each from the shipped base model, and writes the evaluations
of all of them to FOLDER/tuning.csv.
"""
import csv, math, sys
from functools import partial
from pathlib import Path

from capo.compare import compare
from capo.recipe import capo, grpo, grpo_size
from capo.train import TrainConfig

# tau, ref_low, ref_high
GRID = [(.25, 1.05, 2.1), (.5, 1.05, 2.1), (1., 1.05, 2.1), (.5, 1.05, math.inf), (.5, 1.8, 2.1)]

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    name = "capo, τ = {:g}, mask [{:g}, {:g}]".format
    makers = {"grpo": grpo} | {name(*settings): partial(capo, *settings, grpo_size) for settings in GRID}
    rows = compare(folder, makers, [101], TrainConfig(steps=200, eval_every=25))["evals"]
    with (folder / "tuning.csv").open("w", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
