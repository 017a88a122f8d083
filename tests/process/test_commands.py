"""Every command that a document shows is executed, as it stands there, by bash, in a sandbox: a
database, the reference API, a worker that is about, and a copy of this checkout to stand in.

What can't be done here (systemd, engines, clusters, what installs, what takes an hour) is listed
with its reason and with the test that does it. A command that is neither executed nor listed fails,
and so does a listed one that no document shows any more.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import psycopg
import pytest
from typer.main import get_command

from recall_worker import schema
from recall_worker.cli.app import app
from recall_worker.settings import ignored, read

from .. import schema as expected
from ..support import postgres
from ..support.postgres import free_port
from ..test_docs import DOCUMENTS
from ..test_dumps import program, psql

ROOT = Path(__file__).resolve().parent.parent.parent
BIN = Path(sys.executable).parent
PROGRAMS = Path(expected.pg_dump() or "/usr/bin/pg_dump").parent
"""pg_dump, pg_restore and psql, of the server's version."""
PATH = f"{BIN}:{PROGRAMS}:{os.environ['PATH']}"
TOKEN = "t0ken"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ASSIGNMENT = re.compile(r"[A-Z][A-Z_]+=\S+")
PATIENCE = 100.0

ELSEWHERE: dict[str, tuple[str, str, str]] = {
    # What fits: where it is done, a text that stands there, why not here.
    r"python3 -m venv \.venv": (
        ".ci/run",
        "readme demo",
        "CI executes both of the README's blocks as they stand",
    ),
    r"\.venv/bin/pip install .*": (".ci/run", "readme test", "the same"),
    r"\.venv/bin/recall-worker demo": (
        ".ci/run",
        "readme demo",
        "the same; and tests/process/test_demo.py",
    ),
    r"\.venv/bin/python -m tests": (".ci/run", "readme test", "this test is a part of it"),
    r"\.venv/bin/python -m tests --full|\.ci/run": (
        ".ci/run",
        "-m full",
        "takes the better part of an hour",
    ),
    r"pip install '\.\[embedded,bench\]'|python -m benchmarks .*": (
        "tests/test_benchmarks.py",
        '"benchmarks", "--quick"',
        "takes the machine to itself for half an hour",
    ),
    r"\.venv/bin/python -m tests\.chaos .*": (
        ".ci/run",
        "-m tests.chaos --seed",
        "takes minutes, and a small file system of its own",
    ),
    (
        r"pip install fastapi .*|DATABASE_URL=.* uvicorn .*|RECALL_RUN_URL=.* recall-worker run|"
        r"cd examples/fastapi_agent|python chat\.py .*"
    ): (
        "tests/process/test_example.py",
        "shlex.split(command)",
        "that test plays the person, too",
    ),
    r"cd examples/chat|pip install '\.\./\.\.\[endpoint\]' .*": (
        "tests/process/test_chat_example.py",
        '"-m", "uvicorn", "app:app"',
        "that test plays the person, too, in a browser",
    ),
    (
        r"cd examples|pip install .*'(langchain|agno|pydantic-ai-slim|openai-agents|google-adk).*|"
        r"python -m tools\..*|uvicorn endpoints\..*|curl -H .* \$CHAT .*"
    ): (
        "tests/process/test_framework_examples.py",
        'examples("tools"), examples("endpoints")',
        "installs five agent frameworks",
    ),
    r"python3 -m venv /opt/.*|/opt/.*/bin/pip install \.": (
        "tests/process/test_machine.py",
        'machine.install(root, "/opt/recall-worker-1"',
        "into a machine that systemd boots",
    ),
    r"/opt/.*/bin/pip install '\.\[mcp\]'|pip install 'recall-worker\[mcp\]'": (
        "tests/process/test_mcp.py",
        "pip install 'recall-worker[mcp]'",
        "the extra is here; that test takes it away",
    ),
    r"systemctl .*": (
        "tests/process/test_machine.py",
        'box.systemctl, "enable", "--now"',
        "on a machine that systemd boots",
    ),
    r"python3 -m venv \.venv-docs|\.venv-docs/bin/.*": (
        ".ci/run",
        ".venv-docs/bin/sphinx-build -q -W --keep-going -n -c docs -b html . site",
        "CI builds the pages like that",
    ),
    r"\.venv/bin/python -m tests\.recording": (
        "tests/test_recording.py",
        "recording.render(lines)",
        "takes half a minute, on an idle machine; the picture is tested",
    ),
    r"\.venv/bin/python -m tests\.process\.test_tutorial": (
        "tests/process/test_tutorial.py",
        "def test_the_tutorial",
        "plays the page once more than that test does",
    ),
    r"\.venv/bin/python -m release\.lock": (
        "tests/test_release.py",
        "assert lock.problems() == []",
        "asks PyPI; what it has written is tested",
    ),
    r"\.venv/bin/python -m release --into .*": (
        ".ci/run",
        "-m release",
        "needs the repository's history, which the sandbox's copy has not",
    ),
    r"pip install -q cosmic-ray|(CI=1 )?cosmic-ray .*|cr-.*": (
        "tests/mutation.toml",
        "test-command = ",
        "takes hours, a quiet machine and a clone of the repository: no test runs it",
    ),
    r"docker build .*": (
        "tests/process/test_docker.py",
        'engine.docker("build"',
        "needs an engine",
    ),
    r"docker compose .*": ("tests/process/test_docker.py", 'compose("exec"', "needs an engine"),
    r"kubectl .*": (
        "tests/test_kubernetes.py",
        "No cluster runs here",
        "needs a cluster: not run at all, and docs/deployment.md says so",
    ),
}

