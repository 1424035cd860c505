"`capo evaluate` and `capo report`: what they do from end to end, after a kill, and with bad input."
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

import capo.batches as lib
from capo import cli
from capo.cli import main
from capo.folder import fingerprint, same_run
from capo.task import load_model, load_tokenizer, prompts_for
from capo.evaluate import read_responses
from capo.task import INSTRUCTION, Problem, arithmetic, arithmetic_tokenizer, tiny_lm, verify

PROBLEMS = arithmetic(10, seed=4, distinct=True)


def write_sums():
    lines = [json.dumps({"question": p.prompt, "answer": p.answer}) + "\n" for p in PROBLEMS]
    Path("sums.jsonl").write_text("".join(lines))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    "An empty folder with ten sums."
    monkeypatch.chdir(tmp_path)
    write_sums()
    return tmp_path


RUN = ["evaluate", "--model", "tiny", "--data", "sums.jsonl", "-n", "3", "--batch", "2", "--max-new-tokens", "12",
       "--out", "out"]


def complaint(capsys, *argv, code=2):
    "The one sentence on stderr."
    capsys.readouterr()
    assert main(list(argv)) == code
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("capo: ")
    return said[6:]


def files(): return sorted(str(p) for p in Path().rglob("*") if p.is_file() and p.name != "sums.jsonl")


REPORT = sorted(["auc.svg", "confidence_0.svg", "report.html", "report.md", "risk_coverage.svg", "summary.json",
                 "votes_0.svg"])


def test_from_a_model_to_a_report(capsys):
    assert main(RUN) == 0
    said = capsys.readouterr().out
    assert sorted(p.name for p in Path("out").iterdir()) == sorted(["config.json", "responses.jsonl", *REPORT])
    r = read_responses("out/responses.jsonl")
    assert r.id == [str(i) for i in range(10)] and len(r.text) == 30 and r.refused == 0
    assert r.prompt == [p.prompt for p in PROBLEMS]
    assert r.correct.tolist() == [verify(t, PROBLEMS[q].answer) for q, t in zip(r.question.tolist(), r.text)]
    accuracy = json.loads(Path("out/summary.json").read_text())["sets"]["out"]["numbers"]["accuracy"]["value"]
    assert re.search(rf"accuracy, mean of 3 +{accuracy:.3f} ", said)
    assert "out/report.html" in said
    assert "10 questions of sums.jsonl, 3 responses each by tiny" in said
    about = json.loads(Path("out/config.json").read_text())
    assert about["run"]["n"] == 3 and about["run"]["questions"] == 10
    assert about["made_with"]["command"].startswith("capo evaluate --model tiny")


def test_a_finished_run_is_not_sampled_again(capsys, monkeypatch):
    assert main(RUN) == 0
    before = {p: Path(p).read_bytes() for p in files()}
    monkeypatch.setattr(cli.HFSampler, "__call__", lambda *a: pytest.fail("it was sampled again"))
    assert main(RUN) == 0 and {p: Path(p).read_bytes() for p in files()} == before


