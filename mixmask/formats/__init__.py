"""A backbone from any code's checkpoint, strictly; docs/checkpoints.md lists the formats and the messages."""

from mixmask.formats.detectron2_files import Detectron2File, detectron2_name, read_detectron2
from mixmask.formats.notes import read_note, read_sidecar, sidecar
from mixmask.formats.reading import frozen_encoder, load_backbone, read, read_for
from mixmask.formats.source import IMAGENET, FormatError, Reading, Source, reading, reading_options

__all__ = [
    "IMAGENET",
    "Detectron2File",
    "FormatError",
    "Reading",
    "Source",
    "detectron2_name",
    "frozen_encoder",
    "load_backbone",
    "read",
    "read_detectron2",
    "read_for",
    "read_note",
    "read_sidecar",
    "reading",
    "reading_options",
    "sidecar",
]
