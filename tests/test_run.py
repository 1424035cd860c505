"A run from names: what it writes, what it leaves alone, how it is started, stopped, read, and gone on with."
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from capo import cli
from capo.folder import Checkpoints, Progress, Watch, plot_runs, settings
from capo.rollout import HFSampler
from capo.run import RunConfig, run
from capo.task import arithmetic_tokenizer, load_model, load_tokenizer, prompts_for
from capo.train import train
from helpers import model, problems, tokenizer

ROOT = Path(__file__).parents[1]
SHORT = dict(model="tiny", data="arithmetic", steps=3, questions=4, group_size=4, method="grpo", verify_seconds=0.)


def config(**options): return settings(RunConfig, SHORT | options)


def rows(path): return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_is_not_given_fits_the_model():
    of = lambda **o: (lambda c: (c.lr, c.max_new_tokens))(RunConfig(**dict(data="x.jsonl") | o))
    assert of(model="tiny") == (5e-4, 16) and of(model="other", data="arithmetic") == (5e-4, 16)
    assert of(model="other") == (1e-6, 1024) and of(model="other", lora_rank=8) == (2e-5, 1024)
    assert of(model="other", lr=3e-4, max_new_tokens=99) == (3e-4, 99)


def test_a_failed_start_leaves_no_trace(tmp_path, monkeypatch):
    "The corrected command finds a new folder; one that was there is still there, and empty."
    (tmp_path / "there").mkdir()
    def fails(*args, **options): raise ValueError("no")
    monkeypatch.setattr("capo.train.experience", fails)
    for name in ("new", "there"):
        validated = config(validation="arithmetic", validation_size=2)
        with pytest.raises(ValueError, match="no"): run(validated, tmp_path / name)
    assert not any(p for p in tmp_path.rglob("*") if p.is_file())
    monkeypatch.undo()
    assert run(config(steps=1), tmp_path / "new").step == 1


def test_several_processes_are_refused_before_any_work(tmp_path, monkeypatch, capsys):
    "As `torchrun` and `accelerate launch` set the environment."
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = "capo.train is one process, WORLD_SIZE is 2: for several processes use capo.trl or capo.verl"
    with pytest.raises(ValueError, match=said): train(model(), tokenizer, problems)
    with pytest.raises(ValueError, match=said): run(config(), tmp_path / "run")
    assert cli.main(["train", "--model", "tiny", "--data", "arithmetic", "--out", str(tmp_path / "run")]) != 0
    assert said in capsys.readouterr().err and not any(tmp_path.iterdir())
    for alone in ("1", ""):
        monkeypatch.setenv("WORLD_SIZE", alone)
        assert run(config(steps=1), tmp_path / f"alone{alone}").step == 1


def test_a_refused_resume_writes_nothing(tmp_path):
    run(config(), tmp_path / "run")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match="lr was 0.0005 and is 0.5"): run(config(lr=.5), tmp_path / "run", resume=True)
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    run(config(lr=.5, steps=4), tmp_path / "run", resume=True, accept_changes=True)
    assert json.loads((tmp_path / "run/config.json").read_text())["lr"] == .5


def test_damaged_checkpoints_are_not_forgotten(tmp_path):
    "Asked a second time, it does not begin at step 1."
    run(config(), tmp_path)
    for p in Checkpoints(tmp_path).all(): (p / "run.json").unlink()
    log = (tmp_path / "log.csv").read_text()
    for _ in range(2):
        with pytest.raises(ValueError, match="no checkpoint in .* is intact"): run(config(), tmp_path, resume=True)
    assert (tmp_path / "log.csv").read_text() == log


