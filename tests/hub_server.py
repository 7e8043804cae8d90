"""A local server of the Hugging Face Hub's endpoints that downloads use."""

import contextlib
import dataclasses
import hashlib
import http.server
import json
import os
import threading
import urllib.parse
from collections.abc import Iterator
from typing import Any


@dataclasses.dataclass
class Hub:
    """A server of the Hub's endpoints that a download uses.

    Attributes:
      repositories: name -> revision or commit -> (commit, files), or the (status, X-Error-Code) of every answer.
      gated: names whose files are not given out.
      asked: the paths that were asked for, in order.
    """

    repositories: dict[str, Any] = dataclasses.field(default_factory=dict)
    gated: set[str] = dataclasses.field(default_factory=set)
    asked: list[str] = dataclasses.field(default_factory=list)
    url: str = ""

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body."""
        self.asked.append(path)
        parts = [urllib.parse.unquote(part) for part in path.split("?")[0].strip("/").split("/")]
        if parts[:2] in (["api", "models"], ["api", "datasets"]):
            parts = parts[2:]
        elif parts[0] == "datasets":
            parts = parts[1:]
        name, kind, revision, file = "/".join(parts[:2]), *[*parts[2:4], "", ""][:2], "/".join(parts[4:])
        found = self.repositories.get(name, (404, "RepoNotFound"))
        if isinstance(found, tuple):
            return found[0], {"X-Error-Code": found[1]}, b""
        if (revision or "main") not in found:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        commit, files = found[revision or "main"]
        if kind == "resolve":
            if name in self.gated:
                return 403, {"X-Error-Code": "GatedRepo"}, b""
            if file not in files:
                return 404, {"X-Error-Code": "EntryNotFound"}, b""
            etag = hashlib.sha256(files[file]).hexdigest()
            return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": commit}, files[file]
        if kind == "tree" and not file:  # the whole repository
            listing: Any = [_entry("file", path, len(content)) for path, content in files.items()]
        elif kind == "tree":  # a folder
            inside = [path for path in files if path.startswith(f"{file}/")]
            folders = {"/".join(p.split("/")[: len(parts) - 3]) for p in inside if os.path.dirname(p) != file}
            listing = [_entry("file", path, len(files[path])) for path in inside if os.path.dirname(path) == file]
            listing += [_entry("directory", path, 0) for path in folders]
        else:
            listing = {"id": name, "sha": commit, "siblings": [{"rfilename": p} for p in files]}
        return 200, {"Content-Type": "application/json"}, json.dumps(listing).encode()


def _entry(kind: str, path: str, size: int) -> dict[str, Any]:
    return {"type": kind, "path": path, "size": size, "oid": "0" * 40}


@contextlib.contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            status, headers, body = hub.answer(self.path)
            self.send_response(status)
            for header, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(header, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield hub
        server.shutdown()
        thread.join()
