"""Samples out of a text exposition."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from engines import prom

VLLM = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m-0011"} 3.0
# HELP vllm:num_requests_waiting Number of requests waiting to be processed.
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="m-0011"} 2.0
# TYPE vllm:num_requests_waiting_by_reason gauge
vllm:num_requests_waiting_by_reason{engine="0",model_name="m-0011",reason="capacity"} 1.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m-0011",reason="deferred"} 1.0
vllm:generation_tokens_total{engine="0",model_name="m-0011"} 1.048576e+06
"""


@pytest.mark.parametrize(
    ("metric", "total"),
    [
        ("vllm:num_requests_running", 3.0),
        ("vllm:num_requests_waiting", 2.0),
        ("vllm:num_requests_waiting_by_reason", 2.0),
        ("vllm:generation_tokens_total", 1_048_576.0),
        ("vllm:generation_tokens", None),
        ("vllm:nothing", None),
    ],
)
def test_a_metric_is_matched_by_its_whole_name_and_summed_over_its_labels(metric: str, total: float | None) -> None:
    assert prom.total(VLLM, metric) == total


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("m 1", 1.0),
        ("m\t2", 2.0),
        ("m{} 3", 3.0),
        ("m 4 1790000000000", 4.0),
        ('m{a="}"} 5', 5.0),
        ('m{a="\\"}\\\\"} 6 1790000000000', 6.0),
        ("m +Inf", float("inf")),
    ],
)
def test_forms_that_a_sample_may_have(line: str, value: float) -> None:
    assert prom.total(f"# m 9\n{line}\n", "m") == value


@pytest.mark.parametrize("line", ["m one", 'm{a="b" 1', "m "])
def test_a_sample_that_is_none_is_refused(line: str) -> None:
    with pytest.raises(ValueError):
        prom.total(line, "m")


def test_it_agrees_with_the_official_parser() -> None:
    registry = CollectorRegistry()
    gauge = Gauge("vllm:num_requests_running", "Requests.", ["engine", "model"], registry=registry)
    for engine, value in (("0", 3), ("1", 4.5)):
        gauge.labels(engine, 'quo"te}\\ \n').set(value)
    text = generate_latest(registry).decode()
    theirs = sum(s.value for f in text_string_to_metric_families(text) for s in f.samples)
    assert prom.total(text, "vllm:num_requests_running") == theirs == 7.5
