"""A client of the server: submit films, watch them, fetch them.

client = tccp.Client("http://127.0.0.1:8000")
video = client.submit("scene.mp4", "speech.wav", "face.png", consent="Ann agreed by letter")
for video in client.watch(video.id):
    print(video.status, video.progress)
client.fetch(video.id, "out.mp4")
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import httpx2

from tccp.errors import StorageError, TccpError
from tccp.files import atomic_path

DEFAULT_SERVER = "http://127.0.0.1:8000"
_Result = TypeVar("_Result")
_TIMEOUT_S = 60.0
_WAITS_S = (0.5, 1, 2, 4, 8, 15, 30)  # between attempts while the server cannot be reached
_RUNNING = ("queued", "in_progress")


class ServerError(TccpError):
    """The server refused a request. code: of the error. status: of HTTP."""

    def __init__(self, message: str, code: str, status: int):
        super().__init__(message)
        self.code, self.status = code, status


@dataclass(frozen=True)
class Video:
    """What the server tells of a job; `record` holds all of it."""

    id: str
    status: str
    progress: int = 0
    stage: str | None = None
    queue_position: int | None = None
    eta_s: int | None = None
    error: Mapping[str, str] | None = None
    record: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Video:
        known = ("id", "status", "progress", "stage", "queue_position", "eta_s", "error")
        values: dict[str, Any] = {name: record[name] for name in known if record.get(name) is not None}
        return cls(**values, record=record)

    @property
    def ended(self) -> bool:
        return self.status not in _RUNNING


class Client:
    """server: address. token: for servers that ask for one. Methods may be called from one thread at a time.

    A server that cannot be reached is tried again for a minute; a request that was sent twice makes one job.
    Methods raise ServerError (a TccpError) if the server refuses, StorageError if it cannot be reached.
    """

    def __init__(self, server: str = DEFAULT_SERVER, token: str | None = None):
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self.server = server.rstrip("/")
        self._http = httpx2.Client(base_url=self.server, headers=headers, timeout=_TIMEOUT_S)

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def submit(
        self,
        scene: str | Path,
        audio: str | Path,
        identity: str | Path,
        *,
        consent: str,
        mask: str | Path | None = None,
        track: str | Path | None = None,
        landmarks: str | Path | None = None,
        idempotency_key: str | None = None,
        **options: Any,
    ) -> Video:
        """Sends a job. consent: who agreed that this person's face is generated, or why nobody needs to.

        track: a JSON track file. options: of the API, such as seed, box, steps. idempotency_key: a request with a key
        that came before gives the job that it made then; None: a new one.
        """
        files = {"scene": scene, "audio": audio, "identity": identity}
        files |= {name: path for name, path in (("mask", mask), ("track", track), ("landmarks", landmarks)) if path}
        return self._send("/v1/videos", files, {"consent": consent, **options}, idempotency_key)

    def remix(self, video_id: str, landmarks: str | Path, **options: Any) -> Video:
        """A new job with the inputs of another one, and given landmarks in place of stage 1."""
        return self._send(f"/v1/videos/{video_id}/remix", {"landmarks": landmarks}, options, None)

    def get(self, video_id: str) -> Video:
        return Video.of(self._asked("GET", f"/v1/videos/{video_id}"))

    def videos(self, limit: int = 20, after: str | None = None) -> list[Video]:
        """The newest jobs. after: the id of the last one of the page before."""
        query: dict[str, Any] = {"limit": limit} | ({} if after is None else {"after": after})
        return [Video.of(one) for one in self._asked("GET", "/v1/videos", params=query)["data"]]

    def watch(self, video_id: str) -> Iterator[Video]:
        """The job at every change, until it has ended. It goes on after the server was away."""
        failures = 0
        while True:
            try:
                for video in self._events(video_id):
                    failures = 0
                    yield video
                    if video.ended:
                        return
            except (httpx2.TransportError, json.JSONDecodeError) as error:
                failures += 1
                if failures > len(_WAITS_S):
                    raise self._away(error) from None
                time.sleep(_WAITS_S[failures - 1])
            video = self.get(video_id)
            if video.ended:
                yield video
                return

    def _events(self, video_id: str) -> Iterator[Video]:
        """The job at every change, until the server ends the connection."""
        name, data = "", []
        with self._http.stream("GET", f"/v1/videos/{video_id}/events") as answer:
            if answer.status_code != 200:
                answer.read()
                raise _refusal(answer)
            for line in answer.iter_lines():
                kind, _, value = line.partition(":")
                if kind == "event":
                    name = value.strip()
                elif kind == "data":
                    data.append(value.removeprefix(" "))
                elif not line:
                    if name == "video" and data:
                        yield Video.of(json.loads("\n".join(data)))
                    elif name in ("reconnect", "end", "error"):
                        return
                    name, data = "", []

    def fetch(self, video_id: str, out: str | Path, variant: str = "film") -> Path:
        """Writes a file of a finished job: film, landmarks, report or preview. `out` appears when it is complete."""
        out = Path(out)

        def fetch() -> Path:
            address = f"/v1/videos/{video_id}/content"
            with self._http.stream("GET", address, params={"variant": variant}) as answer:
                if answer.status_code != 200:
                    answer.read()
                    raise _refusal(answer)
                with atomic_path(out) as part, part.open("wb") as file:
                    for block in answer.iter_bytes():
                        file.write(block)
            return out

        return self._tried(fetch)

    def cancel(self, video_id: str) -> Video:
        """Cancels a job; one that has ended stays as it is. Returns it as it is then."""
        video = self.get(video_id)
        if not video.ended:
            self._asked("DELETE", f"/v1/videos/{video_id}")
            video = self.get(video_id)
        return video

    def delete(self, video_id: str) -> None:
        """Cancels a job that runs; removes one that has ended, with its files."""
        self._asked("DELETE", f"/v1/videos/{video_id}")

    def _send(
        self, address: str, files: Mapping[str, str | Path], options: Mapping[str, Any], key: str | None
    ) -> Video:
        headers = {"Idempotency-Key": key or secrets.token_urlsafe(16)}
        fields = {name: _text(value) for name, value in options.items() if value is not None}

        def send() -> Video:
            with ExitStack() as opened:
                parts: dict[str, tuple[str, BinaryIO]] = {}
                for name, path in files.items():
                    try:
                        file = opened.enter_context(Path(path).open("rb"))
                    except OSError as error:
                        raise TccpError(f"{name} {path} cannot be read: {error.strerror}") from None
                    parts[name] = (Path(path).name, file)
                answer = self._http.post(address, data=fields, files=parts, headers=headers)
            return Video.of(_record(answer))

        return self._tried(send)

    def _asked(self, method: str, address: str, **given: Any) -> Any:
        return self._tried(lambda: _record(self._http.request(method, address, **given)))

    def _tried(self, action: Callable[[], _Result]) -> _Result:
        for wait_s in (*_WAITS_S, None):
            try:
                return action()
            except (httpx2.TransportError, _Busy) as error:
                if wait_s is None:
                    raise self._away(error) from None
                time.sleep(max(wait_s, getattr(error, "wait_s", 0.0)))
        raise AssertionError

    def _away(self, error: Exception) -> Exception:
        if isinstance(error, _Busy):
            return error.refusal
        reason = str(error) or type(error).__name__
        return StorageError(f"the server {self.server} cannot be reached ({reason}): is it running?", reason)


class _Busy(Exception):
    """The server has no room now. wait_s: when to try again."""

    def __init__(self, refusal: ServerError, wait_s: float):
        super().__init__(str(refusal))
        self.refusal, self.wait_s = refusal, wait_s


def _record(answer: httpx2.Response) -> Any:
    if answer.status_code >= 400:
        refusal = _refusal(answer)
        if answer.status_code in (429, 502, 503, 504):
            raise _Busy(refusal, min(60.0, float(answer.headers.get("retry-after", 0) or 0)))
        raise refusal
    return answer.json()


def _refusal(answer: httpx2.Response) -> ServerError:
    try:
        error = answer.json()["error"]
        return ServerError(str(error["message"]), str(error.get("code") or ""), answer.status_code)
    except (ValueError, KeyError, TypeError):
        return ServerError(f"the server answered {answer.status_code}", "", answer.status_code)


def _text(value: Any) -> str:
    """A value as a field of a form."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(value) if isinstance(value, list | tuple | dict) else str(value)
