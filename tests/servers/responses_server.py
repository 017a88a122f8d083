"""A server of the Responses API from PyPI, with an agent that has no model: what a person could do
with it, and what its agent did.

It keeps its responses in files, and runs those again that were cut off when it is started.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import httpx

from . import Server, environment, free_port

VERSIONS = ("azure-ai-agentserver-responses==2.3.0", "azure-ai-agentserver-core==2.2.0")
APP = Path(__file__).parent / "responses_app"


class ResponsesServer(Server):
    def __init__(self, folder: Path) -> None:
        bin = environment("responses", *VERSIONS)
        shutil.copytree(
            APP, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__")
        )
        self._notes = folder / "notes"
        self._notes.mkdir()
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        environ = {
            "AGENT_NOTES": str(self._notes),
            "AGENTSERVER_STATE_ROOT": str(folder / "state"),
            "PORT": str(port),
            "OTEL_SDK_DISABLED": "true",
            "PYTHONWARNINGS": "ignore",
        }
        super().__init__([bin / "python", "app.py"], folder, environ, f"{self.url}/readiness")

    # --- what a person does -----------------------------------------------------------------------

    async def ask(self, method: str, path: str, content: Any = None) -> httpx.Response:
        async with httpx.AsyncClient(base_url=self.url, trust_env=False, timeout=20) as client:
            return await client.request(method, path, json=content)

    async def say(self, conversation: str, text: str) -> httpx.Response:
        """A person's message in the conversation, in the background; the answer."""
        content = {"background": True, "conversation": conversation, "input": text}
        return await self.ask("POST", "/v1/responses", content)

    async def status(self, response: str) -> str:
        return str((await self.ask("GET", f"/v1/responses/{response}")).json()["status"])

    # --- what the agent does ----------------------------------------------------------------------

    def open(self, conversation: str) -> None:
        """Let the agent go on that waits in this conversation, and all that will."""
        (self._notes / conversation).touch()

    def times(self, conversation: str) -> list[dict[str, Any]]:
        """Each time that the agent was run in this conversation."""
        diary = self._notes / "diary"
        lines = (
            [json.loads(line) for line in diary.read_text().splitlines()] if diary.exists() else []
        )
        return [line for line in lines if line["conversation"] == conversation]

    async def until_run(self, conversation: str, times: int = 1, within: float = 20.0) -> None:
        """Wait until the agent has been run so many times in this conversation."""
        async with asyncio.timeout(within):
            while True:
                if len(self.times(conversation)) >= times:
                    return
                await asyncio.sleep(0.02)
