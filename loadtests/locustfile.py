"""Streamed chats against a gateway, paced by arrivals, measured token by token.

    LOADTEST_KEY=gr-… locust -f loadtests/locustfile.py --headless --host http://127.0.0.1:8000 \\
        --variant smollm2 --rate 1 --users 32 --spawn-rate 32 --run-time 60s --stop-timeout 60 \\
        --html var/load.html --json-file var/load --report var/load-tokens.json

Rows in Locust's statistics, one for each measurement, all named after the variant, in milliseconds:

    E2E    the request: from its start to `[DONE]`; failures and tokens (as response length) are counted here
    TTFT   from its start to the first chunk that carries tokens
    ITL    (last − first) ÷ (tokens − 1), one value a stream, as guidellm and aiperf define it
    LATE   from when it was due until it started (see `arrivals`)

A request fails if its status isn't 200, if the connection breaks, or if the stream does (see `sse.read`); it then
counts in E2E, without a time. `report` says the rest: exact percentiles, gaps between chunks, goodput; as a table on
standard error and with `--report FILE` as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import cycle
from pathlib import Path
from typing import Any, ClassVar

from locust import FastHttpUser, events, task
from locust.argument_parser import LocustArgumentParser
from locust.contrib.fasthttp import FAILURE_EXCEPTIONS
from locust.env import Environment
from locust.runners import WorkerRunner
from msgspec import Struct

from loadtests import report, sse
from loadtests.arrivals import Arrivals
from loadtests.report import Report, Sample

PROMPTS = (
    "What is the capital of France?",
    "Name three colours of the rainbow.",
    "Write one sentence about the sea.",
    "How many legs does a spider have?",
    "Say good morning in Spanish.",
)
SAMPLES = "samples"
"""Under this name workers send their samples to the master."""


class Options(Struct, frozen=True):
    """The options of `add_arguments`, as parsed."""

    key: str
    variant: str
    prompt_file: str | None
    max_tokens: int
    rate: float
    arrivals: str
    seed: int
    target_ttft_ms: float
    target_itl_ms: float
    report: str | None


def add_arguments(parser: LocustArgumentParser) -> None:
    """What Locust does not know itself. Every option has an environment variable, too."""

    def add(name: str, **rest: Any) -> None:
        variable = "LOADTEST_" + name.removeprefix("--").replace("-", "_").upper()
        parser.add_argument(name, env_var=variable, include_in_web_ui=False, **rest)

    add(
        "--key", required=True, help="API key of the workspace; better set as LOADTEST_KEY, where `ps` does not show it"
    )
    add("--variant", required=True, help="what goes into `model`")
    add("--prompt-file", help="text file with one prompt a line; they are used in turn")
    add("--max-tokens", type=int, default=32, help="of each answer (default: 32)")
    add(
        "--rate",
        type=float,
        default=1.0,
        help="requests that become due per second in each Locust process (default: 1)",
    )
    add("--arrivals", choices=["even", "poisson"], default="even", help="spacing of the due times (default: even)")
    add("--seed", type=int, default=0, help="of Poisson arrivals (default: 0)")
    add("--target-ttft-ms", type=float, default=1000.0, help="of goodput, from the due time (default: 1000)")
    add("--target-itl-ms", type=float, default=100.0, help="of goodput (default: 100)")
    add("--report", help="write the report as JSON into this file")


def parsed(environment: Environment) -> Options:
    """Ours among Locust's options."""
    every = vars(environment.parsed_options)
    return Options(**{name: every[name] for name in Options.__struct_fields__})


