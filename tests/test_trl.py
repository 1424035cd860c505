"CAPO in TRL's trainer, in every mode of TRL that changes how a batch is made; TRL's own methods beside our recipes."
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from capo.advantage import pairwise_advantage
from capo.baselines import method
from capo.mask import noise_mask
from capo.surrogate import logistic
from capo.task import arithmetic, arithmetic_tokenizer, tiny_lm
from helpers import rollouts

pytest.importorskip("trl")
from capo.trl import CAPOConfig, CAPOTrainer, Thresholds, numbers, summaries  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
tokenizer, problems = arithmetic_tokenizer(), arithmetic(64, seed=0)
DATA = Dataset.from_dict({"prompt": [p.prompt for p in problems], "answer": [p.answer for p in problems]})


def every_other(completions, **_):
    "A reward that makes every group mixed, whatever is sampled."
    return [float(i % 2) for i in range(len(completions))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A random model on disk, from where TRL loads its reference."
    path = tmp_path_factory.mktemp("model")
    model = tiny_lm(16, 1, 2)
    with torch.no_grad(): model.model.embed_tokens.weight.mul_(8)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def trainer(folder, out, peft=None, reward=every_other, **options):
    from transformers import AutoModelForCausalLM
    common = dict(output_dir=str(out), per_device_train_batch_size=8, num_generations=4, max_completion_length=8,
                  report_to=[], save_strategy="no", bf16=False, use_cpu=True, disable_tqdm=True, max_steps=2, seed=3,
                  tau=.5, ref_low=1.5, ref_high=20., learning_rate=1e-2, logging_steps=1, lr_scheduler_type="constant")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        args = CAPOConfig(**common | options)
        return CAPOTrainer(model, reward, args, train_dataset=DATA, processing_class=tokenizer, peft_config=peft)


def watch(run):
    "Train, and keep what each generated batch was given."
    seen, score = [], run._scored

    def scored(out):
        seen.append((out, score(out)))
        return seen[-1][1]

    run._scored = scored
    run.train()
    return seen


def want(batch, low=1.5, high=20., tau=.5):
    advantage = pairwise_advantage(batch.lpm.nan_to_num(), batch.reward, logistic(tau), batch.valid)
    return advantage * noise_mask(batch.ref_ppl, batch.reward, low, high)


def same(out, batch, **thresholds):
    "The advantages in the dictionary are the formula's; they are shuffled later, in copies."
    torch.testing.assert_close(out["advantages"], want(batch, **thresholds).flatten(), rtol=0, atol=1e-6)


LORA = dict(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
MODES = {"plain": {}, "accumulation": dict(gradient_accumulation_steps=2), "two iterations": dict(num_iterations=2),
         "old log-probabilities": dict(steps_per_generation=3), "truncated": dict(mask_truncated_completions=True),
         "a divergence": dict(beta=.1), "quantiles": dict(ref_quantile=.25, quantile_batches=1)}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("mode", MODES)
def test_advantages_are_the_formulas(folder, tmp_path, mode, lora):
    from peft import LoraConfig
    run = trainer(folder, tmp_path, LoraConfig(**LORA) if lora else None, **MODES[mode])
    seen = watch(run)
    assert run.beta == MODES[mode].get("beta", 0) == run.args.beta
    thresholds = dict(low=run.thresholds.low, high=run.thresholds.high)
    for out, batch in seen:
        assert batch.lpm.shape[1] == 4
        same(out, batch, **thresholds)
    first, batch = seen[0]
    ref = first["ref_per_token_logps"] * first["completion_mask"]
    lpm = (ref.sum(1) / first["completion_mask"].sum(1).clamp(min=1)).view_as(batch.lpm)
    # before the first step the policy is the reference
    torch.testing.assert_close(batch.lpm.nan_to_num(), lpm, rtol=0, atol=1e-4)
    assert run.state.global_step == 2 and all((b.reward.sum(1) == b.valid[:, 1::2].sum(1)).all() for _, b in seen)


def test_without_a_mask_no_reference_is_asked(folder, tmp_path):
    run = trainer(folder, tmp_path, ref_low=1., ref_high=float("inf"))
    seen = watch(run)
    assert run.ref_model is None and all("ref_per_token_logps" not in out for out, _ in seen)
    for out, batch in seen:
        advantage = pairwise_advantage(batch.lpm, batch.reward, logistic(.5), batch.valid).flatten()
        torch.testing.assert_close(out["advantages"], advantage, rtol=0, atol=1e-6)


def test_the_table_of_completions_shows_what_was_used(folder, tmp_path):
    run = trainer(folder, tmp_path)
    out, _ = watch(run)[-1]
    assert list(run._logs["advantages"])[-8:] == pytest.approx(out["advantages"].tolist(), abs=1e-6)


def test_a_reward_that_is_missing_leaves_the_pairs(folder, tmp_path):
    def some(completions, **_): return [None if i == 2 else float(i % 2) for i in range(len(completions))]
    seen = watch(trainer(folder, tmp_path, reward=some))
    assert all((~batch.valid).sum() == 1 for _, batch in seen)
    assert all((out["advantages"].view_as(batch.lpm)[~batch.valid] == 0).all() for out, batch in seen)


def test_a_resumed_run_masks_as_before(folder, tmp_path):
    options = dict(ref_quantile=.25, quantile_batches=2, save_strategy="steps", save_steps=1, max_steps=3)
    whole = trainer(folder, tmp_path / "a", **options)
    whole.train()
    state = json.loads((tmp_path / "a/checkpoint-1/capo.json").read_text())
    assert len(state["seen"]) == 1
    again = trainer(folder, tmp_path / "b", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-2"))
    assert (again.thresholds.low, again.thresholds.high) == (whole.thresholds.low, whole.thresholds.high)
    weights = [dict(run.model.named_parameters()) for run in (whole, again)]
    for k, x in weights[0].items(): torch.testing.assert_close(x, weights[1][k], rtol=0, atol=1e-6)


def test_thresholds_stay_after_the_first_batches():
    lpm, reward, ppl = torch.zeros(1, 4), torch.tensor([[1., 1, 0, 0]]), torch.tensor([[2., 4., 1., 3.]])
    some, other = (summaries(lpm, reward, reward > -1, -x.log()) for x in (ppl, ppl + 5))
    options = dict(ref_quantile=.25, quantile_batches=1, use_cpu=True, bf16=False, report_to=[])
    t = Thresholds(CAPOConfig(output_dir="x", **options))
    assert t.update(some) == pytest.approx((1.5, 3.5)) == t.update(other)


def test_numbers_that_do_not_exist_are_left_out():
    batch = summaries(torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1, 2).bool())
    assert set(numbers(batch, (1.05, 2.5))) == {"mixed_groups", "lpm_correct"}


SCRIPT = """
import json, sys, torch
sys.path[:0] = {path!r}
from test_trl import trainer, watch
run = trainer({model!r}, {out!r}, per_device_train_batch_size=2, num_generations=4, max_steps=2)
seen = watch(run)
rows = [dict(lpm=b.lpm.tolist(), reward=b.reward.tolist(), valid=b.valid.tolist(), ref=b.ref_logp[..., 0].tolist(),
             mine=o["advantages"].tolist()) for o, b in seen]
json.dump(rows, open({out!r} + f"/{{run.accelerator.process_index}}.json", "w"))
"""


def test_groups_that_straddle_two_processes(folder, tmp_path):
    "Groups of 4, two completions on each of two processes."
    script = tmp_path / "script.py"
    root = Path(__file__).parents[1]
    script.write_text(SCRIPT.format(path=[str(root), str(root / "tests")], model=str(folder), out=str(tmp_path)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    run = subprocess.run(launch, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{i}.json").read_text()) for i in (0, 1))
    for a, b in zip(first, second):
        assert a["lpm"] == b["lpm"] and a["reward"] == b["reward"]
        batch = summaries(*(torch.tensor(a[k]) for k in ("lpm", "reward", "valid", "ref")))
        found = torch.tensor(a["mine"] + b["mine"])
        torch.testing.assert_close(found, want(batch).flatten(), rtol=0, atol=1e-6)


def test_unsloth_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "unsloth", sys)
    with pytest.raises(ValueError, match="unsloth rewrites"): trainer(folder, tmp_path)


def test_without_trl_one_sentence_says_what_to_install():
    code = "import sys; sys.modules['trl'] = None\ntry: import capo.trl\nexcept ImportError as e: print(e)"
    said = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=Path(__file__).parents[1])
    assert "capo.trl needs TRL: pip install" in said


def rarely(completions, **_): return [float(i in (0, 5, 6)) for i in range(len(completions))]
def signed(completions, **_): return [2 * x - 1 for x in rarely(completions)]


# Our method, and how TRL is told to do the same with the numbers of the method's source.
THEIRS = {"grpo": dict(loss_type="grpo"), "dr_grpo": dict(loss_type="dr_grpo", scale_rewards="none"),
          "dapo": dict(loss_type="dapo", epsilon_high=.28, delta=10.),
          "gspo": dict(loss_type="grpo", importance_sampling_level="sequence", epsilon=3e-4, epsilon_high=4e-4),
          "cispo": dict(loss_type="cispo", epsilon_high=5.)}
LONGEST = {"dr_grpo": dict(longest=8)}


@pytest.fixture(scope="module", params=THEIRS)
def rival(request, folder, tmp_path_factory):
    "A method's name, our recipe, TRL's own trainer."
    from transformers import AutoModelForCausalLM
    from trl import GRPOConfig, GRPOTrainer
    args = GRPOConfig(output_dir=str(tmp_path_factory.mktemp("out")), per_device_train_batch_size=8, num_generations=4,
                      max_completion_length=8, report_to=[], save_strategy="no", bf16=False, use_cpu=True, max_steps=1,
                      disable_tqdm=True, seed=3, **THEIRS[request.param])
    reward = signed if request.param == "dapo" else rarely
    run = GRPOTrainer(AutoModelForCausalLM.from_pretrained(folder), reward_funcs=[reward], args=args,
                      train_dataset=DATA, processing_class=tokenizer)
    return method(request.param, **LONGEST.get(request.param, {})), run


def theirs(run, logp, old, advantage, mask):
    "TRL's loss of log-probabilities that are given to it."
    def given(*args, **options): return (logp, torch.zeros_like(logp), None)[:2 + ("compute_aux_loss" in options)]
    run._get_per_token_logps_and_entropies = given
    ids = torch.zeros_like(mask)
    inputs = dict(prompt_ids=ids[:, :1], prompt_mask=ids[:, :1] + 1, completion_ids=ids, completion_mask=mask,
                  advantages=advantage, old_per_token_logps=old, num_items_in_batch=mask.sum())
    return run._compute_loss(run.model.eval(), inputs)


@pytest.mark.parametrize("far", [1e-3, .3, 3.])  # the scale of GSPO's clip, of PPO's, of the dual one
@pytest.mark.parametrize("seed", range(5))
def test_losses_and_gradients_are_trls(rival, far, seed):
    (recipe, run), g = rival, torch.Generator().manual_seed(seed)
    mask = (torch.arange(8) < torch.randint(1, 9, (12, 1), generator=g)).long()
    old = -2 * torch.rand(12, 8, generator=g, dtype=torch.float64)
    logp = (old + far * torch.randn(12, 8, generator=g, dtype=torch.float64)).requires_grad_()
    advantage = torch.randn(12, generator=g, dtype=torch.float64)
    both = [f(logp, old, advantage, mask) for f in (recipe.loss, lambda *given: theirs(run, *given))]
    torch.testing.assert_close(*both, rtol=0, atol=1e-6)
    slopes = [torch.autograd.grad(loss, logp)[0] for loss in both]
    torch.testing.assert_close(*slopes, rtol=0, atol=1e-6)
    assert slopes[0].abs().max() > 1e-3 and (slopes[0][mask == 0] == 0).all()


def test_advantages_are_trls(rival):
    recipe, run = rival
    vars(run).pop("_get_per_token_logps_and_entropies", None)
    seen, score = [], run._generate_and_score_completions
    run._generate_and_score_completions = lambda inputs: seen.append(score(inputs)) or seen[-1]
    run.train()
    right = torch.tensor(rarely(range(8))).view(2, 4)
    ours = recipe.advantage(rollouts(torch.full((2, 4), -1.), right.bool()), 1)
    torch.testing.assert_close(seen[0]["advantages"].view(2, 4).float(), ours, rtol=0, atol=1e-6)
