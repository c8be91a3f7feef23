"""The number of threads, decided in one place."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tccp.errors import TccpError
from tccp.threads import arithmetic_threads, num_threads, usable_cores


def test_parts_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = len(os.sched_getaffinity(0))
    assert 1 <= usable_cores() <= cores
    assert num_threads() == usable_cores()
    assert num_threads(2) == max(1, usable_cores() // 2)
    assert num_threads(1000) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert num_threads() == 1
    monkeypatch.setenv("TCCP_THREADS", "3")
    assert num_threads(2) == 3
    for wrong in ("0", "-1", "many", "1.5"):
        monkeypatch.setenv("TCCP_THREADS", wrong)
        with pytest.raises(TccpError, match=f"TCCP_THREADS={wrong}: give a whole number of threads, at least 1"):
            num_threads()


def test_the_setting_ends_with_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TCCP_THREADS", "3")
    before = torch.get_num_threads()
    with arithmetic_threads() as threads:
        assert torch.get_num_threads() == threads == 3
    assert torch.get_num_threads() == before


def test_threads_sleep_while_they_wait_unless_the_user_says_otherwise() -> None:
    code = "import os, tccp; print(os.environ['OMP_WAIT_POLICY'])"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    for given, expected in (({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")):
        run = subprocess.run(
            [sys.executable, "-c", code], env=environment | given, capture_output=True, text=True, check=True
        )
        assert run.stdout.strip() == expected
