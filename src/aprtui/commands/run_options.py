"""Options shared by the commands that judge a run: what to run, and which part of it."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aprcore.runs.request import Request


# Of a number that is typed; more digits take Python ever longer to read.
MOST_NUMBER = 10**9


def whole_number(what: str, least: int = 0, most: int = MOST_NUMBER) -> Callable[[str], int]:
    """What reads a whole number from `least` to `most`; of another text it says it is no `what`."""

    def read(text: str) -> int:
        is_number = text.isascii() and text.isdigit() and len(text) <= len(str(MOST_NUMBER))
        if not (is_number and least <= int(text) <= most):
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return int(text)

    return read


def _number_of_causes(text: str) -> float:
    """A number of stages; infinity for all of them."""
    words = {"all": math.inf, "none": 0}
    return words[text] if text in words else whole_number("a number of stages, all or none")(text)


def add_token_options(parser: argparse.ArgumentParser) -> None:
    """`--prompt` or `--tokens`."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--prompt", metavar="TEXT", help="text to run")
    group.add_argument("--tokens", metavar="1,2,3", help="token ids to run; needs no tokenizer")


def add_thread_option(parser: argparse.ArgumentParser) -> None:
    """`--threads`."""
    parser.add_argument(
        "--threads", type=whole_number("a positive number", least=1), metavar="N",
        help="threads (default: one per processor)",
    )  # fmt: skip


def add_gpu_options(parser: argparse.ArgumentParser) -> None:
    """`--gpu`, `--no-gpu`, `--require-gpu` and `--device`."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--gpu", action="store_true",
        help="run on an OpenCL device, held against the CPU; where it fails, the CPU carries on",
    )  # fmt: skip
    group.add_argument(
        "--no-gpu", action="store_true", help="run on the CPU and look for no device (the default)"
    )
    group.add_argument(
        "--require-gpu", action="store_true",
        help="as --gpu, but end with exit code 2 where the CPU would carry on",
    )  # fmt: skip
    add_device_option(parser, "implies --gpu")


def add_device_option(parser: argparse.ArgumentParser, meaning: str) -> None:
    """`--device`, and what it means beside choosing one."""
    parser.add_argument(
        "--device", metavar="NAME|INDEX", help=f"which device (see `aprtui devices`); {meaning}"
    )


def uses_gpu(args: argparse.Namespace) -> bool:
    """Whether the options of `add_gpu_options` ask for a device.

    Raises:
        PlanError: They contradict each other.
    """
    from aprcore.ground.errors import PlanError

    if args.no_gpu and args.device is not None:
        raise PlanError("--device and --no-gpu contradict each other", hint="leave one out")
    return bool(args.gpu or args.require_gpu or args.device is not None)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Everything that makes a `Request`."""
    parser.add_argument(
        "model", nargs="?", type=Path, metavar="MODEL",
        help="a .apr or .gguf file, a Hugging Face directory, or a run that was saved as .aprx",
    )  # fmt: skip
    parser.add_argument(
        "--oracle", type=Path, metavar="DIR",
        help="stage files to hold it against (see `aprtui oracle`), or one .safetensors, .npz or"
        " .pt file",
    )  # fmt: skip
    parser.add_argument(
        "--trace", type=Path, metavar="DIR",
        help="judge these stage files of another engine, or its .safetensors, .npz or .pt file,"
        " instead of tracing MODEL",
    )  # fmt: skip
    parser.add_argument(
        "--shards", type=Path, nargs="+", default=(), metavar="DIR",
        help="in place of --trace: the dumps of all ranks of a tensor-parallel engine, in order",
    )  # fmt: skip
    parser.add_argument(
        "--against", type=Path, metavar="DIR",
        help="hold --trace against these stage files too, stage by stage: a GPU's against a CPU's",
    )  # fmt: skip
    parser.add_argument(
        "--names", type=Path, metavar="MAP.toml",
        help="what such a file calls the stages, if not as transformers or llama.cpp do",
    )  # fmt: skip
    parser.add_argument(
        "--row", type=whole_number("a row of a batch"), metavar="N",
        help="which sequence, where a dump holds a batch of several; counts from 0",
    )  # fmt: skip
    add_token_options(parser)
    parser.add_argument(
        "--layers",
        metavar="START..END",
        help="layers, END exclusive, or all (default: the oracle's)",
    )
    parser.add_argument("--stages", metavar="A,B", help="stages, or all (default: the oracle's)")
    add_thread_option(parser)
    add_gpu_options(parser)
    parser.add_argument(
        "--arithmetic", metavar="WORDS",
        help="what the engine behind --trace computes in: f16, or linear=q8_0,kv_cache=f16 and so"
        " on; auto: find out (default: as recorded, and the rest is found out)",
    )  # fmt: skip
    parser.add_argument(
        "--causes", metavar="N", type=_number_of_causes,
        help="for how many failing stages every known cause is tried, all or none (default: 16);"
        " what explained a stage is tried on it in other layers all the same",
    )  # fmt: skip
    parser.add_argument(
        "--engine",
        choices=("llama.cpp", "vllm", "mlx", "transformers"),
        help="the engine behind --trace, whose arithmetic is known",
    )
    parser.add_argument(
        "--cumulative-only", action="store_true",
        help="only compare with the oracle; no model and kernel judgments, about 3 times faster",
    )  # fmt: skip
    add_tolerance_options(parser)


