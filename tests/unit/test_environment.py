"""Where a run was made, told without saying whose machine it is."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from aprcore.records.environment import (
    format_command,
    read_environment,
    with_home_in_command,
    without_home,
    without_home_in_command,
)
from aprcore.records.report import (
    DeviceOpened,
    PathRejected,
    Side,
)
from report_runs import SUFFIXES, found_in, written


class TestEnvironment:
    def test_it_gives_away_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", "/home/secret-name")
        monkeypatch.setenv("HF_TOKEN", "hf_secret-token")
        header = replace(
            found_in("kv-tiled").header, trace=Side("/home/secret-name/dump", "F32"),
            notes=("read from /home/secret-name/dump",), model=None,
            trusted=Side("/home/secret-name/cpu", "F32"), tested=Side("/home/secret-name/gpu", "F"),
        )  # fmt: skip
        report = replace(
            found_in("kv-tiled"), header=header,
            device=DeviceOpened("pocl of /home/secret-name/icd", None),
            rejected=PathRejected("/home/secret-name/.cache/pocl/k.cl: does not build"),
        )  # fmt: skip
        for suffix in SUFFIXES:
            command = ("aprtui", "bisect", "--trace", "/home/secret-name/dump")
            text = written(report, suffix, tmp_path, command=command)
            (tmp_path / f"report{suffix}").unlink()
            assert "secret-token" not in text
            assert "~/dump" in text
            assert "secret-name" not in text
        assert platform.node() not in str(read_environment())

    def test_versions_are_those_installed(self) -> None:
        found = read_environment()
        assert dict(found.versions)["numpy"] == np.__version__
        assert found.python.endswith(platform.python_version())
        assert found.processors == os.cpu_count()

    @pytest.mark.parametrize(
        ("text", "shown"),
        [
            ("/home/ann", "~"),
            ("/home/ann/x", "~/x"),
            ("read /home/ann/x, then", "read ~/x, then"),
            ("/home/anna/x", "/home/anna/x"),
            ("/srv/home/ann/x", "/srv/home/ann/x"),
            ("/home/ann.old", "/home/ann.old"),
        ],
    )
    def test_home_is_a_tilde(self, monkeypatch: pytest.MonkeyPatch, text: str, shown: str) -> None:
        monkeypatch.setenv("HOME", "/home/ann")
        assert without_home(text) == shown

    def test_home_by_its_other_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "disk").mkdir()
        (tmp_path / "ann").symlink_to(tmp_path / "disk")
        monkeypatch.setenv("HOME", str(tmp_path / "ann"))
        for name in ("ann", "disk"):
            assert without_home(f"{tmp_path}/{name}/x") == "~/x"
            assert format_command(["aprtui", f"{tmp_path}/{name}/x y"]) == "aprtui ~/'x y'"

    @pytest.mark.parametrize(
        "arguments",
        [
            ["aprtui", "bisect", "m.apr"],
            ["aprtui", "--prompt", "What's 2+2?", "--oracle", "/home/ann/my dir/x"],
            ["aprtui", "", "~", "$HOME", "/home/ann", "/home/ann/", "~/x"],
            ["aprtui", "--oracle=/home/ann/a b/c", "/home/ann x", "a\nb"],
        ],
    )
    def test_a_shell_reads_the_command_back(
        self, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
    ) -> None:
        monkeypatch.setenv("HOME", "/home/ann")
        line = format_command(arguments)
        assert "/home/ann" not in line
        read = subprocess.run(
            ["sh", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True
        )
        assert read.stdout.split("\0")[:-1] == arguments

    def test_a_saved_command_is_read_back_below_the_readers_home(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        arguments = [
            "/home/ann/bin/aprtui",
            "/home/ann",
            "--oracle=/home/ann/x",
            "/srv/~x",
            "a ~ b",
        ]
        monkeypatch.setenv("HOME", "/home/ann")
        saved = without_home_in_command(arguments)
        assert saved == ["aprtui", ["", ""], ["--oracle=", "/x"], "/srv/~x", "a ~ b"]
        line = format_command(arguments)
        assert format_command(with_home_in_command(saved)) == line
        monkeypatch.setenv("HOME", "/home/bob")
        assert with_home_in_command(saved)[1:3] == ("/home/bob", "--oracle=/home/bob/x")
        assert format_command(with_home_in_command(saved)) == line
        monkeypatch.setenv("HOME", "/")
        assert with_home_in_command(saved)[2] == "--oracle=/x"

    def test_a_tilde_of_the_users_own_stays_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", "/home/ann")
        arguments = ("aprtui", "--prompt", "ls ~/", "~")
        assert with_home_in_command(without_home_in_command(arguments)) == arguments
        assert format_command(arguments) == "aprtui --prompt 'ls ~/' '~'"

    def test_a_user_without_a_home_has_none_to_hide(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("HOME")
        monkeypatch.setattr("pwd.getpwuid", lambda _: {}[0])  # as in a container, by number alone
        assert without_home("/home/ann/x and ~") == "/home/ann/x and ~"
        assert with_home_in_command([["--oracle=", "/x"]]) == ("--oracle=~/x",)

    @pytest.mark.parametrize(
        ("text", "written"),
        [
            ("file:///home/ann/m.apr", "file://~/m.apr"),
            ("cannot read /home/ann.", "cannot read ~."),
            ("/home/ann.old/x", "/home/ann.old/x"),
            ("/home/anna", "/home/anna"),
            ("https://host/home/ann/x", "https://host/home/ann/x"),
        ],
    )
    def test_the_home_directory_is_found_where_it_begins_a_path(
        self, monkeypatch: pytest.MonkeyPatch, text: str, written: str
    ) -> None:
        monkeypatch.setenv("HOME", "/home/ann")
        assert without_home(text) == written

    @pytest.mark.parametrize("program", ["/opt/x y/bin/aprtui", "/lib/aprtui/__main__.py"])
    def test_where_the_program_is_installed_is_left_out(self, program: str) -> None:
        assert format_command([program, "demo"]) == "aprtui demo"
        assert format_command([]) == ""
