"""The errors a caller can meet, and how an error of the native library becomes one of them.

Wrong argument: `ValueError` or `TypeError`. Valid, but not served by this device or build: `UnsupportedError`.
CUDA failure: `RuntimeError`, with the kernel's name and shape.
"""

import re

_NATIVE_ERROR = re.compile(r"flash_mla\[(ValueError|TypeError|UnsupportedError|CudaError)\] (.*)", re.DOTALL)


class UnsupportedError(NotImplementedError):
    """The call is valid, but no kernel of this build serves it on this device. The text lists each candidate's
    reason.
    """


_CLASSES: dict[str, type[Exception]] = {
    "ValueError": ValueError,
    "TypeError": TypeError,
    "UnsupportedError": UnsupportedError,
    "CudaError": RuntimeError,
}


def from_native(error: Exception) -> Exception:
    """The exception that `error` stands for.

    The native library cannot raise Python's classes, so it writes the class into the text:
    `flash_mla[ValueError] q: wanted ...`. Anything without that mark is returned unchanged.
    """
    match = _NATIVE_ERROR.search(str(error))
    if match is None:
        return error
    name, text = match.groups()
    return _CLASSES[name](strip_trace(text))


def strip_trace(text: str) -> str:
    """`text` without the C++ stack trace that torch may append to a message."""
    return re.split(r"\n(?:Exception raised from|C\+\+ CapturedTraceback)", text, maxsplit=1)[0].rstrip()


def wanted(name: str, wanted: str, given: object) -> str:
    """The text of every argument error: what was wrong, what was wanted and what came."""
    return f"{name}: wanted {wanted}, got {given}"
