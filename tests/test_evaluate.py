"The numbers of an evaluation, each computed another way."
import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from capo.calibration import group_auc
from capo.evaluate import (FEWEST, FEWEST_PAIRED, NUMBERS, Missing, Responses, Table, accuracy, assess, auc_of_each,
                           blocks, evaluate, most_confident, padded, paired, reliable, statistics)
from capo.interval import (bootstrap, correlation, influence, interval, question_mean, mean_over, ranked,
                           resamples, student,
                           weighted_area, weighted_auc, weighted_ece, weighted_prr, wilson)
from capo.responses import gather
from capo.rollout import Rollouts
from capo.selective import area, brier, ece, prr, split_questions
from helpers import groups, responses, same, shuffle, sklearn_auc, two_runs


def mean(x): return sum(x) / len(x) if x else math.nan


@given(groups())
def test_accuracy_and_most_confident_by_counting(case):
    score, correct, valid = case
    rows = [[(s, c) for s, c, v in zip(*row) if v] for row in zip(score.tolist(), correct.tolist(), valid.tolist())]
    same(accuracy(correct, valid), [mean([c for _, c in row]) for row in rows], 1e-6)
    same(most_confident(score, correct, valid), [mean([c for s, c in row if s == max(row)[0]]) for row in rows], 1e-6)


@given(groups(), st.integers(0, 99))
def test_order_and_monotone_maps_change_nothing(case, seed):
    score, correct, valid = case
    p = shuffle(score.shape[1], seed)
    same(most_confident(score[:, p].exp(), correct[:, p], valid[:, p]), most_confident(score, correct, valid), 1e-6)
    same(accuracy(correct[:, p], valid[:, p]), accuracy(correct, valid), 1e-6)


@given(groups(B=5, G=5), st.integers(0, 99))
def test_every_number_of_the_report(case, seed):
    lpm, correct, valid = case
    valid[0, 0] = True                                                           # something to speak of
    lengths = torch.randint(1, 4, valid.shape, generator=torch.Generator().manual_seed(seed)) * valid
    mask = (torch.arange(3) < lengths[..., None]).long()
    B, G = valid.shape
    r = Rollouts(torch.ones(B, 1, dtype=torch.long), torch.ones(B, 1, dtype=torch.long), mask, mask,
                 lpm[..., None] * mask,
                 (correct & valid).float(), lengths == 3, [[""] * G] * B)
    found = evaluate(r)
    aucs = [a for s, c, v in zip(lpm, correct, valid) if not math.isnan(a := sklearn_auc(s[v], c[v]))]
    pairs = [int((c & v).sum() * (~c & v).sum()) for c, v in zip(correct, valid)]
    weighted = sum(p * sklearn_auc(s[v], c[v]) for p, s, c, v in zip(pairs, lpm, correct, valid) if p)
    nan_mean = lambda x: x[~x.isnan()].mean().item()
    want = {"accuracy": (correct & valid).float().mean().item(), "auc_mean": mean(aucs), "mixed_questions": len(aucs),
            "pair_auc": weighted / sum(pairs) if sum(pairs) else math.nan,
            "pooled_auc": sklearn_auc(lpm[valid], correct[valid]),
            "most_confident": nan_mean(most_confident(lpm, correct, valid)), "lpm": lpm[valid].mean().item(),
            "entropy": -(lpm * lengths).sum().item() / lengths.sum().item(),
            "length": lengths[valid].float().mean().item(),
            "truncated": (lengths == 3)[valid].float().mean().item()}
    assert list(found) == list(want)
    same(list(found.values()), list(want.values()), 1e-5)


def test_the_interval_of_a_mean_is_that_of_the_normal_law():
    x = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for level, z in ((.95, 1.96), (.5, .674)):
        low, high = bootstrap(lambda d: d.mean(), x, n=4000, level=level)
        half = z * x.std().item() / 20
        assert low == pytest.approx(x.mean().item() - half,
                                    abs=.1 * half) and high == pytest.approx(x.mean().item() + half, abs=.1 * half)


def test_the_interval_depends_on_the_seed_alone():
    x = torch.arange(20.)
    before = torch.get_rng_state()
    assert bootstrap(torch.mean, x, n=50, seed=1) == bootstrap(torch.mean, x, n=50, seed=1) != bootstrap(torch.mean,
        x, n=50, seed=2)
    assert torch.get_rng_state().equal(before)


