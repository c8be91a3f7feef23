"""What the API stands on: the job store, the storage, the models, and the limits."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from tccp.files import Folder
from tccp.serving.store import JobStore

_MIB, _GIB = 2**20, 2**30
FoundHeads = tuple[int, int, bytes, Sequence[Sequence[float]]]
"""Width and height of a scene, JPEG of one of its frames, and boxes x0, y0, x1, y1 of the heads in it, in pixels."""


class ServerLimits(BaseModel):
    """What one server accepts.

    max_upload_bytes: of a multipart request. max_json_bytes: of any other request, and of a batch's JSONL file.
    max_film_s, max_pixels: of a film and of a frame of a scene; preparation and the sandbox check them.
    max_waiting, max_jobs_of_owner: videos that may wait or run, of all and of one owner. max_input_bytes_of_owner: in
    the inputs of all videos of an owner that are kept. max_file_bytes_of_owner: in the files that an owner uploaded.
    max_uploads: multipart requests that one process receives at once. max_heads: scenes in which it looks for heads at
    once, for heads_s at most. keep_videos_s, keep_files_s: until they expire. upload_idle_s: longest wait for the next
    part of a request. events_s: longest answer to `GET .../events`; poll_s: between its looks into the store.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_upload_bytes: int = Field(default=512 * _MIB, gt=0)
    max_json_bytes: int = Field(default=8 * _MIB, gt=0)
    max_film_s: float = Field(default=600.0, gt=0)
    max_pixels: int = Field(default=4096 * 2304, gt=0)
    max_waiting: int = Field(default=5000, gt=0)
    max_jobs_of_owner: int = Field(default=1000, gt=0)
    max_input_bytes_of_owner: int = Field(default=50 * _GIB, gt=0)
    max_file_bytes_of_owner: int = Field(default=20 * _GIB, gt=0)
    max_uploads: int = Field(default=64, gt=0)
    max_batch_rows: int = Field(default=500, gt=0)
    max_heads: int = Field(default=4, gt=0)
    heads_s: float = Field(default=30.0, gt=0)
    keep_videos_s: float = Field(default=7 * 86400.0, gt=0)
    keep_files_s: float = Field(default=86400.0, gt=0)
    upload_idle_s: float = Field(default=30.0, gt=0)
    events_s: float = Field(default=50.0, gt=0)
    poll_s: float = Field(default=0.5, gt=0)


@dataclass(frozen=True)
class Server:
    """store, storage: of jobs and their files. models: version of weights by the name that clients give.

    find_heads: looks for heads in a scene, by the path of a file of this machine; it raises TccpError for a file that
    cannot be used. ready: what keeps the server from working, in words; an empty list if nothing does.
    tokens: owner by token; None: everybody is the owner `local`, for servers that only this machine can reach.
    webhook_secret: signs webhooks (see `tccp.serving.webhooks`); None: requests with a webhook are refused.
    metrics: further metrics in the text format of Prometheus.
    """

    store: JobStore
    storage: Folder
    models: Mapping[str, str] | Callable[[], Mapping[str, str]]
    find_heads: Callable[[Path], Awaitable[FoundHeads]]
    ready: Callable[[], Awaitable[list[str]]]
    limits: ServerLimits = field(default_factory=ServerLimits)
    tokens: Mapping[str, str] | None = None
    webhook_secret: str | None = None
    metrics: Callable[[], Awaitable[str]] | None = None

    def versions(self) -> Mapping[str, str]:
        """Version of weights by name of the model."""
        return self.models() if callable(self.models) else self.models
