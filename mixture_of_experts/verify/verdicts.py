"""`Report`: what was found about a module, as a table, as JSON, and as an exit status."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mixture_of_experts.verify.properties import Finding


@dataclass(frozen=True)
class Report:
    """What was found about one module. Printed, it is a table with a line for each property.

    Attributes:
        module: what was verified.
        findings: what was found, by the name of the property.
        seconds: how long it took.
    """

    module: str
    findings: Mapping[str, Finding]
    seconds: float

    @property
    def failed(self) -> list[str]:
        """The names of the properties that fail."""
        return [name for name, finding in self.findings.items() if finding.verdict == "fails"]

    @property
    def exit_status(self) -> int:
        """0 if nothing fails, else 1."""
        return int(bool(self.failed))

    def to_dict(self) -> dict[str, Any]:
        """The report in types that JSON knows."""
        findings = [asdict(finding) for finding in self.findings.values()]
        return {"module": self.module, "seconds": self.seconds, "failed": self.failed, "findings": findings}

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        rows = [("property", "verdict", "number", "promise")]
        for finding in self.findings.values():
            number = "" if finding.number is None else f"{finding.number:.2g}"
            rows.append((finding.name, finding.verdict, number, finding.promise))
            rows += [("", "", "", f"  {finding.detail}")] * bool(finding.detail)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([f"{self.module}: {len(self.failed)} fail, {self.seconds:.1f} s", "", *lines])
