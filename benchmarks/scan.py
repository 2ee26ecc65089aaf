"""How often `psim scan` finds a planted trigger, and how often it accuses a clean class.

    python benchmarks/scan.py victims.jsonl [--words 1500 --read 3d movie this] [--texts 4000]

A line of `victims.jsonl` is {"victim": FOLDER, "texts": FILE, "kind": "word", "target": LABEL};
"kind" is "clean" and "target" null where nothing was planted. Paths are relative to the file. With
`--words`, that many random words of the vocabulary are read, and those of `--read`; with `--texts`,
so many random texts of the file are given.
"""

import argparse
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from models.offline.io.classifiers import load_classifier
from models.offline.io.samples import load_samples
from models.offline.scanning.report import ScanReport
from models.offline.scanning.scan import scan
from models.offline.scanning.words import candidates
from models.offline.statistics import clopper_pearson


def main() -> None:
    """Scan all victims; print a row for each, and the rates."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("victims", type=Path)
    parser.add_argument("--words", type=int)
    parser.add_argument("--read", nargs="*", default=[])
    parser.add_argument("--texts", type=int)
    asked = parser.parse_args()
    counts: dict[str, Counter[bool]] = {}
    print("| victim | planted | found | clean classes accused | seconds |\n|---|---|---|---|---|")
    for line in asked.victims.read_text().splitlines():
        row = json.loads(line)
        report = scanned(asked.victims.parent, row, asked.words, asked.read, asked.texts)
        for what, outcome in outcomes(report, row):
            counts.setdefault(what, Counter())[outcome] += 1
        found = dict(report.found).get(row["target"], "-")
        accused = [f"{label}: {text}" for label, text in report.found if label != row["target"]]
        name = f"{row['victim']}, {row['kind']}"
        cells = (
            name,
            row["target"] or "-",
            found,
            ", ".join(accused) or "-",
            report.search.seconds,
        )
        print(f"| {' | '.join(map(str, cells))} |", flush=True)
    for what, counted in counts.items():
        low, high = clopper_pearson(counted[True], counted.total())
        print(
            f"{what}: {counted[True]} of {counted.total()} ({100 * low:.0f} to {100 * high:.0f} %)"
        )


def scanned(
    folder: Path, row: dict[str, str], number: int | None, read: list[str], most_texts: int | None
) -> ScanReport:
    """Scan the victim of a row: the whole vocabulary, or a random part of it and some words."""
    samples = load_samples(str(folder / row["texts"]), label_column=None, drop_empty=True)
    victim, tokenizer = load_classifier(str(folder / row["victim"]))
    words = candidates(tokenizer, 0)[:number]
    if number is not None:
        words = list(dict.fromkeys([*words, *(tokenizer.vocab[word] for word in read)]))
    texts = [sample.text for sample in samples]
    random.Random(0).shuffle(texts)
    texts = texts[:most_texts]
    return scan(victim, tokenizer, texts, name=row["victim"], words=words)


def outcomes(report: ScanReport, row: dict[str, str]) -> Iterator[tuple[str, bool]]:
    """Yield what is counted, and whether it happened."""
    found = {label for label, _ in report.found}
    if row["target"]:
        yield f"{row['kind']} found", row["target"] in found
    else:
        yield "clean victim accused", bool(found)
    for own in report.classes:
        if own.label != row["target"]:
            yield "clean class accused", own.label in found


if __name__ == "__main__":
    main()
