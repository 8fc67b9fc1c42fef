"""`aprtui devices`: the OpenCL devices there are, and which one would be used."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aprcore.engines.opencl.device import Choice, DeviceInfo


def add_parser(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "devices",
        help="list the OpenCL devices and say which one would be used",
        description="List the OpenCL devices that --gpu can use, and say which one it would be.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--device", metavar="NAME|INDEX",
        help="say what this choice would find: an index in the list, or part of a platform's,"
        " device's or version's text",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print every device.

    Raises:
        DeviceUnavailableError: There is none, or none that is asked for.
    """
    from aprcore.engines.opencl.device import choose_device, list_devices

    devices = list_devices()
    choice = choose_device(devices, args.device)
    if args.json:
        import json

        print(json.dumps(_record(devices, choice), indent=1))
    else:
        _print(devices, choice)
    return 0


def _record(devices: Sequence[DeviceInfo], choice: Choice) -> dict[str, Any]:
    fields = ("index", "platform", "name", "version", "driver", "kind", "memory_bytes",
              "largest_allocation_bytes", "max_group", "compute_units", "shares_host_memory",
              "extensions", "obstacle")  # fmt: skip
    return {
        "devices": [{name: getattr(device, name) for name in fields} for device in devices],
        "chosen": choice.device.index,
        "reason": choice.reason,
    }


def _print(devices: Sequence[DeviceInfo], choice: Choice) -> None:
    from rich.text import Text

    from aprtui.device_list import device_fields, device_name
    from aprtui.listing import print_parts
    from aprtui.text import visible

    parts = [part for device in devices for part in (device_name(device), device_fields(device))]
    print_parts(*parts, Text(f"\nwould use {choice.device.index}: {visible(choice.reason)}"))
