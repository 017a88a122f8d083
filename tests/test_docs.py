"""The documents against the code, so that they can't drift apart. `python -m tests.test_docs`
writes what is generated."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import re
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path
from typing import Any

import pytest
from psycopg_pool import AsyncConnectionPool, ConnectionPool

from recall_worker import Recalls, cadence, durations, instants
from recall_worker.database.ledger import Backlog, QueueBacklog
from recall_worker.events import COMMON, EVENTS, FIELDS, NULLABLE
from recall_worker.ops.metrics import Metrics
from recall_worker.settings import Settings, variable
from recall_worker.worker.worker import WorkerStatus
from release import dependencies

from .conftest import Connection
from .support.application import Application
from .test_edits import table as edits_table
from .test_operations import COMMANDS, STATEMENTS, STATES, Cell, Table

ROOT = Path(__file__).resolve().parent.parent
CONFIGURATION = ROOT / "docs" / "configuration.md"
MARK = "<!-- the table below is written by `python -m tests.test_docs` -->\n"
APPLICATION = ROOT / "docs" / "application.md"
README = ROOT / "README.md"
TIMES = ROOT / "docs" / "times.md"
CADENCE = ROOT / "docs" / "cadence.md"
OPERATIONS = ROOT / "docs" / "operations.md"
MONITORING = ROOT / "docs" / "monitoring.md"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
SECURITY = ROOT / "SECURITY.md"
INDEX = ROOT / "docs" / "index.md"
LLMS = ROOT / "llms.txt"
LAYERS_MARK = (
    "<!-- the lines below are written by `python -m tests.test_docs`, from pyproject.toml -->\n"
)
EVENTS_MARK = (
    "<!-- the tables below, up to Metrics, are written by `python -m tests.test_docs` -->\n"
)
AFTER_EVENTS = "\n## Metrics\n"
OPERATIONS_MARK = "<!-- the tables below are written by `python -m tests.test_docs` -->\n"
EDITS_MARK = "<!-- the edits below are written by `python -m tests.test_docs` -->\n"
AFTER_EDITS = "\n## What each operation does in each state\n"


def settings_table() -> str:
    lines = ["| variable | default | what it is |", "| --- | --- | --- |"]
    for f in dataclasses.fields(Settings):
        default = (
            ""
            if f.default is None
            else f"{f.default:g}"
            if isinstance(f.default, float)
            else f"{f.default}"
        )
        bounds = ", ".join(
            f"{word} {f.metadata[word]:g}"
            for word in ("least", "most")
            if f.metadata[word] is not None
        )
        says = (
            f.metadata["says"]
            + (f" ({bounds})" if bounds else "")
            + ("; secret" if f.metadata["secret"] else "")
        )
        lines.append(f"| `{variable(f.name)}` | {default} | {says} |")
    return "\n".join(lines) + "\n"


def metrics_table() -> str:
    """What a page of /metrics carries, with the labels' values as they are known from the start."""
    metrics = Metrics(
        lambda: WorkerStatus(3, 0, "closed", "listening", database_is_lost=False, is_draining=False)
    )
    queue = QueueBacklog("default", ours=True, overdue=0, oldest=0.0, workers=1, paused=False)
    metrics.backlog = Backlog(0, 0.0, [queue], 0, 0.0)
    lines = ["| metric | type | labels | what it is |", "| --- | --- | --- | --- |"]
    for family in metrics.registry.collect():
        if not family.name.startswith("recall_worker_"):
            continue
        labels: dict[str, list[str]] = {}
        for sample in family.samples:
            for name, value in sample.labels.items():
                if name != "le" and value not in labels.setdefault(name, []):
                    labels[name].append(value)
        told = "; ".join(
            f"`{name}`" + (f": {', '.join(v)}" if family.type != "info" else "")
            for name, v in labels.items()
        )
        name = {"counter": f"{family.name}_total", "info": f"{family.name}_info"}.get(
            family.type, family.name
        )
        kind = "gauge, always 1" if family.type == "info" else family.type
        lines.append(f"| `{name}` | {kind} | {told} | {family.documentation} |")
    return "\n".join(lines) + "\n"


