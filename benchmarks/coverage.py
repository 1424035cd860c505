"""How often do the intervals of `capo.evaluate` hold the truth? Every row of both tables of a report, simulated.

`python benchmarks/coverage.py --runs 1000` prints a table and writes coverage.csv, a size at a time; what it
already holds of as many runs, or more, stays. Every interval is simulated; `capo.evaluate.reliable` says which of them
a report shows. The world: questions of random difficulty, eight responses each, a confidence that knows something of
the question and of the response, answers that a vote can count. Two runs on the same questions do not differ (gain 0,
the null), or do. Each run chooses a threshold; what its interval claims is about that threshold, so its truth is what
that threshold does among all questions.
"""
import argparse
import csv
import math
from contextlib import contextmanager
from pathlib import Path

import torch

import capo.evaluate as lib
from capo.evaluate import NUMBERS, Assessment, assess, estimate, paired, statistics
from capo.responses import Responses

HERE = Path(__file__).parent
AT_ONCE = 4096 # questions of several runs that vote at once


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


@contextmanager
def votes(of_groups):
    "With this in the place of the function that asks the questions of a run for their votes."
    usual, lib.of_groups = lib.of_groups, of_groups
    try: yield
    finally: lib.of_groups = usual


def assessed(r, B, first):
    """One run of B questions after the other, of a set that holds many: each as `assess` has it, without estimates.

    The votes of all runs are counted in one pass; it is the same for each question, and a fifth of the cost."""
    asked, usual = [], lib.of_groups
    def together(*what, **who):
        asked.append(usual(*what, **who))
        return asked[-1]
    with votes(together): lib.answer_numbers(r)
    for i in range(0, len(r), B):
        part, dealt = r[range(i, i + B)], (x[i:i + B] for x in asked)
        with votes(lambda *what, **who: next(dealt)): found, threshold = statistics(part)
        numbers = {k: estimate(f, B) for k, f in found.items()} if first else {}
        yield Assessment(part, found, numbers, {}, threshold, .9, .95)


def differences(one, other):
    "`paired`, with every interval but for what two thresholds do."
    usual, lib.reliable = lib.reliable, lambda key, B, fewest: key not in ("coverage", "precision")
    try: return paired(one, other).differences
    finally: lib.reliable = usual


def covered(B, G, gain, runs, single, difference, at, first, seed=1):
    "Number of intervals, and the share that holds the truth, that is above it, that is below it, for each row."
    g, hits = torch.Generator().manual_seed(seed), {}
    def count(table, found, true):
        for k, e in found.items():
            if math.isfinite(e.low): hits.setdefault((table, k), []).append((e.low > true[k]) - (e.high < true[k]))
    for done in range(0, runs, AT_ONCE // B):
        both = pair(min(runs - done, AT_ONCE // B) * B, G, g, gain)
        for one, other in zip(assessed(both[0], B, first), assessed(both[1], B, False)):
            count("one run", one.numbers, single | at(one.threshold))
            count("difference", differences(one, other), difference)
    return {k: (len(x), x.count(0) / len(x), x.count(1) / len(x), x.count(-1) / len(x)) for k, x in hits.items()}


def recorded():
    "The rows of coverage.csv."
    path = HERE / "coverage.csv"
    return [*csv.DictReader(path.open())] if path.exists() else []


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--questions", type=int, nargs="+", default=[10, 30, 100, 300])
    parser.add_argument("--responses", type=int, default=8)
    parser.add_argument("--gains", type=float, nargs="+", default=[0., .3])
    a = parser.parse_args()
    torch.set_num_threads(1)
    lib.rpc_of_texts = lib.perplexity_of_texts # a mean over questions as well, and a hundred times as quick
    rows, of = recorded(), lambda r: (r["gain"], r["questions"])
    for gain in a.gains:
        done = {of(r) for r in rows if int(r["runs"]) >= a.runs}
        left = [B for B in a.questions if (str(gain), str(B)) not in done]
        if left: single, difference, at = truth(a.responses, gain)
        for B in left:
            found = covered(B, a.responses, gain, a.runs, single, difference, at, gain == 0)
            rows = [r for r in rows if of(r) != (str(gain), str(B))]
            for (table, key), (n, inside, above, below) in found.items():
                if key == "rpc": continue
                rows.append({"table": table, "gain": str(gain), "row": key, "questions": str(B), "runs": str(a.runs),
                             "intervals": str(n), "covered": f"{inside:.4f}", "above": f"{above:.4f}",
                             "below": f"{below:.4f}"})
            rows.sort(key=lambda r: (float(r["gain"]), int(r["questions"])))
            with open(HERE / "coverage.csv", "w", newline="") as f:
                table = csv.DictWriter(f, rows[0], lineterminator="\n")
                table.writeheader(); table.writerows(rows)
    lines = {}
    for r in rows: lines.setdefault((r["table"], r["gain"], r["row"]), {})[int(r["questions"])] = r["covered"]
    print("| table | gain | row |", *(f"{n} |" for n in a.questions), "\n|---|---|---|" + "---|" * len(a.questions))
    for k, v in lines.items(): print("|", *(f"{x} |" for x in k), *(f"{v.get(n, '–')} |" for n in a.questions))
