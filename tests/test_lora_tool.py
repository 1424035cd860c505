"The script that tries adapters on the small model: its rule, and its jobs."
from lora import RANKS, RATES, REPORTED, TUNING, chosen, job


def test_the_rate_of_the_highest_accuracy_by_arm_and_rank():
    rows = [{"arm": arm, "rank": rank, "lr": lr, "accuracy": accuracy} for arm, rank, lr, accuracy in (
        ("grpo", 2, .1, .3), ("grpo", 2, .2, .4), ("grpo", 8, .1, .5), ("capo", 2, .1, .6), ("capo", 2, .2, .2))]
    assert chosen(rows) == {("grpo", 2): .2, ("grpo", 8): .1, ("capo", 2): .1}


def test_jobs_have_folders_of_their_own(tmp_path):
    jobs = [job(tmp_path, c, arm, rank, lr, 1) for c in (TUNING, REPORTED) for arm in ("grpo", "capo")
            for rank in RANKS for lr in RATES]
    assert len({j.folder for j in jobs}) == len(jobs) and {j.base for j in jobs} == {str(tmp_path/"base-1")}
    assert {(j.config.lora_rank, j.config.lr) for j in jobs} == {(r, x) for r in RANKS for x in RATES}
    assert all(j.make().name == j.arm and j.config.seed == 1 for j in jobs)
