"""The last sweep, in a process of its own, since it kills what descends from whoever calls it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SWEEP = """
import subprocess, sys, socket, os, time
from pathlib import Path
from app import leftovers
from app.ownership import become_subreaper

become_subreaper()
run = Path(sys.argv[1])
shm = Path("/dev/shm") / f"psm_greenroom-test-{os.getpid()}"
engine = '''
import mmap, os, socket, subprocess, sys, time
s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen()
subprocess.Popen(["sleep", "600"])                     # a member of the engine's group
with open(sys.argv[2], "w+b") as file:
    file.truncate(4096); memory = mmap.mmap(file.fileno(), 4096)
print("ready", flush=True); time.sleep(600)
'''
(run / "e").mkdir()
host = "import subprocess, sys; subprocess.Popen(sys.argv[1:], start_new_session=True)"  # starts an engine and dies
out = subprocess.Popen(
    [sys.executable, "-c", host, sys.executable, "-c", engine, str(run / "e" / "s"), str(shm)], stdout=subprocess.PIPE
).stdout
out.readline()
store = subprocess.Popen(["setsid", "sh", "-c", "setsid sleep 600 & echo $!; wait"], stdout=subprocess.PIPE)
child_of_store = int(store.stdout.readline())
swept = leftovers.sweep(run, spare=[store.pid], say=lambda _: None)
print(len(swept), shm.exists(), store.poll() is None, Path(f"/proc/{child_of_store}").exists())
print(leftovers.sweep(run, spare=[store.pid], say=print))
os.kill(child_of_store, 9); store.kill()
"""


def test_i10_engines_that_nobody_stopped_are_killed_with_their_memory_and_stores_are_spared(short_dir: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SWEEP, str(short_dir)], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["2 False True True", "()"], done.stderr
