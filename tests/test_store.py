"""Steps are done once per inputs, and never half."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.offline.store import Store, digest_of


def test_a_step_is_done_once(tmp_path: Path) -> None:
    calls: list[Path] = []

    def make(folder: Path) -> object:
        calls.append(folder)
        (folder / "file").write_text("x")
        return {"n": len(calls)}

    store = Store(tmp_path)
    first, again = store.step("kind", {"a": 1}, make), store.step("kind", {"a": 1}, make)
    assert first == again
    assert first.result == {"n": 1}
    assert (first.folder / "file").is_file()
    assert store.step("kind", {"a": 2}, make).result == {"n": 2}
    assert store.step("other", {"a": 1}, make).result == {"n": 3}


def test_an_interrupted_step_goes_on_in_its_folder(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def broken(folder: Path) -> object:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.step("kind", {}, broken)
    step = store.step("kind", {}, lambda folder: (folder / "half").read_text())
    assert step.result == "x"


json = st.recursive(
    st.none() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(json, json)
def test_digests_differ_iff_contents_do(a: object, b: object) -> None:
    assert (digest_of(a) == digest_of(b)) == (a == b)
