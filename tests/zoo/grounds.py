"""The sound models of the zoo, with their files and oracles, each made once."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from aprcore.capture.oracle import OracleRequest, write_oracle
from aprcore.dumps.directory import TraceDirectory
from aprcore.models.convert import describe_config
from aprcore.models.model import Model, open_model
from aprcore.network.weights import read_all

from .converters import Draft
from .engine import HABITS, Engine, Frequencies, plain_frequencies

TESTS = Path(__file__).parents[1]
SHARED = TESTS.parents[1] / "shared"
DEMO = TESTS.parent / "src" / "aprtui" / "demo"

if str(TESTS) not in sys.path:
    sys.path.insert(0, str(TESTS))

from models import RandomModel, build, save  # noqa: E402


@dataclass(frozen=True)
class Ground:
    """A sound model.

    Attributes:
        architecture: `model_type`; of a model that lies somewhere already, "".
        settings: Arguments of the transformers configuration.
        strain: Makes the random weights harder to judge.
        place: Where the model lies, if it is not made here.
    """

    architecture: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    strain: Callable[[str, Any], None] | None = None
    place: Path | None = None


def _settings(**changed: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e6}
    return {
        "vocab_size": 320, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3,
        "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "rope_parameters": rope, **changed,
    }  # fmt: skip


def _large_biases(name: str, parameter: Any) -> None:
    """As Qwen2 has them: the biases of q and k decide the scores."""
    if name.endswith(("q_proj.bias", "k_proj.bias")):
        parameter.mul_(30)


def _outliers(name: str, parameter: Any) -> None:
    """Two channels of the residual stream that dwarf the others."""
    if "embed_tokens" in name:
        parameter[:, [7, 130]] *= 60
    if name.endswith("down_proj.weight"):
        parameter[[7]] *= 20


def _rope(kind: str, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **fields}}


LLAMA3 = _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
               original_max_position_embeddings=64)  # fmt: skip
LONG = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2,
        "num_key_value_heads": 1, "num_hidden_layers": 2, "vocab_size": 96}  # fmt: skip

LONGEST = LONG | {"num_attention_heads": 1, "num_hidden_layers": 1}

GEMMA = _settings(
    num_attention_heads=4, head_dim=64, query_pre_attn_scalar=48, sliding_window=6,
    attn_logit_softcapping=3.0, final_logit_softcapping=10.0, tie_word_embeddings=True,
)  # fmt: skip

# A model's place is the seed of its weights: new ones go to the end.
GROUNDS: Mapping[str, Ground] = {
    "demo": Ground("", place=DEMO / "sound.apr"),
    "linear": Ground("llama", _settings(**_rope("linear", factor=4.0))),
    "llama": Ground("llama", _settings()),
    "llama3": Ground("llama", _settings(**LLAMA3)),
    "long": Ground("qwen2", _settings(**LONG)),
    "longest": Ground("qwen2", _settings(**LONGEST)),
    "mha": Ground("llama", _settings(num_key_value_heads=8)),
    "mistral": Ground("mistral", _settings(num_attention_heads=4, sliding_window=None)),
    "odd": Ground("llama", _settings(hidden_size=96, intermediate_size=160,
                                     num_attention_heads=6, num_key_value_heads=3)),
    "outlier": Ground("qwen2", _settings(), _outliers),
    "qwen2": Ground("qwen2", _settings(num_key_value_heads=4)),
    "qwen2-bias": Ground("qwen2", _settings(num_key_value_heads=8), _large_biases),
    "qwen3": Ground("qwen3", _settings(num_attention_heads=4, head_dim=64, rms_norm_eps=1e-6)),
    "stories260k": Ground("", place=SHARED / "data" / "stories260k"),
    "yarn": Ground("qwen2", _settings(**_rope("yarn", factor=4.0,
                                              original_max_position_embeddings=64))),
    "window": Ground("mistral", _settings(num_attention_heads=4, sliding_window=6)),
    "layers": Ground("qwen3", _settings(
        num_attention_heads=4, head_dim=64, use_sliding_window=True, sliding_window=5,
        layer_types=["full_attention", "sliding_attention", "full_attention"])),
    "both": Ground("qwen2", _settings(num_key_value_heads=4, is_causal=False)),
    "both-window": Ground("mistral", _settings(num_attention_heads=4, sliding_window=3,
                                               is_causal=False)),
    "gemma": Ground("gemma2", GEMMA),
    # A width whose root no half type holds, the published caps, and a scalar of D.
    "gemma-odd": Ground("gemma2", GEMMA | {
        "hidden_size": 288, "query_pre_attn_scalar": 64, "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0, "tie_word_embeddings": False}),
    "gemma-long": Ground("gemma2", GEMMA | LONG | {"head_dim": 32, "sliding_window": 100}),
    "gemma-uncapped": Ground("gemma2", GEMMA | {
        "attn_logit_softcapping": None, "final_logit_softcapping": None}),
    # More layers than a digit counts.
    "deep": Ground("qwen2", _settings(**LONG | {"num_hidden_layers": 12})),
    # Heads that are no whole vectors.
    "tail": Ground("llama", _settings(num_attention_heads=4, head_dim=36)),
}  # fmt: skip


class Farm:
    """Makes sound models, files and oracles under a directory, once each."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._encodings: dict[tuple[str, str], dict[str, Any]] = {}
        self.source = cache(self._source)
        self.sound_file = cache(self._sound_file)
        self.oracle = cache(self._oracle)
        self.sound_engine = cache(self._sound_engine)
        self._draft = cache(self._read_draft)

    def missing(self, ground: str) -> str | None:
        """Why a ground cannot be used here, or None."""
        place = GROUNDS[ground].place
        return None if place is None or place.exists() else f"{ground} is not at hand"

    def tokens(self, ground: str, count: int) -> tuple[int, ...]:
        """Token ids; the demo's are those of its oracle."""
        if ground == "demo":
            return TraceDirectory(DEMO / "oracle").sidecar.tokens or ()
        generator = random.Random(f"{ground} {count}")
        size = self._draft(ground)[0]["vocab_size"]
        return tuple(generator.randrange(size) for _ in range(count))

    def _source(self, name: str) -> Path:
        """The model that oracles are captured from."""
        ground = GROUNDS[name]
        if ground.place is not None:
            return ground.place
        seed = list(GROUNDS).index(name)
        model = build(RandomModel(ground.architecture, ground.settings, seed))
        if ground.strain is not None:
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    ground.strain(key, parameter)
        return save(model, self.directory / name / "hf")

    def _read_draft(self, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
        with open_model(self.source(name)) as model:
            metadata = describe_config(model.config)
            return metadata, {n: read_all(w) for n, w in model.weights.items()}

    def draft(self, ground: str, dtype: str, tokens: tuple[int, ...] = ()) -> Draft:
        """A new draft of the sound model."""
        metadata, weights = self._draft(ground)
        cached = self._encodings.setdefault((ground, dtype), {})
        return Draft(dict(metadata), dict(weights), dtype, tokens, cached)

    def _sound_file(self, ground: str, dtype: str) -> Path:
        path = self.directory / ground / f"sound-{dtype}.apr"
        path.parent.mkdir(parents=True, exist_ok=True)
        return self.draft(ground, dtype).write(path)

    def _oracle(self, ground: str, dtype: str, count: int) -> TraceDirectory:
        if ground == "demo":
            return TraceDirectory(DEMO / "oracle")
        path = self.directory / ground / f"oracle-{dtype}-{count}"
        request = OracleRequest(self.source(ground), tokens=self.tokens(ground, count), dtype=dtype)
        write_oracle(request, path)
        return TraceDirectory(path)

    def _sound_engine(self, ground: str, dtype: str) -> Engine:
        return self.engine(ground, self.sound_file(ground, dtype))

    def engine(self, ground: str, path: Path, habits: str = "f32") -> Engine:
        """The zoo's engine on the weights of a file."""
        with open_model(path) as model:
            weights = {n: torch.from_numpy(read_all(w)) for n, w in model.weights.items()}
            return Engine(model.config, weights, self._frequencies(ground, model), HABITS[habits])

    def _frequencies(self, ground: str, model: Model) -> Frequencies:
        rope = model.config.rope
        if rope.scaling.kind == "default":
            return plain_frequencies(rope.theta, rope.head_dim)
        from transformers import AutoConfig
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        config = AutoConfig.from_pretrained(self.source(ground), local_files_only=True)
        inverse, factor = ROPE_INIT_FUNCTIONS[rope.scaling.kind](config, "cpu")
        return Frequencies(inverse, factor)


def quiet() -> None:
    """No progress bars of transformers on the terminal."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
