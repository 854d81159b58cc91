"""follow.py proposes lists of routes and sources that the bake accepts, and prints all facts that a maintainer
needs."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from scripts.following import page, proposal
from scripts.following.page import Step

REPOSITORY = Path(__file__).parents[2]


def module(monkeypatch: pytest.MonkeyPatch, text: str, name: str) -> Any:
    made = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, made)  # dataclasses search sys.modules
    exec(compile(text, name, "exec"), made.__dict__)
    return made


@pytest.mark.parametrize(
    ("path", "reads"),
    [
        ("/api/2.0/mlflow/runs/search", True),
        ("/api/3.0/mlflow/traces/batchGetInfos", True),
        ("/api/3.0/mlflow/traces/get-online-details", True),
        ("/api/3.0/mlflow/skills/search", True),
        ("/api/3.0/mlflow/skills/<name>/search", False),
        ("/api/3.0/mlflow/skills", False),
        ("/api/3.0/mlflow/skills/searched/create", False),
        ("/gateway/query/<path:rest>", False),
        ("/api/2.0/mlflow/widgets/delete", False),
    ],
)
def test_routes_that_probably_read(path: str, reads: bool) -> None:
    assert proposal.reads(path) is reads


def test_proposed_routes_are_sorted_by_the_patched_list(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (REPOSITORY / proposal.ROUTES).read_text()
    paths = [
        "/api/9.0/mlflow/widgets/search",
        "/ajax-api/9.0/mlflow/widgets/search",
        "/api/9.0/mlflow/widgets/<path:name>/spin",
        "/odd.prefix/#spin",
    ]
    before = module(monkeypatch, text, "mlflow_host_before")
    routes = [before.Route(path, "POST") for path in paths]
    assert before.sort_posts(routes) == ([], routes)
    patched = proposal.sort_routes(text, paths, "9.0.0")
    after = module(monkeypatch, patched, "mlflow_host_after")
    # Both modules have their own class Route, so compare the routes by their fields.
    readable, unsorted = after.sort_posts([after.Route(each.path, each.method) for each in routes])
    assert (readable, unsorted) == (paths[:2], [])
    assert patched.count("widgets/search") == text.count("widgets/search") + 1, "one pattern for both prefixes"
    other = after.Route("/api/9x0/mlflow/widgets/search", "POST")
    assert after.sort_posts([other]) == ([], [other]), "a dot in a pattern matches only a dot"


def test_accepted_sources_are_compared_by_the_patched_list(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (REPOSITORY / proposal.COMPARED).read_text()
    found = module(
        monkeypatch,
        proposal.accept_sources(text, {"run.Run": "0123456789", "metric.Metric": ""}),
        "mlflow_host_compared",
    )
    before = module(monkeypatch, text, "mlflow_host_before").COMPARED
    assert found.COMPARED["run.Run"] == (*before["run.Run"], "0123456789")
    assert found.COMPARED["metric.Metric"] == (*before["metric.Metric"], "")
    assert found.COMPARED["param.Param"] == before["param.Param"]


def test_lists_that_look_otherwise_are_refused() -> None:
    with pytest.raises(proposal.ProposalError, match="no list READING_POSTS"):
        proposal.sort_routes("", ["/runs/search"], "9.0.0")
    with pytest.raises(proposal.ProposalError, match=r"no line for run\.Run"):
        proposal.accept_sources("", {"run.Run": "0123456789"})


def test_page_lists_new_features_fallbacks_and_failures(tmp_path: Path) -> None:
    def release(version: str, posts: dict[str, str], text: str, **more: Any) -> dict[str, Any]:
        source = {"run.Run": {"text": text, "hash": version}}
        given: dict[str, Any] = {"unsorted": [], "different": [], "migrations": {}, "fallbacks": [], "refused": None}
        return {"version": version, "posts": posts, "sources": source, **given, **more}

    log = tmp_path / "drill.log"
    log.write_text("1 3.9.9 lost\n")
    before = release("3.9.8", {"/gone": "def gone(): ..."}, "class Run:\n    a = 1")
    after = release(
        "3.9.9",
        {"/new/search": "def search(): ..."},
        "class Run:\n    a = 2",
        unsorted=[{"path": "/new/search", "method": "POST"}],
        different=["run.Run"],
        migrations={"abc": "add a column"},
        fallbacks=[{"what": "the fast path", "why": "run.Run differs"}],
    )
    steps = [Step("drill", "scripts/drill.py 3.9.8 3.9.9", 1, 61.2, log), Step("bench", "", None, 0, None, "no time")]
    text = page.page(before, after, steps, "+ proposed", ["A remark."])
    for expected in (
        *("# MLflow 3.9.8 → 3.9.9", "A remark.", "- the fast path: run.Run differs", "- migration `abc`: add a column"),
        *("- POST `/new/search` (unsorted)", "- gone: POST `/gone`", "| drill | exit 1 | 61 | drill.log |"),
        *("| bench | left out: no time | 0 |  |", "1 3.9.9 lost", "+ proposed", "proposed as reading", "def search()"),
        *("-    a = 1", "+    a = 2"),
    ):
        assert expected in text, expected
