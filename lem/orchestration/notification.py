"""Telling a webhook how a campaign ended, without ever delaying or failing it."""

from __future__ import annotations

import json
import logging
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

__all__ = ["Notification", "notify"]

_logger = logging.getLogger(__name__)

_TIMEOUT_S = 10.0


class Notification:
    """A message on its way."""

    def __init__(self, thread: threading.Thread) -> None:
        self._thread = thread

    def settle(self, seconds: float) -> None:
        """Give a message that is still on its way a last moment before the program ends."""
        self._thread.join(seconds)
        if self._thread.is_alive():
            _logger.warning("the webhook has not answered yet; the campaign does not wait for it")


def notify(url: str, payload: Mapping[str, Any]) -> Notification:
    """A JSON POST under way on a thread of its own; a failure is a warning, and the URL, a secret, is never logged."""
    thread = threading.Thread(target=_post, args=(url, dict(payload)), name="webhook", daemon=True)
    thread.start()
    return Notification(thread)


def _post(url: str, payload: dict[str, Any]) -> None:
    data = json.dumps(payload, ensure_ascii=False).encode("utf-8")
    try:
        request = urllib.request.Request(  # noqa: S310 - the scheme is checked with the configuration
            url,
            data=data,
            headers={"Content-Type": "application/json", "User-Agent": "lem"},
            method="POST",
        )
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:  # noqa: S310
            answer.read(1)
    except urllib.error.HTTPError as error:
        _logger.warning("the webhook answered %s", error.code)
    except (OSError, ValueError) as error:
        # The text of these errors can hold the URL, so only the kind is told.
        _logger.warning("the webhook could not be reached (%s)", type(error).__name__)
