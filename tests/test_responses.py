"Files of responses: what is read, what is refused and how, the round trip, and runs that are killed."
import gzip
import json
import math
import os
import threading
from dataclasses import fields

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from capo.batches import cut_to_batches, sample_to_file
from capo.evaluate import evaluate, padded
from capo.responses import Responses, as_responses, read_responses, response_rows, write_responses
from capo.rollout import HFSampler, Rollouts, rollout
from capo.task import Problem, arithmetic, base_model, last_integer, verify

GOOD = {"id": "a", "response": "So it is 4.", "answer": "4", "reference": "4", "correct": 1, "lpm": -.5}


def line(**change): return json.dumps({k: v for k, v in (GOOD | change).items() if v is not ...}).encode()


def read(tmp_path, *lines, name="r.jsonl"):
    path = tmp_path / name
    path.write_bytes(b"\n".join(lines) + b"\n")
    return read_responses(path)


def reason(tmp_path, bad):
    "Why the second of three lines is refused; the others are read."
    found = read(tmp_path, line(), bad, line(id="b"))
    assert (len(found), found.refused, len(found.flaws)) == (2, 1, 1)
    assert found.flaws[0].startswith(f"{tmp_path / 'r.jsonl'}, line 2: ")
    return found.flaws[0].split(", line 2: ")[1]


BAD = {
    b"{": "it is not JSON", b"[1, 2]": "it is JSON, and not an object", b'"text"': "not an object",
    b"12": "not an object",
    b"null": "not an object", b"\xff\xfe": "it is not UTF-8", b"[" * 100_000: "not JSON that can be read",
    b'{"id": 1, "lpm": ' + b"9" * 5000 + b"}": "not JSON that can be read",
    line(id=...): "it has no id", line(id=None): "it has no id",
    line(id=True): "id must be text or an integer; it is true",
    line(id=1.5): "id must be", line(id=[1]): "id must be", line(id=math.nan): "id must be",
    line(lpm=math.nan): "lpm must be a finite number; it is NaN", line(lpm=-math.inf): "lpm must be a finite",
    line(lpm=.5): "lpm must be a mean of log-probabilities, at most 0; it is 0.5",
    line(lpm="-1"): 'lpm must be a finite number; it is "-1"',
    line(lpm=True): "lpm must be a finite", line(lpm=10**400): "lpm must be a finite",
    line(lpm=..., logps=[-1, "x"]): "logps must be a finite number", line(lpm=..., logps=-1): "logps must be a list",
    line(lpm=..., logps=[-1, None]): "logps must be", line(lpm=..., logps=[2., 3.]): "at most 0",
    line(logps=[-1, -math.inf]): "logps must be",
    line(correct=2): "correct must be true or false, 1 or 0, 1 or -1, yes or no; it is 2",
    line(correct="maybe"): "correct must be",
    line(correct=[1]): "correct must be", line(correct=.5): "correct must be",
    line(correct=..., reference=...): "it has neither correct nor reference",
    line(correct=..., answer=..., response=...): "no answer or response to compare",
    line(response=["x"]): "response must be text", line(answer={}): "answer must be text",
    line(length=-1): "length must be a number of tokens", line(length=1.5): "length must be",
    line(truncated="maybe"): "truncated must be",
    line(token_confidence=[]): "token_confidence must hold",
    line(token_confidence=[1, -1]): "token_confidence must hold",
    line(token_confidence="high"): "token_confidence must be",
    line(confidence=80): "confidence must lie between 0 and 1",
    line(confidence={"a": "x"}): "confidence must be", line(score="x"): "score must be a finite number",
    line(reference="5"): "question a has another reference than before", line(sample=-1): "sample must be"}


@pytest.mark.parametrize("bad", BAD, ids=lambda b: b[:40].decode(errors="replace"))
def test_a_line_that_cannot_be_used_is_named_with_its_reason(tmp_path, bad): assert BAD[bad] in reason(tmp_path, bad)


@pytest.mark.parametrize("right, wrong",
                         [(True, False), (1, 0), (1., 0.), ("true", "false"), ("True", "False"), ("1", "0"), (1, -1),
                          (1., -1.), ("yes", "no")])
def test_right_and_wrong_in_any_of_the_usual_forms(tmp_path, right, wrong):
    found = read(tmp_path, line(correct=right), line(correct=wrong))
    assert found.refused == 0 and found.correct.tolist() == [True, False]


