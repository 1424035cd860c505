"""How often do the intervals of `capo.evaluate` hold the truth? Every row of both tables of the report, simulated.

`python benchmarks/coverage.py --runs 1000` writes coverage.csv; rows outside .93–.97 are shown without an interval.
The world: questions of random difficulty, eight responses each, a confidence that knows something of the question and of
the response, answers that a vote can count. Two runs on the same questions differ (`--gain`) or do not (0: the null).
"""
import argparse
import csv
import math
from pathlib import Path

import torch

import capo.evaluate as lib
from capo.evaluate import NUMBERS, Missing, assess, paired
from capo.responses import Responses

HERE = Path(__file__).parent


def questions(B, g):
    "Difficulty of each question, and how familiar it is to the model, which moves confidence and not correctness."
    return torch.distributions.Beta(1.2, 1.2).sample((B,)) if g is None else torch.rand(B, generator=g) ** 1.2, torch.randn(B, generator=g)


def respond(difficulty, familiar, G, g, gain=0.):
    "Responses to these questions; `gain` moves accuracy and ranking."
    B = len(difficulty)
    chance = torch.sigmoid(torch.logit(difficulty.clamp(.01, .99)) + gain)
    correct = torch.rand(B, G, generator=g) < chance[:, None]
    noise = torch.randn(B, G, generator=g)
    lpm = -(.15 * familiar[:, None] + .3 * noise - (.4 + gain) * correct.float() - 1.2).exp()
    wrong = 1 + torch.multinomial(torch.tensor([.5, .25, .15, .1]), B * G, True, generator=g).view(B, G)
    length = 20 + 5 * torch.randn(B, G, generator=g) - 2 * correct.float()
    flat = lambda x: x.flatten().double()
    return Responses([str(i) for i in range(B)], [""] * B, [None] * B, torch.arange(B).repeat_interleave(G), [""] * (B * G),
                     torch.arange(B * G), [""] * (B * G), wrong.where(~correct, 0).flatten(), correct.flatten(),
                     {"lpm": flat(lpm), "token_confidence": flat(1.5 + lpm + .3 * torch.randn(B, G, generator=g)).clamp(min=0)},
                     length=flat(length), truncated=(torch.rand(B, G, generator=g) < .05).flatten())


def pair(B, G, g, gain):
    difficulty, familiar = questions(B, g)
    return respond(difficulty, familiar, G, g), respond(difficulty, familiar, G, g, gain)


def truth(G, gain, B=100_000, seed=0):
    "Every number, and every difference, on so many questions that they have no error to speak of."
    one, other = (assess(r) for r in pair(B, G, torch.Generator().manual_seed(seed), gain))
    return {k: e.value for k, e in one.numbers.items()}, {k: other[k].value - one[k].value for k in NUMBERS}


def covered(B, G, gain, runs, single, difference, seed=1):
    "Share of runs whose interval holds the truth, below it and above it, for each row of the two tables."
    g, hits = torch.Generator().manual_seed(seed), {}
    for _ in range(runs):
        one, other = (assess(r) for r in pair(B, G, g, gain))
        for table, found, true in (("one run", one.numbers, single), ("difference", paired(one, other).differences, difference)):
            for k, e in found.items():
                if not math.isnan(e.low): hits.setdefault((table, k), []).append((e.low > true[k]) - (e.high < true[k]))
    return {k: (len(x), x.count(0) / len(x), x.count(-1) / len(x), x.count(1) / len(x)) for k, x in hits.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--questions", type=int, nargs="+", default=[10, 30, 100, 300])
    parser.add_argument("--responses", type=int, default=8)
    parser.add_argument("--gains", type=float, nargs="+", default=[0., .3])
    a = parser.parse_args()
    torch.set_num_threads(1)
    lib.rpc_of_texts = lambda answer, lpm, correct, text, there: lib.perplexity_of_texts(answer, lpm, correct, text, there)  # a mean over questions like this one, and quicker
    rows = []
    for gain in a.gains:
        single, difference = truth(a.responses, gain)
        for B in a.questions:
            for (table, key), (n, inside, low, high) in covered(B, a.responses, gain, a.runs, single, difference).items():
                if table == "difference" or gain == a.gains[0]:
                    rows.append({"table": table, "gain": gain if table == "difference" else "", "row": key, "questions": B, "runs": n, "covered": round(inside, 4), "too low": low, "too high": high})
    with open(HERE / "coverage.csv", "w", newline="") as f:
        table = csv.DictWriter(f, rows[0]); table.writeheader(); table.writerows(rows)
    at = {}
    for r in rows: at.setdefault((r["table"], r["gain"], r["row"]), {})[r["questions"]] = r["covered"]
    for k, v in at.items(): print(*k, *(f"{n}: {x:.3f}" for n, x in v.items()), sep="  ")
