"""From JSON lines to tables, plots and the README."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import model, shapes
from benchmarks.runner import gpu_slug

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
PORTABLE = "<!-- portable:begin -->", "<!-- portable:end -->"
NAMES = {"ours": "flash_mla", "flashmla": "FlashMLA", "fa3": "FlashAttention-3", "triton": "Triton backend"}
_COLORS = {"ours": "#0b6e4f", "flashmla": "#d1495b", "fa3": "#3a6ea5"}

Record = dict[str, Any]


def latest(folder: Path) -> dict[str, list[Record]]:
    """GPU -> its newest record of every shape, in the order of the named groups."""
    found: dict[str, dict[str, Record]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            if line.strip():
                record = json.loads(line)
                found.setdefault(gpu_slug(record["gpu"]), {})[record["shape"]["name"]] = record
    order = {shape.name: index for index, shape in enumerate(shapes.GROUPS["all"])}
    return {
        gpu: sorted(records.values(), key=lambda record: order.get(record["shape"]["name"], len(order)))
        for gpu, records in found.items()
    }


def tables(records: dict[str, list[Record]], gpu: str | None = None) -> str:
    """One table per GPU, with a line above it that says on what it was measured."""
    parts = [
        f"{caption(made)}\n\n{table(made)}" for name, made in sorted(records.items()) if gpu is None or name == gpu
    ]
    return "\n\n".join(parts) if parts else "no results"


def caption(records: list[Record]) -> str:
    """GPU, ceilings, versions and commits behind `records`."""
    last = max(records, key=lambda record: record["date"])
    commits = ", ".join(sorted({record["commit"] for record in records}))
    ceilings = last["ceilings"]
    gathering = [record for record in records if record["ceilings"].get("gather_gbps")]
    gather = max(gathering, key=lambda record: record["date"])["ceilings"]["gather_gbps"] if gathering else {}
    rows = [f", gather of {size}-byte rows {gbps / 1e3:.3g} TB/s" for size, gbps in sorted(gather.items())]
    return (
        f"{last['gpu']}, CUDA {last['cuda']}, torch {last['torch']}, {last['date'][:10]}, commit {commits}; measured "
        f"ceilings: GEMM {ceilings['gemm_tflops']:.3g} TFLOPS, streaming read {ceilings['read_gbps'] / 1e3:.3g} TB/s"
        f"{''.join(rows)}"
    )


def table(records: list[Record]) -> str:
    """A Markdown table of `records`, one shape per row; a second one for the CPU time of a call, if there."""
    labels = _labels(records)
    measured = [record for record in records if record["kind"] == "shape"]
    parts = []
    if measured:
        head = ["shape", "time (us)", "TFLOPS", "GB/s", "of the floor", *(NAMES.get(x, x) for x in labels), "goal"]
        parts.append(markdown(head, [_row(record, labels) for record in measured]))
    host = [record for record in records if record["kind"] == "host"]
    if host:
        head = ["CPU time of one eager call (us)", NAMES["ours"], *(NAMES.get(x, x) for x in labels)]
        rows = [[r["shape"]["name"], _us(r), *(_us(r["peers"].get(x)) for x in labels)] for r in host]
        parts.append(markdown(head, rows))
    return "\n\n".join(parts)


def _labels(records: list[Record]) -> list[str]:
    return list(dict.fromkeys(label for record in records for label in record["peers"]))


def _row(record: Record, labels: list[str]) -> list[str]:
    name = record["shape"]["name"]
    peers = [_us(record["peers"].get(label)) for label in labels]
    if record["time_us"] is None:
        outcome = "not served" if record.get("not_served") else "failed"
        reason = f"{outcome}: {record['error'].removeprefix('NotServed: ')}".replace("|", "/")
        return [name, reason[:120], "-", "-", "-", *peers, _goal(record)]
    share = f"{100 * record['share_of_floor']:.0f} % ({record['bound']})"
    return [
        name,
        _us(record),
        f"{record['tflops']:.0f}" if record["tflops"] >= 10 else f"{record['tflops']:.2g}",
        f"{record['gbps']:.0f}",
        share,
        *peers,
        _goal(record),
    ]


def _us(entry: Record | None) -> str:
    if entry is None:
        return "-"
    if entry["time_us"] is None:
        return "not served" if entry.get("not_served") else "failed"
    text = f"{entry['time_us']:.0f}" if entry["time_us"] >= 100 else f"{entry['time_us']:.1f}"
    return f"{text} ({entry['ratio']:.2f}x)" if entry.get("ratio") else text


def speedup(record: Record) -> float | None:
    """How many times as fast as the faster peer (other builds of ours do not count); None without a peer."""
    ratios = [peer["ratio"] for peer in record["peers"].values() if peer["ratio"] and not peer.get("baseline")]
    return min(ratios) if ratios else None


def _goal(record: Record) -> str:
    goal = record["shape"]["goals"].get(gpu_slug(record["gpu"]))
    if goal is None:
        return ""
    reached = speedup(record)
    if reached is None:
        return f"{goal:.2f}x"
    return f"{goal:.2f}x {'met' if reached >= goal else f'missed ({reached:.2f}x)'}"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table; all columns but the first to the right."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]

    def line(cells: list[str]) -> str:
        padded = [
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = [("-" * width if index == 0 else "-" * (width - 1) + ":") for index, width in enumerate(widths)]
    return "\n".join([line(head), line(rule), *(line(row) for row in rows)])


def fill_readme(readme: Path, text: str, markers: tuple[str, str] = (BEGIN, END)) -> bool:
    """Puts `text` between two markers of `readme`; False where it has no such markers."""
    if not readme.is_file():
        return False
    content = readme.read_text()
    before, begin, rest = content.partition(markers[0])
    _, end, after = rest.partition(markers[1])
    if not begin or not end:
        return False
    readme.write_text(f"{before}{begin}\n{text.strip()}\n{end}{after}")
    return True


def portable(results: Path, notes: Path) -> str:
    """What the portable backend was measured to do, per GPU, and the model of other cards; put into `notes` too."""
    parts = []
    for made in latest(results).values():
        head, rows = model.rows(made)
        if rows:
            parts.append(f"{caption(made)}\n\n{markdown(head, rows)}")
    text = "\n\n".join(parts) if parts else "no results"
    fill_readme(notes, text, PORTABLE)
    return text


def _without_baselines(record: Record) -> Record:
    """Older builds of ours are for whoever tunes; what is published compares with the peers."""
    return {**record, "peers": {name: peer for name, peer in record["peers"].items() if not peer.get("baseline")}}


def plot(results: Path, plots: Path, readme: Path) -> int:
    """Draws the plots, and fills the README with the tables of the goal shapes and the plots."""
    records = latest(results)
    records = {gpu: [_without_baselines(record) for record in of_gpu] for gpu, of_gpu in records.items()}
    if not records:
        print(f"no results in {results}", file=sys.stderr)
        return 1
    plots.mkdir(parents=True, exist_ok=True)
    images = draw(records, plots)
    filled = fill_readme(readme, readme_text(records, images, readme.resolve().parent))
    print("\n".join(str(image) for image in images.values()))
    print(f"{readme}: {'filled' if filled else 'has no markers, left alone'}")
    return 0


def readme_text(records: dict[str, list[Record]], images: dict[str, Path], root: Path) -> str:
    """Tables of the goal shapes and the host cost, and the images by relative path."""
    goals = {shape.name for shape in (*shapes.GOALS, *shapes.SPARSE)}
    shown = {
        gpu: [record for record in made if record["kind"] == "host" or record["shape"]["name"] in goals]
        for gpu, made in records.items()
    }
    parts = [tables({gpu: made for gpu, made in shown.items() if made})]
    for title, image in images.items():
        path = image.resolve()
        parts.append(f"![{title}]({(path.relative_to(root) if path.is_relative_to(root) else path).as_posix()})")
    return "\n\n".join(parts)


def draw(records: dict[str, list[Record]], plots: Path) -> dict[str, Path]:
    """Writes the plots; title -> file. A plot without data is not written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    images: dict[str, Path] = {}
    drawings = {
        "Time against length": ("time_vs_length.png", _draw_time),
        "Share of the roofline against length and heads": ("share_of_roofline.png", _draw_share),
        "Speed against the peers": ("peers.png", lambda *data: _draw_peers(*data, shapes.GOALS)),
        "Sparse decode: speed against the peers": (
            "sparse_peers.png",
            lambda *data: _draw_peers(*data, shapes.SPARSE),
        ),
        "Prefill: speed against the peers": (
            "prefill_peers.png",
            lambda *data: _draw_peers(*data, [*shapes.SPARSE_PREFILL, *shapes.DENSE_PREFILL]),
        ),
        "Sparse decode: throughput against batch size": ("sparse_throughput.png", _draw_throughput),
    }
    for title, (name, drawing) in drawings.items():
        figure = drawing(pyplot, records)
        if figure is not None:
            figure.savefig(plots / name, dpi=130, bbox_inches="tight", metadata={"Software": None})
            pyplot.close(figure)
            images[title] = plots / name
    return images


