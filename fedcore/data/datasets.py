"""Data sets as plain arrays: three that need no network, Flower Datasets, and the user's own."""

from __future__ import annotations

import dataclasses
import gzip
import importlib.util
import math
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from fedcore.config.sections import DATASETS, DataConfig
from fedcore.errors import Refused
from fedcore.references import resolve

__all__ = ["Dataset", "Examples", "load_dataset", "normalised_by_test", "stratified"]

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # where the Debian package dataset-fashion-mnist puts its files
FASHION_LABELS = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
FASHION_MEAN, FASHION_STD = 0.286041, 0.353024  # of the published train part, pixels in [0, 1]
WINDOW, STRIDE = 100, 50  # samples at 50 Hz: two seconds, about one repetition of an exercise
FEWEST_EXAMPLES = 10  # less cannot be shared out among test, calibration and clients
_FRACTIONS = (np.arange(256) / 255).astype(np.float32)[None]  # bytes that mean 0 to 1
_AT_ONCE = 4096  # examples that are looked at together, where all of them would need much memory
_TEST_STREAM = 0x7E57  # keeps this module's random stream apart from others with the same seed


@dataclass(frozen=True, eq=False)
class Examples:
    """``raw`` [n, *shape] and the labels ``y`` int64 [n]; read-only by convention.

    Values that came as bytes stay bytes, perhaps in a mapped file: ``raw`` is then uint8 [n, channels, ...], and ``values`` float32
    [channels, 256] or [1, 256] says what each byte means. Else ``raw`` is float32.
    """

    raw: Floats | Bytes
    y: Ints
    values: Floats | None = None

    def __len__(self) -> int:
        return len(self.y)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one example."""
        return self.raw.shape[1:]

    @property
    def x(self) -> Floats:
        """The examples as float32 [n, *shape]: four times the memory of bytes."""
        if self.values is None:
            return cast("Floats", self.raw)
        raw = cast("Bytes", self.raw)
        if len(self.values) == 1:
            return np.take(self.values[0], raw)
        decoded = np.empty(raw.shape, np.float32)
        for channel, row in enumerate(self.values):
            np.take(row, raw[:, channel], out=decoded[:, channel])
        return decoded

    def take(self, indices: Ints) -> Examples:
        """A copy of the examples at ``indices`` int64 [m], in that order."""
        return Examples(self.raw[indices], self.y[indices], self.values)

    def pieces(self) -> Iterator[Examples]:
        """All of them in order, some thousand at a time."""
        for first in range(0, len(self), _AT_ONCE):
            part = slice(first, first + _AT_ONCE)
            yield Examples(self.raw[part], self.y[part], self.values)

    def scaled(self, shift: npt.NDArray[Any], scale: npt.NDArray[Any]) -> Examples:
        """The examples (x - shift) / scale, with one number a channel."""
        if self.values is not None:
            return Examples(self.raw, self.y, ((self.values - shift[:, None]) / scale[:, None]).astype(np.float32))
        along = (1, -1) + (1,) * (self.raw.ndim - 2)
        return Examples(((self.raw - shift.reshape(along)) / scale.reshape(along)).astype(np.float32), self.y)

    def moments(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Mean and standard deviation of each channel."""
        if self.values is None:
            axes = tuple(axis for axis in range(self.raw.ndim) if axis != 1)
            return self.raw.mean(axes, dtype=np.float64), self.raw.std(axes, dtype=np.float64)
        raw = cast("Bytes", self.raw)
        counts = np.stack([_byte_counts(raw[:, channel]) for channel in range(raw.shape[1])]) / raw[:, 0].size
        values = self.values.astype(np.float64)
        mean = (counts * values).sum(1)
        return mean, np.sqrt((counts * (values - mean[:, None]) ** 2).sum(1))


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled examples, normalised already.

    ``labels[k]`` is the name of label k. ``groups`` int64 [n_train] numbers the natural owner (a person) of each training example,
    None where the set knows none. ``mean`` and ``std`` turned raw values into ``x = (raw - mean) / std``: one number,
    or one a channel where there are several; raw is in [0, 1] for images. Images are [channels, height, width], windows of sensor
    data [channels, steps].
    """

    name: str
    labels: tuple[str, ...]
    train: Examples
    test: Examples
    groups: Ints | None
    mean: float | tuple[float, ...]
    std: float | tuple[float, ...]


def load_dataset(config: DataConfig, folder: Path, seed: int) -> Dataset:
    """The data set that ``config`` names; relative paths and the user's modules are looked up in ``folder`` first.

    A function of the user (``module:function``, called with ``config.params``) returns a `Dataset`, or arrays ``(x, y)`` or
    ``(x, y, groups)``: x numeric [n, ...] and used as it is, y [n] and groups [n] any values that can be told apart. Where a set
    has no test part, ``config.test_fraction`` of it is drawn by ``seed``, the same share of each label, or of each owner.

    Raises:
        Refused: files, package, network or values are missing or wrong; one line that starts with ``data.dataset``.
    """
    name = config.dataset
    try:
        if config.path and name != "fashion-mnist":
            raise _Wrong("reads no files of yours: remove data.path")
        if config.params and name in DATASETS:
            raise _Wrong("has no parameters: remove data.params")
        if name == "digits":
            return _digits(config, seed)
        if name == "fashion-mnist":
            return _fashion_mnist(folder / config.path if config.path else FASHION_MNIST)
        if name == "smartwatch":
            return _smartwatch(config, seed)
        if name.startswith("flower:"):
            return _flower(name.removeprefix("flower:"), config, seed)
        return _of_user(config, folder, seed)
    except _Wrong as error:
        raise Refused(f'data.dataset = "{name}": {error}') from error


def stratified(strata: npt.NDArray[Any], count: int, rng: np.random.Generator) -> Ints:
    """Sorted positions of ``count`` <= n of the ``strata`` [n]: from each stratum its share (largest remainder, ties by lot).

    A stratum keeps one member back as long as another has more than one to give.
    """
    _, member_of, sizes = np.unique(strata, return_inverse=True, return_counts=True)
    share = count * sizes / len(strata)
    room = sizes - 1 if count <= (sizes - 1).sum() else sizes
    taken = np.minimum(share.astype(np.int64), room)
    while missing := count - taken.sum():
        open_strata = rng.permutation(np.flatnonzero(taken < room))
        taken[open_strata[np.argsort(taken[open_strata] - share[open_strata], kind="stable")[:missing]]] += 1
    order = rng.permutation(len(strata))
    order = order[np.argsort(member_of[order], kind="stable")]
    rank = np.arange(len(strata)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.sort(order[rank < np.repeat(taken, sizes)]).astype(np.int64)


class _Wrong(Exception):
    """What is wrong with a data set; `load_dataset` puts its name in front."""


def _byte_counts(raw: Bytes) -> Ints:
    """How often each byte occurs."""
    counts = np.zeros(256, np.int64)
    for first in range(0, len(raw), _AT_ONCE):
        counts += np.bincount(raw[first : first + _AT_ONCE].reshape(-1), minlength=256)
    return counts


def _digits(config: DataConfig, seed: int) -> Dataset:
    """1797 images [1, 8, 8] of ten digits: scikit-learn's copy of the test part of the UCI set "Optical Recognition of Handwritten
    Digits" (Alpaydin and Kaynak, 1998)."""
    table = _digits_table()
    x = (table[:, :-1] / 16.0).astype(np.float32).reshape(-1, 1, 8, 8)
    train, test, _ = _split(Examples(x, table[:, -1].astype(np.int64)), None, config, seed)
    return _normalise("digits", tuple("0123456789"), train, test, None)


