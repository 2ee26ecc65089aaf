"""Bulk screening: every row once, whatever is killed, and with the verdict of the local path."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerBase

from models.bundle.verify import read_manifest
from models.offline.screening import bulk
from models.offline.screening.fragments import (
    COLUMN_PREFIX,
    Fragment,
    fragments_of,
    read,
    schema_of,
)
from tests.support.bundles import fit_tiny, some_texts
from tests.support.commands import assert_refused, psim
from tests.support.families import tiny_victim
from tests.support.waiting import wait_for

TEXTS = [*some_texts(1297), 'says "no",\r\nand leaves', "naïve café", "NA"]
LINES = [text.replace("\r\n", " ") for text in TEXTS]
"""What TSV, which has no quoting, can hold of the texts."""


@pytest.fixture(scope="module")
def bundle(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit_tiny(tiny_victim("bert"), tokenizer, tmp_path_factory.mktemp("bulk") / "bundle")


def write_parquet(table: pd.DataFrame, file: Path) -> None:
    table.to_parquet(file, row_group_size=300)


def write_jsonl(table: pd.DataFrame, file: Path) -> None:
    table.to_json(file, orient="records", lines=True)


def write_csv(table: pd.DataFrame, file: Path) -> None:
    table.to_csv(file, index=False, encoding="utf-8-sig")


def write_tsv(table: pd.DataFrame, file: Path) -> None:
    rows = zip(table["id"], LINES, strict=True)
    lines = ["id\ttext", *(f"{i}\t{text}" for i, text in rows)]
    file.write_text("\n".join(lines), encoding="utf-8-sig")


def write_array(table: pd.DataFrame, file: Path) -> None:
    table.to_json(file, orient="records", indent=1)


def compressed(write: Callable[[pd.DataFrame, Path], None]) -> Callable[[pd.DataFrame, Path], None]:
    """Return a writer that compresses what another one wrote."""

    def write_compressed(table: pd.DataFrame, file: Path) -> None:
        plain = file.with_suffix("")
        write(table, plain)
        codec = {".gz": "gzip", ".ZST": "zstd"}[file.suffix]
        with pa.output_stream(str(file), compression=codec) as out:
            out.write(plain.read_bytes())
        plain.unlink()

    return write_compressed


WRITERS: dict[str, Callable[[pd.DataFrame, Path], None]] = {
    "a.parquet": write_parquet,
    "b.jsonl": write_jsonl,
    "c.csv": write_csv,
    "d.tsv": write_tsv,
    "e.json": write_array,
    "f.NDJSON.gz": compressed(write_jsonl),
    "g.csv.ZST": compressed(write_csv),
    "h.json.gz": compressed(write_array),
    "i.parquet.gz": compressed(write_parquet),
}
SCREENED = ["a.parquet", "b.jsonl", "c.csv", "d.tsv", "h.json.gz"]
"""What is screened on Ray."""


@pytest.mark.parametrize("rows", [299, 700, 1300, 5000])
@pytest.mark.parametrize("name", WRITERS)
def test_fragments_hold_every_row_once_in_order(name: str, rows: int, tmp_path: Path) -> None:
    file = tmp_path / name
    WRITERS[name](pd.DataFrame({"id": range(1300), "text": TEXTS}), file)
    fragments = fragments_of(file, "text", rows)
    assert [f.rows for f in fragments] == [rows] * (1300 // rows) + [1300 % rows] * (
        1300 % rows > 0
    )
    found = [(f.row + i, text) for f in fragments for i, text in enumerate(texts_of(f))]
    assert found == list(enumerate(LINES if name == "d.tsv" else TEXTS, 1))
    assert schema_of(fragments[-1]).names == ["id", "text"], "no byte order mark"


def texts_of(fragment: Fragment) -> list[object]:
    return [text for chunk in read(fragment, "text") for text in chunk.texts]


def job(bundle: Path, out: Path, rows: int = 100) -> bulk.Job:
    out.mkdir(exist_ok=True)
    digest = read_manifest(bundle)[1]
    options = bulk.BulkOptions(
        schema_version=2,
        bundle=digest,
        engine="torch",
        dtype="float32",
        text_column="text",
        part_rows=rows,
    )
    return bulk.Job(bundle, out, options)


BROKEN_LINES = [
    b'{"text": "a fine film", "id": 1, "psim_score": 3}',
    b"{oops secret",
    b'{"body": "secret", "id": [1, {"a": null}]}',
    b'{"text": null, "id": null}',
    b'{"text": "\xff secret"}',
    b'{"text": "\\ud800 secret", "\\ud800": "\\udfff"}',
    b"[1, 2]",
    b"",
    json.dumps({"text": "secret" * 200_000}).encode(),
    b'{"text": "another film", "id": "x"}',
]


def test_rows_of_jsonl_that_cannot_be_screened_say_why_as_by_the_local_path(
    bundle: Path, tmp_path: Path
) -> None:
    file, out = tmp_path / "x.jsonl", tmp_path / "out"
    file.write_bytes(b"\n".join(BROKEN_LINES))
    (fragment,) = fragments_of(file, "text", 100)
    outcome = bulk.BulkScreener(job(bundle, out), 1)(asdict(fragment))
    assert outcome == {"rows": 10, "failure": None, "fatal": False}
    part = pq.read_table(bulk.part_of(fragment, out))
    local = psim("screen", file, "--bundle", bundle).stdout.splitlines()
    assert without_prefix(part) == [pytest.approx(json.loads(line)) for line in local]
    assert "secret" not in str(part["psim_error"].to_pylist())
    assert part["id"].to_pylist()[:3] == ["1", None, '[1, {"a": null}]']
    assert part["\\ud800"].to_pylist()[5] == "\\udfff"
    assert part.schema.names.count("psim_score") == 1
    assert [p.name for p in out.iterdir()] == [bulk.part_of(fragment, out).name]


def without_prefix(part: pa.Table) -> list[dict[str, Any]]:
    """Return rows as the local path writes them: an error, or every field of a verdict."""
    rows = part.select(bulk.ADDED.names).rename_columns(
        [name.removeprefix(COLUMN_PREFIX) for name in bulk.ADDED.names]
    )
    found = []
    for row in rows.to_pylist():
        line, error = row.pop("row"), row.pop("error")
        del row["file"]
        if error is not None:
            assert set(row.values()) == {None}
        found.append({"line": line} | (row if error is None else {"error": error}))
    return found


def test_rows_of_csv_and_parquet_that_cannot_be_screened_say_why(
    bundle: Path, tmp_path: Path
) -> None:
    csv, parquet = tmp_path / "x.csv", tmp_path / "x.parquet"
    csv.write_bytes(b'id,text\n1,fine\n2,"  "\n\n3\n4,a,b\n5,\xff\n6,also fine\n')
    pq.write_table(pa.table({"text": ["fine", None, ""], "id": [[1], [2], None]}), parquet)
    screener = bulk.BulkScreener(job(bundle, tmp_path / "out"), 1)
    errors = {}
    for file in (csv, parquet):
        (fragment,) = fragments_of(file, "text", 100)
        assert screener(asdict(fragment))["failure"] is None
        part = pq.read_table(bulk.part_of(fragment, tmp_path / "out"))
        errors[file] = dict(
            zip(part["psim_row"].to_pylist(), part["psim_error"].to_pylist(), strict=True)
        )
    assert errors[csv] == {
        1: None, 2: "the text is empty",
        3: "the row has 1 fields, the header 2; a field with commas has to be quoted",
        4: "the row has 3 fields, the header 2; a field with commas has to be quoted",
        5: "the text is not valid Unicode: not UTF-8, or it has a lone surrogate", 6: None,
    }  # fmt: skip
    assert errors[parquet] == {
        1: None, 2: "the text is missing", 3: "the text is empty"
    }  # fmt: skip
    assert part["id"].to_pylist() == [[1], [2], None]


def test_a_fragment_that_workers_die_of_is_left_out_by_name(bundle: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "x.csv", tmp_path / "out"
    file.write_text("text\n" + "fine\n" * 30)
    first, second, _ = fragments_of(file, "text", 10)
    screener = bulk.BulkScreener(job(bundle, out), 1)
    for death in range(bulk.ATTEMPTS):
        (out / f".{bulk.part_of(second, out).name}.{death}{bulk.PARTIAL}").touch()
    assert screener(asdict(first))["failure"] is None
    outcome = screener(asdict(second))
    assert f"{file}, rows 11 to 20: 3 workers died of it" in outcome["failure"]
    assert not outcome["fatal"]


def test_a_worker_says_what_stops_all_of_them(bundle: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "x.csv", tmp_path / "out"
    file.write_text("text\nfine\n")
    (fragment,) = fragments_of(file, "text", 10)
    asked = job(bundle, out)
    other = bulk.Job(bundle, out, asked.options.model_copy(update={"bundle": "0" * 64}))
    outcome = bulk.BulkScreener(other, 1)(asdict(fragment))
    assert "was replaced meanwhile" in outcome["failure"]
    shutil.rmtree(out)
    gone = bulk.BulkScreener(asked, 1)(asdict(fragment))
    assert outcome["fatal"]
    assert gone["fatal"]


def lacking(file: Path) -> None:
    pd.DataFrame({"body": ["secret"]}).to_parquet(file)


def cut(file: Path) -> None:
    write_parquet(pd.DataFrame({"text": TEXTS}), file)
    os.truncate(file, file.stat().st_size - 9)


def unquoted(file: Path) -> None:
    file.write_text("text\n" + "fine\n" * 41 + '"secret' + "\nsecret" * 3_000_000)


def screened_already(file: Path) -> None:
    pd.DataFrame({"text": ["fine"], "psim_score": [1.0]}).to_parquet(file)


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("x.parquet", lacking, "has no column 'text'; it has ['body']"),
        ("x.parquet", cut, "x.parquet cannot be read as Parquet: ArrowInvalid"),
        ("x.parquet", screened_already, "has columns psim_"),
        ("x.csv", unquoted, "x.csv, line 43: the quotation marks from here on do not match"),
        ("x.jsonl.gz", lacking, "behind line 0: its compression is damaged"),
        ("x.jsonl.bz2", Path.touch, "unknown format"),
    ],
)
def test_a_broken_file_is_named_before_anything_is_screened(
    name: str, write: Callable[[Path], None], message: str, bundle: Path, tmp_path: Path
) -> None:
    write(tmp_path / name)
    (tmp_path / "fine.jsonl").write_text('{"text": "fine"}\n')
    out = tmp_path / "out"
    result = psim("screen", tmp_path / "*", "--bundle", bundle, "--on", "ray", "--out", out)
    assert_refused(result, "1 of 2 files cannot be read")
    assert message in " ".join(result.stderr.split())
    assert "secret" not in result.output


def test_a_file_without_rows_needs_no_worker(bundle: Path, tmp_path: Path) -> None:
    """And what the command writes itself is no input."""
    (tmp_path / "x.csv").write_text("text\n")
    ray = ["--engine", "ray", "--out", tmp_path / "out"]
    for _ in range(2):
        result = psim("screen", tmp_path / "**/*.*", "--bundle", bundle, *ray)
        assert result.exit_code == 0, result.stderr
        assert "0 rows" in result.stderr


def test_options_that_do_not_go_together_are_refused(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, out = tmp_path / "x.jsonl", tmp_path / "out"
    file.write_text('{"text": "fine"}\n')
    for options in (["--on", "ray"], ["--engine", "ray"], ["--out", out]):
        assert_refused(psim("screen", file, "--bundle", bundle, *options), "--on ray needs --out")
    assert_refused(psim("screen", file, file, "--bundle", bundle), "several files need --on ray")
    ray = ["--bundle", bundle, "--on", "ray", "--out", out]
    assert_refused(psim("screen", tmp_path / "*.csv", *ray), "*.csv: there is no such file")
    monkeypatch.setattr(bulk, "is_installed", lambda _: False)
    assert_refused(psim("screen", file, *ray), "pip install 'psim-gateway[ray]'")


class Run:
    """The command in a process of its own."""

    def __init__(self, bundle: Path, pattern: Path, out: Path, rows: int) -> None:
        self.out = out
        arguments: list[object] = [pattern, "--bundle", bundle, "--on", "ray", "--out", out]
        arguments += ["--part-rows", rows, "--workers", 2]
        command = [sys.executable, "-m", "psim", "screen", *map(str, arguments)]
        # No pipe, which Ray's own processes would hold open when the command is killed.
        self.errors = out.with_suffix(".log")
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(command, stderr=errors)

    def wait_for_parts(self, more: int) -> None:
        enough = len(list(self.out.glob("*.parquet"))) + more

        def there() -> bool:
            assert self.process.poll() is None, self.errors.read_text()
            return len(list(self.out.glob("*.parquet"))) >= enough

        wait_for(there, 120)

    def workers(self) -> list[psutil.Process]:
        below = psutil.Process(self.process.pid).children(recursive=True)
        return [process for process in below if "MapWorker" in " ".join(process.cmdline())]

    def end(self) -> tuple[int, str]:
        """Return exit code and standard error."""
        try:
            code = self.process.wait(300)
        finally:
            self.process.kill()  # or a later test would be blamed for it
        return code, " ".join(self.errors.read_text().split())


@pytest.fixture(scope="module")
def folder(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hold files of all kinds, and what has become of them."""
    folder = tmp_path_factory.mktemp("screened")
    (folder / "in" / "deeper").mkdir(parents=True)
    for name in SCREENED:
        WRITERS[name](pd.DataFrame({"id": range(1300), "text": TEXTS}), folder / "in" / name)
    write_jsonl(pd.DataFrame({"text": ["fine", " "]}), folder / "in" / "deeper" / "b.jsonl")
    code, errors = Run(bundle, folder / "in/**/*.*", folder / "out", 500).end()
    assert "6502 rows, of which" in errors
    assert "and 1 could not be screened" in errors
    assert code == 1
    return folder


