"""`aprtui run`: greedy text, the quickest look at whether a model is sane."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aprtui.commands.run_options import (
    add_gpu_options,
    add_thread_option,
    add_token_options,
    uses_gpu,
    whole_number,
)
from aprtui.rejection import announce

if TYPE_CHECKING:
    from aprcore.engines.decode import StepTraced
    from aprcore.models.model import Model

DEFAULT_MAX_TOKENS = 64


def add_parser(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "run",
        help="continue a prompt: the quickest look at whether a model is sane",
        description="Continue a prompt greedily, with a cache of keys and values, and print the"
        " text as it is made.",
        allow_abbrev=False,
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="a model, as for the explorer")
    add_token_options(parser)
    parser.add_argument(
        "--max-tokens", type=whole_number("a number of tokens"), default=DEFAULT_MAX_TOKENS,
        metavar="N",
        help=f"tokens to make at most (default: {DEFAULT_MAX_TOKENS})",
    )  # fmt: skip
    add_gpu_options(parser)
    add_thread_option(parser)
    parser.add_argument(
        "--trace-step", type=whole_number("a number of tokens"), metavar="S",
        help="also write the stages of decoding step S: 0 runs the prompt, S the S-th made token",
    )  # fmt: skip
    parser.add_argument(
        "--save-tensor-dir", type=Path, metavar="DIR",
        help="where to write them (default: <model>-trace beside the model)",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the text.

    Raises:
        AprError: The arguments or the model are unusable, or a device is required and rejected.
    """
    from aprcore.dumps.plan import (
        DEFAULT_PROMPT,
        check_prompt,
        default_trace_directory,
        parse_tokens,
    )
    from aprcore.ground.errors import PlanError

    use_gpu = uses_gpu(args)
    tokens = None if args.tokens is None else parse_tokens(args.tokens)
    prompt = check_prompt(DEFAULT_PROMPT if args.prompt is None else args.prompt)
    if args.max_tokens == 0:
        raise PlanError("--max-tokens 0 makes no text", hint="make at least 1")
    if args.save_tensor_dir is not None and args.trace_step is None:
        raise PlanError("nothing to save", hint="say which step with --trace-step")
    if args.trace_step is not None and args.trace_step >= args.max_tokens:
        raise PlanError(
            f"--trace-step {args.trace_step} comes after --max-tokens {args.max_tokens}",
            hint=f"make at least {args.trace_step + 1} tokens",
        )
    directory = args.save_tensor_dir or default_trace_directory(args.model)

    from aprcore.engines.decode import prompt_tokens
    from aprcore.models.model import open_model
    from aprcore.runs.fallback import open_decoder

    reject = _refuse if args.require_gpu else announce
    with open_model(args.model) as model:
        ids = prompt_tokens(model, prompt, tokens)
        opened = open_decoder(
            model, use_gpu=use_gpu, device=args.device, threads=args.threads, reject=reject
        )
        with opened as decoder:
            traced = _print_text(model, decoder, ids, args)
        if args.trace_step is not None:
            _write_step(directory, model, traced, args, prompt if tokens is None else None)
    return 0


def _print_text(
    model: Model, decoder: Any, tokens: tuple[int, ...], args: argparse.Namespace
) -> StepTraced | None:
    """Stream the text to stdout; returns the stages that were asked for, if it got there."""
    from aprcore.engines.decode import (
        StepRequest,
        StepTraced,
        TextStream,
        TokenChosen,
        find_stop_tokens,
        generate,
    )
    from aprcore.ground.errors import TokenizerError
    from aprtui.text import visible_lines

    try:
        text = TextStream(model.tokenizer())
    except TokenizerError:
        text = None
    traced = None
    events = generate(
        decoder, tokens, args.max_tokens, stop_tokens=find_stop_tokens(model),
        traced=None if args.trace_step is None else StepRequest(args.trace_step),
    )  # fmt: skip
    for event in events:
        if isinstance(event, StepTraced):
            traced = event
        elif isinstance(event, TokenChosen):
            piece = f"{event.token} " if text is None else text.add(event.token)
            print(visible_lines(piece), end="", flush=True)
    print("" if text is None else visible_lines(text.finish()))
    return traced


def _write_step(
    directory: Path, model: Model, traced: StepTraced | None, args: argparse.Namespace,
    prompt: str | None,
) -> None:  # fmt: skip
    from aprcore.dumps.trace import write_step
    from aprcore.ground.errors import PlanError
    from aprtui.text import visible

    if traced is None:
        raise PlanError(
            f"the text ended before step {args.trace_step}", hint="trace an earlier one"
        )
    count = write_step(directory, model, traced, prompt)
    told = f"{count} tensors of step {traced.step} in {visible(str(directory))}"
    print(told, file=sys.stderr)


def _refuse(reason: str) -> None:
    from aprcore.runs.fallback import RejectedError

    raise RejectedError(f"opencl path rejected: {reason}")
