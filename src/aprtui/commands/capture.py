"""`aprtui capture`: run another engine and dump what it computes."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from aprtui.commands.run_options import add_thread_option, whole_number
from aprtui.outgoing import is_terminal, overwrite


def add_parser(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "capture",
        help="run llama.cpp and dump every tensor that it names",
        description="Run another engine and write every tensor that it names to a folder, to be"
        " judged with --trace. Needs llama-cpp-python: pip install 'aprtui[engines]'."
        " Of engines in torch, see aprcore.capture.capture_torch.",
        allow_abbrev=False,
    )
    parser.add_argument("engine", metavar="ENGINE", choices=("llama.cpp",), help="llama.cpp")
    parser.add_argument("model", metavar="MODEL.gguf", type=Path, help="a GGUF file")
    parser.add_argument("-o", "--output", metavar="DIR", type=Path, required=True,
                        help="where the tensors go; created if missing")  # fmt: skip
    text = parser.add_mutually_exclusive_group()
    text.add_argument(
        "--prompt",
        metavar="TEXT",
        help="text, which the engine makes tokens (default: What is 2+2?)",
    )
    text.add_argument("--tokens", metavar="IDS", help="token ids to run: 3838,374,220")
    parser.add_argument(
        "--step", type=whole_number("a number of tokens"), default=0, metavar="S",
        help="dump greedy decoding step S: 0 runs the prompt, S the S-th made token (default: 0)",
    )  # fmt: skip
    parser.add_argument("--kv-type", metavar="TYPE", default="f16",
                        help="type of the cache of keys and values: f32, f16, bf16, q8_0, q4_0, ..."
                        " (default: f16)")  # fmt: skip
    parser.add_argument("--flash-attn", action="store_true",
                        help="attention in one operation, which shows no scores")  # fmt: skip
    parser.add_argument("--ubatch", type=whole_number("a positive number", least=1), metavar="N",
                        help="tokens that are computed at a time (default: all)")  # fmt: skip
    parser.add_argument("--gpu-layers", type=whole_number("a number of layers"), default=0,
                        metavar="N", help="layers on a device (default: 0)")  # fmt: skip
    parser.add_argument("--lora", metavar="FILE", type=Path, help="an adapter, a GGUF file")
    parser.add_argument("--lora-scale", type=_number, default=1.0, metavar="X",
                        help="how much of it is added (default: 1)")  # fmt: skip
    parser.add_argument(
        "--set", action="append", default=[], type=_setting, metavar="NAME=X", dest="settings",
        help="a field of llama_context_params, as rope_freq_base=50000; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--override-kv", action="append", default=[], type=_override, metavar="KEY=TYPE:X",
        dest="overrides",
        help="a value in place of the file's, as llama.cpp spells it: llama.rope.freq_base="
        "float:50000; may be repeated",
    )  # fmt: skip
    add_thread_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the engine and write the folder.

    Raises:
        AprError: The arguments, the model or the engine are unusable.
    """
    from aprcore.capture.llama_cpp import LlamaCppRequest, capture_llama_cpp
    from aprcore.dumps.plan import DEFAULT_PROMPT, parse_tokens

    tokens = None if args.tokens is None else parse_tokens(args.tokens)
    prompt = DEFAULT_PROMPT if args.prompt is None else args.prompt
    request = LlamaCppRequest(
        model=args.model,
        prompt=None if tokens else prompt,
        tokens=tokens,
        step=args.step,
        kv_type=args.kv_type,
        flash_attention=args.flash_attn,
        ubatch=args.ubatch,
        gpu_layers=args.gpu_layers,
        threads=args.threads,
        parameters=dict(args.settings),
        overrides=dict(args.overrides),
        adapter=args.lora,
        adapter_scale=args.lora_scale,
    )
    from aprtui.text import visible

    on_terminal = is_terminal(sys.stderr)
    try:
        summary = capture_llama_cpp(
            request, args.output, _show_progress if on_terminal else None, _give_up
        )
    finally:
        if on_terminal:
            overwrite("")
    ids = ",".join(map(str, summary.tokens))
    where = visible(str(args.output))
    print(f"{summary.count} tensors in {where}, {len(summary.tokens)} tokens: {ids}")
    return 0


def _show_progress(done: int) -> None:
    overwrite(f"capturing {done}")


def _give_up(message: str) -> None:
    """End with one line, as for any fault; llama.cpp would abort, with a core for a message."""
    from aprtui.text import visible

    print(f"aprtui: llama.cpp gives up: {visible(message)}", file=sys.stderr, flush=True)
    os._exit(2)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def _setting(text: str) -> tuple[str, float]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=X")
    return name, _number(value)


def _override(text: str) -> tuple[str, bool | int | float | str]:
    """A value in place of the file's. Source: `--override-kv` of llama.cpp."""
    key, equals, rest = text.partition("=")
    kind, colon, value = rest.partition(":")
    if not (equals and colon):
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=TYPE:X")
    match kind:
        case "int" if value.lstrip("-").isdecimal() and len(value) < 20:
            return key, int(value)
        case "float":
            return key, _number(value)
        case "bool" if value in ("true", "false"):
            return key, value == "true"
        case "str":
            return key, value
    raise argparse.ArgumentTypeError(f"{rest!r} is none of int:1, float:1.5, bool:true, str:text")
