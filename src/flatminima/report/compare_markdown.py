"""The results of a comparison as Markdown, for an issue or a paper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flatminima.report.markdown import escaped, markdown
from flatminima.report.methods_table import FLATNESS_LEGEND, LEGEND, flatness_table, methods_table


def compare_markdown(results: Mapping[str, Any]) -> str:
    """The answer of a comparison, its command and its cautions, and a row per method for accuracy and for flatness."""
    parts = [str(results.get("answer") or ""), f"    $ {results.get('command')}"]
    if cautions := results.get("cautions"):
        parts.append("\n".join(f"- {escaped(sentence)}" for sentence in cautions))
    for table, legend in ((methods_table(results), LEGEND), (flatness_table(results), FLATNESS_LEGEND)):
        if table:
            parts += [markdown(table), legend]
    return "\n\n".join(parts) + "\n"