def _family(records: list[Record], names: list[str]) -> list[Record]:
    wanted = set(names)
    return [r for r in records if r["kind"] == "shape" and r["shape"]["name"] in wanted and r["time_us"]]


def _by_length(records: list[Record], s_q: int) -> list[Record]:
    names = [shape.name for shape in shapes.GOALS if shape.h_q == 128 and shape.b == 128 and shape.s_q == s_q]
    return sorted(_family(records, names), key=lambda record: record["shape"]["length"])


def _by_heads(records: list[Record]) -> list[Record]:
    return sorted(_family(records, [s.name for s in shapes.HEADS]), key=lambda record: record["shape"]["h_q"])


def _series(records: list[Record]) -> dict[str, list[tuple[Record, float]]]:
    """Label -> (record, time) for ours and every peer that answered."""
    series: dict[str, list[tuple[Record, float]]] = {"ours": [(r, r["time_us"]) for r in records]}
    for label in _labels(records):
        times = [(r, r["peers"][label]["time_us"]) for r in records if label in r["peers"]]
        series[label] = [(record, time) for record, time in times if time]
    return {label: points for label, points in series.items() if points}


def _line(axes: Any, label: str, x: list[float], y: list[float]) -> None:
    axes.plot(x, y, marker="o", markersize=4, color=_COLORS.get(label), label=NAMES.get(label, label))