def test_questions_are_resampled_together_and_whole():
    x = torch.arange(60.).view(20, 3)
    assert bootstrap(lambda a, b: (a - b).sum(), x, x, n=20) == (0, 0)           # pairs stay pairs
    assert bootstrap(lambda a: (a[:, 1] - a[:, 0]).mean(), x, n=20) == (1, 1)    # rows stay rows
    low, high = bootstrap(lambda a: float(len(a)), x, n=20)
    assert low == high == 20


def test_resamples_without_a_value_are_left_out():
    x = torch.tensor([0., 1.])
    auc_like = lambda d: d.mean() if 0 < d.sum() < 2 else math.nan
    assert bootstrap(auc_like, x, n=100) == (.5, .5)
    assert all(math.isnan(v) for v in bootstrap(lambda d: math.nan, x, n=10))


def test_a_wider_level_holds_a_narrower_one():
    x = torch.arange(30.)
    (a, b), (c, d) = (bootstrap(torch.mean, x, n=200, level=level) for level in (.5, .99))
    assert c < a < b < d and np.isfinite([a, b, c, d]).all()


# Everything as a statistic of the weights of the questions.

def one(statistic, B): return statistic(torch.ones(1, B, dtype=torch.float64)).item()


def area_by_hand(score, correct):
    "Mean over m of the expected share of right ones among the m most confident, a run of ties in random order."
    pairs, total = sorted(zip(score, correct), reverse=True), 0
    for m in range(1, len(pairs) + 1):
        edge = pairs[m - 1][0]
        above, tied = [c for s, c in pairs if s > edge], [c for s, c in pairs if s == edge]
        total += (sum(above) + (m - len(above)) * sum(tied) / len(tied)) / m
    return total / len(pairs)


@settings(max_examples=15)
@given(groups(B=5, G=6), st.lists(st.integers(1, 3), min_size=5, max_size=5), st.integers(0, 99))
def test_a_weight_is_that_many_copies(case, weights, seed):
    lpm, correct, valid = case
    valid[0, 0] = True
    B, G = valid.shape
    g = torch.Generator().manual_seed(seed)
    r = responses(lpm, correct, valid, torch.randint(-1, 3, (B, G), generator=g),
                  length=torch.randint(1, 9, (B, G), generator=g),
                  token_confidence=-lpm.double(), truncated=torch.rand(B, G, generator=g) < .2)
    weights = torch.tensor(weights[:len(r)])
    copies = r[torch.arange(len(r)).repeat_interleave(weights).tolist()]
    copies = Responses(**vars(copies) | {"id": [str(i) for i in range(len(copies))]})
    here, there = statistics(r)[0], statistics(copies)[0]
    for k in set(NUMBERS) - {"coverage", "precision"}:                           # of halves that differ
        f, h = here[k], there[k]
        if isinstance(f, Missing) or isinstance(h, Missing): continue
        same(f(weights[None].double()).item(), one(h, len(copies)), 1e-9)


@given(groups(B=5, G=6))
def test_every_pooled_number_against_a_plain_one(case):
    lpm, correct, valid = case
    valid[0, 0] = True
    r = responses(lpm, correct, valid)
    s, c, q, B = r.score, r.correct, r.question, len(r)
    points, right, every = ranked(s, c, q), c.double().mean().item(), s == s
    same(one(weighted_auc(points), B), sklearn_auc(s, c), 1e-9)
    by_hand, best = area_by_hand(s.tolist(), c.tolist()), area_by_hand(c.tolist(), c.tolist())
    same(one(weighted_area(points), B), by_hand, 1e-9)
    if 0 < right < 1: same(one(weighted_prr(points), B), (by_hand - right) / (best - right), 1e-9)
    same(one(weighted_area(points), B), area(s, c), 1e-9); same(one(weighted_prr(points), B), prr(s, c), 1e-9)
    same(one(weighted_ece(s.exp(), c, q, B), B), ece(s.exp(), c, bins=10), 1e-9)
    same(one(mean_over((s.exp() - c.double()) ** 2, every, q, B), B), brier(s.exp(), c), 1e-9)
    same(auc_of_each(s, c, q, B), group_auc(*(getattr(padded(r), k) for k in ("lpm", "correct", "valid"))), 1e-6)


def test_prr_by_hand():
    s, c = torch.tensor([-.1, -.2, -.3, -.4]), torch.tensor([True, False, True, False])
    # precision 1, 1/2, 2/3, 1/2: mean 2/3; at best 1, 1, 2/3, 1/2: mean 19/24; at random 1/2
    same(one(weighted_prr(ranked(s, c, torch.zeros(4).long())), 1), (2 / 3 - 1 / 2) / (19 / 24 - 1 / 2), 1e-12)


