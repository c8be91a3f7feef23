"""How the errors of a job's tasks reach the conductor, which decides by their kind whether the job goes on."""

from __future__ import annotations

import asyncio

import pytest

from tccp.errors import StorageError, TccpError
from tccp.serving.conductor import _group
from tccp.serving.work import JobLost


@pytest.mark.parametrize("kind", [TccpError, StorageError, JobLost, ConnectionError])
def test_the_first_error_of_nested_tasks_is_raised_as_itself(kind: type[Exception]) -> None:
    """In an exception group, a mistake of the user would count as a failed attempt."""

    async def fails() -> None:
        raise kind("no head")

    async def nested() -> None:
        async with _group() as group:
            group.create_task(fails())
            group.create_task(asyncio.sleep(60))

    async def run() -> None:
        async with _group() as group:
            group.create_task(nested())

    with pytest.raises(kind, match="no head"):
        asyncio.run(run())


def test_cancelling_a_group_is_no_error_of_its_tasks() -> None:
    async def run() -> None:
        async with _group() as group:
            group.create_task(asyncio.sleep(60))

    async def cancelled() -> None:
        task = asyncio.create_task(run())
        await asyncio.sleep(0)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(cancelled())