def _digits_table() -> npt.NDArray[np.float64]:
    """64 pixels from 0 to 16 and the digit, a row each. scikit-learn's file alone: to import scikit-learn takes two seconds."""
    found = importlib.util.find_spec("sklearn")
    if found is None:
        raise _Wrong("needs scikit-learn: pip install scikit-learn")
    (folder,) = found.submodule_search_locations or [""]
    path = Path(folder, "datasets", "data", "digits.csv.gz")
    if path.is_file():
        return np.loadtxt(path, delimiter=",")
    from sklearn.datasets import load_digits

    return np.column_stack(load_digits(return_X_y=True))


def _fashion_mnist(directory: Path) -> Dataset:
    """60000 + 10000 images [1, 28, 28] of ten kinds of clothing (Xiao, Rasul and Vollgraf, 2017, arXiv:1708.07747)."""
    train, test = (_idx_examples(directory, part) for part in ("train", "t10k"))
    return Dataset("fashion-mnist", FASHION_LABELS, train, test, None, FASHION_MEAN, FASHION_STD)


def _idx_examples(directory: Path, part: str) -> Examples:
    images = _read_idx(directory, f"{part}-images-idx3-ubyte", dimensions=3)
    labels = _read_idx(directory, f"{part}-labels-idx1-ubyte", dimensions=1)
    if len(images) != len(labels) or len(labels) == 0:
        raise _Wrong(f"{directory} has {len(images)} {part} images and {len(labels)} {part} labels")
    if images.shape[1:] != (28, 28) or labels.max() >= len(FASHION_LABELS):
        raise _Wrong(
            f"{directory} holds {part} images of {images.shape[1:]} with labels up to {labels.max()}, not 28 x 28 and up to 9"
        )
    values = np.multiply(np.arange(256), 1 / (255 * FASHION_STD), dtype=np.float32) - np.float32(FASHION_MEAN / FASHION_STD)
    return Examples(images[:, None], labels.astype(np.int64), values[None])


