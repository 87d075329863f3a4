"""What nvidia-smi says of the GPU while it is measured."""

from __future__ import annotations

import statistics
import subprocess
import threading
import time
from typing import Any

_FIELDS = ("clocks.sm", "power.draw", "temperature.gpu")


def query(*fields: str) -> list[str]:
    """Values of `fields` for the first GPU, or an empty list where nvidia-smi does not answer."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", "-i", "0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    lines = done.stdout.strip().splitlines()
    return [value.strip() for value in lines[0].split(",")] if lines else []


class Clock:
    """Samples SM clock, power and temperature in the background."""

    def __init__(self, enabled: bool, every_s: float = 0.1) -> None:
        self._samples: list[tuple[float, list[float]]] = []
        self._stop = threading.Event()
        self._every_s = every_s
        self._thread = threading.Thread(target=self._run, daemon=True)
        if enabled:
            self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            began = time.time()
            values = query(*_FIELDS)
            if not values:
                return
            try:
                self._samples.append(((began + time.time()) / 2, [float(value) for value in values]))
            except ValueError:  # a field that this GPU does not report
                return
            self._stop.wait(self._every_s)

    def close(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def between(self, spans: list[tuple[float, float]]) -> dict[str, Any] | None:
        """Lowest, median and highest SM clock, median power and temperature over `spans` of ``time.time()``."""
        seen = [values for at, values in self._samples if any(begin <= at <= end for begin, end in spans)]
        if not seen:
            return None
        clocks, power, temperature = ([values[index] for values in seen] for index in range(3))
        return {
            "sm_mhz_min": min(clocks),
            "sm_mhz": statistics.median(clocks),
            "sm_mhz_max": max(clocks),
            "power_w": statistics.median(power),
            "temperature_c": statistics.median(temperature),
        }
