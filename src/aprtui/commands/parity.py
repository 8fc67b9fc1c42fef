"""`aprtui parity`: whether the GPU says the same as the CPU; a gate for CI."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aprtui.commands.run_options import (
    add_device_option,
    add_thread_option,
    add_token_options,
    whole_number,
)
from aprtui.rejection import announce

if TYPE_CHECKING:
    from aprcore.records.parity import StageParity
    from aprcore.records.parity_report import CacheParity, ParityHeader, ParityReport, StepParity
    from aprcore.runs.parity_gate import ParityRequest

# As those of `aprcore.runs.parity_gate`, which costs the import of numpy.
DEFAULT_STEPS, MOST_STEPS = 3, 16
BACKENDS = ("opencl", "reference")

UNUSABLE = 2

# The line of a rejection is the same wherever a device is rejected, for scripts that look for it.
# It ends in "attempting fallback", and here there is none.
ONLY_JUDGES = "parity only judges: nothing was run on the CPU instead"


def add_parser(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "parity",
        help="hold the GPU against the CPU over a few decoding steps; for CI",
        description="Run a prompt and a few decoding steps on the CPU and on an OpenCL device, both"
        " on the CPU's choice of tokens. Rejects the device where the cosine of the logits is below"
        " 0.99 or it chooses another token, and names the first stage to differ. It only judges:"
        " nothing is run on the CPU in place of a device that is rejected.",
        allow_abbrev=False,
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="a model, as for the explorer")
    add_token_options(parser)
    parser.add_argument(
        "--steps", type=whole_number(f"a number from 1 to {MOST_STEPS}", 1, MOST_STEPS),
        default=DEFAULT_STEPS, metavar="N",
        help=f"decoding steps after the prompt, 1 to {MOST_STEPS} (default: {DEFAULT_STEPS})",
    )  # fmt: skip
    parser.add_argument(
        "--against", choices=BACKENDS, default=BACKENDS[0],
        help="what to hold against the CPU (default: opencl); reference is plain float64",
    )  # fmt: skip
    add_device_option(parser, "default: the best one")
    add_thread_option(parser)
    parser.add_argument(
        "--strict", action="store_true",
        help="reject whatever float32 does not explain, though the gate lets it pass",
    )  # fmt: skip
    parser.add_argument(
        "--stages", action="store_true",
        help="compare every stage of every step, and reject where a kernel is wrong on its own"
        " inputs; several times slower",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the whole report as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print a row per step and the verdict.

    Raises:
        AprError: The arguments or the model are unusable.
    """
    from aprcore.dumps.plan import check_prompt, parse_tokens
    from aprcore.ground.errors import BackendError, PlanError
    from aprcore.runs.parity_gate import ParityRequest

    if args.device is not None and args.against != "opencl":
        raise PlanError(f"--device is for OpenCL, and --against says {args.against}",
                        hint="leave one of them out")  # fmt: skip
    request = ParityRequest(
        model=args.model,
        prompt=None if args.prompt is None else check_prompt(args.prompt),
        tokens=None if args.tokens is None else parse_tokens(args.tokens),
        steps=args.steps,
        against=args.against,
        device=args.device,
        threads=args.threads,
        strict=args.strict,
        stages=args.stages,
    )
    try:
        report = _stream(request, as_json=args.json)
    except BackendError as error:
        # Nothing was compared: neither agreement nor divergence.
        _reject(str(error), request.against)
        return UNUSABLE
    if report.diverges:
        _reject(report.reason, request.against)
    return int(report.diverges)


def _reject(reason: str, backend: str) -> None:
    """Print the line of a rejection, and that nobody takes over."""
    import sys

    announce(reason, backend)
    print(f"aprtui: {ONLY_JUDGES}", file=sys.stderr, flush=True)


