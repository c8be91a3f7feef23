"""The HTTP API of the server: it takes requests for videos and hands out results. It decodes no media.

Work on videos is done by whoever claims them from the job store (`tccp.serving.conductor`).
"""

from tccp.serving.api.app import create_app
from tccp.serving.api.server import Server, ServerLimits

__all__ = ["Server", "ServerLimits", "create_app"]
