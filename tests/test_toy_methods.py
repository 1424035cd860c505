"The script that trains every method in the enumerated policy: what it draws, and that its record is its own."
import csv
import json

import pytest
import torch

import exact_toy as toy
import toy_methods
from capo.baselines import METHODS

CONFIG = toy_methods.CONFIG | dict(train=12, test=8, fit_steps=5, steps=4, group=6)


@pytest.fixture(scope="module")
def world(): return toy.start([3], CONFIG)


def drawn(world, seed=0):
    base, (x, gold), _ = world
    g = torch.Generator().manual_seed(seed)
    return toy_methods.draw(base, x[0], gold[0], torch.arange(12), 6, g), x[0], gold[0]


def test_what_is_drawn_has_the_policys_log_probabilities(world):
    r, x, gold = drawn(world)
    number = (r.response_ids * torch.tensor([16, 4, 1])).sum(-1)                      # of the 64 responses
    assert torch.allclose(r.logp.sum(-1), toy.seq_logp(world[0], x[None])[0].gather(1, number), atol=1e-5)
    assert r.reward.equal((toy.SEQ[number][..., 2] == gold[:, 2:3]).float()) and 0 < r.reward.mean() < 1
    mass = toy_methods.tokens(world[0], x, r.response_ids).exp().sum(-1)
    assert torch.allclose(mass, torch.ones(12, 6, 3), atol=1e-5)


@pytest.mark.parametrize("arm", toy_methods.ARMS)
def test_every_arm_takes_its_steps(world, arm):
    base, train, test = world
    steps = [(done, w) for done, w in toy_methods.climb(toy_methods.ARMS[arm], base, train, CONFIG, seed=1)]
    assert [done for done, _ in steps] == [0, 1, 2, 3, 4]
    moved = {k: (v.detach() - base[k]).abs().max() for k, v in steps[-1][1].items()}
    assert all(v.isfinite() for v in moved.values()) and max(moved.values()) > 1e-3


def test_the_first_step_follows_the_loss(world):
    "The gradient of GRPO's, on what was drawn, is that of the mean of A over the mean of log π a token."
    r, x, _ = drawn(world)
    w = {k: v.clone().requires_grad_() for k, v in world[0].items()}
    recipe = METHODS["grpo"]()
    A = recipe.advantage(r, 1)
    found = torch.autograd.grad(toy_methods.loss(recipe, w, x, r, A), list(w.values()))
    logp = toy_methods.own(toy_methods.tokens(w, x, r.response_ids), r.response_ids)
    want = torch.autograd.grad(-(A * logp.mean(-1)).mean(), list(w.values()))
    for a, b in zip(found, want): assert torch.allclose(a, b, atol=1e-6)


def test_the_record_is_the_scripts():
    info = json.loads((toy.DATA / "toy_methods.json").read_text())
    with (toy.DATA / "toy_methods.csv").open() as f: rows = list(csv.DictReader(f))
    assert info["config"] == json.loads(json.dumps(toy_methods.CONFIG))
    assert set(METHODS) <= set(info["settings"]) == set(toy_methods.ARMS)
    every = {(row["arm"], int(row["seed"]), int(row["step"])) for row in rows}
    assert every == {(a, s, t) for a in toy_methods.ARMS for s in info["seeds"] for t in range(0, 301, 10)}
    first = {(row["seed"], row["accuracy"], row["auc_mean"]) for row in rows if row["step"] == "0"}
    assert len(first) == len(info["seeds"])                                           # all arms begin at the base
