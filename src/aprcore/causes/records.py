"""What trying the catalogue found: plain frozen records."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CauseTried:
    """One alternative operation, run on the inputs of the stage that failed.

    Attributes:
        name: What it does otherwise: "RoPE on adjacent pairs".
        advice: One sentence: what to look at.
        relative_l2: Of the observed output against this alternative.
        cosine: Of the two.
        explains: Whether it explains the output to within the bound, and as well as any other.
        is_evidence: Whether it is read off the model file, or off the spread of the errors, and
            not tried: then the figures are those of the stage as it is.
        part: The weights whose share of the output it was tried on, where a stage has several.
    """

    name: str
    advice: str
    relative_l2: float
    cosine: float
    explains: bool
    part: str = ""
    is_evidence: bool = False


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a stage fails, as far as experiments tell.

    Attributes:
        causes: What was tried, best first: all that explain, and the best of the others.
        symptom: What is visible in the output where no alternative explains it.
        tried: How many alternatives were tried.
    """

    causes: tuple[CauseTried, ...]
    symptom: str | None
    tried: int

    @property
    def named(self) -> tuple[CauseTried, ...]:
        """The causes that explain the output; several when they cannot be told apart."""
        return tuple(cause for cause in self.causes if cause.explains)

    def clause(self) -> str:
        """The finding for the middle of a sentence."""
        if not self.named:
            return f"no known cause: {self.symptom}" if self.symptom else "no known cause"
        parts = dict.fromkeys(cause.part for cause in self.named)
        choices = [" or ".join(c.name for c in self.named if c.part == part) for part in parts]
        tried = [cause.cosine for cause in self.named if not cause.is_evidence]
        proof = f" (cos {min(tried):.7f} when tried)" if tried else ""
        return "; ".join(choices) + proof

    def summary(self) -> str:
        """The finding in one sentence."""
        if self.named:
            return f"Of {self.tried} causes tried, the output is that of: {self.clause()}."
        return (
            f"None of the {self.tried} causes tried gives this output. {self.symptom or ''}".strip()
        )
