"""What the fields of a dataclass mean: the texts below them in the source."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass


def field_docs(kind: type) -> Mapping[str, str]:
    """Return field -> its meaning, of the class and its bases, in the words of JSON."""
    docs: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if is_dataclass(base):
            docs |= dict(_own_docs(base))
            docs |= {each.name: str(each.metadata["help"]) for each in fields(base) if each.metadata.get("help")}
    return docs


def _own_docs(kind: type) -> Iterator[tuple[str, str]]:
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(node, ast.ClassDef)
    for field_node, doc in zip(node.body, node.body[1:], strict=False):
        if isinstance(field_node, ast.AnnAssign) and isinstance(field_node.target, ast.Name):
            text = doc.value if isinstance(doc, ast.Expr) else None
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                yield field_node.target.id, text.value
