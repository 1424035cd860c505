"""Train SmolLM2-135M-Instruct with LoRA on one-digit sums and products: smollm2_runs.py --arm ARM --seed SEED [--out F]

The arms: `settings` samples the base model on a seed that is not reported and fixes tau and the mask by the rule in
`settings`; `base` answers the held-out questions before training; `grpo`, `capo`, `grpo-mask`, `capo-nomask` train
and answer them at every evaluation. Each writes FOLDER/ARM-SEED (FOLDER: nbs/data/smollm2): config.json, log.csv,
evals.csv, responses-STEP.jsonl.gz. Same seed, same questions in the same order. One thread a process; run arms side
by side.
"""
import argparse, gzip, json, math, platform, random, shlex, sys, time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch

from capo.compare import commit
from capo.evaluate import evaluate
from capo.mask import quantile_thresholds
from capo.recipe import capo as capo_recipe, grpo, grpo_size
from capo.rollout import HFSampler, rollout
from capo.task import last_integer, verify
from capo.folder import CSVLog, new_folder
from capo.keep import saving_bad_step
from capo.train import TrainConfig, train
from smollm2 import FOLDER as MODEL, SHA256
from smollm2_tasks import DATA, load, problems, questions

TASK, WAY, HELD_OUT_SEED, TRAIN_SEED = "sums and products of 1 digit", "1 example, sentence", 2, 1
EVALUATE_SEED, CACHE = 10_000, 2**14 # of the evaluations' draws; tokens in the key–value cache


def data(tokenizer, held_out):
    "Problems to train on, held-out ones, and those as reasoning-gym puts them; no question is in both."
    asked = problems(tokenizer, TASK, WAY, held_out, HELD_OUT_SEED)
    from smollm2_tasks import WAYS
    shown = dict(questions(TASK, WAYS[WAY][1], 0))
    kept = [q for q, _ in questions(TASK, held_out, HELD_OUT_SEED, shown)]
    return problems(tokenizer, TASK, WAY, 10**4, TRAIN_SEED, kept), asked, kept


def save(path, r, kept):
    "One JSON line a response, in the format that `capo report` reads."
    with gzip.GzipFile(path, "wb", mtime=0) as f:
        for q, (question, answer) in enumerate(kept):
            for g, text in enumerate(r.text[q]):
                n = int(r.mask[q, g].sum())
                row = {"id": q, "prompt": question, "response": text, "answer": last_integer(text), "reference": answer,
                       "correct": int(r.reward[q, g]), "lpm": round(r.lpm[q, g].item(), 5),
                       "logps": [round(x, 4) for x in r.logp[q, g, :n].tolist()],
                       "length": n, "truncated": bool(r.truncated[q, g])}
                f.write((json.dumps(row) + "\n").encode())


def settings(r):
    """The rule, fixed before any training, from the base model's responses to 64 questions on an unreported seed.

    tau is the standard deviation of lpm over the responses, to one significant digit: the scale of the margins it
    has to tell apart. The mask's thresholds are the quartiles of the reference's perplexity, as the paper's roughly
    are of its reference."""
    lpm, quarters = r.lpm[r.valid].double(), torch.tensor([.25, .75], dtype=torch.float64)
    low, high = r.ppl[r.valid].double().quantile(quarters).tolist()
    per_class = quantile_thresholds(r.ppl, r.reward, valid=r.valid)
    return {"tau": float(f"{lpm.std().item():.1g}"), "ref_low": round(low, 3), "ref_high": round(high, 3),
            "lpm_std": lpm.std().item(), "quartiles_per_class": per_class} | evaluate(r)


def recipe(arm, s):
    return {"grpo": lambda: grpo(),
            "capo": lambda: capo_recipe(s["tau"], s["ref_low"], s["ref_high"], grpo_size),
            "grpo-mask": lambda: grpo(True, s["ref_low"], s["ref_high"]),
            "capo-nomask": lambda: capo_recipe(s["tau"], 1, math.inf, grpo_size)}[arm]()


