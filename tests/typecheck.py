"beartype for the import hook in conftest.py, with an int accepted where a float is meant, as in type checkers."
from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
