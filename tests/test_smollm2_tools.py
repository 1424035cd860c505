"The scripts that made the recorded runs of SmolLM2: questions, worked answers, recipes."
import pytest
from smollm2_runs import recipe
from smollm2_tasks import CANDIDATES, TASKS, WAYS, questions, short, total


def test_candidates_exist(): assert all(task in TASKS and way in WAYS for task, way in CANDIDATES)


def test_worked_answer():
    assert total("State the final answer to the following arithmetic problem: 4 + 5 - 13 =",
                 "-4") == "4 + 5 = 9, 9 - 13 = -4"
    assert short("Calculate 10 * 8.") == "10 * 8"


def test_questions_are_distinct_and_exclude():
    pytest.importorskip("reasoning_gym")
    first = questions("sums, 2 terms of 1 digit", 20, 2)
    again = questions("sums, 2 terms of 1 digit", 20, 1, exclude=dict(first))
    assert len(dict(first)) == len(dict(again)) == 20 and not dict(first).keys() & dict(again).keys()
    assert all(eval(short(q)) == int(a) for q, a in first + again)


def test_recipes_by_name():
    s = {"tau": .7, "ref_low": 1.04, "ref_high": 1.5}
    assert [recipe(a, s).name for a in ("grpo", "capo", "grpo-mask", "capo-nomask")] == ["grpo", "capo", "grpo", "capo"]
    assert [recipe(a, s).keep is None for a in ("grpo", "capo", "grpo-mask", "capo-nomask")] == [True, False, False,
        True]
