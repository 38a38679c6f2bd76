"""The script of an engine that was spawned; its argument is the start order.

vLLM's EngineCore is spawned by `multiprocessing`, which runs this file again in the child, under the name `__mp_main__`
and with the same arguments. So hooks are installed here at import, in both processes.
"""

import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent
# Python puts a script's directory on the path, where `book`, `fork` and others would hide modules of those names.
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != _HERE]
sys.path.append(str(_HERE.parents[1]))

from engines.host import engine, hooks, preload, process  # noqa: E402
from engines.host.layout import Layout  # noqa: E402
from engines.host.protocol import decode, parse_start  # noqa: E402

sys.path.pop()

_ORDER = parse_start(decode(sys.argv[1].encode()))

if __name__ == "__mp_main__":
    process.die_with_parent()
    hooks.install(Layout.of(_ORDER), book=False)
    engine.compile_nothing_if_eager(_ORDER)

if __name__ == "__main__":
    engine.serve(_ORDER, preload.make_parser())
