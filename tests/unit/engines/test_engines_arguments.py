"""vLLM's command line from typed fields."""

from __future__ import annotations

import msgspec
import pytest

from engines.arguments import engine_env, served_name, vllm_argv
from engines.model import EngineSpec, Model, ModelDigest, RuntimeArguments

DIGEST = ModelDigest("0123456789abcdef" * 4)
MODEL = Model(
    name="smol",
    digest=DIGEST,
    architecture="LlamaForCausalLM",
    weights_bytes=1,
    parameters=1,
    max_model_len=8192,
    kv_bytes_per_token=1,
    dtype="bfloat16",
    source="here",
)


def argv(**arguments: object) -> tuple[str, ...]:
    return vllm_argv(EngineSpec(model_digest=DIGEST, arguments=msgspec.convert(arguments, RuntimeArguments)), MODEL)


def value(arguments: tuple[str, ...], flag: str) -> str:
    return arguments[arguments.index(flag) + 1]


def test_the_defaults_are_what_the_quick_start_was_measured_with() -> None:
    assert argv() == (
        *("--max-model-len", "2048"),
        *("--max-num-seqs", "16"),
        *("--max-num-batched-tokens", "512"),
        *("--kv-cache-memory-bytes", "268435456"),
        *("--dtype", "auto"),
        *("--load-format", "safetensors"),
        "--enable-prompt-tokens-details",
        "--disable-uvicorn-access-log",
        "--disable-fastapi-docs",
        "--enforce-eager",
    )


def test_every_runtime_argument_has_an_effect_on_an_engine() -> None:
    changed = {
        "max_model_len": 512,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 1024,
        "kv_cache_bytes": 1 << 30,
        "dtype": "float32",
        "enforce_eager": False,
        "threads": 2,
    }
    assert set(changed) == set(RuntimeArguments.__struct_fields__)
    plain = (argv(), engine_env(EngineSpec(model_digest=DIGEST), None))
    for name, other in changed.items():
        arguments = msgspec.convert({name: other}, RuntimeArguments)
        spec = EngineSpec(model_digest=DIGEST, arguments=arguments)
        assert (vllm_argv(spec, MODEL), engine_env(spec, None)) != plain, name


def test_the_context_is_cut_to_what_the_model_allows() -> None:
    assert value(argv(max_model_len=100_000), "--max-model-len") == "8192"


def test_batched_tokens_are_never_fewer_than_sequences() -> None:
    assert value(argv(max_num_seqs=1000), "--max-num-batched-tokens") == "1000"


def test_no_argument_lets_code_of_the_model_run() -> None:
    assert not [flag for flag in argv() if "trust" in flag or "plugin" in flag or "middleware" in flag]


def test_the_served_name_is_ours_and_follows_the_files() -> None:
    assert served_name(DIGEST) == "m-0123456789abcdef"


@pytest.mark.parametrize(
    ("gpu", "expected"),
    [
        (None, {"OMP_NUM_THREADS": "3"}),
        (1, {"OMP_NUM_THREADS": "3", "CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "1"}),
    ],
)
def test_an_engine_sees_its_own_gpu_only(gpu: int | None, expected: dict[str, str]) -> None:
    spec = EngineSpec(model_digest=DIGEST, arguments=RuntimeArguments(threads=3))
    assert engine_env(spec, gpu) == expected
