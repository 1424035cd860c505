"The command line: what it passes on, its exit codes, and that bad input leaves no trace."
import json
import math
import shlex
from functools import partial
from pathlib import Path

import pytest
import torch

from capo import cli
from capo.cli import FULL_LR, LORA_LR, main
from capo.compare import REF_HIGH, REF_LOW, TAU, compare
from capo.recipe import capo, grpo, grpo_size
from capo.task import pretrain
from capo.train import NonFiniteLoss
from capo.compare import summarise
from helpers import FAKES, InProcess, rollouts


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    "Every test starts in an empty folder, and fails where work would start unasked."
    def refuse(*args): raise AssertionError("work started")
    monkeypatch.setattr("capo.compare.ProcessPoolExecutor", refuse)
    monkeypatch.setattr("capo.compare.pretrain", refuse)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(): return sorted(str(p) for p in Path().rglob("*"))


BAD = {"--steps 0": "steps must be at least 1; it is 0", "--tau 0": "tau must be a positive number; it is 0.0",
       "--tau -1": "tau must be",
       "--tau nan": "tau must be", "--tau inf": "tau must be",
       "--ref-low .9": "ref_low is a perplexity, at least 1; it is 0.9",
       "--ref-high 0": "ref_high is a perplexity", "--ref-low nan": "ref_low is a perplexity",
       "--lr 0": "lr must be positive; it is 0.0", "--lr nan": "lr must be",
       "--updates 0": "updates must be at least 1", "--updates 65": "updates must not exceed questions, 64; it is 65",
       "--eval-every 0": "eval_every must be at least 1",
       "--lora-rank -1": "lora_rank must be at least 0",
       "--workers 0": "workers must be at least 1", "--seeds 1 2 1": "distinct seeds are needed"}


