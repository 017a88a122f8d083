"""What an answer means: DESIGN's outcome table, row by row, and the words that a `status` may be.

Owns the table of HTTP statuses, what a success looks like (JSON, text, a stream, a web page),
Retry-After, and the reasons that an API gives. Pure: an answer comes in, an outcome goes out.

Sources of rules that are not ours: Retry-After, RFC 9110 10.2.3; 502 and 504, RFC 9110 15.6.3 and
15.6.5; 520 to 530, Cloudflare's; event streams, the HTML standard 9.2; NDJSON, one JSON document a
line.

Never here: how a call is made (contract), and how an accepted run is recognised and followed
(native, langgraph, agno, responses, polling).
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime
from enum import Enum
from typing import Any

from ..recall import (
    Answered,
    Busy,
    Failed,
    Gone,
    Misconfigured,
    Outcome,
    Refused,
    Unavailable,
    Unknown,
)
from .http import Answer

UNAVAILABLE = frozenset({408, 425, 429, 503})
GATEWAY = frozenset({502, 504, *range(520, 531)})
"""A gateway speaks for a server that is away: its own words are 502 and 504, Cloudflare's are 520
to 530."""
_TLS_WANTED = frozenset({400, 495, 496, 497})
"""With these a server says that it speaks TLS, or wants a certificate (nginx has all four)."""
RETRY_AFTER_LEAST, RETRY_AFTER_MOST = 1.0, 86_400.0
_UNIX_LEAST, _UNIX_MILLISECONDS = 1e9, 1e11
"""From here on a Retry-After is a Unix time, and one in milliseconds."""
REASON_MOST = 200
"""Characters of a reason that an API gives."""


# --- words ----------------------------------------------------------------------------------------


class Word(Enum):
    """What a `status` says."""

    ABSENT = "absent"
    GOING_ON = "going on"
    WELL = "well"
    PERSON = "a person is waited for"
    BADLY = "badly"
    OTHER = "other"
    """A word that is not ours, a number, an object: what it means depends on where it stands."""

    @property
    def is_final(self) -> bool:
        return self in (Word.WELL, Word.PERSON, Word.BADLY)


_WORDS: Mapping[Word, str] = {
    Word.GOING_ON: "queued pending accepted submitted created scheduled running working processing "
    "started in_progress",
    Word.WELL: "succeeded success completed complete done ok finished",
    Word.PERSON: "requires_action input_required auth_required interrupted paused suspended",
    Word.BADLY: "failed failure error errored cancelled canceled timeout timed_out expired "
    "incomplete rejected aborted",
}
_MEANING = {word: kind for kind, words in _WORDS.items() for word in words.split()}
FAILED_WORDS = frozenset(_WORDS[Word.BADLY].split())
FINAL_WORDS = frozenset(w for w, kind in _MEANING.items() if kind.is_final)
WAITS_FOR_A_PERSON = "the run waits for a person: the session's next message is theirs"


def meaning(status: object) -> Word:
    """What a `status` says, in any case, with `-`, `_` or a blank between its words."""
    if status is None:
        return Word.ABSENT
    if not isinstance(status, str):
        return Word.OTHER
    parted = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", status.strip())
    return _MEANING.get(re.sub(r"[-_\s]+", "_", parted.lower()), Word.OTHER)


def ended(status: object, text: bytes, http_status: int) -> Answered | Failed | None:
    """The outcome of a run whose `status` is a final word; None for any other. `text`: the answer,
    for the reason that the API gives."""
    match meaning(status):
        case Word.WELL:
            return Answered(http_status)
        case Word.PERSON:
            return Answered(http_status, WAITS_FOR_A_PERSON)
        case Word.BADLY:
            word = str(status).strip().lower()
            return Failed(f"the API says that the run ended as {word}{detail(text)}", http_status)
        case _:
            return None


# --- the table ------------------------------------------------------------------------------------


def read(answer: Answer) -> Outcome:
    """The outcome of an answer to a call, by DESIGN's table."""
    status = answer.status
    if 200 <= status < 300:
        return _success(answer)
    if status in (409, 423):
        return Busy(status, retry_after(answer.headers))
    if status in UNAVAILABLE:
        return Unavailable(
            f"the API says later (HTTP {status})", status, retry_after(answer.headers)
        )
    if status in (404, 410):
        if _names_the_session(answer.body):
            return Gone(status)
        return Misconfigured(_nothing_there(answer), status, of_session=True)
    if status in _WHY_MISCONFIGURED:
        return Misconfigured(f"{_WHY_MISCONFIGURED[status]} (HTTP {status})", status)
    if status in _TLS_WANTED and (reason := _tls_wanted(answer)) is not None:
        return Misconfigured(f"{reason} (HTTP {status})", status)
    if 300 <= status < 400:
        to = answer.headers.get("Location", "nowhere")
        return Misconfigured(
            f"a redirect to {to[:REASON_MOST]}: set RECALL_RUN_URL to the final address "
            f"(HTTP {status})",
            status,
        )
    if 400 <= status < 500:
        return Refused(f"the API refuses the request (HTTP {status}){reason_in(answer)}", status)
    if status in GATEWAY:
        return Unknown(
            f"a gateway answers for a server that is away (HTTP {status}){reason_in(answer)}",
            status,
            retry_after(answer.headers),
            by_gateway=True,
        )
    if 500 <= status < 600:
        return Unknown(f"the API broke (HTTP {status}){reason_in(answer)}", status)
    return Unknown(f"an answer that HTTP does not know (status {status})", status)


