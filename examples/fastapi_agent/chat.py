"""A person at the chat of app.py: says each of the given lines, stays for a while, leaves, and
reads later what has happened in the session.

    python chat.py SESSION 'remind me in 1s: look at the build' 'are you still there?'

It needs what the application needs (`uvicorn[standard]` brings websockets). CHAT_URL is the
application's address, STAY how many seconds the person stays, WAIT how many they wait at most.
"""

import asyncio
import json
import os
import sys
import time
import urllib.request

import websockets

BASE = os.environ.get("CHAT_URL", "http://127.0.0.1:8000")
STAY = float(os.environ.get("STAY", "5"))
WAIT = float(os.environ.get("WAIT", "60"))


async def chat(session: str, lines: list[str]) -> None:
    address = BASE.replace("http", "ws", 1) + f"/sessions/{session}/chat"
    async with websockets.connect(address, proxy=None) as socket:
        for line in lines:
            print(f"you    {line}")
            await socket.send(line)
            print(f"agent  {await socket.recv()}")
        print("(you stay for a while, then you leave; a moment later the session has)", flush=True)
        await asyncio.sleep(STAY)


def read(session: str) -> list[dict[str, str]]:
    with urllib.request.urlopen(f"{BASE}/sessions/{session}/messages") as answer:
        return list(json.load(answer))


async def main(session: str, *lines: str) -> None:
    await chat(session, list(lines))
    end = time.monotonic() + WAIT
    while "system" not in [m["role"] for m in read(session)[:-1]] and time.monotonic() < end:
        await asyncio.sleep(0.5)
    for message in read(session):
        print(f"{message['role']:7} {message['text']}")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
