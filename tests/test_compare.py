"The comparison: what it writes, that it repeats, and its statistics on curves made by hand."
import csv
import gzip
import json
import math
import pickle
import shutil
from functools import partial
from importlib import resources

import pytest
import torch
from hypothesis import given, strategies as st

from capo import compare as lib
from capo.baselines import METHODS
from capo.calibration import auc_mean, group_auc, pair_auc, pooled_auc
from capo.compare import (
    Job, arms, at_accuracy, compare, described, draw_comparison, equal_accuracy, evaluator, final_numbers,
    held_out_questions, make_base, mixed_in_all, over_seeds, run_job, summarise, training_questions)
from capo.evaluate import accuracy, most_confident
from capo.recipe import capo, grpo, grpo_size
from capo.rollout import HFSampler, rollout
from capo.task import base_model, calibrated_teacher, tiny_lm, verify
from capo.folder import new_folder
from capo.train import TrainConfig
from helpers import FAKES, InProcess, rollouts

QUICK = TrainConfig(steps=4, questions=8, group_size=4, eval_every=2)
BASE = str(resources.files("capo") / "base")


def quick(folder, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lib, "ProcessPoolExecutor", InProcess)
        patch.setattr(lib, "summarise", partial(summarise, resamples=10))
        return compare(folder, **dict(makers={k: arms()[k] for k in ("grpo", "capo")}, seeds=(0, 3), config=QUICK,
                                      questions=12, samples=4) | options)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "one"
    return folder, quick(folder, note={"command": "a word"})


def rows(path):
    with path.open(newline="") as f: return list(csv.DictReader(f))


def responses(path): return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]


RUNS = ["grpo-0", "capo-0", "grpo-3", "capo-3"]


def test_the_files_of_a_comparison(done):
    folder, summary = done
    of_all = ["config.json", "summary.json", "comparison.png", "base-0.jsonl.gz", "base-3.jsonl.gz"]
    of_each = [f"{r}/{f}" for r in RUNS for f in ("log.csv", "evals.csv", "responses.jsonl.gz", "result.json")]
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) == sorted(of_all + of_each)
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(summary))
    about = json.loads((folder / "config.json").read_text())
    assert about["run"]["train"]["steps"] == 4 and about["run"]["seeds"] == [0, 3]
    assert about["made_with"]["command"] == "a word" and list(about["run"]["arms"]) == ["grpo", "capo"]
    assert (folder / "comparison.png").read_bytes()[:4] == b"\x89PNG"


def test_the_logs_have_a_row_a_step_and_an_evaluation(done):
    folder, summary = done
    for r in RUNS:
        arm, seed = r.split("-")
        assert [row["step"] for row in rows(folder / r / "log.csv")] == ["1", "2", "3", "4"]
        evals = [{k: float(v) for k, v in row.items()} for row in rows(folder / r / "evals.csv")]
        assert [row["step"] for row in evals] == [0, 2, 4]
        of = [e for e in summary["evals"] if e["arm"] == arm and e["seed"] == int(seed)]
        mine = [{k: v for k, v in e.items() if k not in ("arm", "seed")} for e in of]
        assert evals == [pytest.approx(e, rel=1e-5, nan_ok=True) for e in mine]


def test_the_arms_start_from_the_same_model_questions_and_draws(done):
    folder, _ = done
    for seed in (0, 3):
        a, b = (folder / f"{arm}-{seed}" for arm in ("grpo", "capo"))
        assert rows(a / "evals.csv")[0] == rows(b / "evals.csv")[0]
        assert rows(a / "evals.csv")[2] != rows(b / "evals.csv")[2]
        same = ("reward", "auc_mean", "entropy", "length", "lpm_right")
        first, other = rows(a / "log.csv")[0], rows(b / "log.csv")[0]
        assert [first[k] for k in same] == [other[k] for k in same]
    assert rows(folder / "grpo-0" / "log.csv")[0]["entropy"] != rows(folder / "grpo-3" / "log.csv")[0]["entropy"]


