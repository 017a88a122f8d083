"""The tutorials, docs/first-recall.md and docs/your-own-agent.md, done from the first line to the
last, as a newcomer does it.

What the commands answer is compared with what the page shows: the words, not the numbers, ids and
times. `python -m tests.process.test_tutorial` writes the answers into the pages.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from ..support.postgres import free_port
from .test_commands import BIN, ended, heard

DOCS = Path(__file__).resolve().parents[2] / "docs"
BLOCK = re.compile(r"^```sh\n(.*?)^```$(?:\n\n^```text\n(.*?)^```$)?", re.M | re.S)
FILE = re.compile(r"^Save this as `([\w.]+)`:\n\n```python\n(.*?)^```$", re.M | re.S)
ENDLESS = {
    "recall-worker reference-api": "listens on",
    "recall-worker run": "listener.listening",
    "uvicorn": "Application startup complete",
}
"""What goes on for ever, and what it says when it is there."""
LOOKS = (
    "recall-worker list",
    "recall-worker why",
    "recall-worker show",
    "recall-worker stats",
    "curl -s http://127.0.0.1:8000/chats/one\n",
)
"""What can be asked again until the worker has done its part."""
PATIENCE = 60.0


@dataclass(frozen=True)
class Tutorial:
    page: Path
    data: str
    """The folder that it has the worker keep its data in."""
    port: str
    """Of the agent."""
    answers: int
    """How many blocks show what was answered."""

    @property
    def text(self) -> str:
        return self.page.read_text(encoding="utf-8")

    def steps(self) -> list[Step]:
        return [Step(*found.groups()) for found in BLOCK.finditer(self.text)]


TUTORIALS = (
    Tutorial(DOCS / "first-recall.md", "/tmp/recall-tutorial", "8090", 7),
    Tutorial(DOCS / "your-own-agent.md", "/tmp/recall-your-own", "8000", 5),
)


@dataclass
class Step:
    """A block of commands, the output that the page shows after it, and what there was."""

    commands: str
    shown: str | None
    found: str = ""


def words(text: str) -> list[str]:
    """What stays the same from run to run: the words."""
    text = re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}", "ID", text)
    text = re.sub(r"\b[\w.-]+-\d+-[0-9a-f]{4}\b", "WORKER", text)
    text = re.sub(r"\d{4}-\d\d-\d\d[ T][\d:.]+(?:Z|[+-]\d\d)", "TIME", text)
    text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d(:\d\d)? UTC", "TIME", text)
    text = re.sub(r"\b\d\d:\d\d:\d\d\b", "TIME", text)
    text = re.sub(r"\b[\w-]+@[\w.-]+ \(cli\)", "ACTOR", text)
    text = re.sub(r"\b[\d.]+ ?(?:ms|s|min|h)?(?= |$|,|\))", "N", text, flags=re.M)
    return re.findall(r"\w+", text)


def play(tutorial: Tutorial, folder: Path, pause: float | None = None) -> Iterator[Step]:
    """Execute the page's blocks in order, beside this folder for its data, where the page's files
    are saved before; each with what it said in `found`.

    A look is repeated until it shows what the page shows; with a `pause`, in seconds, it is made
    once, after that time.
    """
    for name, content in FILE.findall(tutorial.text):
        (folder.parent / name).write_text(content, encoding="utf-8")
    port = str(free_port())
    id = ""
    exports: list[str] = []
    environ = {k: v for k, v in os.environ.items() if not k.startswith("RECALL_")}
    environ["PATH"] = f"{BIN}:{environ['PATH']}"
    with ExitStack() as stack:
        for step in tutorial.steps():
            is_look = f"{step.commands.splitlines()[-1]}\n".startswith(LOOKS)
            text = step.commands.replace(tutorial.data, str(folder)).replace(tutorial.port, port)
            if ".venv" in text:
                continue  # It is installed and found here already.
            text = re.sub(r"\bID\b", id, text)
            if text.startswith("rm "):
                stack.close()  # Ctrl-C, as the page says.
            if pause is not None and is_look:
                time.sleep(pause)
            exports += [line for line in text.splitlines() if line.startswith("export ")]
            *before, last = [line for line in text.splitlines() if line not in exports]
            script = "set -e\n" + "\n".join([*exports, *before])

            def start(
                script: str = script, last: str = last, go_on: bool = False
            ) -> subprocess.Popen[str]:
                return subprocess.Popen(
                    ["bash", "-c", f"{script}\n{'exec ' if go_on else ''}{last}"],
                    cwd=folder.parent,
                    env=environ,
                    text=True,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                )

            endless = next((word for name, word in ENDLESS.items() if last.startswith(name)), None)
            if endless is not None:
                process = start(go_on=True)
                stack.callback(ended, process)
                step.found = heard(process, endless)
            else:
                deadline = time.monotonic() + PATIENCE
                while True:
                    process = start()
                    step.found, _ = process.communicate(timeout=PATIENCE)
                    assert process.returncode == 0, step.found
                    settled = step.shown is None or words(step.found) == words(step.shown)
                    once = pause is not None or not is_look
                    if settled or once or time.monotonic() > deadline:
                        break
                    time.sleep(0.3)
                if last.startswith("recall-worker schedule"):
                    [id] = re.findall(r"^[0-9a-f-]{36}$", step.found, re.MULTILINE)
            step.found = step.found.replace(f":{port}/", f":{tutorial.port}/")
            yield step


def checks(said: str) -> list[str]:
    """What `check-endpoint` has tried, and that nothing failed. What a run was too short to show
    depends on the machine."""
    assert ", 0 failed, " in said, said
    return re.findall(r"^(?:pass|not shown) +(\S.*?)  ", said, re.MULTILINE)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path, for a socket, that PostgreSQL's account can enter, too."""
    with tempfile.TemporaryDirectory(prefix="rt-", dir="/tmp") as name:
        Path(name).chmod(0o711)
        yield Path(name) / "data"


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("tutorial", TUTORIALS, ids=lambda tutorial: tutorial.page.stem)
def test_the_tutorial(tutorial: Tutorial, folder: Path) -> None:
    """Each command works, in this order, and answers what the page shows."""
    seen = 0
    for step in play(tutorial, folder):
        if step.shown is not None and goes_on(step):
            assert [said for said in step.shown.splitlines() if said not in step.found] == []
        elif step.shown is not None and "check-endpoint" in step.commands:
            assert len(checks(step.shown)) > 15
            assert checks(step.found) == checks(step.shown)
            seen += 1
        elif step.shown is not None:
            assert words(step.found) == words(step.shown), step.commands
            seen += 1
    assert seen == tutorial.answers and not folder.exists()


def goes_on(step: Step) -> bool:
    return any(line.startswith(tuple(ENDLESS)) for line in step.commands.splitlines())


def write(tutorial: Tutorial) -> None:
    """Put the answers into the page."""
    with tempfile.TemporaryDirectory(prefix="rt-", dir="/tmp") as name:
        Path(name).chmod(0o711)
        text = tutorial.text
        for step in play(tutorial, Path(name) / "data", pause=6):
            if step.shown is None or goes_on(step):
                continue
            before = f"```sh\n{step.commands}```\n\n```text\n"
            assert before in text
            found = step.found.replace(f"{platform.node()}-", "host-")
            found = re.sub(r"\b[\w-]+@[\w.-]+ \(cli\)", "ann@host (cli)", found)
            text = text.replace(before + step.shown, before + found)
        tutorial.page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    for one in TUTORIALS:
        if one.page.stem in (sys.argv[1:] or one.page.stem):
            write(one)
    sys.exit(0)
