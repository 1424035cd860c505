"""Choose τ, the mask's thresholds and LoRA's learning rate on a seed that is not reported: tune.py FOLDER

Trains GRPO and a grid of CAPO's settings for 200 steps each from one fresh base model, then GRPO with LoRA at three learning
rates, and gathers the evaluations of all of them in FOLDER/tuning.csv.
"""
import csv, math, sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from capo.compare import compare
from capo.recipe import capo, grpo, grpo_size
from capo.train import TrainConfig

SEED, CONFIG = 101, TrainConfig(steps=200)

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    grid = [(tau, 1.05, high) for tau in (.25, .5, 1.) for high in (1.7, 2.1, math.inf)] + [(.5, 1.8, 2.1)]
    makers = {"grpo": grpo} | {f"capo τ={t:g} mask [{low:g}, {high:g}]": partial(capo, t, low, high, grpo_size) for t, low, high in grid}
    rows = compare(folder / "full", makers, [SEED], CONFIG, fresh_base=True)["evals"]
    for lr in (2e-3, 5e-3, 1e-2):
        run = compare(folder / f"lora-{lr:g}", {f"grpo LoRA 8, lr={lr:g}": grpo}, [SEED], replace(CONFIG, lora_rank=8, lr=lr))
        rows += run["evals"]
    with (folder / "tuning.csv").open("w", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
