"""What keeps the host from forking; each looked at from a process of its own, as its threads and files count."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[4]


def says(lines: str) -> str:
    """What a new Python process prints after these lines."""
    program = f"import sys\nsys.path.append({str(ROOT)!r})\nfrom engines.host import gate\n{lines}"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()


def test_a_process_with_one_thread_may_fork() -> None:
    assert says("print(gate.shut())") == "None"


def test_a_second_thread_shuts_the_gate_for_as_long_as_it_lives() -> None:
    lines = """
import threading, time
over = threading.Event()
thread = threading.Thread(target=over.wait)
thread.start()
print(gate.shut())
over.set()
thread.join()
while gate.shut(): time.sleep(0.001)
print("open")
"""
    assert says(lines).splitlines() == ["2 threads run in the engine host, and a fork would copy one", "open"]


def test_an_environment_without_vllm_is_unfit() -> None:
    assert says("print(gate.unfit())").startswith("vLLM none is not one")
