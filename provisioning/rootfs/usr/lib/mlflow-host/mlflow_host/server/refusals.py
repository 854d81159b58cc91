"""Return 400 with a message for requests that PostgreSQL or Python cannot process. MLflow itself would return 500.

- PostgreSQL cannot store text with a NUL character or with half of a surrogate pair. An SQL statement that contains
  such a text fails and writes nothing. This module checks a log-batch request before MLflow executes the first SQL
  statement of the request, because MLflow would otherwise write a part of the batch.
- A client may send a page token that is valid base64 and valid JSON, but not one of MLflow's page tokens.

After status 500, MLflow's clients repeat a request for minutes, but the requests that this module refuses cannot
succeed.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from sqlalchemy.engine import ExceptionContext


def install(flask: Any) -> None:
    """Make MLflow's Flask application reject batches with text that PostgreSQL cannot store."""
    flask.before_request(refuse_batch)


def refuse_batch() -> Any:
    """Flask's before_request hook: return 400 for a batch with a NUL character in parameters or tags, else None."""
    from flask import Response, request

    if not request.path.endswith("/runs/log-batch") or b"\\u0000" not in request.get_data():
        return None
    try:
        batch = json.loads(request.get_data())
        where = next(with_nul({name: batch[name] for name in ("params", "tags") if name in batch}), None)
    except Exception:  # MLflow reports the error
        return None
    if where is None:
        return None
    error: Any = invalid(
        f"The text of {where} contains a NUL character (U+0000), which PostgreSQL cannot store: remove it."
    )
    return Response(error.serialize_as_json(), error.get_http_status_code(), mimetype="application/json")


def with_nul(found: Any, where: str = "") -> Iterator[str]:
    """Yield the places in JSON that contain text with a NUL character, for example `tags[0].value`."""
    if isinstance(found, str) and "\0" in found:
        yield where
    elif isinstance(found, list):
        for number, member in enumerate(found):
            yield from with_nul(member, f"{where}[{number}]")
    elif isinstance(found, dict):
        for name, value in found.items():
            yield from with_nul(value, f"{where}.{name}" if where else name)


TOO_DEAR = {
    "57014": "A query of this request took longer than the server allows",
    "53200": "A query of this request needs more memory than the server allows",
    "54001": "A query of this request is too complex",
}
"""Error messages for PostgreSQL's error codes (SQLSTATE) that mean that a statement exceeded a limit."""


def too_dear(error: BaseException) -> str | None:
    """Return an error message if PostgreSQL cancelled a statement because of a limit, or None for any other error."""
    reason = TOO_DEAR.get(getattr(error, "pgcode", None) or "")
    return f"{reason}: use a narrower filter, or request fewer results at once." if reason else None


def refuse_text(context: ExceptionContext) -> None:
    """SQLAlchemy's error hook. Raises MlflowException (400) if psycopg2 cannot encode a text, or if a statement
    exceeded a limit. Without the hook, MLflow would return 500 or 503, and clients would repeat the request."""
    error = context.original_exception
    if sentence := too_dear(error):
        raise invalid(sentence)
    if isinstance(error, UnicodeEncodeError):
        raise invalid(
            "A text of this request contains half of a surrogate pair (U+D800 to U+DFFF), which PostgreSQL cannot "
            "store: remove it."
        )
    if isinstance(error, ValueError) and "NUL" in str(error):
        raise invalid(
            "A text of this request contains a NUL character (U+0000), which PostgreSQL cannot store: remove it."
        )


def strict_page_token(parse: Any) -> Any:
    """Return a wrapper for MLflow's parser of page tokens. The wrapper returns status 400 for every invalid token."""
    from mlflow.exceptions import MlflowException

    def parsed(_: object, page_token: Any) -> Any:
        try:
            found = parse(page_token)
            offset = getattr(found, "offset", found)
            if type(offset) is int:
                return found
        except MlflowException:
            raise
        except Exception:  # the parser fails only if the token is wrong
            pass
        raise invalid(f"Invalid page token {page_token!r}: send the next_page_token of the previous answer, or none.")

    return classmethod(parsed)


def invalid(message: str) -> Exception:
    from mlflow.exceptions import MlflowException

    error: Exception = MlflowException.invalid_parameter_value(message)
    return error
