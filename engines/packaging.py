"""What makes a folder a model that we can host, and its manifest. Pure: it is given listings, bytes and headers.

    choose(listing)                        → which files to take; refuses pickles, adapters, GGUF, no tokenizer
    weight_files(choice, index)            → the shards; refuses a missing one
    survey(config, other configs, headers) → architecture, sizes, longest context; refuses custom code
    manifest(name, source, facts, files)   → the `Model`

`modelstore` does the reading. Everything wrong is a `ModelInvalid` of one line that names the file. What is odd but may
well work is a warning in the survey.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

import msgspec
from msgspec import Struct

from engines.architectures import KNOWN
from engines.errors import ModelInvalid, SpecInvalid
from engines.model import Model, ModelDigest, ModelFile, RuntimeArguments
from engines.safetensors import Header

CONFIG: Final = "config.json"
INDEX: Final = "model.safetensors.index.json"
SINGLE: Final = "model.safetensors"

CONFIGS: Final[tuple[str, ...]] = (CONFIG, "tokenizer_config.json", "generation_config.json", "processor_config.json",
                  "preprocessor_config.json", "video_preprocessor_config.json")  # fmt: skip
"""Files whose `auto_map` would have the loader run code from the folder."""

DTYPE_BYTES: Final = {"bfloat16": 2, "float16": 2, "float32": 4}

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "vocab.txt", "spiece.model")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5")
_KEPT = (".json", ".jinja", ".txt", ".model", ".tiktoken")
_SHARD = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors$")
_HEADER_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_CONTEXT = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "max_sequence_length",
    "max_seq_length",
)
_SCALED_ALREADY = ("default", "su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling", "mrope")


class Choice(Struct, frozen=True):
    """Which files of a folder belong to the model."""

    weights: tuple[str, ...]
    """Files with weights as the listing has them; empty where `index` says."""
    index: str | None
    others: tuple[str, ...]
    """Configuration, tokenizer, chat template."""


class Facts(Struct, frozen=True, kw_only=True):
    """What config and headers say of a model."""

    architecture: str
    dtype: str
    parameters: int
    """Numbers stored in the tensors; packed ones of a quantised model count as one."""
    weights_bytes: int
    max_model_len: int
    kv_bytes_per_token: int
    warnings: tuple[str, ...] = ()


def choose(listing: Collection[str]) -> Choice:
    """Pick a model's files from the names in its folder (no paths); raises `ModelInvalid`."""
    if "adapter_config.json" in listing:
        raise _invalid("adapter_config.json", "this is an adapter, not a model; add the model that it belongs to")
    if CONFIG not in listing:
        raise _invalid(CONFIG, "missing; a model is a Hugging Face folder or one .gguf file")
    if not any(name in _TOKENIZERS or name.endswith(".tiktoken") for name in listing):
        raise _invalid("tokenizer.json", f"missing, and so is any other tokenizer ({', '.join(_TOKENIZERS[1:])})")
    others = tuple(sorted(name for name in listing if name.endswith(_KEPT) and not name.endswith(".index.json")))
    if INDEX in listing:
        return Choice((), INDEX, others)
    weights = sorted(name for name in listing if name.endswith(".safetensors"))
    if not weights:
        raise _no_weights(listing)
    if SINGLE in weights:
        return Choice((SINGLE,), None, others)
    if shard := _SHARD.match(weights[0]):
        reason = f"missing; {weights[0]} is one of {int(shard['count'])} shards and only the index says what is in them"
        raise _invalid(INDEX, reason)
    if len(weights) > 1:
        raise _invalid(weights[1], f"which file has the weights? There is no {INDEX} or {SINGLE} to say")
    return Choice((weights[0],), None, others)


def _no_weights(listing: Collection[str]) -> ModelInvalid:
    """The most useful thing to say of a folder without safetensors."""
    if ggufs := sorted(name for name in listing if name.endswith(".gguf")):
        return _invalid(ggufs[0], "a GGUF file is added by its own path, not by its folder's")
    if pickles := sorted(name for name in listing if name.endswith(_PICKLES)):
        reason = "pickled weights only; loading a pickle can run any code, so convert it to safetensors first"
        return _invalid(pickles[0], reason)
    return _invalid(SINGLE, "missing; the folder has no weights")


def weight_files(choice: Choice, index: bytes | None, listing: Collection[str]) -> tuple[str, ...]:
    """The files with weights, shards in order; `index` is the content of `choice.index`. Raises `ModelInvalid`."""
    if choice.index is None:
        return choice.weights
    shards = sorted(set(_weight_map(choice.index, index or b"").values()))
    for shard in shards:
        if "/" in shard or "\\" in shard or not shard.endswith(".safetensors"):
            raise _invalid(choice.index, f"names {shard[:100]!r}, which is no safetensors file of this folder")
        if shard not in listing:
            raise _invalid(shard, f"missing; {choice.index} names it")
    return tuple(shards)


