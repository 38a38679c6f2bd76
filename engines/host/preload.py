"""Import everything that an engine will need, once, in the process that engines are forked from.

The list is what an engine has in `sys.modules` that has served every kind of request; a test compares the two, so a new
vLLM shows here what it adds.
"""

from __future__ import annotations

import gc
import importlib
import logging
from typing import Any

from engines.host import shortcuts

ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "GemmaForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
)
"""Model classes that are imported and inspected beforehand; others are, a little later, in the engine."""

MODULES = (
    "vllm.entrypoints.launchers.api_server.entry",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.core.sched.scheduler",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.gpu_worker",
    "vllm.distributed.elastic_ep.elastic_execute",
    "vllm.model_executor.layers.quantization.online.base",
    "vllm.transformers_utils.chat_templates",
    # The HTTP server's routes, each of which vLLM imports when it builds its application.
    "vllm.entrypoints.anthropic.api_router",
    "vllm.entrypoints.cohere.api_router",
    "vllm.entrypoints.generate.api_router",
    "vllm.entrypoints.generate.generative_scoring.api_router",
    "vllm.entrypoints.generate.structured_decisions.api_router",
    "vllm.entrypoints.openai.chat_completion.api_router",
    "vllm.entrypoints.openai.completion.api_router",
    "vllm.entrypoints.openai.responses.api_router",
    "vllm.entrypoints.scale_out.derender.api_router",
    "vllm.entrypoints.scale_out.factories",
    "vllm.entrypoints.scale_out.render.api_router",
    "vllm.entrypoints.scale_out.token_in_token_out.api_router",
    "vllm.entrypoints.serve.elastic_ep.api_router",
    "vllm.entrypoints.serve.instrumentator.metrics",
    "vllm.entrypoints.serve.instrumentator.offline_docs",
    "vllm.entrypoints.serve.lora.api_router",
    "vllm.entrypoints.serve.profile.api_router",
    "vllm.entrypoints.serve.tokenize.api_router",
    "vllm.entrypoints.serve.utils.fingerprint",
    "model_hosting_container_standards.sagemaker",
    "model_hosting_container_standards.common.custom_code_ref_resolver.function_loader",
    # The grammars of structured output, which it imports with the first request for one.
    "vllm.v1.structured_output.backend_guidance",
    "vllm.v1.structured_output.backend_lm_format_enforcer",
    "vllm.v1.structured_output.backend_outlines",
    "vllm.v1.structured_output.backend_xgrammar",
    "xgrammar.kernels",
    # What it imports to serve: the event loop, HTTP and its own processes.
    "uvloop",
    "uvicorn.protocols.http.httptools_impl",
    "uvicorn.protocols.websockets.websockets_sansio_impl",
    "anyio.streams.memory",
    "anyio.streams.stapled",
    "multiprocessing.popen_fork",
    "setproctitle",
)

CPU_MODULES = (
    "xgrammar.kernels.apply_token_bitmask_inplace_cpu",
    "vllm.utils.cpu_triton_utils",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.attention.backends.cpu_attn",
    "vllm.v1.attention.backends.zentorch_sdpa",
    "vllm.v1.pool.flash_maxsim",
)
CUDA_MODULES = ("vllm.v1.worker.gpu_model_runner",)

log = logging.getLogger("greenroom.host")


def import_engine() -> Any:
    """Import vLLM and what it imports late, and return a ready-made argument parser; takes some ten seconds."""
    platform = importlib.import_module("vllm.platforms").current_platform
    for name in (*MODULES, *(CPU_MODULES if platform.is_cpu() else CUDA_MODULES)):
        importlib.import_module(name)
    platform.import_kernels()
    _register_architectures()
    shortcuts.in_host()
    parser = make_parser()
    gc.collect()
    gc.freeze()
    return parser


def _register_architectures() -> None:
    registry = importlib.import_module("vllm.model_executor.models.registry")
    for architecture in ARCHITECTURES:
        try:
            model = registry.ModelRegistry.models[architecture].load_model_cls()
            registry.ModelRegistry.register_model(architecture, model)
        except Exception:  # (an architecture that this build lacks is no reason to serve none)
            log.warning("architecture %s can't be imported beforehand", architecture, exc_info=True)


def make_parser() -> Any:
    """The command-line parser of vLLM; building it takes a good while."""
    arguments = importlib.import_module("vllm.entrypoints.launchers.cli_args")
    argparse = importlib.import_module("vllm.utils.argparse_utils")
    return arguments.make_arg_parser(argparse.FlexibleArgumentParser(prog="engine"))
