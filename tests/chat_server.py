"""A local OpenAI-compatible server that does what a script says: answers, or one of the ways in which servers fail."""

import contextlib
import dataclasses
import http.server
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

KEY = "sk-a-secret-of-the-tests-0123456789"
Act = Callable[["ChatHandler", dict[str, Any]], None]  # what a request is met with


@dataclasses.dataclass
class ChatServer:
    """What was asked, and what is done.

    Attributes:
      act: meets a request; may look at how many there were.
      requests: bodies, in order.
      headers: of each request.
      at_once: most requests that were open together.
    """

    act: Act
    requests: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    headers: list[dict[str, str]] = dataclasses.field(default_factory=list)
    at_once: int = 0
    url: str = ""

    def __post_init__(self) -> None:
        self.lock, self.open = threading.Lock(), 0


class ChatHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    chat: ChatServer

    def do_POST(self) -> None:
        chat = self.chat
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with chat.lock:
            chat.requests.append(asked | {"path": self.path})
            chat.headers.append({name.lower(): value for name, value in self.headers.items()})
            chat.open += 1
            chat.at_once = max(chat.at_once, chat.open)
        try:
            chat.act(self, asked)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            with chat.lock:
                chat.open -= 1

    def send(self, status: int, body: bytes, content_type: str = "application/json", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...


def completion(text: str | None, *, ended: str = "stop", usage: Any = (10, 5), **message: Any) -> bytes:
    """The body of a chat completion."""
    counts = {"prompt_tokens": usage[0], "completion_tokens": usage[1]} if usage else None
    choice = {"index": 0, "finish_reason": ended, "message": {"role": "assistant", "content": text, **message}}
    return json.dumps({"id": "1", "model": "served", "choices": [choice], "usage": counts}).encode()


def says(text: str | None, **about: Any) -> Act:
    return lambda handler, asked: handler.send(200, completion(text, **about))


def echoes(handler: ChatHandler, asked: dict[str, Any]) -> None:
    """Answers with the user's turn, backwards."""
    handler.send(200, completion(asked["messages"][-1]["content"][::-1]))


def fails(status: int, message: str = "no", code: str | None = None, **headers: str) -> Act:
    body = json.dumps({"error": {"message": message, "code": code}}).encode()
    return lambda handler, asked: handler.send(status, body, **headers)


def sends(body: bytes, content_type: str = "application/json") -> Act:
    return lambda handler, asked: handler.send(200, body, content_type)


def keeps_silent(seconds: float) -> Act:
    def act(handler: ChatHandler, asked: dict[str, Any]) -> None:
        time.sleep(seconds)
        handler.close_connection = True

    return act


def drips(seconds: float) -> Act:
    """A body that comes byte by byte: no pause between two of them is a time-out."""

    def act(handler: ChatHandler, asked: dict[str, Any]) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            handler.wfile.write(b" ")
            time.sleep(0.05)
        handler.close_connection = True

    return act


def drops(handler: ChatHandler, asked: dict[str, Any]) -> None:
    """Resets the connection before anything is sent."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.close_connection = True


def drops_in_the_body(handler: ChatHandler, asked: dict[str, Any]) -> None:
    body = completion("never whole")
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body[:20])
    handler.close_connection = True


def in_turn(*acts: Act) -> Act:
    """One after the other; the last goes on."""
    left = list(acts)
    lock = threading.Lock()

    def act(handler: ChatHandler, asked: dict[str, Any]) -> None:
        with lock:
            now = left.pop(0) if len(left) > 1 else left[0]
        now(handler, asked)

    return act


@contextlib.contextmanager
def chatting(act: Act) -> Iterator[ChatServer]:
    chat = ChatServer(act)
    handler = type("Handler", (ChatHandler,), {"chat": chat})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        chat.url = f"http://127.0.0.1:{server.server_port}/v1"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield chat
        finally:
            server.shutdown()
            thread.join()
