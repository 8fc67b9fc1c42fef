"""`aprtui oracle`: capture the reference from a Hugging Face model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from aprtui.outgoing import is_terminal, overwrite


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command and its arguments."""
    parser = subparsers.add_parser(
        "oracle",
        help="capture the reference with transformers",
        description="Run a Hugging Face model with transformers and write every stage tensor of "
        "the pass to a directory. Needs torch and transformers: pip install 'aprtui[oracle]'.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="HF_DIR", type=Path, help="a downloaded model directory")
    parser.add_argument("-o", "--output", metavar="DIR", type=Path, required=True,
                        help="where the tensors go; created if missing")  # fmt: skip
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--prompt", help="text to run (default: What is 2+2?)")
    text.add_argument("--tokens", metavar="IDS", help="token ids to run: 3838,374,220")
    parser.add_argument("--layers", metavar="A..B|all", default="all",
                        help="layers to keep, B exclusive (default: all)")  # fmt: skip
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32",
                        help="type of weights and activations (default: float32)")  # fmt: skip
    parser.add_argument("--device", default="cpu",
                        help="cpu, cuda, cuda:1, ..., or auto to spread the model over what "
                        "there is (default: cpu)")  # fmt: skip
    parser.add_argument("--trust-remote-code", action="store_true",
                        help="run Python code that comes with the model")  # fmt: skip
    parser.add_argument("--no-check", dest="check", action="store_false",
                        help="do not run the model a second time, without hooks, nor judge what is "
                        "captured: half the time")  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Capture the oracle.

    Raises:
        AprError: The arguments or the model are unusable.
    """
    from aprcore.capture.oracle import OracleRequest, write_oracle
    from aprcore.dumps.plan import DEFAULT_PROMPT, parse_layers, parse_tokens
    from aprtui.text import visible

    tokens = None if args.tokens is None else parse_tokens(args.tokens)
    prompt = DEFAULT_PROMPT if args.prompt is None else args.prompt
    request = OracleRequest(
        source=args.model,
        prompt=None if tokens else prompt,
        tokens=tokens,
        layers=parse_layers(args.layers),
        dtype=args.dtype,
        device=args.device,
        trust_remote_code=args.trust_remote_code,
        check=args.check,
    )
    on_terminal = is_terminal(sys.stderr)
    if on_terminal:
        overwrite("loading ...")
    try:
        summary = write_oracle(request, args.output, _show_progress if on_terminal else None)
    finally:
        if on_terminal:
            overwrite("")
    ids = ",".join(map(str, summary.tokens))
    where = visible(str(summary.directory))
    print(f"{summary.count} tensors in {where}, {len(summary.tokens)} tokens: {ids}")
    if on_terminal:
        told = f"{summary.judged} stages follow from their inputs" if args.check else "not checked"
        print(told, file=sys.stderr)
    return 0


def _show_progress(done: int, total: int) -> None:
    overwrite(f"capturing {done}/{total}")
