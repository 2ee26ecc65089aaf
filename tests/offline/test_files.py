"""Files as people have them: every format read right, or refused in a line that names the place."""

import csv
import io
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from uuid import uuid4

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from models.errors import DataError
from models.offline.fitting.traffic import AuditedTraffic, Kind, read_traffic
from models.offline.io.samples import Sample, class_name, load_samples
from models.offline.io.tables import BLOCK, open_table
from service.audit.__main__ import main as export_audit
from service.audit.store import AuditStore
from tests.support.audit import NOW, ROW
from tests.support.bundles import fit_tiny, some_texts
from tests.support.commands import assert_refused, psim
from tests.support.families import tiny_victim

Rows = Sequence[tuple[str, str]]
Writer = Callable[[Rows, Path], None]
BOM = b"\xef\xbb\xbf"


def lines_of(rows: Rows, end: str = "\n") -> str:
    return end.join(json.dumps({"text": t, "label": y}, ensure_ascii=False) for t, y in rows) + end


def array_of(rows: Rows, indent: int | None) -> str:
    table = [{"text": t, "label": y} for t, y in rows]
    return json.dumps(table, ensure_ascii=indent is not None, indent=indent)


def csv_of(rows: Rows, **dialect: object) -> str:
    out = io.StringIO(newline="")
    csv.writer(out, **dialect).writerows([("text", "label"), *rows])  # type: ignore[arg-type]
    return out.getvalue()


def tsv_of(rows: Rows, end: str = "\n") -> str:
    return "".join(f"{text}\t{label}{end}" for text, label in [("text", "label"), *rows])


def as_text(make: Callable[[Rows], str], mark: bytes = b"") -> Writer:
    def write(rows: Rows, file: Path) -> None:
        file.write_bytes(mark + make(rows).encode())

    return write


def write_parquet(rows: Rows, file: Path) -> None:
    texts, labels = zip(*rows, strict=True)
    pq.write_table(pa.table({"text": texts, "label": labels}), file, row_group_size=2)


FAITHFUL: dict[str, Writer] = {
    "a.jsonl": as_text(lines_of),
    "b.NDJSON": as_text(lambda rows: lines_of(rows, "\r\n"), BOM),
    "c.json": as_text(lambda rows: array_of(rows, None)),
    "d.Json": as_text(lambda rows: array_of(rows, 2).replace("\n", "\r\n"), BOM),
    "e.json": as_text(lines_of),
    "f.csv": as_text(csv_of),
    "g.CSV": as_text(lambda rows: csv_of(rows, quoting=csv.QUOTE_ALL, lineterminator="\n"), BOM),
    "h.parquet": write_parquet,
}
"""Writers whose files hold any text."""
BLUNT: dict[str, Writer] = {
    "a.tsv": as_text(tsv_of),
    "b.TSV": as_text(lambda rows: tsv_of(rows, "\r\n"), BOM),
    "c.tsv": as_text(lambda rows: csv_of(rows, delimiter="\t", lineterminator="\n")),
    "d.csv": as_text(lambda rows: csv_of(rows, lineterminator="\n")),
    "e.csv": as_text(
        lambda rows: csv_of(rows, doublequote=False, escapechar="\\", quoting=csv.QUOTE_ALL)
    ),
    "f.csv": as_text(
        lambda rows: "".join(f"{text},{y}\n" for text, y in [("text", "label"), *rows])
    ),
}
"""Writers that quote as this format has it not, or not at all."""

special = st.sampled_from(['"', '""', "\\", '\\"', ",", "\t", "\n", "\r", "\r\n", "'", " ", "\x00"])
characters = st.characters(exclude_categories=["Cs"])
text = st.lists(special | characters, max_size=12).map("".join)
rows = st.lists(st.tuples(text, st.sampled_from(["yes", "no", ""])), min_size=1, max_size=6)


def expected(rows: Rows) -> list[Sample]:
    return [Sample(text, label or None) for text, label in rows if text.strip()]


def read(file: Path) -> list[Sample]:
    return load_samples(str(file), drop_empty=True)


