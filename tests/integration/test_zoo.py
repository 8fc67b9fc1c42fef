"""The judge held to the fault zoo's figures: `python -m tests.zoo` prints them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest

pytest.importorskip("torch", reason="torch is not installed (the `oracle` extra)")
pytest.importorskip("transformers", reason="transformers is not installed (the `oracle` extra)")

from zoo import corpus, table
from zoo.grounds import Farm
from zoo.run import outcomes
from zoo.trial import Case, Outcome

FAST_GROUNDS = ("qwen2", "demo")
# Of what only Gemma 2 and models with windows have, one each.
FAST_GEMMA = (
    "sound gemma/Q4_K/bfloat16/T33", "window-short@0 gemma/F32/float32/T9",
    "cap-after-mask@0 gemma/F32/float32/T9", "attn-post-norm-missing@1 gemma/F32/float32/T9",
    "embedding-unscaled@0 gemma/F32/float32/T9", "file-norms-raised@0 gemma/F32/float32/T9",
)  # fmt: skip


def sample(cases: tuple[Case, ...], step: int) -> list[Case]:
    """Every `step`th case on two models that are quickly made."""
    return [case for case in cases if case.ground in FAST_GROUNDS and case.num_tokens < 17][::step]


@pytest.fixture(scope="module")
def judged(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[Iterable[Case]], list[Outcome]]:
    """Judges cases, each once, though the whole of the corpus holds the part."""
    farm = Farm(tmp_path_factory.mktemp("zoo"))
    known: dict[Case, Outcome] = {}

    def judge(cases: Iterable[Case]) -> list[Outcome]:
        asked = list(cases)
        known.update((o.case, o) for o in outcomes([c for c in asked if c not in known], farm))
        return [known[case] for case in asked if case in known]  # but those not at hand

    return judge


# What a part of the corpus must reach too; shares of causes and of small faults need all of it.
OF_ANY_PART = (
    "first to blame is the planted stage",
    "kernel and model told apart",
    "FAIL where nothing was planted",
    "sound pairs with a FAIL",
    "two and three faults, all found",
)


def check(found: list[Outcome], names: tuple[str, ...] | None = None) -> None:
    lines = table.figures(found)
    missed = [line.name for line in lines if line.met is False]
    assert not [n for n in missed if names is None or n in names], table.to_text(lines)


def test_every_fault_is_planted_somewhere():
    corpus.check_names()


def test_the_corpus_is_as_large_as_it_should_be():
    single = corpus.single_faults()
    assert len(single) >= 80
    assert len(corpus.sound_pairs()) >= 40
    assert len(corpus.several_faults()) == 90
    assert 3 * sum(case.is_local for case in single) >= len(single)


@pytest.mark.parametrize(
    ("habit", "layout"),
    [("bf16", "modules"), ("f16", "modules"), ("stream", "states"), ("f16-in", "states"),
     ("tf32", ""), ("tf32-cut", "modules"), ("device", ""), ("device", "modules")],
)  # fmt: skip
def test_engines_that_say_nothing_and_show_little(
    judged: Callable[[Iterable[Case]], list[Outcome]], habit: str, layout: str
):
    check(judged([Case((), "qwen2", "F32", "none", 9, f"{habit}?", layout)]), OF_ANY_PART)


def test_a_part_of_the_zoo(judged: Callable[[Iterable[Case]], list[Outcome]]):
    cases = [
        *sample(corpus.single_faults(), 3),
        *sample(corpus.several_faults(), 6),
        *sample(corpus.sound_pairs(), 2),
    ]
    check(judged(cases), OF_ANY_PART)


def test_windows_and_gemma(judged: Callable[[Iterable[Case]], list[Outcome]]):
    every = {case.name: case for case in (*corpus.single_faults(), *corpus.sound_pairs())}
    found = judged([every[name] for name in FAST_GEMMA])
    check(found, OF_ANY_PART)
    assert all(o.cause_hit for o in found if o.case.faults)