def test_the_correlation_is_numpys_and_nan_for_a_constant():
    g = torch.Generator().manual_seed(0)
    x, y = (1e4 + torch.randn(35, generator=g, dtype=torch.float64) for _ in "xy")
    q = torch.arange(7).repeat_interleave(5)
    same(one(correlation(x, y + x, q, 7), 7), np.corrcoef(x, (y + x))[0, 1], 1e-7)
    assert math.isnan(one(correlation(x * 0 + 3, y, q, 7), 7))


def test_fast_and_plain_bootstrap_draw_the_same():
    x = torch.rand(30, generator=torch.Generator().manual_seed(0))
    drawn = question_mean(x)(resamples(30, 200, seed=3)).quantile(torch.tensor([.025, .975]).double()).tolist()
    same(drawn, bootstrap(torch.mean, x, n=200, seed=3), 1e-6)
    assert resamples(30, 5).sum(1).tolist() == [30] * 5


# Intervals without resampling.

def test_the_influences_of_a_mean_are_the_textbooks_variance():
    x = torch.rand(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    value, moved = influence(question_mean(x), 40)
    same(value, x.mean().item()); same(moved, (x - x.mean()) / 40)
    same(moved.square().sum().item() * 40 / 39, x.var().item() / 40)


@given(groups(B=5, G=6))
def test_twice_as_many_of_all_questions_move_no_number(case):
    lpm, correct, valid = case
    valid[0, 0] = True
    r = responses(lpm, correct, valid, length=(valid * 3 + correct).long())
    for k, f in statistics(r)[0].items():
        if k in ("coverage_area", "prr") or isinstance(f, Missing): continue      # they depend on how many there are
        value, moved = influence(f, len(r))
        if math.isfinite(value): same(moved.sum().item(), 0, 1e-9)


@pytest.mark.parametrize("df, t", [(1, 12.7062), (2, 4.3027), (5, 2.5706), (29, 2.0452), (1000, 1.9623), (10**6, 1.96)])
def test_students_quantiles(df, t): assert student(df) == pytest.approx(t, rel=1e-4)


def test_wilson_by_hand():
    # p with |.9 − p| = 1.96 √(p (1 − p) / 10)
    low, high = wilson(.9, 10, 1.96)
    for p in (low, high): assert abs(.9 - p) == pytest.approx(1.96 * math.sqrt(p * (1 - p) / 10), abs=1e-9)
    assert wilson(1, 3, 1.96) == (pytest.approx(3 / (3 + 1.96**2)), 1)


def test_zeros_and_ones_get_wilsons_interval_for_independent_replies():
    x = torch.tensor([1.] * 9 + [0.])
    assert interval(*influence(question_mean(x), 10), 10, True) == pytest.approx(wilson(.9, 10, student(10**6)))


@given(st.lists(st.sampled_from([0, 0, .25, .5, 1]), min_size=3, max_size=30).filter(lambda x: len(set(x)) > 1))
def test_a_mean_of_shares_takes_students_quantile_for_the_part_of_its_variance_that_is_estimated(x):
    x = torch.tensor(x, dtype=torch.float64)
    n, m, z = len(x), x.mean().item(), student(10**6)
    estimated = (x * (1 - x)).mean().item() / (m * (1 - m))
    replies = m * (1 - m) * (n - 1) / x.var(correction=0).item()
    want = wilson(m, replies + 1 - estimated, z + estimated * (student(n - 1) - z))
    assert interval(*influence(question_mean(x), n), n, True) == pytest.approx(want)


def test_every_interval_that_is_shown_held_what_it_says():
    "`benchmarks/coverage.csv`: the share of simulated runs whose interval holds the truth."
    rows = list(csv.DictReader(open(Path(__file__).parents[1] / "benchmarks" / "coverage.csv")))
    assert {int(r["questions"]) for r in rows} == {10, 30, 100, 300} and all(int(r["runs"]) >= 1000 for r in rows)
    assert {r["row"] for r in rows} == {*NUMBERS} - {"rpc"}                      # a mean over questions as well
    fewest = {"one run": FEWEST, "difference": FEWEST_PAIRED}
    shown = [r for r in rows if reliable(r["row"], int(r["questions"]), fewest[r["table"]])]
    assert [r for r in shown if not .93 <= float(r["covered"]) <= .97] == [] and len(shown) > 170


def test_the_threshold_is_chosen_on_one_half_and_checked_on_the_other():
    B, G = 40, 8
    g = torch.Generator().manual_seed(0)
    lpm = -torch.rand(B, G, generator=g).double()
    r = responses(lpm, torch.rand(B, G, generator=g) < lpm.exp() ** 2, torch.ones(B, G).bool())
    a, choose = assess(r, precision=.7), split_questions(r.id)[r.question]
    kept = r.score[choose] >= a.threshold
    assert r.correct[choose][kept].double().mean() >= .7
    shares = (r.correct[choose][r.score[choose] >= t].double().mean() for t in r.score[choose] if t < a.threshold)
    assert all(x < .7 for x in shares)                                           # the largest coverage
    above = r.score[~choose] >= a.threshold
    same(a["coverage"].value, above.double().mean().item())
    same(a["precision"].value, r.correct[~choose][above].double().mean().item())
    # whatever the order of the questions
    assert assess(r[shuffle(B, 1).tolist()], precision=.7).threshold == a.threshold


@pytest.mark.parametrize("right, note", [(True, "all responses are right"), (False, "all responses are wrong")])
def test_one_class_is_a_sentence(right, note):
    a = assess(responses(-torch.rand(4, 3), torch.full((4, 3), right), torch.ones(4, 3).bool()))
    assert a["accuracy"].value == right and str(a["auc_mean"]) == "–"
    assert a["auc_mean"].note == a["pooled_auc"].note == a["prr"].note == note
    assert a["precision"].value == 1 if right else "no threshold" in a["precision"].note
    assert "token_confidence" in a["deepconf"].note and "length" in a["length"].note and a["truncated"].note
    assert a.counts["mixed"] == 0 and a.counts["all right" if right else "all wrong"] == 4


def test_one_question_has_no_interval_and_three_right_ones_are_not_certain():
    one, three = (assess(gather({"id": i, "correct": 1, "lpm": -.5} for i in range(n))) for n in (1, 3))
    assert one["accuracy"].value == 1 and math.isnan(one["accuracy"].low) and str(one["accuracy"]) == "1.000"
    assert three["accuracy"].low == pytest.approx(.4385, abs=1e-3) and three["accuracy"].high == 1
    assert one["majority"].note == one["auc_mean"].note == "one response a question"


def test_empty_responses_are_wrong_and_have_no_confidence():
    a = assess(gather([{"id": 1, "correct": 1, "lpm": -.5, "length": 5}] + [{"id": 1, "correct": 0, "length": 0,
        "lpm": 0}] * 3))
    assert a["accuracy"].value == .25 and a["pass_at_n"].value == a["most_confident"].value == 1
    assert a.counts["empty"] == a.counts["without confidence"] == 3 and a["pooled_auc"].note
    nothing = assess(gather([{"id": i, "correct": 0, "length": 0} for i in (1, 1, 2, 2)]))
    assert nothing["accuracy"].value == 0 and nothing["lpm"].note and nothing["most_confident"].note


def test_a_question_where_nobody_votes_is_not_answered():
    rows = [{"id": 1, "correct": 1, "answer": "4"}, {"id": 1, "correct": 0, "answer": "5"},
            {"id": 1, "correct": 1, "answer": "4"}]
    a = assess(gather(rows + [{"id": 2, "correct": 0, "answer": None}] * 3))
    assert a["majority"].value == .5


def test_unequal_counts_drop_no_question():
    rows = lambda q, right: [{"id": q, "correct": c, "lpm": -.1 * i} for i, c in enumerate(right)]
    a = assess(gather([*rows(1, [1, 0, 0, 0]), *rows(2, [0] * 4), *rows(3, [1, 0])]))
    assert a["accuracy"].value == pytest.approx((1 / 4 + 0 + 1 / 2) / 3)
    assert a["pass_at_n"].value == pytest.approx((1 / 2 + 0 + 1) / 3)            # any of two, for every question
    assert [a.counts[k] for k in ("fewest", "most", "mixed", "all right", "all wrong")] == [2, 4, 2, 0, 1]


def test_without_a_confidence_there_are_accuracy_pass_and_majority():
    a = assess(gather({"id": q, "correct": int(g == q), "answer": str(g)} for q in range(3) for g in range(3)))
    assert a["accuracy"].value == pytest.approx(1 / 3)
    assert a["pass_at_n"].value == 1 and a["majority"].value == pytest.approx(1 / 3)
    assert {a[k].note
            for k in ("auc_mean", "prr", "most_confident", "ece")} == {"the responses come without a confidence"}


def test_any_confidence_can_be_reported_on():
    rows = [{"id": q, "correct": int(q % 3 > 0), "lpm": -.1 * (q % 4),
             "confidence": {"said": (q % 5) / 5, "judge": (q % 3) / 2}, "score": q} for q in range(30)]
    r = gather(rows)
    assert list(r.scores) == ["lpm", "score", "said", "judge"] and r.probabilities == ("said", "judge")
    a, b = assess(r.by("judge")), assess(r.by("score"))
    assert a["pooled_auc"].value == 1 and a["brier"].value == pytest.approx(np.mean([((q % 3) / 2 - (q % 3 > 0)) ** 2
        for q in range(30)]))
    assert b["ece"].note == "score is no probability" and b["lpm"].value == pytest.approx(-.15, abs=.02)
    with pytest.raises(ValueError, match="there is no confidence x"): r.by("x")


def test_blocks_hold_every_row_once_and_cost_no_more_than_twice_the_rows():
    sizes = torch.tensor([1, 16, 3, 1000, 2, 5, 17])
    question, seen, cells = torch.arange(7).repeat_interleave(sizes), [], 0
    for b, rows, there in blocks(question):
        assert (question[rows] == b[:, None]).all()
        seen += rows[there].tolist(); cells += rows.numel()
    assert sorted(seen) == list(range(len(question))) and cells < 2 * len(question)


def test_one_long_question_costs_its_own_length():
    g = torch.Generator().manual_seed(0)
    question = torch.cat([torch.arange(300).repeat_interleave(8), torch.full((20_000,), 300)])
    n = len(question)
    group, lpm = torch.randint(-1, 4, (n,), generator=g), -torch.rand(n, generator=g).double()
    r = Responses([str(i) for i in range(301)], [""] * 301, [None] * 301, question, [""] * n, torch.arange(n),
                  [None] * n, group, group == 0, {"lpm": lpm})
    assert assess(r)["auc_mean"].value == pytest.approx(.5, abs=.05)            # squared and padded it would take 6 GB


def test_a_table_shows_itself():
    t = Table([{"a|b": "x\ny", "n": torch.tensor(.12345)}, {"n": math.nan, "more": 3}])
    assert t._repr_markdown_() == "| a\\|b | n | more |\n|---|---|---|\n| x y | 0.123 |  |\n|  | – | 3 |"
    assert repr(t).startswith("a|b")


def test_a_run_against_itself_does_not_differ():
    r, _ = two_runs()
    for k, e in paired(assess(r), assess(r)).differences.items(): assert e.note or (e.value == 0
        and math.isnan(e.low)), k


def test_thresholds_are_compared_without_an_interval():
    r, other = two_runs(60)
    c = paired(assess(r, precision=.3), assess(other, precision=.3))
    assert all(math.isfinite(c[k].value) and math.isnan(c[k].low) for k in ("coverage", "precision", "ece"))


def test_unrelated_questions_under_the_same_numbers_are_not_compared():
    ask = lambda words, right: assess(gather({"id": i, "prompt": f"{words} {i}?", "reference": str(right + i),
                                              "correct": i % 2, "lpm": -.5} for i in range(10)))
    with pytest.raises(ValueError,
                       match="of 10 question ids that both sets have, only 0 ask the same"): paired(ask("What is", 0),
                           ask("How far is", 100))
    assert paired(ask("What is", 0), ask("Please: what is", 0)).shared == 10     # another template, the same references


def test_runs_are_paired_by_question_whatever_the_order():
    r, other = two_runs()
    one, two = (paired(assess(r), assess(x)) for x in (other, other[shuffle(30, 3).tolist()]))
    assert one.shared == two.shared == 30 and one.unmatched == (0, 0)
    for k in NUMBERS: same([one[k].value, one[k].low, one[k].high], [two[k].value, two[k].low, two[k].high], 1e-9)
    x = (padded(other).correct.double() - padded(r).correct.double()).mean(1)
    half = student(29) * x.std().item() / 30**.5
    same((one["accuracy"].low, one["accuracy"].high), (x.mean().item() - half, x.mean().item() + half), 1e-9)


def test_questions_that_only_one_run_has_are_counted():
    r, other = two_runs()
    c = paired(assess(r[range(20)]), assess(other[range(5, 30)]))
    assert c.shared == 15 and c.unmatched == (5, 10)
    same(c["accuracy"].value, (padded(other).correct.double() - padded(r).correct.double())[5:20].mean().item(), 1e-6)
    with pytest.raises(ValueError, match="share no question"): paired(assess(r[range(5)]), assess(other[range(5, 9)]))


@pytest.mark.parametrize("options, words", [({"level": 95}, "level must lie"), ({"level": math.nan}, "level must"),
                                            ({"precision": 90}, "precision must lie in"),
                                            ({"precision": 0}, "precision")])
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words): assess(two_runs()[0], **options)
