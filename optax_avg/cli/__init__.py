"""The command ``optax-avg``: averages and merges of checkpoints larger than memory.

Exit codes: 0 done, 1 not done (the reason is printed), 2 wrong usage, 129, 130 and 143
stopped by a signal (hang-up, interrupt, termination).
"""

import logging
import os
import sys
import warnings

try:
    import typer

    from optax_avg.cli import _averages, _output, _signals
    from optax_avg.cli._merge import merge
except ImportError as error:
    needed = 'optax-avg needs typer and rich; write pip install "optax_avg[cli]".'
    if os.path.basename(sys.argv[0]).startswith("optax-avg"):  # nobody catches it
        sys.exit(f"error: {needed}")
    raise ImportError(needed) from error

__all__ = ["app", "main"]

app = typer.Typer(
    help="Average and merge checkpoints with a few leaves in memory at a time.",
    epilog="Exit codes: 0 done; 1 not done, for the reason that is printed; 2 wrong "
    "usage; 129, 130 and 143 stopped by a signal, with nothing written. A run that is "
    "killed may leave a directory beside --out whose name ends with .partial. The "
    "next run names it in a warning.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(merge, name="merge")
app.command(epilog=_output.example("reconstruct snapshots --sigma-rel 0.08 --out ema"))(
    _averages.reconstruct
)
app.command(epilog=_output.example("inspect ema"))(_averages.inspect)


# Errors that users and disks cause. Others are faults of this library and keep their
# traceback.
REASONS = (ValueError, OSError, ImportError, RuntimeError, ArithmeticError)


def main() -> None:
    """Runs the command; an error prints one line, and leaves no half-written result."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    with _signals.watched():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("default")
                warnings.showwarning = _warn
                app()
        except _signals.Stopped:
            _output.say("stopped; nothing was written.")
            sys.exit(128 + _signals.signals[0])
        except (*REASONS, MemoryError) as error:
            _output.say(f"error: {str(error) or type(error).__name__}")
            sys.exit(1)


def _warn(message: object, *place: object, **more: object) -> None:
    del place, more
    _output.say(f"warning: {message}")
