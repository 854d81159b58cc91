"""Convert errors of the object store (S3) to MLflow's exceptions, with a status for the client and the remedy.

The message of a StoreError contains S3's own message. The status is S3's own status, except for these errors:

- Temporary errors become 503, because MLflow's clients retry 503, but not S3's 400, 403 or 409. Temporary errors are
  throttling, timeouts, a wrong clock, expired keys, a conflict of two writers, no response, and 5xx (but not 501).
- 401 and errors about the server's own keys become 403. A 401 would tell the client that its own login is wrong.
- 3xx and errors about a wrong region become 400, because clients must not follow S3's redirect. If botocore rejects the
  parameters of a request and does not send it, the error also becomes 400.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from boto3.exceptions import Boto3Error
from botocore.exceptions import BotoCoreError, ClientError, ParamValidationError
from mlflow.exceptions import MlflowException
from mlflow.protos import databricks_pb2

RETRYABLE = {
    "BandwidthLimitExceeded",
    "Busy",
    "ConditionalRequestConflict",
    "ExpiredToken",
    "OperationAborted",
    "PriorRequestNotComplete",
    "RequestLimitExceeded",
    "RequestThrottled",
    "RequestTimeTooSkewed",
    "RequestTimeout",
    "RequestTimeoutException",
    "SlowDown",
    "TemporaryRedirect",
    "Throttling",
    "ThrottlingException",
    "TokenRefreshRequired",
    "TooManyRequestsException",
}
"""S3's codes for temporary errors. S3 may return these codes with a status for which MLflow's clients do not retry."""

WRONG_REGION = {"AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect", "Redirect"}

REMEDIES = {
    "EntityTooLarge": "S3 allows at most 5 TiB: split the file.",
    "KeyTooLongError": "S3 allows at most 1,024 bytes of folders and name: use shorter names or fewer folders.",
    "NoSuchUpload": "Start the upload again.",
    "RequestTimeTooSkewed": "The server's clock is wrong: ask its administrator to check chrony.",
}
NO_ACCESS = "Ask the server's administrator to give its role access to the bucket and its key."
NO_BUCKET = "Ask the server's administrator to name buckets that exist."
OTHER_REGION = "Ask the server's administrator to start it in the bucket's region."
LATER = "Try again later."

ERROR_CODES = {
    400: databricks_pb2.INVALID_PARAMETER_VALUE,
    403: databricks_pb2.PERMISSION_DENIED,
    404: databricks_pb2.RESOURCE_DOES_NOT_EXIST,
    409: databricks_pb2.RESOURCE_CONFLICT,
    501: databricks_pb2.NOT_IMPLEMENTED,
    503: databricks_pb2.TEMPORARILY_UNAVAILABLE,
}

logger = logging.getLogger(__name__)


class StoreError(MlflowException):
    """An error of the object store. `status` is the HTTP status for the client."""

    def __init__(self, message: str, status: int) -> None:
        self.status = status
        super().__init__(message, error_code=ERROR_CODES.get(status, databricks_pb2.BAD_REQUEST))

    def get_http_status_code(self) -> int:
        return self.status


@contextmanager
def explained() -> Iterator[None]:
    """Convert any error of boto3 to StoreError, even if MLflow has wrapped the error in an MlflowException.

    This function is a context manager and a decorator."""
    try:
        yield
    except (BotoCoreError, ClientError, Boto3Error, MlflowException) as error:
        cause = error
        if isinstance(error, MlflowException):
            if error.__suppress_context__ or not isinstance(error.__context__, (BotoCoreError, ClientError)):
                raise
            cause = error.__context__
        told = explain(cause)
        if told.status in (403, 503) or NO_BUCKET in told.message or OTHER_REGION in told.message:
            logger.warning("The object store: %s", told.message)
        raise told from None
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise StoreError("A name in this path has more than 255 bytes: no file can have it.", 400) from error


def explain(error: Exception) -> StoreError:
    if isinstance(error, Boto3Error):  # an error of a multipart transfer, which contains the actual error
        inner = getattr(error, "last_exception", None) or error.__cause__ or error.__context__
        return explain(inner) if isinstance(inner, (BotoCoreError, ClientError)) else no_answer(error)
    if isinstance(error, ParamValidationError):
        return StoreError(" ".join(str(error).split()), 400)
    if not isinstance(error, ClientError):
        return no_answer(error)
    code = error.response["Error"].get("Code", "")
    if is_missing(error):
        return StoreError("No such artifact", 404)
    status = status_of(code, error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500))
    said = error.response["Error"].get("Message", "").strip().rstrip(".") or "no reason given"
    return StoreError(f"S3 refuses this: {said} ({code}). {remedy(code, status)}".rstrip(), status)


def no_answer(error: Exception) -> StoreError:
    sentence = " ".join(str(error).split()).rstrip(".")
    return StoreError(f"The server got no answer from S3: {sentence} ({type(error).__name__}). {LATER}", 503)


def status_of(code: str, status: int) -> int:
    """Return the status for the client. The arguments are S3's error code and status."""
    if code in RETRYABLE or status == 429 or (status >= 500 and status != 501):
        return 503
    if code in WRONG_REGION or 300 <= status < 400:
        return 400
    if code == "InvalidToken" or status == 401:
        return 403
    return status if status >= 400 else 503


def remedy(code: str, status: int) -> str:
    if code in REMEDIES:
        return REMEDIES[code]
    if code in WRONG_REGION or code.startswith("3"):
        return OTHER_REGION
    if code == "NoSuchBucket":
        return NO_BUCKET
    return {403: NO_ACCESS, 503: LATER}.get(status, "")


def is_missing(error: Exception) -> bool:
    """Return true if the object does not exist. If the request was HEAD, the error's code is the status, "404"."""
    return isinstance(error, ClientError) and error.response["Error"].get("Code") in ("NoSuchKey", "404")
