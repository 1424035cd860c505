"Problems from elsewhere: columns that are recognised, files, the hub, generators, and references that are answers."
import gzip, json, re, sys
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from capo.answer import math_verify
from capo.data import (
    DATASETS, DataOptions, Source, check_references, in_a_box, load_problems, problem_of, recognised, ungradable)
from capo.run import RunConfig, run, run_problems
from capo.task import Problem, arithmetic, verify


# A row of each known set: the columns that it has on the hub, and an answer of 7 as they write it.
ROWS = {
    "deepscaler": {"problem": "?", "answer": "7", "solution": "It is 8."},
    "gsm8k": {"question": "?", "answer": "<<8-1=7>>7 of 8 are left.\n#### 7"},
    "math500": {"problem": "?", "solution": r"\boxed{7}", "answer": "7", "subject": "Algebra", "level": 1,
                "unique_id": "a"},
    "aime24": {"id": 60, "problem": "?", "solution": "", "answer": "007", "url": "", "year": "2024"},
    "aime25": {"problem": "?", "answer": "7", "id": "0"},
    "amc23": {"id": 0, "question": "?", "answer": "7.0", "url": ""},
    "minerva": {"question": "?", "answer": "7"},
    "olympiadbench": {"id": 1, "question": "?", "solution": ["..."], "final_answer": ["$7$"], "context": None},
}
CALLS = {
    "deepscaler": ("agentica-org/DeepScaleR-Preview-Dataset", None, "train"), "gsm8k": ("openai/gsm8k", "main", "test"),
    "math500": ("HuggingFaceH4/MATH-500", None, "test"),
    "aime24": ("HuggingFaceH4/aime_2024", None, "train"), "aime25": ("math-ai/aime25", None, "test"),
    "amc23": ("math-ai/amc23", None, "test"),
    "minerva": ("math-ai/minervamath", None, "test"),
    "olympiadbench": ("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train"),
}


@pytest.fixture(autouse=True)
def in_a_new_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def hub(monkeypatch):
    "A hub whose sets have one row; it keeps what it was asked for."
    import datasets
    rows, calls = {CALLS[k][0]: v for k, v in ROWS.items()}, []
    def load_dataset(path, name=None, split=None):
        calls.append((path, name, split))
        return datasets.Dataset.from_list([rows[path]])
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def write(name, rows):
    "A file of rows in the format that its name says."
    import datasets
    data = datasets.Dataset.from_list(rows)
    with (gzip.open if name.endswith(".gz") else open)(name, "wb") as f:
        {"json": data.to_json, "jsonl": data.to_json, "csv": data.to_csv,
         "parquet": data.to_parquet}[name.split(".")[1]](f)
    return name


@pytest.mark.parametrize("name", DATASETS)
def test_known_sets_are_asked_for_and_read(hub, name):
    by_name, by_path = load_problems(name), load_problems(CALLS[name][0])
    assert hub == [CALLS[name]] * 2 and by_name == by_path and by_name[0].prompt == "?"
    assert math_verify(r"It is \boxed{7}.", by_name[0].answer) and not math_verify("8", by_name[0].answer)
    load_problems(name, split="validation", subset="other")
    assert hub[-1] == (CALLS[name][0], "other", "validation")


@pytest.mark.parametrize("name", DATASETS)
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "parquet"])
def test_a_local_copy_is_read_like_the_set(name, kind):
    problem, = load_problems(write(f"copy.{kind}", [ROWS[name]]), like=name)
    assert problem.prompt == "?" and math_verify("7", problem.answer)


@pytest.mark.parametrize("kind", ["jsonl", "json", "jsonl.gz", "json.gz", "csv", "csv.gz", "parquet"])
@pytest.mark.parametrize("column", ["prompt", "problem", "question"])
def test_a_file_of_ones_own(kind, column):
    rows = [{column: f"{i}+1", "answer": i + 1, "other": None} for i in range(5)]
    name = write(f"own.{kind}", rows)
    assert load_problems(name) == [Problem(f"{i}+1", str(i + 1)) for i in range(5)]
    assert load_problems(name, n=2) == load_problems(name)[:2] == load_problems(name, n=9)[:2]


def test_columns_can_be_named():
    name = write("own.jsonl", [{"problem": "a", "q": "b", "answer": "1", "a": 2.5}])
    assert load_problems(name) == [Problem("a", "1")]
    assert load_problems(name, prompt="q", answer="a") == [Problem("b", "2.5")]


WANTED = "must be a text that is not empty, or a conversation with one turn of the user"
BAD = {
    '{"problem": "a"}': "has no column that we take for the answer, it has problem: name",
    '{"task": "a", "answer": 1}': "has no column that we take for the prompt, it has task, answer: name",
    '{"problem": "a", "answer": 1}\n{"problem": " ", "answer": 1}':
        f"row 2: column 'problem' {WANTED}; it is ' '",
    '{"problem": "a", "answer": 1}\n{"answer": 1}':
        f"row 2: column 'problem' {WANTED}; it is None",
    '{"problem": "a", "answer": "x"}\n{"problem": "b"}':
        "row 2: column 'answer' must hold an answer, a text or a number; it is None",
    '{"problem": "a", "answer": ""}': "row 1: column 'answer' must hold",
    '{"problem": "a", "answer": true}': "row 1: column 'answer' must hold",
    '{"problem": "a", "answer": ["1", "2"]}': "row 1: column 'answer' must hold",
    '{"problem": "a", "answer": 1}\n{"problem"': "cannot be read as json", "": "cannot be read as json: it is empty",
    "[]": "cannot be read as json",
}


