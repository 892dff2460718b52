"""Runs as one Parquet file: a row a run, with columns that pandas, polars or DuckDB can ask about.

The columns are the fields of `RunRecord` and `RunSpec` by their names, and validation_loss: text, numbers and truth
values as such, ``measures`` as a map, ``curve`` as a list of structs, and settings and schedules as JSON. A field that
a file is older than has its default. What belongs to the study and not to a run (its settings, environments, trials,
failures) is JSON in the file's metadata under the key "normopt". Pages and metadata have checksums.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

from benchmarks.study.record import Point, RunRecord
from benchmarks.study.spec import RunSpec

KEY, SUM = b"normopt", b"normopt-sha256"
KINDS = {"environments": "environment", "trials": "trial", "failures": "failure"}

_PLAIN: dict[Any, pa.DataType] = {
    str: pa.string(),
    int: pa.int64(),
    bool: pa.bool_(),
    float: pa.float64(),
    float | None: pa.float64(),
}


def _types(model: type[BaseModel]) -> dict[str, pa.DataType]:
    """The fields that columns hold as they are."""
    return {name: _PLAIN[kind] for name, field in model.model_fields.items() if (kind := field.annotation) in _PLAIN}


_AS_IT_IS = _types(RunSpec)
_COLUMNS = {
    **_types(RunRecord),
    **dict.fromkeys(RunSpec.model_fields, pa.string()),
    **_AS_IT_IS,
    "validation_loss": pa.float64(),
    "measures": pa.map_(pa.string(), pa.float64()),
    "curve": pa.list_(pa.struct(_types(Point).items())),
}
_NEEDED = {n for model in (RunRecord, RunSpec) for n, f in model.model_fields.items() if f.is_required()} - {"spec"}


class NoRuns(ValueError):
    """A Parquet file that holds no runs."""


def write(file: IO[bytes], records: Iterable[RunRecord], others: dict[str, Any]) -> None:
    """Write runs, and what belongs to their study: under "study", "environments", "trials" and "failures"."""
    table = pa.Table.from_pylist([_row(record) for record in records], schema=pa.schema(_COLUMNS.items()))
    text = json.dumps(others)
    table = table.replace_schema_metadata({KEY: text, SUM: _sum(text.encode())})
    pq.write_table(table, file, compression="zstd", write_page_checksum=True)


def read(path: Path) -> Iterator[dict[str, Any]]:
    """What the file holds, as the lines of a store would have it.

    Raises:
        NoRuns: it is no file that `write` wrote.
        OSError: it cannot be read, or is damaged.
    """
    try:
        table = pq.read_table(path, page_checksum_verification=True)
        rows = table.to_pylist(maps_as_pydicts="strict")
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise OSError(f"this is no Parquet file, or a damaged one: {str(error).splitlines()[0]}") from None
    metadata = table.schema.metadata or {}
    if KEY not in metadata or _NEEDED - set(table.schema.names):
        raise NoRuns("this Parquet file holds no runs: it is none that `python -m benchmarks` wrote")
    if metadata.get(SUM, b"") not in (b"", _sum(metadata[KEY])):
        raise OSError("this Parquet file is damaged: the checksum of what it says of the study is another")
    others = json.loads(metadata[KEY])
    if others["study"] is not None:
        yield {"study": others["study"]}
    for plural, kind in KINDS.items():
        yield from ({kind: content} for content in others[plural])
    yield from ({"run": _record(row)} for row in rows)


def _sum(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest().encode()


def _row(record: RunRecord) -> dict[str, Any]:
    spec = record.spec.model_dump()
    told = {name: value if name in _AS_IT_IS or value is None else json.dumps(value) for name, value in spec.items()}
    # Derived, for people: a curve is awkward to ask.
    loss = None if math.isinf(record.last_loss) else record.last_loss
    return record.model_dump(exclude={"spec"}) | told | {"validation_loss": loss}


def _record(row: dict[str, Any]) -> dict[str, Any]:
    del row["validation_loss"]
    spec = {name: row.pop(name) for name in RunSpec.model_fields if name in row}
    return row | {"spec": {n: v if n in _AS_IT_IS or v is None else json.loads(v) for n, v in spec.items()}}
