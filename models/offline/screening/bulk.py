"""Screening tables of any size on Ray Data: in bounded memory, and gone on with after a kill.

Files are divided into fragments. A worker, which holds the bundle, screens one into a Parquet file
of a temporary name, and renames it when it is whole: a part that is there is done, and one that is
not is made again. What was asked is kept beside the parts, and nothing else is gone on with.
"""

import glob
import hashlib
import logging
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

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
from models.engines.base import DtypeName, EngineName
from models.engines.registry import is_installed
from models.errors import BundleError, DataError, PsimError
from models.offline.io.atomic import write_whole
from models.offline.screening.fragments import OURS, Fragment, fragments_of, read, schema_of
from models.offline.screening.stream import as_row, judged

RECORD, PARTIAL = "run.json", ".partial"
ROW_GROUP = 2**25
"""Bytes of a part that a worker holds before it writes them."""
ATTEMPTS = 3
"""Workers that may die of a fragment before it is left out."""
STORE, BLOCK = 2**28, 2**20
"""Bytes of Ray's object store and of a block in it: fragments, and what became of them."""
ADDED = pa.schema(
    [
        (OURS + "file", pa.string()),
        (OURS + "row", pa.int64()),
        # What `as_row` gives.
        (OURS + "confidence", pa.float64()),
        (OURS + "score", pa.float64()),
        (OURS + "detector", pa.string()),
        (OURS + "threshold", pa.float64()),
        (OURS + "p_value", pa.float64()),
        (OURS + "poisoned", pa.bool_()),
        (OURS + "truncated", pa.bool_()),
        (OURS + "predicted", pa.int64()),
        (OURS + "error", pa.string()),
    ]
)
"""The columns of a part behind those of the input."""


class BulkOptions(BaseModel):
    """What decides what is in the parts."""

    bundle: str
    """Its digest."""
    engine: EngineName
    dtype: DtypeName
    text_column: str
    part_rows: int


class BulkInput(BaseModel):
    """A file as it was when it was divided."""

    size: int
    modified: int
    """In nanoseconds."""
    fragments: list[Fragment]


class Record(BaseModel):
    """What was asked."""

    options: BulkOptions
    inputs: dict[str, BulkInput]


@dataclass(frozen=True)
class Totals:
    """What is in the parts."""

    rows: int
    poisoned: int
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
    say: Callable[[str], None] = print,
) -> Totals:
    """Screen files into a folder of Parquet parts; those that an earlier run has made are kept.

    Args:
        patterns: files, and globs of them.
        bundle: folder of the bundle; like files and parts, in the same place on every machine.
        out: folder of the parts.
        text_column: column of the texts.
        part_rows: rows of a part; the last one of a file may have fewer.
        workers: how many hold the bundle; one for each GPU or, without, each processor by default.
        dtype: see `load_bundle`.
        engine: see `load_bundle`.
        say: told what cannot be read, when that is found.

    Raises:
        DataError: something cannot be read, or `out` is of something else that was asked.
        BundleError: the bundle is not as its manifest says.
    """
    if not is_installed("ray"):
        raise DataError("Ray is not installed: pip install 'psim-gateway[ray]'")
    manifest, digest = read_manifest(bundle)
    check_files(bundle, manifest)
    engine, dtype = choose(manifest, engine, dtype).runtime
    options = BulkOptions(
        bundle=digest, engine=engine, dtype=dtype, text_column=text_column, part_rows=part_rows
    )
    out = out.resolve()
    files = _files(patterns, out)
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        inputs = _divided(files, out, options, say)
        fragments = [fragment for known in inputs.values() for fragment in known.fragments]
        _tidy(out)
        waiting = [fragment for fragment in fragments if not part_of(fragment, out).exists()]
        job = Job(bundle.resolve(), out, options)
        try:
            _screen(job, waiting, sum(fragment.rows for fragment in fragments), workers, say)
        finally:
            _tidy(out)
        for file in files:
            if not _is_as_it_was(file, inputs[str(file)]):
                raise DataError(f"{file} was changed meanwhile; {_anew(file, out)}")
        return _totals(fragments, out)