@pytest.mark.parametrize("text", BAD)
def test_bad_files_get_a_sentence(text, tmp_path):
    (tmp_path / "bad.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"^bad\.jsonl") as e: load_problems("bad.jsonl")
    assert BAD[text] in str(e.value) and "\n" not in str(e.value)


def test_bad_rows_can_be_left_out_and_are_counted():
    row = lambda question, answer: [{"question": question, "answer": answer}]
    good, bad = row("a", "#### 1"), row("c", "none")
    name = write("bad.jsonl", row("a", "#### 1,000") + row("", "#### 1") + bad)
    with pytest.warns(UserWarning, match="2 of 3 rows were left out; the first: bad.jsonl, row 2: column 'question'"):
        assert load_problems(name, like="gsm8k", skip=True) == [Problem("a", "1000")]
    with pytest.raises(ValueError, match="row 3: column 'answer' .*, after ####; it is 'none'"):
        load_problems(write("bad.jsonl", good * 2 + bad), like="gsm8k")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="holds no problems"):
        load_problems(write("bad.jsonl", bad), like="gsm8k", skip=True)


@pytest.mark.parametrize("args, error, message", [
    (dict(source="math50"), ValueError, "no file or set of problems 'math50'; the nearest is 'math500'"),
    (dict(source="no.csv"), FileNotFoundError, "there is no file no.csv"),
    (dict(source="gsm8k", n=0), ValueError, "n must be at least 1; it is 0"),
    (dict(source="gsm8k", min_terms=2), TypeError, "only generated tasks take min_terms"),
    (dict(source="x.csv", like="gsm8"), ValueError, "the nearest is 'gsm8k'"),
    (dict(source="gym:chain_sun"), ValueError, "the nearest is 'chain_sum'"),
    (dict(source="gym:chain_sum", terms=2), ValueError,
     "does not take {'terms': 2}.*its options are min_terms, max_terms"),
    (dict(source="gym:chain_sum", min_terms=0), ValueError, "does not take {'min_terms': 0}"),
])
def test_bad_arguments_get_a_sentence(args, error, message):
    with pytest.raises(error, match=message): load_problems(**args)


def test_a_hub_out_of_reach_is_said_with_the_way_round(monkeypatch):
    def load_dataset(*args, **kwargs): raise OSError("no route\nto it")
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(ConnectionError, match="gsm8k cannot be loaded from the hub: no route to it; a local copy"):
        load_problems("gsm8k")
    with pytest.raises(ConnectionError, match="some/set cannot"): load_problems("some/set")


def test_generated_problems_come_by_seed():
    a, b = (load_problems("gym:chain_sum", n=20, seed=s, min_terms=2, max_terms=3, max_digits=1) for s in (0, 1))
    assert a == load_problems("gym:chain_sum", n=20, min_terms=2, max_terms=3, max_digits=1) != b and len(b) == 20
    assert all(eval(re.search(r"[-+ \d]+ =", p.prompt)[0][:-1]) == int(p.answer) for p in a + b)


def test_without_reasoning_gym_the_install_line_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'capo-rl\[tasks\]'"): load_problems("gym:chain_sum")


