"""SIGINT and SIGTERM as a request to stop after the current step, so that the work done can be saved first."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopNow(BaseException):
    """Raised by a signal where nothing has to be saved any more (inside `StopRequest.immediate`)."""


class StopRequest:
    """While entered, the first signal is noted and the second Ctrl-C raises KeyboardInterrupt at once.

    `signal_number` is 0 until a signal came. Handlers are restored on leaving. Outside the main thread Python cannot
    handle signals: nothing is installed there.
    """

    def __init__(self) -> None:
        self.signal_number = 0
        self._immediate = False
        self._process = os.getpid()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    @contextmanager
    def immediate(self) -> Iterator[None]:
        """Inside, a signal raises StopNow at once: for long work that can be done again, such as an evaluation."""
        if self.signal_number:
            raise StopNow
        self._immediate = True
        try:
            yield
        finally:
            self._immediate = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        repeated = self.signal_number != 0
        self.signal_number = self.signal_number or number
        if os.getpid() != self._process:
            # A forked loader worker inherits this handler. The signal went to the whole group: the trainer finishes its
            # step with this worker's help, then ends it. A second one is meant for the worker itself.
            if repeated:
                os._exit(128 + number)
        elif self._immediate:
            raise StopNow
        elif repeated and number == signal.SIGINT:
            raise KeyboardInterrupt
