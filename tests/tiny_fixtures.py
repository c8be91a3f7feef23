"""Fixtures of the tests of generation, made once for all of them: `pytest_plugins = ["tiny_fixtures"]`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny

from tccp.inference.pipeline_folder import write_untrained
from tccp.media.sandbox import Decoder
from tccp.roundtable import write_clips


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All six variants, untrained."""
    folder = tmp_path_factory.mktemp("tiny") / "weights"
    write_untrained(folder, tiny.SETTINGS)
    return folder


@pytest.fixture(scope="session")
def decoder() -> Iterator[Decoder]:
    with Decoder() as opened:
        yield opened


@pytest.fixture(scope="session")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """25 frames of RoundTable with sound, lossless, with truth and identity picture beside them."""
    folder = tmp_path_factory.mktemp("film")
    (path,) = write_clips(folder, 1, 1.0, seed=4, width=128, height=96, lossless=True)
    return path
