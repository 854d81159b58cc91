r"""Change MLflow's check of artifact paths: the server returns 400 instead of 500 for paths that MLflow cannot decode.

Examples of such paths are `http://[x`, and `%2525…41` with ten levels of encoding. The changed check also rejects
`..\x`, because an object store may interpret this path as outside the folder.
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
                f"Invalid path '{safe[:200]}': no part between slashes or backslashes may be '..'"
            )
        return safe

    return validate_path_is_safe
