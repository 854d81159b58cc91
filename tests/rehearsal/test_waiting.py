"""Who waits for the server is told why nothing comes."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from rehearsal import boot
from rehearsal.errors import BootFailed


def test_a_domain_that_cannot_be_resolved_here_is_told_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody_knows(*_: Any, **__: Any) -> list[Any]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nobody_knows)
    said: list[str] = []
    url = "https://mlflow.example.test"
    with pytest.raises(BootFailed, match=r"within 2 s; last heard: mlflow\.example\.test cannot be resolved here"):
        boot.wait(url, "admin", "secret", seconds=2.2, say=said.append, alive=lambda: "running")
    assert len(said) == 1 and "/etc/hosts" in said[0]
