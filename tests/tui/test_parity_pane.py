"""The parity pane, the tree in its colours, the banner of a rejected device, the device list."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from demo_runs import OddBackend, bring, dump, kernel_run
from driving import come_to_rest, drive, explorer_of, press, settle, then_press, until
from rich.console import Console
from textual.pilot import Pilot
from textual.widgets import OptionList, Static

from aprcore.engines.opencl.device import DeviceInfo
from aprcore.network.stages import StageKey
from aprcore.records.parity import StageParity
from aprcore.records.report import DeviceOpened, PathRejected, Report, RunEvent, RunHeader
from aprcore.runs.bisect import bisect
from aprcore.runs.request import Request
from aprtui.app import ExplorerApp
from aprtui.demo import demo_path
from aprtui.description import describe_run
from aprtui.measures import Measure
from aprtui.rows import Row, SortOrder
from aprtui.screens.devices import DevicesScreen
from aprtui.screens.parity import ParityScreen
from aprtui.theme import Paint
from aprtui.widgets.rejection import Rejection
from aprtui.widgets.run_title import RunTitle
from aprtui.widgets.verdict_bar import VerdictBar
from opencl_device import obstacle

ROOT = StageKey(2, "attn_scores")
needs_device = pytest.mark.skipif(bool(obstacle()), reason=f"no OpenCL device: {obstacle()}")
SIZES = [(40, 10), (80, 24), (120, 40), (200, 60)]


def two_dumps() -> Request:
    """A wrong engine's dump against the oracle's stage files, over the sound model."""
    wrong = kernel_run("kv-tiled", oracle=False)
    return replace(wrong, against=bring("cpu-dump", demo_path() / "oracle"))


def device_run(**options: Any) -> Request:
    model, oracle = demo_path() / "sound.apr", demo_path() / "oracle"
    return Request(model=model, oracle=oracle, gpu=True, **options)


def frozen(parity: StageParity) -> StageParity:
    """Without the times, which are others in each run."""
    tested = replace(parity.tested, elapsed_s=0.00125)
    return replace(parity, tested=tested, trusted=replace(parity.trusted, elapsed_s=0.0021))


def still(request: Request) -> Iterator[RunEvent]:
    """The engine, with times that stand still."""
    for event in bisect(request):
        if isinstance(event, StageParity):
            yield frozen(event)
        elif isinstance(event, Report):
            yield replace(event, parity=tuple(map(frozen, event.parity)))
        else:
            yield event


def as_device(request: Request) -> Iterator[RunEvent]:
    """Two dumps as if a device had made the one and the CPU the other.

    What real products give in the last digits depends on the machine; a dump does not.
    """
    for event in still(request):
        if isinstance(event, RunHeader):
            yield replace(event, backend="numpy")
            yield DeviceOpened("opencl: A Device", "1.0")
        elif isinstance(event, Report):
            rejected = PathRejected("step 0: chooses token 4, the CPU 7", ROOT, by_gate=True)
            yield rejected
            yield replace(event, rejected=rejected)
        else:
            yield event


def pane(pilot: Pilot[Any]) -> ParityScreen:
    assert isinstance(pilot.app.screen, ParityScreen)
    return pilot.app.screen


def text_of(pilot: Pilot[Any], name: str) -> str:
    return str(pilot.app.screen.query_one(name, Static).render())


def finding_of_bar(pilot: Pilot[Any]) -> list[str]:
    """The lines under the title."""
    return str(explorer_of(pilot).query_one(VerdictBar).render()).split("\n")


def shown_title(pilot: Pilot[Any]) -> str:
    """The explorer's first line as it was drawn last."""
    lines = pilot.app.screen._compositor.render_strips()
    return lines[0].text


