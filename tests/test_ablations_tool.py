"The script that makes the recorded runs of 41_ablations: its arms, its search, its tables."
import csv
import json
import math
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ablations as lib
from capo.compare import run_job
from capo.recipe import capo, grpo, grpo_size
from helpers import rollouts

ARMS = lib.ACROSS | lib.TAUS | lib.MASKS | lib.SIZES | lib.SURROGATES | {k: make for k, (make, _) in lib.GROUPS.items()}


@pytest.fixture
def r():
    g = torch.Generator().manual_seed(0)
    return rollouts(-2 * torch.rand(6, 8, generator=g), torch.rand(6, 8, generator=g) < .5,
                    ref_ppl=1 + 3 * torch.rand(6, 8, generator=g))


def advantage(make, r): return pickle.loads(pickle.dumps(make))().advantage(r, 1)


def test_a_search_is_nine_runs_for_each_method_and_their_sources_are_among_them(tmp_path):
    jobs = [job for job, _ in lib.searches(tmp_path)]
    assert len({job.folder for job in jobs}) == len(jobs) == 9 * len(lib.GRID)
    assert all(job.config.seed not in lib.SEEDS for job in jobs)
    defaults = {"dapo": (.2, .28), "gspo": (3e-4, 4e-4), "cispo": 5., "disco": 10., "real": .5, "c2gspg": .01,
                "unlikeliness": .25, "codapo": .1, "cde": 1., "simko": .01}
    assert all(value in lib.GRID[name][1] for name, value in defaults.items())


def test_every_arm_has_finite_advantages_and_goes_to_another_process(r):
    searched = [job.make for job, _ in lib.searches(Path("x"))]
    for make in [*ARMS.values(), *searched]: assert advantage(make, r).isfinite().all()


def test_arms_are_what_their_names_say(r):
    same = lambda name, recipe: advantage(ARMS[name], r).equal(recipe.advantage(r, 1))
    assert same("grpo-nomask-across-0", grpo()) and same("grpo-across-1", grpo(True, 1.05, 2.1, 1.))
    assert same("capo-nomask-across-0.5", capo(.5, 1, math.inf, grpo_size, .5))
    assert same("capo-tau-2", capo(2., 1.05, 2.1, grpo_size))
    plain = advantage(ARMS["capo-across-0"], r)
    assert torch.allclose(advantage(ARMS["capo-sum-over-tau"], r), advantage(ARMS["capo-sum"], r) / .5)
    right = (r.reward > 0).sum(1, keepdim=True)
    pairs = right * (8 - right)
    assert torch.allclose(advantage(ARMS["capo-mean"], r) * pairs, advantage(ARMS["capo-sum"], r), atol=1e-6)
    keep = lib.our().keep(r)
    ends = advantage(ARMS["capo-both-ends"], r)
    assert (ends[~keep] == 0).all() and (plain[~keep] == 0).all() and not ends.allclose(plain)
    assert torch.allclose(ends.sum(1), torch.zeros(6), atol=1e-5) and plain.sum(1).abs().max() > 1e-3
    for name, (low, high) in (("0.05-0.95", (.05, .95)), ("0.25-0.75", (.25, .75))):
        keep = ARMS[f"capo-quantile-{name}"]().keep(r)
        right = r.reward > 0
        assert abs((~keep & right).sum() / right.sum() - (1 - high)) < .06
        assert abs((~keep & ~right).sum() / (~right).sum() - low) < .06


def test_tables_are_made_from_what_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(lib, "DATA", tmp_path / "data")
    few = lambda job: replace(job, config=replace(job.config, steps=2, questions=4, group_size=4, eval_every=1),
                              questions=8, samples=4)
    searches = [(few(job), value) for job, value in lib.searches(tmp_path) if job.arm == "grpo"][:2]
    monkeypatch.setattr(lib, "searches", lambda folder: searches)
    for job, _ in searches: run_job(job)
    (tmp_path / "config.json").write_text(json.dumps({"made_with": {"command": "a word"}}))
    jobs = [few(job) for job in lib.runs(tmp_path, tmp_path)]
    assert [job.arm for job in jobs[:5]] == ["grpo"] * 5 and len({job.folder for job in jobs}) == len(jobs)
    base = replace(jobs[0], base=searches[0][0].base)
    run_job(base)
    lib.tables(tmp_path, jobs)
    read = lambda name: list(csv.DictReader((tmp_path / "data" / f"{name}.csv").open()))
    row, = read("final")
    result = json.loads(Path(base.folder, "result.json").read_text())
    last = result["evals"][-1]
    assert (row["set"], row["arm"], row["seed"]) == ("tuned", "grpo", "1") and len(read("search")) == 2
    for k in ("accuracy", "pooled_auc", "most_confident", "entropy"):
        assert float(row[k]) == pytest.approx(last[k], rel=1e-4, nan_ok=True)
    assert [e["step"] for e in read("evals")] == ["0", "1", "2"]
    about = json.loads((tmp_path / "data" / "config.json").read_text())
    assert about["command"] == "a word" and list(about["arms"]) == ["tuned/grpo"]
