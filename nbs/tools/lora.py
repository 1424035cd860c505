"""Adapters on the small model: which rank and learning rate, by one rule for both arms. lora.py [--out FOLDER]

For each rank and arm the learning rate is the one with the highest accuracy after 100 steps on seed 101, which is not
reported; with it the arm is trained for 400 steps on five seeds, from bases of their own. Writes `tuning.csv`, and for
each rank `rank-R.json`, a summary as `capo demo` writes it, with its settings. What an earlier call finished is read.
The same arms with all weights are in nbs/data/tiny_lm.
"""
import argparse, csv, json
from dataclasses import asdict
from pathlib import Path

from capo.compare import Job, arms, made_with, make_base, processes, run_job, summarise
from capo.responses import write_whole
from capo.train import TrainConfig

ARMS, SEEDS, UNREPORTED = ("grpo", "capo"), (1, 2, 3, 4, 5), 101
RANKS, RATES = (2, 8, 32), (1e-3, 2e-3, 4e-3)
TUNING = TrainConfig(steps=100, eval_every=100)
REPORTED = TrainConfig(steps=400, eval_every=50)


def job(folder, config, arm, rank, lr, seed):
    config = TrainConfig(**asdict(config) | {"lora_rank": rank, "lr": lr, "seed": seed})
    name = f"{arm}-{seed}-rank{rank}-lr{lr:g}-{config.steps}"
    return Job(arm, arms()[arm], str(folder/f"base-{seed}"), str(folder/name), config)


def chosen(tried):
    "The learning rate of each arm and rank: that of its highest accuracy."
    best = {}
    for row in tried:
        key = row["arm"], row["rank"]
        if key not in best or row["accuracy"] > best[key]["accuracy"]: best[key] = row
    return {key: row["lr"] for key, row in best.items()}


if __name__ == "__main__":
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--work", type=Path, default=Path("runs/tiny_lm_lora"))
    ask.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1]/"data/tiny_lm_lora")
    ask.add_argument("--workers", type=int)
    a = ask.parse_args()
    a.work.mkdir(parents=True, exist_ok=True); a.out.mkdir(parents=True, exist_ok=True)
    with processes(a.workers) as pool:
        seeds = (UNREPORTED, *SEEDS)
        list(pool.map(make_base, seeds, [str(a.work/f"base-{seed}") for seed in seeds]))
        grid = [(arm, rank, lr) for arm in ARMS for rank in RANKS for lr in RATES]
        ends = [run["evals"][-1] for run in pool.map(run_job, [job(a.work, TUNING, *x, UNREPORTED) for x in grid])]
        tried = [{"arm": arm, "rank": rank, "lr": lr, "accuracy": end["accuracy"], "auc_mean": end["auc_mean"]}
                 for (arm, rank, lr), end in zip(grid, ends)]
        with (a.out/"tuning.csv").open("w", newline="") as f:
            writer = csv.DictWriter(f, list(tried[0]))
            writer.writeheader(); writer.writerows(tried)
        lr = chosen(tried)
        jobs = {rank: [job(a.work, REPORTED, arm, rank, lr[arm, rank], seed) for arm in ARMS for seed in SEEDS]
                for rank in RANKS}
        runs = {rank: pool.map(run_job, its) for rank, its in jobs.items()}
        for rank, its in runs.items():
            about = {"rank": rank, "lr": {arm: lr[arm, rank] for arm in ARMS}, **made_with()}
            write_whole(a.out/f"rank-{rank}.json", json.dumps(about | summarise(list(its)), indent=1) + "\n")