def test_numbers_as_pandas_writes_them(tmp_path):
    found = read(tmp_path, line(id=3., length=12., truncated=0.), line(id="3", length=7))
    assert found.refused == 0 and found.id == ["3"] and found.length.tolist() == [12, 7]


def test_other_forms_of_a_file(tmp_path):
    crlf, bom = read(tmp_path, line() + b"\r", line() + b"\r", b"\r"), read(tmp_path, b"\xef\xbb\xbf" + line(), b"",
        line())
    unended = tmp_path / "u.jsonl"
    unended.write_bytes(line() + b"\n" + line())
    zipped = tmp_path / "z.gz"
    zipped.write_bytes(gzip.compress(unended.read_bytes()))
    whole = tmp_path / "w.json"
    whole.write_bytes(b"[\n" + line() + b",\n" + line() + b"\n]")
    for found in (crlf, bom, read_responses(unended), read_responses(zipped), read_responses(whole),
                  read_responses(unended.rename(tmp_path / "no_suffix"))):
        assert found.refused == 0 and found.score.tolist() == [-.5, -.5] and found.id == ["a"]


@pytest.mark.parametrize("packed", [False, True])
def test_a_pipe_is_read_once_and_whole(tmp_path, packed):
    data = b"".join(line(id=i) + b"\n" for i in range(3000))
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(gzip.compress(data) if packed else data))
    writer.start()
    found = read_responses(tmp_path / "pipe")
    writer.join()
    assert len(found) == 3000 and found.refused == 0


def test_fields_that_stand_for_one_another(tmp_path):
    found = read(tmp_path, line(id=1, lpm=..., logps=[-.2, -.4], correct=...),
                 line(id=2, correct=..., answer=..., response="Half: 1/2", reference=.5),
                 line(id=2, correct=..., answer=None, reference=.5),
                 line(id=2, correct=..., answer="0.50", reference=.5, truncated=True),
                 line(id=2, answer="x", correct=0, reference=.5, lpm=..., logps=[]))
    assert found.refused == 0 and found.id == ["1", "2"] and found.empty == 1
    assert found.score[0].item() == pytest.approx(-.3) and found.length[0] == 2
    # an answer that the budget cut off is not right
    assert found.correct.tolist() == [True, True, False, False, False]
    assert found.answer == ["4", "1/2", None, "0.50", None] and found.group.tolist() == [0, 0, -1, 0, -1]
    assert found.score.isfinite().tolist() == [True] * 4 + [False] and found.truncated.tolist() == [False, False,
        False, True, False]


def test_a_per_cent_sign_is_no_error(tmp_path):
    found = read(tmp_path,
                 *(line(id=a, correct=..., answer=a, reference=b) for a,
                   b in (("50\\%", "50"), ("50", "50%"), ("51%", "50"))))
    assert found.correct.tolist() == [True, True, False]


def test_empty_responses_are_wrong_whatever_their_line_says(tmp_path):
    found = read(tmp_path, line(), line(length=0, correct=1))
    assert found.correct.tolist() == [True, False] and found.empty == 1 and math.isnan(found.score[1])


def test_any_confidence_and_none(tmp_path):
    found = read(tmp_path, line(lpm=..., confidence=.9), line(id="b", lpm=..., confidence={"judge": .5}, score=-3),
                 line(id="c", lpm=...))
    assert found.refused == 0 and list(found.scores) == ["confidence", "score",
                                                         "judge"] and found.probabilities == ("confidence", "judge")
    assert [x.isfinite().tolist() for x in found.scores.values()] == [[True, False, False], [False, True, False],
                                                                      [False, True, False]]
    assert read(tmp_path, line(lpm=...)).scores == {}


def test_what_looks_odd_is_said(tmp_path):
    odd = lambda **change: " ".join(read(tmp_path, line(**change), line(id="b", **change)).notes)
    assert odd() == ""
    assert "are they sums?" in odd(lpm=-120) and "truncated, and are right by the file" in odd(truncated=True)
    assert "not the mean of logps" in odd(logps=[-3, -4])
    assert "1 of 2 responses come without lpm" in read(tmp_path, line(), line(lpm=...)).notes


def test_responses_of_a_question_need_not_be_neighbours(tmp_path):
    found = read(tmp_path, line(id="x"), line(id="y", lpm=-1), line(id="x", lpm=-2), line(id="y", lpm=-3),
                 line(id="x", lpm=-4))
    assert found.id == ["x", "y"] and found.score.tolist() == [-.5, -2, -4, -1, -3] and found.size.tolist() == [3, 2]


