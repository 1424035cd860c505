"What is trained, in which precision, beside which reference, and what is refused before the first step."
from dataclasses import replace

import pytest
import torch

from capo.grpo import kl_penalty
from capo.logprob import token_logps
from capo.policy import check_context, is_exact, recomputing, starting_model, swapped, with_lora
from capo.recipe import capo, grpo, grpo_size
from capo.rollout import HFSampler, rollout_logps, score
from capo.task import load_model
from capo.train import train
from helpers import gpt2, llama, model, problems, run, small, spying, tokenizer, weights

asked = [p.prompt for p in problems[:4]]


def taught(rank=2):
    "A model with an adapter that has learned something."
    policy = with_lora(model(), rank)
    with torch.no_grad():
        for k, p in policy.named_parameters():
            if "lora_B" in k: p.copy_(torch.linspace(-.3, .3, p.numel()).view_as(p))
    return policy


def test_a_second_run_starts_where_the_first_ended(tmp_path):
    "By folder, as `--model RUN/policy` does it: each of three words, and none."
    base, first = tmp_path / "base", tmp_path / "first"
    policy = taught()
    policy.unload().save_pretrained(base)                                           # unload takes the adapter off
    policy = taught()
    policy.get_base_model().name_or_path = policy.peft_config["default"].base_model_name_or_path = str(base)
    policy.save_pretrained(first)
    r = HFSampler(policy, tokenizer, 8)(asked, 3)
    with pytest.raises(ValueError, match="set adapter to continue, merge or on_top"):
        train(load_model(str(first)), tokenizer, problems, config=replace(small, lora_rank=2))
    choices = (("continue", 0, "lora_"), ("continue", 2, "lora_"), ("merge", 0, ""), ("on_top", 3, "lora_"))
    for word, rank, trained in choices:
        spied, seen, _ = spying(capo(.5, 1.5, 20., grpo_size))
        result = run(spied, replace(small, adapter=word, lora_rank=rank, updates=1), load_model(str(first)))
        moved = {k for k, p in result.model.named_parameters() if p.requires_grad}
        assert moved and all(trained in k for k in moved)
        for step, _ in (seen[0], seen[2]):                                          # as training began, and to its end
            torch.testing.assert_close(step.ref_logp, score(policy, step), rtol=0, atol=1e-4)
        assert (score(result.model, r) - score(policy, r)).abs().max() > 1e-3


@pytest.mark.parametrize("make, word, rank, said", [
    (taught, "", 0, "set adapter to"), (taught, "merge", 2, "lora_rank must be 0"),
    (taught, "on_top", 0, "new adapter's lora_rank"), (taught, "continue", 3, "has rank 2"),
    (model, "merge", 0, "has none")])
def test_an_adapter_without_one_meaning_is_refused(make, word, rank, said):
    with pytest.raises(ValueError, match=said): starting_model(make(), word, rank)


def test_weights_swapped_come_back():
    policy = taught()
    before = weights(policy)
    with swapped(policy, {k: torch.zeros_like(p) for k, p in before.items()}):
        assert all(p.eq(0).all() for p in policy.parameters())
    assert all(p.equal(before[k]) for k, p in policy.named_parameters())


def test_an_adapter_on_a_tied_output_layer_is_refused():
    with pytest.raises(ValueError, match="lm_head shares its matrix"): with_lora(model(), 2, targets="lm_head")
    untied = llama()                                                                # of which both may have one
    assert with_lora(untied, 2, targets="lm_head").peft_config


@pytest.mark.parametrize("temperature", [.7, 1., 1.5])
def test_the_kl_to_oneself_is_zero_at_any_temperature(temperature):
    rows = run(config=replace(small, kl=.1, temperature=temperature, updates=1, steps=1)).rows
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-7)


def test_the_kl_is_between_the_distributions_that_are_sampled_from():
    spied, seen, losses = spying(grpo())
    row = run(spied, replace(small, kl=.3, temperature=.7, updates=1, steps=2)).rows[1]
    logp, _, _, mask = losses[1]
    want = kl_penalty(logp, rollout_logps(model(), seen[1][0], .7).flatten(0, 1), mask)
    assert row["kl"] == pytest.approx(want.item(), rel=1e-3) and row["kl"] > 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_mismatch_is_measured_where_there_can_be_one(dtype):
    row = run(config=replace(small, dtype=dtype, steps=1, updates=1)).rows[0]
    assert ("mismatch" in row) == (dtype == "bfloat16") and row["ratio"] == pytest.approx(1, abs=1e-3)
    assert dtype == "float32" or 0 <= row["mismatch"] < .2


def test_a_model_in_float16_is_trained_in_float32_here(caplog):
    policy = model().half()
    result = run(policy=policy)
    assert "float16 has no room for gradients" in caplog.text
    assert {p.dtype for p in result.model.parameters()} == {torch.float32}
    assert not is_exact(model().bfloat16()) and is_exact(model())


def test_a_compiled_model_gets_its_positions():
    "GPT-2 counts positions from the left end of its input unless it is told; under padding on the left that is wrong."
    plain = gpt2().eval()
    compiled = torch.compile(plain, backend="eager")
    ids, mask = torch.randint(2, 16, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    mask[0, :4] = 0
    with torch.no_grad(): torch.testing.assert_close(token_logps(compiled, ids, mask), token_logps(plain, ids, mask))


def test_a_wrapper_that_hides_its_arguments_is_refused():
    class Wrapped(torch.nn.Module):
        def __init__(self, inner): super().__init__(); self.inner = inner
        def forward(self, *args, **kwargs): return self.inner(*args, **kwargs)

    ids = torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="Wrapped hides what its forward takes"): token_logps(Wrapped(gpt2()), ids, ids)


@pytest.mark.parametrize("reward", [-1, .5, 2, None, "yes"])
def test_a_reward_that_is_no_verdict_is_an_error(reward):
    with pytest.raises(ValueError, match="must return a bool, 0 or 1; it returned"):
        train(model(), tokenizer, problems, grpo(), verify=lambda text, answer: reward, config=small)


def test_an_eos_that_a_tokenizer_appends_does_not_end_the_prompt():
    from tokenizers.processors import TemplateProcessing
    appends = load_tokenizer_that_appends(TemplateProcessing)
    plain, appended = (HFSampler(model(), t, 8)(asked, 2) for t in (tokenizer, appends))
    assert appends(asked[0]).input_ids[-1] == tokenizer.eos_token_id
    assert plain.prompt_ids.equal(appended.prompt_ids) and plain.text == appended.text


def load_tokenizer_that_appends(template):
    from capo.task import arithmetic_tokenizer
    appends = arithmetic_tokenizer()
    special = [("<eos>", appends.eos_token_id)]
    appends.backend_tokenizer.post_processor = template(single="$A <eos>", special_tokens=special)
    return appends


def test_what_exceeds_the_models_positions_is_said_before_the_first_step():
    with pytest.raises(ValueError, match="exceed the model's 64 positions: number 1 has 6"):
        train(model(), tokenizer, problems[:3], config=replace(small, max_new_tokens=62))
    assert check_context(model(), tokenizer, ["1+1="], 60) == 4


def test_dropout_in_a_layer_is_off_while_it_is_computed_again():
    class Layer(torch.nn.Module):
        gradient_checkpointing, dropout = True, .9
        def __init__(self): super().__init__(); self.dropout = .9
        def forward(self, x): return torch.nn.functional.dropout(x, self.dropout, self.training)

    layer = Layer().eval()
    with recomputing(layer): assert layer.training and layer(torch.ones(99)).eq(1).all()
    assert layer.dropout == .9 and not layer.training


def test_a_budget_that_memory_asks_for_changes_no_gradient(monkeypatch, caplog):
    "As much memory as holds a part of the update: the same loss, in parts, and said."
    monkeypatch.setattr("capo.train.free_memory", lambda device: 40_000_000)
    monkeypatch.setattr("capo.policy.token_bytes", lambda model, recompute: 400_000)
    config = replace(small, questions=40, group_size=4, steps=1, updates=1)
    parted = run(config=config).rows[0]
    assert "token_budget is" in caplog.text
    monkeypatch.undo()
    whole = run(config=config).rows[0]
    assert parted["loss"] == pytest.approx(whole["loss"], abs=1e-6)
    assert parted["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)


def test_a_model_whose_cache_is_missing_or_cannot_move_its_rows_is_refused():
    import transformers as hf
    mamba = hf.MambaForCausalLM(hf.MambaConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, state_size=4))
    size = dict(vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    minimax = hf.MiniMaxForCausalLM(hf.MiniMaxConfig(**size, num_key_value_heads=1, head_dim=8, num_local_experts=2))
    for refused in (mamba, minimax):
        with pytest.raises(ValueError, match="has no key–value cache whose rows can move"):
            HFSampler(refused.eval(), tokenizer, 4)(asked, 2)


def opt():
    import transformers as hf
    return hf.OPTForCausalLM(hf.OPTConfig(
        vocab_size=16, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=16,
        max_position_embeddings=64, dropout=.5, init_std=.5, pad_token_id=0, eos_token_id=1, bos_token_id=None))


def llama4():
    import transformers as hf
    return hf.Llama4ForCausalLM(hf.Llama4TextConfig(
        vocab_size=16, hidden_size=16, intermediate_size=32, intermediate_size_mlp=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_local_experts=2, num_experts_per_tok=1,
        pad_token_id=0, eos_token_id=1, bos_token_id=None))


def test_recomputation_in_a_model_whose_layers_drop_out():
    def row(**options):
        torch.manual_seed(0)
        return run(config=replace(small, steps=1, updates=1, **options), policy=opt()).rows[0]

    assert row(recompute=True)["grad_norm"] == pytest.approx(row()["grad_norm"], rel=1e-4)


def test_an_adapter_on_a_mixture_of_experts_leaves_the_router_alone():
    torch.manual_seed(0)
    row = run(config=replace(small, steps=1, updates=1, lora_rank=2), policy=llama4()).rows[0]
    assert row["ratio"] == pytest.approx(1, abs=1e-4)
