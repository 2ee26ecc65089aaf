"""Screening of tables of any size on Ray Data: in bounded memory, and resumable after a kill.

Files are divided into fragments. Each worker holds the bundle. It screens a fragment into a Parquet
file with a temporary name, the part, and renames the part when it is complete. A part that exists
is done; a missing one is made again. The options and inputs of the run are recorded beside the
parts, and only a run with the same options can resume.
"""

import glob
import hashlib
import logging
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import torch
from filelock import FileLock, Timeout
from pydantic import BaseModel, ValidationError
from tqdm import tqdm

from models.bundle.load import Bundle, choose, load_bundle
from models.bundle.verify import check_files, read_manifest
from models.detection.screen import Finding
from models.engines.base import DtypeName, EngineName
from models.engines.registry import is_installed
from models.errors import BundleError, DataError, PsimError
from models.offline.io.atomic import write_whole
from models.offline.screening.fragments import (
    COLUMN_PREFIX,
    Fragment,
    fragments_of,
    read,
    schema_of,
)
from models.offline.screening.stream import as_row, screen_texts

RECORD, PARTIAL = "run.json", ".partial"
ROW_GROUP = 2**25
"""Bytes of a part that a worker buffers before it writes them."""
ATTEMPTS = 3
"""Number of workers that may die on a fragment before it is given up."""
OBJECT_STORE, BLOCK = 2**28, 2**20
"""Bytes of Ray's object store and of a block in it. They hold only fragments and outcomes."""
ADDED = pa.schema(
    [
        (COLUMN_PREFIX + "file", pa.string()),
        (COLUMN_PREFIX + "row", pa.int64()),
        # The keys of `as_row`.
        (COLUMN_PREFIX + "confidence", pa.float64()),
        (COLUMN_PREFIX + "score", pa.float64()),
        (COLUMN_PREFIX + "detector", pa.string()),
        (COLUMN_PREFIX + "threshold", pa.float64()),
        (COLUMN_PREFIX + "p_value", pa.float64()),
        (COLUMN_PREFIX + "truncated", pa.bool_()),
        (COLUMN_PREFIX + "predicted", pa.int64()),
        (COLUMN_PREFIX + "predicted_class", pa.string()),
        (COLUMN_PREFIX + "finding", pa.string()),
        (COLUMN_PREFIX + "override", pa.float64()),
        (COLUMN_PREFIX + "override_threshold", pa.float64()),
        (COLUMN_PREFIX + "override_p_value", pa.float64()),
        (COLUMN_PREFIX + "poisoned", pa.bool_()),
        (COLUMN_PREFIX + "error", pa.string()),
    ]
)
"""Columns that a part has after those of the input."""


class BulkOptions(BaseModel):
    """Everything that determines the contents of the parts."""

    schema_version: Literal[2]
    """Of the columns in `ADDED`."""
    bundle: str
    """SHA-256 of the bundle's manifest."""
    engine: EngineName
    dtype: DtypeName
    text_column: str
    part_rows: int
    thorough: bool = False


class BulkInput(BaseModel):
    """An input file, as it was when it was divided into fragments."""

    size: int
    modified: int
    """Modification time in nanoseconds."""
    fragments: list[Fragment]


class RunRecord(BaseModel):
    """The options and inputs of a run, kept in `run.json`."""

    options: BulkOptions
    inputs: dict[str, BulkInput]


@dataclass(frozen=True)
class Job:
    """The part of a run that every worker knows."""

    bundle: Path
    out: Path
    options: BulkOptions


@dataclass(frozen=True)
class Totals:
    """Number of rows in the parts, by result."""

    rows: int
    triggered: int
    unfamiliar: int
    failed: int
    """Rows that could not be screened."""


def screen_files(
    patterns: Sequence[str],
    bundle: Path,
    out: Path,
    *,
    text_column: str = "text",
    part_rows: int = 50_000,
    workers: int | None = None,
    dtype: DtypeName | None = None,
    engine: EngineName | None = None,
    thorough: bool | None = None,
    say: Callable[[str], None] = print,
) -> Totals:
    """Screen files into a folder of Parquet parts; parts of an earlier run are kept.

    Args:
        patterns: files and glob patterns.
        bundle: folder of the bundle. Bundle, files and parts have the same paths on every machine.
        out: folder of the parts.
        text_column: column of the texts.
        part_rows: rows of a part; the last part of a file may have fewer.
        workers: number of workers; by default one per GPU or, without GPUs, one per processor.
        dtype, engine, thorough: see `load_bundle` and `judge_texts`.
        say: called with a message for each file or fragment that cannot be read.

    Raises:
        DataError: a file cannot be read, or `out` holds the results of another run.
        BundleError: the bundle does not match its manifest.
    """
    if not is_installed("ray"):
        raise DataError("Ray is not installed: pip install 'psim-gateway[ray]'")
    options = _resolve_options(bundle, engine, dtype, text_column, part_rows, thorough)
    job = Job(bundle.resolve(), out.resolve(), options)
    files = _find_files(patterns, job.out)
    with _locked(job.out):
        inputs = _divide(files, job, say)
        fragments = [fragment for known in inputs.values() for fragment in known.fragments]
        _write_missing_parts(job, fragments, workers, say)
        _check_unchanged(inputs, job.out)
        return _count(fragments, job.out)


