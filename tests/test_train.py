"The loop: one step by hand, LoRA and the reference, batches, determinism, and what stops a run."
import copy
import csv
import math
from dataclasses import replace

import pytest
import torch

from capo.recipe import Recipe, capo, grpo, grpo_size
from capo.rollout import HFSampler, rollout_logps
from capo.folder import CSVLog
from capo.keep import saving_bad_step
from capo.train import NonFiniteLoss, TrainConfig, batches, reference_logps, step_stats, with_lora
from helpers import model, problems, run, small, spying, tokenizer, weights

either = pytest.mark.parametrize("recipe", [grpo(), capo(.5, 1, math.inf, grpo_size)], ids=["grpo", "capo"])


def without_time(rows): return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


class Recorder:
    "A sampler that notes what it is asked and what came out."
    def __init__(self, policy, **options): self.sampler, self.calls = HFSampler(policy, tokenizer, 16, **options), []

    def __call__(self, prompts, n, seed):
        r = self.sampler(prompts, n, seed)
        self.calls.append((list(prompts), n, seed, r))
        return r


@either
@pytest.mark.parametrize("clip", [.01, 100.])
def test_one_step_by_hand(recipe, clip):
    "The gradient is −Σ A_i mean_t ∇ log p(token t) / N, a plain forward pass a response; AdamW then steps against it."
    before, policy = model(), model()
    spied, seen, _ = spying(recipe)
    result = run(spied, TrainConfig(steps=1, questions=6, group_size=4, updates=1, grad_clip=clip), policy)
    (r, step), = seen
    A = recipe.advantage(r, 1)
    assert step == 1 and (A != 0).any()
    objective = 0.
    for b in range(6):
        prompt = r.prompt_ids[b][r.prompt_mask[b].bool()]
        for g in range(4):
            response = r.response_ids[b, g][r.mask[b, g].bool()]
            logits = before(input_ids=torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1:-1]
            objective = objective + A[b, g] * logits.log_softmax(-1).gather(1, response[:, None]).mean() / 24
    (-objective).backward()
    norm = torch.cat([p.grad.flatten() for p in before.parameters()]).norm().item()
    assert result.rows[0]["grad_norm"] == pytest.approx(norm, rel=1e-4)
    for p, q in zip(before.parameters(), policy.parameters()):
        torch.testing.assert_close(q.grad, p.grad * min(1, clip / norm), rtol=1e-3, atol=1e-5 * min(clip, norm))
        torch.testing.assert_close(q, p - 5e-4 * q.grad / (q.grad.abs() + 1e-8), rtol=1e-5, atol=1e-6)
    assert result.rows[0]["loss"] == pytest.approx(-A.mean().item(), abs=1e-5)


def test_an_updates_gradient_is_its_own():
    once = Recipe("once", lambda r, step: grpo().advantage(r, step) * (step == 1))
    assert [row["grad_norm"] > 0 for row in run(once).rows] == [True, False, False]


@either
@pytest.mark.parametrize("lora", [0, 4])
def test_training_raises_the_reward(recipe, lora):
    config = TrainConfig(steps=15, questions=16, group_size=8, lr=5e-2 if lora else 2e-2, lora_rank=lora)
    rewards = [row["reward"] for row in run(recipe, config).rows]
    assert sum(rewards[-5:]) / 5 > rewards[0] + .1                               # .27 to .87 over four seeds


def test_lora_leaves_the_base_weights_untouched():
    before, policy = weights(model()), model()
    result = run(capo(.5, 1.5, 20.), replace(small, lora_rank=2), policy)
    trained = {k: v for k, v in result.model.named_parameters() if v.requires_grad}
    assert trained and all("lora_" in k for k in trained) and not any("lm_head" in k or "embed" in k for k in trained)
    assert any((v != 0).any() for k, v in trained.items() if "lora_B" in k)
    frozen = {k.removeprefix("base_model.model.").replace(".base_layer", ""): v for k,
              v in result.model.named_parameters() if "lora_" not in k}
    assert frozen.keys() == before.keys() and all(frozen[k].equal(v) for k, v in before.items())


def test_a_new_adapter_changes_nothing_and_is_drawn_by_seed():
    ids = torch.arange(2, 9)[None]
    state = torch.get_rng_state()
    a, b, c = with_lora(model(), 2, seed=1), with_lora(model(), 2, seed=1), with_lora(model(), 2, seed=2)
    assert torch.get_rng_state().equal(state)
    with torch.no_grad(): torch.testing.assert_close(a(ids).logits, model()(ids).logits)
    different = lambda x, y: any(not p.equal(q) for p, q in zip(x.parameters(), y.parameters()))
    assert not different(a, b) and different(a, c)
    assert {m.scaling["default"] for m in a.modules() if isinstance(getattr(m, "scaling", None), dict)} == {2.}
    assert {m.scaling["default"] for m in with_lora(model(), 2, alpha=1).modules()
            if isinstance(getattr(m, "scaling", None), dict)} == {.5}


