"""The JSON form of settings."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxops.core.settings import KEEP, BootJob, PortRange, Settings, SlotOptions, settings_from_wire
from tests.properties import PROPERTY, json_values

texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"))
ranges = st.tuples(st.integers(1, 65535), st.integers(0, 99)).map(lambda it: PortRange(it[0], min(sum(it), 65535)))
settings = st.builds(
    Settings,
    address=st.none() | texts,
    bind=st.ip_addresses().map(str),
    hub=st.none() | texts,
    registry=st.none() | texts,
    state=texts,
    engine=texts,
    launch=st.dictionaries(texts, st.lists(texts, max_size=3).map(tuple), max_size=2),
    env=st.dictionaries(texts, texts, max_size=2),
    ports=ranges,
    slots=st.dictionaries(st.integers(1, 65535), texts, max_size=3),
    slot_options=st.dictionaries(
        st.integers(1, 65535),
        st.builds(SlotOptions, hold=st.none() | st.integers(0, 2**62), keep=st.none() | st.sampled_from(KEEP)),
        max_size=3,
    ),
    boot=st.lists(st.builds(BootJob, st.integers(1, 65535), texts, texts)).map(tuple),
    memory=st.none() | st.integers(1, 2**62),
    kill_limit=st.none() | st.integers(0, 2**62),
)


@given(settings)
@PROPERTY
def test_settings_survive_the_round_trip(sent: Settings) -> None:
    assert settings_from_wire(json.loads(json.dumps(sent.to_wire()))) == sent


@given(st.sampled_from(sorted(Settings().to_wire())), json_values)
@PROPERTY
def test_tampered_settings_are_read_or_refused(key: str, value: object) -> None:
    try:
        read = settings_from_wire({**Settings().to_wire(), key: value})
    except ValueError:
        return
    assert isinstance(read, Settings) and json.dumps(read.to_wire())


@pytest.mark.parametrize("key", ["bind", "state", "engine", "launch", "env", "ports", "slots"])
def test_settings_without_a_required_key_are_refused(key: str) -> None:
    wire = Settings().to_wire()
    del wire[key]
    with pytest.raises(ValueError, match=key):
        settings_from_wire(wire)


def test_keep_of_a_slot_is_read_back_and_notice_without_it() -> None:
    settings = Settings(slot_options={8100: SlotOptions(keep="off"), 8101: SlotOptions(hold=60)})
    again = settings_from_wire(settings.to_wire())
    assert again == settings and [again.keep(port) for port in (8100, 8101, 8102)] == ["off", "notice", "notice"]
    earlier = settings.to_wire() | {"slot_options": {"8100": {"hold": 60}}}  # of a version without `keep`
    assert settings_from_wire(earlier).slot_options == {8100: SlotOptions(hold=60)}


def test_settings_of_a_version_without_slot_options_are_read() -> None:
    wire = Settings(slots={8100: "jerry-xl"}, slot_options={8100: SlotOptions(hold=60)}).to_wire()
    del wire["slot_options"]
    assert settings_from_wire(wire) == Settings(slots={8100: "jerry-xl"})


def test_slot_serves_under_its_alias_and_other_ports_under_the_model() -> None:
    homelab = Settings(slots={8100: "jerry-xl"})
    assert (homelab.alias(8100, "qwen"), homelab.alias(8101, "qwen")) == ("jerry-xl", "qwen")
    assert (homelab.slot_of("jerry-xl"), homelab.slot_of("qwen")) == (8100, None)


def test_port_range_includes_both_ends() -> None:
    ports = PortRange(8100, 8102)
    assert list(ports) == [8100, 8101, 8102] and str(ports) == "8100-8102"
    assert 8099 not in ports and 8100 in ports and 8102 in ports and 8103 not in ports and "8100" not in ports


@pytest.mark.parametrize(
    ("jobs", "wire"),
    [
        ((), None),
        ((BootJob(8100, "/opt/start.sh", "a"),), {"port": 8100, "script": "/opt/start.sh", "label": "a"}),
    ],
    ids=["no job", "one job"],
)
def test_single_boot_job_is_written_in_the_old_form(jobs: tuple[BootJob, ...], wire: object) -> None:
    assert Settings(boot=jobs).to_wire()["boot"] == wire


@pytest.mark.parametrize(
    "odd", [{"env": {"A": "\0"}}, {"launch": {"mlx-lm": ["/bin/\ud800"]}}, {"hub": "/\0"}, {"memory": 10**400}]
)
def test_settings_that_no_program_takes_are_refused(odd: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        settings_from_wire({**Settings().to_wire(), **odd})
