"""Checks of arguments, and their errors."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxops.core import names
from mlxops.core.errors import Exit, UsageError
from mlxops.core.settings import PortRange
from tests.properties import PROPERTY, hostile_texts

HOSTILE = [
    "",
    " ",
    "a b",
    " a",
    "a\n",
    "a\0b",
    "a;id",
    "$(id)",
    "`id`",
    "a'b",
    'a"b',
    "a|b",
    "a&b",
    "..",
    "../x",
    "a/../b",
    "/etc/passwd",
    "-rf",
    "--help",
    ".hidden",
    "_x",
    "ü",
    "ａ",
    "a\u202eb",
    "a\u200fb",
    "\x1b[31mred",
    "a\\b",
    "a@b",
    "a:b",
    "~",
    "*",
    "a" * 65,
]
PORTS = PortRange(8100, 8109)


def refused(call: object, *args: object) -> UsageError:
    assert callable(call)
    with pytest.raises(UsageError) as caught:
        call(*args)
    error = caught.value
    assert error.exit is Exit.USAGE and error.why and error.hint
    assert all(part.isprintable() and part.isascii() for part in (error.message, error.why, error.hint))
    return error


@pytest.mark.parametrize("text", ["a", "jerry-xl", "Q3.5_b-4", "0", "a" * 64, "a..b"])
def test_name_has_letters_digits_and_a_few_marks(text: str) -> None:
    assert names.is_name(text) and names.model_name(text) == text


@pytest.mark.parametrize("text", HOSTILE)
def test_text_special_to_shell_path_or_terminal_is_no_name(text: str) -> None:
    assert not names.is_name(text)
    assert refused(names.model_name, text).code == "bad_name"


@pytest.mark.parametrize("text", ["org/name", "mlx-community/Qwen3-235B-A22B-Instruct-2507-6bit", "_a/b_", "a.b/c.d"])
def test_repository_is_an_organisation_and_a_name(text: str) -> None:
    assert names.is_repo_id(text) and names.model_name(text) == text
    assert names.repo(text) == (text, None)


@pytest.mark.parametrize(
    "text",
    [
        *HOSTILE,
        "org",
        "a/b/c",
        "/b",
        "a/",
        "a//b",
        "-a/b",
        "a/-b",
        "a/b.",
        "a/b-",
        "a/.b",
        "a--b/c",
        "a/b--c",
        "a/b..c",
        "a/b.git",
        "a/" + "b" * 95,
        "a /b",
        "a/b\n",
        "o/ｂ",
        "a/$(id)",
    ],
)
def test_other_text_is_no_repository(text: str) -> None:
    assert not names.is_repo_id(text)
    assert refused(names.repo, text).code == "bad_repo"


@pytest.mark.parametrize("revision", ["main", "v1.0", "refs/pr/1", "0" * 40, "a_b-c"])
def test_repository_may_name_a_revision(revision: str) -> None:
    assert names.repo(f"org/name@{revision}") == ("org/name", revision)


@pytest.mark.parametrize("revision", ["", "-f", "../main", "a..b", "a b", "a\n", "$(id)", "@", "a@b", ".x", "a" * 129])
def test_revision_that_is_an_option_or_leaves_its_folder_is_refused(revision: str) -> None:
    assert not names.is_revision(revision)
    assert refused(names.repo, f"org/name@{revision}").code == "bad_repo"


@pytest.mark.parametrize(("text", "number"), [("8100", 8100), ("8109", 8109), ("08101", 8101)])
def test_port_in_the_range_is_accepted(text: str, number: int) -> None:
    assert names.port(text, PORTS) == number


@pytest.mark.parametrize(
    "text", [*HOSTILE, "8099", "8110", "abc", "81e2", "+8100", "8_100", "８１００", "8100.0", "9" * 99]
)
def test_other_text_is_refused_with_the_port_range(text: str) -> None:
    error = refused(names.port, text, PORTS)
    assert error.code == "bad_port" and "8100-8109" in error.why


@pytest.mark.parametrize(("text", "number"), [("1", 1.0), ("0.5", 0.5), ("86400", 86400.0), ("600.125", 600.125)])
def test_duration_is_a_number_of_seconds(text: str, number: float) -> None:
    assert names.seconds(text, "--timeout") == number


def test_zero_is_a_duration_where_allowed() -> None:
    assert names.seconds("0", "--drain", zero=True) == 0
    assert refused(names.seconds, "0", "--drain").code == "bad_duration"


@pytest.mark.parametrize("text", [*HOSTILE[:20], "0", "0.0", "-1", "1e9", "inf", "nan", "86400.5", "10m", "٣", "1."])
def test_other_text_is_no_duration(text: str) -> None:
    error = refused(names.seconds, text, "--timeout")
    assert error.code == "bad_duration" and "--timeout" in error.message


@given(hostile_texts)
@PROPERTY
def test_any_text_is_shown_in_one_short_printable_line(text: str) -> None:
    shown = names.shown(text)
    assert shown.isascii() and shown.isprintable() and len(shown) <= 80 * 10 + 2


@given(st.text(max_size=100))
@PROPERTY
def test_name_is_a_file_name_and_no_option(text: str) -> None:
    if names.is_name(text):
        assert text not in {".", ".."} and "/" not in text and not text.startswith("-") and text.isascii()


@given(st.from_regex(r"[a-zA-Z0-9._/@-]{1,40}", fullmatch=True))
@PROPERTY
def test_repository_has_two_parts_that_are_folder_names(text: str) -> None:
    if names.is_repo_id(text):
        organisation, name = text.split("/")
        assert all(part not in {".", ".."} and not part.startswith(("-", ".")) for part in (organisation, name))
