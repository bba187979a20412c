"""The results of the F2M reproduction as Markdown, for documents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flatminima.report import fewshot_tables as tables
from flatminima.report.markdown import escaped, markdown


def f2m_markdown(results: Mapping[str, Any]) -> str:
    """Answer, cautions and the main tables, with the command that made them."""
    finished = results["finished"]
    parts = [
        f"    {results['command']}",
        f"{finished['runs']} of {finished['planned']} tasks are finished.",
        results["answer"],
        "\n".join(f"- {escaped(sentence)}" for sentence in [*results["details"], *results["cautions"]]),
    ]
    for name in (
        "session", "summary", "comparison", "ablation", "claims", "flatness", "flatness_differences", "trace", "movement",
        "failures",
    ):  # fmt: skip
        table = getattr(tables, f"{name}_table")(results)
        if table:
            parts.append(f"**{table.title}**\n\n{markdown(table)}")
    return "\n\n".join(parts) + "\n"
