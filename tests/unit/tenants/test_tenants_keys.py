"""Keys as text: made, parsed, refused, hashed."""

from __future__ import annotations

import hashlib
import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenants import keys
from tenants.errors import KeyRefused
from tenants.keys import KeyKind

SECRET = "s" * 52
GOOD = f"gr-abcdefgh2345-{SECRET}"


@given(st.binary(min_size=keys.RANDOM_BYTES, max_size=keys.RANDOM_BYTES), st.sampled_from(KeyKind))
def test_a_generated_key_parses_to_itself(random: bytes, kind: KeyKind) -> None:
    made = keys.generate(kind, random)
    assert keys.parse(made.text) == made
    assert made.text.startswith(f"{kind}-{made.id}-")
    assert len(made.id) == 12
    assert len(made.text.rsplit("-", 1)[1]) == 52


def test_every_random_byte_of_the_secret_matters() -> None:
    base = keys.generate(KeyKind.WORKSPACE, bytes(keys.RANDOM_BYTES)).text
    for position in range(8, keys.RANDOM_BYTES):
        random = bytearray(keys.RANDOM_BYTES)
        random[position] = 1
        assert keys.generate(KeyKind.WORKSPACE, bytes(random)).text != base


@pytest.mark.parametrize("length", [0, 39, 41])
def test_too_few_or_too_many_random_bytes_are_refused(length: int) -> None:
    with pytest.raises(ValueError, match="40 random bytes"):
        keys.generate(KeyKind.WORKSPACE, bytes(length))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must begin with `gr-`"),
        ("sk-abcdefgh2345-" + SECRET, "must begin with `gr-`"),
        ("gr", "must begin with `gr-`"),
        ("gr-", "must begin with `gr-`"),
        ("GR-abcdefgh2345-" + SECRET, "must begin with `gr-`"),
        ("gr-short-" + SECRET, "after `gr-` come 12 characters"),
        ("gra-ABCDEFGH2345-" + SECRET, "after `gra-` come 12 characters"),
        ("gr-abcdefgh2345\n-" + SECRET, "after `gr-` come 12 characters"),
        ("gr-abcdefgh0189-" + SECRET, "after `gr-` come 12 characters"),
        ("gr-abcdefgh2345", "the secret part is missing"),
        ("gr-abcdefgh2345-", "has 32 to 128 characters"),
        ("gr-abcdefgh2345-" + "s" * 31, "has 32 to 128 characters"),
        ("gr-abcdefgh2345-" + "s" * 129, "has 32 to 128 characters"),
        ("gr-abcdefgh2345-" + "s" * 31 + "\n", "of a-z and 2-7 only"),
        ("gr-abcdefgh2345-" + "s" * 31 + "ſ", "of a-z and 2-7 only"),
        ("gr-abcdefgh2345-" + "s" * 20 + "-" + "s" * 20, "of a-z and 2-7 only"),
        ("g" * 257, "longer than 256 characters"),
    ],
)
def test_a_malformed_key_is_refused_with_what_is_wrong(text: str, said: str) -> None:
    with pytest.raises(KeyRefused, match=said.replace("(", r"\(")):
        keys.parse(text)


@given(st.text(min_size=4))
def test_a_refusal_never_repeats_what_was_sent(text: str) -> None:
    sent = f"gr-abcdefgh2345-{text}§secret§"
    with pytest.raises(KeyRefused) as refused:
        keys.parse(sent)
    assert "§secret§" not in str(refused.value)
    assert refused.value.__cause__ is None


def test_a_parsed_key_shows_no_secret_in_its_repr() -> None:
    assert SECRET not in repr(keys.parse(GOOD))
    assert SECRET not in str(keys.parse(GOOD))


@pytest.mark.parametrize(
    ("header", "text"),
    [("Bearer abc", "abc"), ("bearer abc", "abc"), ("BEARER   abc ", "abc"), ("Bearer a b", "a b")],
)
def test_the_key_is_taken_out_of_the_header(header: str, text: str) -> None:
    assert keys.bearer(header) == text


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (None, "no API key"),
        ("", "no API key"),
        ("  ", "no API key"),
        ("Basic YTpi", "must be `Bearer <key>`"),
        ("Bearer", "must be `Bearer <key>`"),
        ("Bearer   ", "no key after `Bearer`"),
        ("abc", "must be `Bearer <key>`"),
    ],
)
def test_a_header_without_a_key_is_refused_with_what_is_missing(header: str | None, said: str) -> None:
    with pytest.raises(KeyRefused, match=said):
        keys.bearer(header)


def test_the_digest_is_hmac_sha256_with_the_pepper_over_the_whole_text() -> None:
    key = keys.parse(GOOD)
    assert keys.digest(b"pepper", key) == hmac.new(b"pepper", GOOD.encode(), hashlib.sha256).digest()
    assert keys.matches(keys.digest(b"pepper", key), keys.digest(b"pepper", key))
    assert not keys.matches(keys.digest(b"pepper", key), keys.digest(b"other", key))


def test_kind_and_id_are_part_of_what_is_hashed() -> None:
    texts = [GOOD, GOOD.replace("gr-", "gra-"), GOOD.replace("abc", "abd"), GOOD[:-1] + "t"]
    assert len({keys.digest(b"pepper", keys.parse(text)) for text in texts}) == 4
