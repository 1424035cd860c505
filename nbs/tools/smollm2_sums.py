"""Chains of sums for SmolLM2, a teacher who slips, and which of them leaves room: smollm2_sums.py warm|survey ...

`warm` trains SmolLM2-135M-Instruct on worked solutions, all its weights, and writes FOLDER (default
runs/SmolLM2-warm) with `warm.json`: the command, the losses, the SHA-256 of the weights. `survey` does that for each
task and amount in turn, lets the model answer 128 questions 16 times at temperature 1, and writes a row of
nbs/data/smollm2_runs/survey.csv each. Rows that are there are not made again.
"""
import argparse, csv, json, random, re, shlex, sys, time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from capo.calibration import auc_mean
from capo.compare import commit
from capo.evaluate import evaluate
from capo.folder import CSVLog, sha256
from capo.rollout import HFSampler, rollout
from capo.task import Problem, load_model, load_tokenizer, verify, warm_start
from smollm2 import FOLDER as MODEL

NBS = Path(__file__).resolve().parents[1]
DATA, WARM = NBS/"data/smollm2_runs", NBS.parent/"runs/SmolLM2-warm"


@dataclass(frozen=True)
class Sums:
    "A chain of `terms` numbers of `digits` digits, worked step by step by a teacher who slips on a step with `slips`."
    terms: int
    digits: int
    slips: float

    def question(self, rng):
        number = lambda: str(rng.randrange(10**(self.digits - 1), 10**self.digits))
        return "".join(rng.choice("+-") + number() for _ in range(self.terms))[1:] + "="

    def problems(self, n, seed, exclude=()):
        "`n` distinct problems, none of `exclude`."
        rng, found = random.Random(seed), {}
        while len(found) < n:
            q = self.question(rng)
            if q not in exclude: found[q] = Problem(q, str(eval(q[:-1])))
        return list(found.values())

    def worked(self, prompt, rng):
        "47+38-25= → 47+38=85,85-25=60; a slip is off by 1 to 9 in one digit, and carries on."
        terms = re.findall(r"[+-]\d+", "+" + prompt)
        value, steps = int(terms[0]), []
        for t in terms[1:]:
            before, value = value, value + int(t)
            if rng.random() < self.slips: value += self.slip(rng)
            steps.append(f"{before}{t}={value}")
        return ",".join(steps)

    def slip(self, rng): return rng.choice((-1, 1)) * rng.randint(1, 9) * 10**rng.randrange(self.digits)

    def pages(self, n, seed):
        "`n` questions with worked solutions, none of the held-out ones."
        rng = random.Random(seed)
        held_out = {p.prompt for p in self.problems(QUESTIONS, HELD_OUT)}
        return [(p.prompt, self.worked(p.prompt, rng)) for p in self.problems(n, seed, held_out)]


TASKS = {"4 terms of 1 digit": Sums(4, 1, .3), "3 terms of 2 digits": Sums(3, 2, .3),
         "3 terms of 2 digits, few slips": Sums(3, 2, .1), "4 terms of 2 digits, few slips": Sums(4, 2, .1),
         "3 terms of 3 digits, no slips": Sums(3, 3, 0)}
AMOUNTS = 500, 1000, 2000   # pages
PAGES, BATCH, LR = 0, 16, 1e-4  # seed of the pages, pages a step, peak learning rate
QUESTIONS, HELD_OUT = 256, 2    # that are never trained on, and their seed
BUDGET, CACHE = 32, 2**14       # tokens of a response at most, and in the key–value cache


def load(folder): return load_model(str(folder), "float32"), load_tokenizer(str(folder))


def warmed(task, pages, model=MODEL):
    "The model after a pass over `pages` worked solutions, its tokenizer, the losses, and the seconds of this process."
    model, tokenizer = load(model)
    began = time.process_time()
    losses = warm_start(model, tokenizer, TASKS[task].pages(pages, PAGES), batch_size=BATCH, lr=LR)
    return model, tokenizer, losses, time.process_time() - began


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


def survey(a):
    done = list(csv.DictReader(open(a.out))) if a.out.exists() else []
    log = CSVLog(a.out, True)
    log.columns = list(done[0]) if done else []
    for task in a.tasks or TASKS:
        for pages in a.amounts:
            if any(row["task"] == task and int(row["pages"]) == pages for row in done): continue
            model, tokenizer, losses, warm = warmed(task, pages, a.model)
            began = time.process_time()
            sampler = HFSampler(model, tokenizer, BUDGET, tokens=CACHE)
            r = rollout(sampler, TASKS[task].problems(a.questions, 1), 16, verify, 1)
            last = losses[-len(losses) // 5:]
            log({"task": task, "pages": pages, "questions": a.questions, "loss": sum(last) / len(last)} | numbers(r) |
                {"warm_seconds": warm, "seconds": time.process_time() - began})
            print(task, pages, numbers(r), r.text[0][:4], flush=True)


def warm(a):
    model, tokenizer, losses, seconds = warmed(a.task, a.pages, a.model)
    model.save_pretrained(a.out)
    tokenizer.save_pretrained(a.out)
    about = {"task": a.task, **asdict(TASKS[a.task]), "pages": a.pages, "pages_seed": PAGES, "batch": BATCH, "lr": LR,
             "command": shlex.join(["python", "nbs/tools/smollm2_sums.py", *sys.argv[1:]]), "commit": commit(),
             "torch": torch.__version__, "sha256": sha256(a.out/"model.safetensors"), "seconds": seconds,
             "losses": [round(x, 4) for x in losses]}
    (a.out/"warm.json").write_text(json.dumps(about, indent=1) + "\n")
    print({k: x for k, x in about.items() if k != "losses"})


if __name__ == "__main__":
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--model", type=Path, default=MODEL)
    commands = ask.add_subparsers(required=True)
    one = commands.add_parser("survey")
    one.add_argument("--tasks", nargs="*", choices=TASKS)
    one.add_argument("--amounts", nargs="*", type=int, default=AMOUNTS)
    one.add_argument("--questions", type=int, default=128)
    one.add_argument("--out", type=Path, default=DATA/"survey.csv")
    one.set_defaults(do=survey)
    two = commands.add_parser("warm")
    two.add_argument("--task", choices=TASKS, required=True)
    two.add_argument("--pages", type=int, required=True)
    two.add_argument("--out", type=Path, default=WARM)
    two.set_defaults(do=warm)
    a = ask.parse_args()
    torch.set_num_threads(1)
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.do(a)