def child(kill_at):
    "The run in a process of its own, which may kill itself in the middle of a batch."
    tqdm.set_lock(threading.RLock())          # the usual one is shared with forked processes, and a killed one keeps it
    if kill_at is not None:
        calls, lines = [], lib.response_lines
        def torn(rows):
            calls.append(1)
            data = lines(rows)
            return data[:len(data) * 2 // 3] if len(calls) == kill_at else data
        def die(fd):
            if len(calls) == kill_at: os.kill(os.getpid(), signal.SIGKILL)
        lib.response_lines, os.fsync = torn, die
    os._exit(main(RUN))


def finish(kill_at=None, seconds=None):
    "Starts the run; kills it after so many seconds unless it ends before. Its exit code, negative if it was killed."
    p = multiprocessing.get_context("fork").Process(target=child, args=(kill_at,))
    p.start()
    p.join(seconds)
    if p.is_alive(): p.kill()
    p.join()
    return p.exitcode


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "The file of an uninterrupted run."
    before, folder = Path.cwd(), tmp_path_factory.mktemp("whole")
    os.chdir(folder)
    write_sums()
    try:
        assert finish() == 0
        return Path("out/responses.jsonl").read_bytes()
    finally: os.chdir(before)


def test_a_run_killed_inside_every_batch_ends_up_the_same(whole):
    for k in range(1, 6):
        assert finish(1 + (k > 1)) == -signal.SIGKILL     # the second batch that it writes, the first the first time
        data = Path("out/responses.jsonl").read_bytes()
        assert whole.startswith(data) and not data.endswith(b"\n")
    assert finish() == 0 and Path("out/responses.jsonl").read_bytes() == whole


def test_a_run_killed_at_random_moments_ends_up_the_same(whole):
    rng = random.Random(0)
    for _ in range(6):
        assert finish(seconds=rng.uniform(0, 1.5)) in (0, -signal.SIGKILL)
        if Path("out/responses.jsonl").exists(): assert whole.startswith(Path("out/responses.jsonl").read_bytes())
    assert finish() == 0 and Path("out/responses.jsonl").read_bytes() == whole


def test_another_run_is_named_by_its_differences_and_left_alone(capsys):
    assert main(RUN) == 0
    before = {p: Path(p).read_bytes() for p in files()}
    said = complaint(capsys, *RUN, "--seed", "1", "--temperature", "0.5")
    other = "its seed was 0 and is 1; its temperature was 1.0 and is 0.5"
    assert said == f"out holds another run, {other}; name a new folder"
    Path("sums.jsonl").write_text('{"question": "1+1=", "answer": "2"}\n' * 10)
    assert "its prompts and answers was " in complaint(capsys, *RUN)
    Path("sums.jsonl").write_text('{"question": "1+1=", "answer": "2"}\n')
    assert "its questions was 10 and is 1" in complaint(capsys, *RUN)
    assert {p: Path(p).read_bytes() for p in files()} == before


def test_weights_that_changed_under_the_same_name_are_noticed(capsys):
    tiny_lm(16, 1, 2).save_pretrained("m")
    run = [*RUN[:2], "m", *RUN[3:]]
    assert main(run) == 0
    tiny_lm(16, 1, 2, seed=1).save_pretrained("m")
    assert "its weights was " in complaint(capsys, *run)


@pytest.mark.parametrize("content", ["x", '{"run": 3}', "[]", "{}"])
def test_a_folder_with_something_else_is_left_alone(capsys, content):
    Path("out").mkdir()
    Path("out/config.json").write_text(content)
    assert complaint(capsys, *RUN) == "out holds another run; name a new folder" and files() == ["out/config.json"]
    Path("out/config.json").rename("out/notes")
    assert complaint(capsys, *RUN) == "out holds another run; name a new folder" and files() == ["out/notes"]


def test_a_kill_before_the_first_response_leaves_no_obstacle():
    Path("out").mkdir()
    Path("out/.config.json.new").write_text("{")
    assert same_run("out", {"a": 1}, {}) == Path("out") and files() == ["out/config.json"]
    assert same_run("out", {"a": 1}, {"other": 1}) == Path("out")


BAD = {"-n 0": "n must be at least 1; it is 0", "--batch 0": "batch must be",
       "--max-new-tokens 0": "max-new-tokens must", "--temperature 0": "temperature must be a positive number",
       "--temperature nan": "temperature must",
       "--precision 90": "precision must lie", "--data none.jsonl": "there is no file none.jsonl",
       "--model ./none": "there is no folder ./none", "--model none": "none cannot be loaded: ",
       "--questions 0": "n must be at least 1",
       "--chat": "no chat template", "--answer-column x": "no column 'x'"}


@pytest.mark.parametrize("options", BAD)
def test_bad_values_give_one_sentence_and_no_file(options, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert BAD[options] in complaint(capsys, *RUN, *options.split()) and files() == []


@pytest.mark.parametrize("command", ["evaluate", "evaluate --model tiny", "report",
                                     "evaluate --model tiny --data x --dtype int8", "report x --n 3"])
def test_missing_and_unknown_options_stop_with_2(command, capsys):
    with pytest.raises(SystemExit) as stop: main(command.split())
    assert stop.value.code == 2 and "usage: capo" in capsys.readouterr().err and files() == []


def test_an_interrupted_run_says_so(monkeypatch, capsys):
    def stop(*a): raise KeyboardInterrupt
    monkeypatch.setattr(cli.HFSampler, "__call__", stop)
    assert "interrupted" in complaint(capsys, *RUN, code=130) and Path("out/responses.jsonl").read_bytes() == b""


def test_a_lora_adapter_is_loaded_with_its_base(tmp_path):
    from peft import LoraConfig, get_peft_model
    torch.manual_seed(0)
    tiny_lm(16, 1, 2).save_pretrained("m")
    from transformers import AutoModelForCausalLM
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained("m"),
                           LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    tuned.save_pretrained("adapter")
    x = torch.tensor([[2, 3, 4]])
    assert torch.allclose(load_model("adapter")(x).logits, tuned(x).logits, atol=1e-5)
    assert not torch.allclose(load_model("m")(x).logits, tuned(x).logits, atol=1e-3)
    assert len(load_tokenizer("adapter")) == 16 and fingerprint("adapter") != fingerprint("m")
    assert fingerprint("none") is None
    assert main(["evaluate", "--model", "adapter", "--data", "sums.jsonl", "-n", "2", "--max-new-tokens", "4", "--out",
                 "out"]) == 0


def test_prompts_are_what_the_model_expects():
    p = [Problem("1+1=", "2")]
    small, chatty = arithmetic_tokenizer(), arithmetic_tokenizer()
    assert prompts_for(p, small) == p
    chatty.add_tokens(["<user>"])
    assert prompts_for(p, chatty)[0].prompt == f"1+1=\n{INSTRUCTION}"
    chatty.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    assert prompts_for(p, chatty, system="Be brief.", instruction="Go.")[0].prompt == "<system>Be brief.<user>1+1=\nGo."
    assert prompts_for(p, chatty, chat=False, instruction="")[0].prompt == "1+1="


# Several models.

@pytest.fixture
def another():
    "A model beside the one that ships."
    tiny_lm(16, 1, 2).save_pretrained("runs/other/policy")
    return [*RUN[:3], "runs/other/policy", *RUN[3:]]


def test_several_models_are_compared(another, capsys, caplog):
    assert main(another) == 0
    said = capsys.readouterr()
    assert "minus the first, paired" in said.out and "out/report.html" in said.out
    assert caplog.text.count("without a chat template, so it reads plain text; the first prompt is") == 2
    for name in ("tiny", "policy"):
        assert sorted(p.name for p in Path("out", name).iterdir()) == ["config.json", "responses.jsonl"]
    assert [*json.loads(Path("out/summary.json").read_text())["sets"]] == ["tiny", "policy"]
    assert main([*RUN[:-1], "alone"]) == 0
    assert Path("alone/responses.jsonl").read_bytes() == Path("out/tiny/responses.jsonl").read_bytes()


def test_another_model_joins_and_what_is_done_is_not_loaded(another, monkeypatch):
    assert main(another) == 0
    before = {p: Path(p).read_bytes() for p in files() if "responses" in p}
    tiny_lm(16, 1, 2, seed=1).save_pretrained("third")
    loaded, load = [], cli.load_model
    monkeypatch.setattr(cli, "load_model", lambda name, *a: loaded.append(name) or load(name, *a))
    assert main([*another[:4], "third", *another[4:]]) == 0 and loaded == ["third"]
    assert {p: Path(p).read_bytes() for p in before} == before
    assert len(json.loads(Path("out/summary.json").read_text())["sets"]) == 3


def test_several_models_killed_in_between_go_on(another, monkeypatch):
    def stop(*a, **how): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(cli, "report", stop)
        assert main(another) == 130
    whole = Path("out/policy/responses.jsonl").read_bytes()
    Path("out/policy/responses.jsonl").write_bytes(whole[:len(whole) // 2])
    assert main(another) == 0 and Path("out/policy/responses.jsonl").read_bytes() == whole


def test_several_models_are_refused_before_anything_is_loaded(another, capsys):
    assert "model must name different models" in complaint(capsys, *RUN[:3], "tiny", *RUN[3:])
    assert "there is no folder ./none" in complaint(capsys, *RUN[:3], "./none", *RUN[3:])
    assert not Path("out").exists()
    assert main(RUN) == 0                                    # of one model
    assert "out holds another run" in complaint(capsys, *another)
    assert main([*another[:-1], "both"]) == 0
    assert "both holds another run" in complaint(capsys, *RUN[:-1], "both")
    assert "its n was 3 and is 2" in complaint(capsys, *another[:-1], "both", "-n", "2")


def test_folders_of_models_have_names_of_their_own():
    models = ["tiny", "org/one", "a/policy/", "b/../c/policy", "./"]
    names = [p.name for p in cli.model_folders(models, Path("out")).values()]
    assert names == ["tiny", "one", "a-policy", "b-..-c-policy", Path.cwd().name]
    assert cli.model_folders(["org/one"], Path("out")) == {"org/one": Path("out")}


def test_the_time_left_is_said_once_after_the_first_batch(caplog):
    assert main(RUN) == 0
    assert len(re.findall(r"by its first 6 responses, tiny will take \d+:\d\d:\d\d more", caplog.text)) == 1
    caplog.clear()
    assert main(RUN) == main([*RUN[:-1], "one", "--batch", "10"]) == 0 and "will take" not in caplog.text


# The report.

def recorded(path, n=3, flip=False, extra=""):
    row = lambda q, g: {"id": q, "response": f"{q}", "correct": int((q + g) % 2 == flip), "lpm": -.1 - g / 10}
    rows = [row(q, g) for q in range(5) for g in range(n)]
    Path(path).write_text("".join(json.dumps(r) + "\n" for r in rows) + extra)


def test_a_report_of_two_files(capsys):
    recorded("a.jsonl"); recorded("b.jsonl", flip=True)
    assert main(["report", "a.jsonl", "b.jsonl", "--out", "new/folder"]) == 0
    said = capsys.readouterr().out
    assert set(REPORT) <= {p.name for p in Path("new/folder").iterdir()}
    assert "minus the first" in said and "new/folder/report.html" in said and "`a`" in said


def test_a_report_of_a_file_with_flaws(capsys):
    recorded("a.jsonl", extra='{"id": 1}\nx\n')
    assert "2 lines could not be used, and nothing counts them" in complaint(capsys, "report", "a.jsonl", "--out",
        "new", code=1)
    assert "a.jsonl, line 16: it has neither correct nor reference" in Path("new/report.md").read_text()
    assert main(["report", "a.jsonl", "--skip-bad"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("> `a`: 2 lines could not be used") and "runs/report-" in said


def test_labels_of_plus_and_minus_one_lose_no_line(capsys):
    Path("a.csv").write_text("q,acc,p\n" + "".join(f"{i},{1 if i % 4 else -1},{i / 40}\n" for i in range(40)))
    assert main(["report", "a.csv", "--column", "id=q", "--column", "correct=acc", "--column", "confidence=p", "--csv",
                 "--out", "new"]) == 0
    assert json.loads(Path("new/summary.json").read_text())["sets"]["a"]["numbers"]["accuracy"]["value"] == .75
    assert Path("new/how_often_it_is_right.csv").exists()
    assert "column must be FIELD=COLUMN" in complaint(capsys, "report", "a.csv", "--column", "id")


def test_a_log_is_converted(capsys):
    recorded("a.jsonl", extra="x\n")
    assert "1 lines could not be used" in complaint(capsys, "convert", "a.jsonl", "b.jsonl.gz", code=1)
    assert main(["convert", "a.jsonl", "b.jsonl.gz", "--skip-bad"]) == 0
    assert len(read_responses("b.jsonl.gz").text) == 15


@pytest.mark.parametrize("content, words", [
    ("", "there is no response in a.jsonl: it is empty"), (None, "there is no file a.jsonl"),
    ("x\n", "none of its 1 lines can be used; the first: a.jsonl, line 1: it is not JSON")])
def test_a_report_of_nothing_is_a_sentence(capsys, content, words):
    if content is not None: Path("a.jsonl").write_text(content)
    assert words in complaint(capsys, "report", "a.jsonl", "--out", "out") and not Path("out").exists()


def test_a_reader_who_has_seen_enough_is_no_error():
    recorded("a.jsonl")
    typed = "set -o pipefail; PYTHONPATH=$1 $2 -m capo report a.jsonl --out new | head -c 3"
    root = Path(cli.__file__).parents[1]
    run = subprocess.run(["bash", "-c", typed, "", root, sys.executable], capture_output=True, text=True)
    assert run.stdout == "Its" and run.returncode in (0, 141) and "Broken pipe" not in run.stderr


def test_bad_options_of_a_report(capsys):
    recorded("a.jsonl")
    for options, words in (("--by x", "there is no confidence x"), ("--precision 2", "precision must lie"),
                           ("a.jsonl", "different files"), ("--out a.jsonl", "another run")):
        assert words in complaint(capsys, "report", "a.jsonl", *options.split())
    assert files() == ["a.jsonl"]


def test_what_vllm_cannot_do_is_said(capsys, monkeypatch):
    assert "vLLM takes a whole model" in complaint(capsys, *RUN, "--vllm") and files() == []
    tiny_lm(16, 1, 2).save_pretrained("m")
    monkeypatch.setitem(__import__("sys").modules, "vllm", None)
    assert 'pip install "capo-rl[vllm]"' in complaint(capsys, *RUN[:2], "m", *RUN[3:], "--vllm")
    assert not Path("out").exists()


@pytest.mark.parametrize("half, chosen", [(.5, "bfloat16"), (.9, "float32"), (5., "float32")])
def test_a_precision_that_is_measured_is_said_and_kept(monkeypatch, caplog, half, chosen):
    seconds = {torch.float32: 1e-3, torch.bfloat16: half * 1e-3}
    monkeypatch.setattr("capo.policy.product_seconds", seconds.__getitem__)
    write_sums()
    command = ["evaluate", *"--model tiny --data sums.jsonl -n 2 --max-new-tokens 8 --out out".split()]
    assert main([*command, "--dtype", "measured"]) == 0
    assert f"{chosen}, since a product takes 1.00 ms in float32 and {half:.2f} in bfloat16" in caplog.text
    assert json.loads(Path("out/config.json").read_text())["run"]["dtype"] == chosen
