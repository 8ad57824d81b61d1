"""Bytes of image, label and depth files -> arrays, refusing what would be read wrongly in silence.

OpenCV reduces 16-bit images to 8 bit, replaces palette indices by colours, and (before 5.0) fills
truncated JPEG files with grey, all without an error; every case is refused here by name.
"""

import io
from typing import Literal

import cv2
import numpy as np
from jaxtyping import UInt8, UInt16
from PIL import Image, UnidentifiedImageError

from segmill.data.files import DataError

LabelFormat = Literal["index", "palette"]
_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
_GREY, _PALETTE = 0, 3  # colour types of a PNG header
_DEEP = ("I", "F", "I;16", "I;16B", "I;16L")  # Pillow's modes of more than 8 bits a channel
_RGB = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_ANYDEPTH


def decode_image(data: bytes, where: str) -> UInt8[np.ndarray, "H W 3"]:
    """An RGB image; grey becomes RGB, transparency is dropped, the camera's rotation is applied."""
    _refuse_truncated_jpeg(data, where)
    image = _decode(data, _RGB, where)
    if image.dtype != np.uint8:
        raise DataError(
            f"The image {where} is {image.dtype}; images have 8 bits a channel here. "
            "Convert it (for example with Pillow or ImageMagick) to 8 bit."
        )
    return image


def decode_photograph(data: bytes, where: str) -> UInt8[np.ndarray, "H W 3"]:
    """An RGB image as the loaders of torchvision and timm decode it: what classifiers learn from.

    That is Pillow's `convert("RGB")`: grey and CMYK files (ImageNet has some of both) become RGB by
    its rule, transparency is dropped, and the camera's rotation is not applied.
    """
    try:
        with Image.open(io.BytesIO(data)) as picture:
            if picture.mode in _DEEP:
                raise DataError(
                    f"The image {where} has the mode {picture.mode}; images have 8 bits a channel "
                    "here. Convert it (for example with Pillow or ImageMagick) to 8 bit."
                )
            return np.array(picture.convert("RGB"))
    except UnidentifiedImageError as error:  # its text is the address of the bytes
        raise _undecodable(data, where, "no known format") from error
    # SyntaxError and ValueError: how Pillow reports a broken PNG
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _undecodable(data, where, error) from error


def _undecodable(data: bytes, where: str, reason: object) -> DataError:
    return DataError(
        f"{where} ({len(data)} bytes) cannot be decoded: it is truncated, damaged or not an image "
        f"({reason}). Copy it again from the source."
    )


def decode_label(data: bytes, where: str, label_format: LabelFormat) -> UInt8[np.ndarray, "H W"]:
    """The indices as they stand in the file, before `label_map`."""
    if label_format == "palette":
        return _decode_palette(data, where)
    if is_palette(data):
        raise DataError(
            f"The label {where} is a palette PNG, whose indices would be read as colours. "
            "If its indices are the classes, set data.label_format=palette."
        )
    label = _decode(data, cv2.IMREAD_UNCHANGED, where)
    if label.ndim != 2:
        raise DataError(
            f"The label {where} has {label.shape[2]} channels; a label has one channel whose value "
            "is the class. Colour-coded labels must be converted to class indices first."
        )
    # A grey PNG of 1, 2 or 4 bits would be stretched to 0..255.
    if label.dtype != np.uint8 or _png_header(data)[0] not in (None, 8):
        bits = _png_header(data)[0] or 8 * label.itemsize
        raise DataError(
            f"The label {where} is {bits}-bit, highest value {int(label.max())}; labels are 8-bit "
            "single-channel. Save it again as 8-bit grey (instance-id files are not class labels)."
        )
    return label


def decode_depth(data: bytes, where: str) -> UInt8[np.ndarray, "H W"] | UInt16[np.ndarray, "H W"]:
    """Depth in the file's own unit, 8 or 16 bit; 0 = not measured."""
    depth = _decode(data, cv2.IMREAD_UNCHANGED, where)
    if depth.ndim != 2 or depth.dtype not in (np.uint8, np.uint16):
        raise DataError(
            f"The depth {where} is {depth.dtype} of shape {depth.shape}; depth is one channel of "
            "8 or 16 bits. Save it again as a single-channel 16-bit PNG (for example in mm)."
        )
    return depth


def is_palette(data: bytes) -> bool:
    """Whether a file is a palette PNG."""
    return _png_header(data)[1] == _PALETTE


def _decode(data: bytes, flags: int, where: str) -> np.ndarray:
    array = cv2.imdecode(np.frombuffer(data, np.uint8), flags) if data else None
    if array is None:
        raise DataError(
            f"{where} ({len(data)} bytes) cannot be decoded: it is truncated, damaged or not an "
            "image. Copy it again from the source, or take its name out of the split's list."
        )
    return array


def _decode_palette(data: bytes, where: str) -> UInt8[np.ndarray, "H W"]:
    if _png_header(data)[1] in (None, _PALETTE):
        try:
            with Image.open(io.BytesIO(data)) as picture:
                if picture.mode == "P":
                    return np.asarray(picture)
        except (OSError, SyntaxError) as error:  # SyntaxError: how Pillow reports a broken PNG
            raise DataError(
                f"{where} ({len(data)} bytes) cannot be decoded ({error}). Copy it again."
            ) from error
    raise DataError(
        f"The label {where} has no palette, but data.label_format=palette. "
        "If its grey values are the classes, set data.label_format=index."
    )


def _refuse_truncated_jpeg(data: bytes, where: str) -> None:
    """A whole JPEG ends with its end marker; for one with a trailer the strict decoder decides."""
    if not data.startswith(_JPEG) or data.endswith(b"\xff\xd9"):
        return
    try:
        with Image.open(io.BytesIO(data)) as picture:
            picture.load()
    except OSError as error:
        raise DataError(
            f"The JPEG {where} ({len(data)} bytes) is truncated ({error}). "
            "Copy it again from the source, or take its name out of the split's list."
        ) from error


def _png_header(data: bytes) -> tuple[int | None, int | None]:
    """(bits a channel, colour type) of a PNG, else (None, None)."""
    is_png = data.startswith(_PNG) and len(data) > 25
    return (data[24], data[25]) if is_png else (None, None)
