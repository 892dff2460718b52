"""Runs as one Parquet file: a row a run, with columns that pandas, polars or DuckDB can ask about.

The columns are the fields of `RunRecord` and `RunSpec` by their names, and validation_loss: text, numbers and truth
values as such, ``measures`` as a map, ``curve`` as a list of structs, and settings and schedules as JSON. A field that
a file is older than has its default. What belongs to the study and not to a run (its settings, environments, trials,
failures) is JSON in the file's metadata under the key "normopt". Pages and metadata have checksums.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any, get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.study.record import Point, RunRecord
from benchmarks.study.spec import RunSpec

KEY, SUM = b"normopt", b"normopt-sha256"
AT_ONCE = 500  # runs; a hundred times that takes a gigabyte

_PLAIN: dict[Any, pa.DataType] = {
    str: pa.string(),
    int: pa.int64(),
    bool: pa.bool_(),
    float: pa.float64(),
    float | None: pa.float64(),
}


def _types(model: type[object]) -> dict[str, pa.DataType]:
    """The fields that columns hold as they are."""
    return {name: _PLAIN[kind] for name, kind in get_type_hints(model).items() if kind in _PLAIN}


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
    text = json.dumps(others)
    schema = pa.schema(_COLUMNS.items(), metadata={KEY: text, SUM: _sum(text.encode())})
    with pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True) as writer:
        rows = map(_row, records)
        while chunk := [*islice(rows, AT_ONCE)]:
            writer.write_table(pa.Table.from_pylist(chunk, schema=schema))


def read(path: Path) -> tuple[dict[str, Any], Iterator[dict[str, Any]]]:
    """Return the metadata of a study that `write` stored, and an iterator that reads its runs lazily.

    Raises:
        NoRuns: it is no file that `write` wrote.
        OSError: it cannot be read, or is damaged; among the runs too.
    """
    with _damage():
        file = pq.ParquetFile(path, page_checksum_verification=True)
    metadata = file.schema_arrow.metadata or {}
    if KEY not in metadata or _NEEDED - set(file.schema_arrow.names):
        raise NoRuns("this Parquet file holds no runs: it is none that `python -m benchmarks` wrote")
    if metadata.get(SUM, b"") not in (b"", _sum(metadata[KEY])):
        raise OSError("this Parquet file is damaged: the checksum of what it says of the study is another")
    return json.loads(metadata[KEY]), _runs(file)


def _runs(file: pq.ParquetFile) -> Iterator[dict[str, Any]]:
    with file, _damage():
        for batch in file.iter_batches(AT_ONCE, use_threads=False):
            others = [name for name in batch.schema.names if name != "curve"]
            rows = batch.select(others).to_pylist(maps_as_pydicts="strict")
            yield from map(_record, rows, _curves(batch.column("curve")))


def _curves(column: pa.ListArray) -> Iterator[list[Point]]:
    """The curves of some runs; Arrow's own lists of dicts take four times as long."""
    points = column.flatten()
    names = [field.name for field in points.type]
    values = zip(*(points.field(name).to_pylist() for name in names), strict=True)
    made = (Point(**dict(zip(names, of, strict=True))) for of in values)
    return ([*islice(made, n)] for n in column.value_lengths().to_pylist())


@contextlib.contextmanager
def _damage() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, ValueError, TypeError) as error:
        raise OSError(f"this is no Parquet file, or a damaged one: {str(error).splitlines()[0]}") from None


def _sum(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest().encode()


def _row(record: RunRecord) -> dict[str, Any]:
    spec = record.spec.model_dump()
    told = {name: value if name in _AS_IT_IS or value is None else json.dumps(value) for name, value in spec.items()}
    # Derived, for people: a curve is awkward to ask.
    loss = None if math.isinf(record.last_loss) else record.last_loss
    return record.model_dump(exclude={"spec"}) | told | {"validation_loss": loss}


def _record(row: dict[str, Any], curve: list[Point]) -> dict[str, Any]:
    del row["validation_loss"]
    spec = {name: row.pop(name) for name in RunSpec.model_fields if name in row}
    return row | {
        "curve": curve,
        "spec": {n: v if n in _AS_IT_IS or v is None else json.loads(v) for n, v in spec.items()},
    }