def test_all_kinds_get_the_verdicts_of_the_local_path(bundle: Path, folder: Path) -> None:
    texts = folder / "in" / "b.jsonl"
    local = [json.loads(v) for v in psim("screen", texts, "--bundle", bundle).stdout.splitlines()]
    assert {v["poisoned"] for v in local} == {True, False}
    for name in SCREENED:
        parts = sorted((folder / "out").glob(f"{Path(name).stem}-*.parquet"))
        table = pa.concat_tables(map(pq.read_table, parts), promote_options="default").filter(
            pc.field("psim_file") == str(folder / "in" / name)
        )
        assert [int(i) for i in table["id"].to_pylist()] == list(range(1300))
        assert table["text"].to_pylist() == (LINES if name == "d.tsv" else TEXTS)
        # Others share a batch, so that floats are rounded otherwise.
        assert without_prefix(table) == [pytest.approx(v, abs=0.02) for v in local]


def test_what_is_done_is_not_done_again(bundle: Path, folder: Path) -> None:
    before = {part: part.stat().st_mtime_ns for part in (folder / "out").glob("*.parquet")}
    result = again(bundle, folder)
    assert "6502 rows" in result.stderr
    assert result.exit_code == 1
    assert {p: p.stat().st_mtime_ns for p in (folder / "out").glob("*.parquet")} == before


