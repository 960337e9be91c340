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


def is_safetensors(path: Path, head: bytes) -> bool:
    """Whether a file is of this format, whatever its name: it begins with the length of a header and a brace.

    Anything called .safetensors is, too, unless it is one of PyTorch's.
    """
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= path.stat().st_size - 8:
        return True
    return path.suffix == ".safetensors" and not head.startswith((b"PK", b"\x80"))
