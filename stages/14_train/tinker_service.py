"""The Tinker SDK with our own limits of time, and its errors in words for a person.

Left alone, the SDK blocks 304 s on a server that is not there, pauses an hour on an unpaid bill, says only after a
quarter of an hour that a request waits for capacity, and asks for ever for an answer that never comes (tinker 0.38.0).
Here whoever waits is told within :data:`SILENCE_S`, what cannot mend itself ends at once, and the rest is given
:data:`PATIENCE_S`: an hour of training is not thrown away for a router that starts anew.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

from backends import say

from shared.errors import KeyMissingError, ProviderError, SettingsError, SynthmillError

KEY = "TINKER_API_KEY"
PROBE_S = 8.0
"""For everything asked before the first paid step; `make preflight` gives its checks 10 s."""
SILENCE_S = 10.0
"""Without an answer for so long, we look whether the service is there at all, and say what we found."""
SAY_AGAIN_S = 60.0
PATIENCE_S = 300.0
"""How long a service that is not there is waited for once training has begun; the SDK's own limit for a submission."""
STALLED_S = 1800.0
"""How long one that is there may leave a request unanswered without saying that it waits for capacity."""
PAUSE_S = 5.0
"""A pause for capacity that lasts longer is worth a line."""
GOODBYE_S = 5.0
LOOK_S = 0.25

T = TypeVar("T")
R = TypeVar("R", covariant=True)


class Answer(Protocol[R]):
    """A future of the SDK, or one of ours."""

    def result(self, timeout: float | None = None) -> R:
        """The answer, waited for."""


# ---------------------------------------------------------------- the SDK


class Voice(logging.Handler):
    """What the SDK has to say: passed on as our lines, and kept where it tells that waiting is in vain.

    Attributes:
        unpaid: why the account cannot pay; ``""`` = it can. The SDK raises this only after an hour.
        paused_at: when it last said that requests wait for capacity, by the monotonic clock.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.unpaid, self.paused_at = "", float("-inf")

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if "because of try_again" in text:  # every poll of every slow request
            return
        if "paused due to billing" in text:
            self.unpaid = text.partition("Error: ")[2] or text
            return
        if "is paused" in text:
            self.paused_at = time.monotonic()
        say(f"Tinker says: {text}")


_voice = Voice()


def sdk() -> Any:
    """The ``tinker`` module, quiet and without telemetry.

    Raises:
        SettingsError: it is not installed.
        KeyMissingError: there is no key.
    """
    if importlib.util.find_spec("tinker") is None:
        raise SettingsError("backend = 'tinker' needs the Tinker SDK, which is not installed here", "make setup")
    if not os.environ.get(KEY):
        raise KeyMissingError(f"{KEY} is not set", f"put {KEY}=... into .env, from the vendor's console")
    os.environ["TINKER_TELEMETRY"] = "0"
    import tinker
    from tinker.lib import queue_state_logger

    queue_state_logger.PAUSE_GRACE_PERIOD = PAUSE_S  # type: ignore[assignment]  # its own is 15 minutes
    logger = logging.getLogger("tinker")
    if _voice not in logger.handlers and not logging.getLogger().handlers:  # TINKER_LOG sets up logging of its own
        logger.addHandler(_voice)
        logger.propagate = False
    return tinker


def address() -> str:
    """Where the service is."""
    from tinker.lib.base_url import resolve_base_url

    return resolve_base_url()


def rest() -> Any:
    """A client for what needs no session. Blocks while the service does not answer.

    Address and key are given, because the SDK keeps such clients by what they are given, not by the environment.
    """
    return sdk().RestClient(base_url=address(), api_key=os.environ[KEY])


def unreachable(limit_s: float) -> str:
    """Why the service cannot be reached; ``""`` when it answers, whatever it answers."""
    try:
        urllib.request.urlopen(f"{address()}/api/v1/healthz", timeout=limit_s).close()
    except urllib.error.HTTPError as error:
        error.close()
    except (OSError, ValueError) as error:  # refused, unknown host, no TLS, timed out; or no address at all
        return str(getattr(error, "reason", error))
    return ""


def in_background(work: Callable[[], T]) -> Answer[T]:
    """Run what may block for minutes in a thread that does not keep the process."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


# ---------------------------------------------------------------- before anything is paid


def check(model: str, max_length: int) -> str:
    """Ask for the service's models, which costs nothing.

    Returns:
        What was found, for a person.

    Raises:
        KeyMissingError: there is no key, or it is refused.
        ProviderError: the service is not there, does not answer within :data:`PROBE_S` s, or wants to be paid first.
        SettingsError: the model is no longer offered or no longer trainable, or takes less than ``max_length`` tokens.
    """
    started, _voice.unpaid = time.monotonic(), ""
    sdk()
    if why := unreachable(PROBE_S / 2):
        raise ProviderError(
            f"Tinker cannot be reached at {address()}: {why}",
            "check the network and the vendor's status page, then run the same command; nothing was spent",
        )
    asked = in_background(lambda: rest().get_server_capabilities().result().supported_models)
    offered = Waiting("").until(asked, "offer its models", started + PROBE_S)
    found = next((one for one in offered if one.model_name == model), None)
    trainable = sorted(one.model_name for one in offered if one.model_name and one.trainable is not False)
    if found is None or found.trainable is False:
        fate = "is offered for sampling, but no longer for training" if found and found.sampleable else "is retired"
        fate = fate if found else "is not offered (any more)"
        raise SettingsError(
            f"tinker.model = {model!r} {fate}; trainable are: {', '.join(trainable) or 'none'}",
            "set model and revision in [tinker] to a dense text model of these; 03 and 15 must then use it too",
        )
    longest = found.max_context_length
    if longest is not None and longest < max_length:
        raise SettingsError(
            f"max_length = {max_length:,}, and {model} takes at most {longest:,} tokens at Tinker",
            f"set max_length to {longest} or less",
        )
    return f"{model} is trainable" + (f", up to {longest:,} tokens" if longest else "")


