"""What an engine's first process does once it is one: vLLM's HTTP server, with Greenroom's hooks."""

from __future__ import annotations

import os
import signal
import sys
from importlib import import_module
from typing import Any

from engines.host import hooks, process
from engines.host.layout import Layout
from engines.host.protocol import StartOrder


def arguments(order: StartOrder) -> list[str]:
    """The whole command line of vLLM."""
    layout = Layout.of(order)
    return [
        *order.argv,
        *("--model", order.model_path, "--served-model-name", order.served_name, "--uds", str(layout.socket)),
    ]


def serve(order: StartOrder, parser: Any) -> None:
    """Run the server until it is told to stop; raises what vLLM raises if the engine can't start."""
    layout = Layout.of(order)
    process.confine()
    entry = import_module("vllm.entrypoints.launchers.api_server.entry")
    cli_args = import_module("vllm.entrypoints.launchers.cli_args")
    hooks.stamp_phases(layout.phases)
    hooks.keep_book(layout.book)
    sys.argv = ["engine", *arguments(order)]
    parsed = parser.parse_args(sys.argv[1:])
    entry.configure_logging_from_args(parsed)
    cli_args.validate_parsed_serve_args(parsed)
    entry.decorate_logs("APIServer")
    signal.signal(signal.SIGTERM, _interrupt)
    address, listener = entry.setup_server(parsed, reuse_port=False)
    # EngineCore is forked from here; holding the listener, it would let clients connect to a server that has died.
    os.register_at_fork(after_in_child=listener.close)
    import_module("uvloop").run(entry.run_server_worker(address, listener, parsed))


def _interrupt(*_: Any) -> None:
    """SIGTERM before the server is up, which then takes the signal over."""
    raise KeyboardInterrupt
