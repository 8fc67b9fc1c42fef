"""Make an oracle: run a Hugging Face model and write its stage tensors to a directory.

Everything that can be checked without torch is checked before it is imported. Nothing here reaches
for the network: a model is a directory on this machine.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from aprcore.capture.transformers_pass import (
    Float32,
    Module,
    capture,
    check_tokens,
    expected_keys,
    explained,
    graph_of,
    run_model,
)
from aprcore.dumps.sidecar import Sidecar
from aprcore.dumps.writer import TraceWriter
from aprcore.engines.arithmetic import arithmetic_of_dtype
from aprcore.formats.huggingface import CONFIG_NAME, HuggingFaceFiles, read_huggingface
from aprcore.ground.errors import OracleError
from aprcore.judging.compare import compare
from aprcore.judging.layouts import layout_of
from aprcore.judging.replay import RecordedSide, make_judgment
from aprcore.models.model import assemble, fingerprint
from aprcore.network.architectures import COMPUTED
from aprcore.network.dialects import declare_huggingface
from aprcore.network.graph import Graph
from aprcore.network.stages import StageKey
from aprcore.tokenization.library import check
from aprcore.tokenization.vocabulary import TOKENIZER_NAME

Progress = Callable[[int, int], None]  # tensors written, tensors in all

# Type of weights and activations, and how the sidecar spells its arithmetic.
DTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}

_INSTALL = "pip install 'aprtui[oracle]'"
_TOKENIZER_FILES = (TOKENIZER_NAME, "tokenizer.model", "vocab.json")


@dataclass(frozen=True, slots=True)
class OracleRequest:
    """What to capture.

    Attributes:
        source: A Hugging Face model directory with safetensors.
        prompt: The text to run; not used when `tokens` are given.
        tokens: Token ids to run.
        layers: Layers to keep, or None for all. All of them run.
        dtype: One of `DTYPES`.
        device: A torch device, or "auto" to spread the model over what there is.
        trust_remote_code: Whether to run Python code that lies in the directory.
        check: Whether the model is run once more without hooks, which must give the same logits,
            and every stage is judged on its inputs.
    """

    source: Path
    prompt: str | None = None
    tokens: tuple[int, ...] | None = None
    layers: range | None = None
    dtype: str = "float32"
    device: str = "cpu"
    trust_remote_code: bool = False
    check: bool = True


@dataclass(frozen=True, slots=True)
class OracleSummary:
    """What was captured: how many tensors, where they are, and the token ids of the pass.

    Attributes:
        judged: How many of them were found to follow from their inputs.
    """

    count: int
    directory: Path
    tokens: tuple[int, ...]
    judged: int = 0


def write_oracle(
    request: OracleRequest, directory: Path | str, progress: Progress | None = None
) -> OracleSummary:
    """Run a model and write its stage tensors, with a sidecar, to a directory.

    Each tensor is written while the pass runs and then dropped. On an error nothing remains.

    Raises:
        OracleError: The request cannot be met, or the model cannot be loaded or run.
        FormatError: A file of the model is missing or damaged.
        TraceError: The directory cannot be written.
    """
    _check_request(request)
    held = _read_source(request)
    try:
        _import_libraries()
        with quiet_transformers():
            config = _load_config(request)
            tokens = request.tokens or encode_prompt(request)
            check_tokens(tokens, config.vocab_size, request.source)
            model = load_model(request, config)
            graph = graph_of(model, request.source)
            total = len(expected_keys(graph, request.layers))
            count = 0
            check = _Check(request, held, model, graph, tokens) if request.check else None
            with TraceWriter(directory, _describe(request, held, tokens, model)) as writer:

                def write(key: StageKey, values: Float32) -> None:
                    nonlocal count
                    writer.write(key, values)
                    if check is not None:
                        check.record(key, values)
                    count += 1
                    if progress is not None:
                        progress(count, total)

                logits = capture(
                    model, tokens, write, request.layers, where=request.source, graph=graph
                )
                if check is not None:
                    check.finish(logits)
    finally:
        for file in held.files:
            file.close()
    judged = 0 if check is None else check.judged
    return OracleSummary(count, Path(directory), tokens, judged)


class _Check:
    """Whether what is captured is what the model computes, and follows from its inputs.

    Attributes:
        judged: Stages that were judged so far.
    """

    def __init__(
        self, request: OracleRequest, held: HuggingFaceFiles, model: Module, graph: Graph,
        tokens: tuple[int, ...],
    ) -> None:  # fmt: skip
        """Run the model as it is, with its own attention and without hooks."""
        self._where = request.source
        with explained("the model failed while it ran", request.source):
            self._plain = run_model(model, tokens).clone()
        declared = declare_huggingface(
            held.config, held.config_path, graph.config.architecture
        )  # fmt: skip
        _, weights = assemble(declared, held.tensors, request.source)
        self._graph = graph
        # These are the very weights that it runs with: only a cast to its type changes them.
        engine = arithmetic_of_dtype(request.dtype)
        self._side = RecordedSide(graph, weights, tokens, len(tokens), engine)
        self._layer: dict[StageKey, Float32] = {}
        self.judged = 0

    def record(self, key: StageKey, values: Float32) -> None:
        """Take a tensor; a layer is judged once the next one begins.

        Raises:
            OracleError: A stage of the layer before does not follow from its inputs.
        """
        if self._layer and next(iter(self._layer)).layer != key.layer:
            self._judge()
        self._layer[key] = values.copy()

    def finish(self, logits: Any) -> None:
        """Judge what is left, and hold the logits against those of the plain pass.

        Raises:
            OracleError: They differ in any bit.
        """
        import torch

        self._judge()
        if torch.equal(logits, self._plain):
            return
        a, b = (x.detach().double().cpu().numpy() for x in (logits, self._plain))
        error = compare(a.reshape(-1), b.reshape(-1)).relative_l2
        raise OracleError(
            f"its logits with captured attention are {error:.3g} (relative L2) from its own",
            where=self._where,
            hint="its attention does something that eager attention does not; --no-check writes"
            " the oracle all the same",
        )  # fmt: skip

    def _judge(self) -> None:
        for key in sorted(self._layer, key=self._graph.order):
            values = self._layer[key]
            self._side.enter(key)
            expected = self._side.expect(key)
            self._side.record(key, values)
            if expected is None:
                continue
            layout = layout_of(key, self._side.sizes(), values.size)
            judgment = make_judgment(values.reshape(-1), expected, layout)
            if judgment is None:  # it is not finite
                continue
            self.judged += 1
            if not judgment.passed:
                raise OracleError(
                    f"{key} does not follow from its inputs: {judgment.describe()}",
                    where=self._where,
                    hint="the model computes something that its architecture does not describe;"
                    " --no-check writes the oracle all the same",
                )
        self._layer.clear()


def encode_prompt(request: OracleRequest) -> tuple[int, ...]:
    """Token ids of the prompt, as the model's own tokenizer makes them (a BOS token included).

    Raises:
        OracleError: The prompt is empty, or the tokenizer is missing.
        TokenizerError: It is damaged.
    """
    from transformers import AutoTokenizer

    source = request.source
    # Without its files transformers makes an empty tokenizer, which encodes any text as nothing.
    if not any((source / name).exists() for name in _TOKENIZER_FILES):
        raise OracleError("the model has no tokenizer", where=source,
                          hint="put its tokenizer.json beside it or pass token ids")  # fmt: skip
    with explained("its tokenizer cannot be used", source):
        if (source / TOKENIZER_NAME).exists():
            check(source / TOKENIZER_NAME)
        tokenizer = AutoTokenizer.from_pretrained(
            source, local_files_only=True, trust_remote_code=request.trust_remote_code
        )
        tokens = tuple(int(token) for token in tokenizer(request.prompt).input_ids)
    if not tokens:
        raise OracleError(f"its tokenizer makes no tokens of {request.prompt!r}", where=source,
                          hint="pass token ids")  # fmt: skip
    return tokens


def load_model(request: OracleRequest, config: Any = None) -> Module:
    """The transformers model, with eager attention, in evaluation mode, on its device.

    Args:
        request: Which model, in which type and where.
        config: Its transformers configuration, if it is loaded already.

    Raises:
        OracleError: It cannot be loaded, or its files lack a weight.
    """
    import torch
    from transformers import AutoModelForCausalLM

    source = request.source
    options: dict[str, Any] = {}
    if request.device == "auto":
        _import("accelerate", "device 'auto'")
        options["device_map"] = "auto"
    else:
        _check_device(request.device)
    with explained("transformers cannot load it", source):
        model, loading = AutoModelForCausalLM.from_pretrained(
            source,
            config=_load_config(request) if config is None else config,
            dtype=getattr(torch, request.dtype),
            attn_implementation="eager",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=request.trust_remote_code,
            output_loading_info=True,
            **options,
        )
        if request.device != "auto":
            model.to(request.device)
    # transformers would run them with random values.
    missing = sorted(loading["missing_keys"])
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise OracleError(f"tensor {missing[0]!r}{more} is missing", where=source)
    return model.eval()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' own log lines and progress bars off the terminal."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _check_request(request: OracleRequest) -> None:
    """Refuse what can be seen to be wrong without opening anything.

    Raises:
        OracleError: The prompt is empty, the dtype unknown, or the source is no directory.
    """
    if request.dtype not in DTYPES:
        raise OracleError(f"unknown dtype {request.dtype!r}", hint=f"one of {', '.join(DTYPES)}")
    if not request.tokens and not request.prompt:
        raise OracleError("the prompt is empty", hint="give some text or token ids")
    if not request.source.is_dir():
        fault = "is not a directory" if request.source.exists() else "does not exist"
        raise OracleError(fault, where=request.source,
                          hint="give a downloaded Hugging Face model directory")  # fmt: skip


def _read_source(request: OracleRequest) -> HuggingFaceFiles:
    """The headers of the model's files, which also says whether all shards are there.

    Raises:
        FormatError: A file is missing or damaged.
        OracleError: The architecture is not supported.
    """
    path = request.source
    if not (path / CONFIG_NAME).exists():
        raise OracleError(f"the directory has no {CONFIG_NAME}", where=path,
                          hint="give a downloaded Hugging Face model directory")  # fmt: skip
    held = read_huggingface(path)
    architecture = held.config.get("model_type")
    # Code of the model's own may be built like a supported one; the capture looks at its modules.
    if architecture not in COMPUTED and not request.trust_remote_code:
        for file in held.files:
            file.close()
        hint = f"supported are {', '.join(COMPUTED)}"
        if "auto_map" in held.config:
            hint += ", and with --trust-remote-code models that are built like them"
        raise OracleError(f"architecture {architecture!r} is not supported",
                          where=held.config_path, hint=hint)  # fmt: skip
    return held


def _load_config(request: OracleRequest) -> Any:
    from transformers import AutoConfig

    with explained("transformers cannot read its configuration", request.source):
        return AutoConfig.from_pretrained(
            request.source,
            local_files_only=True,
            trust_remote_code=request.trust_remote_code,
        )


def _import_libraries() -> None:
    for module in ("torch", "transformers", "transformers.masking_utils"):
        _import(module, "capturing an oracle")


def _import(module: str, purpose: str) -> None:
    """Import an optional dependency.

    Raises:
        OracleError: It is not installed, or too old.
    """
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise OracleError(f"{purpose} needs {module}", hint=_INSTALL) from error


def _check_device(name: str) -> None:
    """Whether torch can use a device here.

    Raises:
        OracleError: It cannot.
    """
    import torch

    with explained(f"device {name!r} cannot be used", None):
        torch.empty(1, device=torch.device(name))


def _describe(
    request: OracleRequest, held: HuggingFaceFiles, tokens: tuple[int, ...], model: Module
) -> Sidecar:
    """What the directory says of itself."""
    import torch
    import transformers

    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    on_gpu = any(device.startswith("cuda") for device in devices)
    return Sidecar(
        tokens=tokens,
        prompt=None if request.tokens else request.prompt,
        positions=tuple(range(len(tokens))),
        model={
            "file": request.source.resolve().name,
            "sha256": fingerprint(held.files),
            "size_bytes": sum(file.size_bytes for file in held.files),
            "architecture": model.config.model_type,
            "num_layers": model.config.num_hidden_layers,
        },
        backend="transformers",
        device=", ".join(devices),
        driver=f"CUDA {torch.version.cuda}" if on_gpu else None,
        arithmetic=DTYPES[request.dtype],
        dtype=request.dtype,
        attention="eager (captured)",
        checked="logits and stages" if request.check else "nothing",
        versions={
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "aprtui": _own_version(),
        },
    )


def _own_version() -> str:
    try:
        return version("aprtui")
    except PackageNotFoundError:  # run from a source tree
        return "unknown"
