from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import CONFIG

from engines.architectures import KNOWN
from engines.errors import ModelInvalid, SpecInvalid
from engines.model import Model, ModelFile, RuntimeArguments
from engines.packaging import (
    INDEX,
    Choice,
    Facts,
    check_arguments,
    check_index,
    choose,
    digest,
    manifest,
    survey,
    weight_files,
)
from engines.safetensors import Header, Tensor

FOLDER = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
HEADERS = {"model.safetensors": Header((Tensor("a", "BF16", (8, 4), 0, 64), Tensor("b", "BF16", (4,), 64, 72)))}


def facts(config: Mapping[str, Any], tokenizer: Mapping[str, Any] | None = None, **over: Any) -> Facts:
    configs = {
        "config.json": json.dumps({**CONFIG, **config}).encode(),
        "tokenizer_config.json": json.dumps({"chat_template": "x"} if tokenizer is None else tokenizer).encode(),
    }
    return survey(configs, over.get("headers", HEADERS), over.get("listing", FOLDER))


def test_a_folder_with_one_file_of_weights_is_taken_with_what_belongs_to_it() -> None:
    listing = (*FOLDER, "README.md", "modeling_x.py", "pytorch_model.bin", "pytorch_model.bin.index.json", "merges.txt")
    assert choose(listing) == Choice(
        ("model.safetensors",), None, ("config.json", "merges.txt", "tokenizer.json", "tokenizer_config.json")
    )


def test_weights_beside_model_safetensors_are_left_where_they_are() -> None:
    assert choose((*FOLDER, "consolidated.safetensors")).weights == ("model.safetensors",)


def test_shards_are_those_that_the_index_names() -> None:
    listing = (*FOLDER[:3], *SHARDS, INDEX, "consolidated.safetensors")
    index = json.dumps({"weight_map": {"b": SHARDS[1], "a": SHARDS[0], "c": SHARDS[0]}}).encode()
    assert weight_files(choose(listing), index, listing) == SHARDS


@pytest.mark.parametrize(
    ("listing", "message"),
    [
        ((), "config.json: missing; a model is a Hugging Face folder or one .gguf file"),
        (("adapter_config.json", *FOLDER), "adapter_config.json: this is an adapter, not a model"),
        (("config.json", "model.safetensors"), "tokenizer.json: missing, and so is any other tokenizer"),
        (FOLDER[:3], "model.safetensors: missing; the folder has no weights"),
        ((*FOLDER[:3], "m.gguf"), "m.gguf: a GGUF file is added by its own path, not by its folder's"),
        (
            (*FOLDER[:3], "pytorch_model.bin"),
            "pytorch_model.bin: pickled weights only; loading a pickle can run any code",
        ),
        ((*FOLDER[:3], "consolidated.00.pth"), "consolidated.00.pth: pickled weights only"),
        ((*FOLDER[:3], *SHARDS), f"{INDEX}: missing; {SHARDS[0]} is one of 2 shards"),
        ((*FOLDER[:3], "a.safetensors", "b.safetensors"), "b.safetensors: which file has the weights?"),
    ],
)
def test_a_folder_that_is_no_model_is_refused_with_the_file_named(listing: tuple[str, ...], message: str) -> None:
    with pytest.raises(ModelInvalid) as caught:
        choose(listing)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b"{}", f"{INDEX}: corrupt"),
        (b"\xff", f"{INDEX}: corrupt"),
        (b'{"weight_map": {}}', f"{INDEX}: names no weights"),
        (
            b'{"weight_map": {"a": "../x.safetensors"}}',
            f"{INDEX}: names '../x.safetensors', which is no safetensors file",
        ),
        (b'{"weight_map": {"a": "model.bin"}}', f"{INDEX}: names 'model.bin', which is no safetensors file"),
        (json.dumps({"weight_map": {"a": SHARDS[0], "b": "gone.safetensors"}}).encode(), "gone.safetensors: missing"),
    ],
)
def test_an_index_that_cannot_be_followed_is_refused(index: bytes, message: str) -> None:
    listing = (*FOLDER[:3], *SHARDS, INDEX)
    with pytest.raises(ModelInvalid) as caught:
        weight_files(choose(listing), index, listing)
    assert str(caught.value).startswith(message)


