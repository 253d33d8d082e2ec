"""Run by Alembic: applies the revisions within the transaction that :func:`upgrade` began."""

from alembic import context

from flowagent.store.database import VERSION_TABLE
from flowagent.store.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table=VERSION_TABLE,
)
with context.begin_transaction():
    context.run_migrations()