def test_the_responses_are_those_that_the_last_evaluation_scored(done):
    folder, summary = done
    questions = held_out_questions(12)
    for arm in ("grpo", "capo"):
        both = [responses(folder / f"{arm}-{seed}" / "responses.jsonl.gz") for seed in (0, 3)]
        for found in both:
            asked = [(q, p.prompt, p.answer) for q, p in enumerate(questions) for _ in range(4)]
            assert [(x["id"], x["prompt"], x["reference"]) for x in found] == asked
            # none of these is truncated
            assert all(x["correct"] == verify(x["response"], x["reference"]) for x in found)
        base = responses(folder / "base-0.jsonl.gz")
        assert sum(x["correct"] for x in base) / 48 == pytest.approx(summary["final"]["base"]["accuracy"]["by_seed"][0])
        assert base != both[0]
        final, right = summary["final"][arm], [sum(x["correct"] for x in found) / 48 for found in both]
        assert final["accuracy"]["by_seed"] == pytest.approx(right)
        assert final["accuracy"]["mean"] == pytest.approx(sum(right) / 2)
        score, correct = (torch.tensor([x[k] for x in both[0]]).view(12, 4) for k in ("lpm", "correct"))
        assert final["auc_mean"]["by_seed"][0] == pytest.approx(auc_mean(score, correct)[0], nan_ok=True)
    assert [x["response"] for x in both[0]] != [x["response"] for x in both[1]]


def test_a_seed_gives_the_same_files_twice(done, tmp_path):
    folder, summary = done
    again = quick(tmp_path / "two", seeds=(3,))
    for r in ("grpo-3", "capo-3"):
        a, b = folder / r, tmp_path / "two" / r
        assert (a / "evals.csv").read_text() == (b / "evals.csv").read_text()
        assert (a / "responses.jsonl.gz").read_bytes() == (b / "responses.jsonl.gz").read_bytes()
        assert (folder / "base-3.jsonl.gz").read_bytes() == (tmp_path / "two" / "base-3.jsonl.gz").read_bytes()
        untimed = lambda path: [{k: v for k, v in row.items() if k != "seconds"} for row in rows(path / "log.csv")]
        assert untimed(a) == untimed(b)
    assert again["final"]["capo"]["accuracy"]["by_seed"][0] == summary["final"]["capo"]["accuracy"]["by_seed"][1]


def test_lora_and_a_base_of_its_own_for_each_seed(tmp_path, monkeypatch):
    made = []

    def make(seed, folder):
        made.append((seed, folder))
        tiny_lm(16, 1, 2, seed).save_pretrained(folder)
        return folder

    monkeypatch.setattr(lib, "make_base", make)
    summary = quick(tmp_path / "new", makers={"capo": arms()["capo"]}, fresh_base=True,
                    config=TrainConfig(steps=1, questions=4, group_size=4, lora_rank=2))
    assert made == [(s, str(tmp_path / "new" / f"base-{s}")) for s in (0, 3)]
    first = [next(e for e in summary["evals"] if e["seed"] == s) for s in (0, 3)]
    # random models, not the shipped one
    assert first[0]["lpm"] != first[1]["lpm"] and all(e["accuracy"] < .1 for e in first)


def test_rescored_auc_ranks_the_base_models_responses_by_the_policy():
    model, tokenizer = base_model()
    base = rollout(HFSampler(model, tokenizer, 16), held_out_questions(30), 8, verify, seed=5)
    kept = {}
    numbers = evaluator(tokenizer, held_out_questions(30), base, 4, keep=kept.__setitem__)
    mean = auc_mean(base.lpm, base.reward)[0]
    assert numbers(model, 7)["rescored_auc"] == pytest.approx(mean) and mean < 1 and kept[7].reward.shape == (30, 4)
    other = tiny_lm(16, 1, 2)
    assert numbers(other, 8)["rescored_auc"] != pytest.approx(mean)
    assert numbers(model, 9)["accuracy"] == numbers(model, 10)["accuracy"] and kept[9].text == kept[10].text


