"""Runs as one Parquet file: a row a run, with columns that pandas, polars or DuckDB can ask about.

| column | type |
|---|---|
| id, task, optimizer | string |
| settings, p_schedule, lr_schedule | string: JSON; files from before it existed have no lr_schedule |
| seed, epochs, batch_size, state_bytes | int64 |
| diverged | bool |
| validation_loss, test_loss, test_score, ms_per_step, seconds | double |
| measures | map of string to double |
| curve | list of structs: steps, train_loss, validation_loss, score, p |

What belongs to the study and not to a run (its settings, environments, trials, failures) is JSON in the file's metadata
under the key "normopt".
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.study.record import RunRecord

KEY = b"normopt"
KINDS = {"environments": "environment", "trials": "trial", "failures": "failure"}

_POINT = pa.struct(
    [
        ("steps", pa.int64()),
        ("train_loss", pa.float64()),
        ("validation_loss", pa.float64()),
        ("score", pa.float64()),
        ("p", pa.float64()),
    ]
)
_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("task", pa.string()),
        ("optimizer", pa.string()),
        ("settings", pa.string()),
        ("p_schedule", pa.string()),
        ("lr_schedule", pa.string()),
        ("seed", pa.int64()),
        ("epochs", pa.int64()),
        ("batch_size", pa.int64()),
        ("diverged", pa.bool_()),
        ("validation_loss", pa.float64()),
        ("test_loss", pa.float64()),
        ("test_score", pa.float64()),
        ("measures", pa.map_(pa.string(), pa.float64())),
        ("state_bytes", pa.int64()),
        ("ms_per_step", pa.float64()),
        ("seconds", pa.float64()),
        ("curve", pa.list_(_POINT)),
    ]
)


class Unreadable(ValueError):
    """A file that is no store of runs."""


def write(file: IO[bytes], records: Iterable[RunRecord], others: dict[str, Any]) -> None:
    """Write runs, and what belongs to their study: under "study", "environments", "trials" and "failures"."""
    table = pa.Table.from_pylist([_row(record) for record in records], schema=_SCHEMA)
    pq.write_table(table.replace_schema_metadata({KEY: json.dumps(others)}), file, compression="zstd")


def read(path: Path) -> Iterator[dict[str, Any]]:
    """What the file holds, as the lines of a store would have it.

    Raises:
        Unreadable: the file is none that `write` wrote.
    """
    try:
        table = pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise Unreadable(f"this is no Parquet file: {error}") from None
    metadata = table.schema.metadata or {}
    if KEY not in metadata or set(_SCHEMA.names) - {"lr_schedule"} - set(table.schema.names):
        raise Unreadable("this Parquet file holds no runs: it is none that `python -m benchmarks` wrote")
    others = json.loads(metadata[KEY])
    if others["study"] is not None:
        yield {"study": others["study"]}
    for plural, kind in KINDS.items():
        yield from ({kind: content} for content in others[plural])
    yield from ({"run": _record(row)} for row in table.to_pylist(maps_as_pydicts="strict"))


def _row(record: RunRecord) -> dict[str, Any]:
    row = record.model_dump(exclude={"spec"}) | record.spec.model_dump()
    row["settings"] = json.dumps(row["settings"])
    row["lr_schedule"] = json.dumps(row["lr_schedule"])
    row["p_schedule"] = None if row["p_schedule"] is None else json.dumps(row["p_schedule"])
    # Derived, for people: a curve is awkward to ask.
    row["validation_loss"] = None if math.isinf(record.last_loss) else record.last_loss
    return row


def _record(row: dict[str, Any]) -> dict[str, Any]:
    spec = {name: row.pop(name) for name in ("task", "optimizer", "seed", "epochs", "batch_size")}
    schedule, lr_schedule = row.pop("p_schedule"), row.pop("lr_schedule", None)
    spec["settings"] = json.loads(row.pop("settings"))
    spec["p_schedule"] = None if schedule is None else json.loads(schedule)
    if lr_schedule is not None:
        spec["lr_schedule"] = json.loads(lr_schedule)
    del row["validation_loss"]
    return row | {"spec": spec}
