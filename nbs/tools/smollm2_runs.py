"""Train SmolLM2-135M-Instruct with LoRA on sums and products of one digit: smollm2_runs.py --arm ARM --seed SEED [--out FOLDER]

The arms: `settings` samples the base model on a seed that is not reported and fixes tau and the mask by the rule in `settings`;
`base` answers the held-out questions before training; `grpo`, `capo`, `grpo-mask`, `capo-nomask` train and answer them at every
evaluation. Each writes FOLDER/ARM-SEED (FOLDER: nbs/data/smollm2): config.json, log.csv, evals.csv, responses-STEP.jsonl.gz. Same
seed, same questions in the same order. One thread a process; run arms side by side.
"""
import argparse, gzip, json, math, platform, random, shlex, sys, time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch

import capo.train
from capo.compare import commit, new_folder
from capo.evaluate import evaluate
from capo.logprob import _positions, chunked_logps
from capo.mask import quantile_thresholds
from capo.recipe import capo as capo_recipe, grpo, grpo_size
from capo.rollout import HFSampler, rollout
from capo.task import last_number, verify
from capo.train import CSVLog, TrainConfig, train
from smollm2 import FOLDER as MODEL, SHA256
from smollm2_tasks import DATA, load, problems, questions

TASK, WAY, HELD_OUT_SEED, TRAIN_SEED = "sums and products of 1 digit", "1 example, sentence", 2, 1
EVALUATE_SEED, SAMPLE_ROWS = 10_000, 256


def shared_prefix_logps(model, rollouts, temperature=1.0):
    """`capo.rollout.rollout_logps` with each prompt computed once for its G responses: the same numbers and gradients, fewer tokens.

    A prompt here is six times as long as a response, so this is what makes the runs affordable on a CPU."""
    r, (B, G, T) = rollouts, rollouts.response_ids.shape
    out = model(input_ids=r.prompt_ids, attention_mask=r.prompt_mask, use_cache=True, logits_to_keep=1, **_positions(model, r.prompt_mask))
    cache, logits = out.past_key_values, out.logits.repeat_interleave(G, 0)
    ids, mask = r.response_ids.flatten(0, 1), r.mask.flatten(0, 1)
    if T > 1:
        cache.batch_repeat_interleave(G)
        seen = torch.cat([r.prompt_mask.repeat_interleave(G, 0), mask[:, :-1]], 1)
        position = {k: v[:, 1 - T:] for k, v in _positions(model, seen).items()}
        logits = torch.cat([logits, model(input_ids=ids[:, :-1], attention_mask=seen, past_key_values=cache, use_cache=True, **position).logits], 1)
    return chunked_logps(logits, ids, temperature).where(mask.bool(), 0).view(B, G, T)


def data(tokenizer, held_out):
    "Problems to train on, held-out problems, and the held-out questions as reasoning-gym puts them; no question is in both."
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
                row = {"id": q, "prompt": question, "response": text, "answer": last_number(text), "reference": answer, "correct": int(r.reward[q, g]),
                       "lpm": round(r.lpm[q, g].item(), 5), "logps": [round(x, 4) for x in r.logp[q, g, :n].tolist()], "length": n, "truncated": bool(r.truncated[q, g])}
                f.write((json.dumps(row) + "\n").encode())


def settings(r):
    """The rule, fixed before any training, from the base model's responses to 64 training questions on a seed that is not reported.

    tau is the standard deviation of lpm over the responses, to one significant digit: the scale of the margins it has to tell
    apart. The mask's thresholds are the quartiles of the reference's perplexity, as the paper's roughly are of its reference."""
    lpm, (low, high) = r.lpm[r.valid].double(), r.ppl[r.valid].double().quantile(torch.tensor([.25, .75], dtype=torch.float64)).tolist()
    per_class = quantile_thresholds(r.ppl, r.reward, valid=r.valid)
    return {"tau": float(f"{lpm.std().item():.1g}"), "ref_low": round(low, 3), "ref_high": round(high, 3), "lpm_std": lpm.std().item(), "quartiles_per_class": per_class} | evaluate(r)


def recipe(arm, s):
    return {"grpo": lambda: grpo(), "capo": lambda: capo_recipe(s["tau"], s["ref_low"], s["ref_high"], grpo_size),
            "grpo-mask": lambda: grpo(True, s["ref_low"], s["ref_high"]), "capo-nomask": lambda: capo_recipe(s["tau"], 1, math.inf, grpo_size)}[arm]()


