"""Reports on bundles: tables of what a manifest says, for which no matplotlib is needed."""

from collections.abc import Iterator

from rich.markup import escape
from rich.table import Table

from models.bundle.layout import CARRIERS
from models.bundle.manifest import Manifest, RecalibrationRecord
from models.detection.screen import logit
from models.offline.fitting.psim import UNLEARNT

MOST_NATURAL = 0.2
"""Share of clean texts that may keep their class beside carriers without a warning."""
MOST_KEPT = 0.99
"""Kept probability that an extreme text may have to reach without a warning. After label reset, few
classifiers are surer of anything."""


def manifest_table(manifest: Manifest) -> Table:
    """Return a table of a bundle's victim, training, thresholds and warnings."""
    table = Table(show_header=False, title="PSIM bundle")
    for row in (*_training_rows(manifest), *_runtime_rows(manifest)):
        table.add_row(*row)
    table.add_row("cost", f"{manifest.fit.seconds} s, peak memory {manifest.fit.peak_memory_mb} MB")
    for warning in warnings_of(manifest):
        table.add_row("[bold red]warning[/]", warning)
    return table


def _training_rows(manifest: Manifest) -> Iterator[tuple[str, str]]:
    fit, psim = manifest.fit, manifest.psim
    yield "victim", f"{manifest.victim.name} ({manifest.victim.architecture})"
    several = " (any number of them)" if manifest.multi_label else ""
    yield "labels", ", ".join(manifest.labels) + several
    yield "reads", f"{manifest.max_length} tokens of a text"
    yield "created", fit.created
    yield "adapter", f"LoRA rank {psim.rank}, top {psim.layers} layer(s), {psim.steps} steps"
    yield "checkpoints", f"steps {', '.join(map(str, psim.checkpoints))}"
    yield "training stopped", psim.stopped_because
    if manifest.activations:
        layers = ", ".join(map(str, manifest.activations.layers))
        yield "hidden states", f"watched after layers {layers}"
    read = "of the last layer is watched" if manifest.attention else "is not watched"
    yield "attention", read
    yield (
        "clean texts",
        f"{fit.texts_train} for training, {fit.texts_stop} for stopping, "
        f"{fit.texts_calibrate} for calibration",
    )
    if test := manifest.override:
        counts = (f"{n} {label}" for n, label in zip(test.carriers, manifest.classes, strict=True))
        yield (
            "override test",
            f"carriers: {', '.join(counts)}. They are clean texts of yours, and {CARRIERS} holds "
            "them; --carriers of psim fit names others",
        )
    for known in manifest.known_triggers:
        yield (
            "known trigger",
            f"{escape(known.text)} forces {escape(known.label)}: {known.rejected} of "
            f"{known.fired} texts in which it fired were rejected when the bundle was fitted",
        )
    if traffic := manifest.recalibration:
        yield (
            "recalibrated",
            f"{traffic.created}, from bundle {traffic.parent[:12]}… on {_counts(traffic)} of "
            f"{traffic.source}, {traffic.first} to {traffic.last}",
        )


def _runtime_rows(manifest: Manifest) -> Iterator[tuple[str, str]]:
    for calibration in manifest.calibrations:
        for group in calibration.groups:
            names = " + ".join(manifest.classes[c] for c in group.classes)
            pooled = " (shared: too few texts for each class)" if len(group.classes) > 1 else ""
            low, high = group.frr_interval
            yield (
                f"threshold {calibration.runtime}",
                f"{names}{pooled}: {group.threshold:.6f}, budget {calibration.frr_budget:.1%}, "
                f"expected FRR {low:.1%}-{high:.1%} ({group.texts} texts)",
            )
        for which, tests in (("", calibration.override), ("of others ", calibration.thorough)):
            for tested in tests:
                names = " + ".join(manifest.classes[c] for c in tested.classes)
                yield (
                    f"override {which}{calibration.runtime}",
                    f"{names}: {tested.threshold:.6f}, kept from {tested.keeps:.0%}, "
                    f"{tested.natural:.1%} of clean texts are "
                    f"tested and keep their class beside carriers ({tested.texts} texts)",
                )
        parity = calibration.parity
        default = ", the default" if calibration.runtime == manifest.default.runtime else ""
        yield (
            f"parity {calibration.runtime}",
            f"{parity.decisions_agree:.2%} of decisions agree with torch/float32, "
            f"largest difference {parity.largest_difference:.1g}, "
            f"{parity.texts_per_s:.0f} texts/s{default}",
        )