def _ticks(axes: Any, values: list[int], labels: list[str], title: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, labels)
    axes.minorticks_off()
    axes.set_xlabel(title)
    axes.grid(alpha=0.3)


def _draw_time(pyplot: Any, records: dict[str, list[Record]]) -> Any:
    from matplotlib import ticker

    panels = [(gpu, s_q) for gpu in sorted(records) for s_q in (1, 2) if len(_by_length(records[gpu], s_q)) > 1]
    if not panels:
        return None
    figure, axes_list = _grid(pyplot, len(panels), columns=2, width=4.4, height=3.2)
    for axes, (gpu, s_q) in zip(axes_list, panels, strict=True):
        family = _by_length(records[gpu], s_q)
        for label, points in _series(family).items():
            _line(axes, label, [r["shape"]["length"] for r, _ in points], [time for _, time in points])
        lengths = [record["shape"]["length"] for record in family]
        axes.plot(lengths, [r["floor_us"] for r in family], "k--", linewidth=1, label="floor")
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        _ticks(axes, lengths, [f"{length // 1024}k" for length in lengths], "keys per request (mean)")
        axes.set_title(f"{gpu.upper()}, b128, h128, s_q {s_q}")
        axes.set_ylabel("time (us)")
    axes_list[0].legend(frameon=False)
    figure.tight_layout()
    return figure


