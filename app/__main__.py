"""`greenroom`, and `python -m app`: the command line."""

from __future__ import annotations

import sys

from app.cli import greenroom
from app.refusal import Refused
from app.settings import SettingsInvalid


def main() -> None:
    """Run one command. Exit codes: 0 done, 1 refused (one line on stderr says why), 2 wrong usage or settings."""
    try:
        greenroom(prog_name="greenroom")
    except Refused as refused:
        sys.stderr.write(f"greenroom: {refused}\n")
        sys.exit(1)
    except SettingsInvalid as error:
        sys.stderr.write(f"greenroom: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
