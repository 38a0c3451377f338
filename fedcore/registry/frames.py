"""zstandard frames whose window and output are bounded before anything is read."""

from __future__ import annotations

import io

import zstandard

__all__ = ["compress", "decompress"]

_LEVEL = 19
_SMALLEST_WINDOW, _LARGEST_WINDOW = 10, 31  # zstandard's own bounds, as powers of two


def compress(data: bytes, base: bytes = b"") -> bytes:
    """A frame of ``data``; where there is a ``base`` it refers to it, as ``zstd --patch-from`` does."""
    window = min(max((len(data) + len(base)).bit_length(), _SMALLEST_WINDOW), _LARGEST_WINDOW)
    parameters = zstandard.ZstdCompressionParameters.from_level(
        _LEVEL, source_size=len(data), window_log=window, enable_ldm=bool(base), write_content_size=False, write_checksum=False
    )
    dictionary = zstandard.ZstdCompressionDict(base, dict_type=zstandard.DICT_TYPE_RAWCONTENT) if base else None
    return zstandard.ZstdCompressor(dict_data=dictionary, compression_params=parameters).compress(data)


def decompress(frame: bytes, limit: int, base: bytes = b"") -> bytes:
    """Inverse of `compress`, never more than ``limit`` bytes.

    Raises:
        ValueError: the frame holds more, or something follows it.
        zstandard.ZstdError: it is none, or needs a window larger than ``limit`` and ``base`` explain.
    """
    window = max(limit + len(base), 1 << _SMALLEST_WINDOW)
    dictionary = zstandard.ZstdCompressionDict(base, dict_type=zstandard.DICT_TYPE_RAWCONTENT) if base else None
    # One that is told the output's size, as `decompress` is by the frame, would believe it and allocate that much.
    reader = zstandard.ZstdDecompressor(dict_data=dictionary, max_window_size=1 << window.bit_length()).stream_reader(
        io.BytesIO(frame), read_across_frames=False
    )
    found = reader.read(limit)
    if reader.read(1):
        raise ValueError(f"more than {limit} bytes")
    return found
