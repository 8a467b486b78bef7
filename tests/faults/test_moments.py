"""The functions at which tests.faults.meanwhile stops an operation."""

from __future__ import annotations

import inspect
import re
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the fault campaign needs Linux")


def test_each_named_function_exists() -> None:
    from tests.faults import meanwhile

    source = inspect.getsource(meanwhile)
    names = {f"{meanwhile.OPERATIONS}.{name}" for name in re.findall(r'f"{OPERATIONS}\.([\w.]+)"', source)}
    names |= set(re.findall(r'"(mlxops\.agent\.[\w.]+\.\w+)"', source)) - {meanwhile.OPERATIONS}
    assert len(names) > 10
    missing = [name for name in sorted(names) for owner, last in [meanwhile._owner(name)] if not hasattr(owner, last)]
    assert missing == []