def test_held_out_questions_are_distinct_and_never_trained_on():
    held = [p.prompt for p in held_out_questions()]
    assert len(set(held)) == 256 and [p.prompt for p in held_out_questions(40)] == held[:40]
    for seed in (0, 1): assert not {p.prompt for p in training_questions(2000, seed, held_out_questions())} & set(held)
    few = held_out_questions(5)
    assert training_questions(50, 0, few) == training_questions(50, 0, few) != training_questions(50, 1, few)


def test_the_arms_and_their_settings():
    g = torch.Generator().manual_seed(0)
    r = rollouts(-torch.rand(6, 8, generator=g), torch.rand(6, 8, generator=g) < .5,
                 ref_ppl=1 + 3 * torch.rand(6, 8, generator=g))
    want = {"grpo": grpo(), "capo": capo(.7, 1.5, 2., grpo_size), "grpo-mask": grpo(True, 1.5, 2.),
            "capo-nomask": capo(.7, 1, math.inf, grpo_size)}
    # as it goes to a worker
    made = pickle.loads(pickle.dumps(arms(.7, 1.5, 2.)))
    assert list(made)[:4] == list(want) and set(METHODS) < set(made)
    for k in want:
        mine = made[k]()
        assert mine.advantage(r, 0).equal(want[k].advantage(r, 0)) and (mine.keep is None) == (want[k].keep is None)
    assert pickle.loads(pickle.dumps(Job("grpo", grpo, BASE, "x", QUICK))) == Job("grpo", grpo, BASE, "x", QUICK)


def test_a_job_that_is_done_is_read_and_one_that_was_interrupted_is_made_again(tmp_path, monkeypatch):
    job = Job("grpo", grpo, BASE, str(tmp_path / "grpo-0"), QUICK, 4, 2)
    first = run_job(job)
    with monkeypatch.context() as patch:
        patch.setattr(lib, "train_job", None)              # nothing is computed
        assert json.dumps(run_job(job)) == json.dumps(first)
    (tmp_path / "grpo-0" / "result.json").unlink()
    (tmp_path / "grpo-0" / "log.csv").write_text("half a li")
    again = run_job(job)
    assert again.pop("seconds") > 0 and first.pop("seconds") > 0 and json.dumps(again) == json.dumps(first)
    assert [row["step"] for row in rows(tmp_path / "grpo-0" / "log.csv")] == ["1", "2", "3", "4"]


def test_a_comparison_goes_on_where_it_was_stopped_and_refuses_other_settings(done, tmp_path, monkeypatch):
    folder, summary = done
    made, train_job = [], lib.train_job
    monkeypatch.setattr(lib, "train_job", lambda job: made.append(f"{job.arm}-{job.config.seed}") or train_job(job))
    shutil.copytree(folder, tmp_path / "one")
    for name in ("capo-0/result.json", "summary.json"): (tmp_path / "one" / name).unlink()
    shutil.rmtree(tmp_path / "one" / "grpo-3")
    again = quick(tmp_path / "one")
    assert made == ["capo-0", "grpo-3"] and again["evals"] == summary["evals"]
    for other in (dict(seeds=(0,)), dict(samples=2), dict(makers={"grpo": grpo})):
        with pytest.raises(ValueError, match="holds another run, its"): quick(tmp_path / "one", **other)


def test_an_arm_is_described_by_its_function_and_its_arguments():
    assert described(partial(grpo, True, ref_low=1.5)) == ["grpo", "True", "ref_low=1.5"]
    assert described(grpo) == ["grpo"]


def test_a_base_model_is_made_by_its_seed(tmp_path):
    from transformers import AutoModelForCausalLM
    made = [make_base(seed, str(tmp_path / name), 2) for seed, name in ((1, "a"), (1, "b"), (2, "c"))]
    a, b, c = map(AutoModelForCausalLM.from_pretrained, made)
    equal = lambda x, y: all(p.equal(q) for p, q in zip(x.parameters(), y.parameters()))
    assert equal(a, b) and not equal(a, c) and not equal(a, tiny_lm(seed=1))


