"The arithmetic world: its problems, its teachers, its tokenizer, its pages. And problems from elsewhere."
import gzip, random, re, sys

import pytest
import torch
from hypothesis import given, strategies as st

from capo.answer import math_verify
from capo.task import (
    DATASETS, FACTS, INSTRUCTION, Problem, Teacher, arithmetic, arithmetic_tokenizer, base_model, calibrated_teacher,
    corpus_batch, last_integer, limit_threads, load_problems, pretrain, running_totals, systematic_teacher, tiny_lm,
    verify, with_template)

terms = st.lists(st.tuples(st.sampled_from("+-"), st.integers(1, 9)), min_size=2, max_size=5)
chains = terms.map(lambda x: "".join(f"{s}{d}" for s, d in x)[1:] + "=")
tokenizer = arithmetic_tokenizer()


@given(st.text("ab ,+=", max_size=5), st.integers(-999, 999), st.text("ab ,+=", max_size=5), st.integers(-999, 999))
def test_the_last_integer_counts(before, n, after, other):
    text = f"{before},{other} {n}{after}"
    assert last_integer(text) == str(n) and verify(text, str(n)) and verify(text, str(other)) == (n == other)
    assert last_integer(before + after) is None and not verify(before + after, str(n))


def test_the_extractor_is_a_choice():
    first = lambda text: text.split(",")[0]
    assert verify("3,4", "3", first) and not verify("3,4", "4", first) and not verify("3,4", "3")


