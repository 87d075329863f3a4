"""Tiles by measurement: off by default, measured once, kept on disk, never while a graph is captured."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flash_mla.backends import triton
from flash_mla.backends.triton import tuning
from flash_mla.backends.triton.config import Tile

pytestmark = pytest.mark.skipif(triton.missing() is not None, reason=f"triton: {triton.missing()}")

SLOW, FAST, TOO_LARGE = Tile(16, 16, 4, 2), Tile(16, 32, 4, 3), Tile(16, 64, 8, 3)
TILES = (SLOW, FAST, TOO_LARGE)
DEVICE = torch.device("cpu")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Tile]:
    """Tuning as on a GPU, of a clock that is fast for FAST; the tiles that were measured, in their order."""
    seen: list[Tile] = []

    def microseconds(call: Callable[[], object]) -> float:
        call()
        return {SLOW: 9.0, FAST: 3.0, TOO_LARGE: float("inf")}[seen[-1]]

    monkeypatch.setenv("FLASH_MLA_TRITON_TUNE", "1")
    monkeypatch.setenv("FLASH_MLA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "interpreting", lambda: False)
    monkeypatch.setattr(tuning, "_microseconds", microseconds)
    monkeypatch.setattr(tuning, "_known", {})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return seen


def choose(measured: list[Tile], kind: str = "a call") -> Tile:
    return tuning.choose((kind,), TILES, DEVICE, measured.append)


def test_it_is_off_by_default(measured: list[Tile], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLASH_MLA_TRITON_TUNE")
    assert choose(measured) == SLOW
    assert measured == []


def test_the_fastest_is_measured_once_and_kept(measured: list[Tile], monkeypatch: pytest.MonkeyPatch) -> None:
    assert [choose(measured) for _ in range(3)] == [FAST] * 3
    assert measured == list(TILES)
    monkeypatch.setattr(tuning, "_known", {})  # another process
    assert choose(measured) == FAST
    assert measured == list(TILES)
    assert choose(measured, "another call") == FAST
    assert measured == [*TILES, *TILES]
    assert json.loads(tuning._file().read_text()) == {
        "a GPU: a call": [16, 32, 4, 3],
        "a GPU: another call": [16, 32, 4, 3],
    }


def test_nothing_is_measured_while_a_graph_is_captured(measured: list[Tile], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose(measured) == SLOW
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert choose(measured) == FAST
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose(measured) == FAST


@pytest.mark.parametrize("content", ["", "not JSON", '{"a GPU: a call": 5}', '["a GPU: a call"]'])
def test_a_file_that_cannot_be_read_is_measured_anew(measured: list[Tile], content: str) -> None:
    tuning._file().write_text(content)
    assert choose(measured) == FAST
    assert json.loads(tuning._file().read_text()) == {"a GPU: a call": [16, 32, 4, 3]}


def test_a_folder_that_cannot_be_written_is_no_error(
    measured: list[Tile], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLASH_MLA_CACHE_DIR", str(tmp_path / "file"))
    assert choose(measured) == FAST
    assert choose(measured) == FAST
    assert measured == list(TILES)


def test_sizes_that_share_a_choice() -> None:
    assert [tuning.size_class(number) for number in (0, 1, 2, 3, 64, 65)] == [1, 1, 2, 4, 64, 128]
