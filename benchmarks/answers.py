"""How long grading and grouping take: python benchmarks/answers.py [--answers 10000] [--workers 2]

Distinct answers of eight kinds, two of them unreadable, each with a reference of its own. Prints seconds by the
clock, and of the processors (ours and the helpers'), which other work on the machine disturbs less. README.md holds
the numbers of one run."""
import argparse
import random
import resource
import time

from capo.answer import IDLE, asked, group_answers, same_answers


def answers(n, seed=0):
    "`n` distinct pairs of an answer and its reference."
    rng = random.Random(seed)
    for i in range(n):
        a, b, c = i + 2, rng.randint(2, 10**6), rng.randint(2, 99)
        kinds = [(f"{a}/{b}", rf"\frac{{{2 * a}}}{{{2 * b}}}"), (f"{a} apples", str(a)),
                 (rf"{a}\sqrt{{{c}}}", rf"\sqrt{{{c * a * a}}}"), (rf"x^2+{a}x+{b}", rf"{b}+x(x+{a})"),
                 (rf"({a}, \frac{{\pi}}{{{b}}})", rf"({a}, \pi/{b})"), (rf"\frac{{{a}+\sqrt{{{c}}}}}{{{b}}}", str(b)),
                 (rf"\frac{{{a}\pi", str(a)), (f"about {a} or so {{ maybe", str(b))]
        yield kinds[i % len(kinds)]


def processor_seconds():
    "Of this process and of its children that have ended."
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in used)


def timed(f, *args, **options):
    "The result, seconds by the clock, and of all processors."
    asked.cache_clear()
    clock, processor = time.perf_counter(), processor_seconds()
    found = f(*args, **options)
    clock = time.perf_counter() - clock
    for helper in IDLE:
        if helper.process: helper.stop()
    return found, f"{clock:.1f} s, {processor_seconds() - processor:.1f} s of processors"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--answers", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    o = parser.parse_args()
    pairs = list(answers(o.answers))
    found, took = timed(same_answers, pairs, workers=o.workers)
    verdicts = {v: found.count(v) for v in (True, False, None)}
    print(f"same_answers of {len(pairs)} distinct pairs, {o.workers} helpers: {took}; {verdicts}")
    some = [answer for answer, _ in pairs[:o.answers // 5]]
    groups, took = timed(group_answers, some)
    print(f"group_answers of {len(some)} distinct answers, one helper: {took}; {len(set(groups))} groups")
