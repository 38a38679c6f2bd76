"""The table of fields against the vLLM that is installed: a field that nobody has thought about is a failure."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from app.openai.fields import CHAT, COMPLETIONS

ENGINE_PYTHON = Path(__file__).parents[3] / ".venv-engine" / "bin" / "python"
LIST_FIELDS = """
import json
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
models = {"chat": ChatCompletionRequest, "completions": CompletionRequest}
print(json.dumps({name: sorted(model.model_fields) for name, model in models.items()}))
"""


@pytest.mark.vllm
@pytest.mark.slow
def test_every_field_of_the_installed_vllm_is_classified() -> None:
    done = subprocess.run([ENGINE_PYTHON, "-c", LIST_FIELDS], capture_output=True, text=True, check=True)
    fields = json.loads(done.stdout.splitlines()[-1])
    assert set(fields["chat"]) - CHAT.keys() == set()
    assert set(fields["completions"]) - COMPLETIONS.keys() == set()
    assert {name for name in fields["chat"] if "messages" in name} == {"messages"}
