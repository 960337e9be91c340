"""Files of safetensors: names and tensors, with nothing that could run."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mixmask.formats.source import FormatError, one_line


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """Names -> tensors on the CPU; the header is checked before any tensor is read.

    Raises FormatError unless the tensors follow one another and fill the file exactly.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise FormatError(f"{path} is cut off or damaged, or no safetensors file ({one_line(error)})") from None
