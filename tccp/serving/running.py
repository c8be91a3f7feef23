"""Runs the server on Ray Serve until the process is told to end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable

from tccp.cluster import ray_cluster
from tccp.errors import TccpError
from tccp.serving.server_settings import ServerSettings

NAME = "tccp"
"""Of the application."""


def run_server(
    settings: ServerSettings,
    host: str,
    port: int,
    detach: bool,
    on_ready: Callable[[], object],
    on_end: Callable[[], object],
) -> None:
    """Serves on the cluster of RAY_ADDRESS, else on a new Ray of this machine, until SIGINT or SIGTERM.

    settings: pinned. detach: return once the server is up, and leave it to the cluster. on_ready: called when it is up.
    on_end: called when it is told to end. Raises TccpError if it does not start.
    """
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with ray_cluster(extra="serve", worker_logs=False):
        from ray import serve

        from tccp.serving.deployments import app

        serve.start(http_options={"host": host, "port": port})
        try:
            try:
                serve.run(app(settings), name=NAME, route_prefix="/", logging_config={"encoding": "JSON"})
            except RuntimeError as error:
                raise TccpError(f"the server did not start: {' '.join(str(error).split())[:300]}") from None
            on_ready()
            if not detach:
                stop.wait()
                on_end()
        finally:
            if not detach:
                serve.shutdown()