def test_a_base_model_has_a_teacher_and_pages_of_its_own(tmp_path, monkeypatch):
    seen = []

    def pretrain(model, tokenizer, teacher, steps, seed):
        seen.append((teacher, steps, seed))
        return [2.7] * steps

    monkeypatch.setattr(lib, "pretrain", pretrain)
    make_base(4, str(tmp_path / "base"), 3)
    assert seen == [(calibrated_teacher(4), 3, 4)]


def test_a_new_folder_is_new_or_empty(tmp_path):
    made = new_folder(tmp_path / "a" / "b")
    assert made.is_dir() and new_folder(str(made)) == made
    (made / "log.csv").write_text("1")
    for taken in (made, made / "log.csv"):
        with pytest.raises(FileExistsError, match="holds another run; name a new folder"): new_folder(taken)
    assert (made / "log.csv").read_text() == "1"


# Statistics

CURVE = [dict(zip(("step", "accuracy", "auc_mean"), row))
         for row in ((0, .1, .8), (50, .3, .7), (100, .2, .9), (150, .5, .6))]


@pytest.mark.parametrize("target, step, auc", [(.05, 0, .8), (.1, 0, .8), (.2, 25, .75), (.3, 50, .7),
                                               (.4, 100 + 100 / 3, .7), (.5, 150, .6)])
def test_the_row_where_an_accuracy_is_first_reached(target, step, auc):
    row = at_accuracy(CURVE, target)
    assert row["step"] == pytest.approx(step) and row["auc_mean"] == pytest.approx(auc)
    assert row["accuracy"] == pytest.approx(max(target, .1))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.floats(0, 1))
def test_any_accuracy_up_to_the_best_is_met(values, target):
    evals = [{"step": i, "accuracy": a} for i, a in enumerate(values)]
    if target > max(values):
        with pytest.raises(ValueError, match="accuracy never reaches"): at_accuracy(evals, target)
        return
    row = at_accuracy(evals, target)
    assert row["accuracy"] == pytest.approx(max(target, values[0]))
    assert all(a < target for i, a in enumerate(values) if i < row["step"])


def test_equal_accuracy_is_the_highest_that_both_reach_seed_by_seed():
    def of(arm, seed, *accuracy):
        row = {"arm": arm, "seed": seed}
        return [row | {"step": 50 * i, "accuracy": a, "auc_mean": 1 - a} for i, a in enumerate(accuracy)]
    evals = of("a", 0, .1, .5) + of("a", 4, .1, .3) + of("b", 0, .1, .3, .2) + of("b", 4, .2, .4, .8) + of("c", 0, .9)
    one, two = equal_accuracy(evals, "a", "b")
    assert (one["seed"], two["seed"]) == (0, 4) and one["accuracy"] == two["accuracy"] == .3
    assert one["a"] == pytest.approx({"step": 25, "accuracy": .3, "auc_mean": .7})
    assert one["b"] == pytest.approx({"step": 50, "accuracy": .3, "auc_mean": .7})
    assert two["a"]["step"] == pytest.approx(50) and two["b"]["step"] == pytest.approx(25)


def test_every_arm_is_scored_on_the_questions_that_are_mixed_in_all():
    score = torch.tensor([[-1., -2.], [-2., -1.], [-1., -2.]])
    a, b = (score, torch.tensor([[1, 0], [1, 0], [1, 1]])), (score, torch.tensor([[0, 0], [0, 1], [1, 0]]))
    assert mixed_in_all([a, b]) == ([0., 1.], 1)
    assert mixed_in_all([a]) == ([.5], 2)
    none, n = mixed_in_all([a, b, (score, score * 0)])
    assert n == 0 and all(math.isnan(x) for x in none)


def test_a_statistic_over_seeds_is_the_mean_of_each_seeds_own():
    g = torch.Generator().manual_seed(0)
    s, c = torch.randn(5, 3, 8, generator=g), torch.rand(5, 3, 8, generator=g) < .5
    f = over_seeds(lambda s, c: pooled_auc(s, c))
    assert f(s, c) == pytest.approx(sum(pooled_auc(s[:, i], c[:, i]) for i in range(3)) / 3)


