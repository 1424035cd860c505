"""Chains of sums for SmolLM2, a teacher who slips, and which of them leaves room: smollm2_sums.py [--tasks ...]

For each task and amount: trains SmolLM2-135M-Instruct, all its weights, on so many worked solutions, and writes it to a
folder of its own in runs/SmolLM2-warm, with `warm.json`: the command, the losses, the SHA-256 of the weights. Lets it
answer 128 questions 16 times at temperature 1, and writes a row of nbs/data/smollm2_runs/survey.csv. Models and rows
that are there are not made again.
"""
import argparse, csv, json, math, random, re, shlex, sys, time
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch

from capo.calibration import auc_mean
from capo.compare import commit
from capo.evaluate import evaluate
from capo.folder import CSVLog, sha256
from capo.responses import write_whole
from capo.rollout import HFSampler, rollout
from capo.task import Problem, load_model, load_tokenizer, verify, warm_start
from smollm2 import FOLDER as MODEL

START = "<|im_start|>" # the model looks at the first token from everywhere and reads nothing from it: not a number
NBS = Path(__file__).resolve().parents[1]
DATA, WARM = NBS/"data/smollm2_runs", NBS.parent/"runs/SmolLM2-warm"


@dataclass(frozen=True)
class Sums:
    "A chain of numbers with so many digits each, worked step by step by a teacher who slips at a rate for each step."
    digits: tuple[int, ...]
    slips: float

    def question(self, rng):
        terms = [rng.choice("+-") + str(rng.randrange(10**(n - 1), 10**n)) for n in self.digits]
        return "".join(terms)[1:] + "="

    def problems(self, n, seed, exclude=()):
        "`n` distinct problems, none of `exclude`; `ValueError` if there are not so many."
        rng, found = random.Random(seed), {}
        every = math.prod(9 * 10**(k - 1) for k in self.digits) * 2**(len(self.digits) - 1)
        if n + len(exclude) > every: raise ValueError(f"there are only {every} such questions")
        while len(found) < n:
            q = self.question(rng)
            if START + q not in exclude: found[q] = Problem(START + q, str(eval(q[:-1])))
        return list(found.values())

    def worked(self, question, rng):
        "47+38-25= → 47+38=85,85-25=60; a slip is off by 1 to 10, and carries on."
        terms = re.findall(r"[+-]\d+", "+" + question)
        value, steps = int(terms[0]), []
        for t in terms[1:]:
            before, value = value, value + int(t)
            if rng.random() < self.slips: value += self.slip(rng)
            steps.append(f"{before}{t}={value}")
        return ",".join(steps)

    def slip(self, rng): return rng.choice((-1, 1)) * rng.randint(1, 10)

    def pages(self, n, seed):
        "`n` questions with worked solutions, none of the held-out ones; a question may come again."
        rng, held_out = random.Random(seed), {p.prompt for p in self.problems(QUESTIONS, HELD_OUT)}
        asked = (q for q in iter(lambda: self.question(rng), None) if START + q not in held_out)
        return [(START + q, self.worked(q, rng)) for q in islice(asked, n)]


TASKS = {f"{'+'.join(map(str, digits))} digits, slips {slips:g}": Sums(digits, slips) for digits, slips in (
    ((1, 1, 1), .1), ((1, 1, 1), .3), ((1, 1, 1, 1), .1), ((1, 1, 1, 1), .3), ((2, 1, 1, 1), .1), ((2, 2, 2), .1))}
AMOUNTS = 1000, 3000   # pages
PAGES, BATCH, LR = 0, 8, 5e-4   # seed of the pages, pages a step, peak learning rate
QUESTIONS, HELD_OUT = 256, 2    # that are never trained on, and their seed
BUDGET, CACHE = 32, 2**14       # tokens of a response at most, and in the key–value cache


def load(folder): return load_model(str(folder), "float32"), load_tokenizer(str(folder))


def warmed(task, pages, source, folder):
    "The model after a pass over `pages` worked solutions, and its tokenizer; made if it is not in the folder."
    if (folder/"warm.json").exists(): return load(folder)
    model, tokenizer = load(source)
    began = time.process_time()
    losses = warm_start(model, tokenizer, TASKS[task].pages(pages, PAGES), batch_size=BATCH, lr=LR)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    about = {"task": task, **asdict(TASKS[task]), "pages": pages, "pages_seed": PAGES, "batch": BATCH, "lr": LR,
             "command": shlex.join(["python", "nbs/tools/smollm2_sums.py", *sys.argv[1:]]), "commit": commit(),
             "torch": torch.__version__, "seconds": time.process_time() - began,
             "sha256": sha256(folder/"model.safetensors"), "losses": [round(x, 4) for x in losses]}
    write_whole(folder/"warm.json", json.dumps(about, indent=1) + "\n")
    return model, tokenizer


def spread(r):
    "Standard deviation of lpm within groups, among the responses that ended."
    ended = r.valid & ~r.truncated
    n = ended.sum(1, keepdim=True)
    lpm = r.lpm.double().where(ended, 0)
    apart = ((lpm - lpm.sum(1, keepdim=True) / n.clamp(min=1)) * ended).square().sum()
    return (apart / (n - 1).clamp(min=0).sum()).sqrt().item()


def mixed(reward): return ((reward.mean(1) > 0) & (reward.mean(1) < 1)).double().mean().item()


def numbers(r):
    "What a task is chosen by."
    e, ended = evaluate(r), r.valid & ~r.truncated
    return {"accuracy": e["accuracy"], "mixed_of_8": mixed(r.reward[:, :8]), "mixed_of_16": mixed(r.reward),
            "auc_mean": e["auc_mean"], "auc_ended": auc_mean(r.lpm, r.reward, ended)[0], "spread": spread(r),
            "length": e["length"], "truncated": e["truncated"]}


def row(task, pages, a):
    "One row of the survey."
    folder = a.models/re.sub("[^a-z0-9.]+", "-", f"{task}-{pages}")
    model, tokenizer = warmed(task, pages, a.source, folder)
    warm = json.loads((folder/"warm.json").read_text())
    last = warm["losses"][-len(warm["losses"]) // 5:]
    began, sampler = time.process_time(), HFSampler(model, tokenizer, BUDGET, tokens=CACHE)
    r = rollout(sampler, TASKS[task].problems(a.questions, 1), 16, verify, 1)
    print(task, pages, r.text[0][:4], flush=True)
    return {"task": task, "pages": pages, "questions": a.questions, "loss": sum(last) / len(last)} | numbers(r) | {
        "warm_seconds": warm["seconds"], "seconds": time.process_time() - began}


if __name__ == "__main__":
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--source", type=Path, default=MODEL, help="the pretrained model")
    ask.add_argument("--models", type=Path, default=WARM, help="where the warm-started ones go, 0.5 GB each")
    ask.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    ask.add_argument("--pages", nargs="+", type=int, default=AMOUNTS, help="amounts of warm start")
    ask.add_argument("--questions", type=int, default=128)
    ask.add_argument("--out", type=Path, default=DATA/"survey.csv")
    a = ask.parse_args()
    torch.set_num_threads(1)
    a.out.parent.mkdir(parents=True, exist_ok=True)
    done = list(csv.DictReader(open(a.out))) if a.out.exists() else []
    log = CSVLog(a.out, True)
    log.columns = list(done[0]) if done else []
    for task in a.tasks:
        for pages in a.pages:
            if not any(x["task"] == task and int(x["pages"]) == pages for x in done): log(row(task, pages, a))
