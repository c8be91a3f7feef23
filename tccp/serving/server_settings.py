"""Settings of the server. Every process of it has the same ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tccp.config import storage_root
from tccp.errors import TccpError
from tccp.files import Folder, is_url
from tccp.media.sandbox import Limits
from tccp.serving.weight_versions import pin


class ServerSettings(BaseModel):
    """What a server runs, and how much of it.

    storage: folder or URL of everything that it keeps. store: URL of the job store; None: SQLite in the storage, for
    one machine. weights: pipelines by the names under which clients ask for them; they get `default` if they name none.
    versions: those that the names meant when the server started (`pinned`). tokens_file: JSON, token to owner; None:
    everybody is one owner, which only a server on this machine's own address may do.

    slots: jobs that a conductor works on. chains: shots of a job at once. batch: rows in one evaluation.
    stuck_s: after so long in one step, a replica is started again.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    storage: str = ""
    store: str | None = None
    weights: dict[str, str] = Field(default_factory=lambda: {"default": "toy"})
    versions: dict[str, str] = Field(default_factory=dict)
    tokens_file: str | None = None
    detector_weights: str | None = None
    device: str = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    batch: int = Field(default=8, ge=1, le=256)
    continuous: bool = True
    slots: int = Field(default=8, ge=1, le=1024)
    chains: int = Field(default=2, ge=1, le=64)
    lease_s: float = Field(default=15.0, ge=1)
    most_failures: int = Field(default=5, ge=1)
    stuck_s: float = Field(default=300.0, gt=0)
    clean_every_s: float = Field(default=30.0, gt=0)
    keep_s: float = Field(default=7 * 24 * 3600.0, gt=0)
    stage_cpus: float = Field(default=0.5, ge=0)
    gpus_per_stage: float = Field(default=0.0, ge=0)
    min_replicas: int = Field(default=1, ge=0)
    max_replicas: int = Field(default=1, ge=1)
    cpu_replicas: int = Field(default=1, ge=1)
    conductors: int = Field(default=1, ge=1)
    max_upload_bytes: int = Field(default=512 << 20, ge=1)
    max_film_s: float = Field(default=600.0, gt=0)
    max_pixels: int = Field(default=3840 * 2160, ge=1)
    max_waiting: int = Field(default=1000, ge=1)
    max_jobs_per_owner: int = Field(default=200, ge=1)
    max_bytes_per_owner: int = Field(default=8 << 30, ge=1)
    webhooks: bool = False
    webhook_secret: str | None = None

    @classmethod
    def given(cls, values: Mapping[str, object]) -> ServerSettings:
        """Settings from names and values, which may be text. Raises TccpError that names what is wrong."""
        try:
            return cls.model_validate(values, strict=False)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            if first["type"] == "extra_forbidden":
                raise TccpError(f"unknown setting {name}: choose one of {', '.join(cls.model_fields)}") from None
            raise TccpError(f"setting {name} {first['input']!r}: {first['msg']}") from None

    @property
    def store_url(self) -> str:
        """Raises TccpError if the storage is a URL and no store is named."""
        if self.store is not None:
            return self.store
        local = Folder(self.storage).local
        if local is None:
            raise TccpError(f"--storage {self.storage} is not on this machine: give --store postgresql://... as well")
        return f"sqlite:///{local.absolute()}/jobs.db"

    @property
    def decoding_limits(self) -> Limits:
        """Limits on what clients' files may ask for."""
        return Limits(
            max_pixels=self.max_pixels,
            max_duration_s=max(60.0, 4 * self.max_film_s),
            max_file_bytes=self.max_upload_bytes,
            memory_bytes=2 << 30,
        )

    @property
    def detector_weights_path(self) -> Path | None:
        return None if self.detector_weights is None else Path(self.detector_weights)

    def pinned(self) -> ServerSettings:
        """With an absolute storage, and the versions of the weights copied into it.

        Raises TccpError for weights that are missing or incomplete.
        """
        if "default" not in self.weights:
            raise TccpError(f"weights are named {', '.join(self.weights)}: name one of them default")
        place = self.storage or str(storage_root() / "serve")
        if not is_url(place):
            place = str(Path(place).absolute())
        versions = {name: pin(source, Folder(place)) for name, source in self.weights.items()}
        return self.model_copy(update={"storage": place, "versions": versions})
