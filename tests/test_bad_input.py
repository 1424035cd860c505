"""Bad input gives one clear sentence, before any work is done or any file is touched.

The import hook of conftest checks shapes with errors of its own, which come first; so this file loads the library
a second time, under a name that the hook does not know, as a user has it."""
import math

import jaxtyping
import pytest
import torch
from torch import tensor

from capo.task import Problem, arithmetic, arithmetic_tokenizer, tiny_lm
from helpers import lib, refuses

tokenizer, problems = arithmetic_tokenizer(), arithmetic(4)
nan, inf, one = math.nan, math.inf, torch.ones
x, c = tensor([[-1., -2., -3.]]), tensor([[1, 0, 1]])
TAKES_GROUPS = {"group_auc": lib.calibration.group_auc, "auc_mean": lib.calibration.auc_mean,
                "pair_auc": lib.calibration.pair_auc,
                "pooled_auc": lib.calibration.pooled_auc, "most_confident": lib.evaluate.most_confident,
                "capo_advantage": lib.advantage.capo_advantage,
                "pairwise_advantage":
                    lambda x, c, **k: lib.advantage.pairwise_advantage(x, c, lib.surrogate.hinge, **k),
                "pairwise_loss": lambda x, c, **k: lib.advantage.pairwise_loss(x, c, lib.surrogate.linear, **k),
                "quantile_thresholds": lambda x, c, **k: lib.mask.quantile_thresholds((1 - x).abs(), c, **k)}
each_of_them = pytest.mark.parametrize("f", TAKES_GROUPS.values(), ids=TAKES_GROUPS)


def test_the_library_is_loaded_without_the_hook():
    import capo.calibration
    with pytest.raises(jaxtyping.TypeCheckError): capo.calibration.group_auc(x, c[:, :2])
    refuses(lambda: lib.calibration.group_auc(x, c[:, :2]), "one shape")


@each_of_them
@pytest.mark.parametrize("bad", [nan, inf, -inf])
def test_scores_that_are_not_finite(f, bad):
    holed = x.clone()
    holed[0, 1] = bad
    refuses(lambda: f(holed, c, valid=c * 0 + 1), "holds NaN or infinity where valid is True")
    f(holed, c, valid=tensor([[1, 0, 1]]))                                        # where absent it may hold anything


@each_of_them
def test_shapes_of_groups(f):
    for args in ((x, c[:, :2]), (x, c.T), (x[:, :1], c), (x.repeat(2, 1), c)):
        refuses(lambda: f(*args), "must have one shape; they have")
    refuses(lambda: f(x, c, valid=tensor([[True]])), "(1, 1)")


@each_of_them
@pytest.mark.parametrize("bad", [.5, -1., 2., nan])
def test_rewards_that_are_not_0_or_1(f, bad):
    reward = tensor([[1., 0., bad]])
    refuses(lambda: f(x, reward), f"correct must hold 0 and 1 only, or be bool; it holds {bad:g}")
    f(x, reward, valid=tensor([[1, 1, 0]]))


