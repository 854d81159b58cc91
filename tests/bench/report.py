"""Format the results of the benchmark as tables in Markdown and as a plot."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

BASELINE = "tutorial"


def markdown(results: dict[str, Any]) -> str:
    machine = results["machine"]
    lines = [
        "# Measured",
        "",
        f"MLflow {results['mlflow']}, Python {results['python']}, {machine['cores']} cores shared with the clients, "
        f"{results['when']}, by `{results['command']}`: "
        f"medians of {results['rounds']} rounds of {results['seconds']:g} s.",
        "",
        *(f"- **{name}**: {what}" for name, what in results["contenders"].items()),
        "- **floor**: the same rows written by psycopg2, the same bytes moved by boto3",
        "",
        *promises(results["goals"]),
        *speed(results),
        *memory(results["memory_mb"]),
        *artifacts(results["artifacts"]),
        *growth(results["growth"]),
        *launches(results.get("launches")),
    ]
    return "\n".join(lines) + "\n"


def brief(results: dict[str, Any]) -> str:
    """Return the README's tables: requests per second of `tutorial` and `ours` with their ratio, and the promises."""
    found = {(one["operation"], one["clients"], one["contender"]): one["per_second"] for one in results["turns"]}
    operations = list(dict.fromkeys(operation for operation, _, _ in found))
    counts = sorted({clients for _, clients, _ in found})

    def compared(operation: str, clients: int) -> str:
        theirs, ours = (found.get((operation, clients, name)) for name in (BASELINE, "ours"))
        if not theirs or not ours:
            return ""
        digits = 0 if ours >= 100 else 1
        return f"{theirs:.{digits}f} → {ours:.{digits}f} **×{ours / theirs:.1f}**"

    header = ["requests/s", *(f"{clients} client{'s' if clients > 1 else ''}" for clients in counts)]
    rows = [[operation, *(compared(operation, clients) for clients in counts)] for operation in operations]
    return "\n".join([*table(header, rows), "", *promises(results["goals"])[2:]]) + "\n"


def promises(goals: list[dict[str, Any]]) -> list[str]:
    rows = [[goal["promise"], f"{goal['measured']:g}", "yes" if goal["met"] else "**no**"] for goal in goals]
    return ["## Promises", "", *table(["promise", "measured", "kept"], rows), ""] if rows else []


def speed(results: dict[str, Any]) -> list[str]:
    cases: dict[int, dict[str, dict[str, dict[str, Any]]]] = {}
    for turn in results["turns"]:
        cases.setdefault(turn["clients"], {}).setdefault(turn["operation"], {})[turn["contender"]] = turn
    lines = []
    for clients, operations in cases.items():
        names = [
            name for name in (*results["contenders"], "floor") if any(name in found for found in operations.values())
        ]
        header = ["requests/s (p50, p99 ms)", *names]
        rows = []
        for operation, found in operations.items():
            rows.append([operation, *(cell(found.get(name), found.get(BASELINE)) for name in names)])
        plural = "client" if clients == 1 else "clients"
        lines += [f"## {clients} {plural}", "", *table(header, rows), ""]
    return lines


def cell(turn: dict[str, Any] | None, baseline: dict[str, Any] | None) -> str:
    if turn is None:
        return ""
    ratio = ""
    if baseline and baseline is not turn and baseline["per_second"]:
        ratio = f" **×{turn['per_second'] / baseline['per_second']:.1f}**"
    errors = f", {turn['errors']} errors" if turn["errors"] else ""
    digits = 0 if turn["per_second"] >= 100 else 1
    return f"{turn['per_second']:.{digits}f}{ratio} ({turn['p50']:.0f}, {turn['p99']:.0f}{errors})"


def memory(found: dict[str, dict[str, float]]) -> list[str]:
    rows = [[name, f"{mb['at rest']:.0f}", f"{mb['under load']:.0f}"] for name, mb in found.items()]
    return ["## Memory of the server, MB (PSS)", "", *table(["", "at rest", "after the load"], rows), ""]


def artifacts(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    shown = [
        [row["load"], row["contender"], f"{row['up']:.1f}", f"{row['down']:.1f}", f"{row['growth_mb']:.0f}"]
        for row in rows
    ]
    header = ["files", "", "up, MB/s", "down, MB/s", "server's memory grows by, MB"]
    return ["## Artifacts", "", *table(header, shown), ""]


def growth(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    shown = [[f"{row['rows']:,}", row["operation"], row["contender"], f"{row['p50']:.1f}"] for row in rows]
    return ["## Growth", "", *table(["rows in metrics", "operation", "", "p50, ms"], shown), ""]


def launches(found: dict[str, Any] | None) -> list[str]:
    if not found:
        return []
    named = {
        "bake": "bake",
        "launch": "launch: RunInstances to the first authenticated 200",
        "swap": "another image of the same schema: outage",
    }
    rows = [
        [what, f"{statistics.median(found[key]):.1f}", str(len(found[key]))]
        for key, what in named.items()
        if found[key]
    ]
    return ["## On the local cloud", "", *table(["", "median, s", "of"], rows), ""]


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def plot(results: dict[str, Any], path: Path) -> None:
    """Plot requests per second relative to `tutorial`, by operation and number of clients."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = {(turn["operation"], turn["clients"], turn["contender"]): turn["per_second"] for turn in results["turns"]}
    ratios = {
        (operation, clients): rate / found[operation, clients, BASELINE]
        for (operation, clients, contender), rate in found.items()
        if contender == "ours" and found.get((operation, clients, BASELINE))
    }
    if not ratios:
        return
    operations = list(dict.fromkeys(operation for operation, _ in ratios))
    counts = sorted({clients for _, clients in ratios})
    figure, axes = plt.subplots(figsize=(9, 0.6 * len(operations) + 1.8))
    height = 0.8 / len(counts)
    for position, clients in enumerate(counts):
        places = [row + height * (position - (len(counts) - 1) / 2) for row in range(len(operations))]
        values = [ratios.get((operation, clients), 0) for operation in operations]
        bars = axes.barh(places, values, height, label=f"{clients} client{'s' if clients > 1 else ''}")
        axes.bar_label(bars, fmt="×%.1f", padding=3, fontsize=8)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(operations)), operations)
    axes.invert_yaxis()
    axes.set_xlabel("requests per second, times those of a default mlflow server behind nginx")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)