def _read_idx(directory: Path, name: str, dimensions: int) -> npt.NDArray[np.uint8]:
    """The unsigned bytes of an IDX file, gzipped or not. Format: two zero bytes, type 8, number of dimensions, their sizes as
    big-endian uint32, values in C order (LeCun, Cortes and Burges, "The MNIST database")."""
    path = next((path for path in (directory / name, directory / f"{name}.gz") if path.is_file()), None)
    if path is None:
        raise _Wrong(
            f"{directory / name}[.gz] not found: install the Debian package dataset-fashion-mnist, "
            "or set data.path to the directory of its four IDX files"
        )
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise _Wrong(f"{path} cannot be read: {error}") from error
    start = 4 + 4 * dimensions
    if len(content) < start or content[:4] != bytes((0, 0, 8, dimensions)):
        raise _Wrong(
            f"{path} is not an IDX file of bytes in {dimensions} dimensions: it starts with {content[:4].hex() or 'nothing'}"
        )
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", dimensions, 4))
    if len(content) - start != math.prod(shape):
        raise _Wrong(f"{path} is damaged: {len(content) - start} bytes of values where its header says {shape}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _smartwatch(config: DataConfig, seed: int) -> Dataset:
    """Windows [6, 100] of accelerometer (ax, ay, az) and gyroscope (wx, wy, wz) of a watch, 50 Hz, overlapping by half: 140
    recordings of 10 people at 7 shoulder exercises, each once with the left and once with the right arm (Burns et al., 2018,
    arXiv:1802.01489).

    Owners are the people. Whole recordings are held out for the test, the same number for each person, and never both arms of
    one exercise as long as there is another.
    """
    recordings = _smartwatch_recordings()
    labels, people = np.asarray(recordings["y"], np.int64), np.asarray(recordings["subject"], np.int64)
    in_test = np.isin(np.arange(len(labels)), _test_recordings(labels, people, config.test_fraction, _rng(seed)))
    slides = [np.lib.stride_tricks.sliding_window_view(steps, WINDOW, axis=0)[::STRIDE] for steps in recordings["X"]]

    def windows(chosen: npt.NDArray[np.bool_]) -> tuple[Examples, Ints]:
        indices = np.flatnonzero(chosen)
        counts = [len(slides[index]) for index in indices]
        x = np.concatenate([slides[index] for index in indices]).astype(np.float32)
        return Examples(x, np.repeat(labels[indices], counts)), np.repeat(people[indices], counts)

    (train, owners), (test, _) = windows(~in_test), windows(in_test)
    return _normalise("smartwatch", tuple(recordings["y_labels"]), train, test, _numbered(owners)[1])


def _smartwatch_recordings() -> dict[str, Any]:
    """The dictionary of ``seglearn.datasets.load_watch``, read from the package's file: importing seglearn 1.2.5 itself needs
    pandas, which it does not declare. The file is a pickle, and as trustworthy as the installed package's code."""
    spec = importlib.util.find_spec("seglearn")
    places = (spec.submodule_search_locations if spec else None) or []
    file = next((file for place in places if (file := Path(place) / "data" / "watch_dataset.npy").is_file()), None)
    if file is None:
        raise _Wrong("needs the recordings that come with seglearn: pip install seglearn")
    recordings: dict[str, Any] = np.load(file, allow_pickle=True).item()
    return recordings


def _test_recordings(labels: Ints, people: Ints, fraction: float, rng: np.random.Generator) -> list[int]:
    held_out: list[int] = []
    label_of = labels.tolist()
    of_label = dict.fromkeys(label_of, 0)
    for person in np.unique(people):
        left = rng.permutation(np.flatnonzero(people == person)).tolist()
        own: list[int] = []
        for _ in range(min(max(1, round(fraction * len(left))), len(left) - 1)):
            chosen = min(left, key=lambda recording: (own.count(label_of[recording]), of_label[label_of[recording]]))
            left.remove(chosen)
            held_out.append(chosen)
            own.append(label_of[chosen])
            of_label[label_of[chosen]] += 1
    return held_out


def _flower(name: str, config: DataConfig, seed: int) -> Dataset:
    """Images of the Hugging Face Hub through Flower Datasets. Its splits "train" and, if there is one, "test" are used.

    ``config.params``: ``subset``; ``image`` and ``label``, the columns of type Image and ClassLabel where there are several of a
    type; ``owner``, a column that tells the natural owner.
    """
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    try:
        from flwr_datasets import FederatedDataset
    except ImportError as error:
        raise _Wrong('needs Flower Datasets: pip install "flwr-datasets[vision]"') from error
    params = config.params
    if unknown := set(params) - {"subset", "image", "label", "owner"}:
        raise _Wrong(f"unknown data.params: {', '.join(sorted(unknown))}; allowed: subset, image, label, owner")
    try:
        source = FederatedDataset(dataset=name, subset=params.get("subset"), partitioners={}, shuffle=False)
        split = source.load_split("train")
    except Exception as error:  # of many libraries: network, hub, file formats
        raise _Wrong(f"could not be loaded: {_said(error)}") from error
    image, label = _column(split, "image", "Image", params), _column(split, "label", "ClassLabel", params)
    labels = tuple(split.features[label].names)
    train = _of_columns(split, image, label, len(labels))
    groups = None
    if "owner" in params:
        if params["owner"] not in split.features:
            raise _Wrong(f"data.params.owner must be one of the columns {', '.join(split.features)}")
        groups = _numbered(_values("owner", split[params["owner"]], len(train)))[1]
    try:
        own_test = source.load_split("test")
    except ValueError:  # there is no such split
        train, test, groups = _split(train, groups, config, seed)
    else:
        test = _of_columns(own_test, image, label, len(labels))
    return _normalise(f"flower:{name}", labels, train, test, groups)


def _column(split: Any, what: str, kind: str, params: dict[str, Any]) -> str:
    """The column of ``split`` whose feature is of class ``kind``; where there are several, ``params`` says which."""
    found = [column for column, feature in split.features.items() if type(feature).__name__ == kind]
    chosen = params.get(what, found[0] if len(found) == 1 else None)
    if chosen not in found:
        raise _Wrong(f"data.params.{what} must name a column of type {kind}, of which there are: {', '.join(found) or 'none'}")
    return str(chosen)


def _of_columns(split: Any, image: str, label: str, labels: int) -> Examples:
    pictures = [np.asarray(value) for value in split[image]]
    kinds = {(picture.shape, picture.dtype.name) for picture in pictures}
    if len(kinds) != 1 or next(iter(kinds))[1] != "uint8":
        raise _Wrong(f"images must be of 8 bits a channel and one shape, got {', '.join(map(str, sorted(kinds)[:3])) or 'none'}")
    x = np.stack(pictures)
    x = x[:, None] if x.ndim == 3 else np.ascontiguousarray(np.moveaxis(x, -1, 1))
    return _checked(Examples(x, np.array(list(split[label])), _FRACTIONS), labels, "the set")


def _of_user(config: DataConfig, folder: Path, seed: int) -> Dataset:
    function = resolve(config.dataset, folder, "data.dataset")
    if not callable(function):
        raise _Wrong(f"must be a function, is {_came(function)}")
    try:
        result = function(**config.params)
    except Exception as error:
        raise _Wrong(f"failed: {_said(error)}") from error
    if isinstance(result, Dataset):
        return _checked_dataset(result)
    if not isinstance(result, tuple | list) or len(result) not in (2, 3):
        raise _Wrong(f"must return a Dataset, (x, y) or (x, y, groups), got {_came(result)}")
    x, meaning = _as_raw(result[0], "x")
    if len(x) < FEWEST_EXAMPLES:
        raise _Wrong(f"must give at least {FEWEST_EXAMPLES} examples, got {len(x)}")
    values, y = _numbered(_values("y", result[1], len(x)))
    if len(values) < 2:
        raise _Wrong(f"must give at least 2 different labels, got only {values[0]}")
    groups = _numbered(_values("groups", result[2], len(x)))[1] if len(result) == 3 and result[2] is not None else None
    train, test, groups = _split(Examples(x, y, meaning), groups, config, seed)
    return Dataset(config.dataset, values, train, test, groups, 0.0, 1.0)


def _checked_dataset(given: Dataset) -> Dataset:
    """The user's own `Dataset` with everything in the types that it promises."""
    labels = tuple(str(label) for label in given.labels)
    train, test = _checked(given.train, len(labels), "train"), _checked(given.test, len(labels), "test")
    if train.shape != test.shape:
        raise _Wrong(f"train.x and test.x must hold examples of one shape, got {train.shape} and {test.shape}")
    if len(train) < FEWEST_EXAMPLES or len(test) == 0:
        raise _Wrong(f"must give at least {FEWEST_EXAMPLES} training examples and 1 for the test, got {len(train)} and {len(test)}")
    if len(np.unique(train.y)) < 2:
        raise _Wrong(f"must give at least 2 different labels, train.y has only {train.y[0]}")
    groups = None if given.groups is None else _numbered(_values("groups", given.groups, len(train)))[1]
    channels = train.shape[0]
    mean, std = _checked_scale(given.mean, "mean", channels), _checked_scale(given.std, "std", channels)
    return dataclasses.replace(given, labels=labels, train=train, test=test, groups=groups, mean=mean, std=std)


def _checked_scale(given: Any, name: str, channels: int) -> float | tuple[float, ...]:
    numbers = tuple(_as_floats(np.atleast_1d(given), name, dimensions=1).ravel().tolist())
    if len(numbers) not in (1, channels) or (name == "std" and min(numbers) <= 0):
        raise _Wrong(f"{name} must be one number, or one for each of {channels} channels, and std above 0; got {given}")
    return numbers[0] if len(numbers) == 1 else numbers


def _checked(part: Examples, labels: int, name: str) -> Examples:
    x, meaning = _as_raw(part.raw, f"{name}.x", part.values)
    y = _values(f"{name}.y", part.y, len(x))
    if len(y) and (y.dtype.kind not in "iu" or y.min() < 0 or y.max() >= labels):
        raise _Wrong(
            f"{name}.y must be integers from 0 to {labels - 1}, one for each label; got {_came(y)} from {y.min()} to {y.max()}"
        )
    return Examples(x, y.astype(np.int64), meaning)


def _as_raw(given: Any, name: str, meaning: Any = None) -> tuple[Floats | Bytes, Floats | None]:
    """Examples of a user as they are kept: bytes with their meaning, which is the number if nothing is said, else floats."""
    if getattr(given, "dtype", None) != np.uint8 or np.ndim(given) < 2:
        if meaning is not None:
            raise _Wrong(f"{name}.values says what bytes mean, got {_came(given)}")
        return _as_floats(given, name), None
    if given.ndim < 3:  # no channels: few values each
        return _as_floats(given, name), None
    if 0 in given.shape[1:]:
        raise _Wrong(f"{name} must be an array of numbers [n, ...], got {_came(given)}")
    values = np.arange(256, dtype=np.float32)[None] if meaning is None else _as_floats(meaning, f"{name}.values")
    if values.shape not in {(1, 256), (given.shape[1], 256)}:
        raise _Wrong(f"{name}.values must be of shape (1, 256) or ({given.shape[1]}, 256), got {_came(values)}")
    return given, values


def _as_floats(raw: Any, name: str, dimensions: int = 2) -> Floats:
    """``raw`` as finite float32 of at least so many dimensions, of which only the first may be empty."""
    try:
        array = np.asarray(raw)
    except (ValueError, TypeError, RuntimeError) as error:
        raise _Wrong(f"{name} is no array: {_said(error)}") from error
    if array.dtype.kind not in "biuf" or array.ndim < dimensions or 0 in array.shape[1:]:
        raise _Wrong(f"{name} must be an array of numbers [n, ...], got {_came(array)}")
    with np.errstate(over="ignore"):
        x = array.astype(np.float32, copy=False)  # a mapped file stays one
    for first in range(0, len(x), _AT_ONCE):
        finite = np.isfinite(x[first : first + _AT_ONCE]).all(axis=tuple(range(1, x.ndim)))
        if not finite.all():
            raise _Wrong(f"{name} is not finite (NaN, infinite or beyond float32) at index {first + int(np.argmin(finite))}")
    return x


def _values(name: str, raw: Any, length: int) -> npt.NDArray[Any]:
    """``raw`` as ``length`` integers or strings."""
    try:
        array = np.asarray(raw)
    except (ValueError, TypeError, RuntimeError) as error:
        raise _Wrong(f"{name} is no array: {_said(error)}") from error
    if array.shape != (length,):
        raise _Wrong(f"{name} must have one value for each of the {length} examples, got {_came(array)}")
    if array.dtype.kind == "O" and all(isinstance(value, str) for value in array):
        array = array.astype(str)
    if array.dtype.kind == "f" and np.isfinite(array).all() and (array == np.floor(array)).all():
        array = array.astype(np.int64)
    if array.dtype.kind not in "biuU":
        raise _Wrong(f"{name} must be integers or strings, got {_came(array)} such as {array[0] if length else 'none'}")
    return array


def _numbered(values: npt.NDArray[Any]) -> tuple[tuple[str, ...], Ints]:
    """The distinct values in order, as text, and for each of ``values`` its number among them."""
    distinct, numbers = np.unique(values, return_inverse=True)
    return tuple(str(value) for value in distinct), numbers.astype(np.int64)


def _split(examples: Examples, groups: Ints | None, config: DataConfig, seed: int) -> tuple[Examples, Examples, Ints | None]:
    """Training part, test part and the owners of the training part."""
    count = min(max(1, round(config.test_fraction * len(examples))), len(examples) - 1)
    in_test = stratified(examples.y if groups is None else groups, count, _rng(seed))
    rest = np.setdiff1d(np.arange(len(examples)), in_test)
    return examples.take(rest), examples.take(in_test), None if groups is None else _numbered(groups[rest])[1]


def _normalise(name: str, labels: tuple[str, ...], train: Examples, test: Examples, groups: Ints | None) -> Dataset:
    """Each channel to mean 0 and standard deviation 1 over the training part (a constant channel to 0)."""
    mean, std = train.moments()
    std[std == 0] = 1.0
    parts = [part.scaled(mean.astype(np.float32), std.astype(np.float32)) for part in (train, test)]
    if len(mean) == 1:
        return Dataset(name, labels, parts[0], parts[1], groups, float(mean[0]), float(std[0]))
    return Dataset(name, labels, parts[0], parts[1], groups, tuple(mean.tolist()), tuple(std.tolist()))


def normalised_by_test(dataset: Dataset) -> Dataset:
    """``dataset`` with the mean and deviation of its test part, which the coordinator holds, where those of the clients' examples
    were used: they would tell about single examples, exactly and beside every noise."""
    if dataset.name == "fashion-mnist" or (dataset.mean, dataset.std) == (0.0, 1.0):
        return dataset  # published constants, or used as it is
    shift, scale = dataset.test.moments()
    scale[scale == 0] = 1.0
    train, test = (part.scaled(shift, scale) for part in (dataset.train, dataset.test))
    old_mean, old_std = np.atleast_1d(dataset.mean), np.atleast_1d(dataset.std)
    mean, std = (old_mean + shift * old_std).tolist(), (old_std * scale).tolist()
    single = len(mean) == 1
    return dataclasses.replace(
        dataset, train=train, test=test, mean=mean[0] if single else tuple(mean), std=std[0] if single else tuple(std)
    )


def _rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence([seed, _TEST_STREAM]))


def _came(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} of shape {value.shape}"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__} of {len(value)}"
    return type(value).__name__


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
