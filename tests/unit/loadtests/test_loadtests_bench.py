"""The benches' arithmetic, and the stock engine's life against a program that stands in for vLLM."""

import http.client
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from loadtests import sse
from loadtests.bench import cold_start, memory, processes
from loadtests.bench.chat import Answer, ChatFailed, UnixConnection, ask
from loadtests.bench.memory import Share
from loadtests.bench.processes import Memory
from loadtests.bench.stock import StockEngine, StockFailed

START_S = 0.3
FIRST_S = 0.2
VLLM = f"""#!/bin/sh
'''exec' "{sys.executable}" "$0" "$@"
' '''
import json, os, socketserver, subprocess, sys, time
from http.server import BaseHTTPRequestHandler

mode = sys.argv[-1]
if mode == "broken":
    sys.exit("CUDA is on holiday")
child = subprocess.Popen(["sleep", "600"], start_new_session=True)
time.sleep({START_S})

class Chat(BaseHTTPRequestHandler):
    def address_string(self):
        return "socket"
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if mode == "refusing":
            self.send_error(400, "too long")
            return
        self.send_response(200)
        self.end_headers()
        def send(delta, finish=None):
            event = {{"choices": [{{"index": 0, "delta": delta, "finish_reason": finish}}]}}
            self.wfile.write(b"data: " + json.dumps(event).encode() + b"\\n\\n")
        send({{"role": "assistant", "content": ""}})
        time.sleep({FIRST_S})
        send({{"content": body["model"]}})
        send({{}}, "stop")
        if mode != "cut":
            self.wfile.write(b"data: [DONE]\\n\\n")

with socketserver.UnixStreamServer(sys.argv[sys.argv.index("--uds") + 1], Chat) as server:
    server.serve_forever()
"""


@pytest.fixture
def python(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "python"
    path.write_text(VLLM)
    path.chmod(0o755)
    yield path
    assert processes.touching([tmp_path]) == []


def make_engine(python: Path, mode: str = "fine") -> StockEngine:
    return StockEngine(python, Path("/no/model"), ["--mode", mode], {"HOME": str(python.parent)})


def test_a_stock_start_is_timed_from_the_spawn_and_nothing_outlives_it(python: Path) -> None:
    with make_engine(python) as engine:
        took_s, answer = engine.first_token()
    assert took_s >= START_S + FIRST_S
    assert answer.first_token_s >= FIRST_S
    assert answer.stream.text == "stock"


def test_a_stock_engine_that_dies_shows_its_last_lines(python: Path) -> None:
    with pytest.raises(StockFailed, match="CUDA is on holiday"):
        with make_engine(python, "broken") as engine:
            engine.first_token()


@pytest.mark.parametrize(("mode", "message"), [("refusing", "status 400"), ("cut", r"no \[DONE\]")])
def test_an_answer_that_is_no_answer_fails(python: Path, mode: str, message: str) -> None:
    with pytest.raises(ChatFailed, match=message):
        with make_engine(python, mode) as engine:
            engine.first_token()


def test_nobody_listening_is_an_error_of_the_connection(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        ask(UnixConnection(tmp_path / "s", 1.0), model="m")
    with pytest.raises(ConnectionRefusedError):
        ask(http.client.HTTPConnection("127.0.0.1", 1, timeout=1.0), model="m")


def test_the_steps_of_a_start_sum_to_its_first_token() -> None:
    answer = Answer(sent_at=1000.0, first_token_s=2.5, total_s=3.0, request_id=None, stream=sse.Stream())
    engine = {
        "created_at": "1970-01-01T00:16:40.020Z",
        "ready_at": "1970-01-01T00:16:42.200Z",
        "phases_us": {"fork": 30_000, "config": 100_000, "weights": 300_000, "init": 900_000, "listening": 700_000},
    }
    steps = cold_start.steps_of(answer, engine)
    assert list(steps) == ["decide", "fork", "config", "weights", "init", "listening", "rest", "route"]
    assert [round(ms) for ms in steps.values()] == [20, 30, 100, 300, 900, 700, 150, 300]
    assert sum(steps.values()) == pytest.approx(2500)


def test_the_cold_start_line_has_medians_and_their_ratio() -> None:
    times = cold_start.Times(
        ours=[2.0, 9.0, 2.2], stock=[22.0, 24.0], tuned=[11.0], steps_ms=[{"init": 1.0}, {"init": 3.0}, {"init": 2.0}]
    )
    assert cold_start.line_of(times) == {
        "first_token_s": 2.2,
        "stock_first_token_s": 23.0,
        "tuned_stock_first_token_s": 11.0,
        "ratio": 10.45,
        "stock_runs": 2,
        "steps_ms": {"init": 2},
    }


def test_the_memory_line_adds_up_only_what_may_be_added() -> None:
    mib = 1 << 20
    idle = {"gateway": Share(1, Memory(90 * mib, 80 * mib, 20 * mib, 70 * mib))}
    loaded = idle | {memory.ENGINE: Share(4, Memory(4000 * mib, 2400 * mib, 1800 * mib, 2200 * mib))}
    line = memory.line_of(idle, loaded, engines=2)
    assert line["idle"] == {"processes": 1, "pss_mib": 80, "private_mib": 70}
    assert line["idle_roles"]["gateway"] == line["idle"] | {"rss_mib": 90, "shared_mib": 20}
    assert line["loaded"]["processes"] == 5
    assert (line["engine_cost_mib"], line["engine_rss_mib"], line["engine_pss_mib"]) == (1200, 2000, 1200)
    assert (line["engine_shared_mib"], line["engine_private_mib"]) == (900, 1100)
    assert json.dumps(line)
