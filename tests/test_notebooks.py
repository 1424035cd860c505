"Each notebook runs once, in a process of its own, by nbdev_test, within its time limit."
import os, subprocess, sys
from pathlib import Path

import pytest

NBS = Path(__file__).parents[1]/"nbs"
SECONDS = {
    "00_calibration.ipynb": 180,
    "01_surrogate.ipynb": 180,
    "02_logprob.ipynb": 180,
    "03_grpo.ipynb": 180,
    "04_advantage.ipynb": 180,
    "05_mask.ipynb": 180,
    "06_misalignment.ipynb": 180,
    "07_limits.ipynb": 180,
    "08_tree.ipynb": 180,
    "09_sampling.ipynb": 180,
    "10_answer.ipynb": 180,
    "11_task.ipynb": 180,
    "12_rollout.ipynb": 180,
    "13_logs.ipynb": 60,
    "14_data.ipynb": 180,
    "18_page.ipynb": 60,
    "19_interval.ipynb": 180,
    "20_vote.ipynb": 180,
    "21_selective.ipynb": 180,
    "22_responses.ipynb": 180,
    "23_evaluate.ipynb": 180,
    "24_report.ipynb": 180,
    "27_policy.ipynb": 180,
    "28_folder.ipynb": 180,
    "25_batches.ipynb": 180,
    "29_keep.ipynb": 180,
    "30_recipe.ipynb": 180,
    "31_baselines.ipynb": 60,
    "32_train.ipynb": 300,
    "33_run.ipynb": 300,
    "34_compare.ipynb": 300,
    "40_tiny_lm.ipynb": 300,
    "41_ablations.ipynb": 120,
    "42_smollm2.ipynb": 300,
    "43_trust.ipynb": 180,
    "44_qwen.ipynb": 180,
    "50_trl.ipynb": 180,
    "51_verl.ipynb": 180,
    "60_cli.ipynb": 300,
    "index.ipynb": 180,
}


def test_every_notebook_is_listed():
    assert sorted(SECONDS) == sorted(p.name for p in NBS.glob("*.ipynb") if p.name[0] not in "_.")


@pytest.mark.parametrize("name", SECONDS)
def test_notebook(name):
    nbdev_test = Path(sys.executable).with_name("nbdev_test")
    run = subprocess.run([nbdev_test, "--path", NBS/name], cwd=NBS, timeout=SECONDS[name], capture_output=True,
                         text=True,
                         # two threads that wait for each other are slower than one
                         env=os.environ | {"OMP_NUM_THREADS": "1"})
    # It exits 0 when it finds nothing to run, too: hence the word.
    assert run.returncode == 0 and "Success." in run.stdout, run.stdout + run.stderr
