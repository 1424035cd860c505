"""How long the numbers of an evaluation take: python benchmarks/auc.py [--repeats 7] [--threads 1]

Prints a table: the least and the median of the repeats, in milliseconds of processor time (of all threads together),
which other work on the machine disturbs less than the clock on the wall. Nothing is asserted; README.md holds the
numbers of one run."""
import argparse
import os
import platform
import statistics
import time

import sklearn
import torch
from sklearn.metrics import roc_auc_score

import capo
from capo.advantage import capo_advantage, pairwise_advantage
from capo.calibration import auc, group_auc
from capo.grpo import clipped_loss, grpo_advantage
from capo.selective import area, certified_threshold, ece, prr, threshold_for
from capo.surrogate import logistic
from capo.vote import deepconf, majority_vote, most_confident, pass_at_k, perplexity_consistency, rpc, vote_curve


def cases():
    "Name, size and a function without arguments, for each row of the table."
    g = torch.Generator().manual_seed(0)
    score = torch.randn(1_000_000, generator=g)
    correct = torch.rand(1_000_000, generator=g) < score.sigmoid()
    for kind, s in (("distinct float32", score),
                    ("distinct float64",
                     score.double() + torch.rand(1_000_000, generator=g, dtype=torch.float64) * 1e-9),
                     ("600 values", (score * 60).round())):
        yield "capo.calibration.auc", f"1,000,000 scores, {kind}", lambda s=s: auc(s, correct)
        theirs = lambda s=s.numpy(): roc_auc_score(correct.numpy(), s)
        yield "sklearn.metrics.roc_auc_score", f"1,000,000 scores, {kind}", theirs

    for B, G in ((128, 8), (1024, 16), (64, 512)):
        lpm, c = -torch.rand(B, G, generator=g), torch.randint(2, (B, G), generator=g)
        yield "group_auc", f"{B} questions x {G}", lambda lpm=lpm, c=c: group_auc(lpm, c)
        yield "grpo_advantage", f"{B} questions x {G}", lambda c=c: grpo_advantage(c.float())
        yield "capo_advantage", f"{B} questions x {G}", lambda lpm=lpm, c=c: capo_advantage(lpm, c)
        yield "pairwise_advantage", f"{B} questions x {G}", lambda lpm=lpm, c=c: pairwise_advantage(lpm, c,
            logistic(.5))

    for N, T in ((512, 64), (64, 2048)):
        logp, mask, advantage = -torch.rand(N, T, generator=g), torch.ones(N, T), torch.randn(N, generator=g)
        leaf = logp.clone().requires_grad_()
        step = lambda leaf=leaf, logp=logp, a=advantage, m=mask: clipped_loss(leaf, logp, a, m).backward()
        yield "clipped_loss, forward and backward", f"{N} responses x {T} tokens", step

    for B, G in ((625, 16), (6250, 16), (1562, 64), (1, 100_000)):
        answer, lpm = torch.randint(-1, 6, (B, G), generator=g), -torch.rand(B, G, generator=g)
        c = (answer == 2).long()
        size = f"{B} questions x {G}"
        yield "majority_vote", size, lambda a=answer, c=c: majority_vote(a, c)
        yield "most_confident", size, lambda l=lpm, c=c: most_confident(l, c)
        yield "perplexity_consistency", size, lambda a=answer, l=lpm, c=c: perplexity_consistency(a, l, c, response=a)
        yield "deepconf", size, lambda a=answer, l=lpm, c=c: deepconf(a, -l, c)
        yield "pass_at_k", size, lambda c=c: pass_at_k(c, 8)
        if B in (625, 6250): yield "rpc", size, lambda a=answer, l=lpm, c=c: rpc(a, l, c)
    answer = torch.randint(-1, 6, (256, 16), generator=g)
    curve = lambda c=(answer == 2).long(): vote_curve(majority_vote, range(1, 17), answer, c)
    yield "vote_curve of majority_vote, n = 1 … 16", "256 questions x 16", curve

    for N in (10_000, 100_000):
        s, c = score[:N], correct[:N]
        yield "area", f"{N:,} replies", lambda s=s, c=c: area(s, c)
        yield "prr", f"{N:,} replies", lambda s=s, c=c: prr(s, c)
        yield "threshold_for", f"{N:,} replies", lambda s=s, c=c: threshold_for(s, c, .7)
        yield "certified_threshold", f"{N:,} replies", lambda s=s, c=c: certified_threshold(s, c, .7)
        yield "ece", f"{N:,} replies", lambda s=s, c=c: ece(s.sigmoid(), c)


def milliseconds(f, repeats):
    "Least and median time of a call, and of how many; the first counts only if it took more than two seconds."
    times = []
    for _ in range(repeats + 1):
        start = time.process_time()
        f()
        times.append(1000 * (time.process_time() - start))
        if times[0] > 2000: break
    counted = times[1:] or times
    return min(counted), statistics.median(counted), len(counted)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"capo {capo.__version__}, torch {torch.__version__}, scikit-learn {sklearn.__version__}, "
          f"Python {platform.python_version()}, {platform.machine()}; {options.threads} thread(s) of "
          f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {options.repeats} repeats\n")
    print("| what | size | least, ms | median, ms | repeats |\n|---|---|---|---|---|")
    for name, size, f in cases():
        least, median, n = milliseconds(f, options.repeats)
        print(f"| {name} | {size} | {least:.2f} | {median:.2f} | {n} |", flush=True)
