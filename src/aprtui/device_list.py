"""What is said of an OpenCL device, on the command line and on the screen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.padding import Padding
from rich.text import Text

from aprtui.listing import field_table
from aprtui.text import byte_count, visible

if TYPE_CHECKING:
    from rich.console import RenderableType

    from aprcore.engines.opencl.device import DeviceInfo


def device_name(device: DeviceInfo) -> Text:
    """Its number and its name."""
    return Text(f"{device.index}  {visible(device.name)}", style="bold")


def device_fields(device: DeviceInfo) -> RenderableType:
    """Everything that decides whether a device will do."""
    shared = ", the host's" if device.shares_host_memory else ""
    fields = {
        "platform": device.platform,
        "version": f"{device.version}, driver {device.driver}",
        "kind": f"{device.kind}, {device.compute_units} compute units,"
        f" work-groups of up to {device.max_group}",
        "memory": f"{byte_count(device.memory_bytes)}{shared},"
        f" {byte_count(device.largest_allocation_bytes)} at most in one piece",
        "extensions": ", ".join(device.notable_extensions) or "none that matter",
    }
    if device.obstacle:
        fields["unusable"] = device.obstacle
    return Padding(field_table(fields), (0, 0, 0, 3))
