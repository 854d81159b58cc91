r"""MLflow's check of artifact paths, with status 400 for paths that make MLflow fail with 500.

Such paths cannot be decoded (`http://[x`, `%2525…41` with ten levels). `..\x` is refused too, because an object store
may interpret it as a path outside the folder.
"""

from __future__ import annotations

import re
from collections.abc import Callable

Check = Callable[[str], str]


def strict(check: Check) -> Check:
    from mlflow.exceptions import MlflowException

    def validate_path_is_safe(path: str) -> str:
        try:
            safe = check(path)
        except ValueError as error:
            raise MlflowException.invalid_parameter_value(f"Invalid path '{path[:200]}': {error}") from None
        if ".." in re.split(r"[/\\]", safe):
            raise MlflowException.invalid_parameter_value(
                f"Invalid path '{safe[:200]}': '..' must not stand between slashes or backslashes"
            )
        return safe

    return validate_path_is_safe
