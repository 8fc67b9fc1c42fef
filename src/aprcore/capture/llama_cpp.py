"""Every tensor that llama.cpp names in a pass, through the callback of its scheduler.

The library is `llama-cpp-python` (the `engines` extra); it is imported inside the functions.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from aprcore.capture.ggml import Ggml
from aprcore.capture.llama_cpp_nodes import NodeWatch
from aprcore.dumps.plan import check_prompt
from aprcore.dumps.sidecar import Sidecar
from aprcore.dumps.tensor_folder import TensorFolderWriter
from aprcore.formats.gguf import read_gguf
from aprcore.ground.errors import PlanError, TokenizerError, TraceError, nearest
from aprcore.ground.parallel import available_threads
from aprcore.models.model import fingerprint

Progress = Callable[[int], None]
Override = bool | int | float | str

# Types of the cache by name, with their numbers in `enum ggml_type`.
KV_TYPES = {"f32": 0, "f16": 1, "bf16": 30, "q8_0": 8, "q5_1": 7, "q5_0": 6, "q4_1": 3, "q4_0": 2}
_FLOATING = frozenset({"f32", "f16", "bf16"})
# Of llama_context_params: set by fields of the request, or no number.
_TAKEN = frozenset({
    "n_ctx", "n_batch", "n_ubatch", "n_threads", "n_threads_batch", "flash_attn_type", "type_k",
    "type_v", "cb_eval", "cb_eval_user_data", "abort_callback", "abort_callback_data",
    "embeddings", "samplers", "n_samplers", "ctx_other", "n_seq_max", "pooling_type", "ctx_type",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class LlamaCppRequest:
    """What to run.

    Attributes:
        model: A GGUF file.
        prompt: Text, tokenised by llama.cpp; or None, and then `tokens`.
        tokens: Token ids.
        step: 0 captures the pass over the prompt, S the S-th greedy decoding step after it.
        kv_type: Type of the cache, one of `KV_TYPES`.
        flash_attention: Whether attention is one operation; scores are not seen then.
        ubatch: Tokens that are computed at a time; None: all.
        gpu_layers: Layers on a device, where the library was built for one.
        threads: None: one per processor.
        first_position: Position of the first token.
        parameters: Further fields of `llama_context_params`: {"rope_freq_base": 50000.0}.
        overrides: Values in place of the file's metadata: {"llama.rope.freq_base": 50000.0}.
        adapter: A LoRA adapter, a GGUF file.
        adapter_scale: How much of it is added.
    """

    model: Path
    prompt: str | None = None
    tokens: tuple[int, ...] | None = None
    step: int = 0
    kv_type: str = "f16"
    flash_attention: bool = False
    ubatch: int | None = None
    gpu_layers: int = 0
    threads: int | None = None
    first_position: int = 0
    parameters: Mapping[str, float] = field(default_factory=dict)
    overrides: Mapping[str, Override] = field(default_factory=dict)
    adapter: Path | None = None
    adapter_scale: float = 1.0


@dataclass(frozen=True, slots=True)
class LlamaCppSummary:
    """What was captured: how many tensors, and the token ids of the pass or step."""

    count: int
    tokens: tuple[int, ...]


def capture_llama_cpp(
    request: LlamaCppRequest,
    directory: Path | str,
    progress: Progress | None = None,
    last_words: Callable[[str], None] | None = None,
) -> LlamaCppSummary:
    """Run llama.cpp and write what it names to a folder, with a sidecar; on an error, nothing.

    Of several tensors with one name in a layer the first is written with `_pre` behind its name,
    the last under it and those between with what made them: `Qcur_pre-0` is the projection,
    `Qcur_bias-0` the sum with the bias, `Qcur-0` comes after RoPE. Reshaped copies between them are
    left out. `kqv_out` is what the output projection reads: where a quantised cache makes
    llama.cpp rotate values, what comes before the way back is `kqv_out_rotated`.

    Args:
        request: What to run.
        directory: Where it goes; created if missing.
        progress: Called with the number of tensors seen so far.
        last_words: Called with what llama.cpp says where it does not return an error but ends the
            process, as it does when an assertion of its own fails. Nothing is written then either.

    Raises:
        TraceError: The library is missing, cannot run this, or the folder cannot be written.
        PlanError: A parameter is unknown, or there is nothing to run.
        TokenizerError: A token id is outside the vocabulary.
        FormatError: The model's file is damaged.
    """
    library = _import_library()
    _check_request(request, library)
    held = read_gguf(request.model)
    try:
        mark, size = fingerprint(held.files), sum(file.size_bytes for file in held.files)
    finally:
        for file in held.files:
            file.close()
    with ExitStack() as stack:
        log = stack.enter_context(_quiet(library))
        writer = stack.enter_context(TensorFolderWriter(directory))
        ggml = Ggml(_base_library(library), f"llama-cpp-python {_version()}")

        def leave(message: str) -> None:
            writer.discard()
            if last_words is not None:
                last_words(message)

        stack.enter_context(ggml.on_abort(leave))
        watch = NodeWatch(ggml, writer, progress)
        engine = stack.enter_context(_opened(library, request, watch, log))
        prompt = engine.encode()
        tokens, history = engine.run(prompt)
        watch.finish(len(tokens), request.ubatch or len(tokens))
        positions = range(len(history), len(history) + len(tokens))
        writer.sidecar = Sidecar(
            tokens=tokens,
            prompt=request.prompt,
            positions=tuple(request.first_position + n for n in positions),
            history=history or None,
            model={
                "file": request.model.name, "sha256": mark, "size_bytes": size,
                "architecture": engine.metadata("general.architecture"),
                "num_layers": int(library.llama_model_n_layer(engine.model)),
            },
            backend="llama.cpp",
            device="CPU" if request.gpu_layers == 0 else f"{request.gpu_layers} layers on a device",
            driver=library.llama_print_system_info().decode().strip(" |"),
            arithmetic={"kv_cache": _read_type(request)},
            attention="flash" if request.flash_attention else "eager",
            versions={"llama-cpp-python": _version()},
            settings=_settings(request, len(prompt)),
        )  # fmt: skip
        count = len(writer)
    return LlamaCppSummary(count, tokens)


def _read_type(request: LlamaCppRequest) -> str:
    """The type that keys and values have when attention reads them.

    Source: `build_attn_mha` of llama.cpp, whose flash attention takes no float32.
    """
    is_cast = request.flash_attention and request.kv_type == "f32"
    return "f16" if is_cast else request.kv_type


def _settings(request: LlamaCppRequest, num_tokens: int) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "kv_type": request.kv_type,
        "flash_attention": request.flash_attention,
        "ubatch": request.ubatch or num_tokens,
        "gpu_layers": request.gpu_layers,
        "threads": request.threads or available_threads(),
        **request.parameters,
        **request.overrides,
    }
    if request.adapter is not None:
        settings |= {"adapter": request.adapter.name, "adapter_scale": request.adapter_scale}
    return settings


class _Engine:
    """A loaded model with a context.

    Attributes:
        model: llama.cpp's handle.
    """

    def __init__(
        self, library: Any, request: LlamaCppRequest, model: Any, watch: NodeWatch, log: list[str]
    ) -> None:  # fmt: skip
        self.model = model
        self._library = library
        self._request = request
        self._watch = watch
        self._log = log
        self._vocab = library.llama_model_get_vocab(model)
        self._context: Any = None
        self._callback = library.ggml_backend_sched_eval_callback(watch)

    def encode(self) -> tuple[int, ...]:
        """Token ids of the prompt.

        Raises:
            TokenizerError: An id is outside the vocabulary, or the text gives none.
        """
        request, library = self._request, self._library
        size = library.llama_vocab_n_tokens(self._vocab)
        if request.tokens is not None:
            for token in request.tokens:
                if token >= size:
                    raise TokenizerError(f"token id {token} is outside the vocabulary of {size}",
                                         where=request.model)  # fmt: skip
            return request.tokens
        if library.llama_vocab_type(self._vocab) == 0:  # it would end the process
            raise TokenizerError("the file has no tokenizer", where=request.model,
                                 hint="give token ids with --tokens")  # fmt: skip
        text = (request.prompt or "").encode()
        room = len(text) + 8  # a token is a byte at least, but for what the model adds
        ids = (library.llama_token * room)()
        count = library.llama_tokenize(self._vocab, text, len(text), ids, room, True, True)
        if count < 1:
            raise TokenizerError("llama.cpp makes no token of the prompt", where=request.model,
                                 hint="give token ids with --tokens")  # fmt: skip
        return tuple(ids[:count])

    def run(self, prompt: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Run the prompt and the steps after it; the last of these passes is captured.

        Returns:
            The tokens of the captured pass, and those in the cache before it.

        Raises:
            TraceError: llama.cpp cannot run it.
        """
        self._open(len(prompt))
        tokens: tuple[int, ...] = prompt
        history: tuple[int, ...] = ()
        for step in range(self._request.step + 1):
            self._watch.active = step == self._request.step
            if step:
                history, tokens = (*history, *tokens), (self._best(),)
            self._decode(tokens, self._request.first_position + len(history))
        return tokens, history

    def _open(self, num_tokens: int) -> None:
        request, library = self._request, self._library
        parameters = library.llama_context_default_params()
        for name, value in request.parameters.items():
            kind = type(getattr(parameters, name))
            setattr(parameters, name, kind(value))
        threads = request.threads or available_threads()
        parameters.n_ctx = request.first_position + num_tokens + request.step
        parameters.n_batch = num_tokens
        parameters.n_ubatch = min(request.ubatch or num_tokens, num_tokens)
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.type_k = parameters.type_v = KV_TYPES[request.kv_type]
        parameters.flash_attn_type = int(request.flash_attention)
        parameters.cb_eval = self._callback
        self._context = library.llama_init_from_model(self.model, parameters)
        if not self._context:
            raise self._fault("makes no context of these settings")
        if request.adapter is not None:
            adapter = library.llama_adapter_lora_init(self.model, str(request.adapter).encode())
            if not adapter:
                raise self._fault(f"cannot use the adapter {request.adapter}")
            adapters = (library.llama_adapter_lora_p_ctypes * 1)(adapter)
            scales = (ctypes.c_float * 1)(request.adapter_scale)
            if library.llama_set_adapters_lora(self._context, adapters, 1, scales):
                raise self._fault(f"cannot use the adapter {request.adapter}")

    def _decode(self, tokens: Sequence[int], position: int) -> None:
        library, count = self._library, len(tokens)
        batch = library.llama_batch_init(count, 0, 1)
        try:
            batch.n_tokens = count
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i] = token, position + i
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
                batch.logits[i] = i == count - 1
            code = library.llama_decode(self._context, batch)
        finally:
            library.llama_batch_free(batch)
        if self._watch.failure is not None:
            raise self._watch.failure
        if code:
            raise self._fault(f"fails with code {code} in the pass")

    def _best(self) -> int:
        """The token with the largest logit; of equal ones the first."""
        size = self._library.llama_vocab_n_tokens(self._vocab)
        logits = self._library.llama_get_logits_ith(self._context, -1)
        return int(np.argmax(np.ctypeslib.as_array(logits, (size,))))

    def metadata(self, key: str) -> str | None:
        """A value of the model's metadata, as text."""
        text = ctypes.create_string_buffer(256)
        size = self._library.llama_model_meta_val_str(self.model, key.encode(), text, len(text))
        return text.value.decode("utf-8", "replace") if size >= 0 else None

    def close(self) -> None:
        """Free the context; adapters go with the model."""
        if self._context:
            self._library.llama_free(self._context)

    def _fault(self, what: str) -> TraceError:
        return _fault(what, self._log, self._request.model)


