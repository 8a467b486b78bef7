"""Env files as sh and python-dotenv read them: a table, checked against both programs."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxops.core import env_file
from tests.properties import PROPERTY

DOUBT = object()
"""sh and python-dotenv read different values, or sh would run something."""

FILES: list[tuple[str, dict[str, object]]] = [
    ("A=plain", {"A": "plain"}),
    ("  export A=plain  ", {"A": "plain"}),
    ("A=with # a comment", {"A": "with"}),
    ("A=with#out", {"A": "with#out"}),
    ("A=", {"A": ""}),
    ("A=a=b", {"A": "a=b"}),
    ("A='single # quoted'", {"A": "single # quoted"}),
    ('A="double \\"quoted\\"" # comment', {"A": 'double "quoted"'}),
    ('A="first line\nsecond line"\nB=1', {"A": "first line\nsecond line", "B": "1"}),
    ("A=1\nA=2", {"A": "2"}),
    ("# A=1\n\n\nB=2", {"B": "2"}),
    ("H=studio\nA=http://${H}:8100/v1", {"H": "studio", "A": "http://studio:8100/v1"}),
    ('H=studio\nA="http://${H}:${P:-8100}/v1"', {"H": "studio", "A": "http://studio:8100/v1"}),
    ("A=${B}\nB=1", {"A": DOUBT, "B": "1"}),
    ("A=1\nA=${A}2", {"A": "12"}),
    ("H=studio\nA=http://$H/v1", {"H": "studio", "A": DOUBT}),
    ("B=1\nA='${B}'", {"B": "1", "A": DOUBT}),
    ("A = 1", {"A": DOUBT}),
    ("A= 1", {"A": DOUBT}),
    ("A=two words", {"A": DOUBT}),
    ("A=~/x", {"A": DOUBT}),
    ("A=$(touch canary)", {"A": DOUBT}),
    ("A=`touch canary`", {"A": DOUBT}),
    ("A=a\\b", {"A": DOUBT}),
    ('A="a\\nb"', {"A": DOUBT}),
    ("A=1\r\nB=2\r\n", {"A": DOUBT, "B": DOUBT}),
    ("\ufeffA=1\nB=2", {"A": DOUBT, "B": "2"}),
    ("export A=1 B=2", {"A": DOUBT, "B": DOUBT}),
    ("A=1; B=2", {"A": DOUBT, "B": DOUBT}),
    ("A=1 touch canary", {"A": DOUBT}),
    ("A=a'b c'd", {"A": DOUBT}),
    ("A=1\nA", {"A": DOUBT}),
]
CERTAIN = {index: {k: v for k, v in values.items() if v is not DOUBT} for index, (_, values) in enumerate(FILES)}


@pytest.mark.parametrize(("text", "expected"), FILES)
def test_value_is_certain_if_both_programs_read_it(text: str, expected: dict[str, object]) -> None:
    parsed = env_file.parse(text)
    values = {name: DOUBT if name in parsed.doubtful else value for name, value in parsed.values.items()}
    assert {name.lstrip("\ufeff"): value for name, value in values.items()} == expected
    assert bool(parsed.problems) == (DOUBT in expected.values())


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("A=1\nno assignment\nB=2", 2),
        ('A=1\nC="without end\nB=2', 2),
        ("A=1\nif true; then\nB=2", 2),
        ("A=1\n9C=x\nB=2", 2),
        ("A=1\n\n\nC=$(id)\nB=2", 4),
    ],
)
def test_bad_line_is_reported_and_the_others_are_read(text: str, line: int) -> None:
    parsed = env_file.parse(text)
    assert [problem.line for problem in parsed.problems] == [line]
    assert {name: parsed.values[name] for name in "AB"} == {"A": "1", "B": "2"}
    assert not parsed.doubtful & {"A", "B"}


def test_problem_never_contains_a_value() -> None:
    text = "SECRET one\nA=SECRET two\nB='SECRET\nC=$(SECRET)\nD=SECRET\r\n"
    assert "SECRET" not in str(env_file.parse(text).problems)


def test_comment_of_an_ini_file_is_no_problem() -> None:
    assert env_file.parse("; A=1\nB=2") == env_file.EnvFile({"B": "2"})


@given(st.text(alphabet="AB=\"'\\${}:-# \n\r;~`(", max_size=30))
@PROPERTY
def test_any_text_is_parsed(text: str) -> None:
    env_file.parse(text)


def test_sh_reads_the_certain_values(tmp_path: Path) -> None:
    """Only files that run nothing are given to sh."""
    quiet = [index for index, (text, _) in enumerate(FILES) if "touch" not in text]
    for index in quiet:
        (tmp_path / f"f{index}").write_bytes(FILES[index][0].encode())
    lines = [f"(set -a; . ./f{index} 2>&-; exec /usr/bin/env -0 >out{index})\n" for index in quiet]
    subprocess.run(["/bin/sh", "-c", "".join(lines)], cwd=tmp_path, env={"PATH": ""}, check=False)
    for index in quiet:
        environ = (tmp_path / f"out{index}").read_text().split("\0")
        assert {f"{name}={value}" for name, value in CERTAIN[index].items()} <= set(environ), FILES[index]


def test_python_dotenv_reads_the_certain_values(litellm: Path) -> None:
    """The python-dotenv is the one of LiteLLM's own environment."""
    code = (
        "import dotenv, io, json, sys\n"
        "read = lambda text: dict(dotenv.dotenv_values(stream=io.StringIO(text, newline='')))\n"
        "print(json.dumps([read(text) for text in json.load(sys.stdin)]))"
    )
    done = subprocess.run(
        [litellm / "bin" / "python", "-c", code],
        input=json.dumps([text for text, _ in FILES]),
        env={"PATH": os.defpath},
        capture_output=True,
        text=True,
        check=True,
    )
    for index, values in enumerate(json.loads(done.stdout)):
        assert CERTAIN[index].items() <= values.items(), FILES[index]