class ChatUser(FastHttpUser):
    """One request at a time, each when the shared schedule says; as many users as requests may be open at once."""

    network_timeout = 120.0  # a gateway sends a comment or a chunk at least every minute, also while a model loads
    connection_timeout = 10.0

    arrivals: ClassVar[Arrivals]
    report: ClassVar[Report]
    prompts: ClassVar[cycle[str]]
    zero: ClassVar[float]
    """When the test started, on `time.perf_counter`."""

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self.options = parsed(environment)
        self.due = 0.0

    def on_start(self) -> None:
        """Locust runs a task before it waits for the first time; here the first one has to become due as well."""
        self.wait()  # type: ignore[no-untyped-call]

    def wait_time(self) -> float:
        """Take the next due time and wait for it, not at all if it has passed."""
        self.due = self.arrivals.take()
        return max(0.0, self.due - time.perf_counter())

    @task
    def chat(self) -> None:
        """One streamed chat."""
        body = {
            "model": self.options.variant,
            "messages": [{"role": "user", "content": next(self.prompts)}],
            "max_tokens": self.options.max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        headers = {"Authorization": f"Bearer {self.options.key}", "Accept-Encoding": "identity"}
        start = time.perf_counter()
        with self.client.post(
            "/v1/chat/completions",
            name=self.options.variant,
            json=body,
            headers=headers,
            stream=True,
            catch_response=True,
        ) as response:
            stream = _read(response)
            measured = report.sample(stream, due=self.due, start=start, zero=self.zero)
            # One row for the whole request instead of the time to its headers.
            response.request_meta["request_type"] = "E2E"
            response.request_meta["response_length"] = measured.tokens
            response.request_meta["response_time"] = None
            if measured.failure is None:
                response.request_meta["response_time"] = (measured.ended - measured.started) * 1000
                response.success()
            else:
                response.failure(measured.failure)
        self.report.add(measured)
        self._fire(measured)

    def _fire(self, measured: Sample) -> None:
        rows = {"LATE": measured.late_s}
        if measured.failure is None:
            rows |= {
                name: value
                for name, value in (("TTFT", measured.first_token_s), ("ITL", measured.inter_token_s))
                if value is not None
            }
        for name, seconds in rows.items():
            self.environment.events.request.fire(
                request_type=name,
                name=self.options.variant,
                response_time=seconds * 1000,
                response_length=0,
                exception=None,
                context={},
            )


def _read(response: Any) -> sse.Stream:
    """The stream of a response, whatever came of it."""
    if response.status_code != 200:
        error = getattr(response, "error", None)
        return sse.Stream(failure=f"status {response.status_code}" if response.status_code else f"no answer: {error!r}")
    try:
        return sse.read(lambda: bytes(response.stream.readline(b"\n")), time.perf_counter)
    except FAILURE_EXCEPTIONS as error:
        return sse.Stream(failure=f"connection lost: {type(error).__name__}")


def prepare(environment: Environment, **_: Any) -> None:
    """Build the report before anything is sent, and connect it to workers and master."""
    options = parsed(environment)
    lines = Path(options.prompt_file).read_text().splitlines() if options.prompt_file else PROMPTS
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        sys.exit(f"{options.prompt_file}: there is no prompt in it")
    ChatUser.prompts = cycle(prompts)
    ChatUser.report = Report(
        target_first_token_s=options.target_ttft_ms / 1000, target_inter_token_s=options.target_itl_ms / 1000
    )
    if options.rate <= 0:
        sys.exit(f"--rate is {options.rate}; it must be above 0")


def begin(environment: Environment, **_: Any) -> None:
    """The schedule starts with the test."""
    options = parsed(environment)
    ChatUser.zero = time.perf_counter()
    ChatUser.arrivals = Arrivals(
        rate=options.rate, start=ChatUser.zero, poisson=options.arrivals == "poisson", seed=options.seed
    )


def send_samples(data: dict[str, Any], **_: Any) -> None:
    """A worker's samples travel with its statistics."""
    data[SAMPLES] = ChatUser.report.drain()


def receive_samples(data: dict[str, Any], **_: Any) -> None:
    """The master collects them."""
    ChatUser.report.extend(data.get(SAMPLES, ()))


def finish(environment: Environment, **_: Any) -> None:
    """Print the report, and write it if a file was asked for."""
    if isinstance(environment.runner, WorkerRunner):
        return
    options = parsed(environment)
    summary = {
        "variant": options.variant,
        "rate": options.rate,
        "arrivals": options.arrivals,
        "max_tokens": options.max_tokens,
        **ChatUser.report.summary(),
    }
    print(report.table(summary), file=sys.stderr)
    if options.report:
        path = Path(options.report)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(summary) + "\n")


for _hook, _listener in (
    (events.init_command_line_parser, add_arguments),
    (events.init, prepare),
    (events.test_start, begin),
    (events.report_to_master, send_samples),
    (events.worker_report, receive_samples),
    (events.quitting, finish),
):
    _hook.add_listener(_listener)  # type: ignore[no-untyped-call]
