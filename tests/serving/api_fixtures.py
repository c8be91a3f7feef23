"""Fixtures of the tests of the API: `pytest_plugins = ["api_fixtures"]`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from api_server import server_for, serving

from tccp.files import Folder
from tccp.serving.store import JobStore


@pytest.fixture
def server_storage(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "storage")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    opened = JobStore(f"sqlite:///{tmp_path}/jobs.db")
    yield opened
    opened.close()


@pytest.fixture
def url(store: JobStore, server_storage: Folder) -> Iterator[str]:
    """The address of a server without tokens."""
    with serving(server_for(store, server_storage)) as address:
        yield address
