"""Cases of sweeps, and results that nothing was run for."""

from __future__ import annotations

from pathlib import Path

from aprcore.sweep.cases import Case, CaseSettings, Prompt, Source
from aprcore.sweep.results import (
    CaseResult,
    Fault,
)


def write(folder: Path, text: str) -> Path:
    path = folder / "cases.toml"
    path.write_text(text)
    return path


def make_case(model: str = "m", backend: str = "numpy", prompt: str = "p") -> Case:
    return Case(Source(model, f"/{model}"), None, None, Prompt(prompt, prompt), backend, None,
                CaseSettings())  # fmt: skip


def make_result(case: Case, path: str | None = None, cause: str | None = "theta") -> CaseResult:
    if path is None:
        return CaseResult(case.id, "PASS", False, "fine", elapsed_s=1.0)
    fault = Fault(path, "FAIL", "kernel", cause, f"{cause} (cos 1.0)", 0.5)
    return CaseResult(case.id, "FAIL", True, "first divergence", (fault,), {"FAIL": 1}, 0.5, path,
                      2.0)  # fmt: skip
