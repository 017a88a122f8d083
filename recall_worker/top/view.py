"""What the person has chosen by keys. Pure: octets in, keys out; a view and a key in, a view out.

Never here: a terminal, and how a view is drawn (frame).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

SECTIONS = ("next", "runs", "failures", "workers", "queues")
"""In the order in which `s` goes through them."""
NEEDLE_LONGEST = 200
HELP = (
    "q or Ctrl-C quits. / shows only recalls with this text in their id, session or queue; Enter "
    "keeps it, Esc clears it. s gives the room to the next section, S to the one before; arrows, "
    "PgUp, PgDn, Home and End move through it. p holds the picture, and lets it go on. ? hides "
    "this. What a recall waits for: recall-worker why ID"
)

_SEQUENCES: Mapping[bytes, str] = {
    b"\x1b[A": "up",
    b"\x1bOA": "up",
    b"\x1b[B": "down",
    b"\x1bOB": "down",
    b"\x1b[5~": "page up",
    b"\x1b[6~": "page down",
    b"\x1b[H": "home",
    b"\x1bOH": "home",
    b"\x1b[1~": "home",
    b"\x1b[F": "end",
    b"\x1bOF": "end",
    b"\x1b[4~": "end",
    b"\x1b": "escape",
    b"\r": "enter",
    b"\n": "enter",
    b"\x7f": "backspace",
    b"\x08": "backspace",
    b"\x15": "erase",
    b"\t": "tab",
}
_ONE = re.compile(
    rb"\x1b\[[0-?]*[ -/]*[@-~]|\x1bO[ -~]|\x1b(?![\[O])|[\x00-\x1a\x1c-\x7f]"
    rb"|[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}",
    re.DOTALL,
)
_BEGUN = re.compile(
    rb"\x1b(?:\[[0-?]*[ -/]*|O)?|[\xc2-\xdf]|[\xe0-\xef][\x80-\xbf]?|[\xf0-\xf4][\x80-\xbf]{0,2}"
)


def keys(data: bytes, *, ended: bool) -> tuple[list[str], bytes]:
    """The keys in what a terminal sent, and what may be the beginning of one more: a name for each
    key that has one, else its character. `ended`: nothing more came for a while, so that an Escape
    is one. Sequences that mean nothing here are dropped."""
    found: list[str] = []
    at = 0
    while at < len(data):
        if (one := _ONE.match(data, at)) is not None and (
            ended or one.end() < len(data) or one[0] != b"\x1b"
        ):
            at = one.end()
            name = _SEQUENCES.get(one[0])
            text = one[0].decode("utf-8", "replace")
            if name is not None:
                found.append(name)
            elif len(text) == 1 and text.isprintable():
                found.append(text)
        elif _BEGUN.fullmatch(data, at) is not None:
            return found, b"" if ended else data[at:]
        else:
            at += 1
    return found, b""


@dataclass(frozen=True, slots=True)
class View:
    needle: str = ""
    """The filter; empty: none."""
    typing: bool = False
    """Whether keys are text of the filter."""
    section: str = "next"
    """The one that has the room, and that is scrolled."""
    top: int = 0
    """Its first row that is shown."""
    held: bool = False
    """Whether the picture stands still."""
    help: bool = False
    quit: bool = False

    def press(self, key: str, rows: int, page: int, sections: tuple[str, ...] = SECTIONS) -> View:
        """The view after a key. `rows`: how many the section has, `page`: how many of them can be
        seen; `sections`: those that are shown."""
        if self.typing:
            return self._type(key)
        last = max(0, rows - page)
        match key:
            case "q" | "Q":
                return replace(self, quit=True)
            case "/":
                return replace(self, typing=True)
            case "escape":
                return replace(self, needle="", help=False, top=0)
            case "p" | " ":
                return replace(self, held=not self.held)
            case "?" | "h":
                return replace(self, help=not self.help)
            case "s" | "tab" | "S":
                at = sections.index(self.section) if self.section in sections else 0
                step = -1 if key == "S" else 1
                return replace(self, section=sections[(at + step) % len(sections)], top=0)
            case "down" | "j":
                return self._scroll(1, last)
            case "up" | "k":
                return self._scroll(-1, last)
            case "page down":
                return self._scroll(max(1, page - 1), last)
            case "page up":
                return self._scroll(-max(1, page - 1), last)
            case "home" | "g":
                return replace(self, top=0)
            case "end" | "G":
                return replace(self, top=last)
            case _:
                return self

    def _scroll(self, by: int, last: int) -> View:
        return replace(self, top=min(last, max(0, min(self.top, last) + by)))

    def _type(self, key: str) -> View:
        match key:
            case "escape":
                return replace(self, needle="", typing=False, top=0)
            case "enter":
                return replace(self, typing=False)
            case "backspace":
                return replace(self, needle=self.needle[:-1], top=0)
            case "erase":
                return replace(self, needle="", top=0)
            case _ if len(key) == 1 and len(self.needle) < NEEDLE_LONGEST:
                return replace(self, needle=self.needle + key, top=0)
            case _:
                return self
