"Two processes, as `accelerate launch` and `torchrun` start them, make the update of one."
import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = """
import sys, torch
torch.set_num_threads(1)
from capo.recipe import capo
from capo.rollout import HFSampler
from capo.task import arithmetic, arithmetic_tokenizer, tiny_lm
from capo.folder import CSVLog
from capo.processes import join_processes, processes
from capo.keep import keeping
from capo.train import TrainConfig, train
from pathlib import Path

out, tokenizer, policy = Path(sys.argv[1]), arithmetic_tokenizer(), tiny_lm(16, 1, 2)
with torch.no_grad(): policy.model.embed_tokens.weight.mul_(8)
join_processes()
rank = processes()[0]
if rank == 0: out.mkdir()
config = TrainConfig(steps=3, questions=5, group_size=4, updates=2, epochs=2, lr=1e-3, kl=.1, token_budget=60, save_every=2, temperature=1.)
log, recipe, problems = CSVLog(out / "log.csv") if rank == 0 else None, capo(.5, 1.5, 20.), arithmetic(40)
with keeping(out, policy, problems, recipe, config) as keeper:
    result = train(policy, tokenizer, problems, recipe, verify=lambda text, answer: "7" in text, config=config, log=log,
                   evaluate=lambda policy, step: {"rank": rank}, keeper=keeper)
torch.save({k: (p.detach(), p.grad) for k, p in result.model.named_parameters()}, f"{out}-{rank}.pt")
assert (result.evals != []) == (rank == 0) and result.step == 3
"""
ONE = [sys.executable]
LAUNCHERS = {"torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
             "accelerate": [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]}


def launch(command, folder, name):
    (folder / "script.py").write_text(SCRIPT)
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(folder / "script.py"), str(folder / name)], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    with (folder / name / "log.csv").open() as f: return [{k: float(v) for k, v in row.items() if k != "seconds"} for row in csv.DictReader(f)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    return folder, launch(ONE, folder, "one"), torch.load(folder / "one-0.pt")


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_make_the_update_of_one(launcher, alone):
    folder, expected, weights = alone
    rows = launch(LAUNCHERS[launcher], folder, launcher)
    assert [p.name for p in sorted((folder / launcher).glob("checkpoint-*"))] == ["checkpoint-000002", "checkpoint-000003"]
    found = [torch.load(f"{folder / launcher}-{rank}.pt") for rank in (0, 1)]
    for k, (p, grad) in weights.items():
        for f in found:
            torch.testing.assert_close(f[k][0], p, rtol=0, atol=1e-5)
            torch.testing.assert_close(f[k][1], grad, rtol=0, atol=1e-5)
        assert found[0][k][0].equal(found[1][k][0])                                # and both have the same, to the last bit
    for a, b in zip(rows, expected, strict=True): assert a == pytest.approx(b, rel=1e-4, abs=1e-5, nan_ok=True)
