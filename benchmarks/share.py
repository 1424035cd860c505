"""What CAPO adds to a step: python benchmarks/share.py [--rounds 5]

Processor milliseconds of the advantages of both methods and of what CAPO's log shows, on a batch of 64 questions of
8 responses of the small world; and of a whole step, for the share. The reference's pass is apart."""
import argparse
import time
from dataclasses import replace
from statistics import median

import torch
from measure import header, in_turn, row

from capo.calibration import auc_mean
from capo.mask import noise_mask
from capo.recipe import capo, grpo
from capo.rollout import HFSampler, rollout, score
from capo.task import arithmetic, base_model, verify
from capo.train import TrainConfig, train

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    a = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = base_model()
    problems, recipe, ends = arithmetic(4096, seed=0), capo(.5, 1.05, 2.1), []
    r = rollout(HFSampler(model, tokenizer, 16), problems[:64], 8, verify)
    r = replace(r, ref_logp=score(model, r))
    arms = {"GRPO's advantages": lambda: grpo().advantage(r, 1),
            "CAPO's, with the mask": lambda: recipe.advantage(r, 1),
            "of which the mask": lambda: noise_mask(r.ref_ppl, r.reward, 1.05, 2.1),
            "AUC-mean, for the log": lambda: auc_mean(r.lpm, r.reward, r.valid),
            "the reference's pass": lambda: score(model, r)}
    seconds = in_turn(arms, a.rounds)
    config = TrainConfig(steps=a.rounds + 1, updates=1, lr=1e-6)
    train(model, tokenizer, problems, recipe, config=config, log=lambda row: ends.append(time.process_time()))
    whole = median(y - x for x, y in zip(ends, ends[1:]))
    header(["CAPO with its mask, one update", "ms", "share of the step"])
    for name, s in {**seconds, "the whole step": whole}.items(): row(name, 1e3 * s, f"{s / whole:.2%}")
