"""What makes a start shorter: work that is done once in the host, left out, or done while something else loads.

Each of these is small and says what it saves (measured on two x86-64 cores without bf16 arithmetic, SmolLM2-135M). They
are taken in the host, so that every fork has them.
"""

from __future__ import annotations

import multiprocessing
import sys
from importlib import import_module
from pathlib import Path
from typing import Any


def in_host() -> None:
    """Take all of them; call it once, when vLLM has been imported and before the first fork."""
    fork_children()
    inspect_in_process()
    configure_logging_once()
    look_for_processors_by_file()
    copy_tokenizers_on_demand()
    load_grammar_tokenizer_late()
    if import_module("vllm.platforms").current_platform.is_cpu():
        override_kernels_once()
        multiply_in_float32()


def fork_children() -> None:
    """Let vLLM fork its processes where it would spawn them: 10 s."""

    def get_mp_context() -> Any:
        return multiprocessing.get_context("fork")

    for name, module in tuple(sys.modules.items()):
        if name.startswith("vllm.") and "get_mp_context" in vars(module):
            module.get_mp_context = get_mp_context  # type: ignore[attr-defined]


def inspect_in_process() -> None:
    """Let the model registry look at a model class here; it starts a process, lest importing wakes CUDA: 10 s.

    Only classes that were not imported beforehand are concerned.
    """
    registry: Any = import_module("vllm.model_executor.models.registry")
    registry._run_in_subprocess = lambda look: look()  # noqa: SLF001


def configure_logging_once() -> None:
    """Configure logging in the host; vLLM then leaves it alone where nothing differs: 0.07 s in each process."""
    logger: Any = import_module("vllm.logger")
    logger.configure_logging(import_module("vllm.config.logging").LoggingConfig())
    core: Any = import_module("vllm.v1.engine.core")
    core.configure_logging = logger.configure_logging_if_needed


def look_for_processors_by_file() -> None:
    """Don't load a processor for its chat template where the model has no file of one: 0.25 s.

    transformers falls back to loading the tokenizer again, which vLLM then throws away, as it is no processor.
    """
    renderer: Any = import_module("vllm.renderers.hf")
    load = renderer._try_get_processor_chat_template  # noqa: SLF001

    def try_get_processor_chat_template(tokenizer: Any, *args: Any, **kwargs: Any) -> str | None:
        folder = Path(tokenizer.name_or_path)
        if folder.is_dir() and not any(folder.glob("*processor*")):
            return None
        template: str | None = load(tokenizer, *args, **kwargs)
        return template

    renderer._try_get_processor_chat_template = try_get_processor_chat_template  # noqa: SLF001


def copy_tokenizers_on_demand() -> None:
    """Begin with one copy of the tokenizer for the one thread that renders, instead of two: 0.1 s.

    vLLM makes another when two threads want one at the same moment, which hardly ever happens.
    """
    renderer: Any = import_module("vllm.renderers.hf")
    make_pool = renderer.maybe_make_thread_pool
    renderer.maybe_make_thread_pool = lambda tokenizer, copies=1: make_pool(tokenizer, max(1, copies - 1))


def load_grammar_tokenizer_late() -> None:
    """Load EngineCore's tokenizer with the first request for structured output, the only use it has: 0.25 s."""
    structured: Any = import_module("vllm.v1.structured_output")
    load = structured.cached_tokenizer_from_config

    class Late:
        def __get__(self, instance: Any, owner: type) -> Any:
            return load(model_config=instance.vllm_config.model_config)  # cached

        def __set__(self, instance: Any, value: Any) -> None:
            """`__init__` assigns what the line below lets it find: nothing."""

    structured.cached_tokenizer_from_config = lambda **_: None
    structured.StructuredOutputManager.tokenizer = Late()


def override_kernels_once() -> None:
    """Replace Triton's kernels by those for CPUs in the host; it looks through all modules: 0.3 s."""
    platform: Any = import_module("vllm.platforms").current_platform
    platform.register_triton_kernel_overrides()
    type(platform).register_triton_kernel_overrides = classmethod(lambda _cls: None)


def multiply_in_float32() -> None:
    """On a CPU without bf16 arithmetic, multiply bf16 matrices by way of float32: 0.7 s for a prompt of 37 tokens.

    There vLLM falls back to `torch.nn.functional.linear`, whose bf16 path is five to eight times slower.
    """
    torch: Any = import_module("torch")
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():  # noqa: SLF001
        return
    utils: Any = import_module("vllm.model_executor.layers.utils")
    dispatch = utils.dispatch_cpu_unquantized_gemm

    def dispatch_cpu_unquantized_gemm(layer: Any, remove_weight: bool) -> None:
        if layer.weight.dtype is torch.bfloat16 and layer.weight.dim() == 2:
            layer.cpu_linear = linear_in_float32
        else:
            dispatch(layer, remove_weight)

    utils.dispatch_cpu_unquantized_gemm = dispatch_cpu_unquantized_gemm


_FEW_ROWS = 3
_WEIGHTS_AT_A_TIME = 1 << 18
"""1 MiB of float32, which fits the second-level cache of common CPUs."""


def linear_in_float32(x: Any, weight: Any, bias: Any) -> Any:
    """`torch.nn.functional.linear` for bf16: widens the weights piece by piece, sums in float32, rounds once.

    One or two rows stay with torch, which has a good path for them.
    """
    torch: Any = import_module("torch")
    linear, columns = torch.nn.functional.linear, x.shape[-1]
    if x.numel() < _FEW_ROWS * columns:
        return linear(x, weight, bias)
    wide = x.float()
    parts = weight.split(max(1, _WEIGHTS_AT_A_TIME // columns))
    product = torch.cat([linear(wide, part.float()) for part in parts], dim=-1)
    return (product if bias is None else product + bias.float()).to(x.dtype)
