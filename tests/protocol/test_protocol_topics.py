"""Topics: built and read by one class, and nothing strange gets into them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.errors import ProtocolError
from edge_sdk.protocol.topics import Address, Topics
from edge_sdk.transport.rules import matches

T = Topics("farm")


def test_the_topics_as_written_down() -> None:
    assert T.control("dev-1") == "fl1/farm/s/0/d/dev-1/c"
    assert T.bulk("dev-1") == "fl1/farm/s/0/d/dev-1/b"
    assert T.reply("dev-1") == "fl1/farm/d/dev-1/r"
    assert T.presence("dev-1") == "fl1/farm/p/dev-1"
    assert T.aggregator == "fl1/farm/a/0"
    assert T.run == "fl1/farm/m"


@pytest.mark.parametrize(
    ("topic", "address"),
    [
        (T.control("dev-1"), Address("control", "dev-1")),
        (T.bulk("dev-1"), Address("bulk", "dev-1")),
        (T.reply("dev-1"), Address("reply", "dev-1")),
        (T.presence("dev-1"), Address("presence", "dev-1")),
        (T.aggregator, Address("aggregator")),
        (T.run, Address("run")),
    ],
)
def test_what_is_built_is_read(topic: str, address: Address) -> None:
    assert T.parse(topic) == address
    with pytest.raises(ProtocolError):
        Topics("other").parse(topic)


def test_wildcards_stand_where_an_aggregator_listens_and_nowhere_else() -> None:
    assert matches(T.control("+"), T.control("dev-1"))
    assert not matches(T.control("+"), T.bulk("dev-1"))
    assert not matches(T.presence("+"), "fl1/farm/p/dev-1/x")
    with pytest.raises(ProtocolError):
        T.reply("+")


@pytest.mark.parametrize("level", ["", "a/b", "#", "a b", "a" * 65, "ä", "a.b", "a\n"])
def test_levels_that_are_none_are_refused(level: str) -> None:
    for call in (T.control, T.bulk, T.reply, T.presence, Topics):
        with pytest.raises(ProtocolError):
            call(level)


@given(topic=st.text(max_size=60))
@settings(max_examples=100, deadline=None)
def test_any_text_is_read_or_refused(topic: str) -> None:
    for candidate in (topic, f"fl1/farm/d/{topic}/r", f"fl1/farm/p/{topic}"):
        try:
            address = T.parse(candidate)
        except ProtocolError:
            continue
        assert address.device is None or T.reply(address.device)
