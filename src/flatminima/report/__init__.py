"""The results of a comparison, for reading: one self-contained HTML page, and the same tables in the terminal.

Every function here takes the dictionary that ``results.json`` holds and nothing else; none of them writes a file.
"""

from __future__ import annotations

from flatminima.report.page import render

__all__ = ["render"]
