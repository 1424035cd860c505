"What a file n01.py … n07.py of this folder holds: `FALSE`, the deliberate falsifications of notebook 01 … 07."
from typing import Callable, NamedTuple


class Falsified(NamedTuple):
    "A statement made false, and the assertion that has to notice."
    what: str                             # the falsehood, in words
    find: str                             # source that stands once in the notebook; or a name, "auc" or "logistic.d", …
    replace: str | Callable               # the false source; … a function from what is held under the name to its rival
    caught: str                           # a piece of the statement, an assert or a test_…, that has to raise
    error: type[Exception] = AssertionError
    at: str = ""                          # for a name: source of the cell to start from, if not the one with `caught`
