"Answers: found, compared, grouped; and a helper that neither hangs, nor evaluates, nor outlives us."
import inspect, itertools, json, os, random, select, signal, subprocess, sys, threading
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import pytest
from hypothesis import given, settings, strategies as st

import capo.answer as answer
from capo.answer import HELPER, Helper, boxed, canonical, extract_answer, group_answers, last_number, math_verify, same_answer, serve, tidy

# Ways of writing equal things, one class a row; things of different rows differ.
TABLE = [
    ["1/2", "0.5", ".50", r"\frac12", r"\dfrac{1}{2}", "½", r"50\%", "50%", r"\sqrt{1/4}", r"\sin(\pi/6)", r"2^{-1}", "$x = 0.5$"],
    ["50", "50.0", r"50\text{ cm}", "50^\\circ", r"\$50", r"5\times 10^1"],
    [r"2\sqrt{3}", r"\sqrt{12}", r"\frac{6}{\sqrt{3}}", "12^{1/2}"],
    ["1234.5", "1,234.5", r"1{,}234.5", r"1\,234.50", r"\frac{2469}{2}"],
    ["x^2-1", "(x-1)(x+1)", "-1+x^2", r"y = x^2 - 1"],
    [r"\pi", r"\frac{2\pi}{2}"],
    ["3.14159265", r"\frac{314159265}{100000000}"],
    ["(1, 2, 3)", r"\left(1,2,3\right)", r"(\frac{2}{2}, 2, 3.0)"],
    ["(3,2,1)"], ["[0,1)", r"\left[0, 1\right)"], ["(0,1]"],
    [r"\{1,2\}", r"\{2, 1\}", "1, 2", "2,1"],
    [r"\text{Evelyn}", "Evelyn", "evelyn"], ["listen"], [r"\text{Silent}", "silent"], ["xy", "yx"], ["B", "(B)", r"\text{(B)}", r"\textbf{B}"],
    [r"\text{Alice and }\text{Bob}"], [r"\text{Alice and }\text{Carol}"], [r"\infty"], [r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"], ["3t"], ["3h"], ["e^{-50}"], ["e^{-60}"], ["0"],
]
WRITTEN = [(row, text) for row, texts in enumerate(TABLE) for text in texts]
HOSTILE = ["9^{9^{9^{9}}}", "9^9^9^9", "{" * 3000 + "}" * 3000, "{" * 400 + "5" + "}" * 400, "9" * 100_000, r"\frac{1}{2", "5\x00", "}{", "", " ", "2^3^2", r"\frac{1}{0}",
           "__import__('os').system('true')", r"\operatorname{eval}('1')((((", "\ud800"]
# For the tests in which something hangs: seconds for the whole, so that a failure is one and not a stall.
limited = pytest.mark.timeout(120)


@limited
@pytest.mark.parametrize("texts", TABLE, ids=lambda texts: texts[0])
def test_ways_of_writing_the_same(texts):
    assert all(same_answer(a, b) is True for a, b in itertools.product(texts, texts))


@limited
@given(st.sampled_from(WRITTEN), st.sampled_from(WRITTEN))
@settings(max_examples=100)
def test_equality_is_of_meaning_and_symmetric(one, other):
    (i, a), (j, b) = one, other
    assert same_answer(a, b) is (i == j) and same_answer(b, a) is (i == j)


@given(st.text(min_size=1))
def test_every_text_equals_itself(text):
    assert same_answer(text, text) is (True if text.strip() else None)
    assert group_answers([text, None, text]) == ([0, -1, 0] if text.strip() else [-1] * 3)


@given(st.integers(-10**9, 10**9), st.integers(1, 10**6), st.integers(1, 99))
def test_plain_numbers_are_exact(p, q, k):
    assert canonical(f"{p}/{q}") == canonical(rf"\dfrac{{{p * k}}}{{{q * k}}}") == canonical(rf"-\frac{{{-p}}}{{{q}}}") == Fraction(p, q)
    assert canonical(f"{p:,}") == canonical(f"{p}.000") == canonical(f"${p}$.") == canonical(rf"{p * 100}\%") == p
    assert canonical(str(p / 1024)) == Fraction(p, 1024) and same_answer(str(p / 1024), rf"\frac{{{p}}}{{1024}}") is True
    assert same_answer(str(p), f"{p}.000001") is False


def test_no_rounding():
    assert same_answer("1/3", "0.333333") is False and same_answer(r"\sqrt{2}", "1.41421356237") is False
    assert same_answer(r"0.1\pi", r"\frac{\pi}{10}") is True and same_answer("0.1+0.2", "0.3") is True


balanced = st.recursive(st.text("ab1,. \\^", max_size=4).map(lambda s: s.replace("\\", r"\{")), lambda x: st.tuples(x, x, x).map(lambda t: f"{t[0]}{{{t[1]}}}{t[2]}"), max_leaves=12)


@given(balanced, balanced, st.text("ab{1 ", max_size=5))
def test_the_last_closed_box(first, last, after):
    text = rf"\boxed{{{first}}} then \boxed {{{last}}}{after}"
    assert boxed(text) == last.strip() and boxed(text + r"\boxed{" + first) == last.strip()
    assert extract_answer(text, fallback=False) == (last.strip() or None)


@given(st.decimals(-10**6, 10**6, places=3), st.text("abc \n", max_size=4))
def test_the_last_number(x, words):
    assert Fraction(last_number(f"{words}7 or {x}{words}")) == Fraction(x) == Fraction(last_number(f"{words} {x:,}.{words}"))
    assert last_number(words) is None and extract_answer(f"{x}", fallback=False) is None


def test_a_minus_between_numbers_is_no_sign():
    assert [last_number(t) for t in ("9-4", "(9)-4", "x-4", "= -4", "−4", "(-4)", "9 - 4")] == ["4", "4", "4", "-4", "-4", "-4", "4"]


@limited
@pytest.mark.parametrize("text", HOSTILE, ids=lambda t: repr(t[:20]))
def test_hostile_answers_are_undecided(text):
    assert same_answer(text, "5", 1.) is None and same_answer("5", text, 1.) is None and math_verify(rf"\boxed{{{text}}}", "7") is False
    assert same_answer(r"\sqrt{25}", "5") is True
    assert group_answers([text, "5", text, r"\sqrt{25}"], 1.) == ([0, 1, 0, 1] if text.strip() else [-1, 0, -1, 0])


@limited
def test_extraction_takes_linear_time():
    for text in (r"\boxed{" * 20_000, "{" * 100_000, "}" * 100_000, r"\boxed{a}" * 20_000, "7" * 100_000, "7," * 50_000, "1,111" * 20_000, "-" * 100_000, "1" + " " * 100_000, r"\frac" * 20_000, "1/" * 50_000):
        extract_answer(text), tidy(text)


@limited
def test_the_limit_holds_in_a_thread_and_however_alarms_are_set():
    out, blocked, alarms = [], Helper(), (signal.SIGALRM, signal.SIGPROF)
    def ask():
        signal.pthread_sigmask(signal.SIG_BLOCK, alarms)                    # of this thread, and so of the process it starts
        out.extend([same_answer("8^{9^{9^{9}}}", "5", .5), blocked.ask("7^{9^{9^{9}}}", "5", .5), blocked.ask(r"\sqrt{9}", "3", 9.)])
    before = [signal.signal(s, signal.SIG_IGN) for s in alarms]
    try:
        thread = threading.Thread(target=ask)
        thread.start(); thread.join()
    finally:
        for s, handler in zip(alarms, before): signal.signal(s, handler)
    blocked.stop()
    assert out == [None, None, True]


@limited
def test_many_threads_get_their_own_replies():
    n = range(2, 42)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: HELPER.ask(rf"\sqrt{{{i * i}}}", str(i + i % 2), 30.), n))
    assert found == [i % 2 == 0 for i in n]


