"""Steps are done once per inputs, and never half."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.offline.study.cache import MemoizedFunction, StepCache, digest_of


def test_a_step_is_done_once(tmp_path: Path) -> None:
    calls: list[Path] = []

    def make(folder: Path) -> object:
        calls.append(folder)
        (folder / "file").write_text("x")
        return {"n": len(calls)}

    store = StepCache(tmp_path)
    first, again = store.step("kind", {"a": 1}, make), store.step("kind", {"a": 1}, make)
    assert first == again
    assert first.result == {"n": 1}
    assert (first.folder / "file").is_file()
    assert store.step("kind", {"a": 2}, make).result == {"n": 2}
    assert store.step("other", {"a": 1}, make).result == {"n": 3}


def test_what_a_step_took_is_known_ever_after(tmp_path: Path) -> None:
    store = StepCache(tmp_path)
    store.step("slow", {}, lambda folder: time.sleep(0.2))
    store.step("fast", {}, lambda folder: None)
    slow, fast = store.seconds.values()
    assert fast < 0.2 <= slow
    later = StepCache(tmp_path)
    later.step("slow", {}, lambda folder: None)
    later.step("slow", {}, lambda folder: None)
    assert list(later.seconds.values()) == [slow]


def test_an_interrupted_step_goes_on_in_its_folder(tmp_path: Path) -> None:
    store = StepCache(tmp_path)

    def broken(folder: Path) -> object:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.step("kind", {}, broken)
    step = store.step("kind", {}, lambda folder: (folder / "half").read_text())
    assert step.result == "x"


def test_what_was_said_of_a_text_is_remembered(tmp_path: Path) -> None:
    asked: list[str] = []

    def shout(text: str) -> str:
        asked.append(text)
        return text.upper() + "\n\u2028"

    memo = MemoizedFunction(tmp_path / "folder" / "memo.jsonl", shout)
    assert [memo(t) for t in ("a", "b\n", "a")] == ["A\n\u2028", "B\n\n\u2028", "A\n\u2028"]
    again = MemoizedFunction(tmp_path / "folder" / "memo.jsonl", shout)
    assert again("b\n") == "B\n\n\u2028"
    assert asked == ["a", "b\n"]


def test_processes_take_turns_at_a_step(tmp_path: Path) -> None:
    """Two threads, each with a store of its own, are two to the lock of the file system."""
    inside, most = 0, 0

    def make(folder: Path) -> object:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.2)
        inside -= 1
        return "x"

    with ThreadPoolExecutor(4) as pool:
        steps = [pool.submit(StepCache(tmp_path).step, "kind", {}, make) for _ in range(4)]
        assert {step.result().result for step in steps} == {"x"}
    assert most == 1


json = st.recursive(
    st.none() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(json, json)
def test_digests_differ_iff_contents_do(a: object, b: object) -> None:
    assert (digest_of(a) == digest_of(b)) == (a == b)