def _stream(request: ParityRequest, *, as_json: bool) -> ParityReport:
    """Run to the end, printing what is found as it is found."""
    import json

    from aprcore.records.parity import StageParity
    from aprcore.records.parity_report import (
        CacheParity,
        ParityHeader,
        ParityReport,
        StepParity,
        to_json,
    )
    from aprcore.runs.parity_gate import check_parity

    for event in check_parity(request):
        if isinstance(event, ParityReport):
            if as_json:
                print(json.dumps(to_json(event), indent=1, allow_nan=False))
            else:
                _print_verdict(event)
            return event
        if as_json:
            continue
        match event:
            case ParityHeader():
                _print_header(event)
            case StageParity():
                _print_stage(event)
            case StepParity():
                _print_step(event)
            case CacheParity():
                _print_cache(event)
    raise AssertionError("a run ends with its report")


def _print_header(header: ParityHeader) -> None:
    from aprtui.text import visible

    names = (header.cpu.label, header.tested.label)
    cpu, tested = (visible(name) for name in names)
    print(f"{visible(header.model)}  cpu: {cpu}  against {tested}")
    print(f"tokens {','.join(map(str, header.tokens))}, then {header.steps} decoding steps\n")
    print(
        f"{'step':<7} {'position':>8} {'token':>7} {'cosine':>10} {'relative L2':>11}"
        f" {'max|diff|':>9}  {'next':>7} {'cpu s':>8} {header.tested.backend.name + ' s':>11}"
    )


def _print_stage(stage: StageParity) -> None:
    from aprcore.judging.verdict import Verdict
    from aprcore.records.telling import figures_of, format_cosine, format_ratio
    from aprtui.text import visible

    found, kernel = stage.comparison, stage.tested.kernel
    assert found is not None
    own = "-" if kernel is None else format_ratio(kernel.relative_l2)
    word = stage.verdict.value
    if stage.verdict is not Verdict.PASS:
        word += f"  {visible(stage.reason, limit=2000)}"
    cosine, relative_l2 = figures_of(found)
    print(
        f"  {stage.key!s:<28} {format_cosine(cosine):>10}"
        f" {format_ratio(relative_l2):>11} {format_ratio(found.max_abs_diff):>9}"
        f"  kernel {own:>7} {1e3 * stage.trusted.elapsed_s:>8.2f} ms"
        f" {1e3 * stage.tested.elapsed_s:>8.2f} ms  {word}",
        flush=True,
    )


def _print_step(step: StepParity) -> None:
    from aprcore.records.telling import format_cosine, format_ratio

    name = "prompt" if step.step == 0 else str(step.step)
    word = "PASS" if step.passed else "FAIL"
    if step.passed and not step.explained:
        word += "  beyond float32 rounding, see --strict"
    has_nan = bool(step.nonfinite_cpu or step.nonfinite_tested)
    if step.argmax_tested != step.argmax_cpu and not has_nan:
        word += f"  {step.argmax_tested} on the other side, relative gap {step.gap:.3g}"
        word += ", a near-tie" if step.near_tie else ""
    cosine, relative_l2, max_abs_diff = step.cosine, step.relative_l2, step.max_abs_diff
    if has_nan:  # they cover the finite values only
        cosine = relative_l2 = max_abs_diff = math.nan
    print(
        f"{name:<7} {step.position:>8} {step.token:>7} {format_cosine(cosine):>10}"
        f" {format_ratio(relative_l2):>11} {format_ratio(max_abs_diff):>9}"
        f"  {step.argmax_cpu:>7} {step.cpu_s:>8.3f} {step.tested_s:>11.3f}  {word}",
        flush=True,
    )


def _print_cache(cache: CacheParity) -> None:
    from aprcore.records.telling import format_ratio

    word = "PASS" if cache.passed else "FAIL"
    print(
        f"{cache.side}: decoding against one pass over the same {cache.num_tokens} tokens,"
        f" relative L2 {format_ratio(cache.relative_l2)}  {word}"
    )


def _print_verdict(report: ParityReport) -> None:
    from aprtui.text import visible

    if not report.diverges:
        print(f"\nsame: {len(report.steps)} steps agree, and so do decoding and the full pass")
        return
    print(f"\ndifferent: {visible(report.reason, limit=2000)}")
