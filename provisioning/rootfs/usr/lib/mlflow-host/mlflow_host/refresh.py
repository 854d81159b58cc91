"""Run by a timer: fetch the credentials again, so that people are added and removed without a restart.

What cannot be fetched or read leaves everybody as they were, and says so in the journal.
"""

from __future__ import annotations

import sys

from mlflow_host import config, credentials, web
from mlflow_host.status import StepFailed


def main() -> int:
    try:
        found = credentials.fetch(config.load().launch, lambda message: None, patience=0)
        if web.put_users(found):
            web.reload()
    except StepFailed as failure:
        print(f"mlflow-host: users stay as they are: {failure}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