T = one(2, 3)
CASES = {
    "auc: shapes": (lambda: lib.calibration.auc(x[0], c[0, :2]), "one shape"),
    "auc: two axes": (lambda: lib.calibration.auc(x, c), "score must be one list of responses; its shape is (1, 3)"),
    **{f"{f.__name__}: one axis": (lambda f=f: f(x[0], c[0]),
                                   "score must be (B, G), questions by responses; its shape is (3,)")
       for f in (lib.calibration.group_auc, lib.calibration.auc_mean, lib.calibration.pair_auc)},
    "auc: NaN": (lambda: lib.calibration.auc(tensor([nan, 1.]), tensor([1, 0])), "NaN"),
    "no ids": (lambda: lib.calibration.group_index([]), "ids is empty"),
    **{f"tau {t}": (lambda t=t: lib.surrogate.logistic(t), f"tau must be a positive number; it is {t}")
       for t in (0, -.5, nan, inf)},
    "tau of the advantage": (lambda: lib.advantage.capo_advantage(x, c, tau=0), "tau must be"),
    "tau of the recipe": (lambda: lib.recipe.capo(tau=-1), "tau must be"),
    "lpm without questions": (lambda: lib.advantage.capo_advantage(x[0], c[0]), "lpm must be (B, G)"),
    "mean_logp: shapes": (lambda: lib.logprob.mean_logp(T, T[:1]),
                          "logp and mask must have one shape; they have (2, 3) and (1, 3)"),
    "perplexity: shapes": (lambda: lib.logprob.perplexity(T, T[:, :2]), "one shape"),
    **{f"token_logps: {name}": (lambda k=k: lib.logprob.token_logps(None, c, **{"attention_mask": c} | k), words)
       for name, k, words in (
        ("mask", dict(attention_mask=c[:, :2]), "attention_mask must be (1, 3) like input_ids; it is (1, 2)"),
        ("temperature 0", dict(temperature=0), "temperature must be positive; it is 0"),
        ("temperature nan", dict(temperature=nan), "temperature"),
        ("last 0", dict(last=0), "last must lie in 1…3; it is 0"), ("last 4", dict(last=4), "it is 4"),
        ("last −1", dict(last=-1), "it is -1"))},
    "reward: shapes": (lambda: lib.grpo.grpo_advantage(x, valid=c[:, :2]), "reward and valid must have one shape"),
    "reward: NaN": (lambda: lib.grpo.grpo_advantage(tensor([[nan, 1.]])), "reward holds NaN or infinity"),
    "reward: infinity": (lambda: lib.grpo.grpo_advantage(tensor([[1., -inf]])), "reward holds NaN or infinity"),
    **{f"clipped_loss: {name}": (lambda k=k: lib.grpo.clipped_loss(**dict(logp=T, old_logp=T, advantage=T[:, 0],
        mask=T) | k), words) for name, k, words in (
        ("old_logp", dict(old_logp=T[:1]),
         "old_logp and mask must be (2, 3) like logp, advantage (2,); they are (1, 3), (2, 3) and (2,)"),
        ("mask", dict(mask=T[:, :1]), "(2, 1)"), ("advantage", dict(advantage=T), "advantage (2,)"),
        ("advantage of one", dict(advantage=T[:1, 0]), "(1,)"),
        ("eps", dict(eps=-.1), "eps must be"), ("eps low", dict(eps=(1.5, .2)), "eps must be"),
        ("eps high", dict(eps=(.2, -.1)), "it is (0.2, -0.1)"),
        ("eps nan", dict(eps=nan), "eps must be"))},
    "clip_fraction: eps": (lambda: lib.grpo.clip_fraction(T, T, T[:, 0], T, eps=2.), "eps must be"),
    **{f"{name} {v}": (lambda name=name, v=v: lib.mask.noise_mask(1 - x, c, **{name: v}),
                       f"{name} is a perplexity, at least 1; it is {v}")
       for name in ("low", "high") for v in (.99, 0, -1, nan)},
    **{f"ref_{name} {v}": (lambda f=f, name=name, v=v: f(**{f"ref_{name}": v}),
                           f"ref_{name} is a perplexity, at least 1; it is {v}")
       for f in (lib.recipe.grpo, lib.recipe.capo) for name in ("low", "high") for v in (.99, nan)},
    "lpm for perplexity": (lambda: lib.mask.noise_mask(x, c),
                           "ref_ppl must be at least 1; it holds -1. Was lpm passed?"),
    "mask: shapes": (lambda: lib.mask.noise_mask(1 - x, c[:, :2]), "ref_ppl, correct and valid must have one shape"),
    "mask: reward": (lambda: lib.mask.noise_mask(1 - x, x), "correct must hold 0 and 1"),
    "lpm for perplexity, thresholds": (lambda: lib.mask.quantile_thresholds(x, c), "Was lpm passed?"),
    **{f"quantile {q}": (lambda q=q: lib.mask.quantile_thresholds(1 - x, c, upper=q),
                         f"upper is a quantile, between 0 and 1; it is {q}") for q in (75, -.1, nan)},
    "no problems to draw": (lambda: lib.task.arithmetic(0), "n must be at least 1; it is 0"),
    "no prompts": (lambda: lib.rollout.HFSampler(tiny_lm(16, 1, 2), tokenizer)([], 2), "prompts is empty"),
    "no responses": (lambda: lib.rollout.HFSampler(tiny_lm(16, 1, 2), tokenizer)(["1+1="], 0),
                     "n must be at least 1; it is 0"),
    "no tokens": (lambda: lib.rollout.HFSampler(None, None, max_new_tokens=0),
                  "max_new_tokens must be at least 1; it is 0"),
    **{f"sampling temperature {t}": (lambda t=t: lib.rollout.HFSampler(None, None, temperature=t),
                                     "temperature must be positive") for t in (0, -1, nan)},
    "bootstrap: sizes": (lambda: lib.evaluate.bootstrap(torch.mean, one(3), one(4)),
                         "data must share a positive number of questions; the sizes are [3, 4]"),
    "bootstrap: empty": (lambda: lib.evaluate.bootstrap(torch.mean, one(0)), "the sizes are [0]"),
    "bootstrap: nothing": (lambda: lib.evaluate.bootstrap(torch.mean), "the sizes are []"),
    **{f"bootstrap: level {v}": (lambda v=v: lib.evaluate.bootstrap(torch.mean, one(3), level=v),
                                 f"level must lie between 0 and 1; it is {v}") for v in (0, 1, 95, nan)},
    "a group of one": (lambda: lib.train.TrainConfig(group_size=1), "group_size must be at least 2; it is 1"),
    **{f"config: {k} {v}": (lambda k=k, v=v: lib.train.TrainConfig(**{k: v}), f"{k} must be {words}; it is {v}")
       for k, v, words in (
        ("steps", 0, "at least 1"), ("questions", 0, "at least 1"), ("updates", 0, "at least 1"),
        ("max_new_tokens", 0, "at least 1"), ("eval_every", 0, "at least 1"),
        ("lora_rank", -1, "at least 0"), ("lr", 0, "positive"), ("lr", nan, "positive"), ("grad_clip", 0, "positive"),
        ("temperature", 0, "positive"))},
    "more updates than questions": (lambda: lib.train.TrainConfig(questions=4, updates=5),
                                    "updates must not exceed questions, 4; it is 5"),
}