# What people have on disk, the same problem each time.
ASK = [{"role": "user", "content": "Half of 36?"}]
SHAPES = {
    "GSM8K": {"question": "Half of 36?", "answer": "36/2 = 18\n#### 18"},
    "MATH": {"problem": "Half of 36?", "level": "Level 1", "type": "Algebra", "solution": r"Here: $\boxed{18}$."},
    "MATH-500": {"problem": "Half of 36?", "solution": r"$\boxed{19}$", "answer": "18", "level": 1},
    "DeepScaleR": {"problem": "Half of 36?", "answer": "18", "solution": "It is 18."},
    "DAPO": {"data_source": "math_dapo", "prompt": ASK, "ability": "MATH",
             "reward_model": {"ground_truth": "18", "style": "rule-lighteval/MATH_v2"}, "extra_info": {"index": "a"}},
    "DAPO, processed": {"prompt": "Half of 36?", "solution": "18", "source": "x"},
    "verl's GSM8K": {"data_source": "openai/gsm8k", "prompt": ASK,
                     "reward_model": {"style": "rule", "ground_truth": "18"},
                     "extra_info": {"answer": "#### 19", "question": "?"}},
    "TRL, text": {"prompt": "Half of 36?", "ground_truth": "18"},
    "TRL, conversation": {"prompt": ASK, "solution": r"\boxed{18}"},
    "OpenAI": {"messages": [*ASK, {"role": "assistant", "content": "36/2 = 18\n#### 18"}]},
    "number": {"question": "Half of 36?", "final_answer": 18.0},
    "list of one": {"prompt": ASK, "reward_model": {"ground_truth": ["18"]}},
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_common_shapes_are_recognised_and_said(name, kind):
    said, file = [], write(f"x.{kind}", [SHAPES[name]] * 3)
    problems = load_problems(file, say=said.append)
    assert problems == [Problem("Half of 36?", "18")] * 3 and not ungradable(problems, math_verify)
    assert len(said) == 1 and said[0].startswith(f"{file}: questions in") and "\n" not in said[0]


def test_what_is_named_is_not_looked_for():
    row, said = SHAPES["MATH-500"], []
    assert load_problems(write("x.jsonl", [row]), answer="solution") == [Problem("Half of 36?", "19")]
    assert load_problems(write("y.jsonl", [SHAPES["DAPO"]]), answer="extra_info.index")[0].answer == "a"
    assert load_problems(write("z.jsonl", [SHAPES["GSM8K"]]), like="gsm8k", say=said.append)[0].answer == "18"
    assert not said                                        # a known set has nothing to be recognised


@given(st.integers(1, 9), st.integers(0, 9))
def test_a_mark_counts_if_half_of_the_answers_carry_it(marked, plain):
    rows = [{"q": "?", "answer": "so #### 1"}] * marked + [{"q": "?", "answer": "so 1"}] * plain
    found = recognised(rows, Source(prompt="q"))
    assert problem_of(rows[0], found).answer == ("1" if marked >= plain else "so #### 1")


def test_a_set_is_trained_on_by_its_own_split(hub):
    load_problems("gsm8k"), load_problems("gsm8k", training=True), load_problems("deepscaler", training=True)
    assert [call[2] for call in hub] == ["test", "train", "train"]
    for name in set(DATASETS) - {"gsm8k", "deepscaler"}:
        with pytest.raises(ValueError, match=f"{name} is for evaluation"): load_problems(name, training=True)
    load_problems("math500", training=True, split="test")
    assert hub[-1][2] == "test"


answers = st.sampled_from(["7", "-2", "0.5", r"\frac{1}{2}", "[1, 2)", "1,000", "(A)", "Monday", "x^2+1", "3:5"])


@given(st.lists(answers, min_size=1, max_size=9), st.integers(0, 9))
def test_references_that_are_answers_pass_and_solutions_are_counted(good, bad):
    text = "Half of 36 is 18.\n#### 18"
    problems, said = [Problem("?", a) for a in good + [text] * bad], []
    if bad and 2 * bad >= len(problems):
        with pytest.raises(ValueError, match=f"^{bad} of {len(problems)} references.*--answer-column"):
            check_references(problems, math_verify)
    else:
        check_references(problems, math_verify, say=said.append)
        assert [f"{bad} of {len(problems)} references" in line for line in said] == [True] * (bad > 0)


def test_the_form_is_the_models():
    assert not ungradable(arithmetic(20), verify, str) and in_a_box("7") == r"\boxed{7}"
    assert ungradable([Problem("?", "x")], verify)         # a verifier that reads integers alone
    long = Problem("?", " ".join(["word"] * 31))
    assert ungradable([long], math_verify) == [long] and math_verify(in_a_box(long.answer), long.answer)


def config(**options): return RunConfig(**dict(model="tiny", steps=1, questions=2, group_size=2) | options)


def test_training_and_validation_are_read_by_the_same_options(tmp_path):
    rows = [{"task": f"{i}+1=", "result": f"#### {i + 1}"} for i in range(6)]
    data, held = write("a.jsonl", rows), write("b.jsonl", rows[4:] + [{"task": "9+9=", "result": "#### 18"}])
    said, columns = [], dict(prompt_column="task", answer_column="result")
    training, test = run_problems(config(data=data, validation=held, **columns), said.append)
    assert training[0] == Problem("0+1=", "1") and [p.answer for p in test] == ["5", "6", "18"]
    assert "2 of 3 questions of the validation are among those that are trained on" in said
    with pytest.raises(ValueError, match="no column that we take for the prompt"): run_problems(config(data=data))


def test_a_run_on_worked_solutions_stops_before_it_starts(tmp_path):
    data = write("a.jsonl", [{"question": "?", "text": "It is 18, since 36 / 2 is.\n#### 18"}] * 4)
    with pytest.raises(ValueError, match="has no column that we take for the answer"): run(config(data=data), "out")
    data = write("b.jsonl", [{"question": "?", "answer": " ".join(["so"] * 40)}] * 4)
    with pytest.raises(ValueError, match="4 of 4 references"): run(config(data=data), "out")
    assert not Path("out").exists()


def test_one_set_of_options():
    write("x.jsonl", [{"q": "?", "a": {"b": "7"}}])
    options = DataOptions(prompt_column="q", answer_column="a.b")
    assert options.problems("x.jsonl") == options.held_out("x.jsonl") == [Problem("?", "7")]
    assert json.loads(Path("x.jsonl").read_text())["a"] == {"b": "7"}
