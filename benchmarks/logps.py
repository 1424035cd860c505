"""Log-probabilities at a large vocabulary, time and peak memory: python benchmarks/logps.py

First from hidden states of 8 x 512 tokens, V = 151,936 and 896 numbers a state, forward and backward to the hidden
states; then `token_logps` as a whole on 8 x 256 tokens of a shallow model of that width whose output layer is frozen.
Plain is every logit, then log_softmax, then the token's."""
import sys

import torch

from measure import apart, header, once, row

V, D = 151_936, 896


def plain(hidden, weight, tokens): return (hidden @ weight.T).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]


def of_head(name):
    from capo.logprob import head_logps
    hidden, weight = torch.randn(8 * 512, D, requires_grad=True), torch.randn(V, D) / D**.5
    tokens = torch.randint(V, (8 * 512,))
    f = plain if name == "plain" else head_logps
    f(hidden[:2], weight[:99], tokens[:2] % 99).sum().backward()                 # code is in memory before we measure
    return once(lambda: f(hidden, weight, tokens).sum().backward())


def of_call(name):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from capo.logprob import anatomy, token_logps
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=V, hidden_size=D, intermediate_size=4864, num_hidden_layers=1,
                                         num_attention_heads=14, num_key_value_heads=2))
    model.get_output_embeddings().requires_grad_(False)
    model.get_input_embeddings().requires_grad_(False)
    ids = torch.randint(V, (8, 256))
    def whole():
        logits = model(input_ids=ids).logits[:, :-1]
        logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0].sum().backward()
    fast = lambda: token_logps(model, ids, torch.ones_like(ids)).sum().backward()
    anatomy(model)
    model(input_ids=ids[:1, :2]).logits.log_softmax(-1).sum().backward()
    return once(whole if name == "plain" else fast)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) == 3:
        import json
        print(json.dumps((of_head if sys.argv[1] == "head" else of_call)(sys.argv[2])))
    else:
        header(["log-probabilities, V = 151,936", "plain, s", "capo, s", "time", "plain, GiB", "capo, GiB", "memory"])
        for work, key in (("8 x 512 tokens from hidden states", "head"), ("`token_logps` of 8 x 256 tokens", "call")):
            a, b = (apart(__file__, key, name) for name in ("plain", "capo"))
            row(work, a["seconds"], b["seconds"], f"{b['seconds'] / a['seconds']:.2f}x", a["GiB"], b["GiB"],
                f"1/{a['GiB'] / b['GiB']:.1f}")