# ---------------------------------------------------------------- waiting


class Waiting:
    """Waits for answers, with a word for whoever watches.

    Args:
        resume: what a person must know when it ends here: what is saved, and how to go on.
        leave_at: looked at all the time: until when to wait at the longest, whatever for, by the monotonic clock.
    """

    def __init__(self, resume: str, leave_at: Callable[[], float] = lambda: float("inf")) -> None:
        self.resume, self.leave_at = resume, leave_at

    def until(self, answer: Answer[T], what: str, deadline: float = float("inf")) -> T:
        """The answer. ``what`` ends the sentence "Tinker does not ...".

        Raises:
            SynthmillError: there will be none; which one is said at :func:`explained`.
        """
        started = time.monotonic()
        gone_since, say_at = 0.0, started + SILENCE_S
        while True:
            try:
                return answer.result(timeout=LOOK_S)
            except TimeoutError as error:
                if _settled(answer):
                    raise explained(error, what, self.resume) from error
            except Exception as error:
                raise explained(error, what, self.resume) from error
            now = time.monotonic()
            if _voice.unpaid:
                raise _unpaid(_voice.unpaid, self._again)
            if now > min(deadline, self.leave_at()):
                raise ProviderError(f"Tinker did not {what} in {now - started:.0f} s", self._again)
            if now < say_at:
                continue
            say_at = now + SILENCE_S
            why = unreachable(PROBE_S / 2)
            if why and not gone_since:
                gone_since = now
                say(f"Tinker cannot be reached ({why}); waiting up to {PATIENCE_S:.0f} s. {self._again}")
            elif not why and gone_since:
                gone_since = 0.0
                say("Tinker is there again")
            elif not why and (now - started) % SAY_AGAIN_S < SILENCE_S and now - _voice.paused_at > SAY_AGAIN_S:
                say(f"Tinker is there, and did not {what} for {now - started:.0f} s; waiting. {self._again}")
            if gone_since and now - gone_since > PATIENCE_S:
                raise ProviderError(f"Tinker cannot be reached for {now - gone_since:.0f} s: {why}", self._again)
            if now - max(started, _voice.paused_at) > STALLED_S:
                raise ProviderError(f"Tinker did not {what} in {now - started:.0f} s", self._again)

    @property
    def _again(self) -> str:
        return self.resume or "nothing was spent"


def _settled(answer: Any) -> bool:
    """Whether a time-out is the answer itself, not ours."""
    inner = answer.future() if hasattr(answer, "future") else answer
    return bool(inner.done())


def goodbye(client: Any, status: str) -> None:
    """End the session, if the service is still there to hear it."""
    try:
        client.close(status).result(timeout=GOODBYE_S)
    except Exception as error:  # it ends by itself when its heartbeat does
        logging.getLogger(__name__).debug("session not closed: %s", error)


# ---------------------------------------------------------------- errors


def explained(error: BaseException, what: str, resume: str) -> SynthmillError:
    """An error of the SDK as ours: ``KeyMissingError`` for the key, ``SettingsError`` for what was asked for, else
    ``ProviderError``; ``what`` and ``resume`` as in :class:`Waiting`."""
    import tinker

    again = resume or "nothing was spent"
    for one in _causes(error):
        if isinstance(one, SynthmillError):
            return one
        if isinstance(one, tinker.APIStatusError):
            return _status(one.status_code, _detail(one), what, again)
        if isinstance(one, tinker.RequestFailedError):
            text = one.message.partition(" for self.request_id")[0].removeprefix("Request failed: ")
            if not resume and one.category == "user":
                return _bad_settings(text, again)
            return ProviderError(f"Tinker failed to {what}: {text}", again)
    if isinstance(error, tinker.APIConnectionError):
        return ProviderError(f"Tinker cannot be reached at {address()}: {error}", again)
    if isinstance(error, tinker.TinkerError) and "api_key" in str(error):
        return KeyMissingError(f"{KEY} is no key of Tinker: {error}", f"check {KEY} in .env")
    return ProviderError(f"Tinker failed to {what}: {type(error).__name__}: {error}", again)


def _status(status: int, detail: str, what: str, again: str) -> SynthmillError:
    if status in (401, 403):
        return KeyMissingError(f"Tinker refuses the key ({status}): {detail}", f"check {KEY} in .env; {again}")
    if status == 402:
        return _unpaid(detail, again)
    if status in (400, 422):
        return _bad_settings(detail, again)
    return ProviderError(f"Tinker did not {what} ({status}): {detail}", again)


def _unpaid(detail: str, again: str) -> ProviderError:
    return ProviderError(
        f"Tinker wants to be paid first (402): {detail}",
        f"set up billing or add credit in the vendor's console; {again}",
    )


def _bad_settings(detail: str, again: str) -> SettingsError:
    mend = "lower rank in [tinker]" if "rank" in detail.lower() else "edit [tinker] and max_length in the settings"
    return SettingsError(f"Tinker refuses what was asked for: {detail}", f"{mend}; {again}")


def _detail(error: Any) -> str:
    """What the service said, without the wrapping."""
    body = error.body
    if isinstance(body, dict):
        inner = body.get("detail") or body.get("message") or body.get("error")
        if isinstance(inner, dict):
            inner = inner.get("message")
        if inner:
            return str(inner)
    return str(error.message).partition("\n")[0][:300]


def _causes(error: BaseException) -> list[BaseException]:
    """The error and what it came from."""
    chain: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and one not in chain:
        chain.append(one)
        one = one.__cause__ or one.__context__
    return chain
