"Token log-probabilities against each model's own loss, for several architectures."

import pytest
import torch
from hypothesis import given, strategies as st

from capo.logprob import anatomy, gather_logps, head_logps, mean_logp, perplexity, token_logps
from capo.tree import can_share
from helpers import V, each_model, llama, model_of


def tokens(*shape, seed=0): return torch.randint(2, V, shape, generator=torch.Generator().manual_seed(seed))


def own_loss(model, ids, t):
    "Minus the log-probability of token t of one unpadded sequence, by the model's own loss."
    labels = torch.full_like(ids, -100)
    labels[t] = ids[t]
    with torch.no_grad(): return model(input_ids=ids[None], labels=labels[None]).loss


@each_model
@pytest.mark.parametrize("side", ["left", "right"])
def test_every_token_is_what_the_models_own_loss_says(name, side):
    model, lengths, T = model_of(name), (7, 4, 1), 7
    ids, mask, want = torch.zeros(3, T, dtype=torch.long), torch.zeros(3, T, dtype=torch.long), torch.zeros(3, T)
    for i, n in enumerate(lengths):
        at = slice(T - n, T) if side == "left" else slice(0, n)
        ids[i, at], mask[i, at] = tokens(n, seed=i), 1
        want[i, at] = torch.tensor([0.] + [-own_loss(model, ids[i, at], t) for t in range(1, n)])
    with torch.no_grad(): found = token_logps(model, ids, mask)
    torch.testing.assert_close(found, want, rtol=0, atol=2e-5)
    assert want.abs().sum() > 1                                       # the model is not a uniform one
    for last in range(1, T + 1):
        with torch.no_grad(): found = token_logps(model, ids, mask, last=last)
        torch.testing.assert_close(found, want[:, T - last:], rtol=0, atol=2e-5)


@each_model
def test_padding_may_hold_any_token(name):
    ids, mask = tokens(2, 6), torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    with torch.no_grad(): a, b = (token_logps(model_of(name), ids.where(mask.bool(), junk), mask) for junk in (0, 9))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert (a[mask == 0] == 0).all() and a[0, 2] == 0                 # nothing is known of the first real token


@each_model
def test_the_budget_changes_nothing_not_even_the_gradient(name):
    model, ids = model_of(name), tokens(3, 6)
    weights = [p for p in model.parameters() if p.requires_grad]

    def value_and_gradient(budget):
        logp = token_logps(model, ids, torch.ones_like(ids), last=4, budget=budget)
        return logp.detach(), torch.cat([g.flatten() for g in torch.autograd.grad((logp * logp).sum(), weights)])

    logp, slope = value_and_gradient(2**24)
    assert slope.norm() > 1
    for budget in (1, V, 5 * V, 12 * V):                              # a position at a time, five with a remainder, all
        torch.testing.assert_close(value_and_gradient(budget), (logp, slope), rtol=1e-4, atol=1e-4)


@each_model
def test_temperature_divides_the_logits(name):
    ids = tokens(2, 5)
    with torch.no_grad():
        z = model_of(name)(input_ids=ids).logits[:, :-1]
        for T in (.5, 3.):
            want = torch.distributions.Categorical(logits=z / T).log_prob(ids[:, 1:])
            found = token_logps(model_of(name), ids, torch.ones_like(ids), temperature=T)[:, 1:]
            torch.testing.assert_close(found, want, rtol=0, atol=2e-5)


@given(st.integers(0, 9), st.integers(2, 9), st.integers(1, 4), st.integers(1, 60), st.sampled_from([1., .5, 3.]),
       st.sampled_from([None, 2.]), st.booleans(), st.integers(0, 99))