@pytest.mark.parametrize("lora", [0, 2])
def test_the_reference_stays_what_the_policy_was(lora):
    "Also after training: a frozen copy for full weights, the adapter off for LoRA."
    policy = with_lora(model(), lora) if lora else model()
    r = HFSampler(policy, tokenizer, 16)(["1+1=", "2-9+3+3="], 3)
    score, before = reference_logps(policy), weights(policy)
    run(config=small, policy=policy)
    assert any(not v.equal(before[k]) for k, v in policy.named_parameters())
    found = score(r)
    assert not found.requires_grad
    torch.testing.assert_close(found, r.logp, rtol=0, atol=1e-4)
    with torch.no_grad():
        assert (rollout_logps(policy, r) - found).abs().max() > 1e-2
        if lora:
            with policy.disable_adapter(): torch.testing.assert_close(rollout_logps(policy, r), found, rtol=0,
                                                                      atol=1e-5)


@pytest.mark.parametrize("lora", [0, 2])
def test_the_mask_asks_the_policy_of_before_the_first_step(lora):
    spied, seen, _ = spying(capo(.5, 1.5, 20.))
    run(spied, replace(small, lora_rank=lora))
    assert len(seen) == 3
    for r, _ in seen:
        with torch.no_grad(): torch.testing.assert_close(r.ref_logp, rollout_logps(model(), r), rtol=0, atol=1e-4)
    torch.testing.assert_close(seen[0][0].ref_logp, seen[0][0].logp, rtol=0, atol=1e-4)
    assert (seen[-1][0].ref_logp - seen[-1][0].logp).abs().max() > 1e-2


def test_clipping_acts_from_the_second_update_on():
    one, two = ([row["clipped"] for row in run(config=replace(small, updates=u, lr=3e-2)).rows] for u in (1, 2))
    assert one == [0, 0, 0] and max(two) > 0