@pytest.mark.parametrize("call, words", CASES.values(), ids=CASES)
def test_one_sentence(call, words): refuses(call, words)


def test_a_clip_range_may_be_a_list_as_json_has_it(): assert lib.grpo.clip_range([.1, .4]) == (.9, 1.4)


def test_a_valid_reward_outside_0_and_1_is_fine_for_grpo():
    assert lib.grpo.grpo_advantage(tensor([[.5, -3., nan]]), valid=tensor([[1, 1, 0]])).isfinite().all()


def test_grading_needs_a_problem_for_each_question():
    r = lib.rollout.HFSampler(tiny_lm(16, 1, 2), tokenizer, 4)(["1+1=", "2+2="], 2)
    refuses(lambda: lib.rollout.grade(r, problems[:1], lib.task.verify), "there are 2 questions and 1 problems")
    refuses(lambda: r.ref_ppl, "these rollouts have no ref_logp")


def test_training_on_nothing_does_not_touch_the_model():
    model = tiny_lm(16, 1, 2)
    before = list(model.state_dict())
    refuses(lambda: lib.train.train(model, tokenizer, [], config=lib.train.TrainConfig(lora_rank=2)),
            "problems is empty: there is nothing to train on")
    assert list(model.state_dict()) == before


def test_a_log_that_exists_is_left_alone(tmp_path):
    (tmp_path / "log.csv").write_text("results")
    refuses(lambda: lib.folder.CSVLog(tmp_path / "log.csv"), "exists; it belongs to another run", FileExistsError)
    assert (tmp_path / "log.csv").read_text() == "results"


def test_an_extra_column_is_refused(tmp_path):
    log = lib.folder.CSVLog(tmp_path / "log.csv")
    log({"step": 1})
    refuses(lambda: log({"step": 2, "loss": 3.}), "loss")
    assert (tmp_path / "log.csv").read_text().split() == ["step", "1"]


@pytest.fixture
def no_work(monkeypatch):
    def refuse(*args): raise AssertionError("work started")
    monkeypatch.setattr(lib.compare, "ProcessPoolExecutor", refuse)


@pytest.mark.parametrize("options", [dict(makers={}), dict(seeds=()), dict(seeds=(1, 2, 1))],
                         ids=["no arm", "no seed", "a seed twice"])
def test_a_comparison_of_nothing_writes_nothing(options, tmp_path, no_work):
    refuses(lambda: lib.compare.compare(tmp_path / "new", **dict(makers=lib.compare.arms()) | options),
            "at least one arm and distinct seeds are needed")
    assert not list(tmp_path.iterdir())


def test_a_comparison_does_not_go_into_the_folder_of_another(tmp_path, no_work):
    (tmp_path / "summary.json").write_text("results")
    refuses(lambda: lib.compare.compare(tmp_path, lib.compare.arms()), "holds another run; name a new folder",
            FileExistsError)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["results"]


def test_an_accuracy_that_is_never_reached():
    refuses(lambda: lib.compare.at_accuracy([{"accuracy": .1}, {"accuracy": .2}], .3), "accuracy never reaches 0.300")


def test_degenerate_groups_are_not_bad_input():
    "One class, one response, none that is valid: advantage 0, AUC undefined, nothing NaN where a number is promised."
    A = lib.advantage.capo_advantage
    for scores, correct, valid in ((x, c * 0, None), (x, c * 0 + 1, None), (x[:, :1], c[:, :1], None),
                                   (x * nan, c, c * 0), (x, c, tensor([[1, 0, 1]]))):
        assert (A(scores, correct, valid=valid) == 0).all() and lib.calibration.group_auc(scores, correct,
            valid).isnan().all()
    assert (lib.grpo.grpo_advantage(one(2, 3)) == 0).all() and (lib.grpo.grpo_advantage(one(2, 1)) == 0).all()
    assert lib.grpo.clipped_loss(T, T, one(2), T * 0) == 0 and lib.grpo.clip_fraction(T, T, one(2), T * 0) == 0
    assert lib.task.verify("", Problem("1+1=", "2").answer) is False
