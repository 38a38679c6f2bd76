"""Model folders of a few hundred bytes that look like real ones, for tests of packaging and of the admin API."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
TENSORS = {"embed": (8, 4), "layer": (4, 4), "norm": (4,)}


def safetensors(tensors: Mapping[str, tuple[int, ...]] = TENSORS, *, fill: int = 0) -> bytes:
    """A whole safetensors file of BF16 tensors of these shapes."""
    tree: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in tensors.items():
        size = 2
        for dimension in shape:
            size *= dimension
        tree[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    header = json.dumps(tree).encode()
    return struct.pack("<Q", len(header)) + header + bytes([fill]) * position


def write_model(folder: Path, *, config: Mapping[str, Any] | None = None, fill: int = 0, shards: bool = False) -> Path:
    """Write a folder that `models add` takes; `fill` makes its weights differ from another's."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    if not shards:
        (folder / "model.safetensors").write_bytes(safetensors(fill=fill))
        return folder
    names = list(TENSORS)
    weight_map = {}
    for number, name in enumerate(names, 1):
        shard = f"model-{number:05}-of-{len(names):05}.safetensors"
        (folder / shard).write_bytes(safetensors({name: TENSORS[name]}, fill=fill))
        weight_map[name] = shard
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder
