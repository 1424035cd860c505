"Models that are more, or other, than attention: their log-probabilities and gradients are those of a row read alone."
from dataclasses import replace

import pytest
import torch
import transformers as hf

from capo.policy import with_lora
from capo.rollout import HFSampler, plain_rollout_logps, rollout_logps
from capo.task import load_model, load_tokenizer
from capo.tree import can_share
from helpers import run, small, tokenizer

IDS = dict(pad_token_id=0, eos_token_id=1, bos_token_id=None)
SIZE = dict(vocab_size=16, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
            intermediate_size=32, max_position_embeddings=64, head_dim=8, **IDS)
PLAIN = {k: x for k, x in SIZE.items() if k != "head_dim"}
LINEAR = dict(linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
MAMBA = dict(mamba_d_state=4, mamba_n_heads=4, mamba_d_head=8, mamba_d_ssm=32)
ASKED = ["1+1=", "2-9+3+3=", "7", "4+4+4+4+4="]


def gemma3():
    "With its eyes, which nobody uses here."
    eyes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16,
                patch_size=8)
    return hf.Gemma3Config(text_config=dict(SIZE, sliding_window=20), vision_config=eyes, mm_tokens_per_image=4,
                           image_token_index=15, boi_token_index=14, eoi_token_index=13, **IDS)


RECURRENT = { # linear attention, state spaces, convolutions, beside attention or in its place
    "Qwen3Next": lambda: hf.Qwen3NextConfig(**SIZE, **LINEAR, **EXPERTS, shared_expert_intermediate_size=16),
    "Qwen3_5": lambda: hf.Qwen3_5TextConfig(**SIZE, **LINEAR),
    "Jamba": lambda: hf.JambaConfig(**PLAIN, mamba_d_state=4, num_experts=2, attn_layer_period=2, attn_layer_offset=1),
    "FalconH1": lambda: hf.FalconH1Config(**SIZE, **MAMBA),
    "Lfm2": lambda: hf.Lfm2Config(**PLAIN, layer_types=["conv", "full_attention"] * 2)}
OTHERS = { # experts whose weights are one matrix, an attention of its own, and what also sees
    "Qwen3Moe": lambda: hf.Qwen3MoeConfig(**SIZE, **EXPERTS),
    "XGLM": lambda: hf.XGLMConfig(vocab_size=16, d_model=16, ffn_dim=32, num_layers=2, attention_heads=2, **IDS),
    "Gemma3": gemma3}


def family(name):
    "With the small weights of a new model, in which little shows."
    kind = name + ("ForConditionalGeneration" if name == "Gemma3" else "ForCausalLM")
    torch.manual_seed(0)
    return getattr(hf, kind)((RECURRENT | OTHERS)[name]()).eval()


def alone(model, r):
    "Each response behind its own prompt, without padding."
    out = torch.zeros_like(r.logp)
    for b, g in torch.cartesian_prod(torch.arange(len(r)), torch.arange(r.mask.shape[1])).tolist():
        prompt, answer = r.prompt_ids[b][r.prompt_mask[b].bool()], r.response_ids[b, g][r.mask[b, g].bool()]
        logits = model(input_ids=torch.cat([prompt, answer])[None], use_cache=False).logits[0, -len(answer) - 1:-1]
        out[b, g, :len(answer)] = torch.distributions.Categorical(logits=logits).log_prob(answer)
    return out


@pytest.mark.parametrize("lora", [0, 2], ids=["full", "lora"])
@pytest.mark.parametrize("name", [*RECURRENT, *OTHERS])
def test_sampler_and_update_have_the_numbers_and_gradients_of_a_row_alone(name, lora):
    "To 2e-6; a response that sees its neighbour's through a recurrence is off by 1e-5 to 1e-2."
    model = family(name)
    if lora: model = with_lora(model, lora, targets="q_proj,v_proj" if name == "FalconH1" else "all-linear").eval()
    weights = [p for p in model.parameters() if p.requires_grad]
    r = HFSampler(model, tokenizer, 8)(ASKED, 4)
    assert r.mask.sum() > 40 and can_share(model, 19) == (name in ("Qwen3Moe", "Gemma3"))
    want = alone(model, r)
    torch.testing.assert_close(r.logp, want.detach(), rtol=0, atol=2e-6)
    slopes = torch.autograd.grad(want.square().sum(), weights, allow_unused=True)
    for f in (rollout_logps, plain_rollout_logps):
        logp = f(model, r)
        torch.testing.assert_close(logp, want, rtol=0, atol=2e-6)
        found = torch.autograd.grad(logp.square().sum(), weights, allow_unused=True)
        assert [g is None for g in found] == [g is None for g in slopes]
        for a, b in zip(found, slopes): assert a is None or (a - b).norm() <= 1e-4 * (1e-2 + b.norm())


def test_a_window_is_also_that_of_a_model_within_a_model():
    assert can_share(family("Gemma3"), 20) and not can_share(family("Gemma3"), 21)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_model_that_also_sees_is_trained_on_text(recompute):
    "Two steps; what sees is left as it was."
    def trained(**options):
        result = run(config=replace(small, steps=2, updates=1, recompute=recompute, **options), policy=family("Gemma3"))
        return result.model.state_dict(), result.rows

    (weights, rows), before = trained(), family("Gemma3").state_dict()
    moved = {k for k, x in weights.items() if not x.equal(before[k])}
    assert moved and not any("vision" in k or "projector" in k for k in moved)
    assert all(row["ratio"] == pytest.approx(1, abs=1e-5) and row["grad_norm"] > 0 for row in rows)
    _, in_parts = trained(token_budget=40)                                          # a few responses at a time
    assert in_parts[0]["grad_norm"] == pytest.approx(rows[0]["grad_norm"], rel=1e-4)


def test_experts_get_an_adapter_too():
    result = run(config=replace(small, steps=2, updates=1, lora_rank=2), policy=family("Qwen3Moe"))
    moved = {k for k, p in result.model.named_parameters() if "lora_B" in k and p.any()}
    assert any("experts" in k for k in moved) and any("q_proj" in k for k in moved)
    assert all(row["ratio"] == pytest.approx(1, abs=1e-5) for row in result.rows)


def test_layers_that_peft_refuses_are_named_with_the_setting():
    with pytest.raises(ValueError, match="'out_proj' is incompatible .*lora_targets names the layers"):
        with_lora(family("FalconH1"), 2)


def test_a_model_that_also_sees_is_loaded_from_its_folder(tmp_path):
    family("Gemma3").save_pretrained(tmp_path); tokenizer.save_pretrained(tmp_path)
    assert len(load_tokenizer(str(tmp_path))) == 16
    loaded, ids = load_model(str(tmp_path)), torch.arange(2, 9)[None]
    with torch.no_grad(): torch.testing.assert_close(loaded(ids).logits, family("Gemma3")(ids).logits)
