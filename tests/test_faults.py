"""What happens to a run that takes hours: it is killed, stopped, starved of disk, damaged, started twice.
Each is tried, and the run is usable after.

Runs that die are forked from the test process, which is quick because everything is imported already.
A run is killed at its n-th function call, so
that a random n is a random point of the run, a checkpoint's writing included, and the same one every time."""
import hashlib
import math
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file
from tqdm import tqdm

import capo.folder as folders
import capo.keep as keep
import capo.train as training
from capo.folder import Broken, Checkpoints, CheckpointFailed, CSVLog, check_free, damage, settings
from capo.recipe import capo, grpo
from capo.rollout import HFSampler
from capo.keep import keeping
from capo.run import RunConfig, Validation, run
from capo.train import NonFiniteLoss, TrainConfig, train
from helpers import has_a_seven, model, problems, tokenizer

# its own is shared with children, and dies with one that holds it
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0

TINY = TrainConfig(steps=6, questions=4, group_size=4, lr=1e-2, save_every=2, eval_every=2, keep=2)
SHORT = dict(model="tiny", data="arithmetic", steps=4, questions=4, group_size=4, save_every=1, eval_every=2,
             method="grpo", verify_seconds=0.)


def lucky(text, answer):
    "A verifier that draws from numpy's generator, whose state a checkpoint must therefore bring back."
    return has_a_seven(text, answer) and numpy.random.rand() < .9


def go(folder, config=TINY, policy=None, recipe=capo(.5, 1.5, 20.), verify=lucky, resume=True, wrap=lambda f: f,
       data=problems,
       accept_changes=False):
    "A run in a folder, or what is left of it, with its two logs."
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0); numpy.random.seed(0)
    policy, evals, log = policy or model(), CSVLog(folder / "evals.csv", resume=True), CSVLog(folder / "log.csv",
        resume=True)
    evaluation = wrap(Validation(problems[:3], 2, lambda policy: HFSampler(policy, tokenizer, 8), has_a_seven, evals))
    with keeping(folder, policy, data, recipe, config, resume, accept_changes, (log, evaluation)) as keeper:
        result = train(policy, tokenizer, data, recipe, verify=verify, evaluate=evaluation, log=log, config=config,
                       keeper=keeper)
        result.checkpoint = keeper.checkpoint
        return result


def forked(f, during=lambda pid: None):
    "Runs `f` in a child, which ends without the clean-up of pytest; its status by `os.waitstatus_to_exitcode`."
    sys.stdout.flush()
    if not (pid := os.fork()):
        code = 99
        try:
            code = f() or 0
        except BaseException as e: print(repr(e), file=sys.stderr)
        finally: os._exit(code)
    during(pid)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def calls(f, until=math.inf):
    "How many function calls `f` makes; the process is killed, as by a power cut, at call `until`."
    count = 0

    def profile(frame, event, arg):
        nonlocal count
        if event in ("call", "c_call"):
            count += 1
            if count >= until: os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(profile)
    try: f()
    finally: sys.setprofile(None)
    return count


def outcome(folder):
    "What must be equal: the logs but for the times, and every byte of the last checkpoint's state."
    lines = [line.split(",") for line in (folder / "log.csv").read_text().splitlines()]
    at = lines[0].index("seconds")
    last = Checkpoints(folder).all()[-1]
    assert damage(last) is None
    state = {k: hashlib.sha256(x.numpy().tobytes()).hexdigest() for k,
             x in load_file(last / "state.safetensors").items()}
    # from which the checks of types in tests draw, too
    del state["random.python"]
    return [line[:at] + line[at + 1:] for line in lines], (folder / "evals.csv").read_text(), last.name, state


def differences(folder, expected):
    "Which parts of the outcome are others; none is what we want."
    found = outcome(folder)
    return [what for what, a, b in zip(("log.csv", "evals.csv", "name"), found, expected) if a != b] + [k
        for k in expected[3] if found[3].get(k) != expected[3][k]]


@pytest.fixture(scope="module", params=[0, 2], ids=["full", "lora"])
def whole(request, tmp_path_factory):
    "An uninterrupted run: its configuration, its number of calls, its outcome."
    config, folder = replace(TINY, lora_rank=request.param,
                             token_budget=40 * request.param), tmp_path_factory.mktemp("whole") / "run"
    go(folder, config)
    # counted when everything is imported and warm
    return config, calls(lambda: go(folder.with_name("again"), config)), outcome(folder)