def events_tables() -> str:
    """The log's events with their fields, and the fields with what they are."""
    lines = ["| event | level | what it says | fields |", "| --- | --- | --- | --- |"]
    for name, event in EVENTS.items():
        fields = [f"`{field}`" for field in event.fields]
        fields += [f"[`{field}`]" for field in event.optional]
        told = ", ".join(fields) or ("each setting" if event.is_open else "")
        lines.append(f"| `{name}` | {event.level} | {event.says} | {told} |")
    lines += [
        "",
        "In brackets: where it is known. Every line has "
        + ", ".join(f"`{name}`" for name in COMMON)
        + " besides.",
        "",
        "| field | kind | what it is |",
        "| --- | --- | --- |",
    ]
    for name, (kind, says) in sorted({**COMMON, **FIELDS}.items()):
        lines.append(f"| `{name}` | {kind}{', or null' * (name in NULLABLE)} | {says} |")
    return "\n".join(lines) + "\n"


def layers() -> str:
    """The rooms, top first, as `lint-imports` holds them apart."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        contracts = tomllib.load(file)["tool"]["importlinter"]["contracts"]
    [contract] = [c for c in contracts if c["name"] == "imports run downwards only"]
    rooms = [
        [room.strip().removeprefix("recall_worker.") for room in layer.split("|")]
        for layer in contract["layers"]
    ]
    names = " > ".join(", ".join(f"`{room}`" for room in layer) for layer in rooms)
    return textwrap.fill(names, 100) + "\n"


def operations_tables() -> str:
    """What tests/test_operations.py shows, cell by cell."""
    cancelling = {
        name: COMMANDS[name] for name in ("cancel", "cancel --session", "skip", "skip --session")
    }
    holding = {name: cells for name, cells in COMMANDS.items() if name not in cancelling}
    parts = [
        _table("`{}`", cancelling),
        _table("`{}`", holding),
        "The application's own SQL, as docs/application.md has it:\n\n" + _table("{}", STATEMENTS),
    ]
    return "\n" + "\n".join(parts)


def _table(heading: str, table: Table) -> str:
    lines = [
        "| | " + " | ".join(heading.format(name) for name in table) + " |",
        "| --- |" + " --- |" * len(table),
    ]
    lines += [
        f"| {state} | " + " | ".join(_cell(cells[state]) for cells in table.values()) + " |"
        for state in STATES
    ]
    return "\n".join(lines) + "\n"


def _cell(cell: Cell) -> str:
    parts = ["aborted"] if cell.aborted else []
    parts += [f"now `:{cell.now}`"] if cell.now is not None else []
    parts += (
        [cell.row + (f" → `:{cell.then}`" if cell.then is not None else "")]
        if cell.row is not None
        else []
    )
    return f"{cell.answer} {', '.join(parts)}".rstrip()


def test_the_operations_documented_are_those_shown() -> None:
    """docs/operations.md carries the tables whose every cell is a test."""
    assert OPERATIONS.read_text(encoding="utf-8").endswith(OPERATIONS_MARK + operations_tables())


def test_the_edits_documented_are_those_shown() -> None:
    """And the table of edits, whose cells are tests, too."""
    text = OPERATIONS.read_text(encoding="utf-8")
    assert EDITS_MARK + "\n" + edits_table() + AFTER_EDITS in text


def test_the_layers_documented_are_those_checked() -> None:
    """CONTRIBUTING.md lists the layers of pyproject.toml, and each of them is a room that is
    there."""
    assert LAYERS_MARK + layers() in CONTRIBUTING.read_text(encoding="utf-8")
    for room in re.findall(r"`(\w+)`", layers()):
        assert any((ROOT / "recall_worker" / name).exists() for name in (room, f"{room}.py"))


def test_the_settings_documented_are_those_there_are() -> None:
    """docs/configuration.md carries the table that the settings themselves give."""
    assert CONFIGURATION.read_text(encoding="utf-8").endswith(MARK + settings_table())


def test_the_events_documented_are_those_told() -> None:
    """And the tables of what the log says."""
    text = MONITORING.read_text(encoding="utf-8")
    assert EVENTS_MARK + "\n" + events_tables() + AFTER_EVENTS in text


def test_the_metrics_documented_are_those_exported() -> None:
    """docs/monitoring.md carries the table of what /metrics shows."""
    assert MONITORING.read_text(encoding="utf-8").endswith(MARK + metrics_table())


def test_the_dependencies_documented_are_those_locked() -> None:
    """SECURITY.md carries the tables of release/dependencies.py."""
    text = SECURITY.read_text(encoding="utf-8")
    assert text.endswith(dependencies.MARK + dependencies.tables())


def llms() -> str:
    """llms.txt (https://llmstxt.org): the index for machines that read, made of docs/index.md and
    the README's first words."""
    first = README.read_text(encoding="utf-8").partition("\n\n")[2]
    about = next(part for part in first.split("\n\n") if part[0] not in "<![|")
    lines = ["# recall-worker", "", "> " + " ".join(about.split()), ""]
    for title, body in re.findall(
        r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", INDEX.read_text(encoding="utf-8"), re.M | re.S
    ):
        lines += [f"## {title}", ""]
        for entry in re.split(r"^- ", body, flags=re.MULTILINE)[1:]:
            text = " ".join(entry.split())
            lines.append("- " + text.replace("](", "](docs/", 1))
        lines.append("")
    return "\n".join(lines).replace("](docs/../", "](")


def test_the_index_names_every_page() -> None:
    """docs/index.md sorts each document into one of the four kinds, and llms.txt is made of it."""
    text = INDEX.read_text(encoding="utf-8")
    kinds = re.findall("^## (.+)$", text, re.MULTILINE)
    assert kinds == ["Tutorials", "How-to guides", "Reference", "Explanation"]
    named = [
        (INDEX.parent / link).resolve()
        for link in re.findall(r"^- \[[^\]]+\]\((\S+)\)", text, re.M)
    ]
    assert sorted(named) == sorted(set(DOCUMENTS) - {INDEX})
    assert LLMS.read_text(encoding="utf-8") == llms()


DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").glob("**/README.md")),
]
PLACE = re.compile(
    r"`((?:tests|sql|docs|recall_worker|kubernetes|systemd|monitoring|examples|benchmarks|release|\.ci)/[\w/.-]+|[A-Z]+\.md|[a-z]+\.yaml)`"
)
INVENTED = re.compile("NAME|NOUN|NNNN")
"""Stands for a name that whoever adds something chooses."""


