"""A script that waits for the server prints why the server does not respond."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from scripts.rehearsal import boot_wait
from scripts.rehearsal.errors import BootFailed


def test_unresolvable_domain_is_reported_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody_knows(*_: Any, **__: Any) -> list[Any]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nobody_knows)
    said: list[str] = []
    url = "https://mlflow.example.test"
    with pytest.raises(BootFailed, match=r"within 2 s; last response: mlflow\.example\.test cannot be resolved here"):
        boot_wait.wait(url, "admin", "secret", seconds=2.2, say=said.append, alive=lambda: "running")
    assert len(said) == 1 and "/etc/hosts" in said[0]