@pytest.mark.parametrize("seed", range(4))
def test_a_killed_run_goes_on_to_the_same_numbers(whole, seed, tmp_path):
    config, n, expected = whole
    rng, folder, kills = random.Random(seed), tmp_path / "run", []
    for _ in range(2):
        # what is cached is not called again
        at = rng.randrange(1000, n * 9 // 10)
        # a resumed run may end before its call `at`
        kills.append(forked(lambda: calls(lambda: go(folder, config), at) and 0))
    assert kills[0] == -signal.SIGKILL
    go(folder, config)
    assert not differences(folder, expected)


@pytest.mark.parametrize("at", [1, 5, 12, 13, 14, 20])
def test_a_run_killed_inside_a_checkpoint_keeps_the_one_before(whole, at, tmp_path, monkeypatch):
    "At the `at`-th time that a file or a folder is synced, or a name is changed, in the second checkpoint."
    config, _, expected = whole
    folder, seen, save = tmp_path / "run", [], Checkpoints.save

    def deadly(f):
        def g(*args, **options):
            if seen: seen.append(1)
            if len(seen) > at: os.kill(os.getpid(), signal.SIGKILL)
            return f(*args, **options)
        return g

    def child():
        folders.to_disk, Path.replace, shutil.rmtree = map(deadly, (folders.to_disk, Path.replace, shutil.rmtree))
        def second(self, step, fill):
            if step == 4: seen.append(1)
            return save(self, step, fill)
        Checkpoints.save = second
        go(folder, config)

    assert forked(child) == -signal.SIGKILL
    good = [p.name for p in Checkpoints(folder).all() if damage(p) is None]
    assert good[0] == "checkpoint-000002" and good == [p.name for p in Checkpoints(folder).all()]
    go(folder, config)
    assert not differences(folder, expected)
    assert not [p for p in folder.iterdir() if p.name.startswith(".checkpoint")]


def test_an_interrupted_evaluation_is_made_again(whole, tmp_path):
    config, _, expected = whole
    folder = tmp_path / "run"

    class Dies:
        def __init__(self, inner): self.inner = inner

        def __call__(self, policy, step):
            numbers = self.inner(policy, step)
            if step == 4: os.kill(os.getpid(), signal.SIGKILL)                      # its row is in the file already
            return numbers

        def rewind(self, step): self.inner.rewind(step)

    assert forked(lambda: go(folder, config, wrap=Dies)) == -signal.SIGKILL
    go(folder, config)
    assert not differences(folder, expected)


@pytest.fixture(autouse=True)
def heard():
    "SIGINT as a terminal has it: a shell's background jobs ignore it, and a run leaves ignored signals alone."
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_step(whole, number, tmp_path):
    config, _, expected = whole
    folder = tmp_path / "run"
    steps = []

    def verify(text, answer):
        steps.append(1)
        if len(steps) == 16 * 2 + 5: os.kill(os.getpid(), number)                  # while step 3 is graded
        return lucky(text, answer)

    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    result = go(folder, config, verify=verify)
    assert result.stopped and result.step == 3 and result.checkpoint.name == "checkpoint-000003"
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    result = go(folder, config)
    assert not result.stopped and [row["step"] for row in result.rows] == [4, 5, 6] and not differences(folder,
        expected)


def test_a_second_signal_interrupts_at_once(tmp_path):
    def verify(text, answer):
        os.kill(os.getpid(), signal.SIGINT); os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0)
        return False

    with pytest.raises(KeyboardInterrupt): go(tmp_path / "run", verify=verify)


def test_without_a_keeper_signals_are_pythons():
    def verify(text, answer): signal.raise_signal(signal.SIGINT)
    config = replace(TINY, save_every=0)
    with pytest.raises(KeyboardInterrupt): train(model(), tokenizer, problems, grpo(), verify=verify, config=config)