UNTIL = dict.fromkeys(
    (
        "recall-worker run",
        "recall-worker run --paused",
        "recall-worker run --queue mail",
        "recall-worker run --queue night",
    ),
    "worker.ready",
) | {
    "recall-worker mcp": "mcp.started",
    "recall-worker mcp --http 127.0.0.1:9466": "mcp.listening",
    "recall-worker events --follow": "Following what happens",
    "recall-worker console": "console.listening",
}
"""What does not end by itself: what it says when it is there. SIGTERM ends it then, well."""


@dataclass(frozen=True)
class Command:
    document: Path
    line: int
    text: str
    before: tuple[str, ...] = ()
    """What its block has exported before it."""

    def __str__(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line} {self.text[:60]}"

    @property
    def elsewhere(self) -> str | None:
        return next((pattern for pattern in ELSEWHERE if re.fullmatch(pattern, self.text)), None)


def commands_of(document: Path) -> Iterator[Command]:
    """The commands of a document's shell blocks, without their comments."""
    text = document.read_text(encoding="utf-8")
    for block in BLOCK.finditer(text):
        if block[1] not in ("sh", "bash", "shell", "console"):
            continue
        exports: tuple[str, ...] = ()
        first = text.count("\n", 0, block.start(2)) + 1
        for n, line in enumerate(block[2].splitlines()):
            command = re.sub(r"(^|\s+)#\s.*$", "", line).strip()
            if command.startswith("export "):
                exports = (*exports, command)
            elif command:
                yield Command(document, first + n, command, exports)


PLAYED = {"first-recall.md", "your-own-agent.md"}
"""Documents whose commands stand in an order, and are executed in it: test_tutorial.py."""
COMMANDS = [
    command
    for document in DOCUMENTS
    if document.name not in PLAYED
    for command in commands_of(document)
]
HERE = [command for command in COMMANDS if command.elsewhere is None]


