"""`BoundedHub`: the Hub's client, bounded in time, bytes and requests, for a server that nobody vouches for.

The client of huggingface_hub trusts the server that it talks to: it waits without end, holds any answer whole, makes
file names of headers, and sends the user's token wherever an answer says that the next page is. So its session is told
here to check each request and each answer, and it runs in a thread, which is left behind when the time is over.
Uploads of large files, for which the client has threads of its own, are bounded by the time alone.
"""

import queue
import re
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from json import JSONDecodeError
from typing import Any, TypeVar
from urllib.parse import urlsplit

from huggingface_hub import HfApi, constants, get_session
from huggingface_hub.errors import HFValidationError, HTTPError

from .concept_file import printable

# A task may take so many seconds, and one more for each of so many bytes of a file that it moves.
SECONDS = 60
BYTES_PER_SECOND = 64 * 2**10
MAX_REQUESTS = 1000
# Of each piece of an answer.
_CHUNK = 64 * 2**10

Answer = TypeVar("Answer")

# The task of each thread, as `hub`.
_task = threading.local()


class OddAnswerError(OSError):
    """The client cannot make anything of an answer of the Hub."""


class BoundedHub:
    """The Hub for one task, which may take several requests.

    Args:
        token: of the user, as `HfApi` takes it.
        endpoint: address of the Hub; by default the client's.
        max_bytes: how many bytes all answers together may have.
        payload: bytes of the files that the task uploads or downloads, which give it more time.

    Raises:
        ValueError: if the token cannot be one. The client would show it in an error.
    """

    def __init__(
        self, *, token: str | bool | None = None, endpoint: str | None = None, max_bytes: int, payload: int = 0
    ):
        if isinstance(token, str) and not (token.isascii() and token.isprintable() and " " not in token):
            raise ValueError("token= has a space, a line end or a letter that no access token has; copy it again")
        self.api = HfApi(endpoint=endpoint, token=token)
        self._seconds = SECONDS + payload // BYTES_PER_SECOND
        self._deadline = time.monotonic() + self._seconds
        self._max_bytes = self._bytes_left = max_bytes
        self._requests_left = MAX_REQUESTS

    def ask(self, request: Callable[[HfApi], Answer]) -> Answer:
        """Return the result of a function that calls methods of the client.

        Raises:
            OddAnswerError: if the client does not understand an answer.
            OSError: if a bound is reached, or an answer would lead the client astray.
            Exception: as the client raises it, if the Hub refuses or cannot be reached.
        """
        outcome: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

        def work() -> None:
            _task.hub = self
            try:
                _watch(get_session())
                outcome.put((request(self.api), None))
            except Exception as error:
                outcome.put((None, error))

        threading.Thread(target=work, daemon=True, name="BoundedHub").start()
        try:
            answer, error = outcome.get(timeout=max(0, self._deadline - time.monotonic()))
        except queue.Empty:
            raise self._too_slow() from None
        if error is None:
            return answer
        if time.monotonic() >= self._deadline:  # of which the client may have learned first
            raise self._too_slow() from error
        for told in (error, error.__cause__):
            # Of requests, the error of a JSON decoder is an OSError too.
            if isinstance(told, (OSError, HTTPError, HFValidationError)) and not isinstance(told, JSONDecodeError):
                raise told
        raise OddAnswerError(f"the client does not understand the Hub's answer ({printable(error)})") from error

    def check_request(self, url: str, headers: Any) -> float:
        """Return the seconds that a request may wait for each byte, or raise OSError if it may not be sent."""
        self._requests_left -= 1
        if self._requests_left < 0:
            raise OSError(f"the Hub had the client send more than {MAX_REQUESTS} requests")
        if "Authorization" in headers and _origin(url) not in (_origin(self.api.endpoint), *_HUBS):
            raise OSError(f"the Hub at {self.api.endpoint} asks for the token at another address, {url}")
        return min(self._time_left(), constants.HF_HUB_DOWNLOAD_TIMEOUT)

    def check_answer(self, method: str, headers: Any) -> None:
        """Raise OSError if an answer cannot be taken, and drop a header that leads elsewhere."""
        for name, value in headers.items():
            if not value.isprintable():  # the client logs some of them
                raise OSError(f"the Hub's header {name} is {value!r:.80}, with characters that control a terminal")
        if method == "HEAD":
            # The client makes file names of these.
            for name in ("ETag", "X-Linked-ETag", "X-Repo-Commit"):
                if not _FILE_NAME.fullmatch(headers.get(name, "name").lstrip("W/").strip('"')):
                    raise OSError(f"the Hub's header {name} is {headers[name]!r:.80}, which can name no file")
        elif (size := headers.get("Content-Length", "")).isdecimal() and int(size) > self._bytes_left:
            raise self._too_large()
        # Another way to the file, through a library that nothing here can bound. A concept file does not need it.
        headers.pop("X-Xet-Hash", None)

    def read(self, chunks: Callable[[], Iterator[bytes]], *_: Any, **__: Any) -> Iterator[bytes]:
        """Yield the body of an answer as it arrives, in whatever pieces the client would like it."""
        for chunk in chunks():
            self._bytes_left -= len(chunk)
            if self._bytes_left < 0:
                raise self._too_large()
            self._time_left()
            yield chunk

    def _time_left(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise self._too_slow()
        return left

    def _too_slow(self) -> OSError:
        return OSError(f"the Hub took longer than {self._seconds} seconds")

    def _too_large(self) -> OSError:
        return OSError(f"the Hub sends more than {self._max_bytes} bytes")


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


_HUBS = (_origin(constants.HUGGINGFACE_CO_URL_HOME), _origin("https://hf.co"))
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]{0,127}")


