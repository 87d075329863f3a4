"""Tiles chosen by measurement: opt-in, and kept on disk. Needs no Triton until it measures.

With `FLASH_MLA_TRITON_TUNE=1` in the environment the first call of a kind runs with every tile that `config` offers for
it, and the fastest serves calls of this kind from then on, also in later processes. The bits of results depend on the
tile, so they may differ from one machine to the next; batch-invariant calls take the tile that `config` prefers.

While a CUDA graph is captured nothing is measured: what is known serves, else what `config` prefers.
"""

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from flash_mla._version import __version__
from flash_mla.backends.triton.config import Tile, interpreting

_known: dict[str, Tile] = {}
"""By GPU and kind of call."""


def enabled() -> bool:
    """Whether tiles are measured."""
    return os.environ.get("FLASH_MLA_TRITON_TUNE", "0") == "1" and not interpreting()


def directory() -> Path:
    """Where measurements are kept: `FLASH_MLA_CACHE_DIR`, else `flash_mla` among the user's caches."""
    given = os.environ.get("FLASH_MLA_CACHE_DIR")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flash_mla"


def choose(
    kind: tuple[object, ...], tiles: Sequence[Tile], device: torch.device, run: Callable[[Tile], object]
) -> Tile:
    """The tile for a call.

    Args:
        kind: of the call: all that the choice may depend on beside the GPU, of types that have short texts.
        tiles: those that fit, the preferred one first.
        device: of the tensors.
        run: makes the call with a tile; results are written over.
    """
    if len(tiles) == 1 or not enabled():
        return tiles[0]
    name = f"{torch.cuda.get_device_name(device)}: {' '.join(map(str, kind))}"
    if name not in _known:
        _known.update(_read())
    if name not in _known:
        if torch.cuda.is_current_stream_capturing():
            return tiles[0]
        _known[name] = min(tiles, key=lambda tile: _microseconds(lambda: run(tile)))
        _write({**_read(), name: _known[name]})
    return _known[name]


def size_class(number: int) -> int:
    """Numbers that share a choice have the same: the power of two that follows."""
    return 1 << max(number - 1, 0).bit_length()


def _microseconds(call: Callable[[], object]) -> float:
    """Time on the GPU; infinite where the tile does not fit after all."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    try:
        return float(1e3 * do_bench(call, warmup=10, rep=40, return_mode="median"))
    except OutOfResources:
        return float("inf")


def _file() -> Path:
    from triton import __version__ as triton_version

    return directory() / f"triton_tiles-{__version__}-triton{triton_version}.json"


def _read() -> dict[str, Tile]:
    """What is on disk; nothing where that cannot be read."""
    with suppress(OSError, ValueError, TypeError, AttributeError):
        return {name: Tile(*values) for name, values in json.loads(_file().read_text()).items()}
    return {}


def _write(known: dict[str, Tile]) -> None:
    """Replace the file at once: no other process reads half of it. That it cannot be written is no error."""
    with suppress(OSError):
        path = _file()
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            values = {
                name: (tile.block_m, tile.block_n, tile.num_warps, tile.num_stages) for name, tile in known.items()
            }
            json.dump(values, file, indent=1)
        Path(file.name).replace(path)
