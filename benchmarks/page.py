"""Tables and plots of the measurements, as docs/performance.md shows them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from guarded_pass import rates_at
from harness import Result, ratios, spread
from matplotlib.figure import Figure

DOCS = Path(__file__).parent.parent / "docs"
GATEWAY = "PSIM Gateway"
Rows = list[dict[str, Any]]


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def conditions(result: Result) -> str:
    """Return a line that says on what, when and with which settings something was measured."""
    setup, machine = result["setup"], result["machine"]
    used = ", ".join(f"{name} {v}" for name, v in result["versions_of_all"].items())
    warning = "**A smoke test: these figures mean nothing.** " if setup["quick"] else ""
    return (
        f"{warning}{result['at']}, {machine['processor']} ({machine['instructions']}), "
        f"{machine['cpus']} CPUs, {machine['memory_gb']} GB, "
        f"load average {machine['load_before']} before the run; "
        f"{setup['rounds']} rounds, {setup['count']} texts ({setup['texts']}), "
        f"{len(setup['server_cpus'])} CPU(s) for the measured processes; {used}; "
        f"took {result['took_s'] / 60:.0f} min."
    )


def engine_section(result: Result) -> str:
    """Return texts per second of the engine and of what it is compared with."""
    ways = list(dict.fromkeys(row["way"] for row in result["rows"]))
    lines = []
    for dtype, batch in dict.fromkeys((row["dtype"], row["batch"]) for row in result["rows"]):
        rates = rates_at(result, dtype, batch)
        compared = [ratios(rates["guarded"], rates[way]) for way in ("bare", "own unguarded")]
        lines.append(
            [
                dtype,
                str(batch),
                *(spread(rates.get(way, []), 0) for way in ways),
                *map(spread, compared),
            ]
        )
    header = ["dtype", "batch", *ways, "guarded / bare", "guarded / own unguarded"]
    return f"Engine `{result['engine']}`, texts per second.\n\n{markdown(header, lines)}"


def best(row: dict[str, Any]) -> float:
    """Return a server's throughput at saturation: the best over the numbers of connections."""
    return max(float(level["per_second"]) for level in row["levels"])


def of_peer(result: Result, peer: str, dtype: str) -> Rows:
    """Return the rounds of one server."""
    return [r for r in result["rows"] if (r["peer"], r["dtype"]) == (peer, dtype)]


def saturated(result: Result, peer: str, dtype: str) -> list[float]:
    """Return throughput at saturation by round."""
    return [best(row) for row in of_peer(result, peer, dtype)]