def _watch(session: Any) -> None:
    """Have a session of the client check the requests and answers of each thread that has a task."""
    if hasattr(session, "event_hooks"):
        hooks = session.event_hooks
        if _before_request not in hooks["request"]:
            session.event_hooks = {
                "request": [*hooks["request"], _before_request],
                "response": [_after_response, *hooks["response"]],
            }
    else:  # of requests, through which huggingface_hub spoke before 1.0
        for adapter in session.adapters.values():
            if not isinstance(adapter.send, partial):
                adapter.send = partial(_send, adapter.send)


def _before_request(request: Any) -> None:
    """Check a request of httpx, and bound how long it waits for a connection and for the next byte."""
    if (hub := getattr(_task, "hub", None)) is not None:
        timeout = hub.check_request(str(request.url), request.headers)
        request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), timeout)
        request.extensions["trace"] = _give_up


def _give_up(event: str, info: dict[str, Any]) -> None:
    """Raise the failure of a connection as an error after which the client does not try again.

    It would do so with a new session, which checks nothing, and for half a minute if there is no network.
    """
    if event.endswith(("connect_tcp.failed", "start_tls.failed")):
        raise _no_connection(info["exception"])


def _after_response(response: Any) -> None:
    """Check an answer to httpx."""
    if (hub := getattr(_task, "hub", None)) is not None:
        hub.check_answer(response.request.method, response.headers)
        response.iter_bytes = partial(hub.read, response.iter_bytes)


def _send(send: Callable[..., Any], request: Any, **options: Any) -> Any:
    """Send a request of requests, with all of these checks."""
    if (hub := getattr(_task, "hub", None)) is None:
        return send(request, **options)
    options["timeout"] = hub.check_request(request.url, request.headers)
    try:
        response = send(request, **options)
    except OSError as error:
        raise _no_connection(error) from error
    hub.check_answer(request.method, response.headers)
    response.iter_content = partial(hub.read, partial(response.iter_content, _CHUNK))
    return response


def _no_connection(error: Exception) -> OSError:
    return OSError(f"there is no connection to the Hub ({printable(error)})")
