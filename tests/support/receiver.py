"""What RECALL_FAILURE_URL leads to: the endpoint of the tests on another path, which is told of
failures and answers by script. A message is a request's webhook-id."""

from __future__ import annotations

import asyncio
import dataclasses

from .endpoint import Answer, Endpoint, Request


class Told(Request):
    """A request that names a message and no session."""

    @property
    def session(self) -> str:
        return "failures"

    @property
    def message(self) -> str:
        return self.headers["webhook-id"]

    @property
    def recall(self) -> str:
        return str(self.document["data"]["id"])


class Receiver(Endpoint):
    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}/failures"

    @property
    def told(self) -> list[Told]:
        return [request for request in self.requests if isinstance(request, Told)]

    def answers(self, *answers: Answer) -> None:
        """How requests are answered, in turn; the last answer stays."""
        self.script("failures", *answers)

    async def _read(self, reader: asyncio.StreamReader) -> Request | None:
        request = await super()._read(reader)
        if request is None:
            return None
        return Told(**{f.name: getattr(request, f.name) for f in dataclasses.fields(request)})