def short(value: float) -> str:
    """Return a number in three digits, or without decimals if it has more before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def http_section(result: Result) -> str:
    """Return throughput, times, memory and start-up by server, dtype and connections."""
    connections = [level["connections"] for row in result["rows"][:1] for level in row["levels"]]
    header = [
        "server", "dtype", "texts/s at " + " / ".join(map(str, connections)),
        "p50, ms", "p99, ms", "best, texts/s", "gateway / this server", "peak, MB", "start, s",
    ]  # fmt: skip
    lines = []
    for peer, dtype in dict.fromkeys((row["peer"], row["dtype"]) for row in result["rows"]):
        rows = of_peer(result, peer, dtype)

        def over_levels(key: str, rows: Rows = rows) -> str:
            by_level = zip(*(row["levels"] for row in rows), strict=True)
            return " / ".join(short(median(at[key] for at in level)) for level in by_level)

        own, its = saturated(result, GATEWAY, dtype), saturated(result, peer, dtype)
        guarded = " (guarded)" if peer in result["guards"] else ""
        lines.append([
            f"{peer}{guarded}, {result['packages'][peer]} {result['versions'][peer]}", dtype,
            over_levels("per_second"), over_levels("p50_ms"), over_levels("p99_ms"),
            spread(its, 0), spread(ratios(own, its)) if len(own) == len(its) else "-",
            f"{max(row['peak_mb'] for row in rows):.0f}",
            spread([row["start_s"] for row in rows], 1),
        ])  # fmt: skip
    notes = [f"- Not measured: {name}: {reason}" for name, reason in result["missing"].items()]
    failed = {
        f"{row['peer']}, {row['dtype']}, {level['connections']} connections": level["errors"]
        for row in result["rows"]
        for level in row["levels"]
        if level["errors"]
    }
    notes += [f"- Error responses by status: {at}: {n}" for at, n in failed.items()]
    about = (
        f"Engine of the gateway: `{result['engine']}`. Load generator: {result['generator']} on "
        f"{len(result['setup']['load_cpus'])} CPU of its own, {result['setup']['seconds']:.0f} s "
        "per level. Values are medians over the rounds, with minimum and maximum in parentheses."
    )
    return "\n\n".join([about, markdown(header, lines), *(["\n".join(notes)] if notes else [])])


def growth_section(result: Result) -> str:
    """Return ms per text, and guarded / bare, by layers, tokens and batch."""
    rows = result["rows"]
    cells = {(r["layers"], r["tokens"], r["batch"], r["way"]): r["seconds"] for r in rows}
    depths, batches = sorted({r["layers"] for r in rows}), sorted({r["batch"] for r in rows})

    def cell(layers: int, tokens: int, batch: int) -> str:
        guarded, bare = (cells.get((layers, tokens, batch, way)) for way in ("guarded", "bare"))
        if guarded is None or bare is None:
            return "-"
        return f"{1000 * median(guarded) / batch:.1f} ({median(ratios(guarded, bare)):.2f})"

    lines = [
        [str(tokens), *(cell(layers, tokens, batch) for layers in depths for batch in batches)]
        for tokens in sorted({r["tokens"] for r in rows})
    ]
    header = ["tokens", *(f"{layers} layers, batch {b}" for layers in depths for b in batches)]
    about = (
        f"Guarded, {result['dtype']}: ms per text, with guarded / bare time in parentheses. "
        '"-" means not measured.'
    )
    return f"{about}\n\n{markdown(header, lines)}"


def roofline_section(result: Result) -> str:
    """Return GFLOP/s, and each as a share of the best matrix product of its dtype."""
    lines = [
        [row["dtype"], row["what"], spread(row["gflops"], 0), f"{median(row['gflops']) / peak:.2f}"]
        for row in result["rows"]
        for peak in [gemm_peak(result, row["dtype"])]
    ]
    return (
        f"Engine `{result['engine']}`.\n\n"
        f"{markdown(['dtype', 'operation', 'GFLOP/s', 'share of the peak'], lines)}"
    )


def gemm_peak(result: Result, dtype: str) -> float:
    """Return the best median of the square products, in GFLOP/s."""
    rows = [r for r in result["rows"] if r["dtype"] == dtype and r["what"].startswith("GEMM")]
    return max(float(median(row["gflops"])) for row in rows)


SECTIONS: dict[str, Callable[[Result], str]] = {
    "engine": engine_section,
    "http": http_section,
    "growth": growth_section,
    "roofline": roofline_section,
}


def section(stage: str, result: Result) -> str:
    """Return a stage's tables and the conditions that it was measured under."""
    return f"{SECTIONS[stage](result)}\n\n{conditions(result)}"


Line = tuple[str, str, tuple[float, ...], bool, list[list[float]]]
"""Row, where, the target of each figure, or one of all, whether it is a lower bound, and measured
values by round."""
OWN_UNGUARDED = {"float32": (0.92, 0.97, 0.97), "bfloat16": (0.85, 0.95, 0.97)}
"""Targets at batches of 1, 8 and 32."""
BEST_PEER = {"float32": (2.5,), "bfloat16": (2.0,)}


def target_lines(found: dict[str, Result]) -> list[Line]:
    """Return what was measured of each target; see /shared/design or docs/performance.md."""
    lines: list[Line] = []
    if engine := found.get("engine"):
        lines += engine_targets(engine)
    if http := found.get("http"):
        for dtype in http["weights_mb"]:
            lines += http_targets(http, dtype)
    if roofline := found.get("roofline"):
        for dtype in dict.fromkeys(row["dtype"] for row in roofline["rows"]):
            passes = [
                [value / gemm_peak(roofline, dtype) for value in row["gflops"]]
                for row in roofline["rows"]
                if row["dtype"] == dtype and not row["what"].startswith("GEMM")
            ]
            lines.append(
                ("FLOP/s at batch 32 / GEMM peak", f"{dtype}, by length", (0.6,), True, passes)
            )
    return lines


