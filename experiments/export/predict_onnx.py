"""What an exported model predicts for images, without PyTorch: ``python predict.py photo.jpg …``.

This file stands on its own: ``python -m experiments export`` puts a copy of it next to the model. It needs
``numpy``, ``pillow`` and what runs the graph, ``onnxruntime`` (``.onnx``) or ``openvino`` (``.xml``), and for texts
(``--text``, dual encoders) ``tokenizers``; not PyTorch, and nothing of Vitrail. Images are brought to the network's
size as in training and testing; normalisation is part of the model. With ``simplejpeg``, damage within JPEG files is
noticed, too; Pillow notices truncated ones only.
"""

from __future__ import annotations

import argparse
import csv
import glob
import hashlib
import json
import math
import os
import re
import signal
import struct
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:

    def _interrupted(*_: object) -> None:
        os.write(2, b"interrupted\n")
        os._exit(130)

    # Ctrl-C is one line, also while the libraries below are loaded.
    signal.signal(signal.SIGINT, _interrupted)

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

KEY, FORMER_KEY, VERSION = "vitrail", "vitrine", 1
SUMMARY = "export.json"
DETECTOR = "ood.safetensors"
"""What detectors of unknown images compare features with."""

MAX_DETECTOR = 2**30
"""Bytes of it."""

MAX_PIXELS = 89_478_485
"""Larger images are refused before they are decoded: a small file can hold one that fills the memory."""

MAX_BYTES = 2**30
"""Larger files are refused: uncompressed, ``MAX_PIXELS`` with four channels of 16 bits fit."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
"""Decoders that are ever tried, whatever a file is called; some of Pillow's others start other programs."""

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".avif", ".jp2")
"""Of the images in a folder."""

NO_PREDICTION = "(no prediction)"
DEFAULT_THRESHOLD = 0.5
LABEL_SEPARATOR = ";"
"""Between several labels in a row of a file."""
TIE_TOLERANCE = 1e-6
"""Logits that are nearer to each other than this are the same, as in training and testing."""

