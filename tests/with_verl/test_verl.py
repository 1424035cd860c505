"In an environment with verl (make test-verl): the plugin as verl finds it, on verl's own batch and functions."
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

verl = pytest.importorskip("verl")
from omegaconf import OmegaConf  # noqa: E402
from verl import DataProto  # noqa: E402
from verl.trainer.ppo import core_algos, ray_trainer  # noqa: E402
from verl.trainer.ppo.v1 import utils  # noqa: E402

from capo import capo_advantage, mean_logp, noise_mask, perplexity  # noqa: E402

ROOT = Path(__file__).parents[2]
CONFIG = OmegaConf.create({"capo": {"tau": .5, "ref_low": 1.2, "ref_high": 2.}})
PROBE = """
import verl
from verl.trainer.ppo import core_algos, ray_trainer
from verl.trainer.ppo.v1 import utils
print("capo" in core_algos.ADV_ESTIMATOR_REGISTRY, hasattr(ray_trainer.compute_advantage, "capo"),
      hasattr(utils.compute_advantage, "capo"))
"""


def data(B=3, G=4, T=5, seed=0):
    "A batch as verl's trainer has it, and its lpm, correct, reference perplexity (B, G)."
    g = torch.Generator().manual_seed(seed)
    mask = (torch.rand(B * G, T, generator=g) < .8).long()
    mask[:, 0] = 1
    old, ref = (-torch.rand(B * G, T, generator=g) for _ in range(2))
    score = torch.zeros(B * G, T)
    score[:, 0] = (torch.rand(B * G, generator=g) < .5).float()
    tensors = dict(response_mask=mask, old_log_probs=old, ref_log_prob=ref, token_level_scores=score,
                   token_level_rewards=score, responses=mask, attention_mask=mask)
    names = np.array([f"q{i // G}" for i in range(B * G)], dtype=object)
    batch = DataProto.from_dict(tensors=tensors, non_tensors={"uid": names})
    return batch, *(x.view(B, G) for x in (mean_logp(old, mask), score.sum(1) > .5, perplexity(ref, mask)))


def want(lpm, correct, ppl, tau=.5, low=1.2, high=2.):
    return (capo_advantage(lpm, correct, tau) * noise_mask(ppl, correct, low, high)).flatten()


def test_verl_finds_the_plugin_in_a_fresh_process():
    said = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, cwd="/", timeout=300)
    assert said.stdout.split()[-3:] == ["True"] * 3, said.stderr[-2000:]


def test_the_advantage_by_verls_own_function():
    batch, *columns = data()
    out = ray_trainer.compute_advantage(batch, adv_estimator="capo", config=CONFIG)
    mask = batch.batch["response_mask"]
    torch.testing.assert_close(out.batch["advantages"], want(*columns)[:, None] * mask, rtol=0, atol=1e-6)
    torch.testing.assert_close(out.batch["returns"], out.batch["advantages"])


def test_the_order_of_a_batch_does_not_matter():
    batch, *columns = data()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    out = ray_trainer.compute_advantage(batch.select_idxs(order), adv_estimator="capo", config=CONFIG)
    found = out.batch["advantages"].sum(1) / out.batch["response_mask"].sum(1)
    torch.testing.assert_close(found, want(*columns)[order], rtol=0, atol=1e-6)


def test_the_path_of_the_trainer():
    batch, *columns = data()
    keys = [f"q{i // 4}_{i % 4}_0" for i in range(12)]
    out = utils.compute_advantage_for_multi_trajectories(batch, keys, "capo", config=CONFIG)
    found = out.batch["advantages"].sum(1) / out.batch["response_mask"].sum(1)
    torch.testing.assert_close(found, want(*columns), rtol=0, atol=1e-6)


def test_other_estimators_are_verls_own():
    batch, _, correct, _ = data()
    ray_trainer.compute_advantage(batch, adv_estimator=core_algos.AdvantageEstimator.GRPO, config=CONFIG)
    reward = correct.float()
    centred = (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-6)
    found = batch.batch["advantages"].sum(1) / batch.batch["response_mask"].sum(1)
    torch.testing.assert_close(found.view(3, 4), centred, rtol=0, atol=1e-5)


def test_a_missing_reference_names_the_settings():
    batch, *_ = data()
    batch.batch.pop("ref_log_prob")
    with pytest.raises(ValueError, match="use_kl_loss=True"):
        ray_trainer.compute_advantage(batch, adv_estimator="capo", config=CONFIG)


def test_the_papers_command_line_is_one_that_verl_reads():
    from hydra import compose, initialize_config_dir
    text = "\n".join("".join(c["source"]) for c in json.loads((ROOT / "nbs/51_verl.ipynb").read_text())["cells"])
    command = re.search(r"main_ppo \\\n(.*?)```", text, re.S)[1].replace("\\\n", " ").split()
    with initialize_config_dir(str(Path(verl.__file__).parent / "trainer/config"), version_base=None):
        config = compose("ppo_trainer", overrides=command)
    assert config.algorithm.adv_estimator == "capo" and config.algorithm.capo.tau == .6
    actor = config.actor_rollout_ref.actor
    assert actor.loss_agg_mode == "seq-mean-token-mean" and actor.use_kl_loss and actor.kl_loss_coef == 0
    assert config.actor_rollout_ref.rollout.n == 8 and config.data.train_batch_size == 128


def test_a_worker_of_ray_has_the_plugin_too():
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        @ray.remote
        def probe():
            import verl  # noqa: F401
            from verl.trainer.ppo import core_algos
            return "capo" in core_algos.ADV_ESTIMATOR_REGISTRY
        assert ray.get(probe.remote(), timeout=300)
    finally: ray.shutdown()
