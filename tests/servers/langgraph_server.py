"""LangGraph's agent server from PyPI, with an agent that has no model: what a person could do with
it, and what its agent did.

`langgraph dev` keeps its threads in memory and in files: it writes them when it is stopped, and
every ten seconds.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import httpx

from . import Server, environment, free_port

VERSIONS = (
    "langgraph-cli[inmem]==0.4.40",
    "langgraph-api==0.16.7",
    "langgraph-runtime-inmem==0.36.7",
    "langgraph==1.2.22",
)
APP = Path(__file__).parent / "langgraph_app"


class LangGraphServer(Server):
    def __init__(self, folder: Path) -> None:
        bin = environment("langgraph", *VERSIONS)
        shutil.copytree(
            APP, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__")
        )
        self._notes = folder / "notes"
        self._notes.mkdir()
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        command: list[str | Path] = [
            bin / "langgraph",
            "dev",
            "--no-browser",
            "--no-reload",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--n-jobs-per-worker",
            "10",
        ]
        environ = {
            "AGENT_NOTES": str(self._notes),
            "LANGSMITH_TRACING": "false",
            "LANGGRAPH_CLI_NO_ANALYTICS": "1",
        }
        super().__init__(command, folder, environ, f"{self.url}/ok")

    # --- what a person does -----------------------------------------------------------------------

    async def ask(self, method: str, path: str, content: Any = None) -> Any:
        async with httpx.AsyncClient(base_url=self.url, trust_env=False, timeout=20) as client:
            answer = await client.request(method, path, json=content)
            answer.raise_for_status()
            return answer.json() if answer.content else None

    async def create_thread(self) -> str:
        return str((await self.ask("POST", "/threads", {}))["thread_id"])

    async def say(self, thread: str, text: str, strategy: str = "enqueue") -> str:
        """A person's message in the thread; the run's id."""
        content = {
            "assistant_id": "agent",
            "input": {"messages": [{"role": "user", "content": text}]},
            "multitask_strategy": strategy,
        }
        return str((await self.ask("POST", f"/threads/{thread}/runs", content))["run_id"])

    async def messages(self, thread: str) -> list[str]:
        """The texts of the thread, in order."""
        state = await self.ask("GET", f"/threads/{thread}/state")
        return [message["content"] for message in state["values"].get("messages", [])]

    async def runs(self, thread: str) -> list[tuple[str | None, str]]:
        """The thread's runs, oldest first: the key of the recall, if it is one's, and the
        status."""
        runs = await self.ask("GET", f"/threads/{thread}/runs?limit=100")
        return [(run["metadata"].get("recall_key"), run["status"]) for run in reversed(runs)]

    # --- what the agent does ----------------------------------------------------------------------

    def open(self, thread: str) -> None:
        """Let the agent go on that waits in this thread, and all that will."""
        (self._notes / thread).touch()

    def times(self, thread: str) -> list[dict[str, Any]]:
        """Each time that the agent was run in this thread."""
        diary = self._notes / "diary"
        lines = (
            [json.loads(line) for line in diary.read_text().splitlines()] if diary.exists() else []
        )
        return [line for line in lines if line["thread"] == thread]

    async def until_run(self, thread: str, times: int = 1, within: float = 20.0) -> None:
        """Wait until the agent has been run so many times in this thread."""
        async with asyncio.timeout(within):
            while True:
                if len(self.times(thread)) >= times:
                    return
                await asyncio.sleep(0.02)
