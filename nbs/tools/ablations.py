"""Every method, τ, masks, group sizes and pairs across questions in the small world: ablations.py FOLDER

`FOLDER` may hold an earlier, interrupted run of the same command, which goes on. Three stages, on as many processes as
there are cores: a small search, the same for every method, on a seed that is not reported (the rate by accuracy, then
the method's own parameter by how often the most confident answer is right); the runs, five seeds each; and the tables
`search.csv`, `final.csv`, `evals.csv`, `config.json` in nbs/data/ablations, from whatever is done. Without the search
stage, what is recorded of it is taken.
"""
import argparse, csv, json, math, shlex, sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from importlib import resources
from pathlib import Path

import torch

from capo.advantage import pairwise_advantage
from capo.baselines import (
    c2gspg, cde, cispo, codapo, dapo, disco, dr_grpo, gspo, pairwise, real, simko, staircase, unlikeliness)
from capo.compare import Job, commit, described, made_with, make_base, processes, run_job
from capo.evaluate import assess, evaluate
from capo.folder import same_run
from capo.grpo import clipped_loss
from capo.mask import noise_mask, quantile_thresholds
from capo.recipe import Recipe, capo, grpo, grpo_size, masked, paper_size
from capo.responses import read_responses
from capo.selective import coverage_at
from capo.surrogate import exponential, hinge, logistic, squared_hinge
from capo.task import systematic_teacher
from capo.train import TrainConfig

TAU, MASK = .5, (1.05, 2.1)
SEEDS, RATES = (1, 2, 3, 4, 5), (2.5e-4, 5e-4, 1e-3)
SEARCH = TrainConfig(steps=100, eval_every=25, seed=101)
RUNS = TrainConfig(steps=200, eval_every=40)
DATA = Path(__file__).parents[1] / "data" / "ablations"


# Recipes

def clipped_grpo(eps): return replace(grpo(), loss=partial(clipped_loss, eps=eps))


def masked_grpo(high): return grpo(True, MASK[0], high)


def our(tau=TAU, low=MASK[0], high=MASK[1], scale=grpo_size, across=0.): return capo(tau, low, high, scale, across)


def falling(start): return cde(omega=staircase(start))


def by_quantiles(lower, upper):
    "CAPO with thresholds at the quantiles of each batch."
    def keep(r):
        low, high = quantile_thresholds(r.ref_ppl, r.reward, lower, upper, r.valid)
        return noise_mask(r.ref_ppl, r.reward, max(1, low), max(1, high))
    return Recipe("capo", masked(our(TAU, 1, math.inf).advantage, keep), keep=keep)


def both_ends(low, high):
    "CAPO whose masked responses stand in no pair, so that their partners lose it too."
    def keep(r): return noise_mask(r.ref_ppl, r.reward, low, high)
    def advantage(r, step):
        there = r.valid & keep(r)
        return grpo_size(pairwise_advantage(r.lpm, r.reward, logistic(TAU), there), r.reward, there, TAU)
    return Recipe("capo", advantage, keep=keep)


def mean_of_pairs(A, reward, valid, tau, groups=1):
    "τÃ over the number of pairs."
    right = ((reward > 0) & valid).sum(1, keepdim=True)
    return tau * A / (right * (valid.sum(1, keepdim=True) - right)).clamp(min=1)


def sum_of_pairs(A, reward, valid, tau, groups=1): return tau * A / groups


# What is searched: a method's own main parameter, its source's value or ours among the three

GRID: dict[str, tuple[Callable[..., Recipe], tuple]] = {
    "grpo": (clipped_grpo, (.1, .2, .4)), "grpo-mask": (masked_grpo, (2., 2.1, 2.2)),
    "grpo-across": (partial(grpo, True, 1, math.inf), (.25, .5, 1.)), "capo": (our, (.25, .5, 1.)),
    "capo-across": (partial(our, TAU, *MASK, grpo_size), (.25, .5, 1.)),
    "dr_grpo": (partial(dr_grpo, 16), (.1, .2, .4)), "dapo": (dapo, ((.2, .2), (.2, .28), (.2, .4))),
    "gspo": (gspo, ((3e-4, 4e-4), (3e-3, 4e-3), (3e-2, 4e-2))), "cispo": (cispo, (2., 5., 10.)),
    "disco": (disco, (1., 10., None)), "real": (real, (.25, .5, 1.)),
    "c2gspg": (c2gspg, (.01, .03, .1)), "unlikeliness": (unlikeliness, (.1, .25, .5)),
    "codapo": (codapo, (.05, .1, .5)), "cde": (falling, (.5, 1., 2.)), "simko": (simko, (.01, .03, .1))}

