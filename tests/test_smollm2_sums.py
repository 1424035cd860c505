"The runs of the pretrained model, on a small one: task, warm start, arms that are stopped and go on, records."
import argparse, csv, gzip, json, random
from dataclasses import replace

import pytest
import smollm2_sums as sums
import smollm2_train as runner
import torch

from capo.evaluate import padded
from capo.responses import read_responses
from capo.task import base_model, verify
from smollm2_sums import TASKS, Sums


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_worked_solutions_show_their_steps(task):
    pages, problems = task.pages(50, 0), task.problems(50, 1)
    bare = lambda prompt: prompt.removeprefix(sums.START)
    assert all(str(eval(bare(p.prompt)[:-1])) == p.answer for p in problems)
    assert len({p.prompt for p in problems}) == 50 and all(p.prompt.startswith(sums.START) for p in problems)
    for prompt, page in ((bare(prompt), page) for prompt, page in pages):
        steps = page.split(",")
        assert len(steps) == len(task.digits) - 1 and prompt.startswith(steps[0].split("=")[0])
        totals = [step.split("=")[1] for step in steps]
        assert all(step.startswith(total) for step, total in zip(steps[1:], totals))
    right = sum(verify(page, str(eval(bare(prompt)[:-1]))) for prompt, page in pages)
    assert (right == 50) == (task.slips == 0)
    assert not {prompt for prompt, _ in task.pages(200, 3)} & {p.prompt for p in task.problems(256, sums.HELD_OUT)}


def test_a_teacher_without_slips_is_right_and_one_with_carries_on():
    assert Sums((2, 2, 2), 0).worked("47+38-25=", random.Random(0)) == "47+38=85,85-25=60"
    first, second = Sums((2, 2, 2), 1).worked("47+38-25=", random.Random(0)).split(",")
    total = first.split("=")[1]
    assert total != "85" and second.startswith(f"{total}-25=") and int(second.split("=")[1]) != int(total) - 25


def test_a_question_is_not_held_out_if_there_are_too_few():
    with pytest.raises(ValueError, match="only 162"): Sums((1, 1), 0).problems(163, 0)


def test_the_spread_is_within_groups_and_among_those_that_ended():
    class R: pass
    r = R()
    r.lpm = torch.tensor([[-1., -3., -50.], [-101., -103., 7.]])
    r.valid, r.truncated = torch.ones(2, 3, dtype=torch.bool), torch.tensor([[False, False, True]] * 2)
    assert sums.spread(r) == pytest.approx(2**.5)


@pytest.fixture
def bench(tmp_path, monkeypatch):
    "The small base model, which knows these sums a little, in the place of the warm-started one; all else small too."
    folder, (model, tokenizer) = tmp_path/"warm", base_model()
    model.save_pretrained(folder); tokenizer.save_pretrained(folder)
    (folder/"warm.json").write_text(json.dumps({"task": "1+1+1+1 digits, slips 0.1", "sha256": "0"}))
    config = replace(runner.CONFIG, questions=4, group_size=4, max_new_tokens=12, lora_rank=2)
    for name, x in (("CONFIG", config), ("RATES", (1e-3, 1e-2)), ("BUDGET", 12)): monkeypatch.setattr(runner, name, x)
    monkeypatch.setattr(sums, "START", "")
    return runner.Bench(tmp_path/"work", folder, samples=4, questions=6)


def asked(bench, **options):
    given = dict(steps=4, eval_every=2, arms=["grpo", "capo"], seeds=[1, 2], out=bench.work/"out",
                 responses=bench.work/"responses")
    return argparse.Namespace(**given | options)


def rows(path): return list(csv.DictReader(open(path)))


def test_of_rates_that_are_level_the_lowest_is_taken():
    rows = lambda *rewards: [{"reward": x} for x in rewards]
    ends = {1e-4: rows(.1, .2, .3), 2e-4: rows(.4, .5, .6), 4e-4: rows(.4, .5, .7)}     # a standard error of .088
    assert runner.lowest_of_the_best(ends)[0] == 2e-4
    assert runner.lowest_of_the_best(ends | {2e-4: rows(.4, .4, .5)})[0] == 4e-4
    assert runner.lowest_of_the_best({1e-4: rows(.2), 2e-4: rows(.3)})[0] == 2e-4