def test_a_run_goes_on_from_another_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir(); (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    model().save_pretrained("base"); tokenizer.save_pretrained("base")
    lines = [json.dumps({"prompt": p.prompt, "answer": p.answer}) for p in problems[:8]]
    Path("problems.jsonl").write_text("\n".join(lines) + "\n")
    common = ["--questions", "4", "--group-size", "4", "--max-new-tokens", "8", "--steps", "2", "--instruction", ""]
    assert cli.main(["train", "--model", "base", "--data", "problems.jsonl", "--out", "../run", *common]) == 0
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert cli.main(["train", "--resume", "../run", "--steps", "3", "--accept-changes"]) == 0
    assert Checkpoints("../run").all()[-1].name == "checkpoint-000003"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_run_says_so_in_its_exit_status(number, tmp_path, monkeypatch):
    import capo.train
    step = capo.train.step_stats

    def sends(r, recipe):
        os.kill(os.getpid(), number)
        return step(r, recipe)

    monkeypatch.setattr("capo.train.step_stats", sends)
    before = signal.signal(number, signal.SIG_DFL)
    options = [x for k, v in SHORT.items() for x in (f"--{k.replace('_', '-')}", str(v))]
    try: assert cli.main(["train", *options, "--out", str(tmp_path / "run")]) == 128 + number
    finally: signal.signal(number, before)
    assert [p.name for p in Checkpoints(tmp_path / "run").all()] == ["checkpoint-000001"]


def test_an_ignored_signal_stays_ignored(tmp_path, monkeypatch):
    "As under `nohup`: a terminal that closes does not end the run."
    import capo.train
    step = capo.train.step_stats

    def sends(r, recipe):
        os.kill(os.getpid(), signal.SIGHUP)
        return step(r, recipe)

    monkeypatch.setattr("capo.train.step_stats", sends)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try: assert run(config(), tmp_path / "run").step == 3
    finally: signal.signal(signal.SIGHUP, before)


def test_full_memory_names_what_to_change(tmp_path, monkeypatch):
    def full(*args, **options): raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 294.50 GiB.")
    monkeypatch.setattr("capo.train.accumulate", full)
    with pytest.raises(RuntimeError, match="memory is full; lower token_budget or sample_tokens, or set recompute"):
        run(config(), tmp_path / "run")


def test_a_line_a_step_where_there_is_no_terminal(tmp_path, capsys, caplog):
    run(config(steps=4, validation="arithmetic", validation_size=2), tmp_path / "run")
    said = capsys.readouterr().err.splitlines()
    lines = [line for line in said if line.startswith("grpo ")]
    assert [line.split()[1] for line in lines] == ["1/4", "2/4", "3/4", "4/4"] and "reward" in lines[0]
    assert lines[-1].endswith("0:00:00 left") and "by its first three steps, this run will take" in caplog.text


def test_the_time_left_is_that_of_this_life(monkeypatch, capsys):
    now = [100.]
    monkeypatch.setattr("capo.folder.time.monotonic", lambda: now[0])
    show = Progress(400, "capo")
    for step in (301, 302):
        now[0] += 10
        show({"step": step, "reward": 0., "auc_mean": 0., "mixed": 0.})
    assert capsys.readouterr().err.splitlines()[-1].endswith("0:16:20 left")        # 98 steps of ten seconds


def test_a_few_responses_can_be_read(tmp_path):
    path = tmp_path / "run/samples.jsonl"
    run(config(steps=5, show_every=2, method="capo", ref_high=1.5), tmp_path / "run")
    found = rows(path)
    assert [r["step"] for r in found] == [s for s in (1, 3, 5) for _ in range(8)]
    assert all(r["prompt"].endswith("=") and "<" not in r["prompt"] and r["reward"] in (0, 1) for r in found)
    assert all(r["kept"] or r["advantage"] == 0 for r in found)
    run(config(steps=6, show_every=2, method="capo", ref_high=1.5), tmp_path / "run", resume=True, accept_changes=True)
    assert [r["step"] for r in rows(path)] == [s for s in (1, 3, 5) for _ in range(8)]


def test_symptoms_are_said_once_and_again_at_the_end(tmp_path, caplog):
    told = []
    watch = Watch(told.append)
    for step in range(1, 9): watch({"step": step, "reward": 0., "mixed": 0., "masked": .95, "truncated": .6})
    assert len(told) == 4 and all("at step 3" in s for s in told)
    run(config(steps=1, max_new_tokens=1), tmp_path / "run")
    assert "capo: at the end, reward is 0: no answer is right" in caplog.text


def test_the_trained_folder_says_what_it_is(tmp_path):
    result = run(config(validation="arithmetic", validation_size=4), tmp_path / "run")
    card = (result.checkpoint / "policy/README.md").read_text()
    for line in ('base_model: "tiny"', "# grpo, 3 steps", "- reward: ", "- accuracy: ", "- lr: 0.0005"):
        assert line in card, line


def test_runs_are_drawn_over_one_another(tmp_path):
    for name in ("a", "b"): run(config(), tmp_path / name)
    made = plot_runs([tmp_path / "a", tmp_path / "b"], tmp_path / "curves")
    assert [p.name for p in made] == ["curves.png", "curves.html"] and made[0].read_bytes()[:4] == b"\x89PNG"
    assert cli.main(["plot", str(tmp_path / "a"), "--out", str(tmp_path / "one.png")]) == 0
    assert (tmp_path / "one.html").exists() and cli.main(["plot", str(tmp_path)]) == 2


def test_an_adapter_on_top_of_a_merged_model_loads_by_itself(tmp_path):
    "Its base is the merged model, which is nowhere else."
    first = run(config(lora_rank=2, lr=5e-3), tmp_path / "first").checkpoint / "policy"
    second = run(config(model=str(first), adapter="on_top", lora_rank=3, lr=5e-3), tmp_path / "second")
    loaded, ids = load_model(str(second.checkpoint / "policy")), torch.arange(2, 9)[None]
    with torch.no_grad(): torch.testing.assert_close(loaded(ids).logits, second.model(ids).logits, rtol=0, atol=1e-5)


def test_an_adapter_that_goes_on_is_loaded_as_one(tmp_path, capsys):
    "Also where its rank was not named again."
    first = run(config(lora_rank=2, lr=5e-3), tmp_path / "first").checkpoint / "policy"
    options = [x for k, v in (SHORT | {"model": first}).items() for x in (f"--{k.replace('_', '-')}", str(v))]
    assert cli.main(["train", *options, "--adapter", "continue", "--out", str(tmp_path / "second")]) == 0
    said = capsys.readouterr().out
    assert "from peft import AutoPeftModelForCausalLM" in said and "--max-lora-rank 8 " in said
    card = (tmp_path / "second/checkpoint-000003/policy/README.md").read_text()
    assert "library_name: peft" in card
    assert RunConfig(model="other", data="x.jsonl", adapter="continue").lr == 2e-5


@pytest.mark.parametrize("adapter, rank, name, given", [
    ("", 3, "base", 3), ("continue", 0, "base", 2), ("merge", 0, "base", 0), ("on_top", 3, "second/base", 3)])
def test_vllm_loads_the_model_below_the_adapter(adapter, rank, name, given, tmp_path, monkeypatch):
    "A folder with an adapter alone is no model to it; what it gets each step is the adapter, or the weights."
    seen = []

    class Engine(HFSampler):
        external = True
        def __init__(self, model_path, tokenizer, max_new_tokens, temperature, lora_rank=0, **options):
            seen.append((model_path, lora_rank, options))
            super().__init__(model(), tokenizer, max_new_tokens, temperature)
        def sync(self, policy): self.model = policy

    model().save_pretrained(tmp_path / "base"); tokenizer.save_pretrained(tmp_path / "base")
    common = dict(vllm=True, validation="arithmetic", validation_size=2, validation_samples=2, dtype="float32", steps=1)
    start = str(tmp_path / "base")
    if adapter: start = str(run(config(lora_rank=2, model=start, steps=1), tmp_path / "first").checkpoint / "policy")
    monkeypatch.setattr("capo.run.VLLMSampler", Engine)
    run(config(model=start, adapter=adapter, lora_rank=rank, **common), tmp_path / "second")
    (path, lora_rank, options), = seen
    assert Path(path).resolve() == (tmp_path / name).resolve() and lora_rank == given
    assert options["dtype"] == "float32" and options["trust_remote_code"] is False


def test_prompts_that_are_too_long_are_left_out(tmp_path, caplog):
    run(config(max_prompt_tokens=6, steps=1), tmp_path / "run")
    assert "prompts have more than 6 tokens and are left out" in caplog.text
    with pytest.raises(ValueError, match="every prompt has more than max_prompt_tokens, 1"):
        run(config(max_prompt_tokens=1), tmp_path / "none")


def test_what_cannot_be_loaded_says_all_of_the_reason(tmp_path, monkeypatch):
    "That of a tokenizer has several lines; a chat template has its own words."
    model().save_pretrained(tmp_path); tokenizer.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"vocab_size": 17}))  # not ours, which needs no file
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError) as e: load_tokenizer(str(tmp_path))
    said = str(e.value)
    assert said.startswith(f"{tmp_path} cannot be loaded: ") and "\n" not in said and not said.endswith(": ")
    assert "sentencepiece" in said
    refuses = arithmetic_tokenizer()
    refuses.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(ValueError, match="the chat template fails: System role not supported"):
        prompts_for(problems[:1], refuses, system="Be brief.")


@pytest.mark.parametrize("start", [["-m", "capo"], ["-m", "capo.cli"]])
def test_each_way_to_start_starts(start, tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *start, "--help"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "train" in done.stdout and "evaluate" in done.stdout, done.stdout + done.stderr
