"""The results of the SWAD reproduction as Markdown, for documents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flatminima.report.domains_tables import (
    accuracy_table,
    claims_table,
    comparison_table,
    failures_table,
    flatness_table,
    pooled_table,
    valley_table,
)
from flatminima.report.markdown import escaped, markdown


def swad_markdown(results: Mapping[str, Any]) -> str:
    """Answer, cautions and the main tables, with the command that made them."""
    finished = results["finished"]
    parts = [
        f"    {results['command']}",
        f"{finished['runs']} of {finished['planned']} runs are finished.",
        results["answer"],
    ]
    parts.append("\n".join(f"- {escaped(sentence)}" for sentence in [*results["details"], *results["cautions"]]))
    for table in (
        accuracy_table(results), comparison_table(results), pooled_table(results), claims_table(results), valley_table(results),
        flatness_table(results), failures_table(results),
    ):  # fmt: skip
        if table:
            parts.append(f"**{table.title}**\n\n{markdown(table)}")
    return "\n\n".join(parts) + "\n"