def test_settings_runs_and_records(bench, tmp_path):
    runner.settings(bench, asked(bench, steps=3))
    found = json.loads((bench.work/"settings.json").read_text())
    assert found["lr"] in (1e-3, 1e-2) and found["tau"] > 0 and found["ref_low"] >= 1 and found["seed"] == 101
    runner.runs(bench, asked(bench))
    evals = rows(bench.work/"capo-2/evals.csv")
    assert [int(e["step"]) for e in evals] == [0, 2, 4]
    first = [rows(bench.work/f"{arm}-1/evals.csv")[0] for arm in ("grpo", "capo")]
    assert first[0] == first[1]
    runner.collect(bench, asked(bench, arms=["grpo", "capo", "grpo-mask"]))
    summary = json.loads((bench.work/"out/summary.json").read_text())
    assert set(summary["final"]) == {"base", "grpo", "capo"} and summary["seeds"] == [1, 2]
    last = padded(read_responses(bench.work/"out/grpo-2/responses-4.jsonl.gz"))
    assert last.correct.shape == (6, 4)
    assert summary["final"]["grpo"]["accuracy"]["by_seed"][1] == pytest.approx(last.correct.double().mean().item())
    answers = read_responses(bench.work/"responses/capo.jsonl.gz")
    assert len(answers) == 12 and len(answers.text) == 48
    with gzip.open(bench.work/"responses/capo.jsonl.gz", "rt") as f: assert all("ref_ppl" in line for line in f)


def test_answers_that_are_scored_again_by_who_gave_them_keep_their_order(bench):
    first = runner.base(bench, 1)
    again = runner.some(runner.said(bench, 1))
    assert again.reward.shape == (6, 2) and len(again.text[0]) == 2
    rescored = replace(again, logp=runner.score(bench.model(), again))
    assert runner.evaluate(rescored)["auc_mean"] == pytest.approx(first["rescored_auc"], nan_ok=True)


def test_a_run_that_was_killed_goes_on_to_the_same_numbers(bench, monkeypatch):
    runner.settings(bench, asked(bench, steps=3))
    runner.runs(bench, asked(bench, arms=["capo"], seeds=[1]))
    whole = (bench.work/"capo-1/evals.csv").read_text(), (bench.work/"capo-1/responses-4.jsonl.gz").read_bytes()
    (bench.work/"capo-1").rename(bench.work/"before")
    answers = runner.Bench.answers
    def killed(self, policy, seed): raise KeyboardInterrupt
    monkeypatch.setattr(runner.Bench, "answers", killed)                 # at the evaluation after the second step
    with pytest.raises(KeyboardInterrupt): runner.runs(bench, asked(bench, arms=["capo"], seeds=[1]))
    with pytest.raises(SystemExit): runner.collect(bench, asked(bench, arms=["capo"], seeds=[1]))
    assert not (bench.work/"out").exists() and len(rows(bench.work/"capo-1/log.csv")) == 2
    monkeypatch.setattr(runner.Bench, "answers", answers)
    runner.runs(bench, asked(bench, arms=["capo"], seeds=[1]))
    same = lambda text: [{k: x for k, x in row.items() if k != "seconds"} for row in csv.DictReader(text.splitlines())]
    assert same((bench.work/"capo-1/evals.csv").read_text()) == same(whole[0])
    assert (bench.work/"capo-1/responses-4.jsonl.gz").read_bytes() == whole[1]
    assert len(json.loads((bench.work/"capo-1/lives.json").read_text())) == 2


def test_what_is_in_other_hands_is_left_to_them(bench):
    from capo.responses import locked
    runner.settings(bench, asked(bench, steps=3))
    runner.base(bench, 1); runner.base(bench, 2)
    (bench.work/"grpo-1").mkdir()
    with locked(bench.work/"grpo-1/.lock"): runner.runs(bench, asked(bench, arms=["grpo"]))
    assert not (bench.work/"grpo-1/whole.json").exists() and (bench.work/"grpo-2/whole.json").exists()
