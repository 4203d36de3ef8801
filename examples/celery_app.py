"""Celery: a tag per task name, by its signals; safe with the prefork pool.

    celery -A celery_app worker --concurrency 2

The engine is made when the module is imported, in the parent. A child of the fork
starts with an empty pool by itself: no signal handler, no ``dispose()``.
"""

from __future__ import annotations

import os

from celery import Celery
from celery.signals import task_postrun, task_prerun
from sqlalchemy import create_engine, text

from sqla_fairpool import FairQueuePool, set_tag

app = Celery("celery_app", broker=os.environ.get("CELERY_BROKER", "memory://"))
app.config_from_object(
    {
        "result_backend": os.environ.get("CELERY_RESULTS", "cache+memory://"),
        "broker_transport_options": {
            "data_folder_in": os.environ.get("CELERY_FOLDER", "."),
            "data_folder_out": os.environ.get("CELERY_FOLDER", "."),
        },
        "task_default_queue": "fair",
    }
)
engine = create_engine(
    os.environ.get("DATABASE_URL", "sqlite:///celery.db"), poolclass=FairQueuePool
)


@task_prerun.connect
def begin(task, **_):
    set_tag(task.name)


@task_postrun.connect
def end(**_):
    set_tag(None)


def holders() -> dict[str, int]:
    """Return how many connections each tag holds in this process."""
    rows = engine.pool.stats().tags
    return {row.name: row.connections for row in rows if row.connections}


def look() -> dict[str, object]:
    """Use the database; say from which process and under which tag."""
    with engine.connect() as connection:
        connection.execute(text("select 1"))
        return {"process": os.getpid(), "holders": holders()}


@app.task(name="orders")
def orders():
    return look()


@app.task(name="reports")
def reports():
    return look()


# The parent uses the database before it forks, as an application does that reads
# its settings from there; its connection stays its own.
with engine.connect() as connection:
    connection.execute(text("select 1"))
