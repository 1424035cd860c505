"""GRPO and CAPO on the warm-started SmolLM2, several seeds: smollm2_train.py settings|runs|collect ...

`settings` fixes tau, the mask and the learning rate by a rule, on a seed that is not reported. `runs` trains every arm
on every seed, and answers the held-out questions at fixed steps; a run that is whole is passed over, one that was
interrupted goes on at the step after its last, and one that another process is at work on is left to it: start the
same command once a core. All of this happens in WORK (default runs/smollm2). `collect` copies the records of whole
runs, and of no others, to nbs/data/smollm2_runs, with their summary, and puts the answers of base, GRPO and CAPO into
nbs/data/smollm2_responses.
"""
import argparse, gzip, json, platform, shlex, shutil, sys, time
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch

from capo.compare import arms, average, commit, lpm_and_reward, summarise
from capo.evaluate import evaluate
from capo.folder import CSVLog, Logs, Progress, read_rows
from capo.keep import keeping
from capo.mask import quantile_thresholds
from capo.recipe import grpo
from capo.responses import locked, response_rows, write_responses, write_whole
from capo.rollout import HFSampler, Rollouts, rollout, score
from capo.task import last_integer, verify
from capo.train import TrainConfig, train
from smollm2_sums import BUDGET, CACHE, DATA, HELD_OUT, QUESTIONS, TASKS, load, numbers, spread

ARMS = "grpo", "capo", "grpo-mask", "capo-nomask", "capo-across", "grpo-across"   # in the order in which they are run
PUBLISHED = "grpo", "capo"
UNREPORTED, RATES = 101, (5e-5, 1e-4, 2e-4, 4e-4)     # seed of the settings; rates to choose from
CONFIG = TrainConfig(steps=100, questions=16, group_size=8, updates=1, max_new_tokens=BUDGET, sample_tokens=CACHE,
                     token_budget=2**12, eval_every=25, save_every=1, keep=1, lora_rank=16)


def dump(path, x): write_whole(path, json.dumps(x, indent=1) + "\n")
def read(path): return json.loads(Path(path).read_text())


@dataclass
class Bench:
    "What all runs share: the folder of the work, that of the model, and how many answers each held-out question gets."
    work: Path
    model_folder: Path
    samples: int = 16
    questions: int = QUESTIONS

    def __post_init__(self):
        self.warm = read(self.model_folder/"warm.json")
        self.task = TASKS[self.warm["task"]]
        self.held_out = self.task.problems(QUESTIONS, HELD_OUT)[:self.questions]

    def model(self):
        model, self.tokenizer = load(self.model_folder)
        return model

    def pool(self, seed, n):
        "Problems to train on, none of them held out."
        return self.task.problems(n, 1000 + seed, {p.prompt for p in self.held_out})

    def answers(self, policy, seed):
        "Graded answers to the held-out questions, by the same draws in every run of a seed."
        sampler = HFSampler(policy, self.tokenizer, BUDGET, tokens=CACHE)
        return rollout(sampler, self.held_out, self.samples, verify, seed=10_000 + seed)

    def about(self):
        "What would change the numbers, and what made them."
        return {"command": shlex.join(["python", "nbs/tools/smollm2_train.py", *sys.argv[1:]]), "commit": commit(),
                "task": self.warm["task"], "warm_sha256": self.warm["sha256"], "questions": self.questions,
                "samples": self.samples, "threads": torch.get_num_threads(), "python": platform.python_version(),
                **{x: version(x) for x in ("torch", "transformers", "peft")}}


def write(path, r, problems):
    "Answers as `capo report` reads them, with the perplexity under the base model where it was asked."
    ppl = [None] * r.reward.numel() if r.ref_logp is None else r.ref_ppl.flatten().tolist()
    rows = zip(response_rows(r, problems, last_integer), ppl)
    write_responses(path, (row if x is None else row | {"ref_ppl": round(x, 5)} for row, x in rows))


def base(bench, seed):
    "The base model's answers and their numbers, made once for each seed by whoever comes first."
    folder = bench.work/f"base-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder/".lock"):
        if (folder/"numbers.json").exists(): return read(folder/"numbers.json")["numbers"]
        began, r = time.process_time(), bench.answers(bench.model(), seed)
        r = replace(r, ref_logp=r.logp)
        write(folder/"responses-0.jsonl.gz", r, bench.held_out)
        torch.save(vars(r), folder/"rollouts.pt")
        row = evaluate(r) | {"rescored_auc": evaluate(some(r))["auc_mean"], "seconds": time.process_time() - began}
        dump(folder/"numbers.json", bench.about() | {"numbers": row})
    return row


def said(bench, seed): return Rollouts(**torch.load(bench.work/f"base-{seed}/rollouts.pt", weights_only=False))


