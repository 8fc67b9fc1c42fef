"""Measured over predicted energy: sound parts pass, and a local fault is found where it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aprcore.engines.estimate import Estimate
from aprcore.judging.layouts import Layout
from aprcore.judging.noise import QUANTILES, allowed_ratio, assess

HEADS = Layout((16, 12 * 8), (16, 12, 8), ("token", "head", "dim"))
NOISE = 0.05


def test_quantiles_are_those_of_chi_squared() -> None:
    for n, ratio in QUANTILES:
        shape, x = (torch.tensor(v / 2, dtype=torch.float64) for v in (n, n * ratio))
        tail = torch.special.gammaincc(shape, x)
        # Four decimals of the ratio leave the tail known to a few percent, less for large n.
        assert 0.5e-11 < float(tail) < 2e-11 or n > 1e5


def test_more_errors_are_allowed_less() -> None:
    allowed = allowed_ratio(np.array([0.2, 1, 2, 7, 100, 1e5, 1e12]))
    assert (np.diff(allowed) <= 0).all()
    assert allowed[0] == allowed[1] and allowed[-1] > 1


def sound(seed: int, layout: Layout = HEADS) -> tuple[np.ndarray, Estimate]:
    generator = np.random.default_rng(seed)
    value = generator.standard_normal(layout.shape)
    error = NOISE * generator.standard_normal(layout.shape)
    return value + error, Estimate(value, np.full(layout.shape, NOISE**2))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_sound_errors_are_explained(seed: int) -> None:
    observed, estimate = sound(seed)
    found = assess(observed, estimate, HEADS)
    assert found.explained
    # 1,536 squared errors: six standard deviations of their mean.
    assert found.ratio == pytest.approx(1, abs=6 * np.sqrt(2 / observed.size))
    assert found.floor == pytest.approx(NOISE, rel=0.2)


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        (np.s_[:, 3, 5], "head 3, dim 5"),
        (np.s_[9, :, :], "token 9"),
        (np.s_[:, 7, :], "head 7"),
        (np.s_[2, 4, :], "token 2, head 4"),
        (np.s_[2, 4, 1], "token 2, head 4, dim 1"),
        (np.s_[:], "whole tensor"),
    ],
)
def test_a_local_fault_is_found_and_named(fault, name: str) -> None:
    observed, estimate = sound(5)
    part = observed.reshape(HEADS.factors)
    part[fault] = 0
    if name.count(",") == 2:
        part[fault] += 1 + estimate.value.reshape(HEADS.factors)[fault]
    found = assess(observed, estimate, HEADS)
    assert not found.explained
    assert found.worst.name == name


def test_a_row_hides_in_the_whole_but_not_in_itself() -> None:
    layout = Layout((1, 896), (1, 896), ("token", "dim"))
    observed, estimate = sound(3, layout)
    observed[0, -8:] = 0
    found = assess(observed, estimate, layout)
    assert found.ratio < 10 < found.worst.ratio
    assert found.worst.name.startswith("dim 8")
    assert not found.explained


def test_noise_a_hundred_times_smaller_than_predicted_is_fine() -> None:
    observed, estimate = sound(4)
    quiet = estimate.value + (observed - estimate.value) / 100
    assert assess(quiet, estimate, HEADS).explained


def test_repeated_errors_count_once() -> None:
    """A weight's error is the same in tokens that look alike: a row may then reach more."""
    generator = np.random.default_rng(0)
    layout = Layout((64, 50), (64, 50), ("token", "dim"))
    value = np.zeros(layout.shape)
    error = np.tile(3.5 * NOISE * generator.choice([-1, 1], 50), (64, 1))
    variance = np.full(layout.shape, NOISE**2)
    variance[:, 1:] *= 3.5**2
    assert not assess(value + error, Estimate(value, variance), layout).explained
    assert assess(value + error, Estimate(value, variance, token_dof=1.0), layout).explained


def test_exact_zeros_have_no_noise() -> None:
    layout = Layout((2, 3), (2, 3), ("token", "dim"))
    zero = np.zeros(layout.shape)
    exact = assess(zero, Estimate(zero, zero), layout)
    assert (exact.explained, exact.ratio, exact.floor) == (True, 0.0, 0.0)
    wrong = assess(zero + 1e-30, Estimate(zero, zero), layout)
    assert not wrong.explained and wrong.ratio == np.inf


def test_an_empty_tensor_is_explained() -> None:
    layout = Layout((0, 3), (0, 3), ("token", "dim"))
    empty = np.zeros(layout.shape)
    assert assess(empty, Estimate(empty, empty), layout).explained