def test_doubled_lines_and_clashing_ids_are_counted(tmp_path):
    found = read(tmp_path, line(sample=0), line(sample=1), line(sample=0), line(prompt="p"), line(prompt="q"))
    assert found.refused == 2 and len(found.text) == 3
    assert "question a has sample 0 already: the line is doubled" in found.flaws[0]
    assert "another prompt" in found.flaws[1]
    path = tmp_path / "r.jsonl"
    assert read_responses(path, path).refused == 2 + 4       # all but the fourth, which has no number


def test_many_flaws_are_counted_and_some_described(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_bytes(line() + b"\n" + b"x\n" * 1000)
    found = read_responses(path, limit=3)
    assert found.refused == 1000 and len(found.flaws) == 3 and found.flaws[-1].startswith(f"{path}, line 4")


def test_a_compressed_file_that_ends_too_early(tmp_path):
    whole = gzip.compress(b"".join(line(id=i, prompt=str(i * 7919)) + b"\n" for i in range(400)))
    for cut, tail in ((len(whole) // 2, b""), (len(whole) - 4, b""), (len(whole) // 2, b"\0" * 2000)):
        path = tmp_path / "r.gz"
        path.write_bytes(whole[:cut] + tail)
        found = read_responses(path)
        assert 0 < len(found) <= 400 and found.refused >= 1 and "damaged or ends too early" in found.flaws[-1]


@pytest.mark.parametrize("content, words",
                         [(b"", "it is empty"), (b"\n\n \n", "it is empty"),
                          (b"x\ny\n", "none of its 2 lines can be used; the first: ")])
def test_a_file_without_a_response_is_a_sentence(tmp_path, content, words):
    path = tmp_path / "r.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError) as e: read_responses(path)
    assert words in str(e.value) and "\n" not in str(e.value)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"): read_responses(tmp_path / "none")
    with pytest.raises(OSError, match="irectory"): read_responses(tmp_path)


def test_answers_that_cannot_be_compared_are_wrong_and_counted(tmp_path):
    half = line(correct=..., answer="\\frac{1}{", reference="4")
    found = read(tmp_path, half, half, line(correct=..., answer="2+2", reference="4"))
    assert found.unverifiable == 2 and found.correct.tolist() == [False, False, True]
    assert found.group.tolist() == [0, 0, 1]


FIELDS = "id lpm logps correct reference answer response prompt sample length truncated token_confidence".split()
SIMPLE = st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5)
ROWS = lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), x, max_size=9)
NESTED = st.recursive(SIMPLE, ROWS, max_leaves=12)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.binary(max_size=60) | NESTED.map(lambda x: json.dumps(x).encode()), max_size=5), st.booleans())
def test_no_bytes_give_a_traceback(tmp_path, lines, zipped):
    data = line() + b"\n" + b"\n".join(lines)
    path = tmp_path / "r.jsonl"
    path.write_bytes(gzip.compress(data)[:-3] if zipped else data)
    found = read_responses(path)
    assert found.refused + len(found.text) <= 2 + data.count(b"\n") + 1
    assert not found.score.isinf().any() and all(math.isfinite(v) or math.isnan(v) for v in evaluate(found).values())


@given(st.binary(max_size=300))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_bytes_alone_are_a_sentence(tmp_path, data):
    for head in (b"", b"\x1f\x8b", b"\x1f\x8b\x08\x00"):
        (tmp_path / "r").write_bytes(head + data)
        with pytest.raises(ValueError, match="there is no response in"): read_responses(tmp_path / "r")


@pytest.fixture(scope="module")
def sampled():
    model, tokenizer = base_model()
    problems = arithmetic(12, seed=3)
    sampler = HFSampler(model, tokenizer, 12)
    return sampler, problems, rollout(sampler, problems, 4, verify)


def equal(x, y):
    if isinstance(x, dict): return x.keys() == y.keys() and all(map(equal, x.values(), y.values()))
    return x.equal(y) if isinstance(x, torch.Tensor) else x == y


@pytest.mark.parametrize("name", ["r.jsonl", "r.jsonl.gz"])
def test_the_round_trip_keeps_everything(tmp_path, sampled, name):
    _, problems, r = sampled
    for path in (tmp_path / name, tmp_path / f"again-{name}"): write_responses(path,
        response_rows(r, problems, last_integer))
    assert path.read_bytes() == (tmp_path / name).read_bytes()
    a, b = as_responses(r, problems, last_integer), read_responses(path)
    for f in fields(Responses):
        x, y = getattr(a, f.name), getattr(b, f.name)
        assert equal(x, y), f.name
    g = padded(b)
    assert g.lpm.float().equal(r.lpm) and g.correct.equal(r.reward == 1)
    assert g.text == r.text and b.prompt == [p.prompt for p in problems]
    assert list(evaluate(b).values()) == pytest.approx(list(evaluate(r).values()), rel=1e-6, nan_ok=True)


