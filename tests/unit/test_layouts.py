"""Canonical layouts, and recognising the others that engines dump."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aprcore.judging.layouts import (
    Layout,
    alternatives,
    infer_sizes,
    last_token,
    layout_of,
    zero_masked,
)
from aprcore.network.graph import known_stages
from aprcore.network.operations import Scores
from aprcore.network.stages import Scope, StageKey, resolve_shape

sizes = st.fixed_dictionaries(
    {letter: st.integers(1, 6) for letter in ("K", "E", "F", "V", "k")}
    | {"T": st.integers(1, 5), "G": st.integers(1, 3), "half": st.integers(1, 4)}
).map(lambda s: {**s, "S": s["T"], "H": s["K"] * s["G"], "D": 2 * s["half"]})
stage_names = st.sampled_from(list(known_stages()))


def key_of(name: str) -> StageKey:
    return StageKey(None if known_stages()[name].scope is Scope.MODEL else 0, name)


def numbered(layout: Layout) -> np.ndarray:
    """Different values everywhere, so that no permutation goes unseen."""
    return np.arange(1, np.prod(layout.shape) + 1, dtype=np.float32)


def canonical(name: str, sizes: dict[str, int]) -> Layout:
    return layout_of(
        key_of(name), sizes, int(np.prod(resolve_shape(known_stages()[name].shape, sizes)))
    )


@given(stage_names, sizes)
def test_positions_name_each_value_once(name: str, sizes: dict[str, int]) -> None:
    layout = canonical(name, sizes)
    positions = [layout.position(i) for i in range(int(np.prod(layout.shape)))]
    assert positions == list(np.ndindex(layout.factors))
    assert len(layout.axes) == len(layout.factors)


def test_a_position_is_token_head_and_dimension() -> None:
    layout = layout_of(StageKey(0, "q_post_rope"), {"T": 2, "H": 3, "D": 4}, 24)
    assert layout.shape == (2, 12)
    assert dict(zip(layout.axes, layout.position(12 + 4 + 3))) == {"token": 1, "head": 1, "dim": 3}


@pytest.mark.parametrize("known", [{}, {"T": 2}, {"T": 2, "E": 4}])
def test_a_size_that_is_unknown_or_does_not_fit_leaves_one_axis(known: dict[str, int]) -> None:
    assert layout_of(StageKey(0, "attn_norm"), known, 9) == Layout((9,), (9,), ("index",))


@given(sizes)
def test_sizes_are_inferred_from_a_full_dump(sizes: dict[str, int]) -> None:
    present = [name for name, stage in known_stages().items() if stage.operation is not None]
    counts = {
        key_of(name): int(np.prod(resolve_shape(known_stages()[name].shape, sizes)))
        for name in present
    }
    found = infer_sizes(counts, sizes["T"])
    assert dict(found) == {letter: sizes[letter] for letter in "TSHKDEFV"}
    assert dict(infer_sizes(counts, None)) == {"V": sizes["V"]}


def test_sizes_that_cannot_be_known_are_left_out() -> None:
    assert dict(infer_sizes({key_of("q_post_rope"): 24}, 2)) == {"T": 2, "S": 2}
    assert "E" not in infer_sizes({key_of("attn_norm"): 7}, 2)


def test_sizes_of_a_decoding_step() -> None:
    counts = {key_of("attn_scores"): 4 * 1 * 9, key_of("q_post_rope"): 64}
    assert dict(infer_sizes(counts, 1, 9)) == {"T": 1, "S": 9, "H": 4, "D": 16}


class TestMask:
    @given(sizes, st.sampled_from([np.nan, -np.inf, -65504, -3.4e38, 123.0]))
    def test_nothing_above_the_diagonal_counts(self, sizes: dict[str, int], junk: float) -> None:
        layout = canonical("attn_scores", sizes)
        x = numbered(layout)
        above = ~np.tril(np.ones(layout.shape, bool)).reshape(-1)
        dumped = np.where(above, np.float32(junk), x)
        found = zero_masked(Scores(1.0), dumped, layout)
        np.testing.assert_array_equal(found, np.where(above, 0, x))
        assert found.dtype == np.float32

    def test_a_decoding_step_sees_every_position(self) -> None:
        layout = layout_of(StageKey(0, "attn_scores"), {"H": 2, "T": 1, "S": 5}, 10)
        x = numbered(layout)
        np.testing.assert_array_equal(zero_masked(Scores(1.0), x, layout), x)

    @given(stage_names.filter(lambda name: name != "attn_scores"), sizes)
    def test_other_stages_are_passed_through(self, name: str, sizes: dict[str, int]) -> None:
        layout = canonical(name, sizes)
        x = numbered(layout)
        assert zero_masked(known_stages()[name].operation, x, layout) is x


def readings(name: str, x: np.ndarray, layout: Layout) -> dict[str, np.ndarray]:
    return dict(
        alternatives(known_stages()[name].operation, np.ascontiguousarray(x).reshape(-1), layout)
    )


class TestAlternatives:
    @given(stage_names, sizes)
    def test_each_is_a_permutation(self, name: str, sizes: dict[str, int]) -> None:
        layout = canonical(name, sizes)
        x = numbered(layout)
        for reading in readings(name, x, layout).values():
            np.testing.assert_array_equal(np.sort(reading), x)

    @pytest.mark.parametrize("name", ["q_post_rope", "k_post_rope", "attention"])
    def test_heads_before_tokens(self, name: str) -> None:
        layout = canonical(name, {"T": 3, "H": 4, "K": 2, "D": 6})
        x = numbered(layout)
        dumped = x.reshape(layout.factors).swapaxes(0, 1)
        np.testing.assert_array_equal(readings(name, dumped, layout)["heads before tokens"], x)

    @pytest.mark.parametrize("name", ["q_post_rope", "k_post_rope"])
    def test_adjacent_pairs(self, name: str) -> None:
        layout = canonical(name, {"T": 3, "H": 4, "K": 2, "D": 6})
        x = numbered(layout)
        pairs = x.reshape(*layout.factors[:2], 2, 3).swapaxes(-1, -2)
        found = readings(name, pairs, layout)
        np.testing.assert_array_equal(found["adjacent pairs within each head"], x)
        both = pairs.reshape(layout.factors).swapaxes(0, 1)
        found = readings(name, both, layout)
        np.testing.assert_array_equal(
            found["heads before tokens, adjacent pairs within each head"], x
        )

    @pytest.mark.parametrize("name", ["attn_scores", "attn_softmax"])
    def test_tokens_before_heads(self, name: str) -> None:
        layout = canonical(name, {"T": 3, "S": 3, "H": 4})
        x = numbered(layout)
        dumped = x.reshape(layout.factors).swapaxes(0, 1)
        np.testing.assert_array_equal(readings(name, dumped, layout)["tokens before heads"], x)

    @pytest.mark.parametrize("name", ["embedding", "ffn_gate", "qkv_matmul"])
    def test_dimensions_before_tokens(self, name: str) -> None:
        layout = canonical(name, {"T": 3, "H": 4, "K": 2, "D": 6, "E": 20, "F": 28})
        x = numbered(layout)
        dumped = x.reshape(layout.shape).T
        found = readings(name, dumped, layout)
        np.testing.assert_array_equal(found["dimensions before tokens"], x)

    def test_only_rotated_stages_may_keep_pairs(self) -> None:
        layout = canonical("attention", {"T": 3, "H": 4, "D": 6})
        assert not any("pairs" in name for name in readings("attention", numbered(layout), layout))

    def test_another_size_has_no_reading(self) -> None:
        layout = canonical("q_post_rope", {"T": 3, "H": 4, "D": 6})
        assert readings("q_post_rope", np.zeros(5, np.float32), layout) == {}


class TestLastToken:
    @given(stage_names, sizes)
    def test_is_the_last_row_of_every_head(self, name: str, sizes: dict[str, int]) -> None:
        layout = canonical(name, sizes)
        x = numbered(layout)
        tokens = sizes["T"]
        key = StageKey(0, name)
        if name == "lm_head" or tokens < 2:
            assert tokens == 1 or last_token(key, x, sizes, x.size) is None
            return
        found = last_token(key, x, sizes, x.size // tokens)
        assert found is not None
        row, row_layout = found
        axis = layout.axes.index("token")
        np.testing.assert_array_equal(row, np.take(x.reshape(layout.factors), -1, axis).ravel())
        assert int(np.prod(row_layout.shape)) == row.size
        assert row_layout.factors[axis] == 1
        assert last_token(key, x, sizes, x.size) is None
        assert last_token(key, x, sizes, 0) is None

    def test_logits_of_every_token_end_with_the_last_ones(self) -> None:
        x = numbered(Layout((3, 5), (3, 5), ("token", "token id")))
        found = last_token(StageKey(None, "lm_head"), x, {"T": 3, "V": 5}, 5)
        assert found is not None
        np.testing.assert_array_equal(found[0], x[-5:])
        assert found[1].shape == (5,)
