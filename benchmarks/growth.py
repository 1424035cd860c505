"""How the cost of an update grows: python benchmarks/growth.py

Processor seconds of scoring with gradient (`rollout_logps`, forward and backward) for a random Llama, when one thing is
doubled thrice and all else stays; and the exponent, the slope of log seconds over log size between the last two."""
import math

import torch
from measure import header, in_turn, row
from transformers import LlamaConfig, LlamaForCausalLM

from capo.rollout import Rollouts, rollout_logps

START = dict(G=4, T=32, P=32, V=4096, D=128)
WORDS = {"G": "responses to a question", "T": "tokens of a response", "P": "tokens of a prompt", "V": "vocabulary",
         "D": "hidden size"}


def scoring(G, T, P, V, D, B=4):
    "A function without arguments."
    model = LlamaForCausalLM(LlamaConfig(vocab_size=V, hidden_size=D, intermediate_size=4 * D, num_hidden_layers=2,
                                         num_attention_heads=4))
    ids, drawn = torch.randint(2, V, (B, P)), torch.randint(2, V, (B, G, T))
    none = torch.zeros(B, G)
    r = Rollouts(ids, torch.ones_like(ids), drawn, torch.ones_like(drawn), torch.zeros(B, G, T), none, none.bool(), [])
    return lambda: rollout_logps(model, r).sum().backward()


if __name__ == "__main__":
    torch.set_num_threads(1)
    header(["an update when this grows", "x 1, s", "x 2", "x 4", "x 8", "exponent"])
    for name, word in WORDS.items():
        arms = {k: scoring(**START | {name: START[name] * k}) for k in (1, 2, 4, 8)}
        s = in_turn(arms, 3)
        row(f"{word}, from {START[name]}", *s.values(), f"{math.log2(s[8] / s[4]):.2f}")
