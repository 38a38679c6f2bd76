"""How much device memory an engine needs, estimated before it has ever run. Pure.

    weights  = what the safetensors headers say, or parameters × size if another dtype was asked for
    kv_cache = the explicit size that vLLM is given
    overhead = everything else: three processes with their libraries' private pages, activations, buffers

The overhead is measured, not derived: on a CPU, SmolLM2-135M (270 MB of weights) with 256 MiB of KV cache had 1.27 GB
PSS over its process group, forked from an engine host, with a second engine beside it. What is left after weights and
cache is 0.73 GB; 750 MiB leaves some room for longer prompts.
"""

from __future__ import annotations

from typing import Final

from engines.model import Footprint, Model, RuntimeArguments

OVERHEAD_BYTES: Final = 750 << 20
"""Of one engine beside its weights and KV cache."""

_DTYPE_BYTES: Final = {"bfloat16": 2, "float16": 2, "float32": 4}


def estimate(model: Model, arguments: RuntimeArguments) -> Footprint:
    """What an engine of `model` started with `arguments` will take of a device."""
    return Footprint(
        weights=_weights(model, arguments.dtype),
        kv_cache=arguments.kv_cache_bytes,
        overhead=OVERHEAD_BYTES,
    )


def _weights(model: Model, dtype: str) -> int:
    if dtype in {"auto", model.dtype}:
        return model.weights_bytes
    return max(model.weights_bytes, model.parameters * _DTYPE_BYTES[dtype])
