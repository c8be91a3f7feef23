"""Alembic runs this file. `tccp.serving.store.migrating` gives it the connection."""

from alembic import context

from tccp.serving.store.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, render_as_batch=True)
context.run_migrations()
