"""Run notebooks as nbdev_test does, and save what they show: execute.py [--flags "vllm ..."] [notebook ...]

By default all of them, in order. A notebook has a process to itself; one that fails is left as it was.
With flags, cells marked with one of them run too, and only what those show is saved: the rest keeps the outputs
of its own environment.
"""
import os, sys, time, warnings
from argparse import ArgumentParser
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from execnb.nbio import write_nb
from execnb.shell import CaptureShell
from fastcore.basics import str2bool
from nbdev.clean import nbdev_clean
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.frontmatter import FrontmatterProc
from nbdev.process import NBProcessor

NBS = Path(__file__).resolve().parents[1]


def evaluated(nb, wanted=frozenset()):
    "The cells of `nb` that nbdev_test runs with the flags `wanted`, none if its front matter says `skip_exec`."
    # FrontmatterProc takes the cells apart that it reads, so it gets a copy of its own.
    if str2bool(NBProcessor(nb.path_, procs=FrontmatterProc, process=True).nb.frontmatter_.get("skip_exec", False)):
        return []
    flags = set(get_config(path=NBS).tst_flags.split()) - wanted
    return [c for c in nb.cells if c.cell_type == "code" and "nbdev_export(" not in c.source
            and c.directives_.get("eval:", [""])[0].lower() != "false" and not c.directives_.keys() & flags]


def execute(path, wanted=frozenset()):
    "Run and save one notebook; True if all its cells pass."
    os.environ["TQDM_DISABLE"] = "1"  # a saved progress bar is a screenful of noise
    warnings.simplefilter("ignore", FutureWarning)  # of one library to another, with the paths of this machine
    os.chdir(path.parent)
    sys.path.insert(0, str(NBS.parent))
    start, nb = time.time(), NBProcessor(path, rm_directives=False).nb
    shell = CaptureShell(path, mpl_format="png")
    for cell in evaluated(nb, wanted):
        saved, cell.outputs = cell.outputs, []  # the shell sets them only when there are some
        shell.cell(cell)
        if shell.exc:
            print(shell.prettytb(path.name), file=sys.stderr)
            return False
        if wanted and not cell.directives_.keys() & wanted: cell.outputs = saved
    write_nb(nb, path)
    nbdev_clean(str(path))
    print(f"{path.name}: {time.time() - start:.0f} s", flush=True)
    return True


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flags", default="", help="run cells with these flags too, and save only theirs")
    parser.add_argument("notebooks", nargs="*", help="all of them if none is named")
    a = parser.parse_args()
    paths = [Path(o).resolve() for o in a.notebooks] or nbglob(NBS, as_path=True).sorted()
    os.chdir(NBS)  # where nbdev looks for the settings
    with ProcessPoolExecutor(1, max_tasks_per_child=1) as pool:
        sys.exit(not all(list(pool.map(partial(execute, wanted=frozenset(a.flags.split())), paths))))