def assert_read_or_named(rows: Rows, name: str, write: Writer, folder: Path) -> bool:
    """Return whether the rows were read, and then the same; else the error names the line."""
    file = folder / name
    write(rows, file)
    try:
        assert read(file) == expected(rows), name
    except DataError as error:
        message = str(error).removeprefix(str(file))
        assert re.match(r", line \d+: ", message) or message.startswith(" is empty"), message
        assert all(len(text) < 8 or text not in message for text, _ in rows)
        return not expected(rows)
    return True


@given(rows=rows)
@settings(deadline=None)
@example(rows=[('"a', "yes"), ('b"', "no")])
@example(rows=[("a\r", "yes")])
@example(rows=[("\ufeffa", "")])
def test_random_tables_are_read_back_from_every_format(
    rows: Rows, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("tables")
    for name, write in FAITHFUL.items():
        assert assert_read_or_named(rows, name, write, folder), name


@given(rows=rows)
@settings(deadline=None)
@example(rows=[('"a', "yes"), ('b"', "no")])
@example(rows=[('say "a"', "yes")])
@example(rows=[('a ", b', "yes")])
@example(rows=[("a\nb\tc", "yes")])
def test_what_a_format_cannot_hold_is_never_misread(
    rows: Rows, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("tables")
    for name, write in BLUNT.items():
        plain = [(what_can_be_told(text, name), label) for text, label in rows]
        assert_read_or_named(plain, name, write, folder)


def what_can_be_told(text: str, name: str) -> str:
    """Return a text without what makes another table of it, by whatever rule one reads."""
    if name == "d.csv":
        return text
    if name == "e.csv":
        return text.replace("\\", "/")  # a doubled backslash is two
    if name == "f.csv":
        text = text.replace('"', "/")  # quoted by chance
    text = text.lstrip("\r\n")  # blank lines are left out
    return re.sub("[\t,]", " ", text) if "\n" in text else text  # rows by chance


@pytest.mark.parametrize("ending", [".gz", ".GZ", ".zst"])
@pytest.mark.parametrize("name", ["a.jsonl", "d.Json", "g.CSV", "a.tsv", "h.parquet"])
def test_compressed_files_are_read_as_they_are(name: str, ending: str, tmp_path: Path) -> None:
    rows = [(text, "yes") for text in some_texts(3000)]
    (FAITHFUL | {"a.tsv": BLUNT["a.tsv"]})[name](rows, tmp_path / name)
    file = compressed(tmp_path / name, ending)
    assert load_samples(str(file)) == expected(rows)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"damaged, or it was cut off|cannot be read as Parquet"):
        load_samples(str(file))


def compressed(file: Path, ending: str) -> Path:
    """Return a compressed copy in two frames, as `cat a.gz b.gz` makes."""
    whole, copy = file.read_bytes(), file.with_name(file.name + ending)
    codec = "zstd" if ending == ".zst" else "gzip"
    copy.write_bytes(b"")
    for half in (whole[: len(whole) // 2], whole[len(whole) // 2 :]):
        with copy.open("ab") as out, pa.CompressedOutputStream(out, codec) as frame:
            frame.write(half)
    return copy


@pytest.mark.parametrize("name", [*FAITHFUL, "a.tsv"])
def test_a_fault_is_named_by_its_line(name: str, tmp_path: Path) -> None:
    """Of a row that has more than one line before it, in whatever format."""
    made = {**FAITHFUL, "a.tsv": BLUNT["a.tsv"]}[name]
    before = "two\nlines" if name.casefold().endswith("csv") else "one line"
    made([(before, "yes"), ("HERE", "no"), ("secret", "yes")], tmp_path / name)
    content = (tmp_path / name).read_bytes()
    if name == "h.parquet":
        pq.write_table(pa.table({"text": ["a", None, "secret"]}), tmp_path / name)
        place = "the first in row 2"
    else:
        (tmp_path / name).write_bytes(content.replace(b"HERE", b""))
        line = content[: content.index(b"HERE")].count(b"\n") + 1
        # Of an array, the line on which the object begins.
        place = f"the first in line {line - (name == 'd.Json')}"
    with pytest.raises(DataError, match=rf"1 of 3 texts are empty or missing, {place}; remove"):
        load_samples(str(tmp_path / name))


def test_large_arrays_are_read_in_blocks_and_entered_in_the_middle(tmp_path: Path) -> None:
    """What a worker of a bulk run does; objects are cut by blocks at every place."""
    file = tmp_path / "x.json"
    texts = ["é" * (n % 97) + "x" * (BLOCK // 7) for n in range(60)] + ["y" * 3 * BLOCK, "z"]
    file.write_bytes(BOM + json.dumps([{"text": t} for t in texts], ensure_ascii=False).encode())
    with open_table(file) as table:
        offsets = [(number, table.offset) for number, _ in enumerate(table, 1)]
    for number, offset in offsets[::7]:
        with open_table(file, offset) as table:
            assert [record.row for record in table] == [{"text": t} for t in texts[number:]]


LABELS: list[tuple[str, str, list[str | None]]] = [
    ("x.csv", "a,1.0\nb,\nc,0.0\n", ["1", None, "0"]),
    ("x.csv", "a,1\nb,\nc,0\n", ["1", None, "0"]),
    ("x.csv", "a,1.0\nb,1.5\nc,2.0\n", ["1.0", "1.5", "2.0"]),
    ("x.csv", "a,1.0\nb,yes\nc, \n", ["1.0", "yes", None]),
    ("x.tsv", "a\t1.0\nb\t\nc\t0\n", ["1", None, "0"]),
    ("x.jsonl", '"a", 1\n"b", null\n"c", "0"\n', ["1", None, "0"]),
    ("x.jsonl", '"a", 1.0\n"b", "yes"\n"c", true\n', ["1.0", "yes", "True"]),
]


@pytest.mark.parametrize(("name", "content", "labels"), LABELS)
def test_integers_stay_integers_beside_gaps_and_others_stay_as_they_are(
    name: str, content: str, labels: list[str | None], tmp_path: Path
) -> None:
    separator = "\t" if name == "x.tsv" else ","
    if name == "x.jsonl":
        pairs = [line.split(", ") for line in content.splitlines()]
        content = "".join(f'{{"text": {text}, "label": {label}}}\n' for text, label in pairs)
    else:
        content = f"text{separator}label\n{content}"
    (tmp_path / name).write_text(content)
    assert [s.label for s in load_samples(str(tmp_path / name))] == labels


@pytest.mark.parametrize("dtype", ["float64", "Int64", "object", "category"])
def test_every_kind_of_number_in_parquet_is_a_label(dtype: str, tmp_path: Path) -> None:
    labels = pd.Series([1, None, 0], dtype=dtype)
    pd.DataFrame({"text": list("abc"), "label": labels}).to_parquet(tmp_path / "x.parquet")
    assert [s.label for s in load_samples(str(tmp_path / "x.parquet"))] == ["1", None, "0"]


def test_a_number_is_a_class_only_where_no_class_has_that_name() -> None:
    names = ["no", "yes", "0"]
    asked = ["yes", "0", "1", "2", "3", "-1", "maybe"]
    assert [class_name(label, names) for label in asked] == [
        "yes", "0", "yes", "0", "3", "-1", "maybe",
    ]  # fmt: skip


UTF16 = "text,label\nsecret,1\n"
FAULTS: list[tuple[str, str | bytes, str]] = [
    ("x.csv", UTF16.encode("utf-16"), "is UTF-16; save it as UTF-8"),
    ("x.csv", UTF16.encode("utf-16-be"), "is UTF-16; save it as UTF-8"),
    ("x.tsv", UTF16.encode("utf-32"), "is UTF-32; save it as UTF-8"),
    ("x.jsonl", '{"text": "secret"}'.encode("utf-16-le"), "is UTF-16; save it as UTF-8"),
    ("x.json", '[{"text": "secret"}]'.encode("utf-16"), "is UTF-16; save it as UTF-8"),
    ("x.csv", b"text\nfine\nsecret caf\xe9\n", "line 3: the text is not valid Unicode: not UTF-8"),
    ("x.csv", b"t\xe9xt\nfine\n", "line 1: the names of the columns are not UTF-8"),
    ("x.csv", b"PK\x03\x04secret", "is a ZIP archive or a spreadsheet"),
    ("x.csv", b"\x1f\x8bsecret", "is compressed with gzip; let its name end in .gz"),
    ("x.csv", b"PAR1secret", "is Parquet; let its name end in .parquet"),
    ("x.csv.gz", "text\nsecret\n", "its compression is damaged, or it was cut off"),
    ("x.jsonl.zst", '{"text": "secret"}', "its compression is damaged, or it was cut off"),
    ("x.parquet.zst", b"PAR1secret", "cannot be read as Parquet"),
    ("x.xls", "secret", "unknown format; there are .jsonl, .ndjson, .json, .csv, .tsv, .parquet"),
    ("x.csv.bz2", "secret", "unknown format"),
    ("x", "secret", "unknown format"),
    ("x.csv", 'text,label\n"say \\"secret\\"",1\n', "line 2: the quotation marks from here on"),
    ("x.csv", 'text,label\nsay \\"secret\\",1\n', "line 2: a quotation mark in a field that"),
    ("x.csv", 'text,label\nfine,1\n"secret,1\nb,0\n', "line 3: the quotation marks from here on"),
    ("x.csv", 'text,label\n"a\nb",1\n"secret, c",0,2\n', "line 4: the row has 3 fields"),
    ("x.csv", "text,label\nsecret\n", "line 2: the row has 1 fields, the header 2; a field with"),
    ("x.csv", "text,label\rsecret,1\r", "line 1: a carriage return that ends no line"),
    ("x.tsv", "text\tlabel\rsecret\t1\r", "line 1: a carriage return that ends no line"),
    ("x.tsv", "text\tlabel\nsecret\t1\t2\n", "line 2: the row has 3 fields, the header 2; a field"),
    ("x.tsv", 'text\tlabel\n"a ""secret"""\t1\n', "line 2: a field is in quotation marks and has"),
    ("x.tsv", '"text"\t"label"\nsecret\t1\n', "has no column 'text'; it has ['\"label\"', "),
    ("x.csv", "the secret,1\n", "has no column 'text'; it has ['1', '…']; name the right one"),
    ("x.csv", "text;label\nsecret;1\n", "the first line has to name the columns"),
    ("x.csv", "text,text\nsecret,b\n", "has several columns 'text'; rename all but one"),
    ("x.csv", "text\n \nsecret\n\" \"\n", "2 of 3 texts are empty or missing, the first in line 2"),
    ("x.jsonl", '{"text": "a"}\n\n{"text": null}\n{}', "2 of 3 texts are empty or missing"),
    ("x.jsonl", '{"text": "a"}\n["secret"]', "line 2: not a JSON object"),
    ("x.jsonl", '{"text": ["secret"]}', "line 1: the text is list, not a string"),
    ("x.json", '[\n{"text": "a"},\n"secret"]', "line 3: the array has something else than objects"),
    ("x.json", '[{"text": "a"},\n{"text": secret}]', "line 2: the object that begins here is no"),
    ("x.json", '[{"text": "a"},\n', "line 2: the array does not end"),
    ("x.json", '[{"text": "a"}]\n["secret"]', "line 2: something follows the end of the array"),
    ("x.json", '{"rows": [\n"secret"]}', "line 1: not a JSON object"),
    ("x.json", "[]", "is empty"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), FAULTS)
def test_fit_names_every_fault_in_one_line(
    name: str, content: str | bytes, message: str, tmp_path: Path
) -> None:
    file = tmp_path / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    result = psim("fit", "--victim", "unused", "--texts", file, "--out", tmp_path / "out")
    assert_refused(result, message)
    assert len(result.stderr.strip().splitlines()) == 1
    assert str(file) in result.stderr
    assert "secret" not in result.output


def test_fit_needs_no_labels_and_minds_none(tmp_path: Path) -> None:
    """So it goes on to the next fault, that there is no victim."""
    labels = pd.Series([1, None, 0], dtype="Int64")
    frame = pd.DataFrame({"text": list("abc"), "label": labels})
    frame.to_parquet(tmp_path / "x.parquet")
    (tmp_path / "x.jsonl").write_text('{"text": "a", "label": {"yes": "no"}}\n')
    for name in ("x.parquet", "x.jsonl"):
        command = ["fit", "--victim", tmp_path / "none", "--texts", tmp_path / name]
        assert_refused(psim(*command, "--out", tmp_path / "out"), "no such folder")
    with pytest.raises(DataError, match="line 1: the label is dict, not a name or a number"):
        load_samples(str(tmp_path / "x.jsonl"))


@pytest.fixture(scope="module")
def bundle(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit_tiny(tiny_victim("bert"), tokenizer, tmp_path_factory.mktemp("files") / "bundle")


def test_every_format_is_screened_with_the_same_verdicts(bundle: Path, tmp_path: Path) -> None:
    rows = [(text, "yes") for text in some_texts(20)]
    answers = {}
    for name, write in {**FAITHFUL, "a.tsv": BLUNT["a.tsv"]}.items():
        write(rows, tmp_path / name)
        for file in (tmp_path / name, compressed(tmp_path / name, ".gz")):
            result = psim("screen", file, "--bundle", bundle)
            assert result.exit_code == 0, result.output
            found = [json.loads(line) for line in result.stdout.splitlines()]
            answers[file.name] = [(v["score"], v["poisoned"]) for v in found]
            places = [v.get("line", v.get("row")) for v in found]
            start, step = {"d.Json": (2, 4)}.get(name, (1, 1))
            start += name.casefold().endswith(("csv", "tsv"))
            array = name == "c.json"
            assert places == [1] * 20 if array else list(range(start, start + 20 * step, step))
            assert ("row" in found[0]) == (name == "h.parquet")
    assert len(answers) == 18
    for name, verdicts in answers.items():
        assert verdicts == [
            (pytest.approx(score, abs=0.02), flag) for score, flag in answers["a.jsonl"]
        ], name


def test_screening_goes_on_behind_bad_rows_and_stops_where_rows_cannot_be_told(
    bundle: Path, tmp_path: Path
) -> None:
    file = tmp_path / "x.csv"
    file.write_bytes(
        b'text,label\nfine\n"two\nlines",1\n\n ,1\na "secret",1\ncaf\xe9,1\n"fine",1\n'
    )
    result = psim("screen", file, "--bundle", bundle)
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.exit_code == 1
    assert "4 rows could not be screened" in result.stderr
    assert [v["line"] for v in found] == [2, 3, 6, 7, 8, 9]
    assert ["error" in v for v in found] == [True, False, True, True, True, False]
    assert "secret" not in result.output
    with file.open("a") as out:
        out.write('"secret "here",1\nfine,1\n')
    result = psim("screen", file, "--bundle", bundle)
    assert_refused(result, f"{file}, line 10: the quotation marks from here on do not match")
    assert len(result.stdout.splitlines()) == 6, "what came before is answered"
    file.write_text("body\nfine\n")
    assert_refused(
        psim("screen", file, "--bundle", bundle), "name the right one with --text-column"
    )
    assert_refused(psim("screen", tmp_path / "x.pdf", "--bundle", bundle), "unknown format")


def test_a_pipe_has_lines_of_json(bundle: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=('{"text": "fine"}\n' * 3,))
    writer.start()
    result = psim("screen", pipe, "--bundle", bundle)
    writer.join()
    assert result.exit_code == 0, result.output
    assert [json.loads(line)["line"] for line in result.stdout.splitlines()] == [1, 2, 3]
    with pytest.raises(DataError, match="is a pipe; give a file"):
        read_traffic(pipe, "d" * 64)
    utf16 = '{"text": "secret"}\n'.encode("utf-16")
    assert_refused(psim("screen", "-", "--bundle", bundle, stdin=utf16), "stdin is UTF-16")


def test_class_numbers_are_evaluated_as_the_names_they_stand_for(
    bundle: Path, tmp_path: Path
) -> None:
    tables = []
    for number, labels in enumerate((("LABEL_0", "LABEL_1"), ("0", "1"))):
        file, out = tmp_path / f"{number}.csv", tmp_path / f"out-{number}"
        rows = [(text, labels[i % 2]) for i, text in enumerate(some_texts(20))]
        as_text(csv_of)(rows, file)
        asked = ["--clean", file, "--poisoned", file, "--target-label", labels[1]]
        result = psim("evaluate", "--bundle", bundle, *asked, "--out", out)
        assert result.exit_code == 0, result.output
        tables.append(json.loads((out / "evaluation.json").read_text()))
    assert tables[0] == tables[1]
    file.write_text("text,label\na,0\nb,9\n")
    result = psim("evaluate", "--bundle", bundle, *asked)
    assert_refused(result, "unknown labels ['9']; the victim has ['LABEL_0', ")


TEXTS = ["plain", "=1+1", "'=1+1", "''=x", "'tis", '"quoted", \r here', "\r", "é\n", "+", None]


def test_an_audit_is_the_same_traffic_in_every_format(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"sqlite:///{tmp_path}/audit.db"
    passed = replace(ROW, decision="allow", poisoned=False, finding=None, sample_rate=0.25)
    rows = [
        replace((ROW, passed)[n % 2], id=uuid4(), time=NOW + timedelta(hours=n), text=text)
        for n, text in enumerate(TEXTS)
    ]
    with closing(AuditStore(url)) as store:
        store.migrate()
        store.insert(rows)
    lines, table = (exported(url, "--format", kind, capsys=capsys) for kind in ("jsonl", "csv"))
    (tmp_path / "x.jsonl").write_bytes(lines.encode())
    (tmp_path / "x.csv").write_bytes(table.encode())
    records = [json.loads(line) for line in lines.splitlines()]
    (tmp_path / "x.json").write_text(json.dumps(records, indent=1))
    pd.DataFrame(records).to_parquet(tmp_path / "x.parquet")
    found = {
        name: read_traffic(tmp_path / name, "d" * 64)
        for name in ("x.jsonl", "x.csv", "x.json", "x.parquet")
    }
    kept = [text for text in TEXTS if text is not None and text.strip()]
    assert list(found["x.jsonl"].kinds) == kept
    assert set(found["x.jsonl"].kinds.values()) == {Kind.PASSED, Kind.UNMARKED}
    for text, kind in found["x.jsonl"].kinds.items():
        assert found["x.jsonl"].rates[text] == (0.25 if kind is Kind.PASSED else 1)
    for name, traffic in found.items():
        assert content_of(traffic) == content_of(found["x.jsonl"]), name


def exported(url: str, *arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    export_audit(["--url", url, *arguments])
    return capsys.readouterr().out


def content_of(traffic: AuditedTraffic) -> object:
    kinds, rates = list(traffic.kinds.items()), list(traffic.rates.items())
    return kinds, rates, traffic.others, traffic.first, traffic.last


def test_what_is_left_out_is_counted(bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_text(
        "text,label\n" + "".join(f"{text},1\n" for text in some_texts(20)) + " ,1\n,0\n"
    )
    result = psim("triggers", file, "--bundle", bundle)
    assert result.exit_code == 0, result.output
    assert "2 of 22 texts are empty or missing and left out, the first in line 22" in " ".join(
        result.stderr.split()
    )


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """A compressed array that is 200 MB on one line."""
    file = tmp_path / "x.json.zst"
    row = json.dumps({"text": "x" * 1000})
    with pa.output_stream(str(file), compression="zstd") as out:
        out.write(f"[{row}".encode())
        for _ in range(200):
            out.write((f",{row}" * 1000).encode())
        out.write(b"]")
    code = (
        "import re, sys; from pathlib import Path\n"
        "from models.offline.io.samples import read_rows\n"
        "rows = sum(1 for _ in read_rows(Path(sys.argv[1]), 'text'))\n"
        "status = Path('/proc/self/status').read_text()\n"
        "print(rows, re.search(r'VmHWM:\\s*(\\d+)', status)[1])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True
    )
    rows, kilobytes = map(int, done.stdout.split())
    assert rows == 200_001
    assert kilobytes < 170_000, "what it imports takes most of it"
