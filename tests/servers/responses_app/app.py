"""An agent without a model behind the Responses API: it does what the message says, and keeps a
diary in which each time it is run is a line.

`wait` takes until a file with the conversation's name lies beside the diary, `fail` fails, `long`
says more than anybody keeps, all else is echoed.
"""
# What is imported here is installed in the server's environment only.
# mypy: ignore-errors

import asyncio
import json
import os
from pathlib import Path

from azure.ai.agentserver.responses import (
    ResponseEventStream,
    ResponsesAgentServerHost,
    ResponsesServerOptions,
)

FOLDER = Path(os.environ["AGENT_NOTES"])
app = ResponsesAgentServerHost(
    prefix="/v1",
    options=ResponsesServerOptions(resilient_background=True, default_model="none"),
    configure_observability=None,
)


@app.response_handler
async def act(request, context, cancelled):
    text, conversation = await context.get_input_text(), context.conversation_id
    line = {
        "conversation": conversation,
        "text": text,
        "response": context.response_id,
        "again": context.is_recovery,
        "recall": request.get("metadata"),
        "model": request.get("model"),
    }
    with (FOLDER / "diary").open("a") as diary:
        diary.write(json.dumps(line) + "\n")
    stream = ResponseEventStream(response_id=context.response_id, request=request)
    yield stream.emit_created()
    yield stream.emit_in_progress()
    match text.removeprefix("[Scheduled recall] "):
        case "wait":
            while not (FOLDER / conversation).exists():
                if cancelled.is_set():
                    return
                if context.shutdown.is_set():
                    await context.exit_for_recovery()
                await asyncio.sleep(0.02)
        case "fail":
            raise ValueError("no model today")
        case "long":
            text = "x" * 1_500_000
    for event in stream.output_item_message(f"done: {text}"):
        yield event
    yield stream.emit_completed()


app.run(host="127.0.0.1", port=int(os.environ["PORT"]))
