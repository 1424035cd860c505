"""Six runs that go wrong on purpose, below a healthy one, for the last section of 33_run: symptoms.py [--out FILE]

Twenty steps of the shipped model each, three seeds, one thread: some minutes. A row of the file is a run; a column of
the log is its mean over the last three steps.
"""
import argparse, copy, csv, math
from pathlib import Path

import torch

from capo.recipe import capo, grpo, grpo_size
from capo.rollout import HFSampler
from capo.task import arithmetic, base_model, verify
from capo.train import TrainConfig, train

COLUMNS = ("reward", "mixed", "masked", "entropy", "truncated", "clipped", "grad_norm", "mismatch", "mismatch_max")
HEALTHY = capo(.5, 1.05, 2.1, grpo_size)


class AnotherEngine:
    "Samples from a copy of the policy in bfloat16, and says that it is another engine."
    external = True

    def __init__(self, tokenizer): self.tokenizer = tokenizer

    def sync(self, policy): self.copy = copy.deepcopy(policy).bfloat16()

    def __call__(self, prompts, n, seed): return HFSampler(self.copy, self.tokenizer, 16)(prompts, n, seed)


def boxed_only(text, answer):
    "A form that this model does not know."
    return "boxed" in text and verify(text, answer)


RUNS = {
    "healthy": dict(recipe=HEALTHY),
    "no mixed groups": dict(recipe=HEALTHY, verify=boxed_only),
    "everything masked": dict(recipe=capo(.5, 1e6, 1.0, grpo_size)),
    "entropy rising": dict(recipe=capo(.5, 1, math.inf), lr=2e-3),
    "entropy falling": dict(recipe=grpo(), lr=1e-3, updates=4, epochs=4),
    "truncation": dict(recipe=HEALTHY, max_new_tokens=4),
    "another engine": dict(recipe=HEALTHY, sampler=AnotherEngine),
}


def end_of(seed, recipe, sampler=None, verify=verify, **options):
    "The means of the log's columns over the last three steps."
    policy, tokenizer = base_model()
    problems = arithmetic(2000, seed=11 + seed, exclude={p.prompt for p in arithmetic(64, seed=10, distinct=True)})
    config = TrainConfig(**dict(steps=20, questions=32, seed=seed) | options)
    rows = train(policy, tokenizer, problems, recipe, sampler and sampler(tokenizer), verify, config=config).rows[-3:]
    return {k: f"{sum(row[k] for row in rows) / 3:.4g}" if k in rows[0] else "" for k in COLUMNS}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default=Path(__file__).parents[1]/"data"/"symptoms.csv")
    torch.set_num_threads(1)
    with open(parser.parse_args().out, "w", newline="") as f:
        writer = csv.DictWriter(f, ("run", "seed", *COLUMNS))
        writer.writeheader()
        for name, options in RUNS.items():
            for seed in range(3): writer.writerow({"run": name, "seed": seed} | end_of(seed, **options)); f.flush()
