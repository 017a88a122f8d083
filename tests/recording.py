"""`python -m tests.recording`: the demo, recorded, as the README shows it.

It runs `recall-worker demo` on a terminal of its own and writes docs/pictures/demo.cast
(asciicast 2, for asciinema) and docs/pictures/demo.svg. `--render` makes the picture anew from the
recording. Record on an idle machine: the picture shows how late the calls were.

The picture plays once and stays at the last screen. Where nothing moves (a program that draws no
animation, a reader who wants none) it is the last screen from the start. It is light or dark as the
reader's system is.
"""

from __future__ import annotations

import codecs
import fcntl
import json
import os
import pty
import re
import struct
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

PICTURES = Path(__file__).resolve().parent.parent / "docs" / "pictures"
CAST = PICTURES / "demo.cast"
PICTURE = PICTURES / "demo.svg"
COLUMNS, ROWS = 92, 30
COMMAND = "recall-worker demo"
LONGEST_PAUSE = 2.0
"""Seconds: what nothing happens for longer is shown as so long."""
TYPING = 1.5
"""Seconds for which the command stands there alone."""
CELL, LINE, MARGIN, BAR = 8.4, 19, 16, 34
"""Pixels: the width of a character, the height of a line, the space around, the window's bar."""
SGR = re.compile(r"\x1b\[([\d;]*)m")
OTHER = re.compile(r"\x1b\[[\d;?]*[A-Za-ln-z]|\x1b\][^\x07]*\x07|[\r\x07]")
STYLE = """
svg { --page: #ffffff; --bar: #eaeef2; --edge: #d0d7de; --text: #1f2328; --dim: #656d76;
  --c31: #cf222e; --c32: #116329; --c33: #7d4e00; --c34: #0550ae; --c35: #8250df; --c36: #1b7c83;
  --c93: #7d4e00; --c94: #0969da; --c95: #a0369c; --c96: #0e6b73; }
@media (prefers-color-scheme: dark) {
  svg { --page: #0d1117; --bar: #161b22; --edge: #30363d; --text: #e6edf3; --dim: #9198a1;
    --c31: #ff7b72; --c32: #3fb950; --c33: #d29922; --c34: #58a6ff; --c35: #bc8cff; --c36: #39c5cf;
    --c93: #e3b341; --c94: #79c0ff; --c95: #f0a5ec; --c96: #56d4dd; } }
text { font: 14px ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace; fill: var(--text);
  white-space: pre; }
.b { font-weight: bold; } .d { fill: var(--dim); }
@keyframes show { from { visibility: hidden; } to { visibility: visible; } }
.l { animation: show 10ms step-start both; }
@media (prefers-reduced-motion: reduce) { .l, .s { animation: none !important; } }
"""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the screen: when it was there, in seconds, and its text with SGR sequences."""

    at: float
    text: str


def record() -> tuple[int, list[tuple[float, str]]]:
    """Run the demo on a terminal. Its exit status, and what it wrote, with seconds since the
    start."""
    pid, master = pty.fork()
    if pid == 0:
        os.environ.update(TERM="xterm-256color", COLUMNS=str(COLUMNS), LINES=str(ROWS))
        os.execv(sys.executable, [sys.executable, "-m", "recall_worker", "demo"])
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    began = time.monotonic()
    decoder = codecs.getincrementaldecoder("utf-8")()
    written = []
    while True:
        try:
            data = os.read(master, 65536)
        except OSError:  # Linux says so when the other end is closed.
            break
        if not data:
            break
        written.append((time.monotonic() - began, decoder.decode(data)))
        sys.stdout.write(written[-1][1])
        sys.stdout.flush()
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), written


def save(written: Sequence[tuple[float, str]]) -> None:
    """Write the recording, with the command typed at its beginning and long pauses cut."""
    header = {"version": 2, "width": COLUMNS, "height": ROWS, "title": COMMAND}
    events = [(0.0, f"$ {COMMAND}\r\n")]
    before, now = 0.0, TYPING
    for at, text in written:
        now += min(at - before, LONGEST_PAUSE)
        before = at
        events.append((now, text))
    lines = [json.dumps(header), *(json.dumps([round(at, 3), "o", text]) for at, text in events)]
    CAST.write_text("\n".join(lines) + "\n", encoding="utf-8")


def load() -> list[Line]:
    """The recording's lines. Only lines are understood: a cursor that moves is not."""
    lines: list[Line] = []
    rest = ""
    for event in CAST.read_text(encoding="utf-8").splitlines()[1:]:
        at, _, text = json.loads(event)
        *whole, rest = (rest + OTHER.sub("", text)).split("\n")
        lines += [Line(at, one) for one in whole]
    return lines


