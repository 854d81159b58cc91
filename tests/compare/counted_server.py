"""Run `mlflow_host.server.process` and log each request to an endpoint of the fast path. The log shows whether the fast
path answered the request or passed it to MLflow.

    python counted_server.py FILE --socket PATH
"""

from __future__ import annotations

import sys
from pathlib import Path

from mlflow_host.server import process
from mlflow_host.server.fast_path import app
from mlflow_host.server.fast_path.store import DirectStore
from mlflow_host.server.flask_shortcut import Scope


def main() -> int:
    answer_or_none = app.answer_or_none
    with Path(sys.argv[1]).open("a", buffering=1) as counted:

        def counting(answer: app.Handler, store: DirectStore, scope: Scope, body: bytes) -> tuple[int, bytes] | None:
            found = answer_or_none(answer, store, scope, body)
            path = scope["path"].partition("/mlflow/")[2]
            counted.write(f"{path} {'passed on' if found is None else 'answered'}\n")
            return found

        app.answer_or_none = counting
        return process.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
