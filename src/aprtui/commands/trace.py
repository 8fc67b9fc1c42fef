"""`aprtui trace`: run a model and write its stage tensors."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from aprtui.commands.run_options import add_thread_option, add_token_options

DEFAULT_LAYERS = "0..1"
TOP_TOKENS = 5


def add_parser(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "trace",
        help="run a model and write its stage tensors",
        description="Run a model on the CPU; write stage tensors as APRT files and a _trace.json.",
        allow_abbrev=False,
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="a model, as for the explorer")
    parser.add_argument("--save-tensor", metavar="A,B", help="stages to write, or all")
    parser.add_argument(
        "--save-tensor-layers", metavar="START..END",
        help=f"layers to write, END exclusive, or all (default: {DEFAULT_LAYERS})",
    )  # fmt: skip
    parser.add_argument(
        "--save-tensor-dir", type=Path, metavar="DIR",
        help="where to (default: <model>-trace beside the model)",
    )  # fmt: skip
    add_token_options(parser)
    add_thread_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Trace, and print what was written and the most likely next tokens.

    Raises:
        AprError: The arguments or the model are unusable, or the disk is full.
    """
    from aprcore.dumps.plan import (
        DEFAULT_PROMPT,
        Plan,
        check_layers,
        check_prompt,
        default_trace_directory,
        parse_layers,
        parse_stages,
        parse_tokens,
    )
    from aprcore.ground.errors import PlanError

    plan = None
    if args.save_tensor is not None:
        layers = parse_layers(args.save_tensor_layers or DEFAULT_LAYERS)
        plan = Plan(parse_stages(args.save_tensor), layers)
    elif args.save_tensor_layers is not None or args.save_tensor_dir is not None:
        raise PlanError("nothing to save", hint="say which stages with --save-tensor, or all")
    tokens = None if args.tokens is None else parse_tokens(args.tokens)
    text = check_prompt(DEFAULT_PROMPT if args.prompt is None else args.prompt)

    from aprcore.dumps.trace import record_trace
    from aprcore.models.model import open_model
    from aprcore.tokenization.tokenizer import check_token_ids

    with open_model(args.model) as model:
        if plan is not None:
            check_layers(plan.layers, model.config.num_layers)
        prompt = text if tokens is None else None
        if tokens is None:
            tokens = tuple(model.tokenizer().encode(text))
        check_token_ids(tokens, model.config.vocab_size)
        directory = None
        if plan is not None:
            directory = args.save_tensor_dir or default_trace_directory(args.model)
        written, logits = record_trace(
            model, tokens, prompt=prompt, plan=plan, directory=directory, threads=args.threads
        )
        _print(model, tokens, logits, written, directory)
    return 0


def _print(model: Any, tokens: Any, logits: Any, written: int, directory: Path | None) -> None:
    from aprcore.ground.errors import TokenizerError
    from aprcore.judging.logits import compare_logits
    from aprtui.text import visible

    try:
        tokenizer = model.tokenizer()
    except TokenizerError:
        tokenizer = None
    if directory is not None:
        print(f"{written} tensors in {visible(str(directory))}")
    print(f"tokens {','.join(map(str, tokens))}")
    found = compare_logits(logits, logits, k=TOP_TOKENS)
    for token, value in zip(found.top_a, found.values_a):
        text = "" if tokenizer is None else f"  {tokenizer.token_text(token)!r}"
        print(f"next {token:>7} {value:12.5f}{text}")
