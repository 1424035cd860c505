"""Each statement of the theory can fail: it is made false in its notebook, and the assertion that guards it says so.

A notebook's cells run once, in order, in one namespace. Before a cell that a falsification changes, the changed cell
and those after it run in a copy, up to the one that holds the named assertion, which has to be the first to raise.
"""
import ast
import importlib
import traceback
from contextlib import ExitStack, chdir
from functools import cache
from pathlib import Path
from unittest.mock import patch

import matplotlib.pyplot as plt
import pytest
import torch
from execute import evaluated
from nbdev.process import NBProcessor

HERE = Path(__file__).parent
NBS = HERE.parent / "nbs"
FALSE = [(path.stem[1:], f) for path in sorted(HERE.glob("falsifications/n[0-9]*.py"))
         for f in importlib.import_module(f"falsifications.{path.stem}").FALSE]


def only(sources, fragment, start=None):
    "The number of the one cell in which this stands once; of the first such cell from `start` on, if that is given."
    held = [i for i, s in enumerate(sources) if fragment in s and i >= (start or 0)]
    once = start is not None or len(held) == 1 and sources[held[0]].count(fragment) == 1
    if not held or not once: raise LookupError(f"stands in {len(held)} cells, not once in one: {fragment}")
    return held[0]


def place(f, sources):
    "The first cell to run again, and the one that holds the assertion."
    first = only(sources, f.find if isinstance(f.replace, str) else f.at or f.caught)
    return first, only(sources, f.caught, first)


def run(source, i, space): exec(compile(source, f"cell {i}", "exec"), space)


def raised(sources, cells, space):
    "What these cells raise, and the statement that does; (None, '') if all pass."
    for i in cells:
        try: run(sources[i], i, space)
        except Exception as e:
            line, *_ = [x.lineno for x in traceback.extract_tb(e.__traceback__) if x.filename == f"cell {i}"]
            statement, = [x for x in ast.parse(sources[i]).body if x.lineno <= line <= x.end_lineno]
            return e, ast.get_source_segment(sources[i], statement)
    return None, ""


def falsified(f, sources, space):
    "What the false notebook raises, and where; random numbers are those of the true one, which notices nothing."
    own = lambda x: torch.Generator().set_state(x.get_state()) if isinstance(x, torch.Generator) else x
    space, (first, last) = {k: own(v) for k, v in space.items()}, place(f, sources)
    with torch.random.fork_rng(devices=[]), ExitStack() as undo:
        if isinstance(f.replace, str): sources = [s.replace(f.find, f.replace) for s in sources]
        elif "." not in f.find: space[f.find] = f.replace(space[f.find])
        else:
            holder, name = space[f.find.split(".")[0]], f.find.split(".")[1]
            undo.enter_context(patch.object(holder, name, f.replace(getattr(holder, name))))
        return raised(sources, range(first, last + 1), space)


@cache
def outcomes(number):
    "What each falsification of a notebook raised, by its name. The true notebook raises nothing."
    notebook, = NBS.glob(f"{number}_*.ipynb")
    sources = [c.source for c in evaluated(NBProcessor(notebook, rm_directives=False).nb)]
    space, found, due = {"__name__": "__main__"}, {}, {}
    for f in (f for n, f in FALSE if n == number):
        try: due.setdefault(place(f, sources)[0], []).append(f)
        except LookupError as e: found[f.what] = e, "its list"
    with chdir(NBS), plt.rc_context({"backend": "agg"}):
        for i in range(1 + max(due, default=-1)):
            found |= {f.what: falsified(f, sources, space) for f in due.get(i, [])}
            run(sources[i], i, space)
            plt.close("all")
    return found


@pytest.mark.parametrize("number, f", FALSE, ids=[f"{n}: {f.what}" for n, f in FALSE])
def test_a_falsehood_is_caught(number, f):
    error, where = outcomes(number)[f.what]
    if not isinstance(error, f.error): pytest.fail(f"{f.what}: not caught; {error!r} at {where!r}", pytrace=False)
    if f.caught not in where: pytest.fail(f"{f.what}: caught elsewhere, {error!r} at {where!r}", pytrace=False)
