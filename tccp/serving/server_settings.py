"""Settings of the server. Every process of it has the same ones."""

from __future__ import annotations

import base64
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tccp.config import storage_root
from tccp.errors import TccpError
from tccp.files import Folder, is_url
from tccp.media.sandbox import Limits
from tccp.serving.api.server import ServerLimits
from tccp.serving.weight_versions import pin
from tccp.strict_json import parse_json


class ServerSettings(BaseModel):
    """What a server runs, and how much of it.

    storage: folder or URL of everything that it keeps. store: URL of the job store; None: SQLite in the storage, for
    one machine. weights: pipelines by the names under which clients ask for them; they get `default` if they name none.
    versions: those that the names meant when the server started (`pinned`). tokens_file: JSON, token to owner; None:
    everybody is one owner, which only a server on this machine's own address may do.

    slots: jobs that a conductor works on. chains: shots of a job at once. batch: rows in one evaluation; None: as many
    as make it most efficient, measured for each stage, if an evaluation takes no longer than longest_step_s then.
    stuck_s: after so long in one step, a replica is started again.
    webhooks: whether clients may name an address that is called when a job ends. webhook_secret signs these calls;
    None: one is made and kept in the storage. owners: by token, from tokens_file (`pinned`).
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
    batch: int | None = Field(default=None, ge=1, le=256)
    longest_step_s: float = Field(default=1.0, gt=0)
    continuous: bool = True
    slots: int = Field(default=8, ge=1, le=1024)
    chains: int = Field(default=2, ge=1, le=64)
    lease_s: float = Field(default=15.0, ge=1)
    most_failures: int = Field(default=5, ge=1)
    stuck_s: float = Field(default=300.0, gt=0)
    clean_every_s: float = Field(default=30.0, gt=0)
    stage_cpus: float = Field(default=0.5, ge=0)
    gpus_per_stage: float = Field(default=0.0, ge=0)
    min_replicas: int = Field(default=1, ge=0)
    max_replicas: int = Field(default=1, ge=1)
    cpu_replicas: int = Field(default=1, ge=1)
    conductors: int = Field(default=1, ge=1)
    limits: ServerLimits = ServerLimits()
    webhooks: bool = False
    webhook_secret: str | None = Field(default=None, repr=False)
    owners: dict[str, str] | None = Field(default=None, repr=False)

    @classmethod
    def given(cls, values: Mapping[str, object]) -> ServerSettings:
        """Settings from names and values, which may be text; `limits.NAME` is one of the limits.

        Raises TccpError that names what is wrong.
        """
        nested: dict[str, Any] = {}
        for name, value in values.items():
            group, dot, inner = name.partition(".")
            if dot:
                nested.setdefault(group, {})[inner] = value
            else:
                nested[name] = value
        try:
            return cls.model_validate(nested)
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
            max_pixels=self.limits.max_pixels,
            max_duration_s=max(60.0, 4 * self.limits.max_film_s),
            max_file_bytes=self.limits.max_upload_bytes,
            memory_bytes=2 << 30,
        )

    @property
    def detector_weights_path(self) -> Path | None:
        return None if self.detector_weights is None else Path(self.detector_weights)

    def _read_tokens(self) -> dict[str, str] | None:
        if self.tokens_file is None:
            return None
        shape = 'a JSON object, token to owner, such as {"TOKEN": "ann"}'
        try:
            found = parse_json(Path(self.tokens_file).read_bytes())
        except (OSError, ValueError) as error:
            raise TccpError(f"--tokens {self.tokens_file} cannot be read ({error}): give {shape}") from None
        if not isinstance(found, dict) or not found or not all(isinstance(one, str) and one for one in found.values()):
            raise TccpError(f"--tokens {self.tokens_file}: give {shape}")
        return found

    def pinned(self) -> ServerSettings:
        """With an absolute storage, the versions of the weights copied into it, and a secret for webhooks.

        Raises TccpError for weights that are missing or incomplete.
        """
        if "default" not in self.weights:
            raise TccpError(f"weights are named {', '.join(self.weights)}: name one of them default")
        place = self.storage or str(storage_root() / "serve")
        if not is_url(place):
            place = str(Path(place).absolute())
        versions = {name: pin(source, Folder(place)) for name, source in self.weights.items()}
        update: dict[str, Any] = {"storage": place, "versions": versions, "owners": self._read_tokens()}
        if self.webhooks and self.webhook_secret is None:
            update["webhook_secret"] = _kept_secret(Folder(place))
        return self.model_copy(update=update)


def _kept_secret(storage: Folder) -> str:
    """The secret of this storage, made once."""
    name = "webhook-secret"
    if not storage.exists(name):
        storage.write(name, f"whsec_{base64.b64encode(secrets.token_bytes(32)).decode()}".encode())
        if storage.local is not None:
            (storage.local / name).chmod(0o600)
    return storage.read(name).decode()