def test_a_tensor_that_the_index_promises_must_be_in_its_shard() -> None:
    index = json.dumps({"weight_map": {"a": "model.safetensors", "z": "model.safetensors"}}).encode()
    with pytest.raises(ModelInvalid, match=r"^model\.safetensors: tensor 'z' is missing"):
        check_index(Choice((), INDEX, ()), index, HEADERS)


def test_facts_of_a_small_llama() -> None:
    assert facts({}) == Facts(
        architecture="LlamaForCausalLM",
        dtype="bfloat16",
        parameters=36,
        weights_bytes=72,
        max_model_len=4096,
        kv_bytes_per_token=2 * 2 * 2 * 16 * 2,
    )


@pytest.mark.parametrize(
    ("config", "kv_bytes_per_token"),
    [
        ({"head_dim": 128}, 2 * 2 * 2 * 128 * 2),
        ({"num_key_value_heads": None}, 2 * 2 * 4 * 16 * 2),
        ({"num_key_value_heads": None, "multi_query": True}, 2 * 2 * 1 * 16 * 2),
        ({"dtype": "float32"}, 2 * 2 * 2 * 16 * 4),
        ({"dtype": None, "torch_dtype": "torch.float16"}, 2 * 2 * 2 * 16 * 2),
        ({"kv_lora_rank": 512, "qk_rope_head_dim": 64}, 2 * (512 + 64) * 2),
        ({"num_hidden_layers": None, "text_config": {"num_hidden_layers": 3}}, 3 * 2 * 2 * 16 * 2),
    ],
)
def test_kv_bytes_per_token_follow_the_config(config: dict[str, Any], kv_bytes_per_token: int) -> None:
    assert facts(config).kv_bytes_per_token == kv_bytes_per_token


@pytest.mark.parametrize(
    ("config", "tokenizer", "longest"),
    [
        ({"max_position_embeddings": 8192}, {}, 8192),
        ({"n_positions": 1024}, {}, 1024),
        ({}, {"model_max_length": 2048}, 2048),
        ({}, {"model_max_length": 1e30}, 4096),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, {}, 8192),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, {}, 4096),
    ],
)
def test_the_longest_context_is_derived_as_vllm_does(
    config: dict[str, Any], tokenizer: dict[str, Any], longest: int
) -> None:
    assert facts(config, tokenizer).max_model_len == longest


def test_without_a_dtype_in_the_config_most_weights_decide() -> None:
    headers = {"a": Header((Tensor("a", "F32", (1,), 0, 4), Tensor("b", "F16", (4,), 4, 12)))}
    assert facts({"dtype": None}, headers=headers).dtype == "float16"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": []}, "config.json: `architectures` missing"),
        ({"num_hidden_layers": None}, "config.json: `num_hidden_layers` missing"),
        ({"num_hidden_layers": "2"}, "config.json: `num_hidden_layers` is 2, not a whole number above 0"),
        ({"num_attention_heads": 0}, "config.json: `num_attention_heads` is 0, not a whole number above 0"),
        ({"num_attention_heads": True}, "config.json: `num_attention_heads` is True, not a whole number above 0"),
        ({"hidden_size": None}, "config.json: `hidden_size` missing"),
        ({"max_position_embeddings": None}, "config.json: `max_position_embeddings` missing"),
        ({"auto_map": {"AutoModel": "modeling_x.X"}}, "config.json: asks for code from the folder (`auto_map`)"),
        ({"text_config": {"auto_map": {"A": "b.B"}}}, "config.json: asks for code from the folder (`auto_map`)"),
    ],
)
def test_a_config_that_cannot_be_served_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelInvalid) as caught:
        facts(config)
    assert str(caught.value).startswith(message)


def test_a_tokenizer_with_code_of_its_own_is_refused() -> None:
    with pytest.raises(ModelInvalid, match=r"^tokenizer_config.json: asks for code from the folder"):
        facts({}, {"auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}})


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 900 + b"1" + b"}" * 900])
def test_a_config_that_is_no_json_object_is_refused(content: bytes) -> None:
    with pytest.raises(ModelInvalid, match=r"^config.json: "):
        survey({"config.json": content}, HEADERS, FOLDER)


