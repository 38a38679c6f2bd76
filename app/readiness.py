"""Whether a process of this machine is ready, asked once: for `greenroom up` and `greenroom doctor`."""

from __future__ import annotations

import http.client
import json
import socket
from pathlib import Path
from typing import Any

from app.settings import Settings
from engines.host import protocol

TIMEOUT_S = 2.0


def gateway(settings: Settings, index: int) -> bool:
    """Whether the n-th gateway says that it is ready."""
    address = settings.gateway.operator_host
    connection = http.client.HTTPConnection(address, settings.gateway.operator_port + index, timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def host(path: Path) -> dict[str, Any] | None:
    """What the engine host answers to a hello (mode, gate, version of vLLM); `None` if it doesn't."""
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(TIMEOUT_S)
            client.connect(str(path))
            client.sendall(protocol.encode({"op": "hello", "epoch": 0}))
            with client.makefile("rb") as file:
                answer = protocol.decode(file.readline(protocol.MAX_LINE))
    except (OSError, ValueError, json.JSONDecodeError):
        return None
    return answer if answer.get("ok") else None
