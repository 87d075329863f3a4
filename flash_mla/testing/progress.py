"""A progress bar on a terminal, a line now and then elsewhere. Imports nothing from the package."""

from __future__ import annotations

import sys
import time


class Progress:
    """``with Progress(total, label) as bar: bar.step("what was done")``. Writes to stderr.

    Away from a terminal every step is a line of its own, but never two lines within `quiet_s` seconds.
    """

    def __init__(self, total: int, label: str, quiet_s: float = 0.0) -> None:
        self._total, self._label, self._quiet_s = total, label, quiet_s
        self._done = 0
        self._began = self._spoke = time.monotonic()
        self._terminal = sys.stderr.isatty()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._terminal:
            sys.stderr.write("\n")

    def note(self, text: str) -> None:
        """Says what is going on now, on a terminal only."""
        if self._terminal:
            self._draw(text)

    def step(self, text: str = "") -> None:
        """One more of `total` is done."""
        self._done += 1
        now = time.monotonic()
        if self._terminal:
            self._draw(text)
        elif now - self._spoke >= self._quiet_s:
            self._spoke = now
            line = f"{self._label} [{self._done}/{self._total}, {now - self._began:.0f} s] {text}"
            print(line.rstrip(), file=sys.stderr, flush=True)

    def _draw(self, text: str) -> None:
        filled = 24 * self._done // max(self._total, 1)
        bar = "#" * filled + "-" * (24 - filled)
        sys.stderr.write(f"\r\033[K{self._label} [{bar}] {self._done}/{self._total} {text[:90]}")
        sys.stderr.flush()