@pytest.mark.parametrize("options", BAD)
def test_bad_values_give_one_sentence_and_no_file(options, capsys):
    assert main(["demo", *options.split(), "--out", "new"]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("capo: ") and BAD[options] in said and "\n" not in said
    assert files() == []


@pytest.mark.parametrize("command", ["", "run", "demo --step 5", "demo --unknown", "demo extra", "demo --method ppo",
                                     "demo --steps x", "demo --seeds", "base",
                                     "base --out new --tau 1"])
def test_unknown_options_stop_with_2(command, capsys):
    with pytest.raises(SystemExit) as stop: main(command.split())
    assert stop.value.code == 2 and "usage: capo" in capsys.readouterr().err and files() == []


@pytest.mark.parametrize("command", ["demo", "base"])
@pytest.mark.parametrize("as_file", [False, True])
def test_an_output_folder_with_another_run_is_left_alone(command, as_file, capsys):
    Path("old").write_text("results") if as_file else Path("old").mkdir()
    if not as_file: Path("old/log.csv").write_text("results")
    before = files()
    assert main([command, "--out", "old"]) == 2
    assert capsys.readouterr() == ("", "capo: old holds another run; name a new folder\n")   # nothing is announced
    assert files() == before and Path("old" if as_file else "old/log.csv").read_text() == "results"


@pytest.mark.parametrize("stop, code, words", [
    (NonFiniteLoss("the loss of step 3 is nan"), 1, "the loss of step 3 is nan"),
    (KeyboardInterrupt(), 130, "interrupted"), (OSError("no space"), 2, "no space")], ids=["loss", "interrupt", "disk"])
def test_a_run_that_stops_ends_with_a_sentence_and_a_code(monkeypatch, capsys, stop, code, words):
    def compare(*args, **options): raise stop
    monkeypatch.setattr(cli, "compare", compare)
    assert main(["demo"]) == code
    said = capsys.readouterr().err.strip()
    assert said.startswith("capo: ") and words in said and "\n" not in said


def test_base_with_no_steps_writes_nothing(capsys):
    assert main(["base", "--steps", "0", "--out", "new"]) == 2
    assert capsys.readouterr().err == "capo: steps must be at least 1; it is 0\n" and files() == []


@pytest.mark.parametrize("command", ["--help", "demo --help", "base --help"])
def test_help_is_not_an_error(command, capsys):
    with pytest.raises(SystemExit) as stop: main(command.split())
    assert stop.value.code == 0 and "usage: capo" in capsys.readouterr().out


def passed_on(monkeypatch, options):
    "What `capo demo` gives to `compare`."
    seen = []

    def recorded(out, makers, seeds, config, fresh_base, workers, note, begin):
        begin()
        seen.append((out, makers, list(seeds), config, fresh_base, workers, note))
        return summarise(FAKES, 20)

    monkeypatch.setattr(cli, "compare", recorded)
    assert main(["demo", *shlex.split(options)]) == 0
    return seen[0]


def advantages(make):
    g = torch.Generator().manual_seed(0)
    r = rollouts(-torch.rand(6, 8, generator=g), torch.rand(6, 8, generator=g) < .5,
                 ref_ppl=1 + 3 * torch.rand(6, 8, generator=g))
    return make().advantage(r, 0)


def test_the_defaults_of_the_demo(monkeypatch, capsys):
    out, makers, seeds, config, fresh_base, workers, note = passed_on(monkeypatch, "")
    assert out.startswith("runs/demo-") and seeds == [0] and not fresh_base and workers is None
    assert note == {"command": "capo demo"}
    assert (config.steps, config.lr, config.lora_rank, config.updates, config.eval_every) == (200, FULL_LR, 0, 2, 50)
    assert list(makers) == ["grpo", "capo"] and advantages(makers["grpo"]).equal(advantages(grpo))
    assert advantages(makers["capo"]).equal(advantages(partial(capo, TAU, REF_LOW, REF_HIGH, grpo_size)))
    said = capsys.readouterr().out
    assert "AUC-mean (headline)" in said and out in said


def test_every_option_arrives(monkeypatch):
    options = ("--method capo-nomask grpo-mask --steps 7 --seeds 4 2 --tau .3 --ref-low 1.5 --ref-high 2 --lora-rank 3 "
               "--updates 1 --eval-every 5 --fresh-base --workers 1 --out 'a b'")
    out, makers, seeds, config, fresh_base, workers, note = passed_on(monkeypatch, options)
    assert out == "a b" and seeds == [4, 2] and fresh_base and workers == 1
    assert shlex.split(note["command"]) == ["capo", "demo", *shlex.split(options)]
    assert (config.steps, config.lr, config.lora_rank, config.updates, config.eval_every) == (7, LORA_LR, 3, 1, 5)
    assert sorted(makers) == ["capo-nomask", "grpo-mask"]
    assert advantages(makers["capo-nomask"]).equal(advantages(partial(capo, .3, 1, math.inf, grpo_size)))
    assert advantages(makers["grpo-mask"]).equal(advantages(partial(grpo, True, 1.5, 2.)))


@pytest.mark.parametrize("options, lr", [("--lr .02", .02), ("--lr .02 --lora-rank 4", .02),
                                         ("--lora-rank 4", LORA_LR)])
def test_the_learning_rate(monkeypatch, options, lr): assert passed_on(monkeypatch, options)[3].lr == lr


def test_a_demo_from_end_to_end(monkeypatch, capsys):
    monkeypatch.setattr("capo.compare.ProcessPoolExecutor", InProcess)
    monkeypatch.setattr("capo.compare.summarise", partial(summarise, resamples=10))
    monkeypatch.setattr(cli, "compare", partial(compare, questions=8, samples=4))
    assert main(["demo", "--steps", "2", "--method", "capo", "--seeds", "3", "--out", "runs/new"]) == 0
    out = Path("runs/new")
    assert {p.name for p in out.iterdir()} == {"config.json", "summary.json", "comparison.png", "base-3.jsonl.gz",
                                               "capo-3"}
    command = json.loads((out / "config.json").read_text())["made_with"]["command"]
    assert command == "capo demo --steps 2 --method capo --seeds 3 --out runs/new"
    said, final = capsys.readouterr().out, json.loads((out / "summary.json").read_text())["final"]
    assert f"{final['capo']['accuracy']['mean']:.3f}" in said and "runs/new/comparison.png" in said


def test_base_saves_a_model_that_loads(monkeypatch, capsys):
    monkeypatch.setattr("capo.compare.pretrain", pretrain)
    from transformers import AutoModelForCausalLM
    assert main(["base", "--steps", "2", "--seed", "3", "--out", "deep/new"]) == 0
    assert AutoModelForCausalLM.from_pretrained("deep/new").config.vocab_size == 16
    assert "deep/new" in capsys.readouterr().out
