"""Agno's and ADK's servers from PyPI, whose models ask the test what to say; and a relay to put
before them, or to play them with.

The model's question is a POST to the test's Endpoint, with what the model was told in the place of
the session.
"""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qsl, urlsplit

import httpx

from ..support.endpoint import Endpoint, Raw, reply
from . import Server, environment, free_port

HERE = Path(__file__).resolve().parent
AGNO = ("agno[os,scheduler]==3.1.10", "sqlalchemy==2.1.*", "psycopg[binary]==3.3.*")
ADK = ("google-adk==2.13.0",)


class _Prompted(Server):
    """A server whose model asks at the address in a file; runs on a copy of its code, as it may
    write beside that."""

    def __init__(
        self,
        code: str,
        folder: Path,
        command: list[str | Path],
        environ: dict[str, str],
        ready: str,
    ) -> None:
        shutil.copytree(HERE / code, folder / code, ignore=shutil.ignore_patterns("__pycache__"))
        self._model = folder / "model"
        self.url = f"http://127.0.0.1:{free_port()}"
        port = self.url.rpartition(":")[2]
        super().__init__(
            [*command, "--host", "127.0.0.1", "--port", port],
            folder,
            environ | {"TEST_MODEL": str(self._model)},
            self.url + ready,
        )

    def play(self, model: Endpoint) -> None:
        """From now on its model asks this endpoint."""
        self._model.write_text(f"http://127.0.0.1:{model.port}/", encoding="ascii")

    async def ask(self, method: str, path: str, **more: Any) -> httpx.Response:
        """What anybody might ask the server; see httpx for `more`."""
        async with httpx.AsyncClient(base_url=self.url, trust_env=False, timeout=30) as client:
            return await client.request(method, path, **more)


class AgnoServer(_Prompted):
    """An AgentOS on a database of its own (a URL with TCP). `queue`: durable, parallel,
    fleeting."""

    def __init__(
        self, folder: Path, dsn: str, *, queue: str = "durable", lifespan: str = "on"
    ) -> None:
        environ = {
            "TEST_DSN": dsn.replace("postgresql://", "postgresql+psycopg://", 1),
            "TEST_QUEUE": queue,
            "AGNO_TELEMETRY": "false",
        }
        uvicorn = environment("agno", *AGNO) / "uvicorn"
        super().__init__(
            "agno_app",
            folder,
            [uvicorn, "agno_app.app:app", "--lifespan", lifespan],
            environ,
            "/health",
        )

    async def say(
        self,
        session: str,
        message: str,
        *,
        agent: str = "helper",
        background: bool = True,
        **form: str,
    ) -> dict[str, Any]:
        """A person's message in the session, through the queue or as a foreground run; the
        answer."""
        form |= {
            "message": message,
            "session_id": session,
            "stream": "false",
            "background": str(background).lower(),
        }
        answer = await self.ask("POST", f"/agents/{agent}/runs", data=form)
        answer.raise_for_status()
        return dict(answer.json())

    async def tickets(self, session: str) -> list[dict[str, Any]]:
        """The session's tickets in the queue, oldest first: by their places in line, as their dates
        are whole seconds."""
        answer = await self.ask(
            "GET",
            "/queue/jobs",
            params={"session_id": session, "sort_order": "asc", "limit": "100"},
        )
        return sorted(
            answer.json()["data"], key=lambda ticket: ticket["payload"].get("session_seq") or 0
        )

    async def runs(self, session: str) -> list[tuple[str, str]]:
        """What was said in the session, and what became of it: oldest first."""
        answer = await self.ask("GET", "/agents/helper/runs", params={"session_id": session})
        return [(run["run_input"], run["status"]) for run in answer.json()]

    async def until(self, session: str, status: str, within: float = 20.0) -> dict[str, Any]:
        """Wait until the session's newest ticket is in this state; returns it."""
        async with asyncio.timeout(within):
            while True:
                found = await self.tickets(session)
                if found and found[-1]["status"] == status:
                    return found[-1]
                await asyncio.sleep(0.05)


class AdkServer(_Prompted):
    """`adk api_server` with one app, `helper`."""

    def __init__(self, folder: Path) -> None:
        adk = environment("adk", *ADK) / "adk"
        super().__init__(
            "adk_agents", folder, [adk, "api_server", folder / "adk_agents"], {}, "/list-apps"
        )


@dataclass(frozen=True, slots=True)
class Asked:
    """One request that came to a relay."""

    message: bytes

    @property
    def method(self) -> str:
        return self.message.split(b" ", 2)[0].decode()

    @property
    def target(self) -> str:
        return self.message.split(b" ", 2)[1].decode()

    @property
    def what(self) -> str:
        """Method and path."""
        return f"{self.method} {urlsplit(self.target).path}"

    @property
    def headers(self) -> dict[str, str]:
        """Names in lower case."""
        lines = self.message.partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")[1:]
        return {
            name.lower(): value.strip()
            for name, _, value in (line.partition(":") for line in lines)
        }

    @property
    def query(self) -> dict[str, str]:
        return dict(parse_qsl(urlsplit(self.target).query))

    @property
    def form(self) -> dict[str, str]:
        return dict(
            parse_qsl(self.message.partition(b"\r\n\r\n")[2].decode("ascii"), strict_parsing=True)
        )


Answer = Raw | list[Raw] | Callable[[Asked], Raw]


class Relay:
    """Stands before a server (or in its place: then what has no answer is 404), and keeps what was
    asked.

    `answers`, by method and path: given instead of the server's; a list is worked off one by one,
    and its last stays. What is asked under a name in `losing` reaches the server, and its answer is
    kept back.
    """

    def __init__(self, behind: str | None = None, answers: dict[str, Answer] | None = None) -> None:
        self._behind = None if behind is None else int(behind.rpartition(":")[2])
        self.answers = answers or {}
        self.losing: set[str] = set()
        self.lost = asyncio.Event()
        """An answer was kept back."""
        self.asked: list[Asked] = []
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self.url = ""

    @property
    def what(self) -> list[str]:
        return [asked.what for asked in self.asked]

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 24)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for writer in list(self._open):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            while (message := await _message(reader)) is not None:
                asked = Asked(message)
                self.asked.append(asked)
                answer = await self._answer(asked)
                if asked.what in self.losing:
                    self.lost.set()
                    await reader.read(1)
                    return
                writer.write(answer.data)
                if not answer.keep:
                    return
        except OSError:
            pass
        finally:
            self._open.discard(writer)
            writer.close()

    async def _answer(self, asked: Asked) -> Raw:
        scripted = self.answers.get(asked.what)
        if isinstance(scripted, list):
            return scripted[0] if len(scripted) == 1 else scripted.pop(0)
        if scripted is not None:
            return scripted if isinstance(scripted, Raw) else scripted(asked)
        if self._behind is None:
            return reply(404, {"detail": "Not Found"})
        reader, writer = await asyncio.open_connection("127.0.0.1", self._behind, limit=1 << 24)
        try:
            writer.write(asked.message)
            return Raw(await _message(reader) or b"", keep=True)
        finally:
            writer.close()


async def _message(reader: asyncio.StreamReader) -> bytes | None:
    """One HTTP message with a length, whole; None where the peer has hung up."""
    with suppress(asyncio.IncompleteReadError):
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
        return head + (await reader.readexactly(int(length[1])) if length else b"")
    return None
