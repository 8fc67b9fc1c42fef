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
    """

    name: str
    advice: str
    relative_l2: float
    cosine: float
    explains: bool


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
        if self.named:
            first = self.named[0]
            names = " or ".join(cause.name for cause in self.named)
            return f"{names} (cos {first.cosine:.7f} when tried)"
        return self.symptom or "no known cause"

    def summary(self) -> str:
        """The finding in one sentence."""
        if len(self.named) > 1:
            return f"The output is explained equally by {self.clause()}."
        if self.named:
            return f"The output is explained by {self.clause()}."
        return f"None of the {self.tried} causes tried explains the output: {self.clause()}."
