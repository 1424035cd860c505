"""How the cost of a step grows: python benchmarks/growth.py [--rounds 3] [--sizes 1 2 4 8]

Processor seconds of sampling and of an update (`rollout_logps`, forward and backward, and AdamW) for a random Llama
and 4 questions, when one thing is doubled and all else stays; and the exponents, the slopes of log seconds over log
size between the last two. A random model ends no response and shares no beginning: all have the same length."""
import argparse
import math
from functools import partial

import torch
from measure import header, in_turn, row
from transformers import LlamaConfig, LlamaForCausalLM

from capo.rollout import Rollouts, rollout_logps
from capo.sampling import sample, uniforms

START = dict(G=4, T=32, P=32, V=4096, D=128)
WORDS = {"G": "responses to a question", "T": "tokens of a response", "P": "tokens of a prompt", "V": "vocabulary",
         "D": "hidden size"}


def step_of(G, T, P, V, D, B=4):
    "Two functions without arguments: sampling, and the update on what was sampled first."
    model = LlamaForCausalLM(LlamaConfig(vocab_size=V, hidden_size=D, intermediate_size=4 * D, num_hidden_layers=2,
                                         num_attention_heads=4)).eval()
    optimizer, ids = torch.optim.AdamW(model.parameters(), fused=True), torch.randint(2, V, (B, P))
    u, never = uniforms(0, torch.arange(B), torch.arange(G), T), lambda ids: torch.zeros(len(ids), dtype=torch.bool)
    draw = partial(sample, model, ids, torch.ones_like(ids), u, never)
    drawn = draw()
    r = Rollouts(ids, torch.ones_like(ids), drawn["response_ids"], drawn["mask"], drawn["logp"], torch.zeros(B, G),
                 drawn["truncated"], [])
    def update():
        optimizer.zero_grad()
        rollout_logps(model, r).sum().backward()
        optimizer.step()
    return draw, update


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4, 8])
    a = parser.parse_args()
    torch.set_num_threads(1)
    times = [f"x {k}" for k in a.sizes]
    header(["when this grows", *(f"sampling {k}, s" for k in times), "exponent", *(f"update {k}, s" for k in times),
            "exponent", "both"])
    slope = lambda x: f"{math.log(x[-1] / x[-2]) / math.log(a.sizes[-1] / a.sizes[-2]):.2f}"
    for name, word in WORDS.items():
        arms = {}
        for k in a.sizes: arms[k, 0], arms[k, 1] = step_of(**START | {name: START[name] * k})
        s = in_turn(arms, a.rounds)
        draws, updates = ([s[k, i] for k in a.sizes] for i in (0, 1))
        both = [x + y for x, y in zip(draws, updates)]
        row(f"{word}, from {START[name]}", *draws, slope(draws), *updates, slope(updates), slope(both))
