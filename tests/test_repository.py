"Notebooks, modules, README and package say the same thing, and keep the shape that they promise."
import ast
import importlib
import re
import shutil
import statistics
import subprocess
import sys
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

MODULES = {p.stem: p for p in ROOT.glob("capo/[!_]*.py")}
ORDER = [re.sub(r"^\d+_", "", p.stem) for p in NOTEBOOKS]  # by the number of the notebook

each_module = pytest.mark.parametrize("name", MODULES)
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
        if p.name not in ("__init__.py", "__main__.py"): p.unlink()  # so that a module without a notebook shows
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


def test_lint(): sh("ruff", "check", ".")


# What code outside relies on: names stay, whatever moves inside.
RELIED_ON = """
calibration: auc group_auc auc_mean pair_auc pooled_auc
surrogate: logistic linear hinge squared_hinge exponential
logprob: token_logps mean_logp perplexity
grpo: grpo_advantage clipped_loss
advantage: pairwise_advantage capo_advantage flat_advantage
mask: noise_mask quantile_thresholds
task: Problem
rollout: Rollouts HFSampler VLLMSampler
vote: majority_vote most_confident perplexity_consistency rpc deepconf
selective: precision_coverage prr
recipe: Recipe grpo capo
train: TrainConfig train
run: RunConfig run Checkpoints
responses: Responses read_responses write_responses
evaluate: assess paired bootstrap read_responses write_responses majority_vote perplexity_consistency rpc deepconf
evaluate: precision_coverage prr most_confident Table
report: report
cli: main
"""


@pytest.mark.parametrize("line", RELIED_ON.strip().splitlines())
def test_names_that_others_rely_on(line):
    module, names = line.split(":")
    assert not [n for n in names.split() if not hasattr(importlib.import_module(f"capo.{module}"), n)]


def functions(path):
    "The exported functions of a module and their lines of code, without signature, docstring and blank lines."
    text = path.read_text(encoding="utf-8")
    for node in ast.parse(text).body:
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"): continue
        body = node.body[ast.get_docstring(node) is not None:]
        lines = text.splitlines()[body[0].lineno - 1:node.end_lineno] if body else []
        yield node.name, sum(bool(line.strip()) for line in lines)


@each_module
def test_a_module_fits_in_a_head(name):
    assert len(MODULES[name].read_text(encoding="utf-8").splitlines()) <= 450
    assert not [f for f, lines in functions(MODULES[name]) if lines > 40]


def test_functions_are_short():
    assert statistics.median(lines for path in MODULES.values() for _, lines in functions(path)) <= 7


@each_module
def test_imports_come_from_lower_numbers(name):
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    used = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level == 1 and n.module}
    assert not [m for m in used if ORDER.index(m) >= ORDER.index(name)]


def test_one_name_is_one_thing():
    homes = {}
    for module, path in MODULES.items():
        defined = (ast.FunctionDef, ast.ClassDef)
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, defined) and node.name[0] != "_": homes.setdefault(node.name, []).append(module)
    assert not {name: where for name, where in homes.items() if len(where) > 1}


def links(path):
    "Targets of the links in a notebook's text that lie in the repository."
    text = "\n".join(c.source for c in notebook(path).cells if c.cell_type == "markdown")
    return [t for t in re.findall(r"\]\(([^)#\s]+)", text) if not re.match("[a-z]+:", t)]


@each_notebook
def test_links_lead_somewhere(path): assert not [t for t in links(path) if not (path.parent/t).exists()]


def test_each_notebook_leads_to_the_next():
    numbered = [p for p in NOTEBOOKS if p.stem[0].isdigit()]
    for path, after in zip(numbered, numbered[1:]):
        said = [c.source for c in notebook(path).cells if "Next: " in c.source and c.cell_type == "markdown"]
        assert len(said) == 1 and f"Next: [{after.stem}]({after.name})" in said[0], path.name


def test_the_index_lists_every_notebook():
    numbered = {p.name for p in NOTEBOOKS if p.stem[0].isdigit()}
    assert numbered <= set(links(ROOT/"nbs/index.ipynb"))


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
    files = subprocess.check_output(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                                    text=True)
    bad = []
    for name in filter(None, files.split("\0")):
        if not (ROOT/name).is_file(): continue  # deleted, not yet committed
        text = (ROOT/name).read_bytes().decode(errors="ignore")
        bad += [f"{name}: {text[m.start():m.end() + 40]}" for m in path.finditer(text)]
    assert not bad


def test_wheel(copy, tmp_path):
    sh("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, ".", cwd=copy)
    files = {n for n in ZipFile(*tmp_path.glob("*.whl")).namelist() if ".dist-info/" not in n}
    here = {p.relative_to(ROOT).as_posix() for p in (ROOT/"capo").rglob("*") if p.is_file()
            and "__pycache__" not in p.parts}
    assert files == here