def test_log_probs_from_hidden_states_and_their_gradients(N, V, D, budget, temperature, softcap, biased, seed):
    "In chunks of any size, against autograd on all logits."
    g = torch.Generator().manual_seed(seed)
    h, w, b = (3 * torch.randn(*shape, dtype=torch.float64, generator=g) for shape in ((N, D), (V, D), (V,)))
    x, inputs = torch.randint(V, (N,), generator=g), [h, w, b] if biased else [h, w]
    for leaf in inputs: leaf.requires_grad_()
    z = h @ w.T + (b if biased else 0)
    if softcap: z = softcap * (z / softcap).tanh()
    want = -torch.nn.functional.cross_entropy(z / temperature, x, reduction="none")
    found = head_logps(h, w, x, b if biased else None, temperature, softcap, budget)
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
    slopes = (torch.autograd.grad((logp * torch.arange(1., N + 1)).sum(), inputs) for logp in (found, want))
    torch.testing.assert_close(*slopes, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(head_logps(h, w, x, b if biased else None, temperature, softcap, budget), want)


def test_a_frozen_output_layer_gets_no_gradient_and_nothing_of_the_size_of_logits_is_kept():
    h, w, x = torch.randn(32, 4, requires_grad=True), torch.randn(5000, 4), torch.randint(5000, (32,))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        logp = head_logps(h, w, x, budget=10_000)
    logp.sum().backward()
    assert h.grad.norm() > 0 and w.grad is None and max(kept) <= w.numel()
    torch.testing.assert_close(h.grad, w[x] - (h @ w.T).softmax(-1) @ w, rtol=1e-4, atol=1e-4)


@each_model
def test_a_model_is_taken_apart_where_its_parts_give_its_logits(name):
    model, ids = model_of(name), tokens(2, 5)
    found = anatomy(model)
    with torch.no_grad():
        hidden = found.body(input_ids=ids).last_hidden_state
        torch.testing.assert_close(found.logits(hidden), model(input_ids=ids).logits)
    assert anatomy(model) is found and not model.training


def test_what_does_not_fit_takes_the_plain_path():
    "Logits that are scaled behind the output layer, and an adapter on it."
    from peft import LoraConfig, get_peft_model

    class Scaled(type(model_of("llama"))):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits / 3
            return out

    ids = tokens(3, 6)
    for model in (Scaled(model_of("llama").config).eval(),
                  get_peft_model(llama(), LoraConfig(init_lora_weights=False, target_modules=["lm_head"])).eval()):
        assert anatomy(model) is None and not can_share(model)
        with torch.no_grad():
            want = model(input_ids=ids).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
            torch.testing.assert_close(token_logps(model, ids, torch.ones_like(ids))[:, 1:], want, rtol=0, atol=2e-5)


def test_trying_a_model_leaves_no_trace():
    model = llama().train()
    model.model.layers[0].eval()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    modes, state, rng = [m.training for m in model.modules()], model.config.to_dict(), torch.get_rng_state()
    assert can_share(model, 10)
    assert modes == [m.training for m in model.modules()] and state == model.config.to_dict()
    assert rng.equal(torch.get_rng_state()) and model.config._attn_implementation == "sdpa"
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_summed_in_float32(dtype):
    g = torch.Generator().manual_seed(0)
    z, x = torch.randn(6, 5000, generator=g).to(dtype), torch.randint(5000, (6,), generator=g)
    found = gather_logps(z, x)
    torch.testing.assert_close(found, z.double().log_softmax(-1).gather(1, x[:, None])[:, 0].float(), rtol=0, atol=1e-5)
    assert found.dtype == mean_logp(found[None].to(dtype), torch.ones(1, 6)).dtype == torch.float32
    assert gather_logps(torch.tensor([[-6e4, 0., 6e4]]).to(dtype), torch.tensor([0])).isfinite().all()


@given(st.lists(st.integers(0, 6), min_size=1, max_size=5), st.integers(0, 99))
def test_lpm_is_the_mean_of_a_responses_own_tokens(lengths, seed):
    logp = -torch.rand(len(lengths), 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    junk = logp.where(mask, torch.tensor([float("nan"), 3., float("-inf")] * 2))
    want = torch.stack([x[:n].mean() for x, n in zip(logp, lengths)])          # nan for an empty one
    torch.testing.assert_close(mean_logp(junk, mask), want, equal_nan=True)
    wide, wide_mask = junk[None, :, None], mask[None, :, None].long()
    torch.testing.assert_close(mean_logp(wide, wide_mask), want[None, :, None], equal_nan=True)
    torch.testing.assert_close(perplexity(junk, mask).log(), -want, equal_nan=True)


def test_lpm_of_padding_has_no_gradient():
    logp = torch.tensor([[-1., -2., float("inf")]], requires_grad=True)
    mean_logp(logp, torch.tensor([[1, 1, 0]])).sum().backward()
    assert logp.grad.tolist() == [[.5, .5, 0.]]