def _resolve_options(
    bundle: Path,
    engine: EngineName | None,
    dtype: DtypeName | None,
    text_column: str,
    part_rows: int,
    thorough: bool | None,
) -> BulkOptions:
    """Check the bundle's files and return the options of the run, without defaults left open."""
    manifest, digest = read_manifest(bundle)
    check_files(bundle, manifest)
    engine, dtype = choose(manifest, engine, dtype).runtime
    return BulkOptions(
        schema_version=2,
        bundle=digest,
        engine=engine,
        dtype=dtype,
        text_column=text_column,
        part_rows=part_rows,
        thorough=manifest.tests_all_texts(thorough),
    )


def _find_files(patterns: Sequence[str], out: Path) -> list[Path]:
    """Return the files that match, each once and sorted, without those in `out`."""
    found: set[Path] = set()
    for pattern in patterns:
        # `Path.glob` does not take absolute patterns.
        names = [pattern] if Path(pattern).exists() else glob.glob(pattern, recursive=True)  # noqa: PTH207
        files = {Path(name).resolve() for name in names if Path(name).is_file()}
        if not files:
            raise DataError(f"{pattern}: there is no such file")
        found |= {file for file in files if not file.is_relative_to(out)}
    return sorted(found)


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Keep other commands out of a folder, which is made if it is not there."""
    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise DataError(f"another command is at work on {out}") from error


def _divide(files: Sequence[Path], job: Job, say: Callable[[str], None]) -> dict[str, BulkInput]:
    """Divide files into fragments, except those recorded by an earlier run, and record them all.

    Raises:
        DataError: a file cannot be read, or `out` has parts of files that changed or are not given.
    """
    recorded = _load_inputs(job)
    inputs: dict[str, BulkInput] = {}
    broken = 0
    for file in tqdm(files, desc="divide", unit=" files", leave=False, disable=None):
        known = recorded.get(str(file))
        if known is None or not _is_unchanged(file, known):
            if _parts_of(file, job.out):
                raise DataError(
                    f"{file} was changed since it was screened; {_how_to_redo(file, job.out)}"
                )
            try:
                known = _divide_file(file, job.options)
            except DataError as error:
                say(str(error))
                broken += 1
                continue
        inputs[str(file)] = known
    if broken:
        raise DataError(f"{broken} of {len(files)} files cannot be read; mend or leave them out")
    for name in recorded.keys() - inputs.keys():
        if _parts_of(Path(name), job.out):
            raise DataError(f"{job.out} has parts of {name}, which is not asked for any more")
    record = RunRecord(options=job.options, inputs=inputs)
    write_whole(job.out / RECORD, record.model_dump_json())
    return inputs


def _divide_file(file: Path, options: BulkOptions) -> BulkInput:
    status = file.stat()  # before reading, so that no change goes unnoticed
    return BulkInput(
        size=status.st_size,
        modified=status.st_mtime_ns,
        fragments=fragments_of(file, options.text_column, options.part_rows),
    )


def _load_inputs(job: Job) -> dict[str, BulkInput]:
    """Return the inputs of earlier runs, which must have had the same options."""
    out = job.out
    try:
        record = RunRecord.model_validate_json((out / RECORD).read_bytes())
    except FileNotFoundError as error:
        if any(out.glob("*.parquet")):
            raise DataError(
                f"{out} has Parquet files but no {RECORD}; choose another --out"
            ) from error
        return {}
    except ValidationError as error:
        raise DataError(f"{out / RECORD} is not of this version; choose another --out") from error
    then, now = dict(record.options), dict(job.options)
    if differing := [
        f"{key} was {then[key]}, is {now[key]}" for key in now if then[key] != now[key]
    ]:
        raise DataError(f"{out} is of another run: {'; '.join(differing)}; choose another --out")
    return record.inputs


def _check_unchanged(inputs: Mapping[str, BulkInput], out: Path) -> None:
    """Raise `DataError` if a file has changed since it was divided."""
    for name, known in inputs.items():
        if not _is_unchanged(Path(name), known):
            raise DataError(f"{name} was changed meanwhile; {_how_to_redo(Path(name), out)}")


def _is_unchanged(file: Path, known: BulkInput) -> bool:
    status = file.stat()
    return (status.st_size, status.st_mtime_ns) == (known.size, known.modified)


def _part_prefix(file: Path) -> str:
    """Return the prefix of the names of a file's parts; the hash tells apart files of one name."""
    return f"{file.stem[:100]}-{hashlib.sha256(os.fsencode(file)).hexdigest()[:8]}-"


