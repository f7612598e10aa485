"""The web application: the page, the list of models, and completions.

    request -> size, type and JSON checked -> a place in the queue -> the model's thread -> pieces -> answer or stream

Pieces cross from the model's thread into the event loop through a queue that is never waited on from the thread's side, so a client
that reads slowly holds no model, and one that has left is noticed between two tokens.
"""

import asyncio
import difflib
import json
import threading
import traceback
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from llama_lab.config.errors import ConfigError
from llama_lab.inference.completion import Piece
from llama_lab.lab.serve.shelf import Entry, Shelf
from llama_lab.lab.serve.wire import Answer, Asked, choice, error_body, read_request, usage_of

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from llama_lab.inference.load import LoadedRun

ANSWERED = "there are GET /v1/models and POST /v1/completions, and the page at /"
PAGE = Path(__file__).parent / "page"
ASSETS = {"/": "page.html", "/page.js": "page.js", "/page.css": "page.css"}
MOST_BYTES = 1 << 20
"""Of a request's body: far more than any context holds."""
BODY_SECONDS = 20.0
"""A body that takes longer to come is given up."""
SEND_SECONDS = 30.0
"""A client that takes nothing for so long is given up."""
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
Event = Piece | Exception | None
"""What a model's thread says: a piece, what went wrong, or that it is done."""


class Ticket:
    """A place among the requests that compute or wait. Given back once, however often that is asked for."""

    def __init__(self, release: Callable[[], None]):
        self._release: Callable[[], None] | None = release

    def give_back(self) -> None:
        """Make room for another request."""
        if self._release is not None:
            self._release()
            self._release = None


class Counter:
    """How many requests are inside. Used in the event loop alone."""

    def __init__(self, most: int):
        self._most, self._inside = most, 0

    def take(self) -> Ticket | None:
        """A place, or None where all are taken."""
        if self._inside >= self._most:
            return None
        self._inside += 1
        return Ticket(self._leave)

    def _leave(self) -> None:
        self._inside -= 1


class Work:
    """A request in its model's thread.

    Attributes:
        cancelled: set by the event loop where nobody waits for the rest.
    """

    def __init__(self, shelf: Shelf, entry: Entry, asked: Asked):
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._asked = asked
        self.cancelled = threading.Event()
        future = shelf.submit(entry, self._run)
        future.add_done_callback(self._ended)

    async def next(self) -> Event:
        """What the thread says next."""
        return await self._events.get()

    def _run(self, run: "LoadedRun") -> None:
        if self.cancelled.is_set():
            return
        with closing(run.stream(self._asked.prompts, seeds=self._asked.seeds, **self._asked.options)) as pieces:
            for piece in pieces:
                if self.cancelled.is_set():
                    return
                self._say(piece)

    def _ended(self, future: Any) -> None:
        error = None if future.cancelled() else future.exception()
        if error is not None and not isinstance(error, ConfigError):
            traceback.print_exception(error)
        self._say(error)

    def _say(self, event: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the server has ended meanwhile
            self.cancelled.set()


class Stream(StreamingResponse):
    """Pieces as server-sent events. Whatever ends it, the model is told and the place given back."""

    def __init__(self, pieces: AsyncIterator[str], ended: Callable[[], None]):
        super().__init__(pieces, media_type="text/event-stream")
        self._when_ended = ended

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        async def bounded(message: Any) -> None:
            await asyncio.wait_for(send(message), SEND_SECONDS)

        try:
            await super().__call__(scope, receive, bounded)
        except TimeoutError:
            return
        finally:
            self._when_ended()


def build_app(shelf: Shelf, *, waiting: int, running: int, hosts: list[str]) -> Starlette:
    """The application.

    Args:
        shelf: what is served.
        waiting, running: requests that wait, and that compute, at most; one more is refused.
        hosts: names under which it may be asked, so that no page of another site reaches it through a name of its own.
    """
    counter = Counter(waiting + running)

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_described(entry) for entry in shelf.entries()]})

    async def completions(request: Request) -> Response:
        asked = read_request(await _body(request))
        entry = shelf.find(asked.model)
        if entry is None:
            names = [name for one in shelf.entries() for name in (one.id, one.id.rpartition("@")[0])]
            close = difflib.get_close_matches(asked.model or "", names, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise HTTPException(404, f"there is no model {asked.model!r}; {hint}GET /v1/models lists them")
        ticket = counter.take()
        if ticket is None:
            raise HTTPException(429, "too many requests are waiting; try again in a moment", headers={"Retry-After": "1"})
        work = None
        try:
            work = Work(shelf, entry, asked)
            return await _answered(request, entry, asked, work, ticket)
        except BaseException:
            if work is not None:
                work.cancelled.set()
            ticket.give_back()
            raise

    routes = [Route(path, _asset(name)) for path, name in ASSETS.items()]
    routes += [Route("/v1/models", models), Route("/v1/completions", completions, methods=["POST"])]
    return Starlette(
        routes=routes,
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)],
        exception_handlers={
            HTTPException: _on_http_error,
            ConfigError: _on_mistake,
            ClientDisconnect: _on_departure,
            Exception: _on_failure,
        },
    )