def test_the_summary_by_hand():
    summary = summarise(FAKES, resamples=40)
    assert summary["seeds"] == [2, 5] and list(summary["final"]) == ["base", "grpo", "capo-x"]
    assert len(summary["evals"]) == 8
    functions = {"accuracy": lambda s, c: accuracy(c).mean(), "auc_mean": lambda s, c: auc_mean(s, c)[0],
                 "pooled_auc": pooled_auc, "pair_auc": pair_auc,
                 "most_confident": lambda s, c: most_confident(s, c).mean()}
    for arm, when in (("base", "first"), ("grpo", "last"), ("capo-x", "last")):
        mine = [x for x in FAKES if x["arm"] == ("grpo" if arm == "base" else arm)]
        data, final = [tuple(torch.tensor(d) for d in x[when]) for x in mine], summary["final"][arm]
        for k, f in functions.items():
            values = [float(f(*d)) for d in data]
            assert final[k]["by_seed"] == pytest.approx(values) and final[k]["mean"] == pytest.approx(sum(values) / 2)
            assert final[k]["interval"][0] < final[k]["mean"] < final[k]["interval"][1]
        row = [x["evals"][0 if arm == "base" else 1] for x in mine]
        assert final["entropy"] == {"mean": pytest.approx(row[0]["entropy"] / 2 + row[1]["entropy"] / 2),
                                    "by_seed": [r["entropy"] for r in row]}
        assert final["mixed_questions"]["by_seed"] == [r["mixed_questions"] for r in row]
        if arm != "base": assert final["seconds"]["mean"] == 4.5 and final["masked"]["mean"] == .25
    for i, seed in enumerate((2, 5)):
        aucs = [group_auc(*(torch.tensor(d) for d in x["last"])) for x in FAKES if x["seed"] == seed]
        both = ~aucs[0].isnan() & ~aucs[1].isnan()
        for arm, a in zip(("grpo", "capo-x"), aucs):
            shared = summary["final"][arm]["auc_mean_shared"]
            assert shared["by_seed"][i] == pytest.approx(a[both].mean().item()) and shared["questions"][i] == both.sum()
    json.dumps(summary)


def test_the_table_has_a_line_a_number_and_a_column_an_arm():
    summary = summarise(FAKES, resamples=20)
    head, *lines = final_numbers(summary).cells
    assert {len(line) for line in lines} == {4} and head == ["", "base", "grpo", "capo-x"]
    body = {line[0]: line[1:] for line in lines}
    for label, key in (("accuracy", "accuracy"), ("AUC-mean (headline)", "auc_mean"), ("AUC, pooled", "pooled_auc")):
        for cell, arm in zip(body[label], ("base", "grpo", "capo-x")):
            x = summary["final"][arm][key]
            assert cell == f"{x['mean']:.3f} [{x['interval'][0]:.3f}, {x['interval'][1]:.3f}]"
    assert body["share masked"] == ["–", "0.250", "0.250"]


def test_the_figure_draws_means_and_bands_over_seeds():
    summary = summarise(FAKES, resamples=20)
    axes = draw_comparison(summary).axes
    assert len(axes) == 3
    value = lambda arm, key, i: [x["evals"][i][key] for x in FAKES if x["arm"] == arm]
    for line, band, arm in zip(axes[0].lines, axes[0].collections, ("grpo", "capo-x")):
        assert line.get_label() == {"grpo": "GRPO"}.get(arm, arm) and list(line.get_xdata()) == [0, 9]
        assert list(line.get_ydata()) == pytest.approx([sum(value(arm, "accuracy", i)) / 2 for i in (0, 1)])
        y = band.get_paths()[0].vertices[:, 1]
        ends = {round(f(value(arm, "accuracy", i)), 5) for i in (0, 1) for f in (min, max)}
        assert {round(float(v), 5) for v in y} == ends
    assert list(axes[2].lines[0].get_ydata()) == pytest.approx([sum(value("grpo", "auc_mean", i)) / 2 for i in (0, 1)])
    assert len(draw_comparison(summary, ["grpo"]).axes[0].lines) == 1