def _grid(pyplot: Any, count: int, columns: int, width: float, height: float) -> tuple[Any, list[Any]]:
    columns = min(columns, count)
    lines = -(-count // columns)
    figure, grid = pyplot.subplots(lines, columns, figsize=(width * columns, height * lines), squeeze=False)
    for axes in grid.flat[count:]:
        axes.axis("off")
    return figure, list(grid.flat[:count])


def _draw_share(pyplot: Any, records: dict[str, list[Record]]) -> Any:
    panels: list[tuple[str, list[Record], str]] = []
    for gpu in sorted(records):
        for s_q in (1, 2):
            panels.append((f"{gpu.upper()}, b128, h128, s_q {s_q}", _by_length(records[gpu], s_q), "length"))
        panels.append((f"{gpu.upper()}, b128, s_q 1, 4k", _by_heads(records[gpu]), "h_q"))
    panels = [panel for panel in panels if len(panel[1]) > 1]
    if not panels:
        return None
    figure, axes_list = _grid(pyplot, len(panels), columns=3, width=3.6, height=3.0)
    for axes, (title, family, key) in zip(axes_list, panels, strict=True):
        for label, points in _series(family).items():
            shares = [100 * record["floor_us"] / time for record, time in points]
            _line(axes, label, [r["shape"][key] for r, _ in points], shares)
        values = [record["shape"][key] for record in family]
        names = [f"{value // 1024}k" for value in values] if key == "length" else [str(value) for value in values]
        _ticks(axes, values, names, "keys per request (mean)" if key == "length" else "query heads")
        axes.set_ylim(0, 105)
        axes.set_title(title)
        axes.set_ylabel("% of the floor")
    axes_list[0].legend(frameon=False, loc="lower right")
    figure.tight_layout()
    return figure


def _draw_throughput(pyplot: Any, records: dict[str, list[Record]]) -> Any:
    """TFLOPS against the batch size, a panel for each call that several batch sizes were measured of."""
    families: dict[str, list[str]] = {}
    for shape in shapes.SPARSE:
        family, batch, rest = shape.name.rpartition("_b")
        if batch and rest.isdigit():
            families.setdefault(family, []).append(shape.name)
    panels = [
        (gpu, family, sorted(measured, key=lambda record: record["shape"]["b"]))
        for gpu in sorted(records)
        for family, names in families.items()
        if len(measured := _family(records[gpu], names)) > 1
    ]
    if not panels:
        return None
    figure, axes_list = _grid(pyplot, len(panels), columns=3, width=3.6, height=3.0)
    for axes, (gpu, family, measured) in zip(axes_list, panels, strict=True):
        for label, points in _series(measured).items():
            _line(axes, label, [r["shape"]["b"] for r, _ in points], [r["flop"] / time * 1e-6 for r, time in points])
        batches = [record["shape"]["b"] for record in measured]
        floor = [record["flop"] / record["floor_us"] * 1e-6 for record in measured]
        axes.plot(batches, floor, "k--", linewidth=1, label="floor")
        _ticks(axes, batches, [str(batch) for batch in batches], "requests")
        axes.set_ylim(bottom=0)
        axes.set_title(f"{gpu.upper()}, {family.removeprefix('sparse_')}")
        axes.set_ylabel("TFLOPS")
    axes_list[0].legend(frameon=False)
    figure.tight_layout()
    return figure


def _draw_peers(pyplot: Any, records: dict[str, list[Record]], goal_shapes: list[Any]) -> Any:
    families = {gpu: _family(made, [shape.name for shape in goal_shapes]) for gpu, made in sorted(records.items())}
    families = {gpu: family for gpu, family in families.items() if any(speedup(r) for r in family)}
    if not families:
        return None
    tallest = max(len(family) for family in families.values())
    figure, grid = pyplot.subplots(1, len(families), figsize=(5.5 * len(families), 0.36 * tallest + 1.2), squeeze=False)
    for axes, (gpu, family) in zip(grid[0], families.items(), strict=True):
        labels = [label for label in _labels(family) if label in NAMES]
        height = 0.8 / max(len(labels), 1)
        for index, label in enumerate(labels):
            bars = [(row, r["peers"].get(label, {}).get("ratio")) for row, r in enumerate(family)]
            bars = [(row + height * (index - (len(labels) - 1) / 2), ratio) for row, ratio in bars if ratio]
            axes.barh(
                [row for row, _ in bars],
                [ratio for _, ratio in bars],
                height,
                color=_COLORS.get(label),
                label=f"over {NAMES[label]}",
            )
        goals = [(row, r["shape"]["goals"].get(gpu)) for row, r in enumerate(family)]
        goals = [(row, goal) for row, goal in goals if goal]
        axes.scatter([g for _, g in goals], [row for row, _ in goals], marker="|", s=120, color="black", label="goal")
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(family)), [record["shape"]["name"] for record in family])
        axes.set_ylim(len(family) - 0.4, -0.6)
        axes.set_xlabel("times as fast")
        axes.set_title(gpu.upper())
        axes.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    handles, names = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(names), frameon=False)
    return figure