# What is run with one rate and no search

ACROSS = {f"{kind}{'' if mask else '-nomask'}-across-{share:g}":
          partial(grpo, True, *(MASK if mask else (1, math.inf)), share) if kind == "grpo" else
          partial(our, TAU, *(MASK if mask else (1, math.inf)), grpo_size, share)
          for share in (0, .25, .5, 1) for kind in ("grpo", "capo") for mask in (True, False)}
TAUS = {f"capo-tau-{tau:g}": partial(our, tau) for tau in (.1, .25, 1., 2.)}
MASKS = {f"capo-quantile-{low:g}-{high:g}": partial(by_quantiles, low, high)
         for low, high in ((.05, .95), (.1, .9), (.25, .75))} | {"capo-both-ends": partial(both_ends, *MASK)}
SIZES = {"capo-sum": partial(our, scale=sum_of_pairs), "capo-sum-over-tau": partial(our, scale=paper_size),
         "capo-mean": partial(our, scale=mean_of_pairs)}
SURROGATES = {f"pairwise-{name}": partial(pairwise, φ, *MASK) for name, φ in (
    ("hinge", hinge), ("squared_hinge", squared_hinge), ("exponential", exponential))}
GROUPS = {f"{name}-G-{G}": (make, G) for G in (4, 16) for name, make in (("grpo", grpo), ("capo", our))}
SYSTEMATIC = {name: ACROSS[of] for name, of in (
    ("grpo", "grpo-nomask-across-0"), ("capo", "capo-across-0"), ("grpo-mask", "grpo-across-0"),
    ("capo-nomask", "capo-nomask-across-0"), ("grpo-across", "grpo-nomask-across-0.5"),
    ("capo-across", "capo-across-0.5"))}


def said(x): return "none" if x is None else ", ".join(f"{v:g}" for v in (x if isinstance(x, tuple) else (x,)))


def searches(folder):
    "A job for each method, rate and value, with these three."
    base = str(resources.files("capo") / "base")
    for name, (make, values) in GRID.items():
        for lr in RATES:
            for i, value in enumerate(values):
                place = str(folder / "search" / f"{name}-{lr:g}-{i}")
                yield Job(name, partial(make, value), base, place, replace(SEARCH, lr=lr), 128), value


def searched(folder):
    "Rows of the search with their jobs: the mean of a setting's last two evaluations, or what is recorded of it."
    file = DATA / "search.csv"
    recorded = list(csv.DictReader(file.open())) if file.exists() else []
    known = {(row["method"], float(row["lr"]), row["value"]): row for row in recorded}
    for job, value in searches(folder):
        key, result = (job.arm, job.config.lr, said(value)), Path(job.folder) / "result.json"
        if result.exists(): late = json.loads(result.read_text())["evals"][-2:]
        elif key in known: late = [known[key]] * 2
        else: continue
        mean = {k: sum(float(e[k]) for e in late) / 2 for k in ("accuracy", "auc_mean", "most_confident", "entropy")}
        yield dict(zip(("method", "lr", "value"), key)) | mean, job


def chosen(folder):
    "Each method's setting, its row and job: the rate of its most accurate run, and there the surest answer most right."
    best, every = {}, list(searched(folder))
    for name in GRID:
        mine = [(row, job) for row, job in every if row["method"] == name]
        if not mine: continue
        rate = max(mine, key=lambda x: x[0]["accuracy"])[0]["lr"]
        best[name] = max((x for x in mine if x[0]["lr"] == rate), key=lambda x: x[0]["most_confident"])
    return best