@dataclass
class Sandbox:
    """Where commands are executed: a copy of this checkout, and folders of its own in place of the
    machine's."""

    folder: Path
    dsn: str
    url: str
    server: str
    stack: ExitStack
    numbers: count[int] = field(default_factory=count)

    def recall(self, status: str) -> str:
        """A recall of a session of its own, every hour from in an hour on; its id."""
        n = next(self.numbers)
        id, session = f"r-{n}", f"s-{n}"
        with psycopg.connect(self.dsn, autocommit=True) as conn:
            conn.execute(b"insert into sessions values (%s, 'ann')", [session])
            conn.execute(
                b"""insert into session_recalls (id, session_id, call_type, trigger_at,
                        interval_seconds, additional_context_message,
                        status, created_at, updated_at)
                    values (%s, %s, 'recurring', now() + interval '1 hour', 3600, 'm', 'pending',
                        now(), now())""",
                [id, session],
            )
            conn.execute(b"update session_recalls set status = %s where id = %s", [status, id])
        return id

    def told(self, text: str) -> str:
        """A document's text with what stands in it for something put in its place."""
        if re.search(r"\bSESSION\b", text):
            with psycopg.connect(self.dsn, autocommit=True) as conn:
                conn.execute(
                    b"insert into sessions values ('SESSION', 'ann') on conflict do nothing"
                )
                # What an earlier command scheduled there holds its slot.
                conn.execute(
                    b"update session_recalls set status = 'cancelled' "
                    b"where session_id = 'SESSION' and status = 'pending'"
                )
        if re.search(r"\bID\b", text):
            text = re.sub(
                r"\bID\b", self.recall("failed" if " retry " in text else "pending"), text
            )
        if "recall@staging" in text:
            text = text.replace("postgresql://recall@staging/app", f"'{self.staging(text)}'")
        for word, instead in {
            "postgresql://recall@db/app": f"'{self.dsn}'",
            "https://agent.example/sessions/{session_id}/run": self.url,
            "RECALL_RUN_TOKEN=…": f"RECALL_RUN_TOKEN={TOKEN}",
            ".venv/bin/": f"{BIN}/",
            " /etc/": f" {self.folder}/etc/",
            "=/etc/": f"={self.folder}/etc/",
            " /opt/": f" {self.folder}/opt/",
        }.items():
            text = text.replace(word, instead)
        return text

    def staging(self, text: str) -> str:
        """The database that a command restores into: empty, or with what the commands before it
        have made of it."""
        dsn = self.stack.enter_context(postgres.database(self.server))
        if "schema.sql" not in text and "app.dump" not in text:
            psql(dsn, "-f", self.folder / "checkout" / "schema.sql")
        if "data.sql" in text:
            schema.migrate(dsn)
        return dsn

    @property
    def environ(self) -> dict[str, str]:
        kept = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith("RECALL_") or k.startswith("RECALL_TEST_")
        }
        return kept | {
            "PATH": PATH,
            "RECALL_DSN": self.dsn,
            "RECALL_RUN_URL": self.url,
            "RECALL_RUN_TOKEN": TOKEN,
        }

    def start(self, script: str, **more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=self.folder / "checkout",
            env=self.environ | more,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )


def heard(process: subprocess.Popen[str], word: str) -> str:
    """Read what a process says until it says this."""
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if word in line:
            return said
    raise AssertionError(f"{word} was never said:\n{said}")


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=30)
    return process.returncode, said


@pytest.fixture(scope="module")
def sandbox(
    server: str, template: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Sandbox]:
    folder = tmp_path_factory.mktemp("sandbox")
    left_out = shutil.ignore_patterns(
        ".git", ".venv*", ".mirror", ".*_cache", "__pycache__", "dist", "node_modules", "site"
    )
    shutil.copytree(ROOT, folder / "checkout", ignore=left_out)
    # Each command stands alone, whatever was executed before it.
    for name in (
        "etc/systemd/system",
        "etc/recall-worker/credentials",
        "etc/recall-worker/owner-credentials",
        "etc/recall-worker/mcp-credentials",
        "opt",
    ):
        (folder / name).mkdir(parents=True)
    with postgres.database(server, template) as dsn, ExitStack() as stack:
        port = free_port()
        url = f"http://127.0.0.1:{port}/sessions/{{session_id}}/run"
        sandbox = Sandbox(folder, dsn, url, server, stack)
        sandbox.recall("pending")
        for name, how in {"app.dump": "-Fc", "schema.sql": "-s", "data.sql": "-a"}.items():
            program("pg_dump", how, "-f", folder / "checkout" / name, dsn)
        for name, secret in {
            **dict.fromkeys(("worker.dsn", "owner.dsn", "agent.dsn"), dsn),
            **dict.fromkeys(("run.token", "token.key"), TOKEN),
        }.items():
            (folder / "checkout" / name).write_text(secret, encoding="utf-8")
        (folder / "etc/recall-worker/token").write_text(TOKEN, encoding="utf-8")
        api = sandbox.start(f"exec recall-worker reference-api --port {port} --run-seconds 0.3")
        stack.callback(ended, api)
        heard(api, str(port))
        worker = sandbox.start("exec recall-worker run")
        stack.callback(ended, worker)
        heard(worker, "listener.listening")
        yield sandbox