@pytest.mark.parametrize("questions, updates", [(6, 1), (6, 2), (7, 2), (7, 3)])
def test_every_question_is_in_one_update(questions, updates):
    spied, seen, losses = spying(grpo())
    run(spied, replace(small, questions=questions, updates=updates, steps=2))
    assert len(losses) == 2 * updates
    for (r, step), parts in zip(seen, (losses[:updates], losses[updates:])):
        assert torch.cat([old for _, old, _, _ in parts]).equal(r.old_logp.flatten(0, 1))
        assert torch.cat([A for _, _, A, _ in parts]).equal(grpo().advantage(r, step).flatten())
        # the first update starts at the policy that sampled
        torch.testing.assert_close(parts[0][0], parts[0][1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("temperature", [1., .7])
def test_the_ratio_is_that_of_the_distribution_drawn_from(temperature):
    spied, seen, losses = spying(grpo())
    run(spied, replace(small, temperature=temperature, updates=1))
    for logp, old, _, mask in losses: torch.testing.assert_close(logp * mask, old, rtol=0, atol=1e-4)
    assert all(r.temperature == temperature for r, _ in seen)


@either
@pytest.mark.parametrize("lora", [0, 2])
def test_a_seed_gives_the_same_numbers_twice(recipe, lora):
    config = replace(small, lora_rank=lora)
    a, b, c = (run(recipe, x) for x in (config, config, replace(config, seed=1)))
    assert without_time(a.rows) == without_time(b.rows) != without_time(c.rows)
    assert all(p.equal(q) for p, q in zip(a.model.parameters(), b.model.parameters()))


def test_questions_and_seeds_do_not_depend_on_the_method():
    recorders = []
    for recipe in (grpo(), capo(.5, 1.5, 20., grpo_size), capo(.5, 1, math.inf)):
        policy = model()
        recorders.append(Recorder(policy))
        run(recipe, policy=policy, sampler=recorders[-1])
    policy = model()
    other = Recorder(policy)
    run(policy=policy, sampler=other, config=replace(small, seed=1))
    assert not {seed for *_, seed, _ in other.calls} & {seed for *_, seed, _ in recorders[0].calls}
    asked = [[call[:3] for call in r.calls] for r in recorders]
    assert asked[0] == asked[1] == asked[2] and len({seed for *_, seed in asked[0]}) == 3
    first, last = [r.calls[0][3] for r in recorders], [r.calls[-1][3] for r in recorders]
    assert first[0].text == first[1].text == first[2].text and first[0].logp.equal(first[1].logp)
    assert last[0].text != last[1].text


@pytest.mark.parametrize("questions", [3, 40, 41, 100])
def test_batches_go_through_all_problems_before_they_repeat(questions):
    config = TrainConfig(steps=9, questions=questions, updates=1, seed=3)
    found = list(batches(problems, config))
    assert [len(b) for b in found] == [questions] * 9
    flat = sum(found, [])
    for i in range(0, len(flat) - 39, 40): assert sorted(p.prompt for p in flat[i:i + 40]) == sorted(p.prompt
        for p in problems)
    assert flat[:40] != problems and found == list(batches(problems, config)) != list(batches(problems,
        replace(config, seed=4)))


def test_evaluations_and_rows_come_in_order():
    config, rows, at = replace(small, steps=5, eval_every=2), [], []

    def evaluate(policy, step):
        at.append((step, len(rows), weights(policy)["model.embed_tokens.weight"]))
        return {"answer": 10 * step}

    result = run(config=config, evaluate=evaluate, log=rows.append)
    assert result.evals == [{"step": s, "answer": 10 * s} for s in (0, 2, 4, 5)]
    assert [(s, n) for s, n, _ in at] == [(0, 0), (2, 2), (4, 4), (5, 5)]
    assert at[0][2].equal(weights(model())["model.embed_tokens.weight"]) and not at[0][2].equal(at[1][2])
    assert rows == result.rows and [row["step"] for row in rows] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("recipe", [Recipe("none", lambda r, step: r.reward * 0), capo(.5, 1e6, 1)],
                         ids=["no advantage", "all masked"])
def test_without_an_advantage_no_weight_moves(recipe):
    result = run(recipe)
    assert all(v.equal(w) for v, w in zip(weights(result.model).values(), weights(model()).values()))
    assert {(row["loss"], row["grad_norm"], row["clipped"]) for row in result.rows} == {(0, 0, 0)}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_and_saves_the_step(bad, tmp_path):
    steps, policy, kept = [], model(), {}

    def loss(logp, old, A, mask):
        steps.append(len(steps) + 1)
        if steps[-1] < 3: return grpo().loss(logp, old, A, mask)
        kept.update(weights(policy))
        return logp.sum() * bad

    spied, seen, _ = spying(grpo(), loss)
    rows = []
    with pytest.raises(NonFiniteLoss, match=r"the loss of step 3 is -?(nan|inf)"):
        with saving_bad_step(tmp_path / "new"): run(spied, replace(small, steps=5, updates=1), policy, log=rows.append)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["bad_step_3.pt"]
    saved, r = torch.load(tmp_path / "new" / "bad_step_3.pt"), seen[-1][0]
    assert saved["response_ids"].equal(r.response_ids) and saved["logp"].equal(r.logp)
    assert saved["reward"].equal(r.reward) and saved["text"] == r.text
    assert saved["advantage"].equal(grpo().advantage(r, 3).flatten())
    assert len(rows) == 2 and all(v.equal(kept[k]) and v.isfinite().all() for k, v in policy.named_parameters())
    assert any(not v.equal(w) for v, w in zip(weights(policy).values(), weights(model()).values()))


def test_step_stats_by_counting():
    policy = model()
    r = Recorder(policy)(["1+1=", "2+2=", "3+3="], 5, 0)
    mask = r.mask.clone()
    mask[1, 1] = 0
    reward = torch.tensor([[1., 0, 1, 0, 0], [1, 0, 1, 1, 1], [0] * 5])
    r = replace(r, reward=reward, mask=mask, logp=r.logp * mask, ref_logp=r.logp * mask)
    low = high = r.ref_ppl[r.valid].median().item()
    found, lpm, valid = step_stats(r, grpo(ref_low=low, ref_high=high)), r.lpm, r.valid
    right, wrong = (reward == 1) & valid, (reward == 0) & valid
    dropped = torch.where(right, r.ref_ppl > high, r.ref_ppl < low)
    want = {"reward": 6 / 14, "mixed": 1 / 3, "lpm_right": lpm[right].mean(), "lpm_wrong": lpm[wrong].mean(),
            "entropy": -r.logp.sum() / mask.sum(),
            "masked": dropped[valid].float().mean(), "masked_right": dropped[right].float().mean(),
            "masked_wrong": dropped[wrong].float().mean()}
    assert {k: found[k]
            for k in want} == pytest.approx({k: float(v) for k, v in want.items()}) and 0 < found["masked"] < 1
    assert found["auc_mean"] == pytest.approx(sum(float(lpm[0, i] > lpm[0, j]) for i in (0, 2) for j in (1, 3, 4)) / 6)
    assert step_stats(r, grpo())["masked"] == 0


def test_the_log_is_a_csv_file_that_grows(tmp_path):
    log = CSVLog(tmp_path / "log.csv")
    assert not log.path.exists()
    rows = run(log=log).rows
    with log.path.open(newline="") as f: read = list(csv.DictReader(f))
    # six digits
    assert [{k: float(v) for k, v in row.items()} for row in read] == [pytest.approx(row, rel=1e-5, nan_ok=True)
        for row in rows]


def test_the_caller_keeps_a_model_of_its_own():
    policy = model()
    before = weights(policy)
    run(policy=copy.deepcopy(policy))
    assert all(v.equal(before[k]) for k, v in policy.named_parameters())
    result = run(policy=policy)
    assert result.model is policy and any(not v.equal(before[k]) for k, v in policy.named_parameters())
