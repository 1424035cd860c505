"""How long a training step takes: python benchmarks/step.py [--arms capo trl] [--model FOLDER] [--rounds 3] [--steps 6]

The same model, problems, batch and group in this package's loop and, where TRL is installed, in TRL's `GRPOTrainer`: by
default the small model that ships with the package and 64 questions of 8 responses; with --model a folder with a
pretrained one (nbs/tools/smollm2.py makes it), LoRA of rank 16 and 8 x 8. The arms take turns. The table shows seconds
of processor time of a step on one thread, the median over all rounds without the first step of each; and with a single
arm what the process held at most."""
import argparse
import resource
import statistics
import tempfile
import time
from importlib.util import find_spec

import torch
from measure import header, row

from capo.recipe import capo, grpo
from capo.task import Problem, arithmetic, base_model, verify
from capo.train import TrainConfig, train

FILLER = ("You are given a word problem about a shop. Read it with care, think about what is asked, and write one "
          "or two plain sentences that explain how you find the number; then give it at the end of your answer. ")


def small(): return *base_model(), arithmetic(4096, seed=0), dict(questions=64, group_size=8, max_new_tokens=16)


def pretrained(folder):
    "Prompts of about 80 tokens, responses of about 25."
    from transformers import AutoModelForCausalLM, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ask = lambda i: [{"role": "user", "content": f"{FILLER}A shop sells {i % 17 + 2} apples and {i % 23 + 3} pears."}]
    prompts = [tokenizer.apply_chat_template(ask(i), tokenize=False, add_generation_prompt=True) for i in range(256)]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    size = dict(questions=8, group_size=8, max_new_tokens=26, lora_rank=16)
    return model, tokenizer, [Problem(p, "7") for p in prompts], size


def of_capo(load, steps, updates, recipe, right):
    "Processor seconds of each step but the first."
    model, tokenizer, problems, size = load()
    config, ends = TrainConfig(steps=steps + 1, updates=updates, lr=1e-6, **size), []
    note = lambda row: ends.append(time.process_time())
    train(model, tokenizer, problems, recipe, verify=right, config=config, log=note)
    return [b - a for a, b in zip(ends, ends[1:])]


def of_trl(load, steps, updates, kind, right):
    "The same of TRL's trainer, or of the subclass in `capo.trl`."
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Clock(TrainerCallback):
        ends = []
        def on_step_end(self, *args, **kwargs): self.ends.append(time.process_time())

    model, tokenizer, problems, size = load()
    rows, adapter = size["questions"] * size["group_size"], None
    if rank := size.get("lora_rank"):
        from peft import LoraConfig
        adapter = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    reward = lambda completions, answer, **_: [float(right(c, a)) for c, a in zip(completions, answer)]
    if kind == "capo": from capo.trl import CAPOConfig as Config, CAPOTrainer as Trainer
    else: Config, Trainer = GRPOConfig, GRPOTrainer
    options = dict(per_device_train_batch_size=rows // updates, steps_per_generation=updates, learning_rate=1e-6,
                   num_generations=size["group_size"], max_completion_length=size["max_new_tokens"], temperature=1.,
                   loss_type="grpo", use_cpu=True, bf16=False, gradient_checkpointing=False, save_strategy="no",
                   report_to=[], logging_steps=10**6, disable_tqdm=True, max_steps=updates * (steps + 1))
    data = Dataset.from_list([{"prompt": p.prompt, "answer": p.answer} for p in problems])
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(model, reward, Config(output_dir=folder, **options), train_dataset=data,
                          processing_class=tokenizer, peft_config=adapter, callbacks=[Clock])
        trainer.train()
    ends = Clock.ends[updates - 1::updates]
    return [b - a for a, b in zip(ends, ends[1:])]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", nargs="+", default=["capo", "trl"] if find_spec("trl") else ["capo"])
    parser.add_argument("--model", help="a folder; by default the small model of the package")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--only", help="one of grpo, capo, twice")
    a = parser.parse_args()
    torch.set_num_threads(1)
    load = (lambda: pretrained(a.model)) if a.model else small
    right = (lambda text, answer: len(text) % 2 == 0) if a.model else verify     # groups of both kinds
    works = {"grpo": ("GRPO, one update", 1, grpo(), "grpo"), "twice": ("GRPO, two updates", 2, grpo(), "grpo"),
             "capo": ("CAPO with its mask, one update", 1, capo(.5, 1.05, 2.1), "capo")}
    header([f"a step, {'SmolLM2-135M, LoRA 16' if a.model else 'small world'}", *(f"{x}, s" for x in a.arms)])
    for key, (name, updates, recipe, kind) in works.items():
        if a.only not in (None, key): continue
        seconds = {arm: [] for arm in a.arms}
        for _ in range(a.rounds):
            for arm in a.arms:
                if arm == "capo": seconds[arm] += of_capo(load, a.steps, updates, recipe, right)
                else: seconds[arm] += of_trl(load, a.steps, updates, kind, right)
        row(name, *(statistics.median(x) for x in seconds.values()))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if len(a.arms) == 1: print(f"\nat most {peak:.1f} GiB")
