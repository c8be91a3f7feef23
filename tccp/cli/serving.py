"""The commands serve, submit, watch, fetch and cancel."""

from __future__ import annotations

import json as json_module
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from tccp.cli.options import Device, Json, check_device, emit, note
from tccp.errors import TccpError
from tccp.files import Folder, is_url
from tccp.progress import progress

if TYPE_CHECKING:
    from tccp.serving.client import Client, Video

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
    batch: int | None = None,
    detector_weights: Path | None = None,
    max_film_s: float = 600.0,
    max_upload_mib: int = 512,
    webhooks: bool = False,
    detach: bool = False,
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
        batch: the most windows that share an evaluation; with 1, films equal those of `tccp generate` to the bit
            (default: measured when a stage starts for the first time).
        detector_weights: file or folder of the face detector's weights.
        max_film_s: longest sound of a job, in seconds.
        max_upload_mib: most MiB of a request.
        webhooks: allow clients to name an address that is called when their job ends.
        detach: end once the server is up; it goes on in the cluster of RAY_ADDRESS until `serve shutdown`.
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
        "limits.max_film_s": max_film_s,
        "limits.max_upload_bytes": max_upload_mib << 20,
        "webhooks": webhooks,
        "tokens_file": None if tokens is None else str(tokens.absolute()),
    }
    settings = ServerSettings.given({**given, **dict(_pair(item) for item in set)}).pinned()
    if settings.tokens_file is None and host not in _LOOPBACK:
        settings = settings.model_copy(update={"tokens_file": str(_new_tokens(settings.storage))})
    if detach and not os.environ.get("RAY_ADDRESS"):
        raise TccpError("--detach needs a running cluster: set RAY_ADDRESS, or submit ray_jobs/serve.py as a job")
    from tccp.serving.running import run_server

    note("starting (this takes about half a minute) ...")
    shown = f"[{host}]" if ":" in host else host
    run_server(
        settings,
        host,
        port,
        detach,
        on_ready=lambda: note(f"serving at http://{shown}:{port} (page: /, API: /docs); Ctrl-C ends it"),
        on_end=lambda: note("ending: jobs in work are kept, and a server that starts again goes on with them"),
    )


_Server = Annotated[str, tyro.conf.arg(help="address of the server (default: TCCP_SERVER, else this machine's)")]
_Token = Annotated[str | None, tyro.conf.arg(help="token for the server (default: TCCP_TOKEN)")]


def submit(
    scene: Path,
    audio: Path,
    identity: Path,
    consent: str,
    mask: Path | None = None,
    track: Path | None = None,
    landmarks: Path | None = None,
    box: str | None = None,
    person: tuple[float, float] | None = None,
    identity_box: str | None = None,
    model: str | None = None,
    extend: Literal["no", "freeze", "pingpong"] = "no",
    seed: int = 0,
    steps: int | None = None,
    guidance_scale: float | None = None,
    one_stage: bool = False,
    redraw: bool = False,
    color_match: bool = True,
    lossless: bool = False,
    out: Path | None = None,
    key: str | None = None,
    server: _Server = "",
    token: _Token = None,
    json: Json = False,
) -> None:
    """Send a job to a server, and print its id. With --out, wait for the film and write it.

    Args:
        scene: film of the scene.
        audio: any media file with sound.
        identity: picture or film of the person to generate.
        consent: who agreed that this person's face is generated, or why nobody needs to.
        mask: film that is bright at the head.
        track: JSON track file of head boxes.
        landmarks: landmark file to generate from.
        box: x0,y0,x1,y1 of the head in pixels of the scene.
        person: x y in pixels: of several people, the one to replace.
        identity_box: x0,y0,x1,y1 of the head in the identity picture, or whole.
        model: name of weights that the server offers.
        extend: what to do if the scene is shorter than the sound.
        seed: for all random numbers.
        steps: sampling steps.
        guidance_scale: strength of guidance.
        one_stage: use the one-stage networks.
        redraw: read landmarks from stage 1's pictures and draw them again for stage 2.
        color_match: match the head's colours to the scene.
        lossless: write a lossless film.
        out: wait, and write the film here.
        key: Idempotency-Key: the same key again gives the same job.
    """
    with _client(server, token) as client:
        options: dict[str, Any] = {
            "box": box,
            "person": person,
            "identity_box": identity_box,
            "model": model,
            "extend": extend,
        }
        options |= {"seed": seed, "steps": steps, "guidance_scale": guidance_scale, "one_stage": one_stage}
        options |= {"redraw": redraw, "color_match": color_match, "lossless": lossless}
        video = client.submit(
            scene,
            audio,
            identity,
            consent=consent,
            mask=mask,
            track=track,
            landmarks=landmarks,
            idempotency_key=key,
            **options,
        )
        if out is None:
            emit(json, dict(video.record), video.id)
            return
        note(f"{video.id} is queued")
        _watched(client, video.id)
        client.fetch(video.id, out)
        emit(json, dict(client.get(video.id).record), str(out))


def watch(id: tyro.conf.Positional[str], server: _Server = "", token: _Token = None, json: Json = False) -> None:
    """Show the progress of a job until it ends. Exit code 2 if there is no film then.

    Args:
        id: of the job.
    """
    with _client(server, token) as client:
        video = _watched(client, id)
        emit(json, dict(video.record), f"{video.id} {video.status}")


def fetch(
    id: tyro.conf.Positional[str],
    out: Path,
    variant: Literal["film", "landmarks", "report", "preview"] = "film",
    server: _Server = "",
    token: _Token = None,
) -> None:
    """Write the film of a job, or another file of it.

    Args:
        id: of the job.
        out: file to write.
        variant: film, landmarks, report, or preview (the last frame that was shown).
    """
    with _client(server, token) as client:
        print(client.fetch(id, out, variant))


def cancel(id: tyro.conf.Positional[str], server: _Server = "", token: _Token = None, json: Json = False) -> None:
    """Cancel a job. One that has ended stays as it is.

    Args:
        id: of the job.
    """
    with _client(server, token) as client:
        video = client.cancel(id)
        emit(json, dict(video.record), f"{video.id} {video.status}")


def _client(server: str, token: str | None) -> Client:
    from tccp.serving.client import DEFAULT_SERVER, Client

    return Client(server or os.environ.get("TCCP_SERVER") or DEFAULT_SERVER, token or os.environ.get("TCCP_TOKEN"))


def _watched(client: Client, video_id: str) -> Video:
    """Follows a job to its end. Raises TccpError if it ends without a film."""
    with progress() as tasks:
        task = tasks.add_task("waiting", total=100)
        for video in client.watch(video_id):
            waiting = video.queue_position is not None and video.status == "queued"
            text = f"waiting ({video.queue_position} before it)" if waiting else video.stage or video.status
            tasks.update(task, completed=video.progress, description=text)
    if video.status != "completed":
        reason = (video.error or {}).get("message", "")
        raise TccpError(f"{video_id} is {video.status}" + (f": {reason}" if reason else ""))
    return video


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