def engine_targets(result: Result) -> list[Line]:
    """Return the targets that are about the engine alone."""
    lines: list[Line] = []
    dtypes = list(dict.fromkeys(row["dtype"] for row in result["rows"]))
    batches = list(dict.fromkeys(row["batch"] for row in result["rows"]))
    where = " / ".join(map(str, batches))
    for dtype in dtypes:
        rates = [rates_at(result, dtype, batch) for batch in batches]
        for name, below, target in (
            ("guarded / own unguarded", "own unguarded", OWN_UNGUARDED[dtype]),
            ("guarded / bare transformers", "bare", (1.15,)),
        ):
            values = [ratios(at["guarded"], at[below]) for at in rates]
            lines.append((name, f"{dtype}, batch {where}", target, True, values))
    if "float32" in dtypes:
        slow = [rates_at(result, "float32", batch)["two passes"] for batch in batches]
        fast = [rates_at(result, dtypes[-1], batch)["guarded"] for batch in batches]
        values = [ratios(a, b) for a, b in zip(fast, slow, strict=True)]
        name = f"guarded {dtypes[-1]} / transformers float32, two passes"
        lines.append((name, f"batch {where}", (4,), True, values))
    return lines


def http_targets(result: Result, dtype: str) -> list[Line]:
    """Return the targets that are about the service, in one dtype."""
    rows = of_peer(result, GATEWAY, dtype)
    if not rows:
        return []
    own = [
        o
        for o in result["own"]
        if o["dtype"] == dtype and any(o["round"] == r["round"] for r in rows)
    ]
    saturation = [best(row) for row in rows]
    lone = [row["levels"][0]["p50_ms"] / 1000 * o["1"] for row, o in zip(rows, own, strict=True)]
    paced = [row["at_70_percent"] for row in rows if row["at_70_percent"]]
    lines: list[Line] = [
        ("HTTP at saturation / engine at batch 32", dtype, (0.85,), True,
         [ratios(saturation, [o["32"] for o in own])]),
        ("p50 of a lone request / engine at batch 1", dtype, (1.25,), False, [lone]),
        ("p99 / p50 at 70 % of saturation", dtype, (4,), False,
         [[level["p99_ms"] / level["p50_ms"] for level in paced]]),
        ("resident memory over the weights, MB", dtype, (400,), False,
         [[row["peak_mb"] - result["weights_mb"][dtype] for row in rows]]),
    ]  # fmt: skip
    unguarded = [p for p in result["versions"] if p not in result["guards"]]
    peers = {p: saturated(result, p, dtype) for p in unguarded if of_peer(result, p, dtype)}
    if peers:
        name, rates = max(peers.items(), key=lambda item: median(item[1]))
        if len(rates) == len(saturation):
            where = f"{dtype}, {name} {result['versions'][name]}"
            line = "guarded over HTTP / best unguarded peer over HTTP"
            lines.insert(1, (line, where, BEST_PEER[dtype], True, [ratios(saturation, rates)]))
    return lines


def targets(found: dict[str, Result]) -> str:
    """Return the table of targets: met if the median of every figure meets it."""
    lines = []
    for name, where, bounds, at_least, values in target_lines(found):
        of_each = bounds if len(bounds) == len(values) else bounds[:1] * len(values)
        middles = [(median(v), bound) for v, bound in zip(values, of_each, strict=True) if v]
        met = all(m >= bound if at_least else m <= bound for m, bound in middles)
        verdict = "met" if met and middles else "**not met**"
        digits = 0 if bounds[0] >= 100 else 2
        lines.append([
            name, where, f"{'≥' if at_least else '≤'} {' / '.join(f'{b:g}' for b in bounds)}",
            " / ".join(spread(v, digits) for v in values), verdict,
        ])  # fmt: skip
    return markdown(["figure", "conditions", "target", "measured", "result"], lines)