def check_index(choice: Choice, index: bytes | None, headers: Mapping[str, Header]) -> None:
    """Refuse an index that names tensors which its shards don't have."""
    if choice.index is None:
        return
    present = {file: {tensor.name for tensor in header.tensors} for file, header in headers.items()}
    for tensor, shard in _weight_map(choice.index, index or b"").items():
        if tensor not in present[shard]:
            raise _invalid(shard, f"tensor {tensor[:100]!r} is missing; {choice.index} says that it is there")


def _weight_map(file: str, index: bytes) -> dict[str, str]:
    try:
        weight_map = msgspec.json.decode(index, type=_Index).weight_map
    except (msgspec.DecodeError, ValueError, RecursionError):
        raise _invalid(file, 'corrupt: not {"weight_map": {tensor: file}}') from None
    if not weight_map:
        raise _invalid(file, "names no weights")
    return weight_map


class _Index(Struct, frozen=True):
    weight_map: dict[str, str]


def survey(configs: Mapping[str, bytes], headers: Mapping[str, Header], listing: Collection[str]) -> Facts:
    """Read what the engine will need to know from the configs (those of `CONFIGS` that exist) and the headers."""
    trees = {file: _json(file, content) for file, content in configs.items()}
    for file, tree in trees.items():
        if _says(tree, "auto_map"):
            reason = "asks for code from the folder (`auto_map`), which is never run; use a checkpoint that needs none"
            raise _invalid(file, reason)
    config = trees[CONFIG]
    text = _text_config(config)
    tensors = [tensor for header in headers.values() for tensor in header.tensors]
    if not tensors:
        raise _invalid(next(iter(headers), SINGLE), "has no tensors")
    architecture = _architecture(config)
    dtype = _dtype(config, text, headers)
    return Facts(
        architecture=architecture,
        dtype=dtype,
        parameters=sum(tensor.elements for tensor in tensors),
        weights_bytes=sum(tensor.size for tensor in tensors),
        max_model_len=_context(config, text, trees.get("tokenizer_config.json", {})),
        kv_bytes_per_token=_kv_elements(text) * DTYPE_BYTES[dtype],
        warnings=tuple(_warnings(architecture, config, trees, listing)),
    )


def manifest(name: str, source: str, facts: Facts, files: Sequence[ModelFile]) -> Model:
    """The manifest of files in the store; its digest is over all of them."""
    ordered = tuple(sorted(files, key=lambda file: file.path))
    return Model(
        name=name,
        digest=digest(ordered),
        architecture=facts.architecture,
        weights_bytes=facts.weights_bytes,
        parameters=facts.parameters,
        max_model_len=facts.max_model_len,
        kv_bytes_per_token=facts.kv_bytes_per_token,
        dtype=facts.dtype,
        source=source,
        files=ordered,
    )


def digest(files: Sequence[ModelFile]) -> ModelDigest:
    """SHA-256 over one line `sha256 size path` a file, sorted by path: equal content gives an equal digest."""
    lines = (f"{file.sha256} {file.size} {file.path}\n" for file in sorted(files, key=lambda file: file.path))
    return ModelDigest(hashlib.sha256("".join(lines).encode()).hexdigest())


def check_arguments(model: Model, arguments: RuntimeArguments) -> None:
    """Refuse (`SpecInvalid`) arguments with which an engine of the model would not start.

    The default context is cut to the model's by whoever starts the engine; one that was asked for must be within it.
    The KV cache must hold one request of full length; vLLM refuses to start otherwise.
    """
    asked = arguments.max_model_len
    if asked > model.max_model_len and asked != RuntimeArguments().max_model_len:
        reason = f"{asked:,} tokens are beyond the {model.max_model_len:,} that model {model.name} allows"
        raise SpecInvalid(f"arguments.max_model_len: {reason}", field="arguments.max_model_len")
    context = min(asked, model.max_model_len)
    size = DTYPE_BYTES.get(model.dtype if arguments.dtype == "auto" else arguments.dtype, 2)
    a_token = model.kv_bytes_per_token * size // DTYPE_BYTES.get(model.dtype, 2)
    need = context * a_token
    if need > arguments.kv_cache_bytes:
        reason = f"{context:,} tokens × {a_token:,} bytes = {need:,}, more than {arguments.kv_cache_bytes:,}"
        reason += ": a request of full length would not fit; raise kv_cache_bytes or lower max_model_len"
        raise SpecInvalid(f"arguments.kv_cache_bytes: {reason}", field="arguments.kv_cache_bytes")


