"""Runs a script and notes what its forked children import: a line `PID MODULE` each.

python tests/import_probe.py FILE SCRIPT [ARGUMENTS]
"""

from __future__ import annotations

import os
import runpy
import sys

_FILE, _SCRIPT = sys.argv[1:3]
_PARENT = os.getpid()


def _note(event: str, arguments: tuple[object, ...]) -> None:
    if event == "import" and os.getpid() != _PARENT:
        descriptor = os.open(_FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(descriptor, f"{os.getpid()} {arguments[0]}\n".encode())
        os.close(descriptor)


sys.addaudithook(_note)
sys.argv = sys.argv[2:]
runpy.run_path(_SCRIPT, run_name="__main__")
