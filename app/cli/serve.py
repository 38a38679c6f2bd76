"""`greenroom gateway`, `control`, `engine-host`: one process of an installation each, for `up` or an init system."""

from __future__ import annotations

import os

import rich_click as click

from app.cli import settings
from app.refusal import Refused


@click.command()
@click.option("--fd", type=click.IntRange(min=0), help="An inherited listening socket for tenants, instead of a port.")
@click.option("--index", type=click.IntRange(min=0), default=0, show_default=True, help="Adds to the operators' port.")
@click.option("--port", type=click.IntRange(0, 65_535), help="Tenants' port.")
@click.option("--operator-port", type=click.IntRange(0, 65_535), help="Operators' port of the first gateway.")
def gateway(fd: int | None, index: int, port: int | None, operator_port: int | None) -> None:
    """Run one gateway: the HTTP side of Greenroom."""
    from app.wiring import run_gateway

    run_gateway(settings({"gateway__port": port, "gateway__operator_port": operator_port}), fd=fd, index=index)


@click.command()
def control() -> None:
    """Run the controller: it decides which engines exist. SIGTERM leaves the engines running, SIGINT stops them."""
    from app.wiring import run_control

    run_control(settings())


@click.command("engine-host")
def engine_host() -> None:
    """Run this node's engine host, in the engine environment: it has imported vLLM and forks engines."""
    from app.children import engine_environ
    from app.supervisor import host_command

    tree = settings()
    tree.run_path.mkdir(mode=0o700, parents=True, exist_ok=True)
    command = host_command(tree)
    try:
        os.execve(command[0], command, engine_environ(os.environ))  # noqa: S606 (no shell on purpose)
    except OSError as error:
        raise Refused(f"can't run {command[0]}: {error.strerror}; run `./dev setup`") from None
