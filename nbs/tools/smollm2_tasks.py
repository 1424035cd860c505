"""Which task can SmolLM2-135M-Instruct half do, and asked how? smollm2_tasks.py MODEL [--out FILE]

Each candidate is a task of reasoning-gym and a way to ask: 64 distinct questions (or `--questions`), 8 responses
each at temperature 1. A row of FILE (default nbs/data/smollm2/tasks.csv) says how often the model is right, how
many groups of 8 are mixed (the others teach nothing), AUC-mean over the mixed ones, and how long prompts and
responses are.
"""
import argparse, re, time
from pathlib import Path

import torch

from capo.evaluate import evaluate
from capo.rollout import HFSampler, rollout
from capo.task import Problem, verify
from capo.folder import CSVLog

DATA = Path(__file__).resolve().parents[1] / "data/smollm2"

def exactly(**options): return {f"{end}_{k}": v for k, v in options.items() for end in ("min", "max")}
TASKS = {
    "sums, 2 terms of 1 digit": ("chain_sum", exactly(terms=2, digits=1)),
    "sums, 3 terms of 1 digit": ("chain_sum", exactly(terms=3, digits=1)),
    "sums, 2 terms of 2 digits": ("chain_sum", exactly(terms=2, digits=2)),
    "products of 1 digit": ("products", exactly(terms=2, digits=1)),
    "sums and products of 1 digit": ("basic_arithmetic", exactly(terms=2, digits=1) | dict(
        operators=("+", "-", "*"), allow_parentheses=False, allow_negation=False)),
}


def questions(task, n, seed, exclude=()):
    "`n` distinct (question, answer) of a task, drawn with `seed`, none of `exclude`; fewer if there are no more."
    import reasoning_gym
    name, options = TASKS[task]
    found = {}
    for row in reasoning_gym.create_dataset(name, size=20 * n + 2000, seed=seed, **options):
        if row["question"] not in exclude: found.setdefault(row["question"], row["answer"])
        if len(found) == n: break
    return list(found.items())


def total(question, answer):
    "A worked answer to a chain of sums: 4 + 5 - 3 → 4 + 5 = 9, 9 - 3 = 6."
    terms = re.findall(r"[+-] \d+", "+ " + re.search(r"\d+( [+-] \d+)+", question)[0])
    value, out = int(terms[0][2:]), []
    for t in terms[1:]:
        before, value = value, value + int(t.replace(" ", ""))
        out.append(f"{before} {t} = {value}")
    return ", ".join(out)


short = lambda question: (re.search(r"\d+( [-+*/] \d+)+", question) or [question])[0]
what, echo = lambda q: f"What is {short(q)}?", lambda q, a: f"{short(q)} = {a}"
# a way to ask: the system prompt (None: the template's own), examples shown as earlier turns of the chat, how a
# question is put, how an example is answered
WAYS = {
    "as it is": (None, 0, lambda q: q, None),
    "1 example, number": ("", 1, what, lambda q, a: a),
    "1 example, sentence": ("", 1, what, echo),
    "2 examples, worked": ("", 2, what, total),
}
CANDIDATES = [
    ("sums, 2 terms of 1 digit", "as it is"), ("sums, 2 terms of 1 digit", "1 example, number"),
    ("sums, 2 terms of 1 digit", "1 example, sentence"),
    ("sums, 2 terms of 2 digits", "1 example, sentence"), ("sums, 3 terms of 1 digit", "1 example, sentence"),
    ("sums, 3 terms of 1 digit", "2 examples, worked"),
    ("products of 1 digit", "1 example, sentence"), ("sums and products of 1 digit", "1 example, sentence"),
]


def problems(tokenizer, task, way, n, seed, exclude=()):
    "Distinct problems of a task, asked in a way, none of `exclude`; the examples come from seed 0 and are never asked."
    system, shots, put, answer = WAYS[way]
    shown = questions(task, shots, 0) if shots else []
    turns = [] if system is None else [{"role": "system", "content": system}]
    for q, a in shown: turns += [{"role": "user", "content": put(q)}, {"role": "assistant", "content": answer(q, a)}]
    ask = lambda q: tokenizer.apply_chat_template(turns + [{"role": "user", "content": put(q)}], tokenize=False,
                                                  add_generation_prompt=True)
    return [Problem(ask(q), a) for q, a in questions(task, n, seed, {*exclude, *dict(shown)})]


def load(folder, dtype):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval(), AutoTokenizer.from_pretrained(folder)


if __name__ == "__main__":
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("model")
    ask.add_argument("--out", type=Path, default=DATA/"tasks.csv")
    ask.add_argument("--questions", type=int, default=64)
    a = ask.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load(a.model, torch.float32)
    a.out.parent.mkdir(parents=True, exist_ok=True)
    log = CSVLog(a.out)
    for task, way in CANDIDATES:
        start, ps = time.perf_counter(), problems(tokenizer, task, way, a.questions, seed=1)
        r = rollout(HFSampler(model, tokenizer, 24, tokens=2**13), ps, 8, verify, seed=1)
        e = evaluate(r)
        log({"task": task, "way": way, "questions": len(ps), "accuracy": e["accuracy"],
             "mixed": e["mixed_questions"] / len(ps), "auc_mean": e["auc_mean"], "lpm": e["lpm"],
             "length": e["length"], "truncated": e["truncated"],
             "prompt": r.prompt_mask.sum(1).float().mean().item(), "seconds": time.perf_counter() - start})
        print(task, way, e["accuracy"], [t for ts in r.text[:4] for t in ts[:3]], flush=True)
