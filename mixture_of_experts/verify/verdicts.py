"""Defines `Finding` and `Report`, which present the results for a module as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """The result of measuring one property of a module.

    Attributes:
        name, promise: the property's name, and its promise in one sentence.
        verdict: "holds", "fails", "does not apply" or "not asked".
        number: the largest measured deviation. None if there is no finite deviation.
        limit: the largest deviation for which the property holds.
        detail: where the property fails in the smallest example, or why it does not apply or was not measured.
        expected: the reason why this kind of layer is expected to fail. An empty string means that a failure may be a
            bug.
    """

    name: str
    promise: str
    verdict: Literal["holds", "fails", "does not apply", "not asked"]
    number: float | None = None
    limit: float | None = None
    detail: str = ""
    expected: str = ""


@dataclass(frozen=True)
class Report:
    """The verification results for one module. Printing the report shows a table with one row per property.

    Attributes:
        module: class name and input width of the module.
        findings: the results, keyed by property name.
    """

    module: str
    findings: Mapping[str, Finding]

    @property
    def failed(self) -> list[str]:
        """The names of the properties that failed."""
        return [name for name, finding in self.findings.items() if finding.verdict == "fails"]

    @property
    def expected(self) -> list[str]:
        """The names of the properties whose failure is expected for this kind of layer. Other failures may be bugs."""
        return [name for name in self.failed if self.findings[name].expected]

    def to_json(self) -> str:
        """Return the report as JSON."""
        return json.dumps(asdict(self) | {"failed": self.failed, "expected": self.expected}, indent=2)

    def __str__(self) -> str:
        as_expected = f", {len(self.expected)} of them as expected" if self.expected else ""
        lines = [f"{self.module}: {len(self.failed)} fail{as_expected}", ""]
        for finding in self.findings.values():
            number = "" if finding.number is None else f"{finding.number:.2g}"
            lines.append(f"{finding.name:20}  {finding.verdict:14}  {number:7}  {finding.promise}")
            if finding.detail:
                lines.append(f"{'':49}{finding.detail}")
            if finding.expected:
                lines.append(f"{'':49}expected: {finding.expected}")
        return "\n".join(lines)
