"""Models for the real llama.cpp, and what it computes of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from ggufs import QUANTISED, blocks_model, demo_gguf, quantise


@pytest.fixture(scope="session")
def models(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """GGUF files by name: stories260k in two types, the demo, random blocks in six."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not there (`make engines`)")
    pytest.importorskip("transformers", reason="transformers is not installed")
    cases = shared / "cases" / "llama_cpp"
    if not cases.is_dir():
        pytest.skip("the cases are not at hand")
    folder = tmp_path_factory.mktemp("models")
    found = {"stories": cases / "st.gguf", "stories-Q8_0": cases / "st-q8_0.gguf"}
    found["demo"] = demo_gguf(folder / "demo.gguf")
    found["blocks"] = blocks_model(folder / "blocks.gguf")
    for kind in QUANTISED:
        found[f"blocks-{kind}"] = quantise(found["blocks"], folder / f"blocks-{kind}.gguf", kind)
    return found
