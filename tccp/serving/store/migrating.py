"""Brings a database to the newest version of the tables with Alembic."""

from __future__ import annotations

import threading
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine

from tccp.errors import TccpError

_FOLDER = Path(__file__).parent / "migrations"
_LOCK = 0x7CC9
_one_at_a_time = threading.Lock()  # Alembic keeps the migration at work in a global variable


def migrate(engine: Engine) -> None:
    """Creates the tables, or applies the steps that are missing. Several processes may call it at once.

    Raises TccpError for a database that a newer version of TCCP has written.
    """
    config = Config()
    config.set_main_option("script_location", str(_FOLDER))
    script = ScriptDirectory.from_config(config)
    with _one_at_a_time, engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
        version = version_of(connection)
        if version == script.get_current_head():
            return
        if version is not None and version not in {one.revision for one in script.walk_revisions()}:
            raise TccpError(
                f"the job store has tables of version {version}, which this version of TCCP does not know: update TCCP"
            )
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def version_of(connection: Connection) -> str | None:
    """The version of the tables; None if there are none."""
    return MigrationContext.configure(connection).get_current_revision()
