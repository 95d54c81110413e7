from __future__ import annotations

import pytest

from localmix.serving.policy import Policy, allowed_cors_headers, host_name


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("localhost", "localhost"),
        ("LocalHost:8080", "localhost"),
        ("[::1]:80", "::1"),
        ("name.", "name"),
        ("", None),
        (":80", None),
        ("a@b", None),
        ("a/b", None),
        ("a?b", None),
        ("a:99999", None),
        ("[::1", None),
    ],
)
def test_the_name_in_a_host_header(header: str, name: str | None) -> None:
    assert host_name(header) == name


def test_a_server_answers_under_its_own_names() -> None:
    policy = Policy(host="192.168.1.7", allowed_hosts=frozenset({"Box.example"}))
    for known in ("192.168.1.7", "box.example:8080", "localhost", "127.0.0.1", "[::1]"):
        assert policy.knows_host(known, "192.168.1.7")
    assert not policy.knows_host("192.168.1.8", "192.168.1.7")
    assert not policy.knows_host("example", "192.168.1.7")


def test_a_server_on_every_address_answers_under_the_one_that_was_called() -> None:
    policy = Policy(host="0.0.0.0")
    assert policy.knows_host("192.168.1.7:8080", "192.168.1.7")
    assert policy.knows_host("[fe80:0::1]", "fe80::1%eth0")
    assert not policy.knows_host("192.168.1.8", "192.168.1.7")
    assert not policy.knows_host("rebound.example", "192.168.1.7")


def test_origins_are_named_in_full() -> None:
    policy = Policy(cors_origins=frozenset({"https://chat.example"}))
    assert policy.allows_origin("https://Chat.example")
    for foreign in ("http://chat.example", "https://chat.example:8443", "https://x.chat.example", "null", ""):
        assert not policy.allows_origin(foreign)
    assert Policy(cors_origins=frozenset({"*"})).allows_origin("null")
    assert not Policy(cors_origins=frozenset({"null"})).allows_origin("null")


def test_the_own_page_is_told_by_name_and_port() -> None:
    policy = Policy()
    assert policy.is_own_page("http://localhost:8080", "localhost:8080")
    assert policy.is_own_page("https://box.example", "BOX.example")
    for foreign in ("http://localhost:8081", "http://localhost", "null", "file://", "ftp://localhost:8080"):
        assert not policy.is_own_page(foreign, "localhost:8080")


def test_a_key_is_shown_in_either_header() -> None:
    policy = Policy(api_key="schlüssel")
    assert policy.knows_key({"Authorization": "Bearer schlüssel"}) and policy.knows_key({"x-api-key": "schlüssel"})
    for wrong in ({}, {"Authorization": "schlüssel"}, {"Authorization": "Bearer"}, {"x-api-key": "\udcff"}):
        assert not policy.knows_key(wrong)
    # the Bearer counts where both are there, so that a page's stored key is not rescued by another
    assert not policy.knows_key({"Authorization": "Bearer wrong", "x-api-key": "schlüssel"})
    assert Policy().knows_key({})


def test_a_policy_does_not_show_its_key() -> None:
    assert "secret" not in repr(Policy(api_key="secret")) and "with a key" in repr(Policy(api_key="secret"))


def test_only_headers_of_the_api_are_allowed() -> None:
    assert allowed_cors_headers("Authorization, x-stainless-lang,cookie, x-real-ip") == [
        "authorization",
        "x-stainless-lang",
    ]
    assert allowed_cors_headers("") == allowed_cors_headers("x-stainless-\udcff, openai-a\nb") == []