_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_FULL = (0.0, 65535.0)
_HARMLESS_BYTES = 15
_INTERLACED = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""Adam7: first column and row, and steps across and down, of each pass of an interlaced PNG."""

_MOST_ENLARGED = 1 << 24
_BORDER = (128, 128, 128)
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class PredictError(ValueError):
    """A mistake that the user can mend, in one line."""


Graph = Callable[[Mapping[str, NDArray[Any]]], dict[str, NDArray[np.float32]]]
"""From inputs by name, of which it takes those that it knows, to outputs by name."""


def onnx_graph(path: Path, threads: int) -> tuple[str, Graph]:
    """A graph that ONNX Runtime runs, and the metadata in its file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    known = {one.name for one in session.get_inputs()}
    names = [output.name for output in session.get_outputs()]

    def run(inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
        taken = {name: values for name, values in inputs.items() if name in known}
        return dict(zip(names, session.run(names, taken), strict=True))

    strings = session.get_modelmeta().custom_metadata_map
    return strings.get(KEY) or strings.get(FORMER_KEY, "{}"), run


def openvino_graph(path: Path, threads: int) -> tuple[str, Graph]:
    """A graph that OpenVINO runs on the CPU, and the metadata in its file."""
    import openvino

    model = openvino.Core().read_model(path)
    # In float32 also where a processor could take bfloat16, which is what was compared with the model.
    options = {"INFERENCE_PRECISION_HINT": "f32", **({"INFERENCE_NUM_THREADS": threads} if threads else {})}
    compiled = openvino.compile_model(model, "CPU", options)
    known = {port.get_any_name() for port in compiled.inputs}
    names = [port.get_any_name() for port in compiled.outputs]

    def run(inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
        found = compiled({name: values for name, values in inputs.items() if name in known})
        return {name: np.array(found[place]) for place, name in enumerate(names)}

    return model.get_rt_info(KEY).astype(str) if model.has_rt_info(KEY) else "{}", run


GRAPHS = {".onnx": onnx_graph, ".xml": openvino_graph}


class Model:
    """An exported model.

    Args:
        folder: that the export wrote.
        threads: of the CPU; 0 for all cores.
        max_pixels: larger images are refused before they are decoded.

    Attributes:
        metadata: classes, preprocessing, temperatures and origin, as the file keeps them.

    Raises:
        PredictError: if there is no model in the folder, or not one of an export.
    """

    def __init__(self, folder: str | Path, threads: int = 0, max_pixels: int = MAX_PIXELS) -> None:
        self._max_pixels = max_pixels
        if max_pixels > MAX_PIXELS and Image.MAX_IMAGE_PIXELS is not None:
            Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)  # Pillow refuses twice as much by itself
        self.folder = Path(folder)
        names = [f"{tower}{kind}" for kind in GRAPHS for tower in ("model", "image")]
        names = [name for name in names if (self.folder / name).is_file()]
        if not names:
            raise PredictError(
                f"{folder}: has no model.onnx and no image.onnx (or .xml); give a folder that `export` wrote as "
                "onnx or openvino"
            )
        self._threads, self._kind = threads, Path(names[0]).suffix
        self._fitted: Mapping[str, Any] | None = None
        metadata, self._images = self._graph(names[0])
        self.metadata: dict[str, Any] = json.loads(metadata)
        if self.metadata.get("version") != VERSION:
            raise PredictError(f"{self.folder / names[0]}: was not exported by this version of Vitrail; export again")

    def __call__(self, images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        """Logits and embeddings of images.

        Args:
            images: uint8 ``(B, 3, S, S)``, RGB.

        Returns:
            ``logits_<task>`` ``(B, C)`` of each task, ``image_embedding`` ``(B, D)`` of unit length, and where unknown
            images are recognised by them ``image_features`` ``(B, F)``.
        """
        return self._images({"image": images})

    def read(self, path: str | Path) -> NDArray[np.uint8]:
        """An image as the network takes it.

        Returns:
            uint8 ``(3, S, S)``, RGB.

        Raises:
            PredictError: if it cannot be read.
        """
        try:
            with Path(path).open("rb") as file:
                return self.decoded(file)
        # Decoders of broken files raise whatever they stumble over.
        except Exception as error:
            reason = "no such file" if isinstance(error, FileNotFoundError) else " ".join(str(error).split())
            raise PredictError(f"{path}: cannot be read ({reason}); give an image file") from error

    def decoded(self, file: IO[bytes]) -> NDArray[np.uint8]:
        """As ``read``, of an open file, with whatever exceptions the decoders raise."""
        with _opened(file) as image:
            _refuse_too_large(image, file, self._max_pixels)
            if image.format == "PNG":
                _check_png(file)
            if image.format in ("JPEG", "MPO"):
                _check_jpeg(file, image.mode)
            options = self.metadata["image"]
            rgb = _upright(image, options.get("value_range", "auto"))
            if image.format == "PNG":
                _check_png_rows(image, file)
            return prepared(rgb, options)

    def probabilities(self, outputs: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float64]]:
        """Probabilities of the classes of each task, with the temperatures that calibration found.

        Returns:
            For each task but regression ``(B, C)``; rows sum to 1, except of multi-label tasks.
        """
        found = {}
        for task in self.metadata["tasks"]:
            logits = outputs[f"logits_{task}"].astype(np.float64)
            if self.kind(task) == "multi_label":
                found[task] = _sigmoid(self._calibrated(task, logits).astype(np.float32).astype(np.float64))
            elif self.kind(task) != "regression":
                found[task] = _softmax(logits / self.metadata["temperatures"].get(task, 1.0))
        return found

    def values(
        self, outputs: Mapping[str, NDArray[np.float32]]
    ) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64] | None]]:
        """Predicted numbers ``(B,)`` of each regression task, and their standard deviations where there are some."""
        found = {}
        for task in self.metadata["tasks"]:
            if self.kind(task) == "regression":
                numbers = outputs[f"logits_{task}"].astype(np.float64)
                spread = np.exp(numbers[:, 1] / 2) if numbers.shape[1] > 1 else None
                calibration = self.metadata.get("calibration", {})
                scale, constant = (calibration.get(name, {}).get(task) for name in ("scales", "deviations"))
                if spread is not None and scale is not None:
                    spread = spread * scale
                elif constant is not None:
                    spread = np.full(len(numbers), float(constant))
                found[task] = numbers[:, 0], spread
        return found

    def kind(self, task: str) -> str:
        """Kind of a task: ``single_label``, ``multi_label``, ``ordinal`` or ``regression``."""
        return str(self.metadata.get("kinds", {}).get(task, "single_label"))

    def thresholds(self, task: str) -> NDArray[np.float64]:
        """Probabilities from which the labels of a multi-label task are predicted, ``(C,)``."""
        given = self.metadata.get("thresholds", {}).get(task)
        count = len(self.metadata["tasks"][task])
        own = np.full(count, DEFAULT_THRESHOLD) if given is None else np.array(given, dtype=np.float64)
        if task not in self.metadata.get("calibration", {}).get("labels", {}):
            return own
        with np.errstate(divide="ignore"):  # thresholds of 0 and 1 stay what they are
            return _sigmoid(self._calibrated(task, np.log(own) - np.log1p(-own)))

    def _calibrated(self, task: str, logits: NDArray[np.float64]) -> NDArray[np.float64]:
        """Logits of a multi-label task by the temperature and the biases that calibration found."""
        temperature, *biases = self.metadata.get("calibration", {}).get("labels", {}).get(task, [1.0, 0.0])
        moved: NDArray[np.float64] = logits / temperature + np.array(biases)
        return moved

    def decisions(self, outputs: Mapping[str, NDArray[np.float32]]) -> dict[str, list[str]]:
        """What is predicted at the operating points of tasks that have one, empty for nothing.

        Returns:
            For each such task B classes, or labels with ``LABEL_SEPARATOR`` between them.
        """
        found = {}
        points, shares = self.metadata.get("operating_points", {}), self.probabilities(outputs)
        for task in [task for task in self.metadata["tasks"] if task in points]:
            logits = outputs[f"logits_{task}"]
            found[task] = [
                self._decision(task, points[task]["thresholds"], row, is_tied=_is_tied(own))
                for row, own in zip(shares[task], logits, strict=True)
            ]
        return found

    def _decision(
        self, task: str, thresholds: Mapping[str, float], shares: NDArray[np.float64], *, is_tied: bool
    ) -> str:
        """The decision for one image with the probabilities ``(C,)``."""
        names = [str(name) for name in self.metadata["tasks"][task]]
        ranked = [(names[place], float(shares[place])) for place in np.argsort(-shares, kind="stable")]
        if self.kind(task) == "multi_label":
            own = {name: thresholds.get(name, at) for name, at in zip(names, self.thresholds(task), strict=True)}
            return LABEL_SEPARATOR.join(name for name, share in ranked if share >= own[name])
        [(positive, threshold)] = thresholds.items()
        best, highest = ranked[0]
        if not positive:
            return best if highest >= threshold and not is_tied else ""
        if dict(ranked)[positive] >= threshold:
            return positive
        return next((name for name, _ in ranked if name != positive), "")

    def unknown(self, outputs: Mapping[str, NDArray[np.float32]]) -> NDArray[np.bool_] | None:
        """Which images are unlike the training images, bool ``(B,)``; None where the export has no detector.

        Raises:
            PredictError: if what its detector was fitted to is missing or damaged.
        """
        detector = self.metadata.get("ood")
        if not detector:
            return None
        if self._fitted is None:
            self._fitted = self._read_fitted() if detector.get("file") else detector["arrays"]
        logits, features = outputs[f"logits_{detector['task']}"], outputs.get("image_features")
        scores = familiarity(detector["method"], logits, features, self._fitted, detector["kind"])
        below: NDArray[np.bool_] = scores < detector["threshold"]
        return below

    def _read_fitted(self) -> dict[str, NDArray[np.float32]]:
        self._refuse_changed(DETECTOR)
        try:
            return read_arrays(self.folder / DETECTOR)
        except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
            raise PredictError(f"{self.folder / DETECTOR}: cannot be read ({error}); export again") from error

    def encode_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embeddings of texts.

        Returns:
            ``(B, D)``, of unit length.

        Raises:
            PredictError: if the model reads no texts, or ``tokenizers`` is not installed.
        """
        if not (self.folder / f"text{self._kind}").is_file():
            raise PredictError(f"--text: {self.folder} reads no texts; export a dual encoder")
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise PredictError("--text: needs tokenizers; install it with `pip install tokenizers`") from error
        rules = self.metadata["text"]
        tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        tokenizer.enable_truncation(rules["max_length"])
        length = rules["max_length"] if rules["fixed_length"] else None
        tokenizer.enable_padding(pad_id=rules["pad_id"], pad_token=rules["pad_token"], length=length)
        encoded = tokenizer.encode_batch(list(texts))
        _, texts_tower = self._graph(f"text{self._kind}")
        tokens = {
            "input_ids": np.array([text.ids for text in encoded], dtype=np.int64),
            "attention_mask": np.array([text.attention_mask for text in encoded], dtype=np.int64),
        }
        return texts_tower(tokens)["text_embedding"]

    def _graph(self, name: str) -> tuple[str, Graph]:
        self._refuse_changed(name)
        if self._kind == ".xml":
            self._refuse_changed(Path(name).with_suffix(".bin").name)
        try:
            return GRAPHS[self._kind](self.folder / name, self._threads)
        except ImportError as error:
            raise PredictError(
                f"{self.folder / name}: needs {error.name}; install it with `pip install {error.name}`"
            ) from error
        # Each kind of damage has an exception of its own.
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise PredictError(f"{self.folder / name}: cannot be loaded ({reason}); export again") from error

    def _refuse_changed(self, name: str) -> None:
        """Compare a file with the digest that the export recorded, where its summary is there and has one."""
        try:
            recorded = json.loads((self.folder / SUMMARY).read_text(encoding="utf-8"))["sha256"][name]
        except FileNotFoundError:
            return
        except KeyError:  # exported by an older version
            return
        except (OSError, ValueError, TypeError) as error:
            raise PredictError(f"{self.folder / SUMMARY}: cannot be read ({error}); export again") from error
        if not (self.folder / name).is_file() or sha256(self.folder / name) != recorded:
            raise PredictError(
                f"{self.folder / name}: is not the file that was exported (its SHA-256 differs from {SUMMARY}), so its "
                "weights may be missing or changed; export again"
            )


def familiarity(
    method: str,
    logits: NDArray[np.float32],
    features: NDArray[np.float32] | None,
    arrays: Mapping[str, Any],
    kind: str = "single_label",
) -> NDArray[np.float64]:
    """Scores that are higher for images like the training images, as ``vitrail ood`` has them.

    Args:
        method: as ``vitrail.ood`` lists them.
        logits: ``(B, C)``, of the detector's task.
        features: ``(B, F)``, of the image backbone, for ``mahalanobis``, ``knn`` and ``vim``.
        arrays: what was fitted.
        kind: of the task.

    Returns:
        ``(B,)``.
    """
    outputs, several = logits.astype(np.float64), kind == "multi_label"
    inside = np.zeros((len(logits), 0)) if features is None else features.astype(np.float64)
    match method:
        case "msp":
            scores = (_sigmoid(outputs) if several else _softmax(outputs)).max(axis=1)
        case "max_logit":
            scores = outputs.max(axis=1)
        case "mcm":
            scores = _softmax(outputs / float(arrays["scale"])).max(axis=1)
        case "energy":
            scores = np.logaddexp(0, outputs).sum(axis=1) if several else np.logaddexp.reduce(outputs, axis=1)
        case "mahalanobis":
            placed, means = inside @ arrays["whitening"], arrays["means"].astype(np.float64)
            apart = np.square(placed).sum(axis=1, keepdims=True) - 2 * placed @ means.T + np.square(means).sum(axis=1)
            scores = -apart.min(axis=1)
        case "knn":
            place = int(arrays["neighbours"])
            unit = inside / np.maximum(np.linalg.norm(inside, axis=1, keepdims=True), 1e-12)
            # In float32: the training images may be many.
            scores = np.partition(unit.astype(np.float32) @ arrays["bank"].T, -place, axis=1)[:, -place]
        case "vim":
            outside = np.linalg.norm((inside - arrays["origin"]) @ arrays["outside"], axis=1)
            scores = np.logaddexp.reduce(outputs, axis=1) - float(arrays["scale"]) * outside
        case _:
            raise PredictError(f"{SUMMARY}: unknown images by {method!r} are not known here; export again")
    return np.asarray(scores, dtype=np.float64)


def read_arrays(path: Path) -> dict[str, NDArray[np.float32]]:
    """The float32 arrays of a safetensors file.

    Raises:
        ValueError: it is larger than ``MAX_DETECTOR``, or has something else.
    """
    if (size := path.stat().st_size) > MAX_DETECTOR:
        raise ValueError(f"{size} bytes; at most {MAX_DETECTOR} are read")
    content = path.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    header, data = json.loads(content[8 : 8 + length]), memoryview(content)[8 + length :]
    header.pop("__metadata__", None)
    found = {}
    for name, one in header.items():
        if one["dtype"] != "F32":
            raise ValueError(f"{name} is {one['dtype']}, not F32")
        start, end = one["data_offsets"]
        found[name] = np.frombuffer(data[start:end], "<f4").reshape(one["shape"])
    return found


def sha256(path: Path) -> str:
    """Digest of a file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def prepared(image: Image.Image, options: Mapping[str, Any]) -> NDArray[np.uint8]:
    """The image at the network's size: scaled, its centre cropped or padded.

    Args:
        image: RGB.
        options: size, resize, crop_fraction, interpolation and crop_rounding.

    Returns:
        uint8 ``(3, size, size)``.
    """
    size = int(options["size"])
    side = math.floor(size / float(options["crop_fraction"]) + 1e-6)
    width, height = image.size
    resize, even = options.get("resize", "crop"), options.get("crop_rounding", "even") == "even"
    if resize == "squash":
        scale = (side, side)
    elif resize == "pad":
        ratio = max(width, height) / side
        scale = (max(1, round(width / ratio)), max(1, round(height / ratio)))
    else:
        scale = (side, int(side * height / width)) if width <= height else (int(side * width / height), side)
    left, top = (round((length - size) / 2) if even else (length - size) // 2 for length in scale)
    if scale[0] * scale[1] > max(_MOST_ENLARGED, 16 * side**2):
        # Only the visible part of a strip: all of it would fill the memory.
        x, y = width / scale[0], height / scale[1]
        box = (left * x, top * y, (left + size) * x, (top + size) * y)
        image = image.resize((size, size), _FILTERS[options["interpolation"]], box)
    else:
        if scale != image.size:
            image = image.resize(scale, _FILTERS[options["interpolation"]])
        image = _centered(image, size, left, top)
    pixels = np.asarray(image)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _centered(image: Image.Image, size: int, left: int, top: int) -> Image.Image:
    """Its center; what is smaller gets borders."""
    width, height = image.size
    if min(width, height) < size:
        whole = Image.new("RGB", (max(size, width), max(size, height)), _BORDER)
        whole.paste(image, (max(0, size - width) // 2, max(0, size - height) // 2))
        image, left, top = whole, max(0, left), max(0, top)
    return image.crop((left, top, left + size, top + size))


def _opened(file: IO[bytes]) -> Image.Image:
    """An image whose header was read; HEIC where pillow-heif is installed."""
    try:
        return Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        file.seek(4)
        kind = file.read(8)
        if kind[:4] != b"ftyp" or kind[4:] not in _HEIF_BRANDS:
            raise ValueError("not an image in a known format") from None
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        raise ValueError("HEIC needs pillow-heif; install it with `pip install pillow-heif`") from None
    register_heif_opener(thumbnails=False)
    file.seek(0)
    return Image.open(file, formats=("HEIF",))


def _refuse_too_large(image: Image.Image, file: IO[bytes], max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        raise ValueError(f"more than {max_pixels} pixels, the limit; raise it with --max-pixels")
    tags = getattr(image, "tag_v2", {})
    width, height = tags.get(322, 1), tags.get(323, 1)
    if isinstance(width, int) and isinstance(height, int) and width * height > 4 * max_pixels:
        raise ValueError(f"tiles of {width} × {height} pixels")
    place = file.seek(0, os.SEEK_CUR)
    size = file.seek(0, os.SEEK_END)
    file.seek(place)
    if size > max(MAX_BYTES, 8 * max_pixels):
        raise ValueError(f"more than {MAX_BYTES} bytes")


def _check_jpeg(file: IO[bytes], mode: str) -> None:
    """Refuse a JPEG of which libjpeg warns, as training does, where simplejpeg is installed; Pillow hides it."""
    try:
        import simplejpeg
    except ImportError:
        return
    place = file.seek(0, os.SEEK_CUR)
    file.seek(0)
    try:
        simplejpeg.decode_jpeg(file.read(), "CMYK" if mode == "CMYK" else "RGB")
    except ValueError as error:
        stray = re.search(r"(\d+) extraneous bytes", str(error))
        harmless = re.search(r"progression|Invalid SOS|JFIF revision|Adobe color|ICC profile", str(error))
        if int(stray[1]) > _HARMLESS_BYTES if stray else not harmless:
            raise
    file.seek(place)


def _check_png(file: IO[bytes]) -> None:
    """Refuses a PNG whose checksums are wrong or whose end is missing; Pillow does not look at those of pixels."""
    place = file.seek(0, os.SEEK_CUR)
    file.seek(8)
    kind = b""
    while kind != b"IEND":
        head = file.read(8)
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        checksum = zlib.crc32(kind)
        while length > 0 and (piece := file.read(min(length, 1 << 20))):
            checksum = zlib.crc32(piece, checksum)
            length -= len(piece)
        end = file.read(4)
        if len(end) < 4:
            raise ValueError("the end of the file is missing")
        if int.from_bytes(end, "big") != checksum:
            raise ValueError("damaged: wrong checksum")
    file.seek(place)


def _check_png_rows(image: Image.Image, file: IO[bytes]) -> None:
    """Refuse a PNG with right checksums and too few rows: Pillow leaves what is missing black."""
    image.load()
    is_interlaced = bool(image.info.get("interlace"))
    if not is_interlaced and np.asarray(image.crop((0, image.height - 1, image.width, image.height))).any():
        return  # the last row is there, and so are all others
    place = file.seek(0, os.SEEK_CUR)
    file.seek(16)
    width, height, depth, color = struct.unpack(">IIBB", file.read(10))
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color]
    passes = _INTERLACED if is_interlaced else ((0, 0, 1, 1),)
    sizes = [(-((left - width) // across), -((top - height) // down)) for left, top, across, down in passes]
    expected = sum(rows * (1 + -(-columns * bits // 8)) for columns, rows in sizes if columns > 0 and rows > 0)
    file.seek(33)
    inflate, found, kind = zlib.decompressobj(), 0, b""
    while kind != b"IEND":
        head = file.read(8)
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        data = file.read(length) if kind == b"IDAT" else b""
        while data:
            found += len(inflate.decompress(data, 1 << 20))
            data = inflate.unconsumed_tail
        file.seek(4 if kind == b"IDAT" else length + 4, os.SEEK_CUR)
    found += len(inflate.flush())
    file.seek(place)
    if found < expected:
        raise ValueError(f"damaged: has {found} of {expected} bytes of pixels")


def _upright(image: Image.Image, value_range: str | Sequence[float]) -> Image.Image:
    """RGB, turned as the orientation tag says; a tag that cannot be read is none."""
    tiles = getattr(image, "tile", None)
    tile = tiles[0].args if tiles else ""
    raw_mode = tile if isinstance(tile, str) else str(tile[0]) if tile else ""
    # Pillow is about to keep only the upper 8 bits of each channel.
    is_deep_color = image.format in ("PNG", "TIFF") and ";16" in raw_mode and not image.mode.startswith("I")
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except (OSError, SyntaxError, ValueError, KeyError, TypeError):
        orientation = 1
    if is_deep_color and "transparency" in image.info:
        raise ValueError("16 bits a channel with a transparent color; save it with 8 bits")
    if is_deep_color:
        high = float(np.array(image.convert("RGB")).max()) * 256 + 255
        if _chosen(0, high, value_range, has_16_bits=True) != _FULL:
            raise ValueError("16 bits a channel in color of which fewer are used; save it with 8 bits")
    rgb = _rgb(image, value_range)
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    return rgb if turn is None else rgb.transpose(turn)


def _rgb(image: Image.Image, value_range: str | Sequence[float]) -> Image.Image:
    """8-bit RGB, transparent parts white, deeper gray scaled as in training."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _from_deep_gray(image, value_range).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba).convert("RGB")
    return image.convert("RGB")


def _from_deep_gray(image: Image.Image, value_range: str | Sequence[float]) -> Image.Image:
    values = np.array(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("has values that are not finite")
    has_16_bits = image.mode.startswith("I;16") or image.format == "PPM"
    low, high = _chosen(values.min(), values.max(), value_range, has_16_bits=has_16_bits, is_float=image.mode == "F")
    if (low, high) == _FULL:
        shallow = (values.clip(low, high).astype(np.int64) >> 8).astype(np.uint8)
    else:
        shallow = ((values - low) * (255 / (high - low))).clip(0, 255).round().astype(np.uint8)
    if getattr(image, "tag_v2", {}).get(262) == 0:  # "white is zero"
        shallow = 255 - shallow
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        shallow[values == transparent] = 255
    return Image.fromarray(shallow)


def _chosen(
    low: float, high: float, value_range: str | Sequence[float], *, has_16_bits: bool, is_float: bool = False
) -> tuple[float, float]:
    """What becomes black and white in an image with more than 8 bits a channel."""
    if not isinstance(value_range, str):
        return float(value_range[0]), float(value_range[1])
    if (value_range == "dtype" and has_16_bits) or (not is_float and low >= 0 and 2**14 <= high <= _FULL[1]):
        return _FULL
    raise ValueError(f"values from {low:g} to {high:g} of unknown range; save it with 8 bits")


def _sigmoid(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shares: NDArray[np.float64] = np.exp(-np.logaddexp(0, -logits))
    return shares


def _softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    powers: NDArray[np.float64] = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares: NDArray[np.float64] = powers / powers.sum(axis=1, keepdims=True)
    return shares


_KEYS = ("image", "texts", "unknown", "decisions")
"""Of an answer, next to those of the tasks."""

_KEYS_OF_ROWS = ("image", "unknown", "caption", "error")
"""Likewise of a row of a file."""


def answers(model: Model, paths: Sequence[str], texts: Sequence[str], top: int) -> list[dict[str, Any]]:
    """The model's predictions for each image, as plain values.

    Args:
        model: an export.
        paths: of images.
        texts: compared with each image, where the model is a dual encoder.
        top: how many classes of each task, the likeliest first. Where several share the largest logit, taking one of
            them would be luck: there is one entry without a label. Of a multi-label task there are all labels that
            reach their thresholds, of a regression task a ``value`` and its ``deviation``, None where it is not known.

    Returns:
        A mapping for each image: ``image``, the tasks, and where they are known ``decisions`` at operating points by
        task, ``unknown``, and ``texts``.

    Raises:
        PredictError: for an image that cannot be read, or texts that cannot be.
    """
    if not texts and not model.metadata["tasks"]:
        raise PredictError("--text: this model compares images with texts and has no classes; give one or more texts")
    embeddings = model.encode_texts(texts) if texts else None
    found = []
    for path in paths:
        outputs = model(model.read(path)[None])
        answer: dict[str, Any] = {"image": path}
        shares, values = model.probabilities(outputs), model.values(outputs)
        for task, names in model.metadata["tasks"].items():
            key = f"attribute {task}" if task in _KEYS else task
            if task in values:
                (number,), spread = values[task]
                answer[key] = {"value": float(number), "deviation": None if spread is None else float(spread[0])}
                continue
            rows = shares[task]
            order = np.argsort(-rows[0], kind="stable")[:top]
            if model.kind(task) == "multi_label":
                reached = rows[0] >= model.thresholds(task)
                order = np.array([place for place in np.argsort(-rows[0], kind="stable") if reached[place]], np.int64)
            answer[key] = [{"label": names[place], "probability": float(rows[0, place])} for place in order]
            if model.kind(task) != "multi_label" and _is_tied(outputs[f"logits_{task}"][0]):
                highest = float(rows[0].max())
                answer[key] = [{"label": None, "probability": highest if math.isfinite(highest) else None}]
        if decisions := model.decisions(outputs):
            answer["decisions"] = {task: decided for task, (decided,) in decisions.items()}
        if (unknown := model.unknown(outputs)) is not None:
            answer["unknown"] = bool(unknown[0])
        if embeddings is not None:
            likeness = outputs["image_embedding"][0] @ embeddings.T
            answer["texts"] = [
                {"text": text, "cosine": float(value)} for text, value in zip(texts, likeness, strict=True)
            ]
        found.append(answer)
    return found


def find_images(names: Sequence[str]) -> list[str]:
    """Files that names stand for: a folder for all images below it, a pattern for what matches it.

    Raises:
        PredictError: if there is no image in a folder.
    """
    found: list[str] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            below = sorted(str(file) for file in path.rglob("[!.]*") if file.suffix.lower() in SUFFIXES)
            if not below:
                raise PredictError(f"{name}: has no images ({', '.join(SUFFIXES)})")
            found += below
        else:
            found += [name] if path.exists() else sorted(glob.glob(name, recursive=True)) or [name]  # noqa: PTH207
    return found


def rows(model: Model, paths: Sequence[str], top: int) -> Iterator[dict[str, Any]]:
    """Yield a row per image, as ``vitrail predict`` writes it.

    Args:
        model: an export.
        paths: of images.
        top: classes of each task.
    """
    for path in paths:
        row: dict[str, Any] = {"image": path}
        try:
            [answer] = answers(model, [path], [], top)
        except PredictError as error:
            yield {**row, "error": str(error)}
            continue
        for name in model.metadata["tasks"]:
            given = answer[f"attribute {name}" if name in _KEYS else name]
            task = f"attribute {name}" if name in _KEYS_OF_ROWS else name
            if name in answer.get("decisions", {}):
                row[f"{task}_decision"] = answer["decisions"][name]
            if isinstance(given, dict):
                row[task] = given["value"]
                row |= {} if given["deviation"] is None else {f"{task}_deviation": given["deviation"]}
                continue
            if model.kind(name) == "multi_label":
                row[task] = LABEL_SEPARATOR.join(one["label"] for one in given)
                row[f"{task}_confidence"] = LABEL_SEPARATOR.join(f"{one['probability']:.4f}" for one in given)
                continue
            for place, one in enumerate(given):
                key = f"{task}_{place + 1}" if place else task
                row |= {key: one["label"], f"{key}_confidence": one["probability"]}
        row |= {"unknown": answer["unknown"]} if "unknown" in answer else {}
        yield {**row, "error": None}


def write_rows(model: Model, paths: Sequence[str], output: Path, top: int) -> str:
    """Write the rows of all images, and return what was written.

    Args:
        model: an export.
        paths: of images.
        output: ``.csv``, ``.json`` or ``.jsonl``; it appears when it is complete.
        top: classes of each task.

    Raises:
        PredictError: for a file of another kind.
    """
    kind = output.suffix.lower()
    if kind not in (".csv", ".json", ".jsonl"):
        raise PredictError(f"--to {output}: must end with .csv, .json or .jsonl")
    if not model.metadata["tasks"]:
        raise PredictError(f"--to {output}: this model has no classes to write; compare the images with --text")
    found = list(rows(model, paths, top))
    partial = output.with_name(f".{output.name}.part")
    with partial.open("w", newline="", encoding="utf-8") as file:
        if kind == ".csv":
            last = ("unknown", "error")
            names = list(dict.fromkeys(name for row in found for name in row if name not in last))
            names += [name for name in last if any(name in row for row in found)]
            writer = csv.DictWriter(file, names, lineterminator="\n")
            writer.writeheader()
            # Text that a spreadsheet would compute gets an apostrophe in front.
            writer.writerows({name: _guarded(value) for name, value in row.items()} for row in found)
        elif kind == ".json":
            json.dump(found, file, ensure_ascii=False, indent=1)
        else:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
    partial.replace(output)
    bad = sum(row["error"] is not None for row in found)
    return f"{output}: {len(found)} images" + (f", {bad} of them unreadable\n" if bad else "\n")


def _guarded(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and re.match(r"'*[=+\-@\t\r]", value) else value


def _is_tied(logits: NDArray[np.float32]) -> bool:
    """Whether no class is likelier than all others."""
    # A comparison with NaN is false, so that it does not make a prediction either.
    return int((~(logits < logits.max() - np.float32(TIE_TOLERANCE))).sum()) != 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the answers and returns the exit code: 0, 2 after a mistake of the user, or 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image, folder or pattern such as 'photos/*.jpg'")
    parser.add_argument(
        "--model", default=str(Path(__file__).parent), metavar="FOLDER", help="(default: that of this file)"
    )
    parser.add_argument("--text", action="append", default=[], help="compare the images with a text; repeatable")
    parser.add_argument("--top", type=int, default=1, metavar="N", help="classes of each task (default: 1)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--to",
        type=Path,
        metavar="FILE",
        help="write a row per image to .csv, .json or .jsonl, unreadable ones as well",
    )
    parser.add_argument(
        "--max-pixels",
        type=int,
        default=MAX_PIXELS,
        metavar="N",
        help=f"larger images are refused before they are decoded (default: {MAX_PIXELS})",
    )
    options = parser.parse_args(arguments)
    try:
        paths = find_images(options.images)
        model = Model(options.model, max_pixels=options.max_pixels)
        if options.to is not None:
            sys.stdout.write(write_rows(model, paths, options.to, max(1, options.top)))
            return 0
        found = answers(model, paths, options.text, max(1, options.top))
    except PredictError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    sys.stdout.write(json.dumps(found, indent=1, ensure_ascii=False) + "\n" if options.json else _text(found))
    return 0


def _text(found: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for answer in found:
        lines.append(str(answer["image"]))
        for task, values in answer.items():
            if task == "texts":
                lines += [f"  {value['cosine']:+.3f}  {value['text']}" for value in values]
            elif task == "decisions":
                lines += [f"  {of}, at the operating point: {found or '(nothing)'}" for of, found in values.items()]
            elif isinstance(values, bool):
                lines += ["  unknown: unlike the images that the model was trained on"] if values else []
            elif isinstance(values, dict):
                spread = "" if values["deviation"] is None else f" ± {values['deviation']:.2g}"
                lines.append(f"  {task}: {values['value']:.6g}{spread}")
            elif task != "image":
                named = [f"{one['label']} ({one['probability']:.2f})" for one in values if one["label"] is not None]
                lines.append(f"  {task}: {', '.join(named) or NO_PREDICTION}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
