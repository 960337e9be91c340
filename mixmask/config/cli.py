"""What the entry scripts share: the end of a program, in one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from mixmask.config.errors import UserError


def main_guard(main: Callable[[], Any]) -> None:
    """Run a script's main; a UserError becomes one line on stderr and exit status 1, Ctrl-C status 130.

    So does the end of a process that decodes images, which PyTorch reports wherever the program happens to be.
    """
    try:
        main()
    except UserError as error:
        _complain(f"error: {error}\n")
        sys.exit(1)
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        reason = "out of memory, or of space in /dev/shm (fewer: --set run.workers=2)?"
        _complain(f"error: {str(error).split('. ')[0]}: {reason} The last checkpoint is intact\n")
        sys.exit(1)
    except KeyboardInterrupt:
        _complain("\ninterrupted: all up to the last checkpoint is kept; the same command continues\n")
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(text: str) -> None:
    """To stderr in one write: the lines of several processes do not run together."""
    sys.stderr.write(text)
    sys.stderr.flush()