_WHY_MISCONFIGURED = {
    401: "the API wants another token: see RECALL_RUN_TOKEN",
    402: "the API wants to be paid: see the account at its provider",
    403: "the API forbids this token the endpoint: see RECALL_RUN_TOKEN",
    405: "what is at this address takes no POST: see RECALL_RUN_URL",
    406: "what is at this address can't answer with JSON: see RECALL_RUN_URL",
    407: "a proxy wants a login: see RECALL_PROXY",
    421: "this server does not answer for this host name: see RECALL_RUN_URL",
    426: "the server wants another protocol: see RECALL_RUN_URL (https?)",
}

SESSION_HINT = (
    "if the session is gone, the API says so with the code session_not_found in its answer"
)


def _nothing_there(answer: Answer) -> str:
    # What a framework says where no route matches ("Not Found") tells nothing.
    said = reason_in(answer)
    if said.lower().strip(" :.") in ("", "not found", "404 not found", "gone"):
        said = ""
    return (
        f"nothing is at this address: see RECALL_RUN_URL; {SESSION_HINT} "
        f"(HTTP {answer.status}){said}"
    )


_SPEAKS_TLS = re.compile(
    r"plain http request was sent|http request to an https|ssl-enabled server|requires tls"
    r"|requires https|expects? (?:tls|ssl|https)|use (?:the )?https",
    re.IGNORECASE,
)
_WANTS_CERTIFICATE = re.compile(
    r"(?:ssl|tls|client) certificate|certificate (?:is )?required", re.IGNORECASE
)


def _tls_wanted(answer: Answer) -> str | None:
    """Whether a server says that it speaks TLS, or wants a certificate of ours."""
    if kept_members(answer) is not None:
        return None  # The application's own.
    text = answer.body[:4096].decode("utf-8", "replace")
    if answer.status == 497 or _SPEAKS_TLS.search(text):
        return "the server speaks TLS at this port: write https in RECALL_RUN_URL"
    if answer.status in (495, 496) or _WANTS_CERTIFICATE.search(text):
        return (
            "the server wants a certificate of ours: see RECALL_CLIENT_CERT_FILE and "
            "RECALL_CLIENT_KEY_FILE"
        )
    return None


# --- a success ------------------------------------------------------------------------------------


def _success(answer: Answer) -> Outcome:
    kind = media_type(answer)
    if is_stream(answer):
        return _stream_ended(answer, kind)
    text = answer.body.strip()
    if not text:
        return Answered(answer.status)
    said_json = "json" in kind
    document = kept_members(answer)
    if document is not None:
        return ended(document.get("status"), text, answer.status) or Answered(answer.status)
    if said_json or text[:1] in (b"{", b"["):
        if answer.truncated or _document(answer) is not NO_JSON:
            return Answered(answer.status)
        *lines, last = text.splitlines()
        if lines and all(read_json(line) is not NO_JSON for line in (lines[0], last)):
            return _stream_ended(answer, "application/x-ndjson")
        # `OK` is a text, whatever it calls itself; half a document is none.
        if said_json and not text[:1].isalpha():
            return Unknown(
                f"an answer that calls itself JSON and is none (HTTP {answer.status})",
                answer.status,
            )
    if is_page(answer):
        return Misconfigured(
            f"no JSON but a web page ({kind or 'HTML'}){_titled(answer)}: see RECALL_RUN_URL "
            f"(HTTP {answer.status})",
            answer.status,
        )
    if not is_text(answer):
        return Unknown(
            f"an answer that is neither JSON nor text but {kind or 'something else'} "
            f"(HTTP {answer.status})",
            answer.status,
        )
    return Answered(answer.status)


