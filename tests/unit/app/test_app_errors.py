"""The one table of refusals, as clients need it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from litestar.exceptions import MethodNotAllowedException, NotFoundException

import engines.errors
import tenants.errors
from app import errors
from app.errors import EngineFailed, EngineRefused, GatewayError, ModelUnknown, RequestInvalid
from engines.errors import HoldExpired, LoadFailed, NotAdmitted, QueueFull
from engines.sse import EngineError
from tenants.usage import Outcome


def said(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    answer = errors.answer(error)
    headers = {name.decode(): value.decode() for name, value in answer.headers}
    assert headers["content-length"] == str(len(answer.body))
    return answer.status, json.loads(answer.body)["error"], headers


@pytest.mark.parametrize("kind", [*errors.TABLE])
def test_every_row_has_a_type_and_a_code_or_a_field(kind: type[Exception]) -> None:
    row = errors.TABLE[kind]
    assert row.type in {errors.INVALID, errors.SERVER}
    assert (row.type == errors.SERVER) == (row.status >= 500)
    assert row.code or kind in {RequestInvalid, EngineRefused}
    assert row.status not in {409, 429}


def test_every_error_of_the_tree_that_a_request_can_meet_is_in_the_table() -> None:
    met = [*_leaves(GatewayError), *_leaves(NotAdmitted)]
    met += [tenants.errors.KeyRefused, tenants.errors.AuthUnavailable, tenants.errors.LedgerUnavailable]
    met += [engines.errors.EngineLost, engines.errors.EngineUnreachable]
    assert [kind for kind in met if kind not in errors.TABLE] == []


def _leaves(kind: type[Exception]) -> list[type[Exception]]:
    below = kind.__subclasses__()
    return [leaf for each in below for leaf in _leaves(each)] if below else [kind]


@pytest.mark.parametrize(("retry_s", "header"), [(0.2, "1"), (7.0, "7"), (400.0, "60")])
def test_nobody_is_told_to_wait_longer_than_a_minute(retry_s: float, header: str) -> None:
    assert said(QueueFull("full", retry_s=retry_s))[2]["retry-after"] == header


def test_waiting_for_a_start_and_for_a_slot_are_told_apart() -> None:
    for loading, code in ((True, "model_loading"), (False, "overloaded")):
        error = HoldExpired("later", retry_s=3, loading=loading)
        status, body, headers = said(error)
        assert (status, body["code"], headers["x-should-retry"]) == (503, code, "true")
        assert errors.row(error).outcome is Outcome.HOLD_EXPIRED


def test_a_failed_start_is_not_said_to_be_worth_a_retry_at_once() -> None:
    _, body, headers = said(LoadFailed("its weights don't load", retry_s=30))
    assert body["message"] == "its weights don't load"
    assert "x-should-retry" not in headers


def test_an_engines_own_failure_is_not_told_in_its_words() -> None:
    status, body, _ = said(EngineFailed("EngineCore died: /secret/path"))
    assert status == 503
    assert "secret" not in body["message"]
    assert errors.detail(EngineFailed("EngineCore died")) == "EngineCore died"


@pytest.mark.parametrize(("status", "told"), [(400, 400), (413, 413), (422, 422), (404, 400), (999, 400)])
def test_an_engines_refusal_is_a_status_that_callers_understand(status: int, told: int) -> None:
    got, body, _ = said(EngineRefused(EngineError("no such tool", status, "tools")))
    assert (got, body["message"], body["param"]) == (told, "no such tool", "tools")


def test_a_prompt_that_is_too_long_has_openais_code() -> None:
    error = EngineRefused(EngineError("This model's maximum context length is 64 tokens", 400))
    assert said(error)[1]["code"] == "context_length_exceeded"


def test_a_refusal_is_told_to_operators_without_what_the_caller_sent() -> None:
    assert errors.detail(EngineRefused(EngineError("bad value 'my secret'", 400))) == "the engine answered 400"


def test_a_fault_of_ours_says_nothing_of_itself() -> None:
    status, body, _ = said(KeyError("secret"))
    assert (status, body["code"]) == (500, "internal_error")
    assert "secret" not in body["message"]
    assert errors.is_bug(KeyError("secret"))
    assert errors.detail(KeyError("secret")) == "KeyError"


def test_an_unknown_model_lists_what_there_is_up_to_a_bound() -> None:
    assert str(ModelUnknown("x" * 500, "acme", ["b", "a"])).endswith("it has: a, b")
    assert len(str(ModelUnknown("x" * 500, "acme", [f"variant-{n}" for n in range(1000)]))) < 500
    assert "none yet" in str(ModelUnknown("x", "acme", []))


def test_routes_that_are_not_there_have_codes_and_headers() -> None:
    assert said(NotFoundException())[:1] == (404,)
    status, body, headers = said(MethodNotAllowedException(headers={"Allow": "POST"}))
    assert (status, body["code"], headers["allow"]) == (405, "method_not_allowed", "POST")


def test_a_frame_is_one_event() -> None:
    frame = errors.frame(EngineFailed("x"))
    assert frame.startswith(b'data: {"error":{')
    assert frame.endswith(b"}\n\n")
    assert frame.count(b"\n") == 2
