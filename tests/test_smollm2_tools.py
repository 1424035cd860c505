"The scripts that made the recorded runs of SmolLM2: questions, worked answers, and the frugal log-probabilities."
from dataclasses import replace

import pytest
import torch
from smollm2_runs import Frugal, recipe
from smollm2_tasks import CANDIDATES, TASKS, WAYS, questions, short, total

from capo.grpo import clipped_loss
from capo.recipe import grpo
from capo.rollout import HFSampler, rollout, rollout_logps
from capo.task import arithmetic, arithmetic_tokenizer, tiny_lm


def test_candidates_exist(): assert all(task in TASKS and way in WAYS for task, way in CANDIDATES)


def test_worked_answer():
    assert total("State the final answer to the following arithmetic problem: 4 + 5 - 13 =",
                 "-4") == "4 + 5 = 9, 9 - 13 = -4"
    assert short("Calculate 10 * 8.") == "10 * 8"


def test_questions_are_distinct_and_exclude():
    pytest.importorskip("reasoning_gym")
    first = questions("sums, 2 terms of 1 digit", 20, 2)
    again = questions("sums, 2 terms of 1 digit", 20, 1, exclude=dict(first))
    assert len(dict(first)) == len(dict(again)) == 20 and not dict(first).keys() & dict(again).keys()
    assert all(eval(short(q)) == int(a) for q, a in first + again)


def test_recipes_by_name():
    s = {"tau": .7, "ref_low": 1.04, "ref_high": 1.5}
    assert [recipe(a, s).name for a in ("grpo", "capo", "grpo-mask", "capo-nomask")] == ["grpo", "capo", "grpo", "capo"]
    assert [recipe(a, s).keep is None for a in ("grpo", "capo", "grpo-mask", "capo-nomask")] == [True, False, False,
        True]


@pytest.mark.parametrize("seed", range(3))
def test_frugal_gives_the_same_update(seed):
    model, tokenizer = tiny_lm(hidden=16, seed=seed).eval(), arithmetic_tokenizer()
    # prompts that begin alike
    problems = [replace(p, prompt="9-8+" + p.prompt) for p in arithmetic(12, seed, terms=(2, 3))]
    # a verdict that mixes the groups
    r = rollout(HFSampler(model, tokenizer, 8), problems, 4, lambda text, answer: len(text) % 2 == 0, seed=seed)
    for p in model.parameters(): torch.nn.init.normal_(p, std=.3)                         # the policy has moved on
    f = Frugal(grpo())
    A = f.recipe().advantage(r, 1).flatten()
    assert 0 < len(f.teaching) < len(A) and (A[f.teaching] != 0).all()
    updates = []
    for logps in (rollout_logps, f):
        model.zero_grad()
        logp = logps(model, r).flatten(0, 1)
        clipped_loss(logp, r.old_logp.flatten(0, 1), A, r.mask.flatten(0, 1)).backward()
        updates.append((logp.detach()[f.teaching], torch.cat([p.grad.flatten() for p in model.parameters()])))
    for a, b in zip(*updates): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with torch.no_grad(): torch.testing.assert_close(f(model, r), rollout_logps(model, r), rtol=1e-4, atol=1e-5)