class TestTwoDumps:
    def test_open_in_the_pane(self) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            assert pane(pilot).table.keys == explorer_of(pilot).state.keys
            await press(pilot, "escape")
            assert pilot.app.screen is explorer_of(pilot)
            assert explorer_of(pilot).state.exit_code == 1

        drive(ExplorerApp(two_dumps()), steps)

    def test_n_goes_to_the_wrong_kernel_and_enter_to_the_stage(self) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            await press(pilot, "home", "n")
            assert pane(pilot).table.key == ROOT
            assert "kv heads tiled" in text_of(pilot, "#parity-stage")
            await press(pilot, "enter")
            assert explorer_of(pilot).tree_of_stages.row == Row(key=ROOT)

        drive(ExplorerApp(two_dumps()), steps)

    def test_where_the_largest_difference_is(self) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            await press(pilot, "home", "n")
            found = explorer_of(pilot).state.parity[ROOT].comparison
            assert found is not None
            assert "at head 1, token 8, position 8" in text_of(pilot, "#parity-figures")

        drive(ExplorerApp(two_dumps()), steps)

    def test_both_sides_of_a_stage_fit_a_narrow_screen(self) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            await press(pilot, "home", "n")
            parity = explorer_of(pilot).state.parity[ROOT]
            shown = pilot.app.screen.query_one("#parity-figures", Static)
            lines = str(shown.render()).splitlines()
            assert shown.size.height == len(lines) == 2
            assert all(len(line.rstrip()) <= 80 for line in lines)
            for side in (parity.tested, parity.trusted):
                assert side.kernel is not None
                assert f"{side.kernel.relative_l2:.1e}" in lines[1]

        drive(ExplorerApp(two_dumps()), steps, size=(80, 24))

    def test_without_a_model(self) -> None:
        request = replace(two_dumps(), model=None)

        async def steps(pilot: Pilot[Any]) -> None:
            state = explorer_of(pilot).state
            assert Measure.TESTED not in state.measures
            assert state.parity_faults[0] == ROOT
            finding, _ = finding_of_bar(pilot)
            assert "✗ layer 2 · attn_scores  other vs trace FAIL" in finding

        drive(ExplorerApp(request), steps)

    def test_equal_dumps_without_a_model_claim_nothing_of_kernels(self) -> None:
        oracle = bring("cpu-dump", demo_path() / "oracle")

        async def steps(pilot: Pilot[Any]) -> None:
            finding, _ = finding_of_bar(pilot)
            assert "✓ against the other dump: no fault in 71 stages" in finding
            assert "kernel" not in finding

        drive(ExplorerApp(Request(trace=oracle, against=oracle)), steps)

    def test_one_side_only_has_no_pane(self) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            await press(pilot, "g")
            assert pilot.app.screen is explorer_of(pilot)
            shown = {
                a.binding.action for a in pilot.app.screen.active_bindings.values() if a.enabled
            }
            assert "do('parity')" not in shown

        drive(ExplorerApp(kernel_run("kv-tiled")), steps)

    @pytest.mark.parametrize("size", SIZES)
    def test_picture(self, snap_compare: Any, size: tuple[int, int]) -> None:
        app = ExplorerApp(two_dumps(), still)
        assert snap_compare(app, terminal_size=size, run_before=then_press("home", "n"))


class TestTree:
    def test_takes_the_colours_of_each_measure(self) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            explorer = explorer_of(pilot)
            await press(pilot, "escape")
            seen = []
            for _ in explorer.state.measures:
                tree = explorer.tree_of_stages
                row = Row(key=StageKey(2, "ffn_out"))
                seen.append((tree.measure, tree.painter().row(row).plain.split()[-1]))
                await press(pilot, "t")
            # The kernel is right; against the other dump it inherits what was wrong before it.
            assert dict(seen) == {
                Measure.KERNEL: "PASS", Measure.PARITY: "INHERITED", Measure.TESTED: "PASS",
            }  # fmt: skip

        drive(ExplorerApp(two_dumps()), steps)

    def test_is_sorted_by_the_difference(self) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            explorer = explorer_of(pilot)
            await press(pilot, "escape", "t", "s", "s")
            tree = explorer.tree_of_stages
            assert tree.order is SortOrder.PARITY
            parity = explorer.state.parity
            errors = [
                found.relative_l2 for row in tree.rows
                if row.key and (found := parity[row.key].comparison) is not None
            ]  # fmt: skip
            assert errors == sorted(errors, reverse=True)

        drive(ExplorerApp(two_dumps()), steps)

    def test_picture(self, snap_compare: Any) -> None:
        assert snap_compare(ExplorerApp(two_dumps(), still), run_before=then_press("escape", "t"),
                            terminal_size=(120, 40))  # fmt: skip


@needs_device
class TestDevice:
    def test_a_sound_device_agrees_in_every_stage(self) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            state = explorer_of(pilot).state
            await press(pilot, "g")
            assert "71 stages agree" in text_of(pilot, "#parity-summary")
            assert state.device is not None
            assert state.device.label in text_of(pilot, "#parity-title")
            assert state.exit_code == 0

        drive(ExplorerApp(device_run()), steps)

    def test_a_device_that_is_not_there_is_said_in_a_banner(self) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            explorer = explorer_of(pilot)
            banner = explorer.query_one(Rejection)
            assert banner.display
            assert "the CPU carries on" in str(banner.render())
            assert "no such device" in str(banner.render())
            assert explorer.state.exit_code == 0
            assert len(explorer.state.reports) == len(explorer.state.keys)

        drive(ExplorerApp(device_run(device="no such device")), steps)

    def test_a_device_can_be_chosen_from_the_list(self) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            explorer = explorer_of(pilot)
            assert not explorer.state.has_second_side
            await press(pilot, "v")
            screen = pilot.app.screen
            assert isinstance(screen, DevicesScreen)
            assert screen.query_one(OptionList).option_count
            await press(pilot, "enter")
            await settle(pilot)
            assert explorer.state.has_second_side
            assert len(explorer.state.parity) == len(explorer.state.keys)

        drive(ExplorerApp(replace(device_run(), gpu=False)), steps)