def anchors(path: Path) -> set[str]:
    """What a link may name in a document: its headings, as GitHub spells them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_document_names_is_there(path: Path) -> None:
    """Each file and folder that a document names exists, each link leads somewhere, and to a
    heading that is there."""
    text = path.read_text(encoding="utf-8")
    assert [
        name
        for name in PLACE.findall(text)
        if not INVENTED.search(name) and not (ROOT / name).exists()
    ] == []
    for link in re.findall(r"\]\((?!https?://)([^)\s]+)\)", text):
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_what_is_to_be_touched_is_named() -> None:
    """CONTRIBUTING.md names a file for each room that an addition passes through."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    added = {
        title: set(PLACE.findall(body))
        for title, body in re.findall(r"^## To add a (\w+)\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    }
    assert set(added) == {"statement", "protocol", "migration", "command"}
    for needed, title in (
        ({"tests/test_statements.py"}, "statement"),
        (
            {"recall_worker/protocols/__init__.py", "recall_worker/settings.py", "docs/servers.md"},
            "protocol",
        ),
        ({"tests/schema/expected.sql", "tests/test_schema.py", "sql/roles.sql"}, "migration"),
        (
            {
                "recall_worker/cli/app.py",
                "tests/test_operations.py",
                "sql/client.sql",
                "sql/reads.sql",
            },
            "command",
        ),
    ):
        assert needed <= added[title]


def blocks(path: Path, language: str) -> list[str]:
    """The code blocks of a document in one language."""
    return re.findall(
        rf"^```{language}\n(.*?)^```$", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


@pytest.mark.parametrize(
    ("path", "tags"),
    [
        (APPLICATION, ["INSERT 0 1", "UPDATE 1", "UPDATE 1", "SELECT 1", "UPDATE 1"]),
        (README, ["INSERT 0 1"]),
        (CADENCE, ["INSERT 0 1"]),
    ],
    ids=["application.md", "README.md", "cadence.md"],
)
async def test_the_sql_does_what_it_says(path: Path, tags: list[str], app: Application) -> None:
    """Every statement of a document's SQL runs as it stands, in order, through the application's
    own driver, and finds its row."""
    await app.create_session("session-1", "ann")
    [text] = blocks(path, "sql")
    statements = [
        statement for statement in re.sub(r"--.*", "", text).split(";") if statement.strip()
    ]
    assert [await app.connection.execute(statement) for statement in statements] == tags


async def test_the_statements_move_and_skip(app: Application, db: Connection) -> None:
    """The document's recurring recall is due in an hour, then skipped to two, then moved to ten
    minutes, then cancelled."""
    await app.create_session("session-1", "ann")
    due = []
    for statement in re.sub(r"--.*", "", blocks(APPLICATION, "sql")[0]).split(";")[:-1]:
        await app.connection.execute(statement)
        cursor = await db.execute(
            "select round(extract(epoch from trigger_at - created_at) / 60)::int as due, status "
            "from session_recalls"
        )
        due.append(tuple((await cursor.fetchall())[0].values()))
    assert due == [
        (60, "pending"),
        (120, "pending"),
        (10, "pending"),
        (10, "pending"),
        (10, "cancelled"),
    ]


@pytest.fixture
async def python(app: Application) -> dict[str, Any]:
    """What the document's Python defines: `remember` for psycopg, without async, and for
    asyncpg."""
    await app.create_session("session-1", "ann")
    await app.connection.execute("create table messages (session_id text, text text)")
    found = {}
    for block in blocks(APPLICATION, "python"):
        names: dict[str, Any] = {}
        exec(compile(block, str(APPLICATION), "exec"), names)
        kind = "asyncpg" if "asyncpg" in names else "sync" if "SyncRecalls" in names else "psycopg"
        found[kind] = names["remember"]
    assert set(found) == {"asyncpg", "psycopg", "sync"}
    return found


async def test_the_example_for_psycopg(
    python: dict[str, Any], app: Application, database: str
) -> None:
    """The message and the recall are written together; the second time the message is, and the
    session keeps the recall it has."""
    async with AsyncConnectionPool(database, open=False, min_size=1, max_size=2) as pool:
        recall = await python["psycopg"](pool, "session-1")
        assert await python["psycopg"](pool, "session-1") == "has one already"
    assert [row["id"] for row in await app.list_by_session("session-1")] == [recall]
    assert await app.connection.fetchval("select count(*) from messages") == 2


async def test_the_example_without_async(
    python: dict[str, Any], app: Application, database: str
) -> None:
    """The same, on a pool of synchronous connections."""
    with ConnectionPool(database, open=True, min_size=1, max_size=2) as pool:
        recall = await asyncio.to_thread(python["sync"], pool, "session-1")
        again = await asyncio.to_thread(python["sync"], pool, "session-1")
    assert again == "has one already"
    assert [row["id"] for row in await app.list_by_session("session-1")] == [recall]
    assert await app.connection.fetchval("select count(*) from messages") == 2


async def test_the_example_for_asyncpg(python: dict[str, Any], app: Application) -> None:
    """One recall is scheduled; the second time the session has one already, and the connection is
    still good."""
    recall = await python["asyncpg"](app.connection, "session-1")
    assert await python["asyncpg"](app.connection, "session-1") == "has one already"
    assert [row["id"] for row in await app.list_by_session("session-1")] == [recall]


def test_every_method_is_in_the_table() -> None:
    """Each method of Recalls has a row, with its arguments; `conn` is said once for all."""
    rows = re.findall(r"`(\w+)\(([^)]*)\)`", APPLICATION.read_text(encoding="utf-8"))
    told = {name: {word.strip() for word in words.split(",")} - {"*"} for name, words in rows}
    for name, method in vars(Recalls).items():
        if inspect.iscoroutinefunction(method) and not name.startswith("_"):
            taken = set(inspect.signature(method).parameters) - {"self", "conn"}
            assert told.get(name) == taken or (not taken and name in told), name


@pytest.mark.slow
def test_the_examples_are_well_typed(tmp_path: Path) -> None:
    """The document's Python passes mypy --strict, as the package is typed for whoever uses it."""
    files = []
    for n, block in enumerate(blocks(APPLICATION, "python")):
        files.append(tmp_path / f"example_{n}.py")
        files[-1].write_text(block, encoding="utf-8")
    options = [
        "--strict",
        "--ignore-missing-imports",
        "--cache-dir",
        str(ROOT / ".mypy_cache" / "examples"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, *map(str, files)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def sections() -> dict[str, list[list[list[str]]]]:
    """The tables of docs/times.md by their headings: rows of cells."""
    found = {}
    for title, body in re.findall(
        r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", TIMES.read_text(encoding="utf-8"), re.M | re.S
    ):
        tables = re.findall(r"(?:^\|[^\n]*\n)+", body, re.M)
        found[title] = [
            [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()[2:]]
            for table in tables
        ]
    return found


def code(cell: str) -> list[str]:
    """What a cell has in backquotes."""
    return re.findall(r"`([^`]+)`", cell)


def test_the_times_documented_are_those_read() -> None:
    """Each example of docs/times.md is read as it says, or refused as it says."""
    accepted, refused = sections()["Times"]
    assert len(accepted) > 10 and len(refused) > 5
    for cell, where, meaning in accepted:
        zone = cadence.zone(*code(where)) if where else None
        found = instants.parse(code(cell)[0], zone, whole_day="--until" in cell)
        shown = f"{found.when:%Y-%m-%d %H:%M:%S.%f}".rstrip("0").removesuffix(".")
        assert meaning.split(" UTC")[0].removesuffix(":00") == shown.removesuffix(":00"), cell
        assert bool(found.notes) == ("note" in meaning), cell
    for cell, why, instead in refused:
        with pytest.raises(instants.InstantError) as error:
            instants.parse(code(cell)[0])
        assert why in str(error.value), cell
        instants.parse(code(instead)[0])


def test_the_durations_documented_are_those_read() -> None:
    """The same for durations."""
    accepted, refused = sections()["Durations"]
    assert len(accepted) > 5 and len(refused) > 5
    for cell, meaning in accepted:
        assert code(cell)
        for text in code(cell):
            assert durations.length(int(durations.seconds(text))) == meaning, text
    for cell, why, instead in refused:
        for text in code(cell):
            with pytest.raises(durations.DurationError) as error:
                durations.seconds(text)
            assert why.startswith(str(error.value)), text
        durations.seconds(code(instead)[0])


def test_the_zones_documented_are_those_known() -> None:
    """The same for time zones."""
    accepted, refused = sections()["Time zones"]
    assert len(accepted) > 3 and len(refused) > 3
    for cell, name in accepted:
        assert cadence.zone(*code(cell)).key == name
    for cell, question in refused:
        with pytest.raises(cadence.CadenceError, match=re.escape(question)):
            cadence.zone(*code(cell))


if __name__ == "__main__":
    for path, mark, generated in (
        (CONFIGURATION, MARK, settings_table()),
        (MONITORING, MARK, metrics_table()),
        (OPERATIONS, OPERATIONS_MARK, operations_tables()),
        (SECURITY, dependencies.MARK, dependencies.tables()),
    ):
        text = path.read_text(encoding="utf-8")
        path.write_text(text[: text.index(mark)] + mark + generated, encoding="utf-8")
    before, _, after = MONITORING.read_text(encoding="utf-8").partition(EVENTS_MARK)
    MONITORING.write_text(
        before + EVENTS_MARK + "\n" + events_tables() + after[after.index(AFTER_EVENTS) :],
        encoding="utf-8",
    )
    LLMS.write_text(llms(), encoding="utf-8")
    before, _, after = OPERATIONS.read_text(encoding="utf-8").partition(EDITS_MARK)
    OPERATIONS.write_text(
        before + EDITS_MARK + "\n" + edits_table() + after[after.index(AFTER_EDITS) :],
        encoding="utf-8",
    )
    before, _, after = CONTRIBUTING.read_text(encoding="utf-8").partition(LAYERS_MARK)
    CONTRIBUTING.write_text(
        before + LAYERS_MARK + layers() + "\n" + after.partition("\n\n")[2], encoding="utf-8"
    )