EVENT_STREAM = "text/event-stream"
NDJSON = frozenset(
    {
        "application/x-ndjson",
        "application/ndjson",
        "application/jsonl",
        "application/x-jsonl",
        "application/x-jsonlines",
        "application/jsonlines",
        "application/json-seq",
        "application/stream+json",
        "application/x-json-stream",
        "text/x-ndjson",
    }
)


def media_type(answer: Answer) -> str:
    """The media type in lower case, without its parameters; empty where there is none."""
    return answer.headers.get("Content-Type", "").split(";")[0].strip().lower()[:60]


def is_stream(answer: Answer) -> bool:
    """Whether a success came as a stream of events, read to its end: the run was its request."""
    kind = media_type(answer)
    return kind == EVENT_STREAM or kind in NDJSON


def _stream_ended(answer: Answer, kind: str) -> Outcome:
    """The outcome of a stream that was read to its end: its last event decides."""
    text = (answer.tail if answer.truncated else answer.body).removeprefix(b"\xef\xbb\xbf")
    if kind == EVENT_STREAM:
        name, data = last_event(text)
    else:
        name, data = "", next(_lines_from_the_end(text), b"")
    by_its_end = "Content-Length" not in answer.headers and "chunked" not in (
        answer.headers.get("Transfer-Encoding", "").lower()
    )
    if by_its_end and text and not text.endswith((b"\n", b"\r")) and read_json(data) is NO_JSON:
        # Only the end of the connection ended it, in the middle of a line.
        return Unknown(f"the stream broke off in the middle (HTTP {answer.status})", answer.status)
    failed = _is_failure(name)
    document = read_json(data) if data else NO_JSON
    if isinstance(document, dict):
        for field in ("type", "status", "event"):
            failed = failed or _is_failure(document.get(field))
        failed = failed or ("error" in document and bool(document["error"]))
    if failed:
        return Failed(f"the stream ended with an error{detail(data)}", answer.status)
    return Answered(answer.status)


def _is_failure(word: object) -> bool:
    """Whether an event's name says that the run failed: `error`, and `response.failed`,
    `RUN_ERROR`, by its last part."""
    if not isinstance(word, str):
        return False
    last = re.split(r"[./:_-]", word)[-1]
    return Word.BADLY in (meaning(word), meaning(last))


_EPILOGUES = frozenset({"end", "done", "close", "ping", "heartbeat", "finish", "stop"})
"""Events that only say that the stream ends, or goes on: where they hold nothing they are none."""


def last_event(text: bytes) -> tuple[str, bytes]:
    """The name and the data of a stream's last event. `[DONE]`, which says only that the stream is
    whole, is none."""
    blocks = re.split(rb"\r\n\r\n|\n\n|\r\r", text.strip(b"\r\n"))
    for block in reversed(blocks):
        name, data = "", []
        for line in re.split(rb"\r\n|\n|\r", block):
            field, _, value = line.partition(b":")
            value = value.removeprefix(b" ")
            if field == b"event":
                name = value.decode("utf-8", "replace")
            elif field == b"data":
                data.append(value)
        whole = b"\n".join(data)
        empty = whole.strip() in (b"", b"{}", b"null", b"[DONE]")
        if (name or whole) and not (empty and (not name or name.lower() in _EPILOGUES)):
            return name, whole
    return "", b""


def _lines_from_the_end(text: bytes) -> Iterator[bytes]:
    for line in reversed(text.splitlines()):
        if line.strip(b" \t\x1e"):
            yield line.strip(b" \t\x1e")


