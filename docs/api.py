"""The API page, from the signatures and docstrings of what is public.

python docs/api.py      # writes docs/api.md
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PUBLIC = {
    "stm_kernels": (
        "memory_read space_time_memory_read SpaceTimeMemoryRead memory_usage merge_reads PagedMemory DistributedMemory "
        "distributed_memory_read default_implementation"
    ),
    "stm_model": "STM STMConfig Tracker",
    "stm_model.tracking.tracker": "FrameResult",
    "stm_model.tracking.memory": "MemoryRule MemoryBudget",
    "stm_model.io.video": "open_video read_masks VideoWriter",
    "stm_model.io.images": "read_mask write_mask overlay",
    "stm_model.interactive.session": "ScribbleSession",
    "stm_model.interactive.scribbles": "read_scribbles write_scribbles rasterize thin",
    "stm_model.interactive.official": "drive",
    "stm_model.evaluation.metrics": "region_similarity contour_accuracy statistics Statistics sequence_scores",
    "stm_model.evaluation.tensor_metrics": "region_similarity contour_accuracy",
}
"""Names by the module that a user imports them from."""
WIDTH = 100
"""Characters of a signature that stands on one line."""
SECTIONS = ("Args", "Returns", "Yields", "Raises", "Source")


def render() -> str:
    """The page in Markdown."""
    lines = ["# API", "", "Written by `python docs/api.py` from the docstrings. Letters in shapes: B batch (objects) ·"]
    lines += ["C key channels · V value channels · T frames · H, W grid · M queries · N memory positions.", ""]
    for module, names in PUBLIC.items():
        lines += [f"## {module}", ""]
        for name in names.split():
            lines += _entry(name, getattr(importlib.import_module(module), name))
    return "\n".join(lines).rstrip() + "\n"


def _text(node: ast.AST) -> str:
    return ast.unparse(node).replace("'", '"')


def _entry(name: str, thing: Any) -> Iterator[str]:
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(thing))).body
    yield from (f"### {name}", "")
    if isinstance(node, ast.FunctionDef):
        yield from _function(node, name)
        return
    assert isinstance(node, ast.ClassDef)
    methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
    fields = list(_fields(node))
    if not fields:
        (start,) = [method for method in methods if method.name == "__init__"]
        yield from _signature(start, name)
    yield from _prose(ast.get_docstring(node) or "")
    for field, kind, default, text in fields:
        yield f"- `{field}: {kind}{default}`: {text}"
    if fields:
        yield ""
    seen = set()
    for method in methods:
        overload = any(_text(decorator) == "overload" for decorator in method.decorator_list)
        if method.name.startswith("_") or overload or method.name in seen or not ast.get_docstring(method):
            continue
        seen.add(method.name)
        yield from (f"#### {name}.{method.name}", "")
        yield from _function(method, f"{name}.{method.name}")


def _fields(node: ast.ClassDef) -> Iterator[tuple[str, str, str, str]]:
    """Name, type, default and docstring of each field: the string below it."""
    for field, below in zip(node.body, node.body[1:]):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            default = f" = {_text(field.value)}" if field.value else ""
            yield _text(field.target), _text(field.annotation), default, " ".join(below.value.value.split())


def _function(node: ast.FunctionDef, name: str) -> Iterator[str]:
    decorators = [_text(decorator) for decorator in node.decorator_list]
    if "property" in decorators:
        yield from ("```python", f"{name}: {_text(node.returns)}", "```", "")
    else:
        yield from _signature(node, name)
    yield from _prose(ast.get_docstring(node) or "")


def _signature(node: ast.FunctionDef, name: str) -> Iterator[str]:
    arguments = [part for part in _arguments(node.args) if part not in ("self", "cls")]
    returned = f" -> {_text(node.returns)}" if node.returns and node.name != "__init__" else ""
    line = f"{name}({', '.join(arguments)}){returned}"
    if len(line) > WIDTH:
        line = "\n".join([f"{name}(", *(f"    {part}," for part in arguments), f"){returned}"])
    yield from ("```python", line, "```", "")


def _arguments(given: ast.arguments) -> Iterator[str]:
    def one(argument: ast.arg, default: ast.expr | None) -> str:
        kind = f": {_text(argument.annotation)}" if argument.annotation else ""
        equals = " = " if kind else "="
        return argument.arg + kind + (f"{equals}{_text(default)}" if default else "")

    plain = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(plain) - len(given.defaults)) + given.defaults
    yield from map(one, plain, defaults)
    if given.vararg:
        yield "*" + one(given.vararg, None)
    elif given.kwonlyargs:
        yield "*"
    yield from map(one, given.kwonlyargs, given.kw_defaults)
    if given.kwarg:
        yield "**" + one(given.kwarg, None)


def _prose(docstring: str) -> Iterator[str]:
    """A docstring in Markdown: what it says, then its sections, arguments and errors as lists."""
    parts = re.split(rf"^({'|'.join(SECTIONS)}):", docstring, flags=re.MULTILINE)
    yield from (parts[0].strip(), "")
    for title, body in zip(parts[1::2], parts[2::2]):
        if title in ("Args", "Raises"):
            yield from (f"**{title}**", "")
            for item in re.split(r"^    (?=\S)", body, flags=re.MULTILINE)[1:]:
                names, _, text = " ".join(item.split()).partition(": ")
                yield "- " + ", ".join(f"`{name}`" for name in names.split(", ")) + f": {text}"
        else:
            yield f"**{title}** " + " ".join(body.split())
        yield ""


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(render(), encoding="utf-8")