def _parts_of(file: Path, out: Path) -> list[Path]:
    return list(out.glob(f"{glob.escape(_part_prefix(file))}*.parquet"))


def _how_to_redo(file: Path, out: Path) -> str:
    return f"delete {out}/{_part_prefix(file)}*.parquet to screen it anew, or choose another --out"


def part_of(fragment: Fragment, out: Path) -> Path:
    """Return the path of a fragment's part."""
    return out / f"{_part_prefix(Path(fragment.file))}{fragment.number:06}.parquet"


class BulkScreener:
    """The screener of one worker.

    Args:
        job: the run; its bundle is loaded on first use.
        processors: number of threads that compute.
    """

    def __init__(self, job: Job, processors: int) -> None:
        self.job, self.processors = job, processors

    @cached_property
    def bundle(self) -> Bundle:
        """The loaded bundle."""
        torch.set_num_threads(self.processors)
        options = self.job.options
        loaded = load_bundle(self.job.bundle, options.dtype, options.engine)
        if loaded.digest != options.bundle:
            raise BundleError(f"{self.job.bundle} was replaced meanwhile")
        return loaded

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Write the part of a fragment and return the outcome.

        The outcome holds the number of rows written, the reason of a failure, and whether the
        failure is fatal, that is, would meet other fragments too. No exception is raised, since
        Ray would log it with all variables.

        Args:
            item: fields of the `Fragment`.
        """
        fragment = Fragment(**item)
        try:
            self.write(fragment)
        except DataError as error:
            return {"rows": 0, "failure": str(error), "fatal": False}
        except (PsimError, OSError) as error:
            return {"rows": 0, "failure": f"{fragment}: {error}", "fatal": True}
        except Exception as error:
            # Without the message, which may quote a text.
            return {"rows": 0, "failure": f"{fragment}: {type(error).__name__}", "fatal": True}
        return {"rows": fragment.rows, "failure": None, "fatal": False}

    def write(self, fragment: Fragment) -> None:
        """Write the part of a fragment, completely or not at all.

        Raises:
            DataError: its file cannot be read, or several workers have died on it.
        """
        part = part_of(fragment, self.job.out)
        # A worker that died left its partial file. One that seems dead may still be writing, so
        # each attempt has a file of its own.
        if len(list(self.job.out.glob(f".{glob.escape(part.name)}.*"))) >= ATTEMPTS:
            raise DataError(f"{fragment}: {ATTEMPTS} workers died of it; is there enough memory?")
        partial = part.with_name(f".{part.name}.{uuid.uuid4().hex}{PARTIAL}")
        try:
            with partial.open("xb") as file:
                schema = pa.schema([*schema_of(fragment), *ADDED])
                with pq.ParquetWriter(file, schema, compression="zstd") as writer:
                    for table in self._row_groups(fragment, schema):
                        writer.write_table(table)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(part)
        finally:
            partial.unlink(missing_ok=True)

    def _row_groups(self, fragment: Fragment, schema: pa.Schema) -> Iterator[pa.Table]:
        tables: list[pa.Table] = []
        row = fragment.row
        for texts, columns in read(fragment, self.job.options.text_column):
            classes = self.bundle.manifest.classes
            rows = [
                {"file": fragment.file, "row": number} | as_row(verdict, classes)
                for number, verdict in enumerate(
                    screen_texts(self.bundle, texts, thorough=self.job.options.thorough), row
                )
            ]
            added = {field.name: _column(rows, field) for field in ADDED}
            tables.append(pa.table(columns | added, schema))
            row += len(rows)
            if sum(table.nbytes for table in tables) > ROW_GROUP:
                yield pa.concat_tables(tables)
                tables = []
        if tables:
            yield pa.concat_tables(tables)


def _column(rows: Sequence[dict[str, Any]], field: pa.Field) -> pa.Array:
    return pa.array([row.get(field.name.removeprefix(COLUMN_PREFIX)) for row in rows], field.type)


def _write_missing_parts(
    job: Job,
    fragments: Sequence[Fragment],
    workers: int | None,
    say: Callable[[str], None],
) -> None:
    """Let Ray's workers write the parts that do not exist yet.

    Raises:
        DataError: Ray gave up, or parts are still missing at the end.
    """
    _remove_partials(job.out)
    missing = [fragment for fragment in fragments if not part_of(fragment, job.out).exists()]
    if not missing:
        return
    total = sum(fragment.rows for fragment in fragments)
    done, failed = total - sum(fragment.rows for fragment in missing), 0
    try:
        with (
            _ray_started() as is_local,
            tqdm(total=total, initial=done, unit=" rows", disable=None) as bar,
        ):
            for outcome in _outcomes(job, missing, workers, is_local):
                if outcome["fatal"]:
                    raise DataError(f"{outcome['failure']}; run the same command again to go on")
                if outcome["failure"]:
                    say(outcome["failure"])
                    failed += 1
                bar.update(outcome["rows"])
    finally:
        _remove_partials(job.out)
    if failed:
        raise DataError(
            f"{failed} parts are missing, the others are there: mend what could not be read, then "
            "run the same command again"
        )


def _remove_partials(out: Path) -> None:
    """Remove the partial files of workers that were killed."""
    for partial in out.glob(f".*{PARTIAL}"):
        partial.unlink()


@contextmanager
def _ray_started() -> Iterator[bool]:
    """Join the cluster named by `RAY_ADDRESS`, or start Ray here; yield whether it is local.

    Raises:
        DataError: Ray gave up.
    """
    # Set before Ray is imported. Its errors reach us as exceptions; its logs stay in its own files.
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_LOG_LEVEL": "CRITICAL"}
    os.environ["RAY_BACKEND_LOG_LEVEL"] = "fatal"
    import ray
    from ray.data import DataContext

    is_local = "RAY_ADDRESS" not in os.environ
    try:
        ray.init(
            "local" if is_local else None,
            object_store_memory=OBJECT_STORE if is_local else None,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.CRITICAL,
        )
        context = DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        context.target_max_block_size = BLOCK
        yield is_local
    except ray.exceptions.RayError as error:
        raise DataError(
            f"Ray gave up: {type(error).__name__}; run the same command again"
        ) from error
    finally:
        ray.shutdown()


def _outcomes(
    job: Job, fragments: Sequence[Fragment], workers: int | None, is_local: bool
) -> Iterator[dict[str, Any]]:
    """Screen fragments on Ray's workers; return the outcomes in any order."""
    import ray
    from ray.data import ActorPoolStrategy, from_items

    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    processors, gpus = int(resources.get("CPU", 1)), int(resources.get("GPU", 0))
    workers = min(workers or gpus or processors, len(fragments))
    # The processors of a cluster are spread over an unknown number of machines.
    threads = max(1, processors // workers) if is_local else 1
    items = from_items(list(map(asdict, fragments)), override_num_blocks=len(fragments))
    outcomes = items.map(
        BulkScreener,  # type: ignore[arg-type]
        fn_constructor_args=(job, threads),
        compute=ActorPoolStrategy(
            min_size=1,
            max_size=workers,
            initial_size=workers,
            max_tasks_in_flight_per_actor=1,
        ),
        num_cpus=threads,
        num_gpus=min(1, gpus) or None,
    )
    return iter(outcomes.iter_rows())


def _count(fragments: Sequence[Fragment], out: Path) -> Totals:
    """Count the rows of the parts.

    Raises:
        DataError: the parts do not hold every row of the fragments.
    """
    parts = [str(part_of(fragment, out)) for fragment in fragments]
    if not parts:
        return Totals(0, 0, 0, 0)
    rows = pads.dataset(parts, schema=ADDED)
    finding = pc.field(COLUMN_PREFIX + "finding")
    found = Totals(
        rows.count_rows(),
        rows.count_rows(filter=finding == Finding.TRIGGERED),
        rows.count_rows(filter=finding == Finding.UNFAMILIAR),
        rows.count_rows(filter=pc.field(COLUMN_PREFIX + "error").is_valid()),
    )
    expected = sum(fragment.rows for fragment in fragments)
    if found.rows != expected:
        raise DataError(f"{out} has {found.rows} of {expected} rows; who else writes to it?")
    return found
