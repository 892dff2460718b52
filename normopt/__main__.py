"""``python -m normopt eject "lpsgdm p=8 agr=true" -o lpsgdm.py``: an optimizer as one file that needs torch alone."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from normopt.ejecting import eject


def main(arguments: list[str] | None = None) -> None:
    """Run the command line: by default that of the process."""
    parser = argparse.ArgumentParser(prog="python -m normopt")
    commands = parser.add_subparsers(required=True, metavar="eject")
    command = commands.add_parser("eject", help="write an optimizer as one file that needs torch alone")
    command.add_argument("optimizer", help="its name or preset, and settings, as in 'lpsgdm p=8 agr=true'")
    command.add_argument("-o", "--output", type=Path, help="the file to write; by default it is printed")
    given = parser.parse_args(arguments)
    try:
        source = eject(given.optimizer)
    except (ValueError, TypeError) as error:
        parser.error(str(error))
    if given.output is None:
        sys.stdout.write(source)
    else:
        given.output.write_text(source, encoding="utf-8")


if __name__ == "__main__":
    main()