if __name__ == "__main__":
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--arm", required=True, choices=["settings", "base", "grpo", "capo", "grpo-mask", "capo-nomask"])
    ask.add_argument("--seed", type=int, required=True)
    ask.add_argument("--out", type=Path, default=DATA)
    ask.add_argument("--model", type=Path, default=MODEL)
    for name, kind, default in (("steps", int, 40), ("lr", float, 1e-4), ("lora-rank", int, 16),
                                ("eval-every", int, 20), ("held-out", int, 64), ("samples", int, 16)):
        ask.add_argument(f"--{name}", type=kind, default=default)
    a = ask.parse_args()
    torch.set_num_threads(1)
    a.config = TrainConfig(steps=a.steps, questions=8, group_size=8, updates=1, lr=a.lr, max_new_tokens=12,
                           eval_every=a.eval_every, lora_rank=a.lora_rank, seed=a.seed)
    folder = new_folder(a.out/f"{a.arm}-{a.seed}")
    model, tokenizer = load(a.model, torch.float32)
    pool, asked, kept = data(tokenizer, a.held_out)
    about = {"arm": a.arm, "seed": a.seed,
             "command": shlex.join(["python", "nbs/tools/smollm2_runs.py", *sys.argv[1:]]), "commit": commit(),
             "task": TASK, "way": WAY, "example": asked[0].prompt,
             "train_questions": len(pool), "held_out": len(asked), "samples": a.samples, "gguf_sha256": SHA256,
             "train": asdict(a.config), "dtype": "float32", "threads": 1,
             "python": platform.python_version(),
             **{x: version(x) for x in ("torch", "transformers", "peft", "reasoning_gym")}}
    if a.arm not in ("settings", "base", "grpo"): about["settings"] = json.loads((DATA/"settings.json").read_text())
    (folder/"config.json").write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n")
    start, evals = time.perf_counter(), CSVLog(folder/"evals.csv")

    def watch(policy, step):
        "Held-out numbers, on the way with half the samples; before training the arm `base` has them, by the same seed."
        if step == 0 and a.arm != "base": return {}
        began, n = time.perf_counter(), a.samples if step in (0, a.steps) else a.samples // 2
        r = rollout(HFSampler(policy, tokenizer, a.config.max_new_tokens, tokens=CACHE), asked, n, verify,
                    seed=EVALUATE_SEED + a.seed)
        save(folder/f"responses-{step}.jsonl.gz", r, [(q, p.answer) for q, p in zip(kept, asked)])
        row = {"step": step, "samples": n} | evaluate(r)
        evals(row | {"seconds": time.perf_counter() - began})
        print(row, flush=True)
        return row

    if a.arm == "settings":
        chosen = random.Random(a.seed).sample(range(len(pool)), 64)
        r = rollout(HFSampler(model, tokenizer, a.config.max_new_tokens, tokens=CACHE), [pool[i] for i in chosen], 8,
                    verify, seed=a.seed)
        save(folder/"responses-0.jsonl.gz", r, [(pool[i].prompt, pool[i].answer) for i in chosen])
        found = settings(r)
        (a.out/"settings.json").write_text(json.dumps({"seed": a.seed} | found, indent=1) + "\n")
        print(found)
    elif a.arm == "base": watch(model, 0)
    else:
        steps = CSVLog(folder/"log.csv")
        log = lambda row: (steps(row), print({k: round(v, 4) for k, v in row.items()}, flush=True))
        method = recipe(a.arm, about.get("settings"))
        with saving_bad_step(folder):
            result = train(model, tokenizer, pool, method, evaluate=watch, log=log, config=a.config)
        # tokens that were computed with gradients and sampled, over the seconds of the steps alone
        tokens = sum(row["length"] for row in result.rows) * a.config.questions * a.config.group_size
        about |= {"step_seconds": sum(row["seconds"] for row in result.rows),
                  "response_tokens_per_second": tokens / sum(row["seconds"] for row in result.rows)}
    about["seconds"] = time.perf_counter() - start
    (folder/"config.json").write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n")
