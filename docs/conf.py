"""The pages, from the Markdown as it stands: `sphinx-build -W -n -c docs . site` (Sphinx, MyST,
Furo, in the versions of release/locks/docs.txt).

Each warning is an error: a link that leads nowhere, a heading that is not there, a page that
docs/index.md does not name. The tree of pages is that index: its headings, and the links in their
lists. Each page is there as Markdown, too, and llms.txt leads to those.
"""

from __future__ import annotations

import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

project = PROJECT["name"]
author = "The recall-worker authors"
version = release = PROJECT["version"]
copyright = f"2026, {author}"
extensions = ["myst_parser"]
root_doc = "docs/index"
include_patterns = [
    "*.md",
    "docs/*.md",
    "docs/plots/*",
    "docs/pictures/*",
    "docs/schemas/*",
    "examples/README.md",
    "examples/*/README.md",
]
exclude_patterns = ["site", ".venv*"]
nitpicky = True
# PL/pgSQL's dollar quotes, in a block that is otherwise SQL.
suppress_warnings = ["misc.highlighting_failure"]

myst_heading_anchors = 4

html_theme = "furo"
html_title = f"recall-worker {version}"
html_extra_path = ["../llms.txt"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {
    "source_repository": PROJECT["urls"]["Source"],
    "source_branch": "main",
    "source_directory": "",
}

SECTION = re.compile(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
ENTRY = re.compile(r"^- \[[^\]]+\]\(([^)#]+)\.md\)", re.MULTILINE)
FRONT = '<!doctype html><meta http-equiv="refresh" content="0; url=docs/index.html">\n'


def add_tree(_: Any, name: str, content: list[str]) -> None:
    """Give docs/index.md the tree that Sphinx wants, made from its own lists."""
    if name == root_doc:
        for title, body in SECTION.findall(content[0]):
            pages = "\n".join(ENTRY.findall(body))
            content[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {title}\n\n{pages}\n```\n"


def add_sources(app: Any, error: Exception | None) -> None:
    """Put the Markdown beside the pages, and a first page that leads to the index."""
    if error is None:
        for name in app.env.found_docs:
            shutil.copyfile(ROOT / f"{name}.md", Path(app.outdir) / f"{name}.md")
        (Path(app.outdir) / "index.html").write_text(FRONT, encoding="utf-8")


def setup(app: Any) -> None:
    app.connect("source-read", add_tree)
    app.connect("build-finished", add_sources)