def add_save_option(parser: argparse.ArgumentParser) -> None:
    """`--save`."""
    parser.add_argument(
        "--save", type=Path, metavar="RUN.aprx",
        help="write the run itself, which `aprtui RUN.aprx` opens again without model and oracle",
    )  # fmt: skip


def add_tolerance_options(parser: argparse.ArgumentParser) -> None:
    """`--budget`, `--tolerances` and `--reference-weights`."""
    parser.add_argument(
        "--budget", action="append", default=[], metavar="STAGE=TOLERANCE",
        help="largest relative L2 of a stage's own error, such as layer3.ffn_out=1e-3; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--tolerances", type=Path, metavar="FILE.toml",
        help="budgets per stage and dtype: [default] and [stage.NAME], with float16 = 1e-2",
    )  # fmt: skip
    parser.add_argument(
        "--reference-weights", type=Path, metavar="HF_DIR",
        help="the float model that MODEL was quantised from: say what quantisation really makes",
    )  # fmt: skip


def make_request(args: argparse.Namespace) -> Request:
    """The run that the options ask for; nothing but a file of tolerances is opened.

    Raises:
        PlanError: An option is malformed.
    """
    from aprcore.dumps.plan import Plan, check_prompt, parse_layers, parse_stages, parse_tokens
    from aprcore.ground.errors import PlanError
    from aprcore.runs.budget import parse_budgets
    from aprcore.runs.request import SUFFIX, Request, is_saved_run

    if args.shards and args.trace is not None:
        raise PlanError("--shards takes the place of --trace", hint="leave one out")
    trace = args.shards[0] if args.shards else args.trace
    if args.model is None and trace is None:
        raise PlanError("no model given", hint="name one, or a directory with --trace; see --help")
    if getattr(args, "save", None) is not None and not is_saved_run(args.save):
        raise PlanError(f"{args.save} is no name for a saved run", hint=f"end it in {SUFFIX}")
    plan = None
    if args.layers is not None or args.stages is not None:
        plan = Plan(parse_stages(args.stages or "all"), parse_layers(args.layers or "all"))
    request = Request(
        model=args.model,
        oracle=args.oracle,
        trace=trace,
        shards=tuple(args.shards),
        prompt=None if args.prompt is None else check_prompt(args.prompt),
        tokens=None if args.tokens is None else parse_tokens(args.tokens),
        plan=plan,
        threads=args.threads,
        arithmetic=args.arithmetic,
        engine=args.engine,
        names=args.names,
        row=args.row,
        reference_weights=args.reference_weights,
        budgets=parse_budgets(args.budget, args.tolerances),
        strict=getattr(args, "strict", False),
        cumulative_only=args.cumulative_only,
        gpu=uses_gpu(args),
        require_gpu=args.require_gpu,
        device=args.device,
        against=args.against,
    )
    if args.causes is not None:
        most = None if args.causes == math.inf else int(args.causes)
        request = replace(request, causes=most)
    return _saved(request) if is_saved_run(args.model or Path()) else request


def _saved(request: Request) -> Request:
    """A request whose model is a saved run; what else it names would be ignored.

    Raises:
        PlanError: It names something else.
    """
    from aprcore.ground.errors import PlanError
    from aprcore.runs.budget import parse_budgets
    from aprcore.runs.request import Request

    alone = Request(saved=request.model, budgets=parse_budgets([], None), strict=request.strict)
    if replace(request, model=None, saved=request.model) != alone:
        raise PlanError(
            f"{request.model} is a whole run: options that say what to run do not go with it",
            hint="leave them out, or name the model",
        )
    return alone
