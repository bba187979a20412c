"""What the numbers of a study depend on beside its file: the code that makes them, the packages below, and the data."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from flatminima.data import DataError, sources
from flatminima.names import unknown

# The file that was started, under its names in this process and in those that it spawns; on a cluster it is another file.
_SCRIPT = ("__main__", "__mp_main__")
_PACKAGES = ("flatminima", "torch", "numpy", "scipy", "highspy")
_SOURCES: Mapping[str, Callable[[], sources.Source]] = MappingProxyType(
    {"digits": sources.digits, "mnist": sources.mnist, "fashion-mnist": sources.fashion_mnist}
)


def current_version(module: str, data: Iterable[str]) -> dict[str, Any]:
    """Packages, code and data as they are now.

    Args:
        module: whose function makes the numbers; the code is this module and all of flatminima that it names in an import,
            directly or through others.
        data: names of data sets.

    Returns:
        ``packages``: name -> version; ``code``: module -> SHA-256 of its file; ``data``: name -> SHA-256 of pixels and labels.

    Raises:
        DataError: an unknown data set, or one whose files are not there.
    """
    return {
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "code": code_version(module),
        "data": {name: data_version(name) for name in sorted(set(data))},
    }


@functools.cache
def code_version(module: str) -> dict[str, str]:
    """SHA-256 of the file of a module and of the modules of flatminima that it needs.

    Example:
        >>> "flatminima.objective" in code_version("flatminima.measures.norms")
        True
        >>> "flatminima.report.page" in code_version("flatminima.measures.norms")
        False
    """
    found: dict[str, str] = {}
    left = [module]
    while left:
        name = left.pop()
        path = None if name in found else _file(name)
        if path is None:
            continue
        content = path.read_bytes()
        found[name] = hashlib.sha256(content).hexdigest()
        left += _imports(ast.parse(content))
    return dict(sorted(found.items()))


@functools.cache
def data_version(name: str) -> str:
    """SHA-256 of all pixels and labels of a data set, as they are read."""
    if name not in _SOURCES:
        raise DataError(unknown("data set", name, _SOURCES))
    source = _SOURCES[name]()
    digest = hashlib.sha256()
    for images in (source.train, source.test):
        if images is not None:
            labels = images.labels.astype("<i8")
            pixels = images.pixels(np.arange(len(labels)))
            digest.update(json.dumps([str(pixels.dtype), *pixels.shape]).encode())
            digest.update(pixels.tobytes())
            digest.update(labels.tobytes())
    return digest.hexdigest()


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two versions, in words; nothing for equal ones.

    Example:
        >>> differences({"code": {"a": "1", "b": "1"}, "data": {}}, {"code": {"a": "2"}, "data": {"mnist": "3f"}})
        ['code: a changed, b is gone', 'data: mnist is new']
    """
    said = []
    for part in dict.fromkeys([*before, *now]):
        then, today = _entries(before.get(part, {})), _entries(now.get(part, {}))
        changes = []
        for name in sorted({*then, *today}):
            if name not in today:
                changes.append(f"{name} is gone")
            elif name not in then:
                changes.append(f"{name} is new")
            elif then[name] != today[name]:
                known = f" was {then[name]} and is {today[name]}" if part == "packages" else " changed"
                changes.append(name + known)
        if changes:
            said.append(f"{part}: {', '.join(changes)}")
    return said


def _entries(found: Any) -> Mapping[str, Any]:
    return found if isinstance(found, Mapping) else {str(found): found}  # a version that somebody wrote by hand


def _file(module: str) -> Path | None:
    if module in _SCRIPT:
        return None
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    return Path(found.origin) if found is not None and found.origin and found.origin.endswith(".py") else None


def _imports(tree: ast.AST) -> Iterator[str]:
    """Modules of flatminima that are named; ``from package import name`` may name a module of the package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        # The package itself names everything, for its users.
        yield from (name for name in names if name.startswith("flatminima."))