@pytest.mark.parametrize("how", ["cut", "flip", "gone", "manifest"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(how, tmp_path, caplog):
    go(tmp_path)
    expected, (before, last) = outcome(tmp_path), Checkpoints(tmp_path).all()
    file = last / ("manifest.json" if how == "manifest" else "state.safetensors")
    data = bytearray(file.read_bytes())
    if how == "flip": data[len(data) // 2] ^= 1
    if how == "gone": file.unlink()
    else: file.write_bytes(data[:-7] if how != "flip" else data)
    assert damage(last) and not damage(before)
    result = go(tmp_path)
    assert "a checkpoint is damaged, " + damage(tmp_path / f"damaged-{last.name}") in caplog.text
    assert before.name in caplog.text
    assert [row["step"] for row in result.rows] == [5, 6] and not differences(tmp_path, expected)


def test_if_all_checkpoints_are_damaged_one_sentence_says_so(tmp_path):
    go(tmp_path)
    for p in Checkpoints(tmp_path).all(): (p / "run.json").unlink()
    with pytest.raises(ValueError, match="no checkpoint in .* is intact"): go(tmp_path)


def limit_files(bytes):
    "No file of this process may grow beyond this: what a full disk looks like to a program."
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes, resource.RLIM_INFINITY))


def test_a_full_disk_ends_the_run_with_a_sentence_and_the_last_checkpoint(tmp_path):
    "The third checkpoint does not fit; after room was made, the run goes on to the same numbers."
    go(tmp_path / "whole")
    folder = tmp_path / "run"

    def verify(text, answer):
        if verify.calls == 16 * 4: limit_files(2000)
        verify.calls += 1
        return lucky(text, answer)

    def child():
        verify.calls = 0
        try: go(folder, verify=verify)
        except CheckpointFailed as e: said = str(e)
        limit_files(-1)
        (tmp_path / "said").write_text(said)

    assert forked(child) == 0
    said = (tmp_path / "said").read_text()
    assert said.startswith("the checkpoint of step 6 could not be written: ")
    assert "File too large" in said and "\n" not in said
    assert [p.name for p in Checkpoints(folder).all()] == ["checkpoint-000002", "checkpoint-000004"]
    assert not [p for p in folder.iterdir() if p.name.startswith(".checkpoint")]
    go(folder)
    assert not differences(folder, outcome(tmp_path / "whole"))


def test_a_full_disk_under_the_log(tmp_path):
    def child():
        # what pytest captures is a file, too
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        # config.json, and a few rows of the log
        limit_files(2000)
        try: run(settings(RunConfig, SHORT | {"save_every": 40, "steps": 40}), tmp_path / "run")
        except Broken as e: said = str(e)
        limit_files(-1)
        (tmp_path / "said").write_text(said)

    assert forked(child) == 0
    said = (tmp_path / "said").read_text()
    assert "File too large" in said and said.endswith("there is no checkpoint yet") and "\n" not in said


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody who may not write")
def test_a_folder_that_cannot_be_written(tmp_path):
    tmp_path.chmod(0o755)
    (tmp_path / "theirs").mkdir(mode=0o755)

    def child():
        os.setgid(65534); os.setuid(65534)
        said = []
        for out in (tmp_path / "theirs", tmp_path / "theirs" / "new"):
            try: check_free(out)
            except OSError as e: said.append(str(e))
        return 0 if all(s == f"{o} cannot be written: Permission denied" for s,
                        o in zip(said, (tmp_path / "theirs", tmp_path / "theirs" / "new"), strict=True)) else 3

    for p in tmp_path.parents: p.stat().st_mode & 0o5 == 0o5 or p.chmod(p.stat().st_mode | 0o5)
    assert forked(child) == 0 and not list((tmp_path / "theirs").iterdir())


def test_two_processes_do_not_share_a_folder(tmp_path):
    ready, done = os.pipe(), os.pipe()

    def child():
        with Checkpoints(tmp_path):
            os.write(ready[1], b"x"); os.read(done[0], 1)

    def other(pid):
        os.read(ready[0], 1)
        with pytest.raises(BlockingIOError,
                           match=f"{tmp_path} is in use by process {pid}; two runs cannot share a folder"): go(tmp_path)
        os.kill(pid, signal.SIGKILL)

    assert forked(child, other) == -signal.SIGKILL
    go(tmp_path)                                                                    # the lock went with its holder


@pytest.mark.parametrize("change, words", [
    (dict(data=problems[:-1]), "the problems are others"),
    (dict(recipe=capo(.6, 1.5, 20.)), "tau was 0.5 and is 0.6"), (dict(recipe=grpo()), "name was capo and is grpo"),
    (dict(config=replace(TINY, lr=2e-2)), "lr was 0.01 and is 0.02"),
    (dict(config=replace(TINY, steps=8)), "steps was 6 and is 8"), (dict(policy="other"), "the model is another")],
    ids=["data", "recipe's parameter", "recipe", "learning rate", "steps", "model"])
def test_a_change_between_stop_and_resume_is_refused_unless_accepted(change, words, tmp_path, caplog):
    go(tmp_path)
    if "policy" in change:
        change["policy"] = model()
        with torch.no_grad(): change["policy"].model.norm.weight[3] += .1
    before = outcome(tmp_path)
    with pytest.raises(ValueError, match=words): go(tmp_path, **change)
    assert not differences(tmp_path, before)
    go(tmp_path, **change, accept_changes=True)
    assert words in caplog.text


def test_how_often_to_save_may_change(tmp_path):
    go(tmp_path)
    assert go(tmp_path, replace(TINY, save_every=3, keep=1)).rows == []


def test_checkpoints_of_another_run_are_not_mixed_in(tmp_path):
    go(tmp_path)
    with pytest.raises(FileExistsError, match="resume it, or name a new folder"): go(tmp_path, resume=False)
    with pytest.raises(ValueError, match="save_every is 0"): go(tmp_path, replace(TINY, save_every=0))


def fails_on(n, how):
    "A verifier that fails on its n-th response."
    seen = []

    def verify(text, answer):
        seen.append(text)
        if len(seen) == n: how()
        return lucky(text, answer)
    return verify


def hang():
    while True: pass


@pytest.mark.parametrize("how", [lambda: 1 / 0, hang, lambda: __import__("re").match(r"(a+)+b", "a" * 50)],
                         ids=["raises", "loops", "backtracks"])
def test_a_verifier_that_fails_on_one_response(how, tmp_path, caplog):
    config, before = replace(TINY, steps=2, verify_seconds=.3), signal.getsignal(signal.SIGALRM)
    rows = go(tmp_path / "run", config, verify=fails_on(20, how)).rows
    assert [row["unverified"] for row in rows] == [0, 1] and "the verifier failed" in caplog.text
    assert signal.getsignal(signal.SIGALRM) == before


def test_a_verifier_that_always_fails_is_said_to():
    def verify(text, answer): raise KeyError("answer")
    said = "the verifier failed on all 16 responses of a step, the last time with KeyError: 'answer'"
    with pytest.raises(ValueError, match=said):
        train(model(), tokenizer, problems, grpo(), verify=verify, config=replace(TINY, save_every=0))


def test_nan_from_the_model_at_a_step(tmp_path):
    "While sampling step 5: the run ends as broken, with the last checkpoint named by the sentence of `run`."
    policy = model()

    def verify(text, answer):
        verify.calls += 1
        if verify.calls == 16 * 4:
            with torch.no_grad(): policy.model.norm.weight[0] = math.nan
        return lucky(text, answer)

    verify.calls = 0
    with pytest.raises(NonFiniteLoss, match="the loss of step 4 is nan"): go(tmp_path, policy=policy, verify=verify)
    assert (tmp_path / "bad_step_4.pt").exists() and [p.name
                                                      for p in Checkpoints(tmp_path).all()] == ["checkpoint-000002"]
    bad = model()
    with torch.no_grad(): bad.model.norm.weight[0] = math.nan
    with pytest.raises(NonFiniteLoss, match="sampling of step 1 failed: the model gives NaN"): go(tmp_path / "new",
        policy=bad, wrap=lambda f: None)


def test_a_broken_run_names_its_last_checkpoint(tmp_path, monkeypatch):
    seen = []

    def bad(loss, norm, step, *args):
        seen.append(step)
        if step == 3: raise NonFiniteLoss("the loss of step 3 is nan")

    monkeypatch.setattr(training, "check_update", bad)
    out = tmp_path / "run"
    with pytest.raises(NonFiniteLoss) as e: run(settings(RunConfig, SHORT), out)
    last = out / "checkpoint-000002"
    said = f"the loss of step 3 is nan; the last checkpoint is {last}, go on by: capo train --resume {out}"
    assert str(e.value) == said


def test_the_generators_go_on_where_they_were():
    draw = lambda: [random.random(), random.gauss(0, 1), numpy.random.rand(), numpy.random.randn(),
                    torch.rand(1).item()]
    # each keeps a second normal number for the next call
    random.gauss(0, 1); numpy.random.randn()
    state = keep.random_state()
    first = draw()
    assert draw() != first
    keep.set_random_state(state)
    assert draw() == first


def test_nothing_in_a_checkpoint_is_code(tmp_path):
    go(tmp_path, replace(TINY, lora_rank=2))
    kinds = {p.suffix for p in Checkpoints(tmp_path).all()[-1].rglob("*") if p.is_file()}
    assert kinds <= {".safetensors", ".json", ".md", ".jinja"}
