"""What an engine's environment is made of."""

from __future__ import annotations

from pathlib import Path

from engines.host.environment import engine_environment, host_environment

SHELL = {
    "PATH": "/bin",
    "HOME": "/home/somebody",
    "LD_LIBRARY_PATH": "/opt/lib",
    "GREENROOM_PEPPER": "secret",
    "GREENROOM_DATABASE_URL": "postgresql://secret",
    "OPENAI_API_KEY": "secret",
    "PYTHONPATH": "/elsewhere",
    "VLLM_SERVER_DEV_MODE": "1",
    "OMP_NUM_THREADS": "64",
    "HTTPS_PROXY": "http://secret",
}


def test_i7_nothing_is_inherited_but_where_programs_and_devices_are() -> None:
    made = host_environment(SHELL, Path("/cache"))
    assert {name: made[name] for name in SHELL if name in made} == {
        "PATH": "/bin",
        "HOME": "/home/somebody",
        "LD_LIBRARY_PATH": "/opt/lib",
        "OMP_NUM_THREADS": "1",
    }
    assert "secret" not in " ".join(made.values())


def test_i11_engines_neither_report_nor_look_anything_up_nor_listen_outside() -> None:
    made = host_environment({}, Path("/cache"))
    expected = {
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_PLUGINS": "",
        "GLOO_SOCKET_IFNAME": "lo",
        "VLLM_HOST_IP": "127.0.0.1",
    }
    assert made | expected == made


def test_an_engine_has_its_own_temporary_directory_and_threads_and_the_order_has_the_last_word() -> None:
    host = host_environment(SHELL, Path("/cache"))
    made = engine_environment(
        host, temporary=Path("/run/t"), threads=4, extra={"CUDA_VISIBLE_DEVICES": "1", "MKL_NUM_THREADS": "2"}
    )
    changed = {name: value for name, value in made.items() if host.get(name) != value}
    assert changed == {
        "TMPDIR": "/run/t",
        "OMP_NUM_THREADS": "4",
        "OPENBLAS_NUM_THREADS": "4",
        "MKL_NUM_THREADS": "2",
        "CUDA_VISIBLE_DEVICES": "1",
    }
