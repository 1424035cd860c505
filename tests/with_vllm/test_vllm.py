"vLLM against transformers: the same weights, the same numbers, with weights swapped under a running engine."
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")
import psutil
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from capo.rollout import HFSampler, VLLMSampler, corrected, mismatch, rollout_logps
from capo.task import arithmetic_tokenizer

tokenizer, EOS, PAD, V = arithmetic_tokenizer(), 1, 0, 16
PROMPTS = ["1+1=", "2-9+3+3=", "7", "4+4+4+4+4="]
ENGINE = dict(dtype="float32", enforce_eager=True, max_model_len=64, kv_cache_memory_bytes=2**26)
pytestmark = pytest.mark.timeout(1800)         # an engine starts in a minute, or several on a busy machine


def llama(seed=0):
    torch.manual_seed(seed)
    size = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
    tokens = dict(vocab_size=V, pad_token_id=PAD, eos_token_id=EOS, bos_token_id=None)
    return LlamaForCausalLM(LlamaConfig(**size, **tokens, initializer_range=.15)).eval()


def with_adapter(seed, rank=4):
    "The same base each time, another adapter."
    adapter = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(llama(), adapter).eval()
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_" in name: p.data.normal_(std=.3)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    llama().save_pretrained(path), tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def lora(folder):
    with VLLMSampler(folder, max_new_tokens=12, top_k=3, lora_rank=4, **ENGINE) as engine: yield engine


@torch.no_grad()
def same(r, model):
    "Are these the log-probabilities of `model`, at both temperatures?"
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=1e-3)
    close(r.logp, rollout_logps(model, r))
    if r.tempered_logp is not None: close(r.tempered_logp, rollout_logps(model, r, r.temperature))
    for b, g in [(0, 0), (1, 2)]:
        n = int(r.mask[b, g].sum())
        ids = torch.cat([r.prompt_ids[b][r.prompt_mask[b].bool()], r.response_ids[b, g, :n]])
        top = model(input_ids=ids[None]).logits[0, -n - 1:-1].log_softmax(-1).topk(3).values
        close(r.token_confidence[b, g, :n], -top.mean(-1))
    assert mismatch(r, rollout_logps(model, r))["mismatch_max"] < 1.001


def test_log_probs_follow_the_adapter(lora):
    base = lora(PROMPTS, 8, seed=1)
    same(base, llama())
    first, second = with_adapter(1), with_adapter(2)
    for policy in (first, second, first):
        lora.sync(policy)
        r = lora(PROMPTS, 8, seed=1)
        same(r, policy)
        assert r.text != base.text
        with torch.no_grad(), policy.disable_adapter(): assert mismatch(r, rollout_logps(policy, r))["mismatch"] > .1
        assert set(lora.llm.llm_engine.list_loras()) == {lora.adapter.lora_int_id}
        left = [p.name for p in Path(lora.folder.name).iterdir()]
        assert left == [str(lora.adapter.lora_int_id)]                             # the old ones are gone
    assert lora.adapter.lora_int_id == 3


def test_rollouts_are_put_together_as_by_the_other_sampler(lora):
    r, other = lora(PROMPTS, 16, seed=2), HFSampler(llama(), tokenizer, 12)(PROMPTS, 16, seed=2)
    assert r.prompt_ids.equal(other.prompt_ids) and r.prompt_mask.equal(other.prompt_mask)
    kinds = lambda r: [x.dtype for x in (r.response_ids, r.mask, r.logp, r.reward, r.truncated)]
    assert kinds(r) == kinds(other)
    assert 0 < r.truncated.float().mean() < 1 and r.valid.all() and r.tempered_logp is None
    flat = (x.flatten(0, 1) for x in (r.response_ids, r.mask, r.truncated))
    for ids, mask, cut, text in zip(*flat, sum(r.text, [])):
        n = int(mask.sum())
        assert mask.tolist() == [1] * n + [0] * (len(mask) - n) and (ids[n:] == PAD).all()
        assert EOS not in ids[:n - 1].tolist() and (ids[n - 1] == EOS) == (not cut) and (n == 12 or not cut)
        assert text == tokenizer.decode(ids[:n], skip_special_tokens=True)
    for x in (r.logp, r.token_confidence): assert (x[r.mask == 0] == 0).all()