class TestTitle:
    def test_names_the_device_while_the_run_goes_on(self) -> None:
        closed, looked = threading.Event(), threading.Event()

        def held_up(request: Request) -> Iterator[RunEvent]:
            for event in as_device(request):
                if isinstance(event, DeviceOpened):
                    closed.wait(timeout=10)
                yield event
                if isinstance(event, DeviceOpened):
                    looked.wait(timeout=10)

        async def look(pilot: Pilot[Any]) -> None:
            try:
                await until(pilot, lambda: isinstance(pilot.app.screen, ParityScreen))
                await press(pilot, "escape")
                assert "gpu: opening" in shown_title(pilot)
                closed.set()
                await until(pilot, lambda: explorer_of(pilot).state.device is not None)
                await come_to_rest(pilot)
                assert explorer_of(pilot).state.is_running
                assert "gpu: opencl: A Device" in shown_title(pilot)
            finally:
                closed.set()
                looked.set()
            await settle(pilot)

        async def steps(pilot: Pilot[Any]) -> None:
            assert "gpu: rejected" in shown_title(pilot)

        drive(ExplorerApp(two_dumps(), held_up), steps, wait=look)


class TestBanner:
    def test_the_title_and_the_row_of_the_run_tell_of_the_device(self) -> None:
        wrong = Request(model=bring("sound.apr", demo_path() / "sound.apr"),
                        trace=dump(demo_path() / "sound.apr", OddBackend()),
                        against=bring("cpu-dump", demo_path() / "oracle"))  # fmt: skip

        async def steps(pilot: Pilot[Any]) -> None:
            explorer = explorer_of(pilot)
            assert "gpu: rejected" in str(explorer.query_one(RunTitle).render())
            console = Console(width=80, color_system=None)
            with console.capture() as capture:
                console.print(describe_run(explorer.state, Paint(pilot.app.theme_variables)))
            told = " ".join(capture.get().split())
            assert "gpu rejected" in told
            assert "parity ✗ first fault at " in told

        drive(ExplorerApp(wrong, as_device), steps, size=(100, 30))

    @pytest.mark.parametrize("size", SIZES)
    def test_picture(self, snap_compare: Any, size: tuple[int, int]) -> None:
        trace = dump(demo_path() / "sound.apr", OddBackend())
        oracle = bring("cpu-dump", demo_path() / "oracle")
        request = Request(model=bring("sound.apr", demo_path() / "sound.apr"), trace=trace,
                          against=oracle)  # fmt: skip

        app = ExplorerApp(request, as_device)
        assert snap_compare(app, terminal_size=size, run_before=then_press("escape"))


def made_up_devices() -> tuple[DeviceInfo, ...]:
    """What two drivers might say; a real list is another on each machine."""
    common: dict[str, Any] = {
        "driver": "560.35.03", "version": "OpenCL 3.0 CUDA", "memory_bytes": 80 << 30,
        "largest_allocation_bytes": 20 << 30, "max_group": 1024, "compute_units": 132,
        "shares_host_memory": False, "extensions": ("cl_khr_fp64",), "local_bytes": 48 << 10,
    }  # fmt: skip
    gpu = DeviceInfo(index=0, platform="A Platform", name="A GPU", kind="gpu", **common)
    cpu = replace(gpu, index=1, platform="Another", name="pthread-A CPU [b]", kind="cpu",
                  shares_host_memory=True, obstacle="its driver has no compiler")  # fmt: skip
    return gpu, cpu


class TestDeviceList:
    @pytest.mark.parametrize("size", SIZES)
    def test_picture(
        self, snap_compare: Any, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        devices = made_up_devices()
        module = "aprcore.engines.opencl.device"
        monkeypatch.setattr(f"{module}.list_devices", lambda: devices)

        app = ExplorerApp(kernel_run("kv-tiled"))
        assert snap_compare(app, terminal_size=size, run_before=then_press("v"))
