"""The store's tables, as the newest migration leaves them. Imported only to create or compare a schema.

Times are seconds since the epoch. Columns that hold JSON, and flags, have the types that both databases treat
alike: text and integer.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Column,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    text,
)

metadata = MetaData(
    naming_convention={  # so that later migrations can refer to constraints on both databases
        "pk": "%(table_name)s_pkey",
        "uq": "%(table_name)s_%(column_0_N_name)s_key",
        "fk": "%(table_name)s_%(column_0_N_name)s_fkey",
    }
)

flow = Table(
    "flow",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("current_version_id", Integer),
    Column("created", Double, nullable=False),
)

flow_version = Table(
    "flow_version",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("flow_id", Integer, ForeignKey("flow.id"), nullable=False),
    Column("number", Integer, nullable=False),
    Column("content_hash", Text, nullable=False),
    Column("created", Double, nullable=False),
    Column("spec", Text, nullable=False),
    UniqueConstraint("flow_id", "number"),
    UniqueConstraint("flow_id", "content_hash"),
)

label_set = Table(
    "label_set",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("canon", Text, nullable=False, unique=True),  # sorted JSON of labels and runners
)

run = Table(
    "run",
    metadata,
    Column("id", Text, primary_key=True),
    Column("flow_id", Integer, ForeignKey("flow.id"), nullable=False),
    Column("version_id", Integer, ForeignKey("flow_version.id"), nullable=False),
    Column("label_set_id", Integer, ForeignKey("label_set.id"), nullable=False),
    Column("state", Text, nullable=False),
    Column("reason", Text),
    Column("parameters", Text, nullable=False),
    Column("env", Text, nullable=False),
    Column("due", Double, nullable=False),
    Column("created", Double, nullable=False),
    Column("started", Double),  # of its first attempt that did
    Column("ended", Double),
    Column("attempt", Integer, nullable=False),  # number of the newest
    Column("losses", Integer, nullable=False),  # attempts lost before they started
    Column("retries_left", Integer, nullable=False),
    Column("retry_delay", Double, nullable=False),
    Column("retry_of", Text),
    Column("idempotency_key", Text, unique=True),
)
SCHEDULED = text("state = 'scheduled'")
Index(
    "run_due",
    run.c.label_set_id,
    run.c.due,
    run.c.id,
    sqlite_where=SCHEDULED,
    postgresql_where=SCHEDULED,
)
Index("run_created", run.c.created, run.c.id)
Index("run_flow_created", run.c.flow_id, run.c.created, run.c.id)
Index("run_state_created", run.c.state, run.c.created, run.c.id)

attempt = Table(
    "attempt",
    metadata,
    Column("run_id", Text, ForeignKey("run.id", ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True),  # the fencing token
    Column("state", Text, nullable=False),
    Column("reason", Text),
    Column("agent", Text, nullable=False),
    Column("lease_expires", Double, nullable=False),
    Column("claimed", Double, nullable=False),
    Column("started", Double),
    Column("ended", Double),
    Column("exit_code", Integer),
    Column("signal", Integer),
    Column("peak_memory", BigInteger),
    Column("cpu_time", Double),
    Column("revision", Text),
    Column("sandbox", Text),
)
LIVE = text("state IN ('pending', 'running', 'cancelling')")
Index(
    "attempt_live",
    attempt.c.agent,
    attempt.c.lease_expires,
    sqlite_where=LIVE,
    postgresql_where=LIVE,
)

output = Table(
    "output",
    metadata,
    Column("run_id", Text, primary_key=True),
    Column("attempt", Integer, primary_key=True),
    Column("start", BigInteger, primary_key=True),
    Column("stop", BigInteger, nullable=False),
    Column("data", LargeBinary, nullable=False),
    ForeignKeyConstraint(["run_id", "attempt"], ["attempt.run_id", "attempt.number"], ondelete="CASCADE"),
)

task_run = Table(
    "task_run",
    metadata,
    Column("run_id", Text, primary_key=True),
    Column("attempt", Integer, primary_key=True),
    Column("task", Text, primary_key=True),
    Column("state", Text, nullable=False),
    Column("reason", Text),
    Column("tries", Integer, nullable=False),
    Column("started", Double),
    Column("ended", Double),
    Column("result", Text),
    ForeignKeyConstraint(["run_id", "attempt"], ["attempt.run_id", "attempt.number"], ondelete="CASCADE"),
)

agent = Table(
    "agent",
    metadata,
    Column("name", Text, primary_key=True),
    Column("instance", Text, nullable=False),
    Column("host", Text, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("labels", Text, nullable=False),
    Column("runner", Text, nullable=False),
    Column("capacity", Integer, nullable=False),
    Column("version", Text, nullable=False),
    Column("require_labels", Integer, nullable=False),
    Column("started", Double, nullable=False),
    Column("seen", Double, nullable=False),
    Column("stopping", Integer, nullable=False),  # or why else it claims nothing: see rows.agent
)