def test_an_empty_response_and_strange_text_survive_the_round_trip(tmp_path):
    text = [["\ud800 \u2028 \0", ""]]
    mask = torch.tensor([[[1, 1], [0, 0]]])
    r = Rollouts(torch.ones(1, 1).long(), torch.ones(1, 1).long(), mask, mask, -.3 * mask, torch.tensor([[1., 0.]]),
                 torch.tensor([[False, False]]), text)
    write_responses(tmp_path / "r", response_rows(r, [Problem("\"\n", "1")]))
    found = read_responses(tmp_path / "r")
    assert found.text == text[0] and found.prompt == ["\"\n"] and found.score.isfinite().tolist() == [True, False]
    assert found.empty == 1 and found.refused == 0


def test_some_of_the_questions(sampled):
    r = as_responses(sampled[2], sampled[1], last_integer)
    some = r[[4, 0]]
    g, few = padded(r), padded(some)
    assert some.id == ["4", "0"] and few.lpm.equal(g.lpm[[4, 0]]) and few.text == [g.text[4],
        g.text[0]] and few.length.equal(g.length[[4, 0]])
    same = lambda x: x[:, :, None] == x[:, None, :]
    assert same(few.same_text).equal(same(g.same_text)[[4, 0]]) and few.group.equal(g.group[[4, 0]])


def run(sampled, path, n=4, seed=0, batch=5):
    sampler, problems, _ = sampled
    return list(sample_to_file(sampler, problems, n, path, verify, last_integer, seed, batch))


def test_a_file_that_was_cut_anywhere_ends_up_the_same(tmp_path, sampled):
    whole = tmp_path / "whole.jsonl"
    assert run(sampled, whole) == [0, 5, 10, 12] and run(sampled, whole) == [12]
    data = whole.read_bytes()
    assert read_responses(whole).refused == 0 and data.count(b"\n") == 48
    for cut in (0, 1, 700, *(len(b"".join(data.splitlines(keepends=True)[:k])) for k in (19, 20, 21, 40, 47)),
                len(data) - 1):
        path = tmp_path / "cut.jsonl"
        path.write_bytes(data[:cut])
        assert run(sampled, path)[0] == data[:cut].count(b"\n") // 20 * 5 and path.read_bytes() == data


def test_the_draws_of_a_batch_depend_on_seed_and_place_only(tmp_path, sampled):
    sampler, problems, _ = sampled
    for name, seed in (("a", 0), ("b", 1)): run(sampled, tmp_path / name, seed=seed)
    list(sample_to_file(sampler, problems[:5], 4, tmp_path / "c", verify, last_integer, 0, 5))
    assert (tmp_path / "a").read_bytes().startswith((tmp_path / "c").read_bytes())
    assert (tmp_path / "a").read_bytes() != (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("content",
                         [b"results\n", b'{"id": 0, "sample": 1}\n', b"[]\n", b'{"id": 0, "sample": 0}\n' * 2,
                          b"".join(b'{"id": %d, "sample": 0}\n' % i for i in range(13))])
def test_another_file_is_left_alone(tmp_path, sampled, content):
    path = tmp_path / "r"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="name a new folder"): run(sampled, path, n=1)
    assert path.read_bytes() == content


def test_a_budget_for_comparing_answers(tmp_path):
    path = tmp_path / "r.jsonl"
    said = ["5", r"\\boxed{\\sqrt{25}}", r"\\boxed{2\\sqrt{5}}", "9"]
    path.write_text("".join(f'{{"id": {i}, "response": "{x}", "reference": "5"}}\n' for i, x in enumerate(said)))
    assert read_responses(path).correct.tolist() == [True, True, False, False]
    with pytest.warns(UserWarning, match="the budget of 0 s is spent; 2 of 2 pairs are undecided"):
        r = read_responses(path, budget=0)
    assert r.unverifiable == 2 and r.correct.tolist() == [True, False, False, False]     # digits need no comparing


def test_an_unfinished_first_line_is_cut(tmp_path):
    path = tmp_path / "r"
    path.write_bytes(b'{"id": 0, "sam')
    assert cut_to_batches(path, 3, 2, 1) == 0 and path.read_bytes() == b""
