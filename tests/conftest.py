"""What every test stands on: checked shapes, one thread, a storage of its own, the shared clips, the closing count."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

# Before numpy, torch or cv2 are imported: with one thread the order of sums, so every bit of a result, is fixed.
for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OPENCV_FOR_THREADS_NUM"):
    os.environ[_variable] = "1"

# Processes keep compiled modules even where the environment asks them not to. Compiling them costs 13 CPU seconds per
# test process and a second per command.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import cv2  # noqa: F401 - before decord (0.6.0), whose zlib breaks OpenCV's reading of PNG in the same process
import hypothesis
import jaxtyping
import pytest

CHECKED_CALLS = 20
"""Calls of a function, in each test, at which its annotations are checked. Further calls are of the same kind: networks
and decoders are called thousands of times, and a check takes up to a millisecond."""
_checked = jaxtyping.jaxtyped
_test = 0  # number of the running test


def _is_recorded() -> bool:
    """Whether torch records this call (`tccp.models.traced`). Then sizes are tensors."""
    return "torch" in sys.modules and sys.modules["torch"].jit.is_tracing()


def _checked_at_first(*, typechecker: Any) -> Any:
    """Checks a function's first calls. Functions within functions are made at every call, so they are not checked."""
    check = _checked(typechecker=typechecker)

    def decorate(one: Any) -> Any:
        if "<locals>" in one.__qualname__:
            return one
        checked = check(one)
        if isinstance(one, type):
            return checked
        calls, test = 0, 0

        @functools.wraps(one)
        def called(*arguments: Any, **options: Any) -> Any:
            nonlocal calls, test
            calls, test = (calls + 1 if test == _test else 1), _test
            return (checked if calls <= CHECKED_CALLS and not _is_recorded() else one)(*arguments, **options)

        return called

    return decorate


jaxtyping.jaxtyped = _checked_at_first  # the import hook puts it on every function and class

# Before any of them is imported: annotations, array shapes among them, are checked in the fast tests.
jaxtyping.install_import_hook(["tccp", "preprocessing", "ray_jobs"], "beartype.beartype")

# No deadline: two tests share two cores. In CI hypothesis itself draws the same examples every time.
hypothesis.settings.register_profile("tccp", deadline=None)
hypothesis.settings.load_profile("tccp")

ROOT = Path(__file__).resolve().parent.parent
CLIPS_FIXTURES = {"shared", "shared_clips", "shared_weights"}


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared clips and weights, which is no part of the project."""
    folder = Path(os.environ.get("TCCP_SHARED") or ROOT.parent / "shared").resolve()
    if not folder.is_dir():
        pytest.skip(f"no shared folder at {folder}: set TCCP_SHARED")
    return folder


def _subfolder(shared: Path, name: str) -> Path:
    folder = shared / name
    if not folder.is_dir():
        pytest.skip(f"the shared folder has no {name}/")
    return folder


@pytest.fixture(scope="session")
def shared_clips(shared: Path) -> Path:
    return _subfolder(shared, "clips")


@pytest.fixture(scope="session")
def shared_faults(shared: Path) -> Path:
    return _subfolder(shared, "faults")


@pytest.fixture(scope="session")
def shared_weights(shared: Path) -> Path:
    return _subfolder(shared, "weights")


@pytest.fixture(scope="session", autouse=True)
def _no_storage_at_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test writes to the user's own storage, not even one that forgot to ask for `storage`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TCCP_STORAGE", str(tmp_path_factory.mktemp("storage")))
        yield


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty storage of the test's own, also for the commands that it starts (TCCP_STORAGE)."""
    folder = tmp_path / "storage"
    folder.mkdir()
    monkeypatch.setenv("TCCP_STORAGE", str(folder))
    return folder


@pytest.fixture(scope="session")
def training_data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """`trainings.make_data`, once for all files. Tests only read it."""
    import trainings

    return trainings.make_data(tmp_path_factory.mktemp("training_data"))


@pytest.fixture
def ray_with_two_cpus() -> Any:
    """Ray with two logical CPUs in this process. Tests share it, because starting it costs 10 CPU seconds."""
    import ray

    from tccp.processes import importable_in_children

    if not ray.is_initialized():
        importable_in_children()
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # its default is deprecated, and says so
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    return ray


def _skip_marker(item: pytest.Item) -> pytest.MarkDecorator | None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            return pytest.mark.skip(reason="no CUDA device")
    if item.get_closest_marker("cluster") and importlib.util.find_spec("ray") is None:
        return pytest.mark.skip(reason="Ray is not installed: pip install -c constraints.txt -e '.[train,serve]'")
    return None


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Generator[None, None, None]:
    for item in items:
        if CLIPS_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.clips)
        if skip := _skip_marker(item):
            item.add_marker(skip)
    yield
    if hasattr(config, "workerinput"):
        items[:] = slow_files_first(items, config.workerinput["workercount"])


def slow_files_first(items: list[pytest.Item], workers: int) -> list[pytest.Item]:
    """The tests in an order for so many workers and `--dist worksteal`, file by file.

    Each worker starts with an equal share, in order, and steals from the end of another share when it is done. So the
    first share starts with the files that start Ray, the other shares with the other files that have slow tests, and
    all end with fast tests. Files stay whole: a module's fixtures are made once.
    """
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    shares: list[list[pytest.Item]] = [[] for _ in range(workers)]
    others = shares[1:] or shares
    fast = []
    for tests in files.values():
        slow = [item for item in tests if item.get_closest_marker("slow")]
        if any(item.get_closest_marker("cluster") for item in slow):
            shares[0] += tests
        elif slow:
            min(others, key=lambda share: sum(1 for item in share if item.get_closest_marker("slow"))).extend(tests)
        else:
            fast.append(tests)
    for share in shares[:-1]:
        while fast and len(share) < len(items) // workers:
            share += fast.pop(0)
    return [item for share in shares for item in share] + [item for tests in fast for item in tests]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Slow tests repeat the calls of fast ones, so nothing is checked in them."""
    global _test
    _test += 1
    jaxtyping.config.update("jaxtyping_disable", item.get_closest_marker("slow") is not None)
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where clips are required (CI with the shared folder beside it), a clip test that was skipped has failed."""
    report = yield
    required = os.environ.get("TCCP_REQUIRE_CLIPS") and item.get_closest_marker("clips")
    if required and report.skipped and not hasattr(report, "wasxfail"):
        why = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"skipped although the shared folder is there (TCCP_REQUIRE_CLIPS): {why}"
    return report


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """The last line, in the one form that people and CI read: what passed, failed and was skipped."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or hasattr(config, "workerinput") or config.option.collectonly:
        return

    def count(*outcomes: str) -> int:
        return sum(len(reporter.stats.get(outcome, ())) for outcome in outcomes)

    print(f"{count('passed')} passed, {count('failed', 'error')} failed, {count('skipped', 'xfailed')} skipped")