@contextmanager
def _opened(
    library: Any, request: LlamaCppRequest, watch: NodeWatch, log: list[str]
) -> Iterator[_Engine]:
    """A loaded model, freed in the end.

    Raises:
        TraceError: llama.cpp cannot load it.
    """
    parameters = library.llama_model_default_params()
    parameters.n_gpu_layers = request.gpu_layers
    overrides = _override_table(library, request.overrides)
    if overrides is not None:
        parameters.kv_overrides = overrides
    library.llama_backend_init()
    model = library.llama_model_load_from_file(str(request.model).encode(), parameters)
    if not model:
        raise _fault("cannot load it", log, request.model)
    engine = _Engine(library, request, model, watch, log)
    try:
        yield engine
    finally:
        engine.close()
        library.llama_model_free(model)


def _override_table(library: Any, overrides: Mapping[str, Override]) -> Any:
    """The table that llama.cpp takes, ended by an empty key; None if there is nothing in it."""
    if not overrides:
        return None
    table = (library.llama_model_kv_override * (len(overrides) + 1))()
    for entry, (key, value) in zip(table, overrides.items()):
        entry.key = key.encode()
        if isinstance(value, bool):
            entry.tag, entry.value.val_bool = library.LLAMA_KV_OVERRIDE_TYPE_BOOL, value
        elif isinstance(value, int):
            entry.tag, entry.value.val_i64 = library.LLAMA_KV_OVERRIDE_TYPE_INT, value
        elif isinstance(value, float):
            entry.tag, entry.value.val_f64 = library.LLAMA_KV_OVERRIDE_TYPE_FLOAT, value
        else:
            entry.tag, entry.value.val_str = library.LLAMA_KV_OVERRIDE_TYPE_STR, value.encode()
    return table


