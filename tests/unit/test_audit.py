"""Test audit.py with a stand-in for OSV's API, which returns records in OSV's format."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from scripts import audit

# Shortened records of Debian's tracker and PyPI's advisories in OSV schema 1.7 (ossf.github.io/osv-schema).
RECORDS: list[dict[str, Any]] = [
    {
        "id": "DEBIAN-CVE-2026-1001",
        "upstream": ["CVE-2026-1001"],
        "details": "A crafted request\nreads past the end.",
        "affected": [
            {
                "package": {"name": "nginx", "ecosystem": "Debian:13"},
                "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "1.26.3-3+deb13u9"}]}],
                "versions": ["1.26.3-3"],
            },
            {
                "package": {"name": "nginx", "ecosystem": "Debian:12"},
                "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "1.22.1-9+deb12u4"}]}],
                "versions": ["1.22.1-9+deb12u3"],
                "ecosystem_specific": {"urgency": "not yet assigned"},
            },
        ],
    },
    {
        "id": "DEBIAN-CVE-2026-1002",
        "upstream": ["CVE-2026-1002"],
        "details": "No release fixes it.",
        "affected": [
            {
                "package": {"name": "nginx", "ecosystem": "Debian:12"},
                "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}]}],
                "versions": ["1.22.1-9+deb12u3"],
            }
        ],
    },
    {
        "id": "DSA-6000-1",
        "upstream": ["CVE-2026-1001", "CVE-2026-1002"],
        "summary": "nginx - security update",
        "affected": [{"package": {"name": "nginx", "ecosystem": "Debian:12"}, "versions": ["1.22.1-9+deb12u3"]}],
    },
    {
        "id": "DEBIAN-CVE-2010-4756",
        "upstream": ["CVE-2010-4756"],
        "details": "Debian classifies it as unimportant.",
        "affected": [
            {
                "package": {"name": "gcc-12", "ecosystem": "Debian:12"},
                "versions": ["12.2.0-14"],
                "ecosystem_specific": {"urgency": "unimportant"},
            }
        ],
    },
    {
        "id": "GHSA-aaaa-bbbb-cccc",
        "aliases": ["CVE-2026-2001", "PYSEC-2026-1"],
        "summary": "Path traversal",
        "affected": [
            {
                "package": {"name": "mlflow", "ecosystem": "PyPI"},
                "ranges": [
                    {"type": "GIT", "events": [{"introduced": "0"}, {"fixed": "0123456789abcdef"}]},
                    {"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "3.17.3"}]},
                ],
                "versions": ["3.17.2"],
            }
        ],
    },
    {
        "id": "PYSEC-2026-1",
        "aliases": ["CVE-2026-2001", "GHSA-aaaa-bbbb-cccc"],
        "affected": [{"package": {"name": "mlflow", "ecosystem": "PyPI"}, "versions": ["3.17.2"]}],
    },
    {
        "id": "PYSEC-2026-2",
        "withdrawn": "2026-02-01T00:00:00Z",
        "affected": [{"package": {"name": "mlflow", "ecosystem": "PyPI"}, "versions": ["3.17.2"]}],
    },
]
URLS = [
    "pkg:deb/debian/nginx-light@1.22.1-9%2Bdeb12u3?distro=debian-12&upstream=nginx",
    "pkg:deb/debian/nginx-common@1.22.1-9%2Bdeb12u3?distro=debian-12&upstream=nginx",
    "pkg:deb/debian/libstdc%2B%2B6@1%3A12.2.0-14?distro=debian-12&upstream=gcc-12%4012.2.0-14",
    "pkg:pypi/mlflow@3.17.2",
    "pkg:pypi/mlflow-host@1.0",
]


class Database(BaseHTTPRequestHandler):
    """A stand-in for OSV's /v1/querybatch and /v1/vulns/<id>. A query finds records with exactly its package and its
    version, one record per page."""

    asked: list[dict[str, Any]] = []

    def log_message(self, *_: object) -> None:
        return

    def do_POST(self) -> None:
        queries = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["queries"]
        assert self.path == "/v1/querybatch" and len(queries) <= 1000
        self.asked.extend(queries)
        self.answer({"results": [self.result(each) for each in queries]})

    def result(self, query: dict[str, Any]) -> dict[str, Any]:
        found = [
            {"id": record["id"], "modified": "2026-11-01T00:00:00Z"}
            for record in RECORDS
            for part in record["affected"]
            if part["package"] == query["package"] and query["version"] in part["versions"]
        ]
        page = int(query.get("page_token", 0))
        more = {"next_page_token": str(page + 1)} if page + 1 < len(found) else {}
        return {"vulns": found[page : page + 1], **more} if found else {}

    def do_GET(self) -> None:
        [record] = [each for each in RECORDS if f"/v1/vulns/{each['id']}" == self.path]
        self.answer(record)

    def answer(self, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def database() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Database)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    Database.asked.clear()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def bill(tmp_path: Path) -> Path:
    return bill_of(tmp_path, URLS)


def bill_of(folder: Path, urls: list[str]) -> Path:
    path = folder / "sbom.cdx.json"
    components = [{"name": url.partition("@")[0].rpartition("/")[2], "purl": url} for url in urls]
    path.write_text(json.dumps({"bomFormat": "CycloneDX", "components": components}))
    return path


def test_each_vulnerability_is_listed_once_with_its_fixed_version(
    database: str, bill: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert audit.main([str(bill), "--json", "--database", database]) == 1
    said = capsys.readouterr()
    found = {each["vulnerability"]: each for each in json.loads(said.out)}
    assert {name: (each["package"], each["fixed_in"]) for name, each in found.items()} == {
        "CVE-2026-1001": ("nginx", ["1.22.1-9+deb12u4"]),
        "CVE-2026-1002": ("nginx", []),
        "CVE-2026-2001": ("mlflow", ["3.17.3"]),
    }
    assert found["CVE-2026-1001"]["summary"] == "A crafted request reads past the end."
    assert said.err == "audit: 2 of 3 packages have 3 known vulnerabilities\n"


def test_option_fixed_lists_only_vulnerabilities_with_a_fix(
    database: str, bill: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert audit.main([str(bill), "--fixed", "--database", database]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [" ".join(line.split()[:4]) for line in lines] == [
        "nginx 1.22.1-9+deb12u3 CVE-2026-1001 1.22.1-9+deb12u4",
        "mlflow 3.17.2 CVE-2026-2001 3.17.3",
    ]


def test_no_known_vulnerability_exits_with_0(database: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bill = bill_of(tmp_path, ["pkg:pypi/mlflow@3.18.0", "pkg:deb/debian/gcc-12@12.2.0-14?distro=debian-12"])
    assert audit.main([str(bill), "--database", database]) == 0
    assert capsys.readouterr() == ("", "audit: 0 of 2 packages have 0 known vulnerabilities\n")


def test_queries_contain_only_names_and_versions(database: str, bill: Path) -> None:
    audit.main([str(bill), "--database", database])
    assert {key for each in Database.asked for key in each} == {"package", "version", "page_token"}
    assert {each["package"]["name"] for each in Database.asked} == {"nginx", "gcc-12", "mlflow"}


@pytest.mark.parametrize(
    ("url", "package"),
    [
        ("pkg:pypi/mlflow@3.17.2", audit.Package("mlflow", "3.17.2", "PyPI")),
        ("pkg:deb/debian/a@1%3A2%2Bb?distro=debian-12", audit.Package("a", "1:2+b", "Debian:12")),
        ("pkg:deb/ubuntu/a@1?distro=ubuntu-24.04&upstream=b", audit.Package("b", "1", "Ubuntu:24.04:LTS")),
        ("pkg:deb/ubuntu/a@1?distro=ubuntu-25.04", audit.Package("a", "1", "Ubuntu:25.04")),
        ("pkg:deb/ubuntu/a@1?distro=ubuntu-24.10", audit.Package("a", "1", "Ubuntu:24.10")),
        ("pkg:deb/debian/a@1?distro=debian-13&upstream=b%2B%2B%402%2B3", audit.Package("b++", "2+3", "Debian:13")),
    ],
)
def test_package_url_becomes_osv_name_and_ecosystem(url: str, package: audit.Package) -> None:
    assert audit.package_of(url) == package


def test_unreachable_database_is_one_error_sentence(bill: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{closed.getsockname()[1]}"
        assert audit.main([str(bill), "--database", f"http://{where}"]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert said.err.startswith(f"audit: nothing was looked up: {where} is unreachable (")


def test_invalid_response_is_one_error_sentence(
    database: str, bill: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Database, "answer", lambda self, content: self.send_error(502))
    assert audit.main([str(bill), "--database", database]) == 2
    monkeypatch.setattr(Database, "answer", lambda self, content: self.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n<html>"))
    assert audit.main([str(bill), "--database", database]) == 2
    monkeypatch.setattr(Database, "answer", lambda self, _: self.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n5"))
    assert audit.main([str(bill), "--database", database]) == 2
    monkeypatch.setattr(Database, "answer", lambda self, _: self.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n{}"))
    assert audit.main([str(bill), "--database", database]) == 2
    assert capsys.readouterr().err.count("audit: nothing was looked up: ") == 4


@pytest.mark.parametrize("content", ["", "5", "{}", '{"components": [{"name": "a", "purl": "pkg:npm/a@1"}]}'])
def test_invalid_bill_of_materials_is_refused(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    assert audit.main([str(path)]) == 2
    assert capsys.readouterr().err == f"audit: {path} is not a bill of materials of an image of this project\n"
    assert audit.main([str(tmp_path / "gone.json")]) == 2
    assert "No such file" in capsys.readouterr().err


def test_default_is_the_newest_bill_of_materials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(audit, "BUILDS", tmp_path)
    assert audit.main([]) == 2
    assert "has no bill of materials, because no image was baked here yet" in capsys.readouterr().err
    for name in ("20261121t000000z-1", "20261122t000000z-1"):
        (tmp_path / name).mkdir()
        bill_of(tmp_path / name, URLS)
    assert audit.newest_bill().parent.name == "20261122t000000z-1"


def test_invalid_database_url_is_one_error_sentence(bill: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert audit.main([str(bill), "--database", "mirror"]) == 2
    assert capsys.readouterr().err.startswith("audit: nothing was looked up: the response of mirror/v1/querybatch ")
