"Notebooks, modules, README and package say the same thing."
import ast, re, shutil, subprocess, sys
from configparser import ConfigParser
from pathlib import Path
from zipfile import ZipFile

import pytest
from execute import evaluated
from nbdev.process import NBProcessor

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(ROOT.glob("nbs/[!_.]*.ipynb"))
INI = ConfigParser()
INI.read(ROOT/"settings.ini")

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def sh(*args, cwd=ROOT):
    "Run a command of this environment; its output, or a failure that shows it."
    args = [sys.executable, *args] if args[0] == "-m" else [Path(sys.executable).with_name(args[0]), *args[1:]]
    run = subprocess.run(args, cwd=cwd, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def texts(folder, pattern): return {p.name: p.read_text(encoding="utf-8") for p in sorted(folder.glob(pattern))}


@pytest.fixture
def copy(tmp_path):
    "The project without what git leaves out, to be worked on."
    hidden = shutil.ignore_patterns(".*", "__pycache__", "runs", "build", "dist", "*.egg-info")
    return shutil.copytree(ROOT, tmp_path/"copy", ignore=hidden)


def notebook(path): return NBProcessor(path, rm_directives=False).nb


def test_modules_are_what_the_notebooks_export(copy):
    for p in copy.glob("capo/*.py"):
        if p.name != "__init__.py": p.unlink()  # so that a module without a notebook shows
    sh("nbdev_export", cwd=copy)
    assert texts(ROOT/"capo", "*.py") == texts(copy/"capo", "*.py")


@each_notebook
def test_a_module_is_named_after_its_notebook(path):
    names = [c.directives_["default_exp"][0] for c in notebook(path).cells if "default_exp" in c.directives_]
    assert names in ([], [re.sub(r"^\d+_", "", path.stem)])


def test_readme_is_what_the_index_gives(): sh("python", "nbs/tools/readme.py", "--check")


def test_notebooks_are_clean(copy):
    sh("nbdev_clean", cwd=copy)
    assert texts(ROOT/"nbs", "*.ipynb") == texts(copy/"nbs", "*.ipynb")


def shows(cell):
    "Does this cell end in an expression that has a value to display? Of a call one cannot tell."
    if cell.source.rstrip().endswith(";") or not cell.parsed_(): return False  # nothing, or a magic
    last = cell.parsed_()[-1]
    return isinstance(last, ast.Expr) and not isinstance(last.value, ast.Call)


@each_notebook
def test_outputs_are_saved(path):
    cells = evaluated(notebook(path))
    assert not [o for c in cells for o in c.outputs if o.output_type == "error"]
    assert not [c.source for c in cells if shows(c) and not c.outputs]
    assert not cells or any(c.outputs for c in cells)


def test_types(): sh("-m", "mypy", "capo")


def test_import_is_light():
    heavy = "transformers peft vllm trl datasets pandas matplotlib fastcore"
    found = sh("python", "-c", f"import sys, capo; print(*set('{heavy}'.split()) & set(sys.modules))")
    assert not found.split()


def test_one_version():
    import capo
    assert capo.__version__ == INI["DEFAULT"]["version"]
    assert f"[{capo.__version__}]" in (ROOT/"CHANGELOG.md").read_text()
    assert f"version: {capo.__version__}\n" in (ROOT/"CITATION.cff").read_text()


def test_no_file_names_somebodys_machine():
    "Paths of a home, a temporary or a work folder come in with tracebacks and warnings, and mean nothing elsewhere."
    if not (ROOT/".git").exists(): pytest.skip("not a git checkout")
    path = re.compile(r"(?<![\w.+/-])/(home|root|Users|tmp|private|work|workspace)/")
    files = subprocess.check_output(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, text=True)
    bad = []
    for name in filter(None, files.split("\0")):
        if not (ROOT/name).is_file(): continue  # deleted, not yet committed
        text = (ROOT/name).read_bytes().decode(errors="ignore")
        bad += [f"{name}: {text[m.start():m.end() + 40]}" for m in path.finditer(text)]
    assert not bad


def test_wheel(copy, tmp_path):
    sh("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, ".", cwd=copy)
    files = {n for n in ZipFile(*tmp_path.glob("*.whl")).namelist() if ".dist-info/" not in n}
    here = {p.relative_to(ROOT).as_posix() for p in (ROOT/"capo").rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert files == here
