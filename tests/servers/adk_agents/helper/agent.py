"""An agent whose model asks the test what to say: by a POST of what it was told, to the address in
a file."""
# mypy: ignore-errors

from __future__ import annotations

import os
from pathlib import Path

import httpx
from google.adk.agents import Agent
from google.adk.models.base_llm import BaseLlm
from google.adk.models.llm_response import LlmResponse
from google.genai import types


def address() -> str:
    """Where the test that is on now is to be asked."""
    return Path(os.environ["TEST_MODEL"]).read_text(encoding="ascii")


class Prompted(BaseLlm):
    """A model on the strings of a test."""

    async def generate_content_async(self, llm_request, stream=False):
        said = llm_request.contents[-1].parts[0].text
        async with httpx.AsyncClient(timeout=None, trust_env=False) as test:
            await test.post(address(), json={"session_id": said})
        yield LlmResponse(content=types.Content(role="model", parts=[types.Part(text="done")]))


root_agent = Agent(name="helper", model=Prompted(model="prompted"), instruction="Help.")
