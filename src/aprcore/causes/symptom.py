"""What is visible in a wrong output that no known cause explains."""

from __future__ import annotations

from aprcore.causes.experiment import Experiment


def describe_symptom(experiment: Experiment) -> str | None:
    """The pattern of the error in a clause, or None if it has none."""
    if experiment.region is not None:
        return f"only {experiment.region.name} differ"
    return None
