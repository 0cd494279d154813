"""What a link reports to :func:`optax_avg.check_chain`.

During a check the context holds a list, and each link that has a fixed place in a chain
adds a :class:`Sight` to it. Extra arguments would not reach links inside wrappers that
do not pass them on, and line searches refuse those that they do not know.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple


class Sight(NamedTuple):
    """The updates that one link saw in one call of ``update``.

    Attributes:
      link: Name of the link, for messages.
      received: Updates that the link was given, where it must stand first; else None.
      emitted: Updates that the link returned, where it must stand last; else None.
      rewrites: Whether the link may change the updates in another call.
      perturbs: Whether the updates lead to perturbed parameters in some calls.
      is_average: Whether the link is an average, if it must not stand first.
    """

    link: str
    received: Any = None
    emitted: Any = None
    rewrites: bool = False
    perturbs: bool = False
    is_average: bool = True


_SIGHTS: ContextVar[list[Sight] | None] = ContextVar("sights", default=None)


@contextlib.contextmanager
def collected(sights: list[Sight] | None) -> Iterator[None]:
    """Within it, links add what they see to a list, or to none."""
    token = _SIGHTS.set(sights)
    try:
        yield
    finally:
        _SIGHTS.reset(token)


def report(link: str, **seen: Any) -> None:
    """Adds what a link sees, where somebody asks for it."""
    sights = _SIGHTS.get()
    if sights is not None:
        sights.append(Sight(link, **seen))
