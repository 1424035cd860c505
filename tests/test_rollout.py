"Sampling: what was drawn, under which probability, with which mask; and the object that holds it."
import math, sys
from dataclasses import fields, replace
from functools import partial

import pytest
import torch
import transformers as hf
from hypothesis import given, strategies as st

import capo.sampling
from capo.rollout import (HFSampler, Rollouts, VLLMSampler, corrected, cut_by_tokens, grade, mismatch,
                          plain_rollout_logps, rollout, rollout_logps, score)
from capo.sampling import draw, adapter_added, splitmix, uniforms
from capo.task import Problem, arithmetic_tokenizer
from capo.tree import can_share
from helpers import V, each_model, model_of

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


TINY = dict(vocab_size=V, pad_token_id=0, eos_token_id=1, bos_token_id=None)
SIZE = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4)
LLAMA = dict(SIZE, intermediate_size=32, num_key_value_heads=2, initializer_range=.4)
MOE = dict(LLAMA, moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=4, num_experts_per_tok=2)
OPT = dict(SIZE, ffn_dim=32, word_embed_proj_dim=16, max_position_embeddings=64, init_std=.4)
CAPS = dict(attn_logit_softcapping=3., final_logit_softcapping=2.)
FAMILIES = { # name → class, configuration, and how long a sequence may be for its prompt to be shared
    "rotary, tied": ("Llama", dict(LLAMA, tie_word_embeddings=True), 99),
    "rotary, grouped, biases": ("Qwen2", LLAMA, 99),
    "absolute": ("GPT2", dict(n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=.4), 99),
    "absolute, with an offset": ("OPT", OPT, 99),
    "ALiBi": ("Bloom", dict(hidden_size=16, n_layer=2, n_head=2, initializer_range=.4), 0),
    "a window as long as the text": ("Mistral", dict(LLAMA, sliding_window=40), 40),
    "a window": ("Mistral", dict(LLAMA, sliding_window=6), 0),
    "soft caps": ("Gemma2", dict(LLAMA, head_dim=8, sliding_window=64, **CAPS), 64),
    "experts": ("Mixtral", dict(LLAMA, num_local_experts=4, num_experts_per_tok=2), 99),
    "experts, one shared": ("Qwen2Moe", MOE, 99)}
HEADS = {"GPT2": "LMHeadModel"}


def family(name, lora=False):
    kind, options, _ = FAMILIES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(hf, kind + "Config")(**TINY | options)
        model = getattr(hf, kind + HEADS.get(kind, "ForCausalLM"))(config).eval()
        if not lora: return model
        from peft import LoraConfig, get_peft_model
        adapter = LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(model, adapter).eval()


def batch(B=5, G=4, P=13, T=9):
    "Prompts that begin alike, two of them the same, and responses of many lengths, one empty."
    g = torch.Generator().manual_seed(0)
    asked, answered = torch.tensor([13, 11, 10, 12, 13]), torch.randint(1, T + 1, (B, G), generator=g)
    answered[1, 2] = 0
    ids, prompt_mask = torch.randint(2, V, (B, P), generator=g), (torch.arange(P) >= P - asked[:, None]).long()
    for row, n in zip(ids, asked): row[P - n:P - n + 9] = torch.arange(3, 12)
    ids[4], answered[4, 0] = ids[0], answered[0, 0]                               # the same question
    mask = (torch.arange(T) < answered[..., None]).long()
    drawn, logp = torch.randint(2, V, (B, G, T), generator=g), -torch.rand(B, G, T, generator=g) * mask
    drawn[4, 0] = drawn[0, 0]                                                     # with the same answer
    none = torch.zeros(B, G)
    return Rollouts(ids, prompt_mask, drawn, mask, logp, none, none.bool(), [[""] * G] * B)


