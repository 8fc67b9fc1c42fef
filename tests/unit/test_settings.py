"""The settings file: what it may say, and what is said of one that says something else."""

from __future__ import annotations

from pathlib import Path

import pytest

from aprcore.ground.errors import AprError, nearest
from aprtui.cli import main
from aprtui.settings import (
    THEMES,
    Settings,
    is_first_use,
    remember_use,
    settings_path,
)
from aprtui.settings_file import load_settings, read_settings

WHOLE = """\
# what I like
theme = "okabe-ito-light"
top_k = 20
hints = false
[keys]
explorer.next = "j"
"explorer.previous" = ["K", "ctrl+up"]
[thresholds]
cosine = [0.9999, 0.99, 0.9]
tolerances = "loose.toml"
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "settings.toml"
    monkeypatch.setenv("APRTUI_SETTINGS", str(path))
    return path


def test_a_whole_file(file: Path) -> None:
    file.write_text(WHOLE, "utf-8")
    found = load_settings()
    assert found == Settings(
        path=file, theme="okabe-ito-light", top_k=20, hints=False,
        keys={"explorer.next": "j", "explorer.previous": "K,ctrl+up"},
        cosine=(0.9999, 0.99, 0.9), tolerances=file.parent / "loose.toml",
    )  # fmt: skip
    assert file.read_text("utf-8") == WHOLE


def test_an_empty_file_says_nothing(file: Path) -> None:
    file.touch()
    assert load_settings() == Settings(path=file)


@pytest.mark.parametrize(
    ("said", "parts"),
    [
        ("theme = 'dark'", ["theme is 'dark'", "okabe-ito", "monochrome"]),
        ("theme = 3", ["theme is 3"]),
        ("themes = 'okabe-ito'", ["'themes'", "did you mean theme?"]),
        ("top_k = 11", ["top_k is 11", "5, 10, 20"]),
        ("top_k = '10'", ["top_k is '10'"]),
        ("top_k = true", ["top_k is True"]),
        ("hints = 0", ["hints is 0", "true or false"]),
        ("keys = 'j'", ["keys is 'j'", "a table"]),
        ("[keys]\nexplorer.next = 5", ["keys.explorer.next is 5", '"j"']),
        ("[keys]\nexplorer.next = ''", ["keys.explorer.next is ''"]),
        ("[keys]\nexplorer.next = []", ["keys.explorer.next is []"]),
        ("[thresholds]\ncosines = [1, 0.5, 0]", ["'thresholds.cosines'", "thresholds.cosine?"]),
        ("[thresholds]\ncosine = [1, 0.5]", ["thresholds.cosine is [1, 0.5]", "three numbers"]),
        ("[thresholds]\ncosine = [0.5, 0.9, 1]", ["each less than the last"]),
        ("[thresholds]\ncosine = [1.5, 0.9, 0]", ["from -1 to 1"]),
        ("[thresholds]\ncosine = [nan, 0.9, 0]", ["from -1 to 1"]),
        ("[thresholds]\ncosine = [true, 0.9, 0]", ["from -1 to 1"]),
        ("[thresholds]\ntolerances = 1e-2", ["thresholds.tolerances is 0.01", "not a text"]),
        ("theme = ", ["is not TOML"]),
        ("theme = 'okabe-ito'\ntheme = 'okabe-ito'", ["is not TOML"]),
    ],
)
def test_one_line_names_file_and_key_and_what_is_allowed(
    file: Path, said: str, parts: list[str]
) -> None:
    file.write_text(said, "utf-8")
    with pytest.raises(AprError) as caught:
        load_settings()
    line = str(caught.value)
    assert line.startswith(f"{file}: ")
    assert "\n" not in line
    for part in parts:
        assert part in line


def test_a_file_that_is_named_has_to_be_there(file: Path) -> None:
    with pytest.raises(AprError, match=r"settings\.toml"):
        load_settings()


def test_the_usual_file_need_not_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("APRTUI_SETTINGS")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert settings_path() == tmp_path / "aprtui" / "settings.toml"
    assert load_settings() == Settings()
    settings_path().parent.mkdir()
    settings_path().write_text("top_k = 5\n", "utf-8")
    assert load_settings().top_k == 5


def test_a_relative_xdg_path_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("APRTUI_SETTINGS")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", "here")
    assert settings_path() == tmp_path / ".config" / "aprtui" / "settings.toml"


def test_tolerances_may_be_anywhere(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    for said, meant in (("/a/b.toml", "/a/b.toml"), ("~/b.toml", "/home/somebody/b.toml")):
        file.write_text(f"[thresholds]\ntolerances = '{said}'\n", "utf-8")
        assert read_settings(file).tolerances == Path(meant)


def test_the_nearest_name() -> None:
    known = ["explorer.next", "explorer.next-tab", "tree.up"]
    assert nearest("explorer.nxt", known) == "explorer.next"
    assert nearest("?", known) in known


class TestFirstUse:
    def test_is_remembered(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "new"))
        assert is_first_use()
        remember_use()
        assert not is_first_use()
        assert (tmp_path / "new" / "aprtui" / "seen").exists()
        remember_use()

    def test_what_cannot_be_written_is_no_matter(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
        remember_use()
        assert is_first_use()


class TestCommandLine:
    def test_a_broken_file_ends_the_explorer(
        self, file: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file.write_text("top_k = 7\n", "utf-8")
        for words in (["demo"], ["m.apr"], ["serve", "m.apr"]):
            assert main(words) == 2
            out, err = capsys.readouterr()
            assert out == "" and err.count("\n") == 1
            assert f"{file}: top_k is 7" in err

    def test_a_verdict_does_not_depend_on_it(
        self, file: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file.write_text("[thresholds]\ntolerances = 'loose.toml'\n", "utf-8")
        (file.parent / "loose.toml").write_text("[default]\nany = 10.0\n", "utf-8")
        assert main(["demo", "--no-screen"]) == 1
        assert "loose.toml" not in capsys.readouterr().out

    def test_a_theme_is_one_of_ours(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["demo", "--theme", "nord"]) == 2
        line = capsys.readouterr().err
        assert "nord" in line and all(name in line for name in THEMES)

    def test_the_help_says_where_it_is(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--help"]) == 0
        assert "APRTUI_SETTINGS" in capsys.readouterr().out
