"""Every promise in docs/contracts names tests that exist."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "docs" / "contracts").glob("*.yaml"))
CONTRACTS = [
    contract for file in FILES for contract in yaml.safe_load(file.read_text("utf-8")) or ()
]


def names_of(contract: dict[str, Any]) -> list[str]:
    tests = contract["test"]
    return [tests] if isinstance(tests, str) else tests


def exists(node_id: str) -> bool:
    """Whether a pytest node id, without parameters, is a test of this repository."""
    path, *names = node_id.split("::")
    file = ROOT / path
    if not (names and file.is_file() and file.name.startswith("test_")):
        return False
    body = ast.parse(file.read_text("utf-8")).body
    for name in names[:-1]:
        found = [node for node in body if isinstance(node, ast.ClassDef) and node.name == name]
        if not (found and name.startswith("Test")):
            return False
        body = found[0].body
    functions = [node.name for node in body if isinstance(node, ast.FunctionDef)]
    return names[-1].startswith("test_") and names[-1] in functions


def test_there_are_contracts_of_every_kind() -> None:
    assert {file.stem for file in FILES} >= {"trace", "diff", "report", "exit-codes"}


def test_ids_are_unique() -> None:
    ids = [contract["id"] for contract in CONTRACTS]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract["id"])
def test_a_contract_names_tests_that_exist(contract: dict[str, Any]) -> None:
    assert set(contract) == {"id", "claim", "test"}
    assert contract["claim"].endswith(".")
    assert names_of(contract)
    missing = [name for name in names_of(contract) if not exists(name)]
    assert not missing


@pytest.mark.parametrize(
    "node_id",
    [
        "tests/unit/test_contracts.py",
        "tests/unit/test_contracts.py::exists",
        "tests/unit/test_contracts.py::test_gone",
        "tests/unit/test_contracts.py::TestGone::test_ids_are_unique",
        "tests/unit/test_gone.py::test_ids_are_unique",
        "tests/models.py::build",
    ],
)
def test_what_does_not_exist_is_seen(node_id: str) -> None:
    assert not exists(node_id)
    assert exists("tests/unit/test_contracts.py::test_ids_are_unique")
