"""Reading texts: every format the same, and every fault named without repeating a text."""

import json
from pathlib import Path

import datasets
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import DataError
from models.offline.io.samples import Sample, load_samples, require_labels, write_samples
from models.texts import MAX_CHARS

TRICKY = [
    Sample("null", "NA"),
    Sample("NA", "nan"),
    Sample('a "quoted", text\twith tabs', "1"),
    Sample("héllo 😀", "0"),
]
plain = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=50).filter(str.strip)


@given(samples=st.lists(st.builds(Sample, plain, st.none() | plain), min_size=1, max_size=20))
def test_what_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, samples: list[Sample]
) -> None:
    file = tmp_path_factory.mktemp("data") / "x.jsonl"
    write_samples(file, samples)
    assert load_samples(str(file)) == samples


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "folder"])
def test_all_formats_give_the_same_samples(kind: str, tmp_path: Path) -> None:
    frame = pd.DataFrame({"text": [s.text for s in TRICKY], "label": [s.label for s in TRICKY]})
    path = tmp_path / f"x.{kind}"
    match kind:
        case "jsonl":
            write_samples(path, TRICKY)
        case "csv":
            frame.to_csv(path, index=False)
        case "parquet":
            frame.to_parquet(path)
        case "folder":
            datasets.Dataset.from_pandas(frame).save_to_disk(path)
    assert load_samples(str(path)) == TRICKY


def test_class_names_of_a_data_set_are_its_labels(tmp_path: Path) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features).save_to_disk(
        tmp_path / "d"
    )
    assert load_samples(str(tmp_path / "d")) == [Sample("a", "yes"), Sample("b", "no")]


def test_texts_without_labels_are_none_whatever_the_format_calls_it(tmp_path: Path) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    rows = {"text": ["a", "b", "c"], "label": [-1, 1, None]}
    datasets.Dataset.from_dict(rows, features).save_to_disk(tmp_path / "d")
    (tmp_path / "x.csv").write_text("text,label\na,\nb,yes\nc,\n")
    pd.DataFrame({"text": ["a", "b", "c"], "label": [None, 1, None]}).to_parquet(
        tmp_path / "x.parquet"
    )
    for name, label in (("d", "yes"), ("x.csv", "yes"), ("x.parquet", "1")):
        expected = [Sample("a"), Sample("b", label), Sample("c")]
        assert load_samples(str(tmp_path / name)) == expected


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}')
    assert load_samples(str(tmp_path / "x.jsonl")) == [Sample("a")]


def test_labels_are_optional_and_columns_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("sentence,y\nhello,1\n")
    samples = load_samples(str(tmp_path / "x.csv"), text_column="sentence")
    assert samples == [Sample("hello", None)]
    samples = load_samples(str(tmp_path / "x.csv"), text_column="sentence", label_column="y")
    assert samples == [Sample("hello", "1")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", "", "is empty"),
        ("x.csv", "", "is empty"),
        ("x.csv", "text,label\n", "is empty"),
        ("x.jsonl", '{"text": "a"}\n{oops secret\n', "line 2: not a JSON object"),
        ("x.jsonl", '{"body": "a"}', "no column 'text'; it has .'body'"),
        (
            "x.jsonl",
            '{"text": "a"}\n{"text": "  "}',
            "1 of 2 texts are empty or missing, the first in line 2",
        ),
        ("x.jsonl", '{"text": 5}', "line 1: the text is int"),
        ("x.jsonl", json.dumps({"text": "secret" * 200_000}), f"limit is {MAX_CHARS}"),
        ("x.parquet", "secret", "cannot be read"),
        (
            "x.csv",
            "text,label\nsecret, with comma,1\n",
            "line 2: the row has 3 fields, the header 2",
        ),
        ("x.jsonl", "[" * 100_000, "line 1: not a JSON object"),
        ("x.xlsx", "secret", "unknown format"),
    ],
)
def test_faults_are_named_and_texts_are_not(
    name: str, content: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        load_samples(str(tmp_path / name))
    assert "secret" not in str(caught.value)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load_samples(str(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match="not one that `datasets` has saved"):
        load_samples(str(tmp_path))
    with pytest.raises(DataError, match="cannot be loaded"):
        load_samples("hf://nobody/nothing")


def test_labels_must_be_there_known_and_several() -> None:
    assert require_labels([Sample("a", "y"), Sample("b", "x")]) == ["x", "y"]
    for samples, message in (
        ([Sample("a", "y"), Sample("b")], "1 of 2 texts have no label"),
        ([Sample("a", "y"), Sample("b", "y")], "same label"),
        ([Sample("a", "y"), Sample("b", "z")], "unknown labels .'z'"),
    ):
        with pytest.raises(DataError, match=message):
            require_labels(samples, ["x", "y"])


def test_rows_without_a_text_can_be_left_out(tmp_path: Path) -> None:
    file = tmp_path / "some.jsonl"
    file.write_text('{"text": ""}\n{"text": "one"}\n{"text": " \\t"}\n{"text": "two"}\n')
    assert [s.text for s in load_samples(str(file), drop_empty=True)] == ["one", "two"]
    with pytest.raises(DataError, match="2 of 4 texts are empty or missing, the first in line 1"):
        load_samples(str(file))
    file.write_text('{"text": ""}\n{"text": "one"}\n{"text": 3}\n')
    with pytest.raises(DataError, match="line 3: the text is int"):
        load_samples(str(file), drop_empty=True)
    file.write_text('{"text": ""}\n')
    with pytest.raises(DataError, match="is empty"):
        load_samples(str(file), drop_empty=True)