_PAGE = re.compile(
    rb"\s*(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)*<(?:!doctype\s+html|html|head|body)\b", re.I | re.S
)
_XML = re.compile(rb"\s*<\?xml\b", re.I)
_MARKUP = re.compile(
    rb"<(?:!doctype|/?(?:html|head|body|title|meta|link|script|style|div|span|p|a|h[1-6]|ul|ol|li"
    rb"|table|tr|td|form|input|button|img|center|pre|iframe|main|section|article|header|footer|nav)"
    rb"(?=[\s/>]))",
    re.I,
)
_TITLE = re.compile(rb"<title[^>]*>(.*?)</title", re.I | re.S)


def is_page(answer: Answer) -> bool:
    """Whether a success is a web page: a login form, a proxy's welcome. `text/html` without any
    markup, as Flask sends a text, is none."""
    text = answer.body[: 64 << 10]
    if media_type(answer) in ("text/html", "application/xhtml+xml"):
        return _MARKUP.search(text) is not None
    return _PAGE.match(text.removeprefix(b"\xef\xbb\xbf")) is not None


def _titled(answer: Answer) -> str:
    found = _TITLE.search(answer.body[: 64 << 10])
    title = " ".join(found[1].decode("utf-8", "replace").split()) if found else ""
    return f" ({title[:80]})" if title else ""


_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")


def is_text(answer: Answer) -> bool:
    """Whether an answer is text of some kind, in whatever encoding: it has no control characters,
    and does not call itself an image, say."""
    kind = media_type(answer).partition("/")[0]
    if kind in ("image", "audio", "video", "font") or _XML.match(answer.body):
        return False
    return _CONTROL.search(answer.body[: 64 << 10]) is None


# --- JSON -----------------------------------------------------------------------------------------


def json_of(answer: Answer) -> Any:
    """The JSON in an answer; None if it is not JSON, or not whole."""
    try:
        return None if answer.truncated else json.loads(answer.body)
    except (ValueError, RecursionError):
        return None


def _document(answer: Answer) -> Any:
    """The JSON in an answer, also where it names another charset than JSON's own; NO_JSON if it is
    not JSON."""
    found = read_json(answer.body)
    charset = re.search(r"charset=\"?([\w-]{1,20})", answer.headers.get("Content-Type", ""), re.I)
    if found is NO_JSON and charset is not None:
        try:
            return read_json(answer.body.decode(charset[1]).encode())
        except (LookupError, ValueError):
            return NO_JSON
    return found


NO_JSON = object()
_READER = json.JSONDecoder(parse_int=str)


def read_json(text: bytes) -> Any:
    """The JSON in a text, with whole numbers as texts, as they may be of any length; NO_JSON if it
    is not JSON.
    """
    try:
        return _READER.decode(text.decode(json.detect_encoding(text), "surrogatepass"))
    except (ValueError, RecursionError):
        return NO_JSON


def members(answer: Answer) -> dict[str, Any] | None:
    """The members of the JSON object in an answer; of one that is longer than what was kept, those
    that came whole, at its beginning and at its end. None where it is no object."""
    found = kept_members(answer)
    if found is None or not answer.truncated:
        return found
    # What was cut off may have left half a number; the end is whole.
    return found | _last_members(answer.tail.decode("utf-8", "replace"))


def kept_members(answer: Answer) -> dict[str, Any] | None:
    """The same, of what was kept alone: an answer to a call is read by that."""
    if not answer.truncated:
        document = _document(answer) if answer.body.strip() else NO_JSON
        return document if isinstance(document, dict) else None
    text = answer.body.decode("utf-8", "replace")
    found: dict[str, Any] = {}
    at = _skip(text, 0)
    if text[at : at + 1] != "{":
        return None
    try:
        at = _past(text, "{", at)
        while True:
            name, at = _READER.raw_decode(text, at)
            found[name], at = _READER.raw_decode(text, _past(text, ":", at))
            at = _past(text, ",", at)
    except (ValueError, IndexError, RecursionError, TypeError):
        return found


_BETWEEN = re.compile(r'\\*"|[\[\]{},]')


