"""Warnings that point at the line of the caller, outside this room."""

import os
import sys
import warnings

HERE = os.path.dirname(__file__) + os.sep


def warn(message: str, category: type[Warning]) -> None:
    """Warns at the line that called the outermost function of this room."""
    level, depth = 1, 1
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(HERE):
            level = depth + 1
        frame, depth = frame.f_back, depth + 1
    warnings.warn(message, category, stacklevel=level + 1)
