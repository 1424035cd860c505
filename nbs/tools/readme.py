"Write README.md from nbs/index.ipynb; with --check, compare the two and exit 1 if they differ."
import re, sys
from pathlib import Path
from posixpath import join, normpath

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[2]
HEAD = "<!-- Made from nbs/index.ipynb by `make export`: edit the notebook. -->\n\n"


def relink(text):
    "Targets that are relative to nbs/, in Markdown links and <img>, made relative to the root."
    return re.sub(r'(\]\(|src=")(?![a-z]+:|[/#])([^)"\s]+)', lambda m: m[1] + normpath(join("nbs", m[2])), text)


def render():
    "The text of README.md."
    nb = nbformat.read(ROOT/"nbs/index.ipynb", as_version=4)
    nb.metadata.language_info = {"name": "python"}  # nbdev_clean drops it, the exporter colours code by it
    nb.cells = [c for c in nb.cells if c.cell_type != "raw" and not re.search(r"^#\s*\|\s*hide\b", c.source, re.M)]
    for cell in nb.cells:
        if cell.cell_type == "markdown": cell.source = relink(cell.source)
        else: cell.source = re.sub(r"^#\s*\|.*\n?", "", cell.source, flags=re.M)
        for data in (o.data for o in cell.get("outputs", []) if "data" in o):
            if "text/markdown" in data: data["text/markdown"] = relink(data["text/markdown"])
    text, resources = MarkdownExporter().from_notebook_node(nb)
    if resources["outputs"]:
        sys.exit("nbs/index.ipynb shows an inline figure; save it under nbs/images/ and link that.")
    return HEAD + re.sub(r"\n{4,}", "\n\n", text.strip()) + "\n"  # the exporter is lavish with blank lines


if __name__ == "__main__":
    readme, text = ROOT/"README.md", render()
    if sys.argv[1:] != ["--check"]: readme.write_text(text, encoding="utf-8")
    elif readme.read_text(encoding="utf-8") != text:
        sys.exit("README.md is not what nbs/index.ipynb gives: run make export.")
