"""The Hub as a partner that fails: requests that end, retries that respect Retry-After, and failures in one line.

huggingface_hub retries some requests (preupload, LFS, trees) and not others (create_repo, repo_info, the commit), has
no timeout, and waits for as long as a Retry-After says. Its errors have several lines, and not all are OSErrors.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple, TypeVar

import huggingface_hub
from huggingface_hub import constants, set_client_factory
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.utils import parse_ratelimit_headers
from huggingface_hub.utils._http import default_client_factory  # the public set_client_factory replaces it whole

from recipes.errors import UserError

T = TypeVar("T")

WAITS = (1.0, 4.0, 16.0, 60.0)  # seconds before another attempt, unless the Hub asks for more
LONGEST_WAIT = 300  # seconds that the Hub may ask for
TIMEOUT = 120.0  # seconds without a sign of life

PASSING = (408, 409, 412, 429, 500, 502, 503, 504)
ADVICE = {
    401: "a token that the Hub knows, from `hf auth login` or HF_TOKEN",
    403: "a repository that the token may write to",
    404: "a repository and revision that are there, and that the token may read",
}


class HubError(OSError):
    """The Hub cannot be reached or has refused, in one line."""


class Failure(NamedTuple):
    """What an exception of huggingface_hub comes down to: a sentence, whether the same request may succeed later, and
    seconds to wait until then."""

    sentence: str
    passing: bool
    wait: float = 0.0


def patiently(ask: Callable[[], T], about: str, *, waits: Sequence[float] | None = None) -> T:
    """Ask the Hub, again where that may help.

    Args:
        ask: makes the requests; is called anew at each attempt.
        about: what is asked about, for the error.
        waits: seconds before each further attempt; `WAITS` if not given.

    Raises:
        HubError: it has failed for good, or once too often.
        UserError: `ask` has refused something itself.
    """
    with bounded_requests():
        for wait in (*(WAITS if waits is None else waits), None):
            try:
                return ask()
            except UserError:
                raise
            except (HTTPError, OSError, RuntimeError, ValueError) as error:
                failure = failure_of(error)
            if wait is None or not failure.passing:
                raise HubError(f"{about}: {failure.sentence}")
            time.sleep(max(wait, failure.wait))
    raise AssertionError("the last attempt returns or raises")


def failure_of(error: BaseException) -> Failure:
    """Find what has gone wrong, which may be the cause of another error, as in uploads by threads."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    for each in chain:
        if isinstance(each, HubError):
            return Failure(str(each), False)
        if isinstance(each, HfHubHTTPError) and each.response is not None:
            return _refusal(each)
    for each in chain:
        if isinstance(each, HTTPError):
            reason = f"{constants.ENDPOINT} cannot be reached: {type(each).__name__}: {each}"
            return Failure(_one_line(reason), True)
    if isinstance(error, json.JSONDecodeError):  # a page of a proxy, say
        return Failure(f"{constants.ENDPOINT} has given an answer that is not of the Hub", True)
    return Failure(_one_line(str(error) or type(error).__name__), isinstance(error, RuntimeError))


def _refusal(error: HfHubHTTPError) -> Failure:
    code = error.response.status_code
    said = error.server_message or error.response.reason_phrase
    advice = ADVICE.get(code, "to try again later" if code in PASSING else "what the Hub accepts")
    sentence = f"{constants.ENDPOINT} has answered {code}: {said}; allowed: {advice}"
    return Failure(_one_line(sentence), code in PASSING, retry_after(error.response.headers) or 0.0)


def retry_after(headers: Any) -> float | None:
    """Seconds after which the Hub wants to be asked again, if it says so: a number, or a date (RFC 9110, 10.2.3)."""
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    value = headers.get("Retry-After", "").strip()
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


@contextmanager
def bounded_requests() -> Iterator[None]:
    """Give every request of huggingface_hub a timeout, and end what would wait longer than `LONGEST_WAIT`."""

    def refuse_long_waits(response: Any) -> None:
        seconds = retry_after(response.headers) if response.status_code in PASSING else None
        if seconds is not None and seconds > LONGEST_WAIT:
            raise HubError(f"{constants.ENDPOINT} asks to wait {seconds:g} s; allowed: to try again then")

    def create_client() -> Any:
        client = default_client_factory()
        client.timeout = TIMEOUT
        client.event_hooks = {**client.event_hooks, "response": [refuse_long_waits]}
        return client

    set_client_factory(create_client)
    try:
        yield
    finally:
        set_client_factory(default_client_factory)


def check_token(setting: str) -> None:
    """Refuse to ask for anything without a token, or with one that cannot be sent; it is never shown.

    Raises:
        HubError: there is none, or offline mode is set.
    """
    if constants.is_offline_mode():
        raise HubError(f"{setting} is given, and HF_HUB_OFFLINE is set; allowed: one of them")
    token = huggingface_hub.get_token()
    if token is None:
        raise HubError(f"{setting} needs a token; allowed: after `hf auth login`, or with HF_TOKEN set")
    if not (token.isascii() and token.isprintable() and " " not in token):  # an error would show it
        raise HubError(f"{setting} needs a token of letters, digits and signs; allowed: one as huggingface.co gives it")


def _one_line(text: str) -> str:
    token = huggingface_hub.get_token()
    for secret in {token, repr(token)[1:-1]} if token else ():  # the latter in the repr of a header
        text = text.replace(secret, "[token]")
    return " ".join(text.split())