@given(chains)
def test_running_totals_are_what_python_computes(prompt):
    steps = running_totals(prompt)
    prefixes = [prompt[:2 * i - 1] for i in range(2, len(prompt) // 2 + 1)]
    assert [total for *_, total in steps] == [eval(p) for p in prefixes]
    assert [f"{sign}{d}" for sign, d, _ in steps] == re.findall(r"[+-]\d", prompt[1:])


@pytest.mark.parametrize("terms", [(2,), (2, 3, 4), (5,)])
def test_problems_hold_their_answers(terms):
    problems = arithmetic(100, seed=3, terms=terms)
    assert len(problems) == 100 and all(eval(p.prompt[:-1]) == int(p.answer) and p.prompt[-1] == "=" for p in problems)
    assert {len(re.findall(r"\d", p.prompt)) for p in problems} == set(terms)


def test_problems_are_drawn_by_seed_without_the_excluded():
    assert arithmetic(50, 1) == arithmetic(50, 1) != arithmetic(50, 2)
    assert arithmetic(50, 1)[:20] == arithmetic(20, 1)
    two = arithmetic(100, 1, distinct=True, terms=(2,))
    assert len({p.prompt for p in two}) == 100
    rest = arithmetic(62, 2, {p.prompt for p in two}, distinct=True, terms=(2,))
    assert len({p.prompt for p in two + rest}) == 162                             # 9 · 2 · 9: all that there are


@given(chains, st.integers(0, 99))
def test_a_teacher_without_slips_is_right(prompt, seed):
    pages = Teacher(dict.fromkeys(FACTS, 0.))(prompt, random.Random(seed))
    assert pages == ",".join(str(total) for *_, total in running_totals(prompt))
    assert verify(pages, str(eval(prompt[:-1])))


@given(chains, st.integers(0, 99))
def test_a_slip_carries_on(prompt, seed):
    "A teacher who always slips by 10 is off by 10 more at every step; without offsets, by 1…9 either way."
    steps = running_totals(prompt)
    always = dict.fromkeys(FACTS, 1.)
    page = [int(x) for x in Teacher(always, dict.fromkeys(FACTS, 10))(prompt, random.Random(seed)).split(",")]
    assert page == [total + 10 * (i + 1) for i, (*_, total) in enumerate(steps)]
    page = [int(x) for x in Teacher(always)(prompt, random.Random(seed)).split(",")]
    off = [0] + [x - total for x, (*_, total) in zip(page, steps)]
    assert all(1 <= abs(b - a) <= 9 for a, b in zip(off, off[1:]))


def test_slips_come_at_the_rate_of_their_fact():
    teacher, rng = Teacher(dict.fromkeys(FACTS, 0.) | {(7, "+", 5): .3}), random.Random(0)
    slips = [teacher("7+5=", rng) != "12" for _ in range(2000)]
    assert sum(slips) / 2000 == pytest.approx(.3, abs=.05) and teacher("7+4=", rng) == "11"


def test_the_two_teachers():
    calibrated, systematic = calibrated_teacher(1), systematic_teacher(1)
    assert set(calibrated.rates) == set(systematic.rates) == set(FACTS) and len(FACTS) == 180
    assert all(.4 <= x <= .55 for x in calibrated.rates.values()) and calibrated.offsets is None
    assert all(.02 <= x <= .9 for x in systematic.rates.values())
    assert all(1 <= abs(x) <= 9 for x in systematic.offsets.values())
    assert max(systematic.rates.values()) > .8 and min(systematic.rates.values()) < .1
    assert calibrated == calibrated_teacher(1) != calibrated_teacher(2)
    assert systematic == systematic_teacher(1) != systematic_teacher(2)


@given(st.lists(st.text("0123456789+-=,", min_size=1, max_size=9), min_size=1, max_size=4))
def test_a_token_is_a_character(texts):
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    # pads left
    assert batch.attention_mask.sum(1).tolist() == [len(t) for t in texts] and (batch.attention_mask[:, -1] == 1).all()
    assert tokenizer.batch_decode(batch.input_ids, skip_special_tokens=True) == texts
    assert tokenizer("<eos>").input_ids == [tokenizer.eos_token_id]


def test_the_labels_are_the_response_and_its_end():
    teacher = calibrated_teacher()
    ids, attention, labels = corpus_batch(teacher, tokenizer, random.Random(0), 64)
    for i, a, label in zip(ids, attention, labels):
        page, learnt = tokenizer.decode(i[a.bool()]), tokenizer.decode(label[label != -100])
        assert page.endswith(learnt) and page[:-len(learnt)].endswith("=")
        assert learnt.endswith("<eos>") and "=" not in learnt
        assert learnt.count(",") == len(running_totals(page.split("=")[0])) - 1
        assert (label[a == 0] == -100).all()


def test_pretraining_learns_and_repeats():
    def run(steps):
        model = tiny_lm(16, 1, 2)
        return list(pretrain(model, tokenizer, calibrated_teacher(), steps, 16)), model.state_dict()
    (loss, weights), (again, same) = run(30), run(30)
    assert len(loss) == 30 and loss == again and all(weights[k].equal(same[k]) for k in weights)
    assert sum(loss[-5:]) < .95 * sum(loss[:5])


def test_tiny_models_are_drawn_by_seed_and_leave_torchs_generator_alone():
    before = torch.get_rng_state()
    a, b, c = tiny_lm(16, 1, 2, seed=1), tiny_lm(16, 1, 2, seed=1), tiny_lm(16, 1, 2, seed=2)
    assert torch.get_rng_state().equal(before)
    assert a.lm_head.weight.equal(b.lm_head.weight) and not a.lm_head.weight.equal(c.lm_head.weight)


def test_the_shipped_model_is_often_wrong_and_knows_it():
    from capo.evaluate import evaluate
    from capo.rollout import HFSampler, rollout
    model, tokenizer = base_model()
    numbers = evaluate(rollout(HFSampler(model, tokenizer, 16), arithmetic(64, seed=5), 16, verify))
    assert not model.training and .05 < numbers["accuracy"] < .35 and numbers["auc_mean"] > .65
    assert numbers["truncated"] < .02


# Problems from elsewhere

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


BAD = {
    '{"problem": "a"}': "has no column 'answer', it has problem: name the right one by answer=",
    '{"task": "a", "answer": 1}': "has no column 'prompt', it has task, answer: name the right one by prompt=",
    '{"problem": "a", "answer": 1}\n{"problem": " ", "answer": 1}':
        "row 2: column 'problem' must be a text that is not empty; it is ' '",
    '{"problem": "a", "answer": 1}\n{"answer": 1}':
        "row 2: column 'problem' must be a text that is not empty; it is None",
    '{"problem": "a", "answer": "x"}\n{"problem": "b"}':
        "row 2: column 'answer' must hold an answer, a text or a number; it is None",
    '{"problem": "a", "answer": ""}': "row 1: column 'answer' must hold",
    '{"problem": "a", "answer": true}': "row 1: column 'answer' must hold",
    '{"problem": "a", "answer": ["1"]}': "row 1: column 'answer' must hold",
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
    with pytest.raises(ValueError, match="row 3: column 'answer' .* that after_hashes can read; it is 'none'"):
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


class Chat:
    "What with_template needs of a tokenizer."
    chat_template, bos_token, bos_token_id = "yes", "<s>", 1
    def __init__(self, adds_bos): self.adds_bos = adds_bos
    def __call__(self, text): return type("Batch", (), {"input_ids": [1] if self.adds_bos else []})
    def apply_chat_template(self, chat, tokenize, add_generation_prompt):
        assert not tokenize and add_generation_prompt
        return "<s>" + "".join(f"[{m['role']}]{m['content']}" for m in chat) + "[assistant]"


def test_templates():
    problem = [Problem("1+1?", "2")]
    prompt = lambda *args, **kwargs: with_template(problem, *args, **kwargs)[0].prompt
    assert prompt() == f"1+1?\n{INSTRUCTION}" and prompt(instruction=None) == "1+1?"
    assert prompt(system="Be brief.", instruction="") == "Be brief.\n\n1+1?"
    assert prompt(Chat(False), "Be brief.") == f"<s>[system]Be brief.[user]1+1?\n{INSTRUCTION}[assistant]"
    # the tokenizer will put its <s> in front
    assert prompt(Chat(True), instruction="Go.") == "[user]1+1?\nGo.[assistant]"
    assert with_template(problem, Chat(True))[0].answer == "2"
    with pytest.raises(ValueError, match="no chat template"): with_template(problem, tokenizer)


def test_small_models_get_one_thread():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with torch.device("meta"): assert limit_threads(torch.nn.Linear(4096, 4096)) == 2
        assert limit_threads(tiny_lm()) == torch.get_num_threads() == 1
    finally: torch.set_num_threads(before)