@contextmanager
def _quiet(library: Any) -> Iterator[list[str]]:
    """Keep llama.cpp's log off the terminal; yields the lines that tell of errors."""
    lines: list[str] = []

    def log(level: int, text: bytes, user_data: int | None) -> None:
        if level == _ERROR:
            lines.append(text.decode("utf-8", "replace").strip())

    callback = library.llama_log_callback(log)
    library.llama_log_set(callback, None)
    try:
        yield lines
    finally:
        _kept_for_good.append(callback)  # until another takes its place, llama.cpp calls it


_ERROR = 4  # GGML_LOG_LEVEL_ERROR
_kept_for_good: list[Any] = []


def _fault(what: str, log: Sequence[str], where: Path) -> TraceError:
    # The first line says what is wrong; the rest, who could not go on because of it.
    cause = next(iter(log), "")
    return TraceError(f"llama.cpp {what}" + (f": {cause}" if cause else ""), where=where)


def _import_library() -> Any:
    """llama-cpp-python's functions as they are in C.

    Raises:
        TraceError: It is not installed.
    """
    try:
        from llama_cpp import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:
        raise TraceError(
            "capturing llama.cpp needs llama-cpp-python",
            hint="pip install 'aprtui[engines]', which builds it: a C++ compiler and minutes",
        ) from error
    return llama_cpp