def again(bundle: Path, folder: Path, *options: object) -> Any:
    command = ["screen", folder / "in/**/*.*", "--bundle", bundle, "--on", "ray", "--out"]
    return psim(*command, folder / "out", "--part-rows", 500, *options)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """Return a copy of results, of files in their old place."""
    shutil.copytree(folder / "out", tmp_path / "out")
    (tmp_path / "in").symlink_to(folder / "in")
    return tmp_path


def test_another_question_is_refused(bundle: Path, copy: Path, tmp_path: Path) -> None:
    assert_refused(again(bundle, copy, "--part-rows", 400), "part_rows was 500, is 400")
    assert_refused(again(bundle, copy, "--dtype", "bfloat16"), "dtype was float32, is bfloat16")
    assert_refused(again(bundle, copy, "--text-column", "id"), "text_column was text, is id")
    other = Path(shutil.copytree(bundle, tmp_path / "other"))
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(manifest))
    assert_refused(again(other, copy), "bundle was ")
    (copy / "out" / bulk.RECORD).unlink()
    assert_refused(again(bundle, copy), "has Parquet files but no run.json")


def test_a_file_that_was_changed_or_is_gone_is_refused(
    bundle: Path, folder: Path, copy: Path
) -> None:
    file = folder / "in" / "deeper" / "b.jsonl"
    original, status = file.read_bytes(), file.stat()
    try:
        file.write_bytes(original.replace(b"fine", b"good"))
        assert_refused(again(bundle, copy), f"{file} was changed since it was screened; delete")
        file.unlink()
        assert_refused(again(bundle, copy), f"has parts of {file}, which is not asked for")
    finally:
        file.write_bytes(original)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_kills_neither_lose_nor_double_a_row(bundle: Path, tmp_path: Path) -> None:
    """The command is killed, later a worker, and one file has a page that is broken."""
    inputs, out = tmp_path / "in", tmp_path / "out"
    inputs.mkdir()
    for number in range(4):
        table = pd.DataFrame({"id": range(4000 * number, 4000 * (number + 1))})
        write_parquet(table.assign(text=some_texts(4000, number)), inputs / f"{number}.parquet")
    broken = inputs / "2.parquet"
    whole = broken.read_bytes()
    page = pq.read_metadata(broken).row_group(5).column(1).data_page_offset
    broken.write_bytes(whole[:page] + b"\xff" * 40 + whole[page + 40 :])

    first = Run(bundle, inputs / "*.parquet", out, 200)
    first.wait_for_parts(3)
    workers = first.workers()
    first.process.kill()
    first.end()
    assert not psutil.wait_procs(workers, timeout=60)[1], "they would write on"
    kept = {part: part.stat().st_mtime_ns for part in out.glob("*.parquet")}
    assert 3 <= len(kept) < 40

    second = Run(bundle, inputs / "*.parquet", out, 200)
    second.wait_for_parts(3)
    second.workers()[0].kill()
    code, errors = second.end()
    assert code == 2
    assert f"{broken} cannot be read as Parquet behind row" in errors
    assert "parts are missing, the others are there" in errors
    assert {part: part.stat().st_mtime_ns for part in kept} == kept
    rows = pa.concat_tables(map(pq.read_table, out.glob("*.parquet")))
    # Of the third file: those of a row group, and what shares a part with them.
    lost = range(8000 + 1400, 8000 + 1800)
    assert sorted(rows["id"].to_pylist()) == [i for i in range(16000) if i not in lost]
    assert not list(out.glob(f".*{bulk.PARTIAL}"))

    broken.write_bytes(whole)
    assert_refused(again_in(bundle, inputs, out), "was changed since it was screened")


def again_in(bundle: Path, inputs: Path, out: Path) -> Any:
    ray = ["--on", "ray", "--out", out, "--part-rows", 200]
    return psim("screen", inputs / "*.parquet", "--bundle", bundle, *ray)


def test_only_one_command_writes(bundle: Path, folder: Path, copy: Path) -> None:
    with bulk._locked(copy / "out"):
        assert_refused(again(bundle, copy), "another command is at work")
