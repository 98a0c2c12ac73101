"""What went wrong with the Hub, in one line each."""

import json

import httpx2
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled


_NAMED = (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled, httpx2.TransportError)
# All that a call of huggingface_hub may fail with for reasons outside the program.
HUB_ERRORS = (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError, RuntimeError)
_LONGEST = 300


def root_cause(error: BaseException) -> BaseException:
    """The error below the wrappers that huggingface_hub puts around it (an upload thread's, a metadata check's)."""
    while not isinstance(error, _NAMED) and error.__cause__ is not None:
        error = error.__cause__
    return error


def is_transient(error: BaseException) -> bool:
    """Whether the same call may pass a moment later: the branch moved (412), too many calls, the Hub's own failure."""
    cause = root_cause(error)
    if isinstance(cause, HfHubHTTPError):
        status = cause.response.status_code
        return status in (408, 412, 429) or status >= 500
    # The client reads some answers as JSON before it looks at their status; a gateway's error page then fails there.
    return isinstance(cause, (httpx2.TimeoutException, httpx2.RemoteProtocolError, json.JSONDecodeError))


def explain(error: BaseException, repo_id: str, endpoint: str) -> str:
    """One line for an error of the Hub's client: what happened and what mends it. No token is ever part of it."""
    cause = root_cause(error)
    if isinstance(cause, HfHubHTTPError):
        return _explain_status(cause, repo_id)
    if isinstance(cause, HFValidationError):
        return f"{repo_id!r} is not a repo id: use NAME or NAMESPACE/NAME of letters, digits, '-', '_' and '.'"
    if isinstance(cause, LocalTokenNotFoundError):
        return "no token: log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(cause, OfflineModeIsEnabled):
        return "the Hub client is in offline mode: unset HF_HUB_OFFLINE"
    if isinstance(cause, httpx2.TimeoutException):
        return f"{endpoint} does not answer (timed out): try again later"
    if isinstance(cause, json.JSONDecodeError):
        return f"{endpoint} gave an answer that is not the Hub's (not JSON): try again later, or check HF_ENDPOINT"
    if isinstance(cause, httpx2.TransportError):
        return f"{endpoint} cannot be reached ({type(cause).__name__}): check the network and HF_ENDPOINT"
    return _one_line(f"{type(cause).__name__}: {cause}")


def _explain_status(error: HfHubHTTPError, repo_id: str) -> str:
    status = error.response.status_code
    causes = {
        400: "the Hub refuses what was sent; mend README.md or the files it names",
        401: "the token is missing, wrong or expired: log in with `hf auth login`, or set HF_TOKEN",
        403: f"the token has no right to do this in {repo_id}: use one that has it, or another repo id",
        404: f"{repo_id} or its revision does not exist, or the token does not see it: check the id",
        409: f"another operation on {repo_id} is in the way: try again",
        412: f"{repo_id} got another commit meanwhile: try again",
        413: "the Hub finds the upload too large",
        429: "too many requests: wait a few minutes and try again",
    }
    cause = causes.get(status, "the Hub fails by itself: try again later" if status >= 500 else "unexpected answer")
    said = _one_line(error.server_message or "")
    return f"HTTP {status}, {cause}" + (f" (the Hub says: {said})" if said and status < 500 else "")


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else line[: _LONGEST - 3] + "..."
