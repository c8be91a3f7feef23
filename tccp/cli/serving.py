"""The command serve."""

from __future__ import annotations

import json as json_module
import os
import secrets
import signal
import threading
from pathlib import Path
from typing import Annotated

import tyro

from tccp.cli.options import Device, check_device, note
from tccp.errors import TccpError
from tccp.files import Folder, is_url

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(
    port: int = 8000,
    host: str = "127.0.0.1",
    weights: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[NAME=]PIPELINE")] = ("toy",),
    storage: str | None = None,
    store: str | None = None,
    tokens: Path | None = None,
    device: Device = "auto",
    dtype: str = "float32",
    batch: int = 8,
    detector_weights: Path | None = None,
    max_film_s: float = 600.0,
    max_upload_mib: int = 512,
    webhooks: bool = False,
    set: Annotated[tuple[str, ...], tyro.conf.arg(metavar="KEY=VALUE")] = (),
) -> None:
    """Serve generation over HTTP, with a page, until Ctrl-C. Ray Serve runs it, here or on the cluster of RAY_ADDRESS.

    Jobs, their finished windows and films are kept in the storage: a server that starts again goes on with them.

    Args:
        port: TCP port.
        host: address to listen at. All but this machine's own need tokens.
        weights: pipelines to offer: folders, URLs, Hub ids or toy. Clients ask for them by NAME (default: default).
        storage: folder or URL of everything that the server keeps (default: serve in TCCP_STORAGE, else in ~/.tccp).
        store: job store, sqlite:///PATH or postgresql://...; several machines need PostgreSQL (default: in storage).
        tokens: JSON file of an object, token to owner. Without it, only this machine's own address is served; for other
            addresses a token is made, shown, and kept in the storage.
        device: where networks run; auto uses a GPU if there is one.
        dtype: float32, bfloat16 or float16, for the networks.
        batch: the most windows that share an evaluation; with 1, films equal those of `tccp generate` to the bit.
        detector_weights: file or folder of the face detector's weights.
        max_film_s: longest sound of a job, in seconds.
        max_upload_mib: most MiB of a request.
        webhooks: allow clients to name an address that is called when their job ends.
        set: other settings of the server (`tccp.serving.server_settings`).
    """
    check_device(device)
    from tccp.serving.server_settings import ServerSettings

    given = {
        "storage": storage or "",
        "store": store,
        "weights": _named(weights),
        "device": device,
        "dtype": dtype,
        "batch": batch,
        "detector_weights": None if detector_weights is None else str(detector_weights.absolute()),
        "max_film_s": max_film_s,
        "max_upload_bytes": max_upload_mib << 20,
        "webhooks": webhooks,
        "tokens_file": None if tokens is None else str(tokens.absolute()),
    }
    settings = ServerSettings.given({**given, **dict(_pair(item) for item in set)}).pinned()
    if settings.tokens_file is None and host not in _LOOPBACK:
        settings = settings.model_copy(update={"tokens_file": str(_new_tokens(settings.storage))})
    run_server(settings, host, port)


def run_server(settings: object, host: str, port: int) -> None:
    """Runs the server until the process is told to end. settings: `ServerSettings`, pinned."""
    from tccp.cluster import ray_cluster

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    note("starting (this takes about half a minute) ...")
    with ray_cluster(extra="serve", worker_logs=False):
        from ray import serve as ray_serve

        from tccp.serving.deployments import app

        ray_serve.start(http_options={"host": host, "port": port})
        try:
            ray_serve.run(app(settings), name="tccp", route_prefix="/")  # type: ignore[arg-type]
            shown = f"[{host}]" if ":" in host else host
            note(f"serving at http://{shown}:{port} (page: /, API: /docs); Ctrl-C ends it")
            stop.wait()
            note("ending: jobs in work are kept, and a server that starts again goes on with them")
        finally:
            ray_serve.shutdown()


def _named(weights: tuple[str, ...]) -> dict[str, str]:
    """Pipelines by name. Raises TccpError for a name that is given twice."""
    named: dict[str, str] = {}
    for item in weights:
        name, equals, place = item.partition("=")
        if not equals or not name.replace("-", "").replace("_", "").isalnum():
            name, place = "default", item
        if name in named:
            raise TccpError(f"--weights names {name} twice: give each pipeline a name of its own, NAME=PIPELINE")
        named[name] = place if is_url(place) or not Path(place).exists() else str(Path(place).absolute())
    return named if "default" in named else {"default": next(iter(named.values())), **named}


def _pair(item: str) -> tuple[str, str]:
    key, equals, value = item.partition("=")
    if not equals:
        raise TccpError(f"--set {item}: give KEY=VALUE")
    return key, value


def _new_tokens(storage: str) -> Path:
    """A file with a token, made once and kept in the storage, readable for its owner only."""
    local = Folder(storage).local
    if local is None:
        raise TccpError("a server at this address needs --tokens FILE: a JSON object, token to owner")
    path = local / "tokens.json"
    if not path.exists():
        local.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json_module.dump({secrets.token_urlsafe(24): "owner"}, file)
    (token, *_) = json_module.loads(path.read_text())
    note(f"the token for this server is {token} (kept in {path})")
    return path
