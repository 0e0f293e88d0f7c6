"""ImageDecoder, by Pillow: only the formats that ONNX names, since Pillow starts programs for others (EPS)."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from onnxmesh.runtime.errors import RunError
from onnxmesh.runtime.kernels.registry import Array, Call, loose

FORMATS = ("BMP", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Pillow's names for those of ONNX's specification."""

MODES = {"RGB": "RGB", "BGR": "RGB", "Grayscale": "L"}


@loose("ImageDecoder")
def image_decoder(call: Call, encoded: Array) -> Array:
    """The image in a file's bytes uint8[n], as uint8[height, width, channels] in the order of `pixel_format`.

    Raises:
        RunError: Pillow is not installed.
        ValueError: the bytes are of none of the formats.
    """
    image = _opened(encoded.tobytes()).convert(MODES[call.attrs.get("pixel_format", "RGB")])
    pixels = np.array(image).reshape(image.height, image.width, -1)
    return call.xp.asarray(pixels[:, :, ::-1] if call.attrs.get("pixel_format") == "BGR" else pixels)


def _opened(data: bytes) -> Any:
    try:
        import PIL.Image
    except ImportError as error:
        raise RunError("ImageDecoder needs the package Pillow", hint="pip install pillow", code="OM5301") from error
    try:
        return PIL.Image.open(io.BytesIO(data), formats=FORMATS)
    except PIL.UnidentifiedImageError as error:
        raise ValueError(f"{len(data)} bytes are no image of the formats {', '.join(FORMATS)}") from error