@limited
def test_a_killed_helper_is_replaced():
    assert HELPER.ask(r"\sqrt{4}", "2", 30.)
    pid = HELPER.process.pid
    os.kill(pid, signal.SIGKILL)
    assert HELPER.ask(r"\sqrt{9}", "3", 30.) is True and HELPER.process.pid != pid


@limited
def test_ctrl_c_reaches_us_and_not_the_helper():
    helper = Helper()
    assert helper.ask("a+b", "b+a", 30.)
    process = helper.process
    process.send_signal(signal.SIGINT)
    assert helper.ask("a+b", "b+c", 30.) is False and helper.process is process

    class Interrupted:
        "A pipe from which Ctrl-C is read."
        def read(self, n): raise KeyboardInterrupt
        def close(self): pass
    process.stdout.close()
    process.stdout = Interrupted()
    with pytest.raises(KeyboardInterrupt): helper.ask("a+b", "b+a", 30.)
    assert helper.process is None and process.returncode == -signal.SIGKILL
    assert helper.ask("a+b", "b+c", 30.) is False                            # and not the reply that was left behind
    helper.stop()


@limited
def test_a_forked_child_asks_a_helper_of_its_own():
    assert HELPER.ask(r"\sqrt{16}", "4", 30.)
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try: os.write(write, json.dumps([HELPER.ask(r"\sqrt{16}", "5", 30.), HELPER.process.pid]).encode())
        finally: os._exit(0)
    os.waitpid(child, 0)
    verdict, pid = json.loads(os.read(read, 99))
    os.close(read); os.close(write)
    assert verdict is False and pid != HELPER.process.pid
    assert HELPER.ask(r"\sqrt{16}", "6", 30.) is False