def _json(file: str, content: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(content, type=dict[str, Any])
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise _invalid(file, f"not a JSON object: {str(error)[:100]}") from None


def _says(tree: object, key: str) -> bool:
    """Whether the key is anywhere in the tree with something in it."""
    rest = [tree]
    while rest:
        node = rest.pop()
        if isinstance(node, dict):
            if node.get(key):
                return True
            rest.extend(node.values())
        elif isinstance(node, list):
            rest.extend(node)
    return False


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part about the language model: multimodal configs nest it."""
    for key in ("text_config", "llm_config", "language_config"):
        if isinstance(config.get(key), dict):
            return {**config, **config[key]}
    return config


def _architecture(config: dict[str, Any]) -> str:
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        raise _invalid(CONFIG, "`architectures` missing; it says which kind of model this is")
    return architectures[0]


def _whole(config: Mapping[str, Any], *names: str) -> int | None:
    """The first of these fields that is there; null counts as absent."""
    for name in names:
        value = config.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 2**40:
            raise _invalid(CONFIG, f"`{name}` is {str(value)[:40]}, not a whole number above 0")
        return value
    return None


def _needed(value: int | None, name: str) -> int:
    if value is None:
        reason = f"`{name}` missing; without it the memory that an engine needs can't be estimated"
        raise _invalid(CONFIG, reason)
    return value


def _kv_elements(text: dict[str, Any]) -> int:
    """Numbers that all layers keep for one token: layers × 2 × key-value heads × head size.

    An upper bound where layers share, compress or limit what they keep (sliding windows, hybrids), except latent
    attention (`kv_lora_rank`), which keeps layers × (rank + rotary part).
    """
    layers = _needed(_whole(text, "num_hidden_layers", "n_layer", "n_layers", "num_layers"), "num_hidden_layers")
    if (rank := _whole(text, "kv_lora_rank")) is not None:
        return layers * (rank + (_whole(text, "qk_rope_head_dim") or 0))
    heads = _needed(_whole(text, "num_attention_heads", "n_head", "n_heads"), "num_attention_heads")
    key_value_heads = _whole(
        text, "num_key_value_heads", "n_head_kv", "num_kv_heads", "multi_query_group_num", "num_attention_groups"
    )
    if key_value_heads is None:
        key_value_heads = 1 if text.get("multi_query") is True else heads
    head = _whole(text, "head_dim", "hidden_size_per_head")
    if head is None:
        head = max(1, _needed(_whole(text, "hidden_size", "n_embd", "d_model"), "hidden_size") // heads)
    return layers * 2 * key_value_heads * head


def _context(config: dict[str, Any], text: dict[str, Any], tokenizer: dict[str, Any]) -> int:
    """The longest context as vLLM derives it: the smallest of several names, times a rotary factor not yet in it."""
    lengths = [length for name in _CONTEXT if (length := _whole(text, name)) is not None]
    longest = _needed(min(lengths, default=None), "max_position_embeddings")
    stated = tokenizer.get("model_max_length")
    if isinstance(stated, int) and 1 <= stated < longest:
        longest = stated
    rope = text.get("rope_parameters") or text.get("rope_scaling")
    if isinstance(rope, dict) and "gemma3" not in str(config.get("model_type")):
        kind = rope.get("rope_type", rope.get("type", "default"))
        factor = rope.get("factor")
        if kind not in _SCALED_ALREADY and isinstance(factor, int | float) and 1 <= factor <= 1e6:
            longest = int(longest * factor)
    return longest


def _dtype(config: dict[str, Any], text: dict[str, Any], headers: Mapping[str, Header]) -> str:
    """What the engine computes in by default: the config's word, else the dtype that most weights have."""
    for tree in (config, text):
        for key in ("dtype", "torch_dtype"):
            if (said := str(tree.get(key)).removeprefix("torch.")) in DTYPE_BYTES:
                return said
    sizes: dict[str, int] = {}
    for header in headers.values():
        for tensor in header.tensors:
            if tensor.dtype in _HEADER_DTYPES:
                sizes[_HEADER_DTYPES[tensor.dtype]] = sizes.get(_HEADER_DTYPES[tensor.dtype], 0) + tensor.size
    return max(sizes, key=lambda dtype: sizes[dtype], default="bfloat16")


def _warnings(
    architecture: str, config: dict[str, Any], trees: Mapping[str, Any], listing: Collection[str]
) -> list[str]:
    found = []
    if architecture not in KNOWN:
        found.append(f"{CONFIG}: {architecture[:80]} is not known to generate text here; its engines may not start")
    quantisation = config.get("quantization_config")
    if isinstance(quantisation, dict):
        method = str(quantisation.get("quant_method", "an unnamed method"))[:40]
        found.append(f"{CONFIG}: quantised with {method}; not every device can run that")
    template = "chat_template.jinja" in listing or "chat_template.json" in listing
    if not template and not trees.get("tokenizer_config.json", {}).get("chat_template"):
        found.append("tokenizer_config.json: no chat template; chat requests will be refused, plain completions work")
    return found


def _invalid(file: str, reason: str) -> ModelInvalid:
    return ModelInvalid(f"{file}: {reason}", field=file)
