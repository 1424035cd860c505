"The update in parts and in low precision, schedules, the KL, weights of tokens; settings by file and command line."
import json
import math
import sys
from dataclasses import fields, replace
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch

from capo import cli
from capo.grpo import clipped_loss, kl_penalty
from capo.recipe import Recipe, capo, grpo, grpo_size, together
from capo.folder import LOGS, Checkpoints, Logs, TensorBoardLog, settings
from capo.rollout import HFSampler, cut_by_tokens, parts, rollout, rollout_logps, score
from capo.keep import keeping
from capo.run import RunConfig, run as run_folder
from capo.train import Learner, TrainConfig, accumulate, batches, learning_rate, prepare, train
from capo.tree import can_share
from helpers import has_a_seven, model, problems, run, small, tokenizer, weights


def rollouts(n=6, **options):
    r = rollout(HFSampler(model(), tokenizer, 16, **options), problems[:n], 4, has_a_seven)
    return replace(r, ref_logp=(r.logp - .1) * r.mask,
                   weight=torch.rand(r.mask.shape, generator=torch.Generator().manual_seed(0)) * r.mask)


def test_the_default_loop_is_the_plain_one():
    "Written out: sample, advantage, two halves, AdamW. Every weight is equal to the last bit where no advantage is 0."
    config, policy, advantage = replace(small, updates=2), model(), lambda r, step: grpo().advantage(r, step) + .125
    result = run(replace(grpo(), advantage=advantage), config)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr, weight_decay=0., fused=True)
    sampler = HFSampler(policy, tokenizer, 16)
    for step, batch in enumerate(batches(problems, config), 1):
        r = rollout(sampler, batch, 4, has_a_seven, seed=step)
        A = advantage(r, step)
        for i, j in ((0, 3), (3, 6)):
            logp, old, mask = (x.flatten(0, 1) for x in (rollout_logps(policy, r[i:j]), r[i:j].old_logp, r[i:j].mask))
            optimizer.zero_grad(); clipped_loss(logp, old, A[i:j].flatten(), mask).backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.)
            optimizer.step()
    assert all(p.equal(q) for p, q in zip(policy.parameters(), result.model.parameters()))


def gradient(recipe, r, double=True, **options):
    config = TrainConfig(**options)
    policy = prepare(model().double() if double else model(), config)
    learner = Learner(policy, config)
    numbers = accumulate(policy, learner, recipe, r, recipe.advantage(r, 1), config)
    return torch.cat([g.flatten() for g in learner.gradients()]), numbers


token_mean = Recipe("tokens", grpo().advantage, lambda logp, old, A, mask,
                    weight=None: -(logp * mask * A[:, None]).sum() / mask.sum(), count=lambda mask: mask.sum())


@pytest.mark.parametrize("recipe", [grpo(), capo(.5, 1.5, 20., grpo_size), token_mean], ids=lambda r: r.name)
@pytest.mark.parametrize("options",
                         [dict(token_budget=1), dict(token_budget=60), dict(token_budget=60, recompute=True),
                          dict(recompute=True)], ids=str)
def test_the_sum_over_parts_is_the_gradient_of_the_whole(recipe, options):
    r = rollouts()
    whole, numbers = gradient(recipe, r, kl=.3)
    again, numbers_again = gradient(recipe, r, kl=.3, **options)
    assert whole.norm() > 1e-2
    torch.testing.assert_close(again, whole, rtol=0, atol=1e-6)
    assert numbers_again == pytest.approx(numbers, abs=1e-6)