def _base_library(library: Any) -> ctypes.CDLL:
    """The library with ggml's own functions, which llama.cpp's is linked with."""
    from llama_cpp._ctypes_extensions import load_shared_library

    return load_shared_library("ggml-base", Path(library.__file__).parent / "lib")


def _version() -> str:
    import llama_cpp

    return str(llama_cpp.__version__)


def _check_request(request: LlamaCppRequest, library: Any) -> None:
    """Refuse what can be seen to be wrong before the model is loaded.

    Raises:
        PlanError: A parameter is unknown or two contradict each other, or there is nothing to run.
    """
    if request.tokens is None:
        check_prompt(request.prompt or "")
    if not request.model.is_file():
        fault = "is no file" if request.model.exists() else "does not exist"
        raise TraceError(fault, where=request.model, hint="give a GGUF file")
    if request.kv_type not in KV_TYPES:
        raise PlanError(f"{request.kv_type!r} is no type of a cache", hint=", ".join(KV_TYPES))
    if request.kv_type not in _FLOATING and not request.flash_attention:
        raise PlanError(
            f"llama.cpp has a cache of {request.kv_type} values only with flash attention",
            hint="add --flash-attn",
        )
    known = {name: kind for name, kind in library.llama_context_params._fields_
             if name not in _TAKEN}  # fmt: skip
    for name, value in request.parameters.items():
        if name not in known:
            raise PlanError(f"{name!r} is no parameter that can be set",
                            hint=f"is {nearest(name, known)} meant?")  # fmt: skip
        if known[name] is not ctypes.c_float and value != int(value):
            raise PlanError(f"{name} is a whole number, and {value} is none")