def value_and_gradient(model, r, f, temperature=1.):
    weights = [p for p in model.parameters() if p.requires_grad]
    logp = f(model, r, temperature)
    rising = torch.arange(1., r.mask.numel() + 1).view_as(r.mask) / r.mask.numel()
    slopes = torch.autograd.grad((logp * rising).sum(), weights, allow_unused=True)
    return logp.detach(), [None if g is None else g.clone() for g in slopes]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_read_once_changes_neither_the_numbers_nor_the_gradient(name, lora):
    "In float64 where prompts are shared, so that nothing hides behind rounding; as trees and each response alone."
    longest, r, model = FAMILIES[name][2], batch(), family(name, lora)
    wide = longest and name not in ("soft caps", "experts", "experts, one shared") # these do not work in float64
    if wide: r, model = r.map(lambda x: x.double() if x.is_floating_point() else x), model.double()
    assert can_share(model, longest) == (longest > 0) and not (longest < 99 and can_share(model, max(longest, 12) + 1))
    for temperature in (1., .7):
        plain = value_and_gradient(model, r, plain_rollout_logps, temperature)
        for largest in (128, 1):
            fast = value_and_gradient(model, r, partial(rollout_logps, largest=largest), temperature)
            torch.testing.assert_close(fast[0], plain[0], rtol=0, atol=1e-5 if wide else 5e-5) # some round to float32
            assert [g is None for g in fast[1]] == [g is None for g in plain[1]]
            for a, b in zip(*((g for g in gs if g is not None) for gs in (fast[1], plain[1]))):
                assert (a - b).norm() <= (1e-5 if wide else 1e-4) * (1 + b.norm())
    assert (plain[0] != 0).sum() == r.mask.sum()
    whole = score(model, r)
    for budget in (1, 60, 10**4): torch.testing.assert_close(score(model, r, budget), whole, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["rotary, tied", "absolute", "soft caps", "ALiBi"])
def test_a_prompt_read_once_goes_with_recomputation(name):
    "Layers run twice, and in the backward pass with the same attention."
    r, model = batch(), family(name)
    want, calls = value_and_gradient(model, r, rollout_logps), []
    model.gradient_checkpointing_enable({"use_reentrant": False})
    layers = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    for m in layers: m.training = True
    first = next(m for m in model.modules() if type(m).__name__.endswith(("Layer", "Block")))
    first.register_forward_pre_hook(lambda *_: calls.append(1))
    inner = next(m for m in first.modules() if m is not first and not list(m.children()))
    inner.register_forward_pre_hook(lambda *_: calls.append(2))
    found = value_and_gradient(model, r, rollout_logps)
    assert calls.count(2) == 2
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
    assert model.config._attn_implementation in ("sdpa", "eager")


def test_every_prompt_is_read_once_and_no_token_for_nothing():
    model, r, sizes = family("rotary, tied"), batch(), []
    can_share(model)
    model.model.layers[0].mlp.register_forward_pre_hook(lambda module, inputs: sizes.append(tuple(inputs[0].shape[:2])))
    with torch.no_grad(): rollout_logps(model, r)
    rests = sum((13 - 9, 11 - 9, 10 - 9, 12 - 9))
    begun = {(b % 4, *ids[:k]) for b, (drawn, masks) in enumerate(zip(r.response_ids.tolist(), r.mask.tolist()))
             for ids, mask in zip(drawn, masks) for k in range(1, sum(mask))}          # the fifth prompt is the first
    each = int((r.mask.sum(-1) - 1).clamp(min=0).sum())
    assert len(begun) < each and sizes == [(1, 9 + rests + len(begun))]


def test_a_mask_with_holes_takes_the_plain_path():
    model, r = family("rotary, tied"), batch()
    mask = r.mask.clone()
    mask[0, 0, 1] = 0
    r = replace(r, mask=mask)
    with torch.no_grad(): assert rollout_logps(model, r).equal(plain_rollout_logps(model, r))