@limited
@pytest.mark.parametrize("at_work", [False, True])
def test_the_helper_does_not_outlive_us(at_work):
    work = "threading.Thread(target=HELPER.ask, args=('6^{9^{9^{9}}}', '5', 5.)).start()" if at_work else ""
    program = f"import threading\nfrom capo.answer import HELPER\nHELPER.ask('x', 'y', 30.)\nprint(HELPER.process.pid, flush=True)\n{work}\ninput()"
    us = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    helper = os.pidfd_open(int(us.stdout.readline()))
    us.kill(); us.wait()
    assert select.select([helper], [], [], 60)[0]                            # readable when the process has ended
    os.close(helper); us.stdin.close(); us.stdout.close()


@limited
def test_the_fence_holds_whatever_the_library_does(tmp_path):
    "Were math-verify to do such things with what it is given, the helper would refuse, and reply with a question mark."
    deeds = {"nothing": "None", "eval": "eval('1+1')", "exec": "exec('x = 1')", "compile": "compile('1', '<string>', 'eval')", "swallowed": "swallow()",
             "system": f"os.system('touch {tmp_path}/mark')", "program": f"__import__('subprocess').run(['touch', '{tmp_path}/mark'])",
             "socket": "__import__('socket').socket()", "fork": "os.fork()", "memory": "bytearray(5 << 30)"}
    source = inspect.getsource(serve).replace("if same(a, b)", "if do[a]() or same(a, b)").replace("    refused = []", f"""
    def swallow():
        try: eval('1')
        except Exception: return True
    do = {{{', '.join(f'"{k}": lambda: {v}' for k, v in deeds.items())}}}
    refused = []""")
    questions = "".join(json.dumps([deed, "nothing", 30]) + "\n" for deed in deeds)
    run = subprocess.run([sys.executable, "-P", "-c", f"{source}\nserve()"], input=questions, capture_output=True, text=True)
    assert run.stdout == "!1" + "?" * (len(deeds) - 1) and not list(tmp_path.iterdir())


def test_nothing_is_evaluated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for call in ("__import__('os').system('touch mark')", "exec('open(\"mark\", \"w\")')", r"\text{open('mark','w')}", r"\operatorname{open}('mark','w')"):
        for a in (call, f"{call}+1", f"1/{call}", f"$${call}$$", f"x={call}"): assert not same_answer(a, r"\sqrt{2}")
    assert not list(tmp_path.iterdir())


def test_no_math_verify_is_said_in_a_sentence(monkeypatch):
    monkeypatch.setattr(answer.inspect, "getsource", lambda f: "def serve(): import no_such_module")
    with pytest.raises(RuntimeError, match="pip install math-verify"): Helper().ask("a", "b", 1.)


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
    "Counts the questions that reach the helper."
    questions = []
    ask = HELPER.ask
    monkeypatch.setattr(HELPER, "ask", lambda *args: questions.append(args) or ask(*args))
    answer.asked.cache_clear()
    return questions


def test_grouping_compares_no_more_than_it_must(count):
    assert group_answers([str(i % 7) for i in range(1000)] + [f"{i}/1" for i in range(7)])[-7:] == list(range(7)) and not count
    assert group_answers([r"\sqrt{2}"] * 100) == [0] * 100 and not count     # one form: nothing to compare it with
    assert group_answers(["2", r"\sqrt{4}"] * 50) == [0, 0] * 50 and len(count) == 2
    group_answers(["2", r"\sqrt{4}"] * 50)
    assert len(count) == 2                                                   # remembered


@limited
def test_an_undecidable_answer_costs_one_time_limit(count):
    texts = ["5^{9^{9^{9}}}"] + [rf"\sqrt{{{p}}}" for p in (2, 3, 5, 7)] + ["5^{9^{9^{9}}}"]
    random.Random(0).shuffle(texts)
    assert len(partition(group_answers(texts, 1.))) == 5
    assert sum("5^{9" in a or "5^{9" in b for a, b, _ in count) == 1


def test_grading():
    assert [math_verify(t, "50") for t in (r"\boxed{50\%}", r"\boxed{50}", r"so 50 %", r"\boxed{0.5}", "", r"\boxed{}")] == [True, True, True, False, False, False]
    assert math_verify(r"\boxed{0.5}", r"50\%") and math_verify(r"\boxed{50}", r"50\%") and not math_verify(r"\boxed{0.5\%}", r"50\%")
    assert all(type(math_verify(t, r"\sqrt{2}")) is bool for t in (r"\boxed{2^{1/2}}", r"\boxed{\frac}", "7"))
