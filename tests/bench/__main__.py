"""Benchmark: compare this project's server with a default `mlflow server` on the same machine, as ratios.

    make bench                                    everything
    .venv/bin/python -m tests.bench --quick                 each operation briefly, three minutes
    .venv/bin/python -m tests.bench --only log-metric --clients 1 8 64

Each contender has its own PostgreSQL and nginx. All contenders are started first. One contender is measured at a time,
while the other contenders are suspended. Each operation has several rounds. The contenders alternate within each round,
so that other load on the machine affects all of them. The report compares the medians of the rounds. Trust the ratios,
not the absolute figures.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scripts.interrupts import exit_with
from tests.bench import environments, floor, load, report, transfers
from tests.bench.contenders import BY_DEFAULT, CONTENDERS, Contender, alone, memory_mb
from tests.support import services

BASELINE, OURS, FLOOR = "tutorial", "ours", "floor"
OURS_ONE_ARENA = "ours, MALLOC_ARENA_MAX=1"
"""The label of transfers by a client with MALLOC_ARENA_MAX=1, which the README recommends for large downloads."""

MOST_FOR_BASIC_AUTH = 8
"""The maximum number of concurrent clients of the contender basic-auth, which has one round only. With more clients, a
turn takes minutes and gives no new result."""

MOST_ROUNDS_OF_FILES = 5


@dataclass(frozen=True)
class Turn:
    """The medians over the rounds of one contender and one operation. Latencies are in milliseconds."""

    operation: str
    clients: int
    contender: str
    per_second: float
    p50: float
    p99: float
    errors: int
    first_error: str = ""


def main() -> int:
    options = arguments()
    say("creating the contenders' environments")
    environments.image(), environments.tutorial()
    with tempfile.TemporaryDirectory(prefix="mlflow-bench-", dir=options.folder) as name:
        folder = Path(name)
        folder.chmod(0o755)
        results = measure(folder, options)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    text = report.markdown(results)
    (options.out / "report.md").write_text(text)
    (options.out / "readme.md").write_text(report.brief(results))
    report.plot(results, options.out / "ratios.png")
    say(f"written: {options.out}/report.md, results.json, ratios.png")
    print(json.dumps(results["goals"]) if options.json else text)
    return 0


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    with contextlib.ExitStack() as stack:
        say("starting the object store")
        store = stack.enter_context(services.object_store(folder / "object-store", https=True))
        contenders: list[Contender] = []
        memory: dict[str, dict[str, float]] = {}
        for name in options.contenders:
            say(f"starting {name}")
            (folder / name).mkdir(mode=0o755)
            contender = stack.enter_context(CONTENDERS[name](folder / name, store))
            contenders.append(contender)
        for contender in contenders:
            memory[contender.name] = {"at rest": memory_mb(contender.processes())}
        turns = take_turns(contenders, options)
        for contender in contenders:
            memory[contender.name]["under load"] = memory_mb(contender.processes())
        login = login_cost(contenders, options) if turns else []
        moved = move_files(contenders, store, folder, options) if options.artifacts else []
        growth = grow(contenders, options) if options.growth else []
        return summary(contenders, turns, memory, moved, growth, login, options)


def take_turns(contenders: list[Contender], options: argparse.Namespace) -> list[Turn]:
    names = [name for name in load.OPERATIONS if any(wanted in name for wanted in options.only)]
    cases = [(operation, clients) for operation in names for clients in options.clients]
    found: dict[tuple[str, int, str], list[load.Measured]] = {}
    for contender in contenders:
        with alone(contender, contenders):
            for operation in names:
                load.run(contender.target, operation, contender.data, 2, 1.0)
    total = options.rounds * len(cases)
    for number, (operation, clients) in enumerate(case for _ in range(options.rounds) for case in cases):
        shown = []
        first_round = number < len(cases)
        taking_part = [
            each for each in contenders if each.name != "basic-auth" or (first_round and clients <= MOST_FOR_BASIC_AUTH)
        ]
        order = taking_part if number % 2 else taking_part[::-1]
        for contender in order:
            with alone(contender, contenders):
                measured = load.run(contender.target, operation, contender.data, clients, options.seconds)
            found.setdefault((operation, clients, contender.name), []).append(measured)
            shown.append(f"{contender.name} {measured.per_second:.1f}/s")
        if operation in floor.OPERATIONS:
            with alone(contenders[-1], contenders):
                last = contenders[-1]
                measured = floor.run(last.cluster, operation, last.data, clients, min(options.seconds, 1.0))
            found.setdefault((operation, clients, FLOOR), []).append(measured)
        say(f"{number + 1}/{total} {operation}, {clients} clients: {', '.join(sorted(shown))}")
    return [turn(*case, rounds) for case, rounds in found.items()]


def turn(operation: str, clients: int, contender: str, rounds: list[load.Measured]) -> Turn:
    def median(values: list[float]) -> float:
        return statistics.median(values)

    errors = [error for measured in rounds for error in measured.errors]
    return Turn(
        operation,
        clients,
        contender,
        median([measured.per_second for measured in rounds]),
        median([measured.percentile(0.5) for measured in rounds]),
        median([measured.percentile(0.99) for measured in rounds]),
        len(errors),
        errors[0] if errors else "",
    )


def login_cost(contenders: list[Contender], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the median latency (p50) of a request for a run, alternately with a login and without a login, on one
    server."""
    rows = []
    for contender in contenders:
        if contender.unguarded is None:
            continue
        for clients in (1, 8):
            found: dict[str, list[float]] = {"with": [], "without": []}
            with alone(contender, contenders):
                for _ in range(1 if options.quick else 7):
                    for way, target in (("with", contender.target), ("without", contender.unguarded)):
                        measured = load.run(target, "get run", contender.data, clients, min(options.seconds, 2.0))
                        found[way].append(measured.percentile(0.5))
            row = {way: statistics.median(values) for way, values in found.items()}
            rows.append({"clients": clients, **row})
            say(f"login, {clients} clients: p50 {row['with']:.2f} ms, without {row['without']:.2f} ms")
    return rows


