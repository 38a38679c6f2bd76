"""Shortcuts whose results can differ from what they replace, looked at by themselves in the engine environment."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]
COMPARE = """
import json, sys
sys.path.append(sys.argv[1])
import torch
from engines.host.shortcuts import linear_in_float32
torch.manual_seed(0)
worst = {}
for rows in (1, 2, 3, 37):
    for shape in ((96, 64), (1000, 576), (576, 1536), (3, 300_000)):
        weight, x, bias = (torch.randn(*size).bfloat16() for size in (shape, (rows, shape[1]), shape[:1]))
        for added in (None, bias):
            exact = torch.nn.functional.linear(x.double(), weight.double(), None if added is None else added.double())
            for name, function in (("torch", torch.nn.functional.linear), ("ours", linear_in_float32)):
                made = function(x, weight, added)
                assert made.shape == exact.shape and made.dtype is torch.bfloat16
                error = ((made.double() - exact).abs() / exact.abs().mean()).max().item()
                worst[name] = max(worst.get(name, 0.0), error)
    batched = torch.randn(2, rows, 64).bfloat16()
    assert linear_in_float32(batched, weight[:, :64], None).shape == (2, rows, 3)
print(json.dumps(worst))
"""


@pytest.mark.vllm
def test_multiplying_in_float32_is_at_least_as_exact_as_what_it_replaces(engine_python: Path) -> None:
    done = subprocess.run(
        [engine_python, "-c", COMPARE, ROOT],
        capture_output=True,
        text=True,
        check=True,
        env={"OMP_NUM_THREADS": "1"},
    )
    worst = json.loads(done.stdout)
    assert worst["ours"] <= worst["torch"] < 0.05
