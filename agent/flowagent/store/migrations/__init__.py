"""Creates and upgrades the schema. Imported, with SQLAlchemy and Alembic, only when that is due."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool


def upgrade(url: str, connect: Callable[[], Any], lock: str) -> None:
    """Bring a database to the newest revision, in one transaction.

    ``url`` names the dialect and driver, ``connect`` gives a DBAPI connection. ``lock`` is the statement that
    keeps other processes out until the end of the transaction: whoever comes second finds nothing to do.
    """
    engine = create_engine(url, creator=connect, poolclass=NullPool)
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    with engine.begin() as connection:
        connection.exec_driver_sql(lock)
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
