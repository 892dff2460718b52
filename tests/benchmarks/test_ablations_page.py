"""What the page on ablations shows can be typed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import typer

from benchmarks.cli import app
from benchmarks.study import flags, toml

PAGE = (Path(__file__).parents[2] / "docs/ablations.md").read_text(encoding="utf-8")


def test_the_file_is_a_study(tmp_path):
    text = re.search(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    assert text is not None
    file = tmp_path / "smaller_p.toml"
    file.write_text(text[1], encoding="utf-8")
    assert [arm.name for arm in toml.read(file).arms] == [
        *("AdamW", "LPSGDM p=4", "LPSGDM p=4 agr", "LPSGDM p=8", "LPSGDM p=8 agr")
    ]


def test_the_commands_are_there_and_the_flags_are_a_study():
    commands = typer.main.get_command(app).commands
    shown = re.findall(r"^python -m benchmarks ((?:.*\\\n)*.*)$", PAGE, re.MULTILINE)
    assert len(shown) >= 5
    for line in shown:
        words = shlex.split(line, comments=True)
        command = commands[words[0]]
        with command.make_context(words[0], words[1:]) as context:
            given = context.params
        if given.get("task"):
            study = flags.study(None, given["task"], given["arm"])
            assert len(study.arms) == len(given["arm"])