def spans(text: str) -> Iterator[tuple[int, str, str, str]]:
    """A line's parts: the column, the text, the classes, the colour (or nothing)."""
    column, codes = 0, set[str]()
    parts = SGR.split(text)
    for n, part in enumerate(parts):
        if n % 2:
            for code in part.split(";"):
                codes = set() if code in ("", "0") else codes | {code}
        elif part:
            colour = next((f"var(--c{code})" for code in codes if f"--c{code}:" in STYLE), "")
            classes = " ".join(name for code, name in (("1", "b"), ("2", "d")) if code in codes)
            yield column, part, classes, colour
            column += len(part)


def render(lines: Sequence[Line]) -> str:
    """The picture, as SVG."""
    width = round(COLUMNS * CELL + 2 * MARGIN)
    height = BAR + ROWS * LINE + 2 * MARGIN
    whole = lines[-1].at
    scrolled = [
        (line.at, n + 1 - ROWS) for n, line in enumerate(lines) if n + 1 > ROWS and line.at < whole
    ]
    end = max(0, len(lines) - ROWS)
    steps = "".join(
        f"{at / whole:.3%} {{ transform: translateY({-n * LINE}px); }}\n"
        for at, n in dict(scrolled).items()
    )
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img" aria-label="A recording of {COMMAND}">',
        f"<title>A recording of {COMMAND}</title>",
        f"<style>{STYLE}@keyframes scroll {{ 0% {{ transform: translateY(0); }}\n{steps}"
        f"100% {{ transform: translateY({-end * LINE}px); }} }}\n"
        f".s {{ transform: translateY({-end * LINE}px); "
        f"animation: scroll {whole:.2f}s step-end both; }}</style>",
        f'<rect x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8" '
        'fill="var(--page)" stroke="var(--edge)"/>',
        f'<path d="M1 {BAR} V8 a7 7 0 0 1 7 -7 H{width - 8} a7 7 0 0 1 7 7 V{BAR} Z" '
        'fill="var(--bar)"/>',
        *(
            f'<circle cx="{20 + n * 20}" cy="{BAR / 2}" r="6" fill="{colour}"/>'
            for n, colour in enumerate(("#ff5f57", "#febc2e", "#28c840"))
        ),
        f'<svg x="{MARGIN}" y="{BAR + MARGIN}" width="{COLUMNS * CELL:.0f}" '
        f'height="{ROWS * LINE}"><g class="s">',
    ]
    for n, line in enumerate(lines):
        drawn = "".join(
            f'<tspan x="{column * CELL:.1f}" textLength="{len(text) * CELL:.1f}"'
            + (f' class="{classes}"' if classes else "")
            + (f' style="fill:{colour}"' if colour else "")
            + f">{escape(text, quote=False)}</tspan>"
            for column, text, classes, colour in spans(line.text)
        )
        if drawn:
            out.append(
                f'<text class="l" style="animation-delay:{line.at:.2f}s" '
                f'y="{n * LINE + 14}">{drawn}</text>'
            )
    return "\n".join([*out, "</g></svg>", "</svg>", ""])


def main(arguments: Sequence[str]) -> int:
    PICTURES.mkdir(exist_ok=True)
    if "--render" not in arguments:
        status, written = record()
        if status:
            print("The demo failed: nothing was written.", file=sys.stderr)
            return 1
        save(written)
    PICTURE.write_text(render(load()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