def some(r):
    "Half of the answers to each question: those of the base that every evaluation scores again."
    half = r.map(lambda x: x[:, :x.shape[1] // 2], prompt=lambda x: x)
    return replace(half, text=[texts[:r.reward.shape[1] // 2] for texts in r.text])


class HeldOut:
    "The evaluation of a run, logged, its answers kept. Before training the policy is the base, which has answered."
    def __init__(self, bench, folder, config, published):
        self.bench, self.folder, self.config, self.published = bench, folder, config, published
        self.first, self.log = base(bench, config.seed), CSVLog(folder/"evals.csv", True)
        self.said = some(said(bench, config.seed))

    def __call__(self, policy, step):
        began, row = time.process_time(), self.first
        if step:
            row = self.numbers(policy, step)
            row["seconds"] = time.process_time() - began
        self.log({"step": step} | row)
        return row

    def numbers(self, policy, step):
        budget, r = self.config.token_budget, self.bench.answers(policy, self.config.seed)
        if step == self.config.steps:
            torch.save(lpm_and_reward(r), self.folder/"last.pt")
            with policy.disable_adapter():
                if self.published: r = replace(r, ref_logp=score(policy, r, budget))
        write(self.folder/f"responses-{step}.jsonl.gz", r, self.bench.held_out)
        again = replace(self.said, logp=score(policy, self.said, budget))
        return evaluate(r) | {"rescored_auc": evaluate(again)["auc_mean"]}

    def rewind(self, step): self.log.rewind(step - 1)                   # the evaluation at `step` is made again


def trained(bench, folder, recipe, config, evaluates=True, published=False):
    """Trains in a folder, from its last step on if it has one, and marks it whole at the end; stops if asked to.

    Raises `BlockingIOError` if another process is at work there."""
    if (folder/"whole.json").exists(): return
    folder.mkdir(parents=True, exist_ok=True)
    model, problems = bench.model(), bench.pool(config.seed, config.steps * config.questions)
    watch = HeldOut(bench, folder, config, published) if evaluates else None
    log = Logs(CSVLog(folder/"log.csv", True), Progress(config.steps, folder.name))
    with keeping(folder, model, problems, recipe, config, resume=True, told=(log, watch)) as keeper:
        lives = read(folder/"lives.json") if (folder/"lives.json").exists() else []
        dump(folder/"lives.json", [*lives, bench.about()])
        result = train(model, bench.tokenizer, problems, recipe, evaluate=watch, log=log, config=config, keeper=keeper)
        if result.stopped: sys.exit(128 + result.stopped)
        dump(folder/"whole.json", {"steps": result.step, "recipe": {"name": recipe.name, **recipe.settings}})


def in_turn(jobs):
    "Does what is not done yet and not in other hands, until nothing of that kind is left; the names of the rest."
    left = dict(jobs)
    while left:
        before = len(left)
        for name, job in list(left.items()):
            try: job()
            except BlockingIOError as e: print(f"{name} is passed over: {e}", flush=True)
            else: del left[name]
        if len(left) == before: break
    return list(left)


def rule(r):
    """tau: the spread of lpm within groups among the answers that ended, to one digit. The mask: quartiles of the
    base's perplexities, the lower one of the wrong answers and the upper one of the right."""
    low, high = quantile_thresholds(r.ppl, r.reward, valid=r.valid)
    return {"tau": float(f"{spread(r):.1g}"), "ref_low": round(low, 3), "ref_high": round(high, 3)}


def lowest_of_the_best(ends):
    "The lowest rate whose mean reward is within a standard error of the highest, and the means; rows by rate."
    tried = {lr: average(rows, "reward") for lr, rows in ends.items()}
    top = max(tried, key=tried.get)
    error = torch.tensor([row["reward"] for row in ends[top]]).std(correction=0).item() / max(1, len(ends[top]) - 1)**.5
    return min(lr for lr, x in tried.items() if x >= tried[top] - error), tried


def settings(bench, a):
    "The rule, and the learning rate: the lowest that is level with the best GRPO run over its last third."
    folder = bench.work/f"settings-{UNREPORTED}"
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder/".lock"):
        if not (folder/"base.json").exists():
            model, asked = bench.model(), bench.pool(UNREPORTED, 128)
            r = rollout(HFSampler(model, bench.tokenizer, BUDGET, tokens=CACHE), asked, 8, verify, seed=UNREPORTED)
            write(folder/"responses-0.jsonl.gz", r, asked)
            dump(folder/"base.json", rule(r) | numbers(r))
    config = replace(CONFIG, steps=a.steps, eval_every=a.steps, seed=UNREPORTED)
    job = lambda lr: lambda: trained(bench, folder/f"lr-{lr:g}", grpo(), replace(config, lr=lr), False)
    if left := in_turn({f"lr {lr:g}": job(lr) for lr in RATES}): sys.exit(f"not done yet: {left}")
    ends = {lr: read_rows(folder/f"lr-{lr:g}/log.csv")[-(-2 * a.steps // 3):] for lr in RATES}
    lr, tried = lowest_of_the_best(ends)
    found = read(folder/"base.json") | {"lr": lr, "tried": tried, "seed": UNREPORTED}
    dump(bench.work/"settings.json", bench.about() | found)
    print(found)


def runs(bench, a):
    "Every arm on every seed, the arms one after the other."
    s = read(bench.work/"settings.json")
    made = arms(s["tau"], s["ref_low"], s["ref_high"])
    config = replace(CONFIG, lr=s["lr"], steps=a.steps, eval_every=a.eval_every)
    def job(arm, seed):
        where, of_seed = bench.work/f"{arm}-{seed}", replace(config, seed=seed)
        return lambda: trained(bench, where, made[arm](), of_seed, published=arm in PUBLISHED)
    if left := in_turn({f"{arm}-{seed}": job(arm, seed) for arm in a.arms for seed in a.seeds}):
        print(f"in other hands: {left}")


def record(bench, arm, seed):
    "What `summarise` needs of a whole run."
    folder = bench.work/f"{arm}-{seed}"
    steps, evals = read_rows(folder/"log.csv"), read_rows(folder/"evals.csv")
    return {"arm": arm, "seed": seed, "evals": evals, "first": lpm_and_reward(said(bench, seed)),
            "last": torch.load(folder/"last.pt"), **{k: average(steps, k) for k in ("seconds", "masked")}}


def copied(source, to, names):
    to.mkdir(parents=True, exist_ok=True)
    for name in names: shutil.copyfile(source/name, to/name)


def published(bench, a, arm, last):
    "The answers of an arm on all seeds, as one file: a question is told by seed and number."
    rows = []
    for seed in a.seeds:
        with gzip.open(bench.work/f"{arm}-{seed}/responses-{last}.jsonl.gz", "rt") as f:
            rows += [row | {"id": f"{seed}:{row['id']}", "seed": seed} for row in map(json.loads, f)]
    write_responses(a.responses/f"{arm}.jsonl.gz", rows)


def collect(bench, a):
    "The records of the arms that are whole on every seed, their summary, and the answers of base, GRPO and CAPO."
    whole = [arm for arm in a.arms if all((bench.work/f"{arm}-{seed}/whole.json").exists() for seed in a.seeds)]
    print("whole:", whole, " left out:", [arm for arm in a.arms if arm not in whole])
    if not whole: sys.exit(1)
    last = read(bench.work/f"{whole[0]}-{a.seeds[0]}/config.json")["steps"]
    for seed in a.seeds:
        copied(bench.work/f"base-{seed}", a.out/f"base-{seed}", ["numbers.json", "responses-0.jsonl.gz"])
        for arm in whole:
            kept = ["lives.json", "whole.json", "config.json", "log.csv", "evals.csv", f"responses-{last}.jsonl.gz"]
            copied(bench.work/f"{arm}-{seed}", a.out/f"{arm}-{seed}", kept)
    tuning = f"settings-{UNREPORTED}"
    copied(bench.work, a.out, ["settings.json"])
    copied(bench.model_folder, a.out, ["warm.json"])
    copied(bench.work/tuning, a.out/tuning, ["responses-0.jsonl.gz"])
    for lr in RATES: copied(bench.work/tuning/f"lr-{lr:g}", a.out/tuning/f"lr-{lr:g}", ["log.csv"])
    dump(a.out/"summary.json", summarise([record(bench, arm, seed) for arm in whole for seed in a.seeds]))
    a.responses.mkdir(parents=True, exist_ok=True)
    published(bench, a, "base", 0)
    for arm in PUBLISHED: published(bench, a, arm, last)


if __name__ == "__main__":
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--work", type=Path, default=DATA.parents[2]/"runs/smollm2")
    ask.add_argument("--model", type=Path, required=True, help="a warm-started one")
    ask.add_argument("--questions", type=int, default=QUESTIONS, help="held-out questions; fewer to try it out")
    commands = ask.add_subparsers(required=True)
    one = commands.add_parser("settings", help=settings.__doc__)
    one.add_argument("--steps", type=int, default=30)
    two = commands.add_parser("runs", help=runs.__doc__)
    two.add_argument("--steps", type=int, default=CONFIG.steps)
    two.add_argument("--eval-every", type=int, default=CONFIG.eval_every)
    three = commands.add_parser("collect", help=collect.__doc__)
    three.add_argument("--out", type=Path, default=DATA)
    three.add_argument("--responses", type=Path, default=DATA.parent/"smollm2_responses")
    for p in (two, three):
        p.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
        p.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    for p, do in ((one, settings), (two, runs), (three, collect)): p.set_defaults(do=do)
    a = ask.parse_args()
    torch.set_num_threads(1)
    a.do(Bench(a.work.resolve(), a.model.resolve(), questions=a.questions), a)
