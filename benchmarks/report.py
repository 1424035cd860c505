"""Where the time of `capo report` goes: python benchmarks/report.py [--questions 256 62500] [--responses 16]

Makes a file of responses, then reads, assesses and reports it (which assesses again); prints seconds of processor time
and the peak of memory in MB."""
import argparse
import json
import random
import resource
import tempfile
import time
from pathlib import Path

import torch

from capo.evaluate import assess
from capo.page import report_files
from capo.report import report
from capo.responses import read_responses


def make(path, B, G):
    "Questions of random difficulty; answers of which half of the wrong ones agree; texts of about 60 characters."
    rng = random.Random(0)
    with open(path, "w") as f:
        for q in range(B):
            chance, reference = rng.random(), rng.randrange(1000)
            for g in range(G):
                right = rng.random() < chance
                answer = reference if right else reference + 1 if rng.random() < .5 else rng.randrange(1000)
                text = f"After {rng.randrange(10**6)} steps of thought the answer is {answer}."
                row = {"id": q, "sample": g, "prompt": f"Question number {q}?", "response": text, "answer": str(answer),
                       "reference": str(reference), "lpm": -rng.random() - .5 * (not right), "length": len(text)}
                f.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, nargs="+", default=[256, 2500, 62500])
    parser.add_argument("--responses", type=int, default=16)
    a = parser.parse_args()
    torch.set_num_threads(1)
    print("| responses | MB | read, s | numbers, s | report, s | page, s | peak, MB |\n|---|---|---|---|---|---|---|")
    for B in a.questions:
        with tempfile.TemporaryDirectory() as d:
            path, times = Path(d) / "r.jsonl", [0.]
            make(path, B, a.responses)
            size = path.stat().st_size / 1e6
            clock = lambda: times.append(time.process_time())
            clock(); r = read_responses(path)
            clock(); assess(r)
            clock(); made = report({"r": r})
            clock(); report_files(made); clock()
        spent = " | ".join(f"{y - x:.1f}" for x, y in zip(times[1:], times[2:]))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
        print(f"| {B * a.responses:,} | {size:.0f} | {spent} | {peak:.0f} |", flush=True)
