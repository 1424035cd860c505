"""How often do the intervals of `capo.evaluate` hold the truth? Every row of both tables of a report, simulated.

`python benchmarks/coverage.py --runs 1000` prints a table and writes coverage.csv. The world: questions of random
difficulty, eight responses each, a confidence that knows something of the question and of the response, answers that
a vote can count. Two runs on the same questions do not differ (gain 0, the null), or do. Each run chooses a threshold;
what its interval claims is about that threshold, so its truth is what that threshold does among all questions.
"""
import argparse
import csv
import math
from pathlib import Path

import torch

import capo.evaluate as lib
from capo.evaluate import NUMBERS, assess, paired
from capo.responses import Responses

HERE = Path(__file__).parent


def questions(B, g):
    "Chance to be right of each question, and how familiar it is, which moves confidence and not correctness."
    return torch.rand(B, generator=g) ** 1.2, torch.randn(B, generator=g)


def respond(chance, familiar, G, g, gain=0.):
    "Responses to these questions; `gain` moves accuracy and ranking."
    B = len(chance)
    correct = torch.rand(B, G, generator=g) < torch.sigmoid(torch.logit(chance.clamp(.01, .99)) + gain)[:, None]
    noise, more = torch.randn(B, G, generator=g), torch.randn(B, G, generator=g)
    lpm = -(.15 * familiar[:, None] + .3 * noise - (.4 + gain) * correct.float() - 1.2).exp()
    wrong = 1 + torch.multinomial(torch.tensor([.5, .25, .15, .1]), B * G, True, generator=g).view(B, G)
    length = 20 + 5 * torch.randn(B, G, generator=g) - 2 * correct.float()
    flat, N = lambda x: x.flatten().double(), B * G
    scores = {"lpm": flat(lpm), "token_confidence": flat(1.5 + lpm + .3 * more).clamp(min=0)}
    return Responses([str(i) for i in range(B)], [""] * B, [None] * B, torch.arange(B).repeat_interleave(G), [""] * N,
                     torch.arange(N), [""] * N, wrong.where(~correct, 0).flatten(), correct.flatten(), scores,
                     length=flat(length), truncated=(torch.rand(B, G, generator=g) < .05).flatten())


def pair(B, G, g, gain):
    "Two runs on the same questions."
    chance, familiar = questions(B, g)
    return respond(chance, familiar, G, g), respond(chance, familiar, G, g, gain)


def truth(G, gain, B=100_000, seed=0):
    "Both runs on so many questions that no number has an error to speak of: numbers, differences, what thresholds do."
    one, other = (assess(r) for r in pair(B, G, torch.Generator().manual_seed(seed), gain))
    score, order = one.responses.score.sort(descending=True)
    right = one.responses.correct[order].double().cumsum(0)
    def at(threshold):
        k = int((score >= threshold).sum())
        return {"coverage": k / len(score), "precision": right[k - 1].item() / k if k else math.nan}
    return {k: e.value for k, e in one.numbers.items()}, {k: other[k].value - one[k].value for k in NUMBERS}, at


def covered(B, G, gain, runs, single, difference, at, seed=1):
    "Number of intervals, and the share that holds the truth, that is above it, that is below it, for each row."
    g, hits = torch.Generator().manual_seed(seed), {}
    for _ in range(runs):
        one, other = (assess(r) for r in pair(B, G, g, gain))
        tables = (("one run", one.numbers, single | at(one.threshold)),
                  ("difference", paired(one, other).differences, difference))
        for table, found, true in tables:
            for k, e in found.items():
                if math.isfinite(e.low): hits.setdefault((table, k), []).append((e.low > true[k]) - (e.high < true[k]))
    return {k: (len(x), x.count(0) / len(x), x.count(1) / len(x), x.count(-1) / len(x)) for k, x in hits.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--questions", type=int, nargs="+", default=[10, 30, 100, 300])
    parser.add_argument("--responses", type=int, default=8)
    parser.add_argument("--gains", type=float, nargs="+", default=[0., .3])
    a = parser.parse_args()
    torch.set_num_threads(1)
    lib.rpc_of_texts = lib.perplexity_of_texts # a mean over questions as well, and a hundred times as quick
    rows = []
    for gain in a.gains:
        single, difference, at = truth(a.responses, gain)
        for B in a.questions:
            found = covered(B, a.responses, gain, a.runs, single, difference, at)
            for (table, key), (n, inside, above, below) in found.items():
                if key == "rpc" or (table == "one run" and gain != a.gains[0]): continue
                rows.append({"table": table, "gain": gain, "row": key, "questions": B, "intervals": n,
                             "covered": round(inside, 4), "above": round(above, 4), "below": round(below, 4)})
    with open(HERE / "coverage.csv", "w", newline="") as f:
        table = csv.DictWriter(f, rows[0], lineterminator="\n")
        table.writeheader(); table.writerows(rows)
    lines = {}
    for r in rows: lines.setdefault((r["table"], r["gain"], r["row"]), {})[r["questions"]] = r["covered"]
    print("| table | gain | row |", *(f"{n} |" for n in a.questions), "\n|---|---|---|" + "---|" * len(a.questions))
    shown = lambda v: [f"{v[n]:.3f} |" if n in v else "– |" for n in a.questions]
    for k, v in lines.items(): print("|", *(f"{x} |" for x in k), *shown(v))
