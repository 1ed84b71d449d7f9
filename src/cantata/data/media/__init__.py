"""Images, videos and documents that others made, opened safely."""

from cantata.data.media.media import Media
from cantata.data.media.pdf import PdfOptions
from cantata.data.media.video import Sampling, VideoOptions

__all__ = ["Media", "PdfOptions", "Sampling", "VideoOptions"]
