"""Ctrl-C that works within a second, even in the middle of a long native call."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

EXIT_CODE = 128 + signal.SIGINT
GRACE_S = 0.5
GOODBYE_S = 0.3


class Interrupt:
    """Leave the process on SIGINT, by an exception if Python gets to run, else without.

    Python raises ``KeyboardInterrupt`` between two bytecodes only; one prefill step inside
    MLX can take minutes. A second thread hears of the signal at once, gives the first a
    moment, then says goodbye in its place.

    Args:
        goodbye: Prints what there is so far. Called once. May be set anew on the way.
    """

    def __init__(self, goodbye: Callable[[], None]):
        self.goodbye = goodbye
        self._once = threading.Lock()
        self._over = threading.Event()

    def __enter__(self) -> "Interrupt":
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._old_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._old_handler = signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Thread(target=self._watch, name="mlx-flash-interrupt", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is KeyboardInterrupt:
            self._leave()
        self._over.set()
        signal.set_wakeup_fd(self._old_fd)
        signal.signal(signal.SIGINT, self._old_handler)
        self._writer.close()  # ends the watch

    def _watch(self) -> None:
        with self._reader:
            while numbers := self._reader.recv(16):
                if signal.SIGINT in numbers and not self._over.wait(GRACE_S):
                    self._leave()

    def _leave(self) -> None:
        # Not sys.exit: work that is queued in MLX would be finished first.
        try:
            if self._once.acquire(blocking=False):
                self.goodbye()
                sys.stdout.flush()
                sys.stderr.flush()
            else:
                time.sleep(GOODBYE_S)  # the other thread is at it, unless nobody reads
        finally:
            os._exit(EXIT_CODE)
