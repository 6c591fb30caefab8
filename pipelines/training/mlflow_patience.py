"""Waiting for MLflow: which of its errors pass, and for how long a call is repeated."""

from collections.abc import Callable
from http import HTTPStatus
from typing import Any, TypeVar

import requests
import tenacity
from boto3.exceptions import Boto3Error
from botocore.exceptions import BotoCoreError, ClientError
from mlflow.exceptions import MlflowException

from datasets_etl import storage_retries
from pipelines.entry import first_line
from pipelines.errors import OutageError, PipelineError

_TRANSPORT_ERRORS = (requests.RequestException, BotoCoreError, ClientError, Boto3Error)
MLFLOW_ERRORS = (MlflowException, *_TRANSPORT_ERRORS)
"""What a call of MLflow raises: its own, or what its way to a server or to storage met."""

_LATER = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS)

_Result = TypeVar("_Result")


class RefusedError(PipelineError):
    """MLflow or its artifact storage refuses a request; waiting would not help."""


class Patience:
    """Calls a function, and retries it while MLflow is unreachable or busy.

    Args:
        patience_s: for how long to retry, in seconds.
        tell: called with a line when waiting begins, and when it is over.
    """

    def __init__(self, patience_s: float, tell: Callable[[str], None]) -> None:
        self._patience_s, self.tell = patience_s, tell

    def __call__(self, work: Callable[..., _Result], *arguments: Any, **named: Any) -> _Result:
        """Raises OutageError if retries took longer than the patience. Raises at once: RefusedError if waiting would
        not help, and MLflow's own error if it says that something does not exist.
        """
        trying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(may_pass),
            stop=tenacity.stop_after_delay(self._patience_s),
            wait=tenacity.wait_exponential_jitter(multiplier=0.5, max=15.0),
            before_sleep=self._say_once,
            reraise=True,
        )
        try:
            result = trying(work, *arguments, **named)
        except Exception as error:
            if not may_pass(error) and _refuses(error):
                raise RefusedError(
                    f"MLflow's server or its storage of artifacts refuses: {first_line(error)}; once that is mended, "
                    "the same command goes on"
                ) from error
            if not may_pass(error):
                raise
            raise OutageError(
                f"MLflow was away for longer than mlflow.patience_s {self._patience_s:g} ({first_line(error)}); what "
                "was trained is kept, the same command goes on once it answers"
            ) from error
        if trying.statistics["attempt_number"] > 1:
            self.tell("MLflow answers again")
        return result

    def _say_once(self, state: tenacity.RetryCallState) -> None:
        error = None if state.outcome is None else state.outcome.exception()
        if state.attempt_number == 1 and error is not None:
            self.tell(f"MLflow is away ({first_line(error)}); what it should know is kept and sent when it answers")


def _refuses(error: BaseException) -> bool:
    """Whether an error is a refusal by MLflow or its storage. "Does not exist" is an answer, not a refusal."""
    if isinstance(error, MlflowException):
        return error.get_http_status_code() != HTTPStatus.NOT_FOUND
    return isinstance(error, _TRANSPORT_ERRORS)


def may_pass(error: BaseException) -> bool:
    """Whether an error means that MLflow or its storage is unreachable or busy, rather than that it refuses."""
    if isinstance(error, MlflowException):
        return _is_busy(error.get_http_status_code())
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return _is_busy(error.response.status_code)
    return isinstance(error, requests.RequestException) or storage_retries.may_pass(error)


def as_error(error: BaseException, text: str) -> PipelineError:
    """Our error for one that MLflow raised: OutageError if it may pass."""
    return OutageError(text) if may_pass(error) else PipelineError(text)


def _is_busy(status: int) -> bool:
    return status >= HTTPStatus.INTERNAL_SERVER_ERROR or status in _LATER