@pytest.mark.parametrize("recipe", [grpo(), capo(.5, 1.5, 20., grpo_size), token_mean], ids=lambda r: r.name)
@pytest.mark.parametrize("budget", [0, 60])
def test_what_has_no_advantage_is_not_computed_and_changes_nothing(recipe, budget):
    r, policy, read = rollouts(12), model().double(), []
    A = recipe.advantage(r, 1).flatten()
    assert 0 < (A == 0).sum() < len(A)
    logp, old, mask, w = (x.flatten(0, 1) for x in (rollout_logps(policy, r), r.old_logp, r.mask, r.weight))
    recipe.loss(logp, old, A, mask, weight=w).backward()
    config = TrainConfig(token_budget=budget)
    fast = prepare(model().double(), config)
    can_share(fast)
    fast.model.layers[0].mlp.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0].shape[1]))
    learner = Learner(fast, config)
    accumulate(fast, learner, recipe, r, A.view_as(r.reward), config)
    found = torch.cat([g.flatten() for g in learner.gradients()])
    torch.testing.assert_close(found, torch.cat([p.grad.flatten() for p in policy.parameters()]), rtol=0, atol=1e-7)
    taught = (A != 0).view_as(r.reward)
    asked = r.prompt_mask.sum(-1)[taught.any(1)].sum()
    rows = {(b, *ids[m.bool()].tolist()) for b in range(12) for ids, m,
            t in zip(r.response_ids[b], r.mask[b], taught[b]) if t}
    # a beginning that responses share is read once, and their last token is not
    beginnings = {row[:n] for row in rows for n in range(2, len(row))}
    if not budget: assert sum(read) == asked + len(beginnings)
    read.clear()
    learner.clear()
    numbers = accumulate(fast, learner, recipe, r, torch.zeros_like(r.reward), config)
    assert not read and numbers["loss"] == 0 and all((g == 0).all() for g in learner.gradients())


def test_a_gradient_by_hand_with_weights_and_kl():
    r, policy = rollouts(), model().double()
    found, numbers = gradient(grpo(), r, kl=.3, token_budget=50)
    logp, old, mask, ref, w = (x.flatten(0, 1)
                               for x in (rollout_logps(policy, r), r.old_logp, r.mask, r.ref_logp, r.weight))
    loss, kl = clipped_loss(logp, old, grpo().advantage(r, 1).flatten(), mask, weight=w), kl_penalty(logp, ref, mask)
    (loss + .3 * kl).backward()
    torch.testing.assert_close(found, torch.cat([p.grad.flatten() for p in policy.parameters()]), rtol=0, atol=1e-7)
    assert numbers["loss"] == pytest.approx(loss.item(), abs=1e-6) and numbers["kl"] == pytest.approx(kl.item(),
        abs=1e-6) and kl > 0


def test_recomputation_runs_each_layer_twice_and_leaves_dropout_off():
    counts = []
    for recompute in (False, True):
        config, seen = TrainConfig(recompute=recompute), []
        policy = prepare(model(), config)
        policy.model.layers[0].mlp.register_forward_pre_hook(lambda module, inputs: seen.append(module.training))
        accumulate(policy, Learner(policy, config), grpo(), rollouts(), grpo().advantage(rollouts(), 1), config)
        counts.append(len(seen))
        assert not any(seen) and not any(m.training for m in policy.modules())
    assert counts[1] - counts[0] == 1