def launches(folder: Path) -> dict[str, Any]:
    """Return the last results of `python -m tests.bench.bake_and_launch`, or {} if there are none."""
    measured = folder / "bake_and_launch.json"
    return {"launches": json.loads(measured.read_text())} if measured.exists() else {}


def move_files(
    contenders: list[Contender], store: services.ObjectStore, folder: Path, options: argparse.Namespace
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    contenders = [each for each in contenders if each.name != "basic-auth"]
    named: dict[str, tuple[Contender, dict[str, str]]] = {each.name: (each, {}) for each in contenders}
    if OURS in named:
        named[OURS_ONE_ARENA] = (named[OURS][0], {"MALLOC_ARENA_MAX": "1"})
    (folder / "files").mkdir()
    loads = transfers.QUICK_LOADS if options.quick else transfers.LOADS
    for wanted in [each for each in loads if any(text in each.name for text in options.files)]:
        files = transfers.make_files(wanted, folder / "files")
        rounds: dict[str, list[transfers.Moved]] = {name: [] for name in (*named, FLOOR)}
        for number in range(min(options.rounds, MOST_ROUNDS_OF_FILES)):
            for name in list(rounds)[:: 1 if number % 2 else -1]:
                os.sync()  # so that pending writes of one contender do not slow the next contender
                contender, settings = named.get(name, (contenders[-1], {}))
                with alone(contender, contenders):
                    if name == FLOOR:
                        moved = transfers.move_directly(store, wanted, files, folder)
                    else:
                        moved = transfers.move(contender, store, wanted, files, folder, settings)
                rounds[name].append(moved)
                say(f"{wanted.name}: {name} {moved.up:.1f}↑ {moved.down:.1f}↓ MB/s")
        for name, turns in rounds.items():
            row = {key: statistics.median(asdict(one)[key] for one in turns) for key in ("up", "down", "growth_mb")}
            rows.append({"load": wanted.name, "contender": name, **row})
    return rows


def grow(contenders: list[Contender], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure some operations while the number of rows in `metrics` grows."""
    rows, contenders = [], [each for each in contenders if each.name != "basic-auth"]
    for target in (10_000, 100_000, 1_000_000):
        for contender in contenders:
            run = contender.data.runs[-1]
            ((present,),) = contender.cluster.execute(
                f"select count(*) from metrics where run_uuid = '{run}' and key = 'growing'", "mlflow"
            )
            contender.cluster.execute(
                "insert into metrics (key, value, timestamp, step, is_nan, run_uuid) "
                f"select 'growing', random(), n, n, false, '{run}' from generate_series({present}, {target - 1}) n",
                "mlflow",
            )
            contender.cluster.execute("vacuum analyze metrics", "mlflow")
            with alone(contender, contenders):
                for operation in ("log-metric", "get run", "search in 1,000 runs"):
                    measured = load.run(contender.target, operation, contender.data, 1, options.seconds)
                    rows.append(
                        {
                            "rows": target,
                            "contender": contender.name,
                            "operation": operation,
                            "p50": measured.percentile(0.5),
                        }
                    )
        say(f"grown to {target:,} metric rows")
    return rows


def summary(
    contenders: list[Contender],
    turns: list[Turn],
    memory: dict[str, dict[str, float]],
    moved: list[dict[str, Any]],
    growth: list[dict[str, Any]],
    login: list[dict[str, Any]],
    options: argparse.Namespace,
) -> dict[str, Any]:
    from mlflow_host.contract.sizing import this_machine

    results: dict[str, Any] = {
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": "python -m tests.bench " + " ".join(sys.argv[1:]),
        "machine": asdict(this_machine()),
        "mlflow": environments.mlflow_version(),
        "python": environments.python_version(),
        "rounds": options.rounds,
        "seconds": options.seconds,
        "contenders": {contender.name: contender.what for contender in contenders},
        "turns": [asdict(one) for one in turns],
        "memory_mb": memory,
        "artifacts": moved,
        "growth": growth,
        "login": login,
    }
    results |= launches(options.out)
    results["goals"] = goals(results)
    return results


def goals(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return each promise of issue 5 that was measured, with the measured value and whether the promise is met."""
    by_case: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for one in results["turns"]:
        by_case.setdefault((one["operation"], one["clients"]), {})[one["contender"]] = one
    pairs = {case: found for case, found in by_case.items() if {BASELINE, OURS} <= found.keys()}
    kept = []

    def goal(promise: str, measured: float, met: bool) -> None:
        kept.append({"promise": promise, "measured": round(measured, 2), "met": met})

    for clients, promise in ((8, 2.5), (1, 4.0)):
        ratios = [
            found[OURS]["per_second"] / max(found[BASELINE]["per_second"], 1e-9)
            for case, found in pairs.items()
            if case[1] == clients
        ]
        if ratios:
            mean = math.exp(statistics.fmean(map(math.log, ratios)))
            goal(f"requests per second at {clients} client(s), geometric mean: ≥ {promise}×", mean, mean >= promise)
            if clients == 8:
                goal("requests per second at 8 clients, worst operation: ≥ 1.5×", min(ratios), min(ratios) >= 1.5)
    many = [found for case, found in pairs.items() if case[1] == 64]
    if many:
        errors = sum(found[OURS]["errors"] for found in many)
        goal("errors at 64 clients: none", errors, errors == 0)
    if pairs:
        worst = max(found[OURS]["p99"] / found[BASELINE]["p99"] for found in pairs.values())
        goal("p99, worst case of all: no worse than 1×", worst, worst <= 1)
    memory = results["memory_mb"]
    if {BASELINE, OURS} <= memory.keys():
        share = memory[OURS]["at rest"] / memory[BASELINE]["at rest"]
        goal("memory at rest: ≤ 0.3×", share, share <= 0.3)
    for row in results["login"]:
        cost = row["with"] / row["without"]
        goal(f"login at {row['clients']} client(s), p50 divided by p50 without a login: ≤ 1.05×", cost, cost <= 1.05)
    large = {row["contender"]: row for row in results["artifacts"] if row["load"] == "1 GB"}
    if {OURS, FLOOR} <= large.keys():
        for name, client in ((OURS, ""), (OURS_ONE_ARENA, ", by a client with MALLOC_ARENA_MAX=1")):
            slower = min(large[name][way] / large[FLOOR][way] for way in ("up", "down"))
            goal(f"1 GB up and down{client}: ≥ 0.8× a direct S3 client", slower, slower >= 0.8)
        growth = large[OURS]["growth_mb"]
        goal("server memory meanwhile: grows by < 64 MB", growth, growth < 64)
    for what, seconds in (("launch", 10), ("swap", 15)):
        if took := results.get("launches", {}).get(what):
            goal(
                f"{what} on the local cloud: ≤ {seconds} s", statistics.median(took), statistics.median(took) <= seconds
            )
    return kept


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds per operation (3)")
    parser.add_argument("--seconds", type=float, default=2.5, help="length of a turn (2.5)")
    parser.add_argument(
        "--clients", type=int, nargs="+", default=[1, 8, 16, 64], help="numbers of concurrent clients (1 8 16 64)"
    )
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="TEXT", help="only operations whose name contains this text"
    )
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(BY_DEFAULT))
    parser.add_argument(
        "--files", nargs="+", default=[""], metavar="TEXT", help="only file transfers whose name contains this text"
    )
    parser.add_argument("--no-artifacts", dest="artifacts", action="store_false", help="skip the file transfers")
    parser.add_argument("--no-growth", dest="growth", action="store_false", help="skip the growing table of metrics")
    parser.add_argument("--quick", action="store_true", help="one round of 2 s, 1 and 8 clients, small files")
    parser.add_argument("--out", type=Path, default=Path("build/bench"), help="folder of the report (build/bench)")
    parser.add_argument("--folder", type=Path, default=None, help="folder of temporary databases and files (/tmp)")
    parser.add_argument("--json", action="store_true", help="print the promises as JSON instead of the tables")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.seconds, options.clients = 1, 2.0, [1, 8]
        options.contenders = [name for name in options.contenders if name != "basic-auth"]
        options.growth = False
    return options


def say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    exit_with(main, say, (RuntimeError,))
