"""The OpenCL devices of this machine, and which one would be chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from rich.console import Group
from rich.text import Text
from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from aprtui.device_list import device_fields, device_name
from aprtui.text import visible
from aprtui.theme import Paint

if TYPE_CHECKING:
    from aprcore.engines.opencl.device import Choice, DeviceInfo


class DevicesScreen(ModalScreen[int | None]):
    """A list to choose from. Ends with the number of a device to run on, or None."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,v", "dismiss", "close", id="devices.close", tooltip="Back to the stages"),
    ]

    def __init__(self, wanted: str | None) -> None:
        super().__init__()
        self._wanted = wanted

    def compose(self) -> ComposeResult:
        """What is known of each device."""
        with Vertical(id="devices") as pane:
            pane.border_title = "OpenCL devices"
            pane.border_subtitle = "enter run on it   esc close"
            yield Static("asking the drivers…", id="devices-said")
            yield OptionList(id="device-list")

    def on_mount(self) -> None:
        """Ask in a thread: a driver may take seconds to load."""
        self.query_one(OptionList).display = False
        self._list()

    @work(thread=True, exit_on_error=False)
    def _list(self) -> None:
        from aprcore.engines.opencl.device import choose_device, list_devices
        from aprcore.ground.errors import AprError

        devices: Sequence[DeviceInfo] = ()
        try:
            devices = list_devices()
            choice = choose_device(devices, self._wanted)
        except AprError as error:
            self.call_later(self._show, devices, None, str(error))
        else:
            self.call_later(self._show, devices, choice, "")

    def _show(self, devices: Sequence[DeviceInfo], choice: Choice | None, problem: str) -> None:
        """The platforms have been asked."""
        paint, said = Paint(self.app.theme_variables), self.query_one("#devices-said", Static)
        if choice is None:
            said.update(Text(visible(problem), paint("verdict-fail")))
        else:
            number, reason = choice.device.index, visible(choice.reason)
            said.update(Text(f"would use {number}: {reason}", paint("verdict-pass")))
        options = self.query_one(OptionList)
        options.display = bool(devices)
        for device in devices:
            shown = Group(device_name(device), device_fields(device))
            options.add_option(Option(shown, str(device.index), disabled=bool(device.obstacle)))
        if choice is not None:
            options.highlighted = options.get_option_index(str(choice.device.index))
        options.focus()

    @on(OptionList.OptionSelected)
    def _choose(self, event: OptionList.OptionSelected) -> None:
        assert event.option_id is not None
        self.dismiss(int(event.option_id))