@pytest.mark.parametrize("budget", [1, 40, 100, 10**6])
def test_parts_hold_every_row_once_and_keep_to_the_budget(budget):
    r = rollouts()
    found = parts(r, budget)
    assert sorted(sum((rows for rows, _ in found), [])) == list(range(24))
    for rows, part in found:
        width = part.prompt_ids.shape[1] + part.response_ids.shape[2]
        assert width * len(rows) <= budget or len(rows) == 1
        assert part.text == [[r.text[i // 4][i % 4]]
                             for i in rows] and part.reward.flatten().equal(r.reward.flatten()[rows])
        torch.testing.assert_close(part.lpm.flatten(), r.lpm.flatten()[rows])
    torch.testing.assert_close(score(model(), r, budget), score(model(), r), rtol=0, atol=1e-5)
    assert cut_by_tokens([], [], budget) == []


def test_shares_put_together_are_the_whole():
    r = rollouts(temperature=.7)
    whole = together([r[:2], r[2:3], r[3:]])
    for k, v in vars(r).items(): assert v.equal(getattr(whole, k)) if isinstance(v,
        torch.Tensor) else v == getattr(whole, k)
    short = HFSampler(model(), tokenizer, 3)(["1+1="], 4, 0)
    both = together([r, replace(short, ref_logp=short.logp, weight=short.logp, tempered_logp=short.logp)])
    assert both.mask[6].sum() == short.mask.sum() and both.text[6] == short.text[0] and both.prompt_mask[6].sum() == 4


def test_masters_keep_small_steps_of_bfloat16_weights():
    config = TrainConfig(dtype="bfloat16", lr=1e-4, steps=1000)
    policy = prepare(model(), config)
    learner, start = Learner(policy, config), weights(policy)
    assert {p.dtype for p in policy.parameters()} == {torch.bfloat16} and {m.dtype
        for m in learner.masters.values()} == {torch.float32}
    for step in range(1, 81):
        for p in policy.parameters(): p.grad = torch.ones_like(p)
        learner.take(); learner.update(step); learner.clear()
    for k, p in policy.named_parameters():
        # 80 steps of 1e-4, each too small for a weight of 1
        assert (learner.masters[k] - start[k].float()).max() < -7e-3
        assert p.equal(learner.masters[k].bfloat16())


def test_an_adapter_is_trained_in_float32_on_a_bfloat16_model():
    policy = prepare(model(), TrainConfig(dtype="bfloat16", lora_rank=2, lora_alpha=3., lora_targets="q_proj, v_proj"))
    trained = {k: p for k, p in policy.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32} and {p.dtype for p in policy.parameters()
        if not p.requires_grad} == {torch.bfloat16}
    assert {k.split(".")[-4] for k in trained} == {"q_proj", "v_proj"}
    assert {m.scaling["default"] for m in policy.modules() if isinstance(getattr(m, "scaling", None), dict)} == {1.5}


@pytest.mark.parametrize("lora", [0, 2])
def test_low_precision_runs_and_resumes(lora, tmp_path):
    config = replace(small, dtype="bfloat16", lora_rank=lora, steps=4, save_every=2)

    def kept(name, config, **options):
        policy = model()
        with keeping(tmp_path / name, policy, problems, grpo(), config, **options) as keeper:
            return run(config=config, policy=policy, keeper=keeper)

    whole = kept("whole", config)
    kept("half", replace(config, steps=2))
    again = kept("half", config, resume=True, accept_changes=True)
    assert [r["step"] for r in again.rows] == [3, 4]
    assert all(p.equal(q) for p, q in zip(whole.model.parameters(), again.model.parameters()))


def test_schedules():
    at = lambda name, **k: [learning_rate(s, TrainConfig(steps=8, lr=1., schedule=name, **k)) for s in range(1, 9)]
    assert at("constant") == [1.] * 8
    assert at("constant", warmup=4) == [.25, .5, .75, 1, 1, 1, 1, 1]
    assert at("linear") == [1 - i / 8 for i in range(8)]
    assert at("cosine",
              warmup=4) == pytest.approx([.25, .5, .75, 1, 1, .5 + .5 * math.cos(math.pi / 4), .5,
                                          .5 - .5 * math.cos(math.pi / 4)])
    assert [row["lr"]
            for row in run(config=replace(small, schedule="linear")).rows] == pytest.approx([1e-2, 2e-2 / 3, 1e-2 / 3])


def test_epochs_pass_over_a_batch_again():
    one, two = (run(config=replace(small, steps=1, updates=2, epochs=e)).rows[0] for e in (1, 2))
    assert one["reward"] == two["reward"] and two["ratio"] != one["ratio"] and two["clipped"] >= one["clipped"]


def test_the_kl_keeps_the_policy_near_the_reference():
    far, near = (run(config=replace(small, steps=8, kl=kl)) for kl in (1e-9, 10.))
    assert near.rows[-1]["kl"] < far.rows[-1]["kl"] and far.rows[0]["kl"] >= 0


class Other:
    "Another engine: the policy, a little warmer."
    external = True

    def __init__(self): self.synced = 0

    def sync(self, policy): self.synced, self.policy = self.synced + 1, policy

    def __call__(self, prompts, n, seed):
        r = HFSampler(self.policy, tokenizer, 16)(prompts, n, seed)
        return replace(r, logp=(r.logp * .9) * r.mask)


@pytest.mark.parametrize("cap", [0., 2.])
def test_another_engine_is_measured_and_corrected(cap):
    seen, sampler = [], Other()

    def loss(logp, old, A, mask, *, weight=None):
        seen.append((logp.detach(), old, weight))
        return clipped_loss(logp, old, A, mask, weight=weight)

    rows = run(replace(grpo(), loss=loss), replace(small, updates=1, importance_cap=cap), sampler=sampler).rows
    assert sampler.synced == 3 and all(row["mismatch"] > .01 for row in rows)
    for logp, old, weight in seen:
        assert (weight is None) == (cap == 0)
        if cap: torch.testing.assert_close(logp * (old != 0), old, rtol=0,
                                           atol=1e-4); assert weight.max() <= 2 and (weight < 1).any()


def test_tensorboard_gets_every_number(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run(log=Logs(TensorBoardLog(tmp_path), more=lambda row: {"twice": 2 * row["reward"]}))
    events = EventAccumulator(str(tmp_path)).Reload()
    assert {"reward", "loss", "twice", "auc_mean"} <= set(events.Tags()["scalars"]) and [e.step
        for e in events.Scalars("reward")] == [1, 2, 3]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_other_logs_where_they_are_installed(name, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline"); monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    module = pytest.importorskip(name)
    for step in (1, 2): # in two lives of one run
        LOGS[name](tmp_path)({"step": step, "reward": .5})
        module.finish()
    assert any(p.is_file() for p in tmp_path.rglob("*"))


class Dashboard(ModuleType):
    "As much of wandb and trackio as is used: runs by their id, or name, that are begun once and gone on with."
    def __init__(self, name, server):
        super().__init__(name)
        self.__spec__, self.server = ModuleSpec(name, None), server

    def init(self, name, resume, id=None, **where):
        key = id or name
        if key in self.server and resume != "allow": raise ValueError("there is such a run")
        self.rows = self.server.setdefault(key, [])
        return self

    def log(self, row, step): self.rows.append((step, row))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_run_that_goes_on_is_one_run_elsewhere(name, tmp_path, monkeypatch):
    "Stopped after two of four steps, and gone on with by another process."
    server = {}
    options = dict(model="tiny", data="arithmetic", questions=4, group_size=4, log=name, verify_seconds=0.)
    options |= dict(validation="arithmetic", validation_size=2, validation_samples=2, eval_every=2, method="grpo")
    for steps, resume in ((2, False), (4, True)):
        monkeypatch.setitem(sys.modules, name, Dashboard(name, server))
        run_folder(settings(RunConfig, options | {"steps": steps}), tmp_path / "run", resume, accept_changes=resume)
    rows, = server.values()
    trained = [step for step, row in rows if "reward" in row]
    assert trained == [1, 2, 3, 4] and {s for s, row in rows if "validation/accuracy" in row} == {0, 2, 4}
    assert [s for s, _ in rows] == sorted(s for s, _ in rows)                       # wandb drops what goes back
    assert all("step" not in row for _, row in rows) or name == "wandb"


@pytest.mark.parametrize("name", ["run.yaml", "run.json"])
def test_settings_come_from_files_and_options_go_over_them(name, tmp_path, monkeypatch):
    (tmp_path / name).write_text(json.dumps({"model": "tiny", "data": "arithmetic", "lr": 1e-4, "steps": 7}))
    seen = []
    monkeypatch.setattr(cli, "run", lambda config, out, resume, accept: seen.append((config, out, resume, accept))
                        or train_result())
    assert cli.main(["train", "--config", str(tmp_path / name), "--steps", "9", "--recompute", "--no-chat",
                     "--ref-low", "1.5", "--out", "there"]) == 0
    assert seen == [(RunConfig(model="tiny", data="arithmetic", lr=1e-4, steps=9, recompute=True, chat=False,
                               ref_low=1.5), "there", False, False)]


def train_result():
    from capo.train import TrainResult
    return TrainResult(model())


def test_every_setting_has_an_option_and_a_comment():
    said = cli.comments(RunConfig)
    assert said.keys() == {f.name for f in fields(RunConfig)}
    assert said["lr"].startswith("of AdamW, at its highest; 0: 5e-4")
    assert said["save_every"].startswith("steps between checkpoints")


BAD = {"--stepz 3": None,
       "--model tiny --data arithmetic --method ppo": "method must be one of capo, grpo, dr_grpo",
       "--data arithmetic": "model is missing",
       "--model tiny --data arithmetic --tau 0": "tau must be",
       "--model tiny --data nowhere.jsonl": "there is no file nowhere.jsonl",
       "--resume nowhere": "nowhere holds no run",
       "--resume x --out y": "--resume takes everything",
       "--model tiny --data arithmetic --warmup 400": "warmup must be less",
       "--model nowhere/at/all --data arithmetic": "cannot be loaded",
       "--config typo.yaml": "there is no setting metod; did you mean method?"}


@pytest.mark.parametrize("options", BAD)
def test_bad_options_give_one_sentence_and_no_file(options, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path); monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "typo.yaml").write_text("metod: capo\n")
    try: status = cli.main(["train", *options.split()])
    except SystemExit as e: status = e.code
    said = capsys.readouterr().err.strip()
    assert status == 2 and (BAD[options] is None or said.startswith("capo: ") and BAD[options] in said
                            and "\n" not in said), said
    assert [p.name for p in tmp_path.iterdir()] == ["typo.yaml"]


def test_a_run_from_a_file_with_lora_and_a_chat_template(tmp_path, capsys, monkeypatch):
    "From names to a trained adapter that plain peft loads; then more steps, a change that must be accepted."
    from peft import AutoPeftModelForCausalLM
    monkeypatch.chdir(tmp_path)
    model().save_pretrained("base"); tokenizer.save_pretrained("base")
    with open("problems.jsonl", "w") as f:
        for p in problems[:8]: f.write(json.dumps({"prompt": p.prompt, "answer": p.answer}) + "\n")
    common = ["--lora-rank", "2", "--questions", "4", "--group-size", "4", "--save-every", "2", "--validation-size",
              "2", "--validation-samples", "2", "--instruction", "", "--max-new-tokens", "16"]
    assert cli.main(["train", "--model", "base", "--data", "problems.jsonl", "--validation", "problems.jsonl",
                     "--steps", "2", "--out", "run", *common]) == 0
    said = capsys.readouterr().out
    assert 'AutoPeftModelForCausalLM.from_pretrained("run/checkpoint-000002/policy")' in said
    assert f"vllm serve {tmp_path}/base --enable-lora --max-lora-rank 8" in said   # vLLM's smallest
    assert AutoPeftModelForCausalLM.from_pretrained("run/checkpoint-000002/policy").peft_config["default"].r == 2
    assert (tmp_path / "run/log.csv").read_text().splitlines()[0].endswith(",lr,seconds,tokens_per_second,memory")
    assert len((tmp_path / "run/evals.csv").read_text().splitlines()) == 3
    assert cli.main(["train", "--model", "base", "--data", "problems.jsonl", "--out", "run",
                     *common]) == 2 and "holds another run" in capsys.readouterr().err
    assert cli.main(["train", "--resume", "run", "--steps",
                     "3"]) == 2 and "steps was 2 and is 3" in capsys.readouterr().err
    assert cli.main(["train", "--resume", "run", "--steps", "3", "--accept-changes"]) == 0
    assert cli.main(["train", "--resume", "run"]) == 0 and Checkpoints("run").all()[-1].name == "checkpoint-000003"
    with open("problems.jsonl", "a") as f: f.write(json.dumps({"prompt": "1+1=", "answer": "2"}) + "\n")
    assert cli.main(["train", "--resume", "run"]) == 2 and "the problems are others" in capsys.readouterr().err


def test_tiny_numbers_are_zero_while_training_and_not_after():
    seen, config = [], TrainConfig(steps=1, questions=2, group_size=2, max_new_tokens=2)
    def halves(*_): return seen.append((torch.full((64,), 1e-39) / 2).max().item()) or {}
    train(model(), tokenizer, problems, grpo(), evaluate=halves, config=config)
    halves()
    possible = torch.set_flush_denormal(False)
    assert seen[-1] > 0 and (not possible or seen[:-1] == [0, 0])
