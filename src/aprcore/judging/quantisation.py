"""How much of an error the quantisation really makes, measured with the weights it was made of.

The noise floor is predicted from the step sizes in the model file. Where the float weights are at
hand, a stage is run with both on the oracle's inputs: the difference is what quantisation does, and
what remains between the oracle and the float product is the oracle's own rounding.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aprcore.engines.arithmetic import EXACT
from aprcore.engines.estimate import Profile
from aprcore.engines.prediction import PredictionBackend
from aprcore.ground.errors import WeightError
from aprcore.judging.replay import RecordedSide, run_stage
from aprcore.judging.verdict import FLOAT_TYPES, HALF_TYPES
from aprcore.network.operations import HEAD
from aprcore.network.stages import StageKey

if TYPE_CHECKING:
    from aprcore.models.model import Model

# Exact arithmetic leaves the error of the stored steps alone.
_EXACT = Profile(EXACT, weights_rounded=True)


@dataclass(frozen=True, slots=True)
class Quantisation:
    """What quantised weights do to one stage, on the oracle's inputs. All relative L2.

    Attributes:
        true_relative_l2: |W_q x - W x| / |W x|: the error that quantisation makes.
        predicted_relative_l2: What the stored step sizes predict for it.
        remaining_relative_l2: |oracle - W x| / |W x|: the oracle's own rounding, if the reference
            weights are those that it ran with.
    """

    true_relative_l2: float
    predicted_relative_l2: float
    remaining_relative_l2: float

    @property
    def ratio(self) -> float | None:
        """True over predicted; None where no error is predicted."""
        if self.predicted_relative_l2 == 0:
            return None
        return self.true_relative_l2 / self.predicted_relative_l2

    def describe(self) -> str:
        """The finding in a clause."""
        return (
            f"quantisation makes {self.true_relative_l2:.3g} (predicted"
            f" {self.predicted_relative_l2:.2g}), the oracle is {self.remaining_relative_l2:.2g}"
            " from the reference weights"
        )


def open_reference(path: Path, model: Model) -> Model:
    """Open the float weights that a model was made of.

    Raises:
        AprError: They cannot be opened.
        WeightError: They are quantised themselves, or are another model's.
    """
    from aprcore.models.model import open_model

    reference = open_model(path)
    try:
        _check(reference, model)
    except WeightError:
        reference.close()
        raise
    return reference


def _check(reference: Model, model: Model) -> None:
    quantised = sorted(reference.weight_types - FLOAT_TYPES - HALF_TYPES)
    if quantised:
        raise WeightError(
            f"holds {quantised[0]} weights; the reference must be floating-point",
            where=reference.path, hint="name the checkpoint that was quantised",
        )  # fmt: skip
    for name in sorted(reference.weights.keys() ^ model.weights.keys()):
        if name != HEAD:  # a file may leave it out where it equals the embedding
            lacking = reference if name in model.weights else model
            raise WeightError(
                f"{lacking.path} has no tensor {name!r}", where=reference.path,
                hint="the reference weights must be of the same model",
            )  # fmt: skip
    for name, weight in model.weights.items():
        other = reference.weights.get(name)
        if other is not None and other.shape != weight.shape:
            raise WeightError(
                f"tensor {name!r} has shape {list(other.shape)}, the model's {list(weight.shape)}",
                where=reference.path, hint="the reference weights must be of the same model",
            )  # fmt: skip


def measure_quantisation(
    reference: Model, oracle: RecordedSide, key: StageKey, observed: NDArray[np.floating[Any]]
) -> Quantisation | None:
    """What quantisation does to a stage; None without quantised weights or the oracle's inputs.

    Args:
        reference: The float weights.
        oracle: The oracle's side, with the quantised weights.
        key: The stage.
        observed: The oracle's tensor of it, in canonical layout.
    """
    operation = oracle.graph.operation(key)
    site = oracle.site(key)
    used = [] if operation is None else [site.find(use.name) for use in operation.weights]
    if all(weight is None or weight.dtype in ("F32", "F64") for weight in used):
        return None
    inputs = oracle.inputs(key)
    if inputs is None or any(x.recomputed for x in inputs):
        return None
    estimates = [x.estimate for x in inputs]
    backend = PredictionBackend([(None, _EXACT)])
    quantised = run_stage(backend, site, oracle.graph, key, estimates)
    site = dataclasses.replace(site, weights=reference.weights)
    sound = run_stage(backend, site, oracle.graph, key, estimates)
    if quantised is None or sound is None or sound.value.size != observed.size:
        return None
    energy = float(np.square(sound.value).sum())
    if energy == 0 or not math.isfinite(energy) or not np.isfinite(quantised.value).all():
        return None
    x = np.asarray(observed, dtype=np.float64).reshape(sound.value.shape)
    if not np.isfinite(x).all():
        return None
    errors = (
        np.square(quantised.value - sound.value), quantised.variance, np.square(x - sound.value)
    )  # fmt: skip
    return Quantisation(*(math.sqrt(float(np.sum(error)) / energy) for error in errors))
