"Runs that are cut short, broken or odd: each ends in one sentence or in the right numbers."
import math
from dataclasses import replace

import pytest
import torch
from torch import tensor

from capo import compare as comparison
from capo.grpo import clipped_loss
from capo.mask import noise_mask
from capo.recipe import grpo
from capo.rollout import HFSampler
from capo.task import arithmetic, arithmetic_tokenizer, tiny_lm
from capo.folder import CSVLog
from capo.train import NonFiniteLoss, TrainConfig
from helpers import lib, model, refuses, run, small, spying, weights

tokenizer = arithmetic_tokenizer()


@pytest.mark.parametrize("questions, updates", [(5, 4), (10, 6)])
def test_a_batch_gets_as_many_updates_as_configured(questions, updates):
    spied, _, losses = spying(grpo())
    run(spied, replace(small, questions=questions, updates=updates, steps=1))
    assert len(losses) == updates


def test_the_ratio_is_that_of_the_samplers_own_temperature():
    spied, _, losses = spying(grpo())
    policy = model()
    run(spied, replace(small, updates=1, steps=1), policy, sampler=HFSampler(policy, tokenizer, 16, temperature=.5))
    logp, old, _, mask = losses[0]
    torch.testing.assert_close(logp * mask, old, rtol=0, atol=1e-4)


def test_a_gradient_that_is_not_finite_stops_the_run():
    "sqrt at 0: a finite loss, an infinite slope."
    policy, recipe = model(), replace(grpo(), loss=lambda logp, old, A, mask: (logp - logp.detach()).abs().sum().sqrt())
    before = weights(policy)
    with pytest.raises(NonFiniteLoss): run(recipe, policy=policy)
    assert all(v.equal(before[k]) for k, v in policy.named_parameters())


def test_a_stop_in_the_second_update_says_so():
    calls = []

    def loss(*args):
        calls.append(1)
        return grpo().loss(*args) * (math.nan if len(calls) == 2 else 1)

    policy = model()
    before = weights(policy)
    with pytest.raises(NonFiniteLoss) as e: run(replace(grpo(), loss=loss), policy=policy)
    assert "as before the step" not in str(e.value) or all(v.equal(before[k]) for k, v in policy.named_parameters())


def test_no_question_of_a_long_evaluation_is_trained_on(tmp_path):
    seen = []

    def spy(model, tokenizer, problems, *args, **options):
        seen.extend(problems)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "train", spy)
        tiny_lm(16, 1, 2).save_pretrained(tmp_path / "base")
        job = comparison.Job("grpo", grpo, str(tmp_path / "base"), str(tmp_path / "run"),
                             TrainConfig(steps=100, questions=64), 1000, 1)
        with pytest.raises(KeyboardInterrupt): comparison.run_job(job)
    assert not {p.prompt for p in seen} & {p.prompt for p in comparison.held_out_questions(1000)}


@pytest.mark.timeout(60)
def test_a_search_for_problems_that_do_not_exist_ends():
    two = {p.prompt for p in arithmetic(162, distinct=True, terms=(2,))}          # 9 · 2 · 9: all that there are
    assert len(two) == 162
    refuses(lambda: lib.task.arithmetic(163, distinct=True, terms=(2,)), "there are only 162 chains")
    refuses(lambda: lib.task.arithmetic(1, exclude=two, terms=(2,)), "there are only 162 chains")
    assert len(arithmetic(3, exclude=two, terms=(2, 3))) == 3
    # the same again and again, where it may
    assert len(arithmetic(500, exclude=two - {"1+1="}, terms=(2,))) == 500


def test_a_threshold_of_1_drops_no_wrong_response():
    assert noise_mask(tensor([[1 - 1e-6]]), tensor([[0]]), 1., 2.8).all()       # rounded below 1


@pytest.mark.parametrize("call", [lambda x, c: lib.grpo.grpo_advantage(x),
                                  lambda x, c: lib.mask.noise_mask(1 - x, c), lambda x,
                                  c: lib.evaluate.most_confident(x, c)],
                         ids=["grpo_advantage", "noise_mask", "most_confident"])
def test_one_axis_where_two_are_meant(call): refuses(lambda: call(tensor([-1., -2.]), tensor([1, 0])), "(B, G)")


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_log_probs_that_are_not_finite_do_not_give_a_finite_loss(bad):
    "The clamp of the ratio must not hide a broken number; outside of the mask anything may stand."
    logp = tensor([[-1., bad]])
    loss = lambda mask: clipped_loss(logp, torch.zeros(1, 2), torch.ones(1), tensor([mask]))
    assert loss([1, 1]).isnan() and loss([1, 0]).isfinite()


def test_a_clip_range_of_three_numbers(): refuses(lambda: lib.grpo.clip_range((.1, .2, .3)), "eps must be")


@pytest.mark.parametrize("prompts", [["", "1+1="], [""]])
def test_a_prompt_without_tokens_is_refused(prompts):
    refuses(lambda: lib.rollout.HFSampler(tiny_lm(16, 1, 2), tokenizer, 4)(prompts, 2), "prompt")


def test_an_error_while_sampling_puts_the_mode_back():
    policy = model().train()
    with torch.no_grad(): policy.lm_head.weight.fill_(math.nan)
    with pytest.raises(Exception): HFSampler(policy, tokenizer, 4)(["1+1="], 2)
    assert policy.training


def test_a_model_that_gives_nan_is_named():
    policy = model()
    with torch.no_grad(): policy.lm_head.weight.fill_(math.nan)
    refuses(lambda: lib.rollout.HFSampler(policy, tokenizer, 4)(["1+1="], 2), "NaN", (ValueError, RuntimeError))


@pytest.mark.parametrize("options",
                         [dict(weight_decay=-1.), dict(lr=math.inf), dict(temperature=math.inf), dict(steps=1.5),
                          dict(seed=1.5)], ids=str)
def test_other_values_that_a_run_cannot_have(options): refuses(lambda: lib.train.TrainConfig(**options),
                                                               next(iter(options)))


def test_no_resamples(): refuses(lambda: lib.evaluate.bootstrap(torch.mean, torch.ones(3), n=0), "n must be")


def test_a_chain_of_one_term_is_refused(): refuses(lambda: lib.task.arithmetic(1, terms=(1,)), "terms")


@pytest.mark.parametrize("options",
                         [dict(workers=-1), dict(questions=0), dict(samples=0),
                          dict(makers={"capo": lambda: lib.recipe.capo(tau=0)})], ids=" ".join)
def test_a_comparison_that_cannot_run_writes_nothing(options, tmp_path, monkeypatch):
    class NoPool:
        def __init__(self, workers, context):
            if workers < 1: raise ValueError("workers")
            raise KeyboardInterrupt

    monkeypatch.setattr(lib.compare, "ProcessPoolExecutor", NoPool)
    with pytest.raises((ValueError, KeyboardInterrupt)): lib.compare.compare(tmp_path / "new",
        **dict(makers=lib.compare.arms()) | options)
    assert not list(tmp_path.iterdir())


def test_a_log_without_a_folder_is_refused_before_the_run(tmp_path):
    with pytest.raises(OSError): CSVLog(tmp_path / "absent" / "log.csv")