def _last_members(text: str) -> dict[str, Any]:
    """The last members of a JSON object, from the end of its text alone: some servers write what a
    run has produced, however much, before its status."""
    found: dict[str, Any] = {}
    text = text.rstrip()
    if not text.endswith("}"):
        return found
    # Backwards from its end, which is in no string, it is plain which brackets are in a string.
    depth, in_string, end = 0, False, len(text) - 1
    for mark in reversed(list(_BETWEEN.finditer(text))):
        sign = mark[0][-1]
        if sign == '"':
            # Inside of a string an odd number of backslashes makes the quote a part of it.
            in_string = not in_string or (len(mark[0]) - 1) % 2 == 1
        elif in_string:
            continue
        elif sign in "]}":
            depth += 1
        elif sign in "[{":
            depth -= 1
        if in_string or not ((sign == "," and depth == 1) or depth < 1):
            continue
        document = read_json(b"{" + text[mark.end() : end].encode("utf-8", "surrogatepass") + b"}")
        if isinstance(document, dict):
            found = document | found
        end = mark.start()
        if depth < 1:
            break
    return found


_BLANK = re.compile(r"[\ufeff \t\r\n]*")


def _skip(text: str, at: int) -> int:
    blank = _BLANK.match(text, at)
    return at if blank is None else blank.end()


def _past(text: str, character: str, at: int) -> int:
    at = _skip(text, at)
    if text[at] != character:
        raise ValueError(character)
    return _skip(text, at + 1)


def _names_the_session(text: bytes) -> bool:
    document = read_json(text)
    if not isinstance(document, dict):
        return False
    detail = document.get("detail")
    words = [
        document.get("code"),
        document.get("type"),
        detail.get("code") if isinstance(detail, dict) else None,
    ]
    return "session_not_found" in [w for w in words if isinstance(w, str)]


# --- reasons --------------------------------------------------------------------------------------


def reason_in(answer: Answer) -> str:
    """What the API says of its refusal, as `: …`: from its JSON, else its text; of a web page, the
    title."""
    if found := detail(answer.body):
        return found
    if not answer.body.strip() or read_json(answer.body) is not NO_JSON:
        return ""
    if is_page(answer):
        return _titled(answer)
    if "json" in media_type(answer) or not is_text(answer):
        return ""
    words = answer.body[: 4 * REASON_MOST].decode("utf-8", "replace").split()
    return ": " + " ".join(words)[:REASON_MOST]


def detail(text: bytes) -> str:
    """The API's own reason, at most a line, as `: …`, if it is in one of the usual fields."""
    document = read_json(text)
    if not isinstance(document, dict):
        return ""
    for name in ("error", "message", "detail", "title", "reason", "errors"):
        if words := _words_of(document.get(name)):
            return ": " + " ".join(words.split())[:REASON_MOST]
    return ""


def _words_of(value: object) -> str:
    """A reason, in whichever way an API writes it: a text, an object with one, a list of either."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        words = next(
            (w for n in ("message", "detail", "msg", "reason") if (w := _text(value.get(n)))), ""
        )
        # FastAPI's list of what is wrong with a request: each says where, and what.
        where = value.get("loc")
        if words and isinstance(where, list):
            return f"{'.'.join(str(part) for part in where)}: {words}"
        return words or _text(value.get("code"))
    if isinstance(value, list):
        return "; ".join(words for one in value[:5] if (words := _words_of(one)))
    return ""


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


# --- Retry-After ----------------------------------------------------------------------------------

_NUMBER = re.compile(r"\d+(?:\.\d*)?", re.ASCII)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds from a Retry-After header: seconds, an HTTP date, or a Unix time. At least one, at
    most a day; None without a valid one.
    """
    raw = headers.get("Retry-After", "").strip()
    try:
        if _NUMBER.fullmatch(raw):
            seconds = float(raw)
            if seconds >= _UNIX_LEAST:
                seconds /= 1000 if seconds >= _UNIX_MILLISECONDS else 1
                seconds -= _now(headers)
        else:
            seconds = _date(raw) - _now(headers)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    return min(max(RETRY_AFTER_LEAST, seconds), RETRY_AFTER_MOST)


def _now(headers: Mapping[str, str]) -> float:
    """By the server's own clock if it says, as the host's may be wrong."""
    try:
        return _date(headers["Date"])
    except (KeyError, ValueError, TypeError, IndexError, OverflowError):
        return time.time()


def _date(text: str) -> float:
    """An HTTP date as a Unix time: always in GMT."""
    return parsedate_to_datetime(text).replace(tzinfo=UTC).timestamp()