def test_the_seed_decides(lora):
    a, b, c = lora(PROMPTS, 4, seed=7), lora(PROMPTS, 4, seed=7), lora(PROMPTS, 4, seed=8)
    assert a.response_ids.equal(b.response_ids) and a.text == b.text != c.text
    assert len({tuple(x.tolist()) for x in a.response_ids[0]}) > 1                 # the draws of a group differ
    same_prompt = lora([PROMPTS[0]] * 3, 4, seed=7)
    assert len({tuple(row) for row in same_prompt.text}) == 3 and same_prompt.text[0] == a.text[0]
    lora.first = 2                                                                 # a share of a longer list
    try: assert lora(PROMPTS[2:], 4, seed=7).text == a.text[2:]
    finally: lora.first = 0


def test_stop_strings(lora):
    free = lora(PROMPTS, 16, seed=2)
    lora.stop = ["4", "-7"]
    try: r = lora(PROMPTS, 16, seed=2)
    finally: lora.stop = []
    texts, flat = (sum(x.text, []) for x in (free, r)), (r.response_ids, r.mask, r.truncated, free.truncated)
    for whole, text, ids, mask, cut, all_cut in zip(*texts, *(x.flatten(0, 1) for x in flat)):
        ends = [whole.index(s) + len(s) for s in ("4", "-7") if s in whole]
        assert text == (whole[:min(ends)] if ends else whole)
        assert cut == (all_cut and not ends) and (not ends or tokenizer.decode(ids[mask.sum() - 1]) == text[-1])
    assert any(t.endswith("4") for t in sum(r.text, []))


def test_responses_come_as_often_as_they_are_probable(lora):
    n, policy = 2000, with_adapter(3)
    lora.sync(policy)
    r = lora(["3+8="], n, seed=0)
    with torch.no_grad(): p = policy(**tokenizer(["3+8="], return_tensors="pt")).logits[0, -1].softmax(-1)
    drawn = torch.bincount(r.response_ids[0, :, 0], minlength=V) / n
    assert ((drawn - p).abs() <= 5 * (p * (1 - p) / n).sqrt() + 1 / n).all() and p.max() < .95


def test_corrected_rollouts_are_the_trainers(lora):
    policy = with_adapter(4)
    lora.sync(policy)
    r = lora(PROMPTS, 4)
    with torch.no_grad(): own = rollout_logps(policy, r)
    c = corrected(r, own, cap=2.)
    assert lora.external and c.logp.equal(own)
    torch.testing.assert_close(c.weight, r.mask.float(), rtol=0, atol=1e-3)


def test_bad_input(lora):
    with pytest.raises(ValueError, match="lora_rank is 4, but the policy has no adapter"): lora.sync(llama())
    with pytest.raises(ValueError, match="prompts is empty"): lora([], 2)
    with pytest.raises(ValueError, match="n must be at least 1"): lora(PROMPTS, 0)


def test_another_temperature_and_full_weights(folder):
    "Both distributions come from the engine; the weights are replaced in place; and nothing is left behind."
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    with VLLMSampler(folder, max_new_tokens=12, temperature=.7, top_k=3, **ENGINE) as engine:
        kept = engine.folder.name
        first = engine(PROMPTS, 8, seed=1)
        same(first, llama())
        assert (first.tempered_logp - first.logp).abs().mean() > .05 and first.temperature == .7
        other = llama(seed=5)
        engine.sync(other)
        second = engine(PROMPTS, 8, seed=1)
        same(second, other)
        assert first.text != second.text
        with pytest.raises(ValueError, match="lora_rank is 0, but the policy has an adapter"):
            engine.sync(with_adapter(1))
        during = {p.pid for p in psutil.Process().children(recursive=True)}
    gone = psutil.wait_procs([psutil.Process(p) for p in during - before if psutil.pid_exists(p)], timeout=60)[1]
    assert during > before and not [p for p in gone if p.name().startswith("VLLM")] and not Path(kept).exists()
