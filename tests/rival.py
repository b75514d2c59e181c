"""Another writer that is always a moment earlier, for tests of how MLflow looks for a row and then makes it.

with earlier_writer() as kinds: ...   # in this process
earlier_writer().__enter__()          # in a server's, by a `sitecustomize` that keeps what it makes
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

KINDS = frozenset({"SqlDataset", "SqlExperiment", "SqlRegisteredModel", "SqlRegisteredModelAlias"})


@contextlib.contextmanager
def earlier_writer() -> Iterator[set[str]]:
    """Before the first row of each kind is written, write the same row through a separate connection.

    Yields the kinds that were met.
    """
    import sqlalchemy
    from sqlalchemy.orm import Session

    met: set[str] = set()

    def before_flush(session: Session, *_: Any) -> None:
        for row in list(session.new):
            kind = type(row).__name__
            if kind not in KINDS - met:
                continue
            met.add(kind)
            columns = sqlalchemy.inspect(type(row)).column_attrs
            values = {found.columns[0].name: getattr(row, found.key) for found in columns}
            values = {name: value for name, value in values.items() if value is not None}
            if kind == "SqlDataset":  # its key is drawn; what must be there once is its name and digest
                values["dataset_uuid"] = "rival"
            if kind == "SqlExperiment":  # a server derives it from a key that the row has not got yet
                values["artifact_location"] = values.get("artifact_location") or "mlflow-artifacts:/earlier"
            engine = sqlalchemy.create_engine(session.get_bind().url)
            with engine.begin() as connection:
                connection.execute(sqlalchemy.insert(type(row).__table__).values(values))
            engine.dispose()
            print(f"an earlier writer made {kind}", flush=True)

    sqlalchemy.event.listen(Session, "before_flush", before_flush)
    try:
        yield met
    finally:
        sqlalchemy.event.remove(Session, "before_flush", before_flush)
