"""Environments built from scratch: the engine host's own, and one for each engine.

Nothing is inherited but a short list of names that say where programs, libraries and devices are. So neither a secret
nor a stray `VLLM_*` of the operator's shell reaches an engine; what an operator may set are the typed fields of
`RuntimeArguments`, which the launcher turns into arguments and `StartOrder.env`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

INHERITED = frozenset(
    {
        *("PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TZ"),
        *("LD_LIBRARY_PATH", "CUDA_HOME", "CUDA_PATH", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"),
        *("NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES", "ROCM_PATH", "HIP_VISIBLE_DEVICES"),
    }
)

_FIXED = {
    # One OpenMP thread: with more, libgomp spins and two busy engines starve each other; see `StartOrder.threads`.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Nothing leaves the machine: no usage report, no look-up at a hub, no plugin that somebody installed.
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_PLUGINS": "",
    # gloo would listen on the address that the host's name resolves to.
    "GLOO_SOCKET_IFNAME": "lo",
    "VLLM_HOST_IP": "127.0.0.1",
    # The CPU build: the worker inside EngineCore (one process less), no pinning of threads to cores.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_COLOR": "0",
    "VLLM_DISABLE_LOG_LOGO": "1",
    "PYTHONUNBUFFERED": "1",
}


def host_environment(inherited: Mapping[str, str], cache: Path) -> dict[str, str]:
    """What the engine host sets for itself before it imports anything heavy; `cache` holds its caches."""
    kept = {name: value for name, value in inherited.items() if name in INHERITED}
    caches = {
        "VLLM_CACHE_ROOT": "vllm",
        "HF_HOME": "huggingface",
        "TORCHINDUCTOR_CACHE_DIR": "inductor",
        "TRITON_CACHE_DIR": "triton",
    }
    return {**kept, **_FIXED, **{name: str(cache / folder) for name, folder in caches.items()}}


def engine_environment(
    host: Mapping[str, str], *, temporary: Path, threads: int, extra: Mapping[str, str]
) -> dict[str, str]:
    """One engine's environment: the host's, its own temporary directory and threads, then what the order adds."""
    counts = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    return {**host, **counts, "TMPDIR": str(temporary), **extra}
