"""The command ``optax-avg``: averages and merges of checkpoints larger than memory.

Exit codes: 0 done, 1 not done (the reason is printed), 2 wrong usage, 130 and 143
stopped by a signal.
"""

import logging
import signal
import sys
import warnings

import typer

from optax_avg.cli import _averages, _output
from optax_avg.cli._merge import merge

app = typer.Typer(
    help="Averages and merges of checkpoints, a few leaves in memory at a time.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(merge, name="merge")
app.command()(_averages.reconstruct)
app.command()(_averages.inspect)


def main() -> None:
    """Runs the command; what goes wrong is one line, and nothing is half written."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {n: signal.signal(n, _output.note) for n in numbers}
    _output.signals.clear()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            warnings.showwarning = _warn
            app()
    except _output.Stopped:
        _output.say("stopped; nothing was written.")
        sys.exit(128 + _output.signals[0])
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        _output.say(f"error: {error}")
        sys.exit(1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _warn(message: object, *place: object, **more: object) -> None:
    del place, more
    _output.say(f"warning: {message}")