def _files(patterns: Sequence[str], out: Path) -> list[Path]:
    """Return what is to be screened, each file once, and none of the results."""
    found: set[Path] = set()
    for pattern in patterns:
        # Not `Path.glob`, since a pattern may be absolute.
        names = [pattern] if Path(pattern).exists() else glob.glob(pattern, recursive=True)  # noqa: PTH207
        files = {Path(name).resolve() for name in names if Path(name).is_file()}
        if not files:
            raise DataError(f"{pattern}: there is no such file")
        found |= {file for file in files if not file.is_relative_to(out)}
    return sorted(found)


def _tidy(out: Path) -> None:
    """Remove what killed workers have left."""
    for partial in out.glob(f".*{PARTIAL}"):
        partial.unlink()


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    try:
        with FileLock(out / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise DataError(f"another command is at work on {out}") from error


def _divided(
    files: Sequence[Path], out: Path, options: BulkOptions, say: Callable[[str], None]
) -> dict[str, BulkInput]:
    """Return what each file consists of, and record it; what was divided before is not again.

    Raises:
        DataError: a file cannot be read, or there are parts of what is not asked now.
    """
    known = _recorded(out, options)
    inputs: dict[str, BulkInput] = {}
    broken = 0
    for file in tqdm(files, desc="divide", unit=" files", leave=False, disable=None):
        before = known.get(str(file))
        if before is None or not _is_as_it_was(file, before):
            if _parts(file, out):
                raise DataError(f"{file} was changed since it was screened; {_anew(file, out)}")
            try:
                status = file.stat()  # before it is read, so that no change goes unnoticed
                before = BulkInput(
                    size=status.st_size,
                    modified=status.st_mtime_ns,
                    fragments=fragments_of(file, options.text_column, options.part_rows),
                )
            except DataError as error:
                say(str(error))
                broken += 1
                continue
        inputs[str(file)] = before
    if broken:
        raise DataError(f"{broken} of {len(files)} files cannot be read; mend or leave them out")
    for name in known.keys() - inputs.keys():
        if _parts(Path(name), out):
            raise DataError(f"{out} has parts of {name}, which is not asked for any more")
    write_whole(out / RECORD, Record(options=options, inputs=inputs).model_dump_json())
    return inputs


def _recorded(out: Path, options: BulkOptions) -> dict[str, BulkInput]:
    """Return the files of earlier runs, which must have had the same options."""
    try:
        record = Record.model_validate_json((out / RECORD).read_bytes())
    except FileNotFoundError as error:
        if any(out.glob("*.parquet")):
            raise DataError(
                f"{out} has Parquet files but no {RECORD}; choose another --out"
            ) from error
        return {}
    except ValidationError as error:
        raise DataError(f"{out / RECORD} is not of this version; choose another --out") from error
    then, now = dict(record.options), dict(options)
    if differing := [
        f"{key} was {then[key]}, is {now[key]}" for key in now if then[key] != now[key]
    ]:
        raise DataError(f"{out} is of another run: {'; '.join(differing)}; choose another --out")
    return record.inputs


def _is_as_it_was(file: Path, known: BulkInput) -> bool:
    status = file.stat()
    return (status.st_size, status.st_mtime_ns) == (known.size, known.modified)


def _name(file: Path) -> str:
    """Return how names of a file's parts begin; files of several folders may have one name."""
    return f"{file.stem[:100]}-{hashlib.sha256(os.fsencode(file)).hexdigest()[:8]}-"


def _parts(file: Path, out: Path) -> list[Path]:
    return list(out.glob(f"{glob.escape(_name(file))}*.parquet"))


def _anew(file: Path, out: Path) -> str:
    return f"delete {out}/{_name(file)}*.parquet to screen it anew, or choose another --out"


def part_of(fragment: Fragment, out: Path) -> Path:
    """Return where a fragment's rows and verdicts are."""
    return out / f"{_name(Path(fragment.file))}{fragment.number:06}.parquet"


@dataclass(frozen=True)
class Job:
    """What all workers have to know."""

    bundle: Path
    out: Path
    options: BulkOptions


class BulkScreener:
    """Screens fragments; each worker has one.

    Args:
        job: what is asked; the bundle is loaded when it is needed first.
        processors: how many threads compute.
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
        """Write the part of a fragment; say why there is none, and whether others are worth a try.

        Nothing is raised: Ray would log it with all its variables.
        """
        fragment = Fragment(**item)
        try:
            self.write(fragment)
        except DataError as error:
            return {"rows": 0, "failure": str(error), "fatal": False}
        except (PsimError, OSError) as error:
            return {"rows": 0, "failure": f"{fragment}: {error}", "fatal": True}
        except Exception as error:
            # Not its message, which may quote a text.
            return {"rows": 0, "failure": f"{fragment}: {type(error).__name__}", "fatal": True}
        return {"rows": fragment.rows, "failure": None, "fatal": False}

    def write(self, fragment: Fragment) -> None:
        """Write the part of a fragment: there whole or not at all.

        Raises:
            DataError: its file cannot be read, or workers have died of it.
        """
        part = part_of(fragment, self.job.out)
        # What died left its file; and who seems dead may be writing still, so each has its own.
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
            rows = [
                {"file": fragment.file, "row": number} | as_row(verdict)
                for number, verdict in enumerate(judged(self.bundle, texts), row)
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
    return pa.array([row.get(field.name.removeprefix(OURS)) for row in rows], field.type)


def _screen(
    job: Job,
    waiting: Sequence[Fragment],
    total: int,
    workers: int | None,
    say: Callable[[str], None],
) -> None:
    """Have Ray Data's workers write the parts that are missing."""
    if not waiting:
        return
    done, failed = total - sum(fragment.rows for fragment in waiting), 0
    with (
        _outcomes(job, waiting, workers) as outcomes,
        tqdm(total=total, initial=done, unit=" rows", disable=None) as bar,
    ):
        for outcome in outcomes:
            if outcome["fatal"]:
                raise DataError(f"{outcome['failure']}; run the same command again to go on")
            if outcome["failure"]:
                say(outcome["failure"])
                failed += 1
            bar.update(outcome["rows"])
    if failed:
        raise DataError(
            f"{failed} parts are missing, the others are there: mend what could not be read, then "
            "run the same command again"
        )


@contextmanager
def _outcomes(
    job: Job, fragments: Sequence[Fragment], workers: int | None
) -> Iterator[Iterator[dict[str, Any]]]:
    """Yield what becomes of each fragment, in any order."""
    # Before Ray is imported. Its errors come back to us; what it logs besides is in its own files.
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_LOG_LEVEL": "CRITICAL"}
    os.environ["RAY_BACKEND_LOG_LEVEL"] = "fatal"
    import ray
    from ray.data import ActorPoolStrategy, DataContext, from_items

    own = "RAY_ADDRESS" not in os.environ
    try:
        ray.init(
            "local" if own else None,
            object_store_memory=STORE if own else None,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.CRITICAL,
        )
        context = DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        context.target_max_block_size = BLOCK
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        processors, gpus = int(resources.get("CPU", 1)), int(resources.get("GPU", 0))
        workers = min(workers or gpus or processors, len(fragments))
        # On a cluster, nobody knows how many one machine has.
        threads = max(1, processors // workers) if own else 1
        yield iter(
            from_items(list(map(asdict, fragments)), override_num_blocks=len(fragments))
            .map(
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
            .iter_rows()
        )
    except ray.exceptions.RayError as error:
        raise DataError(
            f"Ray gave up: {type(error).__name__}; run the same command again"
        ) from error
    finally:
        ray.shutdown()


def _totals(fragments: Sequence[Fragment], out: Path) -> Totals:
    """Count what is in the parts, and that it is all of the rows."""
    parts = [str(part_of(fragment, out)) for fragment in fragments]
    if not parts:
        return Totals(0, 0, 0)
    rows = pads.dataset(parts, schema=ADDED)
    found = Totals(
        rows.count_rows(),
        rows.count_rows(filter=pc.field(OURS + "poisoned")),
        rows.count_rows(filter=pc.field(OURS + "error").is_valid()),
    )
    asked = sum(fragment.rows for fragment in fragments)
    if found.rows != asked:
        raise DataError(f"{out} has {found.rows} of {asked} rows; who else writes to it?")
    return found