@pytest.mark.slow
@pytest.mark.timeout(PATIENCE + 20)
@pytest.mark.parametrize("command", HERE, ids=str)
def test_a_command(command: Command, sandbox: Sandbox) -> None:
    """It ends well (or, where it is to go on for ever, begins well, and ends well at SIGTERM)."""
    name = command.text.split()[0]
    known = shutil.which(name.replace(".venv/bin/", f"{BIN}/"), path=PATH)
    assert known or "=" in name, "a command that nobody knows: neither executed nor listed"
    if missing := [
        word
        for word in ("jq",)
        if re.search(rf"\b{word}\b", command.text) and shutil.which(word) is None
    ]:
        pytest.skip(f"not installed: {missing[0]}")
    environ = {}
    if any(
        "RECALL_RUN_TOKEN_FILE=" in export for export in command.before
    ) or command.text.startswith("RECALL_RUN_TOKEN="):
        environ["RECALL_RUN_TOKEN"] = ""
    script = "\n".join(sandbox.told(line) for line in command.before) + "\n"
    if command.text in UNTIL:
        process = sandbox.start(script + "exec " + command.text, **environ)
        heard(process, UNTIL[command.text])
        status, said = ended(process)
    else:
        if " failed " in command.text:
            sandbox.recall("failed")
        process = sandbox.start(script + sandbox.told(command.text), **environ)
        said, _ = process.communicate("y\n", timeout=PATIENCE)
        status = process.returncode
    assert status == 0, said
    assert "Traceback" not in said


def test_what_is_done_elsewhere_is_done_there() -> None:
    """Each entry of the list is of use, and its text stands in the place that it names, however
    that is broken into lines."""
    used = {command.elsewhere for command in COMMANDS} - {None}
    assert used == set(ELSEWHERE)
    assert [
        place
        for place, text, _ in ELSEWHERE.values()
        if "".join(text.split()) not in "".join((ROOT / place).read_text("utf-8").split())
    ] == []


def settings_blocks() -> list[tuple[str, dict[str, str]]]:
    """Blocks of assignments and nothing else, as an environment file would hold them."""
    found = []
    for document in DOCUMENTS:
        for block in BLOCK.finditer(document.read_text(encoding="utf-8")):
            words = shlex.split(block[2]) if block[1] == "" and ASSIGNMENT.match(block[2]) else []
            if words and all(ASSIGNMENT.fullmatch(word) for word in words):
                found.append((document.name, dict(word.split("=", 1) for word in words)))
    return found


@pytest.mark.parametrize(
    ("document", "given"),
    settings_blocks(),
    ids=[f"{d} {' '.join(g)}" for d, g in settings_blocks()],
)
def test_settings(document: str, given: dict[str, str]) -> None:
    """A block of settings is taken by the worker as it stands; what is OpenTelemetry's is not ours
    to judge."""
    assert all(name.startswith(("RECALL_", "OTEL_")) for name in given), document
    assert ignored(given) == []
    read(given)


def test_no_shell_hides() -> None:
    """A block that is not said to be a shell's has no command of ours in it, so that none goes
    unseen."""
    hidden = []
    for document in DOCUMENTS:
        for block in BLOCK.finditer(document.read_text(encoding="utf-8")):
            if block[1] not in ("sh", "bash", "shell", "console"):
                hidden += re.findall(
                    r"^\s*(?:\$ )?(?:recall-worker|systemctl|docker|kubectl|pip|python3?) \S.*$",
                    block[2],
                    re.MULTILINE,
                )
    assert hidden == []
    assert len(HERE) > 30


def spans() -> list[tuple[str, list[str]]]:
    """`recall-worker …` in the running text: the document, and the words up to a pipe."""
    found = []
    for document in DOCUMENTS:
        text = BLOCK.sub("", document.read_text(encoding="utf-8"))
        for span in re.findall(r"`(?:[A-Z_]+=\S+ )*recall-worker ([^`]+)`", text):
            words = shlex.split(span)
            found.append((document.name, words[: words.index("|")] if "|" in words else words))
    return found


@pytest.mark.parametrize(
    ("document", "words"), spans(), ids=[f"{d} {' '.join(w)}" for d, w in spans()]
)
def test_in_passing(document: str, words: list[str]) -> None:
    """What the text mentions in passing is a command, with options that it takes."""
    name, *rest = words
    if name == "--version":
        return
    command = getattr(get_command(app), "commands")[name]  # noqa: B009 - a Group, which typer's types don't tell
    try:
        command.make_context(name, rest).close()
    except Exception as error:
        # Mentioned by its name, or with the option that is spoken of: what else it needs is said
        # elsewhere. Which module this error comes from differs between typer's versions.
        if type(error).__name__ != "MissingParameter":
            raise