if __name__ == "__main__":
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--arm", required=True, choices=["settings", "base", "grpo", "capo", "grpo-mask", "capo-nomask"])
    ask.add_argument("--seed", type=int, required=True)
    ask.add_argument("--out", type=Path, default=DATA)
    ask.add_argument("--model", type=Path, default=MODEL)
    for name, kind, default in (("steps", int, 40), ("lr", float, 1e-4), ("lora-rank", int, 16), ("eval-every", int, 20), ("held-out", int, 64), ("samples", int, 16)):
        ask.add_argument(f"--{name}", type=kind, default=default)
    a = ask.parse_args()
    torch.set_num_threads(1)
    a.config = TrainConfig(steps=a.steps, questions=8, group_size=8, updates=1, lr=a.lr, max_new_tokens=12, eval_every=a.eval_every, lora_rank=a.lora_rank, seed=a.seed)
    folder = new_folder(a.out/f"{a.arm}-{a.seed}")
    model, tokenizer = load(a.model, torch.float32)
    pool, asked, kept = data(tokenizer, a.held_out)
    about = {"arm": a.arm, "seed": a.seed, "command": shlex.join(["python", "nbs/tools/smollm2_runs.py", *sys.argv[1:]]), "commit": commit(), "task": TASK, "way": WAY, "example": asked[0].prompt,
             "train_questions": len(pool), "held_out": len(asked), "samples": a.samples, "gguf_sha256": SHA256, "train": asdict(a.config), "dtype": "float32", "threads": 1,
             "python": platform.python_version(), **{x: version(x) for x in ("torch", "transformers", "peft", "reasoning_gym")}}
    if a.arm not in ("settings", "base", "grpo"): about["settings"] = json.loads((DATA/"settings.json").read_text())
    (folder/"config.json").write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n")
    start, evals = time.perf_counter(), CSVLog(folder/"evals.csv")

    def watch(policy, step):
        "Held-out numbers, on the way with half the samples; before training they are those of the arm `base`, which samples with the same seed."
        if step == 0 and a.arm != "base": return {}
        began, n = time.perf_counter(), a.samples if step in (0, a.steps) else a.samples // 2
        r = rollout(HFSampler(policy, tokenizer, a.config.max_new_tokens, rows=SAMPLE_ROWS), asked, n, verify, seed=EVALUATE_SEED + a.seed)
        save(folder/f"responses-{step}.jsonl.gz", r, [(q, p.answer) for q, p in zip(kept, asked)])
        row = {"step": step, "samples": n} | evaluate(r)
        evals(row | {"seconds": time.perf_counter() - began})
        print(row, flush=True)
        return row

    if a.arm == "settings":
        chosen = random.Random(a.seed).sample(range(len(pool)), 64)
        r = rollout(HFSampler(model, tokenizer, a.config.max_new_tokens, rows=SAMPLE_ROWS), [pool[i] for i in chosen], 8, verify, seed=a.seed)
        save(folder/"responses-0.jsonl.gz", r, [(pool[i].prompt, pool[i].answer) for i in chosen])
        found = settings(r)
        (a.out/"settings.json").write_text(json.dumps({"seed": a.seed} | found, indent=1) + "\n")
        print(found)
    elif a.arm == "base": watch(model, 0)
    else:
        capo.train.rollout_logps, steps = shared_prefix_logps, CSVLog(folder/"log.csv")
        result = train(model, tokenizer, pool, recipe(a.arm, about.get("settings")), evaluate=watch, config=a.config, folder=folder,
                       log=lambda row: (steps(row), print({k: round(v, 4) for k, v in row.items()}, flush=True)))
        # tokens that were computed with gradients and sampled, over the seconds of the steps alone
        tokens = sum(row["length"] for row in result.rows) * a.config.questions * a.config.group_size
        about |= {"step_seconds": sum(row["seconds"] for row in result.rows), "response_tokens_per_second": tokens / sum(row["seconds"] for row in result.rows)}
    (folder/"config.json").write_text(json.dumps(about | {"seconds": time.perf_counter() - start}, indent=1, ensure_ascii=False) + "\n")
