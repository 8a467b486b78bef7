"""The functions at which tests.faults.interleaved stops an operation."""

from __future__ import annotations

import inspect
import re
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the fault campaign needs Linux")


def test_each_named_function_exists() -> None:
    from tests.faults import interleaved

    source = inspect.getsource(interleaved)
    names = {f"{interleaved.OPERATIONS}.{name}" for name in re.findall(r'f"{OPERATIONS}\.([\w.]+)"', source)}
    names |= set(re.findall(r'"(mlxops\.agent\.[\w.]+\.\w+)"', source)) - {interleaved.OPERATIONS}
    assert len(names) > 10
    missing = [name for name in sorted(names) for owner, last in [interleaved._owner(name)] if not hasattr(owner, last)]
    assert missing == []
