"""Threads whose errors are heard."""

from __future__ import annotations

import threading
from collections.abc import Callable


def start(name: str, work: Callable[[], object], failed: Callable[[BaseException], object]) -> threading.Thread:
    """Starts a daemon thread. An error that ends ``work`` goes to ``failed``, in that thread: whoever waits for the thread
    learns of it there, instead of waiting for something that nobody is doing any more."""

    def body() -> None:
        try:
            work()
        except BaseException as error:
            failed(error)

    thread = threading.Thread(target=body, name=name, daemon=True)
    thread.start()
    return thread
