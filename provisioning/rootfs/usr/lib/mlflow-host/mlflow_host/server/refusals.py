"""Return 400 and a sentence for requests that PostgreSQL or Python cannot process; MLflow would return 500.

- Text with a NUL character or half a surrogate pair, which PostgreSQL cannot store. The statement fails and nothing is
  written. MLflow would write a part of a batch first, so batches are checked before.
- Page tokens that are base64 of JSON, but not a token.

Clients retry 500 for minutes, and none of these ever succeeds.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from sqlalchemy.engine import ExceptionContext


def install(flask: Any) -> None:
    """Refuse requests to MLflow's Flask application that PostgreSQL cannot store."""
    flask.before_request(refuse_batch)


def refuse_batch() -> Any:
    """Flask's before_request hook: a response to a batch with a NUL character in parameters or tags, else None."""
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
    """The places in JSON where a text has a NUL character: `tags[0].value`."""
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
"""PostgreSQL's error codes (SQLSTATE) of statements that exceeded a limit."""


def too_dear(error: BaseException) -> str | None:
    """A sentence for a statement that exceeded a limit of PostgreSQL; None for any other error."""
    reason = TOO_DEAR.get(getattr(error, "pgcode", None) or "")
    return f"{reason}: narrow it, or ask for fewer results at once." if reason else None


def refuse_text(context: ExceptionContext) -> None:
    """SQLAlchemy's error hook. Raises MlflowException if psycopg2 could not encode a text, which is not an error of
    PostgreSQL, and if the statement exceeded a limit: MLflow would return 503, and clients would retry."""
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
    """MLflow's parser of page tokens, with its 400 for every token that it cannot parse."""
    from mlflow.exceptions import MlflowException

    def parsed(_: object, page_token: Any) -> Any:
        try:
            found = parse(page_token)
            offset = getattr(found, "offset", found)
            if type(offset) is int:
                return found
        except MlflowException:
            raise
        except Exception:  # any error is caused by the token
            pass
        raise invalid(f"Invalid page token {page_token!r}: send the next_page_token of the previous answer, or none.")

    return classmethod(parsed)


def invalid(message: str) -> Exception:
    from mlflow.exceptions import MlflowException

    error: Exception = MlflowException.invalid_parameter_value(message)
    return error