def test_what_is_odd_is_a_warning() -> None:
    odd = facts({"architectures": ["NewForCausalLM"], "quantization_config": {"quant_method": "awq"}}, {})
    assert odd.warnings == (
        "config.json: NewForCausalLM is not known to generate text here; its engines may not start",
        "config.json: quantised with awq; not every device can run that",
        "tokenizer_config.json: no chat template; chat requests will be refused, plain completions work",
    )


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
_keys = [
    *CONFIG, "text_config", "rope_scaling", "rope_parameters", "auto_map", "kv_lora_rank", "head_dim", "torch_dtype",
    "quantization_config", "model_max_length",
]  # fmt: skip


@given(st.dictionaries(st.sampled_from(_keys), _json), st.dictionaries(st.sampled_from(_keys), _json))
def test_any_config_gives_facts_or_modelinvalid(config: dict[str, Any], tokenizer: dict[str, Any]) -> None:
    try:
        found = facts(config, tokenizer)
    except ModelInvalid as error:
        assert str(error).split(":")[0] in {"config.json", "tokenizer_config.json"}
    else:
        assert found.max_model_len >= 1
        assert found.kv_bytes_per_token >= 1


def test_equal_files_have_an_equal_digest_in_any_order_and_one_other_byte_changes_it() -> None:
    a, b = ModelFile("a", 1, "0" * 64), ModelFile("b", 2, "1" * 64)
    assert digest([a, b]) == digest([b, a])
    assert digest([a, b]) != digest([a, ModelFile("b", 2, "2" * 64)])
    assert manifest("m", "/from", facts({}), [b, a]).digest == digest([a, b])
    assert manifest("m", "/from", facts({}), [b, a]).files == (a, b)


def test_known_architectures_are_those_of_the_engine_environment() -> None:
    """Skipped where there is no engine environment; a new vLLM makes this fail until the list is brought up to date."""
    registries = (
        Path(__file__).parents[3].glob(".venv-engine/lib/python3*/site-packages/vllm/model_executor/models/registry.py")
    )
    registry = next(iter(registries), None)
    if registry is None:
        pytest.skip("no engine environment")
    tables = ("_TEXT_GENERATION_MODELS", "_MULTIMODAL_MODELS", "_TRANSFORMERS_SUPPORTED_MODELS")
    names: set[str] = set()
    for node in ast.parse(registry.read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in tables:
            assert isinstance(node.value, ast.Dict)
            names |= {key.value for key in node.value.keys if isinstance(key, ast.Constant)}
    assert names == KNOWN


def model(**over: Any) -> Model:
    tiny = manifest("tiny", "/from", facts({}), [ModelFile("a", 1, "0" * 64)])
    return msgspec.structs.replace(tiny, **over)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (RuntimeArguments(), None),
        (RuntimeArguments(max_model_len=4096), None),
        (RuntimeArguments(max_model_len=4097), "arguments.max_model_len"),
        (RuntimeArguments(kv_cache_bytes=1 << 20), None),
        (RuntimeArguments(max_model_len=4096, kv_cache_bytes=1 << 20), None),
        (RuntimeArguments(max_model_len=4096, kv_cache_bytes=1 << 20, dtype="float16"), None),
        (RuntimeArguments(max_model_len=4096, kv_cache_bytes=1 << 20, dtype="float32"), "arguments.kv_cache_bytes"),
    ],
)
def test_arguments_must_leave_room_for_one_request_of_full_length(
    arguments: RuntimeArguments, field: str | None
) -> None:
    if field is None:
        check_arguments(model(), arguments)
    else:
        with pytest.raises(SpecInvalid, match=rf"^{field}: ") as caught:
            check_arguments(model(), arguments)
        assert caught.value.field == field


def test_the_default_context_is_cut_to_a_short_models_and_one_that_was_asked_for_is_not() -> None:
    short = model(max_model_len=512, kv_bytes_per_token=1 << 12)
    check_arguments(short, RuntimeArguments(kv_cache_bytes=2 << 20))
    with pytest.raises(SpecInvalid, match="1,024 tokens are beyond the 512 that model tiny allows"):
        check_arguments(short, RuntimeArguments(max_model_len=1024))
