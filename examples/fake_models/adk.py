"""A model for Google's Agent Development Kit."""

from collections.abc import AsyncGenerator

from google.adk.models.base_llm import BaseLlm
from google.adk.models.llm_request import LlmRequest
from google.adk.models.llm_response import LlmResponse
from google.genai import types

from . import decide


class FakeModel(BaseLlm):
    model: str = "fake"

    async def generate_content_async(
        self, llm_request: LlmRequest, stream: bool = False
    ) -> AsyncGenerator[LlmResponse, None]:
        parts = [
            part
            for content in llm_request.contents
            if content.role == "user"
            for part in content.parts or []
        ]
        heard = [part.text for part in parts if part.text]
        returned = parts[-1].function_response
        step = await decide(heard, str((returned.response or {})["result"]) if returned else None)
        part = (
            types.Part(text=step)
            if isinstance(step, str)
            else types.Part.from_function_call(name=step["name"], args=step["args"])
        )
        yield LlmResponse(
            content=types.Content(role="model", parts=[part]),
            usage_metadata=types.GenerateContentResponseUsageMetadata(
                prompt_token_count=1, candidates_token_count=1
            ),
        )
