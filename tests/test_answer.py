"Answers: found, compared, graded, grouped; and helpers that neither hang, nor evaluate, nor outlive us."
import inspect
import itertools
import json
import os
import random
import re
import select
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

import capo.answer as answer
from capo.answer import (CLAIM, FORMULA, IDLE, Helper, asked, boxed, canonical, equal_answers, extract_answer,
                         group_answers, math_verify, same_answer, same_answers, stated, tidy)

CASES = [json.loads(line) for line in (Path(__file__).parent/"data"/"answers.jsonl").read_text("utf-8").splitlines()]
EQUAL, GRADE = ([c for c in CASES if c["kind"] == kind] for kind in ("equal", "grade"))

# Ways of writing equal things, one class a row; things of different rows differ.
TABLE = [
    ["1/2", "0.5", ".50", r"\frac12", r"\dfrac{1}{2}", "½", r"50\%", "50%", r"\sqrt{1/4}", r"\sin(\pi/6)", r"2^{-1}",
     "$x = 0.5$", "(0.5)"],
    ["50", "50.0", r"50\text{ cm}", "50^\\circ", r"\$50", r"5\times 10^1", "50 apples", "€50", "50 km/h"],
    [r"2\sqrt{3}", r"\sqrt{12}", r"\frac{6}{\sqrt{3}}", "12^{1/2}", "2√3"],
    ["1234.5", "1,234.5", r"1{,}234.5", r"1\,234.50", r"\frac{2469}{2}", "1234 1/2", "1\u2009234.5"],
    ["x^2-1", "(x-1)(x+1)", "-1+x^2", r"y = x^2 - 1", "x² − 1"],
    [r"\pi", r"\frac{2\pi}{2}", "π"],
    ["3.14159265", r"\frac{314159265}{100000000}"],
    ["1/3", r"0.\overline{3}", "0.(3)", "0.333..."],
    ["(1, 2, 3)", r"\left(1,2,3\right)", r"(\frac{2}{2}, 2, 3.0)", r"(1, \sqrt{4}, 3)"],
    ["(3,2,1)"], ["[0,1)", r"\left[0, 1\right)", r"0 \le x < 1"], ["(0,1]"],
    ["x<0 or x>1", r"(-\infty,0)\cup(1,\infty)"],
    [r"\{1,2\}", r"\{2, 1\}", "1, 2", "2,1", "1 and 2"], ["12, 144", "144, 12"], ["12144", "12,144"],
    ["i^2", "-1", r"e^{i\pi}"], [r"\frac{1}{1777!}"], [r"\frac{1}{1779!}"],
    [r"\text{Evelyn}", "Evelyn", "evelyn"], ["listen"], [r"\text{Silent}", "silent"], ["xy", "yx"],
    ["B", "(B)", r"\text{(B)}", r"\textbf{B}", "B: the longer tube"], ["ABC"], ["CBA"],
    ["3:30 pm", "3:30 P.M."], ["3:30 am"],
    [r"\text{Alice and }\text{Bob}"], [r"\text{Alice and }\text{Carol}"], [r"\infty", "∞"],
    [r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1.0 \\ 4/2 \end{pmatrix}"],
    ["3t"], ["3h"], ["e^{-50}"], ["e^{-60}"], ["0"], ["2024-01-05"], ["1010_2", "1010_{2}"], ["1010_3"],
]
WRITTEN = [(row, text) for row, texts in enumerate(TABLE) for text in texts]
HOSTILE = ["9^{9^{9^{9}}}", "9^9^9^9", "{" * 3000 + "}" * 3000, "{" * 400 + "5" + "}" * 400, "9" * 100_000,
           r"\frac{1}{2", "5\x00", "}{", "", " ", "2^3^2", r"\frac{1}{0}", "__import__('os').system('true')",
           r"\operatorname{eval}('1')((((", "\ud800"]
# For the tests in which something hangs: seconds for the whole, so that a failure is one and not a stall.
limited = pytest.mark.timeout(120)


@limited
@pytest.mark.parametrize("case", EQUAL, ids=lambda c: " ".join(c["input"])[:40])
def test_equal(case):
    a, b = case["input"]
    assert same_answer(a, b) is case["expected"] and same_answer(b, a) is case["expected"]


@limited
@pytest.mark.parametrize("case", GRADE, ids=lambda c: " ".join(c["input"])[:40])
def test_grade(case): assert math_verify(*case["input"]) is case["expected"]


@limited
@pytest.mark.parametrize("texts", TABLE, ids=lambda texts: texts[0])
def test_ways_of_writing_the_same(texts):
    assert all(equal_answers(a, b) is True for a, b in itertools.product(texts, texts))


@limited
@given(st.sampled_from(WRITTEN), st.sampled_from(WRITTEN))
@settings(max_examples=150)
def test_equality_is_of_meaning_and_symmetric(one, other):
    (i, a), (j, b) = one, other
    assert equal_answers(a, b) is (i == j) and equal_answers(b, a) is (i == j)
    assert same_answer(a, b) is same_answer(b, a)


# Pieces of what models write, in any order.
PIECES = [*"0123456789.,:;%$/^*-+=()[]{} ", *"xyiABe", r"\frac", r"\sqrt", r"\text", r"\pi", r"\%", " cm", "√", "½",
          "²", " or ", " and ", " pm", "million", "<", "∞"]
pieces = st.lists(st.sampled_from(PIECES), max_size=7).map("".join)


@limited
@given(pieces, pieces)
@settings(max_examples=150)
def test_equality_is_symmetric_whatever_is_written(a, b):
    for f in (equal_answers, same_answer): assert f(a, b, 1.) is f(b, a, 1.)
    assert extract_answer(a) != ""


WRITES = ["$", r"\(", r"\)", r"\[", r"\]", r"\boxed{", r"\fbox {", r"\\", "\\", "\n", "1,234", "3/4", "sin", "ln",
          "cosh", "Asin", "US$5", "A$3", "AUS$2", "the ", "Word", "anSwer is ", "The answer: ", "right choice is ",
          "#### ", "step ", "E5", "<think>", "</think>", "<answer>", "</answer>", "<confidence>", "wait", "(B)", " of "]
written = st.lists(st.sampled_from(PIECES + WRITES), max_size=14).map("".join) | st.sampled_from(
    [text for case in CASES for text in case["input"]])
EVERY_START = re.compile(FORMULA.pattern[FORMULA.pattern.index("(?:\n"):], re.X)     # without what passes over prose
EVERY_CLAIM = re.compile(CLAIM.pattern.removeprefix(r"(?=[acr\#])"), CLAIM.flags)


@given(written)
@settings(max_examples=500)
def test_what_makes_reading_fast_changes_no_match(text):
    for fast, slow in ((FORMULA, EVERY_START), (CLAIM, EVERY_CLAIM)):
        assert [m.span() for m in fast.finditer(text)] == [m.span() for m in slow.finditer(text)]


@given(st.lists(st.sampled_from(["{", "}", r"\{", r"\\", "a", r"\text{", "\n"]), max_size=8).map("".join), written)
def test_what_comes_before_the_first_box_does_not_matter(before, text):
    assert boxed(before + " " + text) == boxed(text)


@given(st.text(min_size=1))
def test_every_text_equals_itself(text):
    assert equal_answers(text, text) is same_answer(text, text) is (True if text.strip() else None)
    assert group_answers([text, None, text]) == ([0, -1, 0] if text.strip() else [-1] * 3)


@given(st.integers(-10**9, 10**9), st.integers(1, 10**6), st.integers(1, 99))
def test_plain_numbers_are_exact(p, q, k):
    fractions = f"{p}/{q}", rf"\dfrac{{{p * k}}}{{{q * k}}}", rf"-\frac{{{-p}}}{{{q}}}", rf"\frac{{{-p}}}{{-{q}}}"
    assert {canonical(text) for text in fractions} == {Fraction(p, q)}
    wholes = f"{p:,}", f"{p}.000", f"${p}$.", rf"{p * 100}\%", f"{p} apples", f"{p:,}".replace(",", "\u202f"), f"{p} €"
    assert {canonical(text) for text in wholes} == {p}
    assert equal_answers(str(p / 1024), rf"\frac{{{p}}}{{1024}}") is True
    assert equal_answers(str(p), f"{p}.000001") is False


@given(st.integers(0, 99), st.integers(1, 99), st.integers(1, 99), st.sampled_from(["", "-"]))
def test_mixed_and_recurring_numbers(whole, top, bottom, sign):
    value = (whole + Fraction(top, bottom)) * (-1 if sign else 1)
    assert canonical(f"{sign}{whole} {top}/{bottom}") == canonical(rf"{sign}{whole}\frac{{{top}}}{{{bottom}}}") == value
    assert canonical(rf"{sign}{whole}.\overline{{{top:02}}}") == (whole + Fraction(top, 99)) * (-1 if sign else 1)


@given(st.lists(st.integers(-200, 2000), min_size=2, max_size=6), st.randoms())
def test_a_list_is_its_members(members, rng):
    shuffled = rng.sample(members, len(members))
    a, b = (", ".join(map(str, x)) for x in (members, shuffled))
    assert canonical(a) == canonical(rf"\{{{b}\}}") and equal_answers(a, b + f", {max(members) + 1}") is (members == [])
    assert equal_answers(f"({a})", f"({b})") is (members == shuffled)


def test_no_rounding():
    assert equal_answers("1/3", "0.333333") is False and equal_answers(r"\sqrt{2}", "1.41421356237") is False
    assert equal_answers(r"0.1\pi", r"\frac{\pi}{10}") is True and equal_answers("0.1+0.2", "0.3") is True


simple = st.text("ab1,. \\^", max_size=4).map(lambda s: s.replace("\\", r"\{"))
balanced = st.recursive(simple, lambda x: st.tuples(x, x, x).map(lambda t: f"{t[0]}{{{t[1]}}}{t[2]}"), max_leaves=12)


@given(balanced, balanced, st.text("ab{1 ", max_size=5))
def test_the_last_closed_box(first, last, after):
    text = rf"\boxed{{{first}}} then \boxed {{{last}}}{after}"
    assert boxed(text) == last.strip() and boxed(text + r"\boxed{" + first) == last.strip()
    assert extract_answer(text, fallback=False) == (last.strip() or None)
    assert boxed(rf"\boxed{{{first}}}, \boxed{{{last}}}{after}") == f"{first.strip()}, {last.strip()}"


@given(st.decimals(-10**6, 10**6, places=3), st.text("abc \n", max_size=4))
def test_the_last_number(x, words):
    assert canonical(stated(f"{words} 7 or {x} {words}")) == canonical(stated(f"{words} {x:,}. {words}")) == Fraction(x)
    assert stated(words) is None and extract_answer(f"{x}", fallback=False) is None


def test_a_minus_between_numbers_is_no_sign():
    texts = "9-4", "(9)-4", "x-4", "= -4", "−4", "(-4)", "9 - 4"
    assert [canonical(stated(t)) == -4 for t in texts] == [False] * 3 + [True] * 3 + [False]


@limited
@pytest.mark.parametrize("text", HOSTILE, ids=lambda t: repr(t[:20]))
def test_hostile_answers_are_undecided(text):
    assert equal_answers(text, "5", 1.) is equal_answers("5", text, 1.) is same_answer(text, "5", 1.) is None
    assert math_verify(rf"\boxed{{{text}}}", "7") is False
    assert equal_answers(r"\sqrt{25}", "5") is True
    assert group_answers([text, "5", text, r"\sqrt{25}"], 1.) == ([0, 1, 0, 1] if text.strip() else [-1, 0, -1, 0])


@limited
def test_reading_takes_linear_time():
    for text in (r"\boxed{", "{", "}", r"\boxed{a}", r"\boxed{a},", "7", "7,", "1,111", "-", " ", r"\frac", "1/", "$",
                 "$a", r"\(", "=", "x=", "ab ", "the answer is ", "(", "[1,", "and ", "step ", "<think>", "<answer>",
                 "</answer>", "√", "½"):
        long = text * (50_000 // len(text))
        extract_answer(long), tidy(long)
        canonical(text * (1000 // len(text))), same_answer(long, "1")


@limited
def test_the_limit_holds_in_a_thread_and_however_alarms_are_set():
    out, blocked, alarms = [], Helper(), (signal.SIGALRM, signal.SIGPROF)
    def ask():
        signal.pthread_sigmask(signal.SIG_BLOCK, alarms)                # of this thread, so of the process it starts
        out.extend([equal_answers("8^{9^{9^{9}}}", "5", .5), blocked.ask("7^{9^{9^{9}}}", .5)])
        out.append(blocked.ask(r"\sqrt{9}", 9.))
    before = [signal.signal(s, signal.SIG_IGN) for s in alarms]
    try:
        thread = threading.Thread(target=ask)
        thread.start(); thread.join()
    finally:
        for s, handler in zip(alarms, before): signal.signal(s, handler)
    blocked.stop()
    assert out == [None, "?", "3 0"]


@limited
def test_many_threads_get_their_own_replies():
    n = range(2, 42)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: asked(rf"\sqrt{{{i * i}}}", 29.), n))
    assert found == [answer._key(Fraction(i), 1.) for i in n]


@pytest.fixture
def helper():
    h = Helper()
    yield h
    if h.process: h.stop()


@limited
def test_a_killed_helper_is_replaced(helper):
    assert helper.ask(r"\sqrt{4}", 30.) == "2 0"
    pid = helper.process.pid
    os.kill(pid, signal.SIGKILL)
    assert helper.ask(r"\sqrt{9}", 30.) == "3 0" and helper.process.pid != pid


@limited
def test_ctrl_c_reaches_us_and_not_the_helper(helper):
    assert helper.ask("a+b", "b+a", 30.) is True
    process = helper.process
    process.send_signal(signal.SIGINT)
    assert helper.ask("a+b", "b+c", 30.) is False and helper.process is process

    class Interrupted:
        "A pipe from which Ctrl-C is read."
        def readline(self): raise KeyboardInterrupt
        def close(self): pass
    process.stdout.close()
    process.stdout = Interrupted()
    with pytest.raises(KeyboardInterrupt): helper.ask("a+b", "b+a", 30.)
    assert helper.process is None and process.returncode == -signal.SIGKILL
    assert helper.ask("a+b", "b+c", 30.) is False                            # and not the reply that was left behind


@limited
def test_a_forked_child_asks_helpers_of_its_own():
    assert equal_answers(r"\sqrt{16}", "4")
    pids = {h.process.pid for h in IDLE if h.process}
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            verdict = equal_answers(r"\sqrt{17}", "5")
            os.write(write, json.dumps([verdict, [h.process.pid for h in IDLE if h.process]]).encode())
        finally: os._exit(0)
    os.waitpid(child, 0)
    verdict, theirs = json.loads(os.read(read, 999))
    os.close(read); os.close(write)
    assert verdict is False and len(theirs) == 1 and not pids & set(theirs)
    assert equal_answers(r"\sqrt{18}", "6") is False and pids <= {h.process.pid for h in IDLE if h.process}


@limited
@pytest.mark.parametrize("at_work", [False, True])
def test_the_helper_does_not_outlive_us(at_work):
    work = "threading.Thread(target=h.ask, args=('6^{9^{9^{9}}}', 5.)).start()" if at_work else ""
    program = ("import threading\nfrom capo.answer import Helper\nh = Helper()\nh.ask('x', 30.)\n"
               f"print(h.process.pid, flush=True)\n{work}\ninput()")
    us = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    helper = os.pidfd_open(int(us.stdout.readline()))
    us.kill(); us.wait()
    assert select.select([helper], [], [], 60)[0]                            # readable when the process has ended
    os.close(helper); us.stdin.close(); us.stdout.close()


@limited
def test_the_fence_holds_whatever_the_library_does(tmp_path):
    "Were math-verify to do such things with what it is given, the helper would refuse, and reply with a question mark."
    deeds = {"nothing": "None", "eval": "eval('1+1')", "exec": "exec('x = 1')", "swallowed": "swallow()",
             "fork": "os.fork()", "compile": "compile('1', '<string>', 'eval')",
             "system": f"os.system('touch {tmp_path}/mark')",
             "program": f"__import__('subprocess').run(['touch', '{tmp_path}/mark'])", "memory": "bytearray(5 << 30)",
             "socket": "__import__('socket').socket()"}
    table = ", ".join(f'"{deed}": lambda: {code}' for deed, code in deeds.items())
    serve = inspect.getsource(answer._serve).replace("= same(*answers)", "= do[answers[0]]() or same(*answers)")
    serve = serve.replace("    for line in", f"""
    def swallow():
        try: eval('1')
        except Exception: return True
    do = {{{table}}}
    for line in""")
    source = "\n".join(map(inspect.getsource, (answer._fence, answer._reader, answer._worth))) + "\n" + serve
    questions = "".join(json.dumps([deed, "nothing", 30]) + "\n" for deed in deeds)
    command = [sys.executable, "-P", "-c", f"{source}\n_serve()"]
    run = subprocess.run(command, input=questions, capture_output=True, text=True)
    assert run.stdout.split() == ["!", "true"] + ['"?"'] * (len(deeds) - 1) and not list(tmp_path.iterdir())


@limited
def test_nothing_is_evaluated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = ("__import__('os').system('touch mark')", "exec('open(\"mark\", \"w\")')", r"\text{open('mark','w')}",
             r"\operatorname{open}('mark','w')")
    for call in calls:
        for a in (call, f"{call}+1", f"1/{call}", f"$${call}$$", f"x={call}", f"(1, {call})", f"{call} or x>1"):
            assert not same_answer(a, r"\sqrt{2}")
    assert not list(tmp_path.iterdir())


def test_no_math_verify_is_said_in_a_sentence(monkeypatch):
    monkeypatch.setattr(answer.inspect, "getsource", lambda f: "def _serve(): import no_such_module")
    with pytest.raises(RuntimeError, match="pip install math-verify"): Helper().ask("a", 1.)


def partition(ids):
    "Groups as sets of positions, so that numbering does not matter."
    return {frozenset(i for i, x in enumerate(ids) if x == g) for g in set(ids)}


@limited
@given(st.lists(st.sampled_from(WRITTEN), max_size=12))
def test_groups_are_the_classes(chosen):
    ids = group_answers([text for _, text in chosen])
    assert partition(ids) == partition([row for row, _ in chosen])
    assert list(dict.fromkeys(ids)) == list(range(len(set(ids))))            # numbered in order of appearance


@pytest.fixture
def count(monkeypatch):
    "Counts the questions that reach a helper."
    questions = []
    ask = Helper.ask
    monkeypatch.setattr(Helper, "ask", lambda self, *args: questions.append(args) or ask(self, *args))
    asked.cache_clear()
    return questions


def test_grouping_compares_no_more_than_it_must(count):
    sevens = [str(i % 7) for i in range(1000)] + [f"{i}/1" for i in range(7)]
    assert group_answers(sevens)[-7:] == list(range(7)) and not count
    assert group_answers([r"\sqrt{2}"] * 100) == [0] * 100 and not count     # one form: nothing to compare it with
    assert group_answers(["2", r"\sqrt{4}"] * 50) == [0, 0] * 50 and len(count) == 1
    group_answers(["2", r"\sqrt{4}"] * 50)
    assert len(count) == 1                                                   # remembered
    assert len(set(group_answers([rf"\sqrt{{{p}}}" for p in range(60)]))) == 60 and len(count) == 60
    assert group_answers(["2", r"\sqrt{4}"], seconds=0) == [0, 1] and len(count) == 60


@limited
def test_an_undecidable_answer_costs_one_time_limit(count):
    texts = ["5^{9^{9^{9}}}"] + [rf"\sqrt{{{p}}}" for p in (2, 3, 5, 7)] + ["5^{9^{9^{9}}}"]
    random.Random(0).shuffle(texts)
    assert len(partition(group_answers(texts, 1.))) == 5
    assert sum("5^{9" in a for a, *_ in count) == 1


@limited
def test_many_at_once():
    pairs = [(a, b) for _, a in WRITTEN[::3] for _, b in WRITTEN[::7]] * 2
    assert same_answers(pairs, workers=2) == [same_answer(*pair) for pair in pairs]
    assert same_answers([]) == []


@limited
def test_a_budget_is_kept_and_said(count):
    towers = [(f"{i}^{{9^{{9^{{9}}}}}}", "5") for i in range(2, 40)] + [("5", "5")] * 3
    with pytest.warns(UserWarning, match=r"the budget of 1 s is spent; \d+ of 39 pairs are undecided"):
        found = same_answers(towers, seconds=1., workers=2, budget=1)
    assert found[:38] == [None] * 38 and len(count) <= 8


def test_grading():
    fifty = r"\boxed{50\%}", r"\boxed{50}", r"so 50 %", r"\boxed{0.5}", "", r"\boxed{}"
    assert [math_verify(t, "50") for t in fifty] == [True, True, True, False, False, False]
    assert math_verify(r"\boxed{0.5}", r"50\%") and math_verify(r"\boxed{50}", r"50\%")
    assert not math_verify(r"\boxed{0.5\%}", r"50\%")
    assert all(type(math_verify(t, r"\sqrt{2}")) is bool for t in (r"\boxed{2^{1/2}}", r"\boxed{\frac}", "7"))
    with pytest.raises(ValueError, match="seconds must be positive"): same_answer("1", "2", 0)


def test_brackets_of_a_pair_may_be_left_off():
    assert same_answer("1, 2", "(1, 2)") is same_answer("(1, 2)", "1,2") is True
    assert same_answer("2, 1", "(1, 2)") is same_answer("1, 2", "[1, 2]") is equal_answers("1, 2", "(1, 2)") is False
