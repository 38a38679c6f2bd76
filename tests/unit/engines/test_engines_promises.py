from __future__ import annotations

import pytest

from engines.errors import DoesNotFit
from engines.footprint import estimate
from engines.model import Device, DeviceId, Model, ModelDigest, NodeId, RuntimeArguments, Scaling, Variant
from engines.promises import check_promises

MODEL = Model(
    name="tiny",
    digest=ModelDigest("a" * 64),
    architecture="LlamaForCausalLM",
    weights_bytes=1_000,
    parameters=500,
    max_model_len=4096,
    kv_bytes_per_token=256,
    dtype="bfloat16",
    source="",
)
SLOTS = RuntimeArguments(max_num_seqs=2)
ENGINE = estimate(MODEL, SLOTS).total


def variant(name: str, provisioned: int, *, dedicated: bool = False) -> Variant:
    scaling = Scaling(provisioned=provisioned)
    return Variant(workspace=name, name="bot", model=MODEL, arguments=SLOTS, scaling=scaling, dedicated=dedicated)


def device(engines: float, name: str = "mem") -> Device:
    return Device(id=DeviceId(f"n/{name}"), node=NodeId("n"), memory_bytes=int(ENGINE * engines))


def kept(changed: Variant, others: list[Variant], *devices: Device, most: int = 4) -> bool:
    try:
        check_promises(others, changed, devices, most)
    except DoesNotFit as error:
        assert error.field == "scaling.provisioned"
        return False
    return True


def test_nothing_promised_needs_nothing() -> None:
    assert kept(variant("a", 0), [variant("b", 99)])


def test_two_slots_of_one_engine_are_shared_by_the_pools_variants() -> None:
    assert kept(variant("a", 1), [variant("b", 1)], device(1))
    assert not kept(variant("a", 2), [variant("b", 1)], device(1))
    assert kept(variant("a", 2), [variant("b", 1)], device(2))


def test_dedicated_engines_share_nothing() -> None:
    assert not kept(variant("a", 1, dedicated=True), [variant("b", 1)], device(1))
    assert kept(variant("a", 1, dedicated=True), [variant("b", 1)], device(2))


def test_an_engine_lies_on_one_device() -> None:
    assert not kept(variant("a", 4), [], device(1.5, "gpu0"), device(0.9, "gpu1"))
    assert kept(variant("a", 4), [], device(1.5, "gpu0"), device(1.0, "gpu1"))


def test_a_pool_has_no_more_engines_than_are_allowed() -> None:
    assert kept(variant("a", 8), [], device(10))
    assert not kept(variant("a", 9), [], device(10))
    assert kept(variant("a", 9), [], device(10), most=5)


def test_the_refusal_says_how_much_all_promises_need() -> None:
    with pytest.raises(DoesNotFit) as caught:
        check_promises([variant("b", 2)], variant("a", 2), (device(1),), 4)
    assert str(caught.value) == (
        "provisioned concurrency 2 can't be kept beside what others were promised: "
        f"all of it needs 2 engines with {2 * ENGINE / 1e9:.2f} GB; the devices have {ENGINE / 1e9:.2f} GB"
    )