@each_model
def test_a_response_ends_with_its_eos_or_is_truncated(name):
    r = sampler(name, max_new_tokens=12)(PROMPTS, 16, seed=2)
    assert 0 < r.truncated.float().mean() < 1 and r.valid.all()
    flat = (x.flatten(0, 1) for x in (r.response_ids, r.mask, r.truncated))
    for ids, mask, cut, text in zip(*flat, sum(r.text, [])):
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
@pytest.mark.parametrize("tokens", [1, 40, 60, 100, 300])
@pytest.mark.parametrize("temperature", [1., .7])
def test_the_draws_do_not_depend_on_the_batches(name, tokens, temperature):
    "From one response at a time, over parts of a group and groups of several questions, to all at once."
    options = dict(max_new_tokens=12, temperature=temperature, top_k=4, stop=[",", "7-"])
    a, b = sampler(name, **options)(PROMPTS, 6, seed=5), sampler(name, tokens=tokens, **options)(PROMPTS, 6, seed=5)
    for f in fields(Rollouts):
        x, y = getattr(a, f.name), getattr(b, f.name)
        if isinstance(x, torch.Tensor) and x.is_floating_point(): torch.testing.assert_close(x, y, rtol=0, atol=1e-4)
        else: assert x.equal(y) if isinstance(x, torch.Tensor) else x == y


def test_a_response_does_not_depend_on_its_neighbours_nor_on_the_budgets():
    "Fewer are the first of more; a smaller budget cuts, and changes nothing before; prompts behind change nothing."
    a = sampler(max_new_tokens=12)(PROMPTS, 6, seed=3)
    few, short = sampler(max_new_tokens=12)(PROMPTS, 2, seed=3), sampler(max_new_tokens=3)(PROMPTS, 6, seed=3)
    first = sampler(max_new_tokens=12)(PROMPTS[:2], 6, seed=3)
    assert few.text == [row[:2] for row in a.text] and first.text == a.text[:2]
    assert short.response_ids.equal(a.response_ids[..., :3]) and short.mask.equal(a.mask[..., :3])
    same = sampler(max_new_tokens=12)([PROMPTS[0]] * 3, 4, seed=3)                # one prompt thrice has three streams
    assert len({tuple(row) for row in same.text}) == 3


def test_uniform_numbers_are_uniform_and_independent():
    "Each axis against its neighbour, and the first and last bits, at five standard errors."
    u = torch.stack([uniforms(seed, torch.arange(20), torch.arange(30), 40) for seed in range(20)])
    n = u.numel()
    assert 0 <= u.min() and u.max() < 1 and len(u.unique()) == n
    counts = torch.histc(u, 64, 0, 1)
    assert ((counts - n / 64).square() / (n / 64)).sum() < 63 + 5 * (2 * 63)**.5
    assert abs(((u * 2**53).long() % 2).double().mean() - .5) < 5 * .5 / n**.5
    z = (u - .5) * 12**.5
    for axis in range(4):
        step = z.shape[axis] - 1
        assert abs((z.narrow(axis, 0, step) * z.narrow(axis, 1, step)).mean()) < 5 / n**.5


def test_splitmix_gives_the_published_sequence():
    "The first outputs of Java's SplittableRandom and of the reference code in C, from the state 1234567."
    want = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert [x % 2**64 for x in splitmix(torch.tensor(1234567), torch.arange(5)).tolist()] == want


chances = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=40).filter(lambda p: sum(p) > 1e-3)