def http_plot(result: Result) -> Figure:
    """Plot throughput and p99 over connections by server, in the last dtype."""
    dtype = list(result["weights_mb"])[-1]
    at = sorted({level["connections"] for row in result["rows"] for level in row["levels"]})
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for peer in result["versions"]:
        rows = of_peer(result, peer, dtype)
        if not rows:
            continue
        for axes, key in ((left, "per_second"), (right, "p99_ms")):
            by_round = [[level[key] for level in row["levels"]] for row in rows]
            middle = [median(values) for values in zip(*by_round, strict=True)]
            axes.plot(at, middle, "o-" if peer == GATEWAY else ".--", label=peer)
    left.set(title=f"throughput, {dtype}", ylabel="texts per second", ylim=(0, None))
    right.set(title=f"99th percentile, {dtype}", ylabel="ms", yscale="log")
    for axes in (left, right):
        axes.set(xscale="log", xlabel="connections")
        axes.set_xticks(at, map(str, at))
        axes.xaxis.set_tick_params(which="minor", bottom=False, labelbottom=False)
        axes.grid(alpha=0.3)
    left.legend(fontsize="small")
    return figure


def growth_plot(result: Result) -> Figure:
    """Plot ms per text, and guarded / bare, over tokens, by layers, in batches of every length."""
    rows = result["rows"]
    longest = max(r["tokens"] for r in rows)
    batch = max(r["batch"] for r in rows if r["tokens"] == longest)
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for layers in sorted({r["layers"] for r in rows}):
        chosen = [r for r in rows if (r["layers"], r["batch"]) == (layers, batch)]
        guarded, bare = (
            {r["tokens"]: r["seconds"] for r in chosen if r["way"] == way}
            for way in ("guarded", "bare")
        )
        tokens = sorted(guarded)
        times = [1000 * median(guarded[t]) / batch for t in tokens]
        (line,) = left.plot(tokens, times, "o-", label=f"{layers} layers, guarded")
        times = [1000 * median(bare[t]) / batch for t in tokens]
        left.plot(tokens, times, ".--", color=line.get_color(), label=f"{layers} layers, bare")
        right.plot(tokens, [median(ratios(guarded[t], bare[t])) for t in tokens], "o-")
    left.set(title=f"ms per text, batch {batch}, {result['dtype']}", xscale="log", yscale="log")
    right.set(title="guarded / bare time", xscale="log", ylim=(0, None))
    for axes in (left, right):
        axes.set(xlabel="tokens")
        axes.set_xticks(tokens, map(str, tokens))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    left.legend(fontsize="small")
    return figure


PLOTS: dict[str, Callable[[Result], Figure]] = {"http": http_plot, "growth": growth_plot}


def write(found: dict[str, Result], folder: Path) -> None:
    """Put tables between the markers of `folder`/performance.md, and plots into `folder`/img.

    Where there is no such page, one is made that has nothing but the tables.
    """
    parts = {"targets": targets(found)} | {s: section(s, r) for s, r in found.items()}
    images = folder / "img"
    images.mkdir(exist_ok=True)
    for stage, plot in PLOTS.items():
        if stage in found:
            file = f"performance-{stage}.png"
            plot(found[stage]).savefig(images / file, dpi=110)
            parts[stage] += f"\n\n![Plot of the table above](img/{file})"
    page = folder / "performance.md"
    if not page.exists():
        page.write_text("".join(map(marked, ("targets", *SECTIONS))))
    fill(page, "bench", parts)
    print(f"written to {page}")


def fill(page: Path, kind: str, parts: Mapping[str, str]) -> None:
    """Put parts between the markers that a page has for them."""
    text, end = page.read_text(), f"<!-- /{kind} -->"
    for name, part in parts.items():
        before, start, rest = text.partition(f"<!-- {kind}:{name} -->\n")
        if start:
            text = f"{before}{start}\n{part}\n\n{end}{rest.partition(end)[2]}"
    page.write_text(text)


def marked(name: str) -> str:
    """Return an empty place for a part of the page."""
    return f"## {name}\n\n<!-- bench:{name} -->\n<!-- /bench -->\n\n"
