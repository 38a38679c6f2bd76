"""EngineCore first: it is forked before the HTTP side prepares itself, and the two load side by side.

vLLM makes the tokenizer and renderer, then starts EngineCore, waits until that has loaded the model, and only then
builds the HTTP application. Here EngineCore is forked as soon as the config is known, before there is a loop or thread
to be copied. A thread then keeps vLLM's start-up conversation with it (hello, addresses, ready), and the main thread,
which would be left waiting, makes tokenizer, renderer and application. Saves 0.7 s where a second core is idle.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from engines.host import seams


class EarlyCore:
    """An EngineCore that has been forked and is loading; to be made before the event loop runs."""

    def __init__(self, config: Any) -> None:
        engine: Any = import_module("vllm.v1.engine.utils")
        executor: Any = import_module("vllm.v1.executor").Executor
        # Bound beforehand, so that EngineCore never finds nobody listening: ZMQ would try again after 0.1 s.
        listeners = engine.bind_engine_zmq_listeners(config)
        self._listeners = {each.address: each.socket for each in (*listeners.inputs, *listeners.outputs)}
        for listener in self._listeners.values():
            os.register_at_fork(after_in_child=listener.close)
        self._addresses = engine.EngineZmqAddresses(
            inputs=[each.address for each in listeners.inputs], outputs=[each.address for each in listeners.outputs]
        )
        self._error: BaseException | None = None
        self._startup = engine.launch_core_engines(config, executor.get_class(config), True, self._addresses)
        self._launch = self._startup.__enter__()  # forks
        self._thread = threading.Thread(target=self._converse, name="core-startup", daemon=True)
        self._thread.start()

    def lend(self, meanwhile: Callable[[Any], None]) -> None:
        """Let vLLM's client take this EngineCore where it would start one; `meanwhile(renderer)` runs as it loads."""

        @contextmanager
        def launch_core_engines(_config: Any, _executor: Any, _log_stats: bool, addresses: Any) -> Iterator[Any]:
            if (addresses.inputs, addresses.outputs) != (self._addresses.inputs, self._addresses.outputs):
                raise RuntimeError(f"EngineCore was told {self._addresses}, but its client listens on {addresses}")
            yield self._launch
            self._thread.join()
            if self._error is not None:
                raise self._error

        client = "vllm.v1.engine.core_client"
        make_zmq_socket = seams.find((client, "make_zmq_socket"))

        def adopt_listener(context: Any, path: str, *args: Any, **kwargs: Any) -> Any:
            listener = self._listeners.pop(path, None)
            return make_zmq_socket(context, path, *args, **kwargs, **({"listener": listener} if listener else {}))

        seams.replace((client, "make_zmq_socket"), adopt_listener)
        seams.replace((client, "get_engine_zmq_bind_addresses"), lambda _config: self._addresses)
        seams.replace((client, "launch_core_engines"), launch_core_engines)
        # vLLM calls this when EngineCore has been started, for just such work: its own has to do with images.
        seams.after((client, "MPClient._start_mm_warmup"), lambda client: meanwhile(client._renderer))  # noqa: SLF001

    def _converse(self) -> None:
        try:
            self._startup.__exit__(None, None, None)
        except BaseException as error:
            self._error = error
