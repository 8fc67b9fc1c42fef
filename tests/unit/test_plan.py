"""Stage lists, layer ranges and token lists as docs/formats.md has them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from aprcore.dumps.plan import (
    Plan,
    check_layers,
    check_prompt,
    default_trace_directory,
    parse_layers,
    parse_stages,
    parse_tokens,
)
from aprcore.ground.errors import PlanError
from aprcore.network.graph import known_stages
from aprcore.network.stages import StageKey

blanks = st.text(" \t", max_size=3)
any_case = st.sampled_from([str.lower, str.upper, str.title, str.swapcase])
stage_lists = st.lists(st.sampled_from(list(known_stages())), min_size=1, max_size=6)

# More digits than Python converts, and than any layer or token has.
ENDLESS = "9" * 5000


class TestStages:
    @given(stage_lists, any_case, blanks, blanks)
    def test_case_and_blanks_do_not_matter_and_duplicates_are_kept_in_order(
        self, names: list[str], spell: object, before: str, after: str
    ) -> None:
        text = ",".join(before + spell(name) + after for name in names)
        assert parse_stages(text) == tuple(names)

    @pytest.mark.parametrize("text", ["all", "ALL", " All\t"])
    def test_all(self, text: str) -> None:
        assert parse_stages(text) == tuple(known_stages())

    @given(stage_lists, st.data())
    def test_an_empty_item_is_refused(self, names: list[str], data: st.DataObject) -> None:
        names.insert(data.draw(st.integers(0, len(names))), data.draw(blanks))
        with pytest.raises(PlanError, match="empty stage name") as caught:
            parse_stages(",".join(names))
        assert all(name in str(caught.value) for name in known_stages())

    @given(stage_lists, st.sampled_from(["attn", "embedding.", "*", "all", "attn_norm attn_out"]))
    def test_an_unknown_item_is_refused_and_the_names_are_listed(
        self, names: list[str], wrong: str
    ) -> None:
        with pytest.raises(PlanError, match="unknown stage") as caught:
            parse_stages(",".join([*names, wrong]))
        assert wrong in str(caught.value)
        assert all(name in str(caught.value) for name in known_stages())

    def test_an_alias_stands_for_its_stage(self) -> None:
        assert parse_stages("layer_output") == ("post_ffn_residual",)

    @given(st.text(max_size=40))
    def test_any_text_gives_names_or_one_error(self, text: str) -> None:
        try:
            assert set(parse_stages(text)) <= set(known_stages())
        except PlanError as error:
            assert len(str(error).splitlines()) == 1


class TestLayers:
    @given(st.integers(0, 10**6), st.integers(1, 10**6), blanks, blanks)
    def test_the_end_is_exclusive(self, start: int, count: int, before: str, after: str) -> None:
        text = f"{before}{start}{after}..{before}{start + count}{after}"
        assert parse_layers(text) == range(start, start + count)

    def test_all_is_no_bound(self) -> None:
        assert parse_layers(" ALL ") is None

    @pytest.mark.parametrize(
        "text",
        ["", "3", "1..", "..2", "0...2", "-1..2", "0..-1", "a..b", "0..1.5", "1-3", "0..2..4",
         "٠..٣", "²..3", "0x0..2", "1_0..20", f"0..{ENDLESS}", f"{ENDLESS}..1"],
    )  # fmt: skip
    def test_what_is_no_range_is_quoted_and_answered_with_the_form(self, text: str) -> None:
        with pytest.raises(PlanError) as caught:
            parse_layers(text)
        assert repr(text) in str(caught.value)
        assert "START..END" in str(caught.value)

    @given(st.integers(0, 1000), st.integers(0, 1000))
    def test_an_empty_range_is_refused(self, end: int, surplus: int) -> None:
        with pytest.raises(PlanError) as caught:
            parse_layers(f"{end + surplus}..{end}")
        assert f"'{end + surplus}..{end}'" in str(caught.value)
        assert f"END ({end}) must be greater than START ({end + surplus})" in str(caught.value)

    @given(st.text(max_size=20))
    @example(ENDLESS)
    def test_any_text_gives_a_range_or_an_error(self, text: str) -> None:
        try:
            layers = parse_layers(text)
        except PlanError:
            return
        assert layers is None or len(layers) > 0

    def test_a_range_must_hold_a_layer_of_the_model(self) -> None:
        check_layers(None, 3)
        check_layers(range(3), 3)
        check_layers(range(2, 99), 3)
        with pytest.raises(PlanError, match=r"layers 3\.\.4 were asked for and the model has 3"):
            check_layers(range(3, 4), 3)


class TestTokens:
    @given(st.lists(st.integers(0, 10**9), min_size=1), blanks, st.booleans())
    def test_lists_round_trip(self, ids: list[int], blank: str, has_brackets: bool) -> None:
        text = ",".join(f"{blank}{i}{blank}" for i in ids)
        assert parse_tokens(f"{blank}[{text}]" if has_brackets else text) == tuple(ids)

    @pytest.mark.parametrize(
        "text",
        ["", "[]", "1,", ",1", "1,,2", "-1", "1.0", "x", "1 2", "[1", "1]", "²", "1_0", ENDLESS],
    )
    def test_what_is_no_list_is_refused(self, text: str) -> None:
        with pytest.raises(PlanError, match="is not a token id"):
            parse_tokens(text)

    @given(st.text(max_size=20))
    def test_any_text_gives_ids_or_an_error(self, text: str) -> None:
        try:
            assert all(token >= 0 for token in parse_tokens(text))
        except PlanError:
            pass


class TestPlan:
    @given(
        stage_lists, st.sampled_from(list(known_stages())), st.integers(0, 5), st.integers(0, 5),
        st.integers(1, 5),
    )  # fmt: skip
    def test_layers_bind_layers_and_not_the_whole_model(
        self, names: list[str], name: str, layer: int, start: int, count: int
    ) -> None:
        plan = Plan(tuple(names), range(start, start + count))
        assert plan.wants(StageKey(layer, name)) == (
            name in names and start <= layer < start + count
        )
        assert plan.wants(StageKey(None, name)) == (name in names)

    def test_the_default_wants_everything(self) -> None:
        assert all(Plan().wants(StageKey(99, name)) for name in known_stages())


def test_an_empty_prompt_is_refused_and_blanks_are_not() -> None:
    assert check_prompt(" ") == " "
    with pytest.raises(PlanError, match="prompt is empty"):
        check_prompt("")


def test_the_default_directory_lies_beside_the_model(tmp_path: Path) -> None:
    file = tmp_path / "qwen2.5-0.5b.apr"
    file.touch()
    (tmp_path / "llama-3.2").mkdir()
    assert default_trace_directory(file) == tmp_path.resolve() / "qwen2.5-0.5b-trace"
    assert default_trace_directory(tmp_path / "llama-3.2") == tmp_path.resolve() / "llama-3.2-trace"
