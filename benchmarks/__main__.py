"""`python -m benchmarks`: measures, prints tables, and writes them down. See the package's
docstring.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

MEASURES = (
    "wake",
    "timers",
    "queues",
    "backlog",
    "parts",
    "inflight",
    "growth",
    "idle",
    "inserting",
    "endurance",
    "start",
    "adoption",
    "trouble",
)
APART = ("console", "pages")
"""Measures that are run where --only names them: their tables are not in docs/performance.md."""
BEGIN, END = "<!-- measured: written by `python -m benchmarks` -->\n", "<!-- /measured -->\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--only",
        type=lambda text: text.split(","),
        default=list(MEASURES),
        metavar="MEASURE,…",
        help=", ".join(MEASURES + APART),
    )
    parser.add_argument(
        "--peers",
        type=lambda text: text.split(","),
        metavar="PEER,…",
        help="compare with these only: graphile-worker, pg-boss, …; default: all",
    )
    parser.add_argument(
        "--quick", action="store_true", help="shorter and fewer of everything: to see that it works"
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="where to write the figures; those of measures not run now are kept",
    )
    parser.add_argument(
        "--docs", type=Path, metavar="FILE", help="the document whose marked part is written anew"
    )
    parser.add_argument("--plots", type=Path, metavar="DIR", help="where to draw SVGs")
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="measure nothing: report these figures"
    )
    given = parser.parse_args(arguments)
    if unknown := set(given.only) - set(MEASURES + APART):
        parser.error(f"no such measure: {', '.join(sorted(unknown))}")
    figures = (
        json.loads(given.report.read_text(encoding="utf-8"))
        if given.report
        else measured(given.only, quick=given.quick, kept=given.json, peers=given.peers)
    )
    print(reported(figures, plots=given.plots))
    if given.plots:
        draw(figures, given.plots)
    if given.docs:
        write(given.docs, figures, given.plots)
    return 0


def measured(
    only: list[str], *, quick: bool, kept: Path | None, peers: list[str] | None
) -> dict[str, Any]:
    from .contenders import Contest
    from .ground import Ground, commit

    figures: dict[str, Any] = {"machine": {}, "measures": {}}
    if kept and kept.exists():
        figures = json.loads(kept.read_text(encoding="utf-8"))
    made_of = commit()
    with Ground(quick=quick) as ground:
        figures["machine"] = (
            ground.machine()
            | {"load when it began": f"{os.getloadavg()[0]:.1f}"}
            | ({"quick": "yes"} if quick else {})
        )
        contest = Contest(ground, peers)
        for name in only:
            began = time.monotonic()
            print(f"{name} …", end=" ", file=sys.stderr, flush=True)
            found = _module(name).measure(contest)
            figures["measures"][name] = {
                "commit": made_of,
                "seconds": round(time.monotonic() - began, 1),
                "found": found,
            }
            print(f"{time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
            if kept:
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_text(
                    json.dumps(rounded(figures), indent=1, ensure_ascii=False) + "\n",
                    encoding="utf-8",
                )
        for name, reason in contest.missing.items():
            print(f"without {name}: {reason}", file=sys.stderr)
    return figures


def rounded(value: Any) -> Any:
    """Six figures say all that a clock knows."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(inner) for inner in value]
    return value


def reported(figures: dict[str, Any], plots: Path | None = None, beside: Path | None = None) -> str:
    """The figures as Markdown, with the plots as seen from a document in the folder `beside`."""
    figures = rounded(figures)
    section = ", ".join(f"{name} {value}" for name, value in figures["machine"].items()) + ".\n"
    section += f"\n{commits(figures)}\n"
    for name in MEASURES + APART:
        if name not in figures["measures"]:
            continue
        module = _module(name)
        section += f"\n## {module.TITLE}\n\n{module.report(figures['measures'][name]['found'])}"
        if plots and hasattr(module, "plot"):
            section += f"\n![{module.TITLE}]({os.path.relpath(plots, beside or '.')}/{name}.svg)\n"
    return section


def commits(figures: dict[str, Any]) -> str:
    """A sentence that names the commit that was measured; several where measures were run apart."""
    made_of: dict[str, list[str]] = {}
    for name in MEASURES + APART:
        if name in figures["measures"]:
            commit = figures["measures"][name].get("commit", "unknown")
            made_of.setdefault(commit, []).append(name)
    if len(made_of) == 1:
        return f"Made of commit `{next(iter(made_of))}`."
    each = (f"`{commit}` ({', '.join(names)})" for commit, names in made_of.items())
    return f"Made of commits {', '.join(each)}."


def draw(figures: dict[str, Any], directory: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "recall-worker"
    import matplotlib.pyplot as pyplot

    directory.mkdir(parents=True, exist_ok=True)
    for name in MEASURES:
        module = _module(name)
        if name in figures["measures"] and hasattr(module, "plot"):
            figure, axes = pyplot.subplots(figsize=(8, 4.2), layout="constrained")
            axes.set_title(module.TITLE)
            axes.grid(alpha=0.3)
            module.plot(figures["measures"][name]["found"], axes)
            figure.savefig(directory / f"{name}.svg", metadata={"Date": None})
            pyplot.close(figure)


def write(document: Path, figures: dict[str, Any], plots: Path | None) -> None:
    """Replace the part between the marks."""
    text = document.read_text(encoding="utf-8")
    start, end = text.index("<!-- measured:"), text.index(END)
    document.write_text(
        text[:start] + BEGIN + "\n" + reported(figures, plots, document.parent) + "\n" + text[end:],
        encoding="utf-8",
    )


def _module(name: str) -> Any:
    return importlib.import_module(f".measures.{name}", __package__)


if __name__ == "__main__":
    sys.exit(main())
