"""How long a training step takes: python benchmarks/step.py [--arms capo trl] [--model FOLDER] [--rounds 3] [--steps 6]

The same model, problems, batch and group in this package's loop and, where TRL is installed, in TRL's `GRPOTrainer`: by
default the small model that ships with the package, 64 questions of 8 responses; with --model a folder of a pretrained
one (nbs/tools/smollm2.py), LoRA of rank 16 and 8 x 8. The arms take turns. The table shows seconds of processor time of
a step, the median over all rounds without the first step of each, on one thread. Nothing is asserted."""
import argparse
import statistics
import tempfile
import time

import torch

from capo.recipe import capo, grpo
from capo.task import Problem, arithmetic, base_model, verify
from capo.train import TrainConfig, train

FILLER = ("You are given a word problem about a shop. Read it with care, think about what is asked, and write one or "
          "two plain sentences that explain how you find the number; then give the number itself at the very end of your "
          "answer. ")


def small(): return *base_model(), arithmetic(4096, seed=0), dict(questions=64, group_size=8, max_new_tokens=16)


def pretrained(folder):
    "Prompts of about 80 tokens, responses of about 25."
    from transformers import AutoModelForCausalLM, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ask = lambda i: [{"role": "user", "content": f"{FILLER}A shop sells {i % 17 + 2} apples and {i % 23 + 3} pears."}]
    prompts = [tokenizer.apply_chat_template(ask(i), tokenize=False, add_generation_prompt=True) for i in range(256)]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, tokenizer, [Problem(p, "7") for p in prompts], dict(questions=8, group_size=8, max_new_tokens=26,
                                                                      lora_rank=16)


def of_capo(load, steps, updates, recipe, right):
    "Processor seconds of each step but the first."
    model, tokenizer, problems, size = load()
    config, ends = TrainConfig(steps=steps + 1, updates=updates, lr=1e-6, **size), []
    train(model, tokenizer, problems, recipe, verify=right, config=config,
          log=lambda row: ends.append(time.process_time()))
    return [b - a for a, b in zip(ends, ends[1:])]


def of_trl(load, steps, updates, kind, right):
    "The same of TRL's trainer, or of a subclass."
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
    with tempfile.TemporaryDirectory() as folder:
        options = dict(output_dir=folder, max_steps=updates * (steps + 1), per_device_train_batch_size=rows // updates,
                       num_generations=size["group_size"], steps_per_generation=updates, learning_rate=1e-6,
                       temperature=1.,
                       max_completion_length=size["max_new_tokens"], use_cpu=True, save_strategy="no", bf16=False,
                       beta=0.,
                       gradient_checkpointing=False, report_to=[], logging_steps=10**6, disable_tqdm=True,
                       loss_type="grpo")
        data = Dataset.from_list([{"prompt": p.prompt, "answer": p.answer} for p in problems])
        trainer = Trainer(model, reward, Config(**options), train_dataset=data, processing_class=tokenizer,
                          peft_config=adapter, callbacks=[Clock])
        Clock.ends.clear()
        trainer.train()
    ends = Clock.ends[updates - 1::updates]
    return [b - a for a, b in zip(ends, ends[1:])]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", nargs="+", default=["capo"], choices=["capo", "trl"])
    parser.add_argument("--model", help="a folder; by default the small model of the package")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--only", help="one work: grpo, capo or twice")
    a = parser.parse_args()
    torch.set_num_threads(1)
    load = (lambda: pretrained(a.model)) if a.model else small
    # mixed groups, so that there is an update
    right = (lambda text, answer: len(text) % 2 == 0) if a.model else verify
    works = {"grpo": ("GRPO, one update", 1, grpo(), "grpo"), "twice": ("GRPO, two updates", 2, grpo(), "grpo"),
             "capo": ("CAPO with its mask, one update", 1, capo(.5, 1.05, 2.1), "capo")}
    print(f"| {'SmolLM2, LoRA 16' if a.model else 'small world'} | " + " | ".join(f"{x}, s" for x in a.arms) + " |")
    print("|---|" + "---|" * len(a.arms))
    for key, (name, updates, recipe, kind) in works.items():
        if a.only not in (None, key): continue
        seconds = {arm: [] for arm in a.arms}
        for _ in range(a.rounds):
            for arm in a.arms:
                if arm == "capo": seconds[arm] += of_capo(load, a.steps, updates, recipe, right)
                else: seconds[arm] += of_trl(load, a.steps, updates, kind, right)
        median = {arm: statistics.median(x) for arm, x in seconds.items()}
        print(f"| {name} | " + " | ".join(f"{median[arm]:.3f}" for arm in a.arms) + " |", flush=True)