async def _answered(request: Request, entry: Entry, asked: Asked, work: Work, ticket: Ticket) -> Response:
    """The answer as a whole, or the beginning of a stream; errors are raised before anything is sent."""
    first = await work.next()
    if isinstance(first, Exception):
        raise first
    answer = Answer(entry.id)
    if asked.stream:

        def ended() -> None:
            work.cancelled.set()
            ticket.give_back()

        return Stream(_events(answer, asked, work, first), ended)
    texts = [prompt if asked.echo else "" for prompt in asked.prompts]
    finishes: dict[int, str | None] = {}
    sizes: dict[int, tuple[int, int]] = {}
    event: Event = first
    while event is not None:
        if isinstance(event, Exception):
            raise event
        texts[event.index] = str(texts[event.index]) + event.text
        finishes[event.index], sizes[event.index] = event.finish, (event.prompt_tokens, event.new_tokens)
        if await request.is_disconnected():
            raise ClientDisconnect
        event = await work.next()
    ticket.give_back()
    choices = [choice(index, str(text), finishes[index]) for index, text in enumerate(texts)]
    return JSONResponse(answer.body(choices, usage_of(sizes)), headers=HEADERS)


async def _events(answer: Answer, asked: Asked, work: Work, event: Event) -> AsyncIterator[str]:
    """The lines of a stream."""
    sizes: dict[int, tuple[int, int]] = {}
    if asked.echo:
        yield _event(answer.body([choice(index, str(prompt), None) for index, prompt in enumerate(asked.prompts)], None))
    while event is not None:
        if isinstance(event, Exception):
            yield _event(error_body(str(event), kind="server_error"))
            return
        sizes[event.index] = (event.prompt_tokens, event.new_tokens)
        yield _event(answer.body([choice(event.index, event.text, event.finish)], None))
        event = await work.next()
    if asked.usage:
        yield _event(answer.body([], usage_of(sizes)))
    yield "data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


async def _body(request: Request) -> bytes:
    """A request's body, if it is JSON, comes in time and is not too large."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # A page of another site can send no JSON without being allowed to, so this keeps it from asking.
        raise HTTPException(415, "the body has to be JSON, with Content-Type: application/json")
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size > MOST_BYTES:
                    # What is still to come would be taken for the next request.
                    raise HTTPException(413, f"the body is larger than {MOST_BYTES:,} bytes", headers={"Connection": "close"})
                parts.append(part)
    except TimeoutError:
        raise HTTPException(408, "the body took too long to come", headers={"Connection": "close"}) from None
    return b"".join(parts)


def _described(entry: Entry) -> dict[str, Any]:
    about = {"id": entry.id, "object": "model", "created": entry.created, "owned_by": "llama_lab"}
    return about | {"run": entry.id.rpartition("@")[0], "update": entry.update, "tokens": entry.tokens}


def _asset(name: str) -> Callable[[Request], Response]:
    def answer(request: Request) -> Response:
        return FileResponse(PAGE / name, headers=HEADERS)

    return answer


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    detail = error.detail
    if detail == HTTPStatus(error.status_code).phrase:  # the framework's own
        detail = f"{request.method} {request.url.path} is not answered here; {ANSWERED}"
        if "chat" in request.url.path:
            detail += ". These models continue texts and were not trained to chat: send the text as `prompt`"
    body = error_body(detail, code={404: "not_found", 429: "too_many_requests"}.get(error.status_code))
    return JSONResponse(body, error.status_code, headers={**HEADERS, **(error.headers or {})})


async def _on_mistake(request: Request, error: Exception) -> Response:
    """A mistake in a request, every problem of it in one sentence."""
    assert isinstance(error, ConfigError)
    said = "; ".join(f"{subject} {rule}" for subject, rule in error.problems).replace("max_new_tokens", "max_tokens")
    return JSONResponse(error_body(said), 400, headers=HEADERS)


async def _on_departure(request: Request, error: Exception) -> Response:
    """Nobody reads it; the status is the one that logs have for a client that left."""
    return Response(status_code=499)


async def _on_failure(request: Request, error: Exception) -> Response:
    said = "something went wrong here; the server's terminal says what"
    return JSONResponse(error_body(said, kind="server_error"), 500, headers=HEADERS)