@given(chances, st.floats(0, 1, exclude_max=True), st.sampled_from([1, 2, 128]))
def test_a_draw_inverts_the_cumulative_distribution(p, u, block):
    "At once, and in blocks, which come in when there are more than sixteen of them."
    i = int(draw(torch.tensor([p]), torch.tensor([u], dtype=torch.float64), block))
    total = sum(p)
    assert p[i] > 0 and sum(p[:i]) <= u * total + 1e-9 and u * total <= sum(p[:i + 1]) + 1e-9


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 20)), max_size=24), st.integers(1, 6), st.integers(1, 400))
def test_cut_by_tokens_has_every_row_once_within_the_budget(lengths, group, budget):
    lengths = lengths[:len(lengths) // group * group]
    prompt, response = [p for p, _ in lengths], [t for _, t in lengths]
    found = cut_by_tokens(prompt, response, budget, group)
    assert sorted(sum(found, [])) == list(range(len(lengths)))
    cost = lambda rows: len(rows) * (max(prompt[i] for i in rows) + max(response[i] for i in rows))
    for rows in found:
        assert len(rows) == 1 or cost(rows) <= budget
        if len({i // group for i in rows}) > 1: assert len(rows) % group == 0      # a group is cut only by itself
    for b in range(len(lengths) // group):
        rows = list(range(b * group, (b + 1) * group))
        assert cost(rows) > budget or sum(set(rows) <= set(part) for part in found) == 1
    first = [rows[0] // group * group for rows in found]
    longest = [max(prompt[i] + response[i] for i in range(start, start + group)) for start in first]
    assert longest == sorted(longest, reverse=True)


def test_map_reaches_every_tensor_and_nothing_else():
    r = sampler(temperature=.7)(PROMPTS, 3)
    r = replace(r, ref_logp=r.logp - 1)
    seen, prompts = [], []
    same = r.map(lambda x: seen.append(x.shape) or x)
    assert len(seen) == sum(isinstance(v, torch.Tensor) for v in vars(r).values()) == 9 and vars(same) == vars(r)
    r.map(lambda x: x, lambda x: prompts.append(x.shape) or x)
    assert prompts == [r.prompt_ids.shape] * 2


def test_nothing_is_read_twice_while_sampling_and_nothing_that_has_ended():
    "Each prompt once, then a row for each beginning that responses to it have."
    model, rows = model_of("llama"), []
    can_share(model)
    layer = model.model.layers[0].mlp
    hook = layer.register_forward_pre_hook(lambda module, inputs: rows.append(tuple(inputs[0].shape[:2])))
    try: r = sampler(max_new_tokens=12)(PROMPTS + PROMPTS[:1], 8, seed=2)
    finally: hook.remove()
    assert rows[0] == (1, sum(map(len, PROMPTS)))                                  # without padding
    for t, (_, n) in enumerate(rows[1:], 1):
        of = lambda b: [ids[:t] for ids, m in zip(r.response_ids[b].tolist(), r.mask[b].sum(-1)) if m > t]
        assert n == len({(b % 4, *ids) for b in range(5) for ids in of(b)})
    assert rows[1][1] < 20 and r.mask[..., -1].sum() < 40


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("temperature", [1., .7])
def test_every_family_samples_what_it_samples_with_its_own_cache(name, temperature, monkeypatch):
    "The same draws, and log-probabilities of a plain forward pass; long responses, so that places are emptied."
    model = family(name)
    s = HFSampler(model, tokenizer, 36, temperature, top_k=3)
    a = s(PROMPTS, 8, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(plain_rollout_logps(model, a), a.logp, rtol=0, atol=1e-4)
        torch.testing.assert_close(plain_rollout_logps(model, a, temperature), a.old_logp, rtol=0, atol=1e-4)
    monkeypatch.setattr(capo.sampling, "can_share", lambda *_: False)
    b = s(PROMPTS, 8, seed=1)
    for f in fields(Rollouts):
        x, y = getattr(a, f.name), getattr(b, f.name)
        if isinstance(x, torch.Tensor) and x.is_floating_point(): torch.testing.assert_close(x, y, rtol=0, atol=1e-4)
        else: assert x.equal(y) if isinstance(x, torch.Tensor) else x == y
    assert a.mask.sum(-1).unique().numel() > 5


def test_looking_rarely_for_ends_changes_nothing(monkeypatch):
    "As on a GPU: what is drawn behind an end is thrown away."
    a = sampler(max_new_tokens=20, temperature=.7, top_k=2)(PROMPTS, 8, seed=1)
    monkeypatch.setattr(capo.sampling, "patience", lambda device: 8)
    b = sampler(max_new_tokens=20, temperature=.7, top_k=2)(PROMPTS, 8, seed=1)
    for k, v in vars(a).items():
        if isinstance(v, torch.Tensor): torch.testing.assert_close(v, getattr(b, k), rtol=0, atol=1e-4)
        else: assert v == getattr(b, k)


@pytest.mark.parametrize("name", ["rotary, tied", "absolute"])
def test_an_adapter_is_added_while_sampling_and_the_weights_are_left_as_they_were(name):
    model = family(name, lora=True)
    before = {k: p.clone() for k, p in model.named_parameters()}
    r = HFSampler(model, tokenizer, 8)(PROMPTS, 4)
    assert all(p.equal(before[k]) for k, p in model.named_parameters())
    assert not any(getattr(m, "merged", False) for m in model.modules())
    with torch.no_grad(): torch.testing.assert_close(plain_rollout_logps(model, r), r.logp, rtol=0, atol=1e-4)
    with adapter_added(model): assert any(not p.equal(before[k]) for k, p in model.named_parameters())
    with adapter_added(model.bfloat16()): assert not any(getattr(m, "merged", False) for m in model.modules())


@each_model
def test_token_confidence_is_that_of_the_likeliest_tokens(name):
    r = sampler(name, top_k=3, temperature=.7)(PROMPTS, 3, seed=1)
    for b, prompt in enumerate(PROMPTS):
        n = int(r.mask[b, 0].sum())
        ids = torch.cat([torch.tensor(tokenizer(prompt).input_ids), r.response_ids[b, 0, :n]])
        with torch.no_grad(): p = model_of(name)(input_ids=ids[None]).logits[0, -n - 1:-1].log_softmax(-1)
        likeliest = p.sort(descending=True).values[:, :3]
        torch.testing.assert_close(r.token_confidence[b, 0, :n], -likeliest.mean(-1), rtol=0, atol=1e-4)
    assert (r.token_confidence[r.mask == 0] == 0).all() and sampler(name)(PROMPTS, 1).token_confidence is None


def test_a_stop_string_ends_a_response_with_the_token_that_completes_it():
    free, r = (sampler(max_new_tokens=16, stop=stop)(PROMPTS, 32, seed=2) for stop in ([], ["-4", "0"]))
    texts, flat = (sum(x.text, []) for x in (free, r)), (r.response_ids, r.mask, r.truncated, free.truncated)
    for whole, text, ids, mask, cut, all_cut in zip(*texts, *(x.flatten(0, 1) for x in flat)):
        ends = [whole.index(s) + len(s) for s in ("-4", "0") if s in whole]
        assert text == whole[:min(ends)] if ends else text == whole
        assert cut == (all_cut and not ends) and (not ends or tokenizer.decode(ids[mask.sum() - 1]) == text[-1])
    assert {t[-1] for t in sum(r.text, []) if t} >= {"4", "0"} and 0 < r.truncated.float().mean() < 1


def test_mismatch_and_correction_by_hand():
    r = sampler()(PROMPTS[:1], 2)
    mask = torch.tensor([[[1, 1, 1], [1, 0, 0]]])
    r = replace(r, response_ids=mask, mask=mask, logp=torch.tensor([[[-1., -2., -3.], [-1., 0., 0.]]]))
    own = torch.tensor([[[-1.1, -2., -2.], [-1.2, 0., 0.]]])
    found, d = mismatch(r, own), [-.1, 0., 1., -.2]
    want = {"mismatch": 1.3 / 4, "mismatch_kl": sum(math.exp(x) - 1 - x for x in d) / 4, "mismatch_max": math.e,
            "mismatch_lpm": (.9 / 3 + .2) / 2}
    assert found == pytest.approx(want, abs=1e-6)
    c = corrected(r, own, cap=2.)
    torch.testing.assert_close(c.weight, torch.tensor([[[math.exp(-.1), 1., 2.], [math.exp(-.2), 0., 0.]]]))
    assert c.logp.equal(own) and c.old_logp.equal(own) and c.response_ids.equal(r.response_ids) and r.weight is None
    with pytest.raises(ValueError, match="cap"): corrected(r, own, cap=0)
    warm = replace(r, temperature=.5, tempered_logp=r.logp * 2)
    with pytest.raises(ValueError, match="own_tempered"): corrected(warm, own, cap=2.)
    c = corrected(warm, own, 2., own_tempered=own * 2)
    torch.testing.assert_close(c.weight[0, 1, 0], torch.tensor(math.exp(-.4)))
    assert c.logp.equal(own) and c.old_logp.equal(own * 2)


def test_a_capped_weight_loses_what_theory_says():
    "The mean of min(w, c) f under the sampler falls short of that of the policy by the sum of (π − c μ)₊ f."
    r = sampler(max_new_tokens=1)(["3+8="], 4000, seed=0)
    with torch.no_grad():
        own = rollout_logps(model_of("qwen2"), r)
        ask = tokenizer(["3+8="], return_tensors="pt").input_ids
        mu, pi = (model_of(name)(ask).logits[0, -1].double().softmax(-1) for name in ("llama", "qwen2"))
    f = torch.arange(V).double()
    for cap in (1., 3., 100.):
        w = corrected(r, own, cap).weight.flatten().double()
        x = w * f[r.response_ids.flatten()]
        want = (pi * f).sum() - ((pi - cap * mu).clamp(min=0) * f).sum()
        assert abs(x.mean() - want) < 5 * x.std() / len(x)**.5
    assert (pi / mu).max() > 3


@each_model
@pytest.mark.parametrize("temperature", [1., .6])
def test_responses_come_as_often_as_they_are_probable(name, temperature):
    "All responses of up to two tokens, within five standard errors and one response."
    n, model = 6000, model_of(name)
    r = sampler(name, max_new_tokens=2, temperature=temperature)(["3+8="], n, seed=0)
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
    with torch.no_grad(), model.disable_adapter(): plain = rollout_logps(model, off)
    torch.testing.assert_close(plain, off.logp, rtol=0, atol=1e-4)
    assert on.text != off.text


def test_a_slice_is_the_rollouts_of_its_questions():
    r = sampler(temperature=.7)(PROMPTS, 3)
    r = replace(r, ref_logp=r.logp - 1, reward=torch.arange(12.).view(4, 3))
    for part in (slice(1, 3), slice(None, 2), slice(3, 9), slice(None)):
        s = r[part]
        assert len(s) == len(PROMPTS[part]) and s.temperature == r.temperature
        for f in fields(Rollouts):
            mine, all_ = getattr(s, f.name), getattr(r, f.name)
            want = all_[part] if isinstance(mine, (torch.Tensor, list)) else all_
            assert mine.equal(want) if isinstance(mine, torch.Tensor) else mine == want
        for name in ("lpm", "ppl", "ref_ppl", "valid", "old_logp"):
            assert getattr(s, name).equal(getattr(r, name)[part])


def test_reference_perplexity_is_that_of_the_reference_on_the_same_tokens():
    r = sampler("llama")(PROMPTS, 3)
    with torch.no_grad(): r = replace(r, ref_logp=rollout_logps(model_of("qwen2"), r))
    n = int(r.mask[1, 2].sum())
    own = own_logps(model_of("qwen2"), PROMPTS[1], r.response_ids[1, 2, :n])
    torch.testing.assert_close(r.ref_ppl[1, 2].log(), -own.mean(), rtol=1e-4, atol=1e-4)


def test_an_empty_response_is_not_valid():
    r = sampler()(PROMPTS, 3)
    mask = r.mask.clone()
    mask[1, 2] = 0
    r = replace(r, mask=mask)
    assert r.valid.tolist() == [[True] * 3, [True, True, False], [True] * 3, [True] * 3]
    assert r.lpm.isnan().equal(~r.valid)
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


def test_without_vllm_one_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r'needs vLLM: pip install "capo-rl\[vllm\]"'):
        VLLMSampler("anywhere", tokenizer)
    with pytest.raises(ValueError, match="lora_rank must be from 0 to 512; it is 513"):
        VLLMSampler("anywhere", tokenizer, lora_rank=513)
