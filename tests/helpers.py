"What several test modules share: groups and responses to draw, a tiny model to train, models of several families."
import importlib
import importlib.util
import math
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from capo.calibration import auc_mean
from capo.responses import gather
from capo.recipe import grpo
from capo.rollout import Rollouts
from capo.task import arithmetic, arithmetic_tokenizer, tiny_lm
from capo.train import TrainConfig, train
from dataclasses import replace


@st.composite
def groups(draw, B=4, G=7):
    "Scores `(B, G)` in quarters, so that ties are common; correct; valid."
    b, g = draw(st.integers(1, B)), draw(st.integers(1, G))
    table = lambda x: torch.tensor(draw(st.lists(st.lists(x, min_size=g, max_size=g), min_size=b, max_size=b)))
    return table(st.integers(-12, 0)) / 4, table(st.booleans()), table(st.booleans())


def shuffle(n, seed): return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def sklearn_auc(score, correct):
    "nan where there is one class, of which scikit-learn only warns."
    return roc_auc_score(correct.numpy(), score.numpy()) if 0 < correct.sum() < len(correct) else math.nan


def same(a, b, atol=1e-12): np.testing.assert_allclose(a, b, rtol=0, atol=atol, equal_nan=True)


def close(a, b, atol=1e-10): np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=atol)


def rollouts(lpm, correct, valid=None, ref_ppl=None):
    "Responses of two tokens, or of none where not valid, with this lpm and this reference perplexity."
    (B, G), valid = lpm.shape, torch.ones_like(lpm, dtype=torch.bool) if valid is None else valid
    mask = valid.long()[..., None].expand(B, G, 2)
    logp = (lpm.float()[..., None] + torch.tensor([.125, -.125])) * mask
    ref = None if ref_ppl is None else -ref_ppl.float().log()[..., None] * mask
    one = torch.ones(B, 1, dtype=torch.long)
    return Rollouts(one, one, mask, mask, logp, (correct & valid).float(), ~valid, [[""] * G] * B, ref_logp=ref)


def responses(lpm, correct, valid, answers=None, **columns):
    "The valid responses to questions 0, 1, …; the answers of a question are its right or wrong ones unless told."
    group = answers if answers is not None else correct.long()
    def row(b, g):
        answer = None if group[b, g] < 0 else str(group[b, g].item())
        own = {"id": b, "response": f"{lpm[b, g]:.3f}", "answer": answer, "correct": bool(correct[b, g]),
               "lpm": lpm[b, g].item()}
        return own | {k: v[b, g].item() for k, v in columns.items()}
    return gather(row(b, g) for b, g in valid.nonzero().tolist())


def two_runs(B=30, G=6):
    g = torch.Generator().manual_seed(1)
    hard = torch.rand(B, 1, generator=g)
    make = lambda better: responses(-torch.rand(B, G, generator=g).double(),
                                    torch.rand(B, G, generator=g) < hard * better, torch.ones(B, G).bool())
    return make(.8), make(1.)


ROOT = Path(__file__).parents[1]


MODULES = ("calibration surrogate logprob grpo advantage mask task rollout evaluate folder recipe baselines "
           "train compare").split()


def load():
    spec = importlib.util.spec_from_file_location("capo_as_installed", ROOT / "capo" / "__init__.py",
                                                  submodule_search_locations=[str(ROOT / "capo")])
    sys.modules["capo_as_installed"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return SimpleNamespace(**{m: importlib.import_module(f"capo_as_installed.{m}") for m in MODULES})


lib = load()  # the library as a user has it, without the hook that checks shapes


def refuses(call, words, error=ValueError):
    "The call raises one sentence that holds these words."
    with pytest.raises(error) as e: call()
    said = str(e.value)
    assert words in said and "\n" not in said and len(said) < 250, said


V = 16


def llama():
    return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                                              num_attention_heads=2,
                                              initializer_range=.5, pad_token_id=0, eos_token_id=1, bos_token_id=None))


def gpt2():
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=V, n_embd=16, n_layer=2, n_head=2, n_positions=64,
                                            initializer_range=.5,
                                            pad_token_id=0, eos_token_id=1, bos_token_id=None))


def qwen2():
    return hf.Qwen2ForCausalLM(hf.Qwen2Config(vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                                              num_attention_heads=2,
                                              num_key_value_heads=1, initializer_range=.5, pad_token_id=0,
                                              eos_token_id=1, bos_token_id=None))


def lora():
    from peft import LoraConfig, get_peft_model
    return get_peft_model(llama(),
                          LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear", task_type="CAUSAL_LM"))


MODELS = {f.__name__: f for f in (llama, gpt2, qwen2, lora)}


each_model = pytest.mark.parametrize("name", MODELS)


@cache
def model_of(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MODELS[name]().eval()


tokenizer, problems = arithmetic_tokenizer(), arithmetic(40, seed=0)
small = TrainConfig(steps=3, questions=6, group_size=4, lr=1e-2)


# what even a random model does now and then
def has_a_seven(text, answer): return "7" in text


def model():
    "Random, and not too sure of anything, nor too unsure for an adapter to move it."
    m = tiny_lm(16, 1, 2)
    with torch.no_grad(): m.model.embed_tokens.weight.mul_(8)
    return m


def run(recipe=grpo(), config=small, policy=None, **options):
    return train(policy or model(), tokenizer, problems, recipe, verify=has_a_seven, config=config, **options)


def weights(m): return {k: v.detach().clone() for k, v in m.named_parameters()}


def spying(recipe, loss=None):
    "The recipe, and the lists of what its advantage and its loss are given."
    seen, losses = [], []

    def advantage(r, step):
        seen.append((r, step))
        return recipe.advantage(r, step)

    def spied(logp, old, A, mask):
        losses.append((logp.detach(), old, A, mask))
        return (loss or recipe.loss)(logp, old, A, mask)

    return replace(recipe, advantage=advantage, loss=spied), seen, losses


class InProcess:
    "Stands for the pool of processes."
    map = staticmethod(map)
    def __init__(self, *args): pass
    def __enter__(self): return self
    def __exit__(self, *args): pass


def fake(arm, seed):
    "Six questions of five responses, with evaluations at two steps."
    g = torch.Generator().manual_seed(10 * seed + len(arm))
    lpm, reward = -torch.rand(2, 6, 5, generator=g), (torch.rand(2, 6, 5, generator=g) < .5).float()
    # the base is the same for each arm
    first = torch.Generator().manual_seed(seed)
    lpm[0], reward[0] = -torch.rand(6, 5, generator=first), (torch.rand(6, 5, generator=first) < .5).float()
    evals = [{"step": step, "accuracy": r.mean().item(), "auc_mean": auc_mean(x, r)[0],
              "mixed_questions": auc_mean(x, r)[1], "entropy": .1 * seed + step,
              "rescored_auc": .7, "lpm": x.mean().item(), "length": 4.} for step, x, r in zip((0, 9), lpm, reward)]
    return {"arm": arm, "seed": seed, "evals": evals, "seconds": seed + 1., "masked": .25,
            "first": (lpm[0].tolist(), reward[0].tolist()),
            "last": (lpm[1].tolist(), reward[1].tolist())}


FAKES = [fake(arm, seed) for seed in (2, 5) for arm in ("grpo", "capo-x")]