def runs(folder, bases):
    "The reported runs, what matters most first: arm, seeds and world of each."
    at = lambda arm, make, base, config, where: [
        Job(arm, make, base(s), str(folder / where / f"{arm}-{s}"), replace(config, seed=s), 256) for s in SEEDS]
    calibrated, other = (lambda s: str(bases / f"base-{s}")), (lambda s: str(folder / "systematic" / f"base-{s}"))
    best = chosen(folder)
    for name, (_, job) in best.items():
        yield from at(name, job.make, calibrated, replace(RUNS, lr=job.config.lr), "tuned")
    plain = lambda arms: [j for arm, make in arms.items() for j in at(arm, make, calibrated, RUNS, "plain")]
    yield from plain(ACROSS)
    yield from (j for arm, make in SYSTEMATIC.items() for j in at(arm, make, other, RUNS, "systematic"))
    yield from plain(TAUS | MASKS | SURROGATES | SIZES)
    for arm, (make, G) in GROUPS.items():
        yield from at(arm, make, calibrated, replace(RUNS, group_size=G, questions=512 // G), "plain")
    for name, (_, job) in best.items():    # the other rate of those with the lower one, GRPO, CAPO
        lr = RUNS.lr if job.config.lr < RUNS.lr else RATES[0]
        if lr == RUNS.lr or name in ("grpo", "capo"):
            yield from at(f"{name}-at-{lr:g}", job.make, calibrated, replace(RUNS, lr=lr), "plain")


def finished(job):
    "A row of the final table."
    r = read_responses(Path(job.folder) / "responses.jsonl.gz")
    numbers, score = assess(r), r.score.nan_to_num(-math.inf)
    row = evaluate(r) | {k: numbers[k].value for k in ("majority", "perplexity_consistency", "pass_at_n", "prr")}
    result = json.loads((Path(job.folder) / "result.json").read_text())
    best = max(e["accuracy"] for e in result["evals"])
    return (where(job) | row | {k: result["evals"][-1][k] for k in ("rescored_auc", "entropy", "length")} | {
        "coverage_9": coverage_at(score, r.correct, .9), "best_accuracy": best, "masked": result["masked"],
        "seconds": result["seconds"], "lr": job.config.lr})


def where(job): return {"set": Path(job.folder).parent.name, "arm": job.arm, "seed": job.config.seed}


def write(path, rows):
    "A CSV of rows, six digits."
    rows = list(rows)
    if not rows: return
    with path.open("w", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]), extrasaction="ignore")
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def tables(folder, jobs, map=map):
    "Writes the tables from what is done; `map` is that of a pool, or Python's own."
    DATA.mkdir(parents=True, exist_ok=True)
    done = [job for job in jobs if (Path(job.folder) / "result.json").exists()]
    write(DATA / "search.csv", [row for row, _ in searched(folder)])
    write(DATA / "final.csv", map(finished, done))
    read = lambda job: json.loads((Path(job.folder) / "result.json").read_text())["evals"]
    write(DATA / "evals.csv", (where(job) | e for job in done for e in read(job)))
    about = json.loads((folder / "config.json").read_text())
    arms = {f"{w['set']}/{w['arm']}": described(job.make) for job in done for w in [where(job)]}
    made = about["made_with"] | {"tables_by": commit()}      # the rule of the search may be younger than its runs
    text = json.dumps(made | {"search": asdict(SEARCH), "runs": asdict(RUNS), "arms": arms}, indent=1)
    (DATA / "config.json").write_text(text + "\n")
    print(f"{len(done)} of {len(jobs)} runs are done; the tables are in {DATA}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bases", type=Path, default=Path("runs/tiny_lm"), help="folder with base-1 to base-5")
    parser.add_argument("--workers", type=int)
    stages = ("search", "runs", "tables")
    parser.add_argument("--stage", choices=stages, nargs="+", default=stages)
    a = parser.parse_args()
    command = shlex.join(["python", "nbs/tools/ablations.py", *sys.argv[1:]])
    folder = same_run(a.folder, {"search": asdict(SEARCH), "runs": asdict(RUNS)}, made_with() | {"command": command})
    torch.set_num_threads(1)
    with processes(a.workers) as pool:
        if "search" in a.stage: list(pool.map(run_job, [job for job, _ in searches(folder)]))
        if "runs" in a.stage:
            list(pool.map(make_base, SEEDS, [str(a.bases / f"base-{s}") for s in SEEDS]))
            worlds = [str(folder / "systematic" / f"base-{s}") for s in SEEDS]
            list(pool.map(partial(make_base, teacher=systematic_teacher), SEEDS, worlds))
            list(pool.map(run_job, list(runs(folder, a.bases))))
        if "tables" in a.stage: tables(folder, list(runs(folder, a.bases)), pool.map)
