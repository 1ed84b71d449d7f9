"""From a raw record to an example: how people write down conversations, captions and text."""

from cantata.data.formats.base import Media
from cantata.data.formats.detect import FORMATS, Format, choose_format

__all__ = ["FORMATS", "Format", "Media", "choose_format"]
