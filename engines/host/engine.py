"""What an engine's first process does once it is one: vLLM's HTTP server, with Greenroom's hooks."""

from __future__ import annotations

import os
import socket
from collections.abc import Awaitable
from importlib import import_module
from typing import Any

from engines.host import hooks, process
from engines.host.early import EarlyCore
from engines.host.layout import Layout
from engines.host.protocol import StartOrder


def serve(order: StartOrder, parser: Any) -> None:
    """Run the server as vLLM does until it is told to stop; raises what vLLM raises if the engine can't start."""
    arguments = _prepare(order, parser)
    import_module("uvloop").run(_entry().run_server(arguments))


def serve_early(order: StartOrder, parser: Any) -> None:
    """The same, sooner: EngineCore is forked first. For a process that may fork; see `early`.

    SIGTERM ends the process at once until the server is up and handles it. vLLM would raise an exception wherever the
    signal finds it, which is lost in the wrong place, or leaves a lock behind.
    """
    arguments = _prepare(order, parser)
    entry = _entry()
    entry.decorate_logs("APIServer")
    address, listener = entry.setup_server(arguments, reuse_port=False)
    # EngineCore is forked from here; holding the listener, it would let clients connect to a server that has died.
    os.register_at_fork(after_in_child=listener.close)
    usage_context = import_module("vllm.usage.usage_lib").UsageContext.OPENAI_API_SERVER
    engine_arguments = entry.AsyncEngineArgs.from_cli_args(arguments)
    config = engine_arguments.create_engine_config(usage_context=usage_context)
    engine_arguments.create_engine_config = lambda **_: config
    core = EarlyCore(config)
    core.lend(lambda renderer: _prepare_application(renderer, arguments, config))
    import_module("uvloop").run(_run(engine_arguments, usage_context, address, listener, arguments))


async def _run(
    engine_arguments: Any, usage_context: Any, address: str, listener: socket.socket, arguments: Any
) -> None:
    """The rest of vLLM's `run_server_worker`, for a config that has been made already."""
    entry = _entry()
    async with entry.build_async_engine_client_from_engine_args(
        engine_arguments, usage_context=usage_context
    ) as client:
        shutdown: Awaitable[None] = await entry.build_and_serve(client, address, listener, arguments)
    try:
        await shutdown
    finally:
        listener.close()


def _prepare(order: StartOrder, parser: Any) -> Any:
    """Confine the process, install the hooks and parse the command line."""
    layout = Layout.of(order)
    process.name(f"greenroom: engine {order.engine}")
    process.confine()
    hooks.install(layout, book=True)
    compile_nothing_if_eager(order)
    ours = ("--model", order.model_path, "--served-model-name", order.served_name, "--uds", str(layout.socket))
    arguments = parser.parse_args([*order.argv, *ours])
    _entry().configure_logging_from_args(arguments)
    import_module("vllm.entrypoints.launchers.cli_args").validate_parsed_serve_args(arguments)
    return arguments


def compile_nothing_if_eager(order: StartOrder) -> None:
    """Run as written what vLLM would compile, in each process of an engine that is told to be eager.

    `--enforce-eager` covers the model alone. A few functions are compiled in spite of it once a request needs them
    (top log-probabilities do): that takes seconds, and without a C++ compiler ends the engine.
    """
    if "--enforce-eager" in order.argv:
        import_module("torch").compiler.set_stance("force_eager")


def _prepare_application(renderer: Any, arguments: Any, config: Any) -> None:
    """Build the HTTP application for a model that generates, and compile its chat template, while EngineCore loads."""
    entry = _entry()
    tasks = ("generate",)
    application = entry.build_app(arguments, tasks, config.model_config)
    build_app = entry.build_app

    def built(arguments: Any, supported: tuple[str, ...], model_config: Any) -> Any:
        return application if tuple(supported) == tasks else build_app(arguments, supported, model_config)

    entry.build_app = built
    cli_args = import_module("vllm.entrypoints.launchers.cli_args")
    renderer.warmup(
        import_module("vllm.renderers.params").ChatParams(
            chat_template=import_module("vllm.renderers.chat_utils").load_chat_template(arguments.chat_template),
            chat_template_content_format=arguments.chat_template_content_format,
            chat_template_kwargs=cli_args.resolve_default_chat_template_kwargs(arguments) or {},
        )
    )


def _entry() -> Any:
    return import_module("vllm.entrypoints.launchers.api_server.entry")
