"""What a store's failure means: one sentence for people, and whether it may pass."""

from __future__ import annotations

import errno
import os
import random
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from batchinfer.connectors.types import StorageError, TransientStorageError

T = TypeVar("T")

ATTEMPTS = 4
FIRST_DELAY_SECONDS = 0.2

_TRANSIENT_CODES = {"SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "Throttling"}
_TRANSIENT_STATUS = {408, 409, 425, 429, 500, 502, 503, 504}
_TRANSIENT_ERRNO = {
    errno.EBUSY,
    errno.EAGAIN,
    errno.EINTR,
    errno.ESTALE,
    errno.EREMOTEIO,
    errno.ECONNRESET,
    errno.ETIMEDOUT,
}
# The libraries below the stores are optional, so their exceptions are known by name.
_NO_CREDENTIALS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "TokenRetrievalError",
    "ProfileNotFound",
    "DefaultCredentialsError",
    "ClientAuthenticationError",
}
_CONNECTION = {
    "ConnectionError",
    "TimeoutError",
    "FSTimeoutError",
    "HTTPClientError",
    "ClientError",
    "ResponseParserError",
    "ServiceRequestError",
    "ServiceResponseError",
}
# An answer whose body ended early; its cause may carry a status of the library's own.
_CUT_SHORT = {"ClientPayloadError", "IncompleteReadError", "ResponseStreamingError"}
_BAD_REGION = {"PermanentRedirect", "IllegalLocationConstraintException", "AuthorizationHeaderMalformed"}


class AlreadyExists(StorageError):
    """The store refused a conditional create: the object is there."""


def empty_object(uri: str) -> StorageError:
    """The refusal of an exclusive create without content, which several stores would not hold to."""
    return StorageError(f"{uri}: an empty object can't be created exclusively; write content to it")


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__


def _service_answer(error: BaseException) -> tuple[str, int]:
    """The service's own error code and HTTP status, from wherever the library keeps them."""
    for cause in _causes(error):
        response = getattr(cause, "response", None)
        if isinstance(response, dict) and "Error" in response:
            code = str(response["Error"].get("Code", ""))
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return code, int(status or (code if code.isdigit() else 0))
        for name in ("status_code", "code", "status"):
            status = getattr(cause, name, None)
            if isinstance(status, int):
                return "", status
    return "", 0


def translate(error: Exception, uri: str) -> Exception:
    """The exception to raise for ``error``, met while working on the object or bucket ``uri``.

    Returns AlreadyExists, FileNotFoundError, TransientStorageError or StorageError, each with one
    sentence; ``error`` itself if it is one of these already or no failure of a store.
    """
    if isinstance(error, StorageError):
        return error
    names = {cls.__name__ for cls in type(error).__mro__}
    if names & _CUT_SHORT:
        return TransientStorageError(f"{uri}: the answer ended early ({_one_line(error)}); try again")
    code, status = _service_answer(error)
    if code == "PreconditionFailed" or status == 412 or isinstance(error, FileExistsError):
        return AlreadyExists(f"{uri}: the object exists already")
    if code in {"NoSuchBucket", "InvalidBucketName"} or "ParamValidationError" in names:
        return StorageError(
            f"{uri}: there is no such bucket; create it or correct the address{_elsewhere(uri)}"
        )
    if code in {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken"}:
        return StorageError(
            f"{uri}: the store does not accept the credentials ({code}); renew or correct "
            f"them{_elsewhere(uri)}"
        )
    if names & _NO_CREDENTIALS or "Unable to locate credentials" in str(error):
        return StorageError(
            f"{uri}: no credentials were found; set them in the environment (such as AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY) or give the machine a role"
        )
    if code in _BAD_REGION or status in {301, 307}:
        return StorageError(f"{uri}: the bucket is in another region; set region under storage ({error})")
    if status in {401, 403} or code == "AccessDenied" or isinstance(error, PermissionError):
        return StorageError(
            f"{uri}: access denied; allow these credentials or this user to read and write there"
        )
    if code in _TRANSIENT_CODES or status in _TRANSIENT_STATUS:
        return TransientStorageError(f"{uri}: the store can't answer now ({code or status}); try again")
    if status == 404 or isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError):
        return FileNotFoundError(f"{uri}: there is no such object")
    if status == 0 and (names & _CONNECTION or isinstance(error, ConnectionError)):
        return TransientStorageError(
            f"{uri}: the store can't be reached ({_one_line(error)}); check endpoint_url and the "
            f"network{_elsewhere(uri)}"
        )
    if isinstance(error, OSError):
        return _from_errno(error, uri)
    if status or names & {"BotoCoreError", "HttpError", "AzureError"}:
        return StorageError(f"{uri}: the store refused the request ({_one_line(error)})")
    if isinstance(error, ValueError) and "endpoint" in str(error).lower():
        return StorageError(f"{uri}: endpoint_url is no address of a store ({_one_line(error)})")
    return error


def _elsewhere(uri: str) -> str:
    """What to try where only a job's address was given: the spec that names the endpoint is behind it."""
    if uri.startswith(("s3://", "s3a://")) and "AWS_ENDPOINT_URL" not in os.environ:
        return ", or set AWS_ENDPOINT_URL where the store is not AWS's own"
    return ""


def _from_errno(error: OSError, uri: str) -> Exception:
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return StorageError(f"{uri}: no space left; free some or choose another place")
    if error.errno == errno.EROFS:
        return StorageError(f"{uri}: the file system is read-only; choose another place")
    if error.errno in _TRANSIENT_ERRNO:
        return TransientStorageError(f"{uri}: the store can't answer now ({_one_line(error)}); try again")
    return StorageError(f"{uri}: the store refused the request ({_one_line(error)})")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def attempt(operation: Callable[[], T], uri: str) -> T:
    """Run ``operation`` on ``uri`` and return its result, repeating what may pass a few times.

    Waits 0.2, 0.4 and 0.8 s, each shortened by chance, between its four attempts. Raises what
    ``translate`` says of the last failure.
    """
    for failures in range(ATTEMPTS):
        try:
            return operation()
        except Exception as error:
            translated = translate(error, uri)
            last = failures == ATTEMPTS - 1
            if last or not isinstance(translated, TransientStorageError):
                if translated is error:
                    raise
                raise translated from error
        time.sleep(FIRST_DELAY_SECONDS * 2**failures * random.uniform(0.5, 1))
    raise AssertionError("the last attempt returns or raises")
