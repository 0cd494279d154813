"""Options that several factories share, stated and documented in one place.

A factory states what is its own and takes the rest as ``**options: Unpack[...]``, which
type checkers read. :func:`with_options` gives it the signature that other tools read,
and completes the sections Args and Raises of its docstring.
"""

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

SECTIONS = ("Args", "Returns", "Raises", "Example", "References")


class Option(NamedTuple):
    """One option.

    Attributes:
      default: Its value in factories that do not say another.
      doc: Its description, for the section Args.
    """

    default: Any
    doc: str


def with_options(
    kinds: type, options: Mapping[str, Option], *, raises: str = "", **defaults: Any
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Completes the signature and the docstring of a factory by options.

    Args:
      kinds: A ``TypedDict`` with the names and types of the options that the factory
        takes as ``**options``.
      options: Default and description of every option, in the order of the signature.
      raises: Errors that all factories with these options raise, for the section
        Raises.
      **defaults: Defaults of this factory where they are not those of all.

    Returns:
      A decorator. The factory gets every option, its default filled in.
    """

    def decorate(factory: Callable[P, T]) -> Callable[P, T]:
        before = inspect.signature(factory)
        own = [p for p in before.parameters.values() if p.kind is not p.VAR_KEYWORD]
        types = inspect.get_annotations(kinds)
        shared = {key: option for key, option in options.items() if key in types}
        taken = {key: defaults.get(key, shared[key].default) for key in shared}
        keyword = inspect.Parameter.KEYWORD_ONLY
        added = [
            inspect.Parameter(key, keyword, default=value, annotation=types[key])
            for key, value in taken.items()
        ]
        signature = before.replace(parameters=[*own, *added])

        @functools.wraps(factory)
        def make(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{factory.__name__}() {error}") from None
            return factory(*bound.args, **{**taken, **bound.kwargs})

        named_make: Any = make
        named_make.__signature__ = signature
        named_make.__doc__ = _completed(factory.__doc__ or "", shared, raises)
        return make

    return decorate


def _completed(doc: str, shared: Mapping[str, Option], raises: str) -> str:
    """The docstring with the options in Args and the errors in Raises."""
    doc = re.sub(r"\n +\*\*options: [^\n]*", "", doc)
    headings = "|".join(SECTIONS)
    head, *rest = re.split(rf"(?m)^({headings}):\n", inspect.cleandoc(doc))
    bodies = dict(zip(rest[::2], rest[1::2], strict=True))
    entries = {key: f"{key}: {option.doc}" for key, option in shared.items()}
    bodies["Args"] = _appended(bodies.get("Args", ""), [*entries.values()])
    bodies["Raises"] = _appended(bodies.get("Raises", ""), [raises] if raises else [])
    parts = [f"{name}:\n{bodies[name].rstrip()}" for name in SECTIONS if name in bodies]
    return "\n\n".join([head.rstrip(), *(part for part in parts if part[-1] != ":")])


def _appended(body: str, entries: list[str]) -> str:
    lines = [f"  {entry}".replace("\n  ", "\n    ") for entry in entries]
    return "\n".join([body.rstrip(), *lines] if body.strip() else lines)
