"""Useful tokens a second: python benchmarks/sampling.py [--model FOLDER] [--tokens 256] [--rounds 3]

64 responses to 8 prompts, by `HFSampler` and by transformers' `generate`, in turn, in processor time of one thread. The
lengths are the model's own. Tokens behind the end of a response do not count. The limit is a matrix product as large as
the steps' (all weights times the rows that are alive), at the speed that this machine has for it."""
import argparse

import torch
from measure import header, in_turn, row
from step import pretrained, small

from capo.rollout import HFSampler

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a folder; by default the small model of the package")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    a = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer, problems, _ = pretrained(a.model) if a.model else small()
    prompts, found = [p.prompt for p in problems[:8]], {}
    model.eval()

    def ours(): found["capo"] = int(HFSampler(model, tokenizer, a.tokens)(prompts, 8).mask.sum())

    def theirs():
        batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        eos = model.generation_config.eos_token_id or tokenizer.eos_token_id
        ids = model.generate(**batch, do_sample=True, top_k=0, temperature=1., max_new_tokens=a.tokens,
                             num_return_sequences=8, pad_token_id=tokenizer.pad_token_id)[:, batch.input_ids.shape[1]:]
        ended = torch.isin(ids, torch.tensor(eos)).cumsum(1)
        found["generate"] = int(((ended == 0) | ((ended == 1) & torch.isin(ids, torch.tensor(eos)))).sum())

    seconds = in_turn({"capo": ours, "generate": theirs}, a.rounds)
    header(["sampling", "seconds", "useful tokens", "tokens a second"])
    for name, s in seconds.items(): row(name, s, str(found[name]), found[name] / s)
