"Sampling: what was drawn, under which probability, with which mask; and the object that holds it."
from dataclasses import fields, replace

import pytest
import torch

from capo.rollout import HFSampler, Rollouts, grade, rollout, rollout_logps
from capo.task import Problem, arithmetic_tokenizer
from test_logprob import V, each_model, model_of

tokenizer, EOS, PAD = arithmetic_tokenizer(), 1, 0
PROMPTS = ["1+1=", "2-9+3+3=", "7", "4+4+4+4+4="]


def sampler(name="llama", **options): return HFSampler(model_of(name), tokenizer, **{"max_new_tokens": 8} | options)


def own_logps(model, prompt, response, temperature=1.):
    "Of one response, by a plain forward pass over one unpadded sequence."
    ids = torch.cat([torch.tensor(tokenizer(prompt).input_ids), response])
    with torch.no_grad(): logits = model(input_ids=ids[None]).logits[0, -len(response) - 1:-1]
    return torch.distributions.Categorical(logits=logits / temperature).log_prob(response)


@each_model
@pytest.mark.parametrize("temperature", [1., .7])
def test_log_probs_are_those_of_a_plain_forward_pass(name, temperature):
    "On unpadded sequences: so left padding and the cache change nothing."
    r = sampler(name, temperature=temperature)(PROMPTS, 5, seed=1)
    assert r.mask.sum() > 40
    for b, prompt in enumerate(PROMPTS):
        for g in range(5):
            n = int(r.mask[b, g].sum())
            plain, drawn = (own_logps(model_of(name), prompt, r.response_ids[b, g, :n], t) for t in (1., temperature))
            torch.testing.assert_close(r.logp[b, g, :n], plain, rtol=0, atol=1e-4)
            torch.testing.assert_close(r.old_logp[b, g, :n], drawn, rtol=0, atol=1e-4)
            torch.testing.assert_close(r.lpm[b, g], plain.mean(), rtol=0, atol=1e-4)
            torch.testing.assert_close(r.ppl[b, g], (-plain.mean()).exp(), rtol=1e-3, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(rollout_logps(model_of(name), r), r.logp, rtol=0, atol=1e-4)
        torch.testing.assert_close(rollout_logps(model_of(name), r, temperature), r.old_logp, rtol=0, atol=1e-4)
    assert (r.logp[r.mask == 0] == 0).all() and (r.old_logp[r.mask == 0] == 0).all()
    assert (r.tempered_logp is None) == (temperature == 1) and r.temperature == temperature


@pytest.mark.parametrize("name", ["llama", "lora"])
def test_log_probs_of_rollouts_carry_a_gradient(name):
    r, model = sampler(name)(PROMPTS, 2), model_of(name)
    weights = [p for p in model.parameters() if p.requires_grad]
    slope = torch.autograd.grad(rollout_logps(model, r).sum(), weights)
    assert sum(g.square().sum() for g in slope) > 1 and not r.logp.requires_grad


@each_model
def test_a_response_ends_with_its_eos_or_is_truncated(name):
    r = sampler(name, max_new_tokens=12)(PROMPTS, 16, seed=2)
    assert 0 < r.truncated.float().mean() < 1 and r.valid.all()
    for ids, mask, cut, text in zip(r.response_ids.flatten(0, 1), r.mask.flatten(0, 1), r.truncated.flatten(), sum(r.text, [])):
        n = int(mask.sum())
        assert mask.tolist() == [1] * n + [0] * (len(mask) - n) and (ids[n:] == PAD).all()
        assert EOS not in ids[:n - 1].tolist() and (ids[n - 1] == EOS) == (not cut) and (n == 12 or not cut)
        assert text == tokenizer.decode(ids[:n], skip_special_tokens=True)


def test_the_longest_response_sets_the_length():
    r = sampler(max_new_tokens=200, temperature=2.)(["1+1="], 3, seed=0)
    assert r.response_ids.shape[-1] == int(r.mask.sum(-1).max()) < 200 and not r.truncated.any()


def test_every_configured_eos_ends_a_response():
    model = model_of("llama")
    one = sampler(max_new_tokens=12)(PROMPTS, 8, seed=3)
    model.generation_config.eos_token_id = [EOS, 5]
    try: two = sampler(max_new_tokens=12)(PROMPTS, 8, seed=3)
    finally: model.generation_config.eos_token_id = EOS
    last = two.response_ids.gather(-1, two.mask.sum(-1, keepdim=True) - 1)[..., 0]
    assert set(last[~two.truncated].tolist()) == {EOS, 5} and two.truncated.sum() < one.truncated.sum()
    before = two.mask.roll(-1, -1) * (torch.arange(two.mask.shape[-1]) < two.mask.shape[-1] - 1)
    assert not torch.isin(two.response_ids[before.bool()], torch.tensor([EOS, 5])).any()


def test_the_seed_decides_and_nothing_else_does():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    a = sampler()(PROMPTS, 4, seed=7)
    assert torch.get_rng_state().equal(before)
    torch.manual_seed(2)
    b, c = sampler()(PROMPTS, 4, seed=7), sampler()(PROMPTS, 4, seed=8)
    assert a.response_ids.equal(b.response_ids) and a.logp.equal(b.logp) and a.text == b.text != c.text
    assert len({tuple(x.tolist()) for x in a.response_ids[0]}) > 1                # the draws of a group differ


@each_model
@pytest.mark.parametrize("rows", [1, 4, 6, 100])
def test_batches_of_any_size_keep_prompts_and_responses_together(name, rows):
    "At a temperature that leaves no choice, so that the order of draws does not matter."
    cold = lambda rows: sampler(name, temperature=1e-4, rows=rows)(PROMPTS, 2)
    a, b = cold(4096), cold(rows)
    assert a.text == b.text and a.response_ids.equal(b.response_ids) and a.truncated.equal(b.truncated)
    torch.testing.assert_close(a.logp, b.logp, rtol=0, atol=1e-4)
    warm = sampler(name, rows=rows)(PROMPTS, 2)
    with torch.no_grad(): torch.testing.assert_close(rollout_logps(model_of(name), warm), warm.logp, rtol=0, atol=1e-4)


@each_model
@pytest.mark.parametrize("temperature", [1., .6])
def test_responses_come_as_often_as_they_are_probable(name, temperature):
    "All responses of up to two tokens, within five standard errors and one response."
    n, model = 6000, model_of(name)
    r = sampler(name, max_new_tokens=2, temperature=temperature, rows=n)(["3+8="], n, seed=0)
    drawn = torch.zeros(V, V).index_put_(tuple(r.response_ids[0].T), torch.tensor(1.), accumulate=True)
    prompt = torch.tensor(tokenizer("3+8=").input_ids)
    with torch.no_grad():
        z = model(input_ids=torch.cat([prompt.expand(V, -1), torch.arange(V)[:, None]], 1)).logits / temperature
    first, second = z[0, len(prompt) - 1].softmax(-1), z[:, -1].softmax(-1)
    second[EOS] = torch.eye(V)[PAD]                                               # after the end comes padding
    p = first[:, None] * second
    assert ((drawn / n - p).abs() <= 5 * (p * (1 - p) / n).sqrt() + 1 / n).all()
    assert p.max() < .9


def test_sampling_is_in_eval_mode_and_puts_the_mode_back():
    model = model_of("gpt2")                                                      # its dropout is .1
    want = sampler("gpt2")(PROMPTS, 4)
    model.train()
    found, mode = sampler("gpt2")(PROMPTS, 4), model.training
    model.eval()
    assert mode and found.logp.equal(want.logp)
    sampler("gpt2")(PROMPTS, 1)
    assert not model.training


def test_the_model_is_used_as_it_is_at_the_call():
    model = model_of("lora")
    s = sampler("lora")
    on = s(PROMPTS, 4)
    with model.disable_adapter(): off = s(PROMPTS, 4)
    with torch.no_grad(), model.disable_adapter(): torch.testing.assert_close(rollout_logps(model, off), off.logp, rtol=0, atol=1e-4)
    assert on.text != off.text


def test_a_slice_is_the_rollouts_of_its_questions():
    r = sampler(temperature=.7)(PROMPTS, 3)
    r = replace(r, ref_logp=r.logp - 1, reward=torch.arange(12.).view(4, 3))
    for part in (slice(1, 3), slice(None, 2), slice(3, 9), slice(None)):
        s = r[part]
        assert len(s) == len(PROMPTS[part]) and s.temperature == r.temperature
        for f in fields(Rollouts):
            mine, all_ = getattr(s, f.name), getattr(r, f.name)
            assert mine.equal(all_[part]) if isinstance(mine, torch.Tensor) else mine == (all_[part] if isinstance(mine, list) else all_)
        for name in ("lpm", "ppl", "ref_ppl", "valid", "old_logp"): assert getattr(s, name).equal(getattr(r, name)[part])


def test_reference_perplexity_is_that_of_the_reference_on_the_same_tokens():
    r = sampler("llama")(PROMPTS, 3)
    with torch.no_grad(): r = replace(r, ref_logp=rollout_logps(model_of("qwen2"), r))
    n = int(r.mask[1, 2].sum())
    torch.testing.assert_close(r.ref_ppl[1, 2].log(), -own_logps(model_of("qwen2"), PROMPTS[1], r.response_ids[1, 2, :n]).mean(), rtol=1e-4, atol=1e-4)


def test_an_empty_response_is_not_valid():
    r = sampler()(PROMPTS, 3)
    mask = r.mask.clone()
    mask[1, 2] = 0
    r = replace(r, mask=mask)
    assert r.valid.tolist() == [[True] * 3, [True, True, False], [True] * 3, [True] * 3] and r.lpm.isnan().equal(~r.valid)
    assert grade(r, [Problem(p, "") for p in PROMPTS], lambda text, answer: True).reward[1, 2] == 0


def test_grading_gives_each_response_to_the_verifier_with_its_own_answer():
    problems, seen = [Problem(p, str(i)) for i, p in enumerate(PROMPTS)], []

    def verify(text, answer):
        seen.append((text, answer))
        return len(text) % 2 == 0

    r = rollout(sampler(max_new_tokens=12), problems, 6, verify, seed=4)
    assert seen == [(text, str(i)) for i, row in enumerate(r.text) for text in row]
    want = [[float(len(t) % 2 == 0 and not cut) for t, cut in zip(*row)] for row in zip(r.text, r.truncated.tolist())]
    assert r.reward.tolist() == want and r.reward.dtype == torch.float32 and 0 < r.reward.mean() < 1
    assert r.response_ids.equal(sampler(max_new_tokens=12)(PROMPTS, 6, seed=4).response_ids)
