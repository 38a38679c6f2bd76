"""vLLM's command line from an engine spec: every argument comes from a typed field, none from free text.

What is fixed for every engine, and why:

- `--load-format safetensors`: weights that are pickles are never opened.
- `--enable-prompt-tokens-details`: the ledger counts cached prompt tokens.
- no `--trust-remote-code`, `--middleware` or plug-ins: no code but the engine environment's runs.
- no access log, no documentation pages: nobody but gateways can reach the socket.

Checked against vLLM 0.32.
"""

from __future__ import annotations

from engines.model import EngineSpec, Model, ModelDigest


def served_name(digest: ModelDigest) -> str:
    """The name under which an engine serves its model; ours, so that no client's text ever reaches vLLM as a name."""
    return f"m-{digest[:16]}"


def vllm_argv(spec: EngineSpec, model: Model) -> tuple[str, ...]:
    """The arguments for vLLM, without model path, socket and served name.

    The context is cut to what the model allows. vLLM refuses fewer batched tokens than sequences, so they are raised.
    """
    arguments = spec.arguments
    argv = [
        "--max-model-len",
        str(min(arguments.max_model_len, model.max_model_len)),
        "--max-num-seqs",
        str(arguments.max_num_seqs),
        "--max-num-batched-tokens",
        str(max(arguments.max_num_batched_tokens, arguments.max_num_seqs)),
        "--kv-cache-memory-bytes",
        str(arguments.kv_cache_bytes),
        "--dtype",
        arguments.dtype,
        "--load-format",
        "safetensors",
        "--enable-prompt-tokens-details",
        "--disable-uvicorn-access-log",
        "--disable-fastapi-docs",
    ]
    if arguments.enforce_eager:
        argv.append("--enforce-eager")
    return tuple(argv)


def engine_env(spec: EngineSpec, gpu: int | None) -> dict[str, str]:
    """What is added to an engine's environment: its threads, and its GPU by index on the PCI bus where it has one.

    One thread each by default: libgomp's threads spin, and two engines with two each on two cores hardly move.
    """
    env = {"OMP_NUM_THREADS": str(spec.arguments.threads)}
    if gpu is not None:
        env |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": str(gpu)}
    return env
