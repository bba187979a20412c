"""Where in the user's own files an exception came from, for a message of one line instead of a traceback."""

from __future__ import annotations

import sysconfig
import traceback
from pathlib import Path

import flatminima

_OURS = str(Path(flatminima.__file__).resolve().parent)
_INSTALLED = ("site-packages", "dist-packages")


def user_line(error: BaseException, *, called_by_us: bool = False) -> str | None:
    """``FILE:LINE`` of the deepest frame in a file that is neither of this library nor installed; ``None`` if there is none.

    Args:
        error: as it was caught.
        called_by_us: only frames below the last one of this library: what went wrong there did so in code that was called.
    """
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    ours = [i for i, frame in enumerate(frames) if frame.filename.startswith(_OURS)]
    first = (ours[-1] if called_by_us else ours[0]) if ours else 0
    own = [frame for frame in frames[first:] if _is_users(frame.filename)]
    return f"{own[-1].filename}:{own[-1].lineno}" if own else None


def in_a_line(error: BaseException) -> str:
    """Type and first line of an exception.

    Example:
        >>> in_a_line(KeyError("boom")), in_a_line(AssertionError())
        ("KeyError: 'boom'", 'AssertionError')
    """
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _is_users(file: str) -> bool:
    if file.startswith(("<", _OURS)) or any(part in Path(file).parts for part in _INSTALLED):
        return False
    return not file.startswith(sysconfig.get_path("stdlib"))