def recalibration_table(record: RecalibrationRecord) -> Table:
    """Return a table of the changes that a recalibration makes."""
    table = Table(
        title="Before and after",
        caption=f"Calibrated on {_counts(record)}. Not used: {record.others} rows of other bundles "
        f"and {record.unmarked} flagged texts without a mark. If those are false alarms, the "
        "thresholds are too low.",
    )
    table.add_column("runtime, class", no_wrap=True)
    for column in (
        "threshold",
        "rise since psim fit",
        "clean texts flagged",
        "poisoned texts flagged",
    ):
        table.add_column(column, justify="right")
    for c in record.changes:
        table.add_row(
            f"{c.runtime}, {c.label}",
            f"{c.before:.3f} → {c.after:.3f}",
            f"{c.risen:+.2f}",
            f"{c.clean_flagged_before} → {c.clean_flagged_after} of {c.clean}",
            f"{c.poisoned_flagged_before} → {c.poisoned_flagged_after} of {c.poisoned}",
        )
    return table


def _counts(record: RecalibrationRecord) -> str:
    clean = f"{record.passed} texts that passed, {record.false_alarms} false alarms"
    return f"{clean} and {record.poisoned} marked poisoned"


def warnings_of(manifest: Manifest) -> list[str]:
    """Return the reasons why a bundle is a poor defence although its files are intact."""
    warnings = []
    if manifest.psim.stopped_because != UNLEARNT:
        warnings.append("PSIM has not unlearnt the task: its confidence barely separates texts")
    if manifest.activations is None:
        warnings.append("all layers are adapted, so no hidden states are watched")
    if manifest.override is None:
        warnings.append("there is no override test: whatever is extreme counts as triggered")
    elif manifest.multi_label:
        warnings.append("triggers that turn a label on are not found, only those that turn one off")
    for known in manifest.known_triggers:
        if known.rejected < known.fired:
            warnings.append(
                f"the screen lets {known.fired - known.rejected} of {known.fired} texts pass in "
                f"which {escape(known.text)} forces {escape(known.label)}: do not serve this model"
            )
    kept = {
        manifest.classes[c]
        for calibration in manifest.calibrations
        for group in calibration.thorough
        if group.natural > MOST_NATURAL
        for c in group.classes
    }
    if kept:
        warnings.append(
            f"more than {MOST_NATURAL:.0%} of clean texts of {', '.join(sorted(kept))} keep their "
            "class beside carriers: the override test can tell little of them"
        )
    if unconfirmed := sorted(_hardly_confirmed(manifest)):
        warnings.append(
            f"a text of {', '.join(unconfirmed)} has to keep more than {MOST_KEPT:.0%} of its "
            "class to be triggered, so nearly all that is extreme is found unfamiliar: set "
            "PSIM_UNFAMILIAR=reject, or fit with more clean texts"
        )
    return warnings


def _hardly_confirmed(manifest: Manifest) -> set[str]:
    """Return the classes whose triggers the override test can hardly confirm."""
    own = next(c for c in manifest.calibrations if c.runtime == manifest.default.runtime)
    extreme = {c: group.threshold for group in own.groups for c in group.classes}
    return {
        manifest.classes[c]
        for group in own.override
        for c in group.classes
        if group.threshold - extreme[c] + logit(group.keeps) > logit(MOST_KEPT)
    }
