"""Timer `mlflow-host-users`: read the users from the credentials parameter, so that changes of users need no restart.
This program also limits the number and the size of the files that nginx writes for logins.

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
        nginx.put_users(found)
    except StepFailed as failure:
        print(f"mlflow-host: the users stay unchanged: {failure}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
