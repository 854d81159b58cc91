"""Timer `mlflow-host-users`: read the credentials parameter again, so that user changes need no restart. It also limits
the number of files that nginx writes for logins.

If the parameter cannot be read or is invalid, the users stay unchanged, and the journal has the reason.
"""

from __future__ import annotations

import sys

from mlflow_host.machine import config, nginx, parameters
from mlflow_host.machine.status import StepFailed


def main() -> int:
    nginx.prune_markers()
    try:
        found = parameters.fetch(config.load().launch, lambda message: None, patience=0)
        if nginx.put_users(found):
            nginx.reload()
    except StepFailed as failure:
        print(f"mlflow-host: users stay as they are: {failure}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
