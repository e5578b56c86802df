"""Arguments to a command's config, and its help: a frozen dataclass, whose fields' docstrings describe the options."""

import ast
import contextlib
import dataclasses
import functools
import inspect
import io
import itertools
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import MISSING_NONPROP, ConstructorRegistry, StructConstructorSpec, StructFieldSpec

Config = TypeVar("Config")

_REGISTRY = ConstructorRegistry()


def parse(config: type[Config], program: str, argv: Sequence[str], note: str = "") -> Config:
    """Arguments to a config; `note` follows its description in the help. Raises a ValueError of one line for what is
    refused, and SystemExit after the help.
    """
    description = f"{inspect.getdoc(config)}\n\n{note}".strip()
    with _one_line_refusal(program):
        return tyro.cli(
            config,
            prog=program,
            description=description,
            args=argv,
            config=(tyro.conf.FlagCreatePairsOff,),
            registry=_REGISTRY,
        )


def choose(option: str, choices: tuple[str, ...], program: str, argv: Sequence[str]) -> tuple[str, list[str]]:
    """The value of an option that decides what the others are, by default the first, and the arguments without it."""
    kind: Any = dataclasses.make_dataclass("Choice", [(option, Literal[choices], choices[0])])
    with _one_line_refusal(program):
        choice, rest = tyro.cli(kind, prog=program, args=argv, return_unknown_args=True, add_help=False)
    return getattr(choice, option), rest


@_REGISTRY.struct_rule
def _options(info: tyro.constructors.StructTypeInfo) -> StructConstructorSpec | None:
    """The options of a dataclass: tyro's own rule breaks the lines of a description where the source does, calls an
    option that may be None `{None}|PATH`, and says of --no-overlay that it writes the overlay.
    """
    if not dataclasses.is_dataclass(info.type):
        return None
    kinds, options = get_type_hints(info.type, include_extras=True), []
    for field in dataclasses.fields(info.type):
        default = field.default if field.default is not dataclasses.MISSING else MISSING_NONPROP
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        kind = kinds[field.name]
        hint = "" if default is None or default == () or isinstance(default, bool) else None
        arg = tyro.conf.arg(metavar=_metavar(kind), help_behavior_hint=hint)
        text = functools.partial(_description, info.type, field.name, default is True)
        options.append(StructFieldSpec(field.name, cast(Any, Annotated[kind, arg]), default, text))
    return StructConstructorSpec(info.type, tuple(options))


def _metavar(kind: Any) -> str | None:
    """`PATH` for `Path | None`; None leaves it to tyro."""
    parts = get_args(kind)
    if set(parts) == {str, Path}:
        return "PATH"
    if NoneType not in parts:
        return None
    (inner,) = (part for part in parts if part is not NoneType)
    return f"{{{','.join(get_args(inner))}}}" if get_origin(inner) is Literal else inner.__name__.upper()


def _description(config: type, name: str, negative: bool) -> str:
    text = _docstrings(config)[name]
    return f"Don't {text[0].lower()}{text[1:]}" if negative else text


@functools.cache
def _docstrings(config: type) -> dict[str, str]:
    """The description of each field, as one paragraph: the string under it."""
    found = {}
    for kind in reversed(config.__mro__):
        if dataclasses.is_dataclass(kind):
            (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
            assert isinstance(definition, ast.ClassDef)
            for field, text in itertools.pairwise(definition.body):
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                    found[ast.unparse(field.target)] = " ".join(ast.literal_eval(text.value).split())
    return found


@contextlib.contextmanager
def _one_line_refusal(program: str) -> Iterator[None]:
    """Turn the framed message with which tyro exits into a ValueError of one line: tyro has no public way to get it."""
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            yield
    except SystemExit as stop:
        if not stop.code:
            raise
        lines = [line.strip("│╰╯") for line in re.sub(r"\x1b\[[0-9;]*m", "", message.getvalue()).splitlines()]
        # a title, what is wrong, a rule or an empty line, hints; help texts are set in by eight columns
        start = next(place for place, line in enumerate(lines[1:], 1) if line.strip(" ─-"))
        end = next((place for place, line in enumerate(lines) if place > start and not line.strip(" ─-╭╮")), None)
        said = [line.strip() for line in lines[start:end] if not line.startswith(" " * 8)]
        raise ValueError(f"{' '.join(said).rstrip('.')} (see {program} --help)") from None
