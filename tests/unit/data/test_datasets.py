import dataclasses
import gzip
import importlib.util
import struct
import sys
import textwrap
import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.config import DataConfig
from fedcore.data import Dataset, Examples, load_dataset
from fedcore.data.datasets import FASHION_MNIST, _digits_table, _smartwatch_recordings, _test_recordings, stratified
from fedcore.errors import Refused

IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def load(folder: Path = Path(), seed: int = 0, **keys: object) -> Dataset:
    return load_dataset(DataConfig(**keys), folder, seed)


def refusal(folder: Path = Path(), **keys: object) -> str:
    with pytest.raises(Refused) as caught:
        load(folder, **keys)
    message = str(caught.value)
    assert message.startswith(f'data.dataset = "{keys["dataset"]}": ')
    assert "\n" not in message
    return message


def assert_sound(dataset: Dataset) -> None:
    for part in (dataset.train, dataset.test):
        assert part.x.dtype == np.float32
        assert part.y.dtype == np.int64
        assert len(part.x) == len(part.y) == len(part)
        assert np.isfinite(part.x).all()
        np.testing.assert_array_equal(np.unique(part.y), np.arange(len(dataset.labels)))
    assert dataset.groups is None or (dataset.groups.dtype == np.int64 and dataset.groups.shape == (len(dataset.train),))


def assert_equal(one: Dataset, two: Dataset) -> None:
    for part in ("train", "test"):
        np.testing.assert_array_equal(getattr(one, part).x, getattr(two, part).x)
        np.testing.assert_array_equal(getattr(one, part).y, getattr(two, part).y)
    np.testing.assert_array_equal(one.groups, two.groups)
    assert (one.mean, one.std) == (two.mean, two.std)


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=200).flatmap(lambda s: st.tuples(st.just(s), st.integers(0, len(s)))),
    st.integers(0, 2**32),
)
@settings(deadline=None)
def test_stratified_takes_exactly_so_many_in_proportion(case, seed):
    strata, count = np.array(case[0]), case[1]
    chosen = stratified(strata, count, np.random.default_rng(seed))
    assert len(chosen) == count
    assert (np.diff(chosen) > 0).all()
    sizes, taken = np.bincount(strata, minlength=10), np.bincount(strata[chosen], minlength=10)
    if count <= (np.maximum(sizes - 1, 0)).sum():
        assert (taken < sizes)[sizes > 0].all()
    share = count * sizes / len(strata)
    if (np.ceil(share) < sizes)[sizes > 0].all():
        assert (np.abs(taken - share) < 1).all()


@pytest.mark.parametrize("seed", range(20))
def test_stratified_leaves_a_lone_member_where_others_have_more(seed):
    assert 3 not in stratified(np.array([0, 0, 0, 1]), 2, np.random.default_rng(seed))


def test_take_copies_in_the_order_asked():
    examples = Examples(np.arange(6, dtype=np.float32).reshape(3, 2), np.array([5, 6, 7]))
    taken = examples.take(np.array([2, 0]))
    assert (taken.x.tolist(), taken.y.tolist()) == ([[4, 5], [0, 1]], [7, 5])
    taken.x[:] = 0
    assert examples.x[2].tolist() == [4, 5]


def test_digits():
    from sklearn.datasets import load_digits

    dataset = load(dataset="digits", test_fraction=0.2)
    assert_sound(dataset)
    assert (len(dataset.train), len(dataset.test)) == (1438, 359)
    assert dataset.train.x.shape[1:] == (1, 8, 8)
    assert dataset.groups is None
    assert abs(dataset.train.x.mean()) < 1e-5
    assert abs(dataset.train.x.std() - 1) < 1e-5
    share = np.bincount(dataset.test.y) / np.bincount(np.concatenate([dataset.train.y, dataset.test.y]))
    assert np.abs(share - 0.2).max() < 0.01

    raw = np.concatenate([dataset.train.x, dataset.test.x]) * dataset.std + dataset.mean
    dealt = sorted(
        zip(map(bytes, np.rint(raw * 16).astype(np.uint8)), np.concatenate([dataset.train.y, dataset.test.y]), strict=True)
    )
    values, labels = load_digits(return_X_y=True)
    assert dealt == sorted(zip(map(bytes, values.astype(np.uint8)), labels, strict=True))


def test_digits_come_from_scikit_learns_file_or_from_its_function(monkeypatch):
    from sklearn.datasets import load_digits  # noqa: F401 - in time, what it imports looks for modules too

    from_file = _digits_table()
    elsewhere = types.SimpleNamespace(submodule_search_locations=["nowhere"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: elsewhere)
    np.testing.assert_array_equal(_digits_table(), from_file)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "needs scikit-learn" in refusal(dataset="digits")


@pytest.mark.parametrize("name", ["digits", "smartwatch"])
def test_the_test_part_is_a_function_of_the_seed(name):
    assert_equal(load(dataset=name, seed=1), load(dataset=name, seed=1))
    assert load(dataset=name, seed=1).mean != load(dataset=name, seed=2).mean


def test_keys_that_a_set_does_not_read_are_refused():
    assert "remove data.params" in refusal(dataset="digits", params={"size": 3})
    assert "remove data.path" in refusal(dataset="smartwatch", path="somewhere")


@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason="Debian package dataset-fashion-mnist is not installed")
def test_fashion_mnist_as_installed():
    dataset = load(dataset="fashion-mnist")
    assert_sound(dataset)
    assert (dataset.train.x.shape, dataset.test.x.shape) == ((60000, 1, 28, 28), (10000, 1, 28, 28))
    assert np.bincount(dataset.train.y).tolist() == [6000] * 10
    assert dataset.labels[dataset.train.y[0]] == "Ankle boot"
    assert abs(dataset.train.x.mean(dtype=np.float64)) < 1e-5
    assert abs(dataset.train.x.std(dtype=np.float64) - 1) < 1e-5


@pytest.fixture(params=["plain", "gz"])
def idx_folder(request, tmp_path):
    """Twelve training and ten test images with pixel values and labels that count up."""
    files = {}
    for part, n in (("train", 12), ("t10k", 10)):
        pixels = np.arange(n * 784, dtype=np.uint32).astype(np.uint8)
        files[f"{part}-images-idx3-ubyte"] = struct.pack(">IIII", 0x803, n, 28, 28) + pixels.tobytes()
        files[f"{part}-labels-idx1-ubyte"] = struct.pack(">II", 0x801, n) + bytes(range(10)) + bytes(range(n - 10))
    (tmp_path / "idx").mkdir()
    for name, content in files.items():
        write_idx(tmp_path, name, content, packed=request.param == "gz")
    return tmp_path


def write_idx(folder: Path, name: str, content: bytes, packed: bool) -> None:
    (folder / "idx" / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(content) if packed else content)


def rewrite_idx(folder: Path, name: str, change) -> None:
    packed = (folder / "idx" / f"{name}.gz").exists()
    content = (folder / "idx" / (f"{name}.gz" if packed else name)).read_bytes()
    write_idx(folder, name, change(gzip.decompress(content) if packed else content), packed)


def test_idx_files_of_a_directory_relative_to_the_scenario(idx_folder):
    dataset = load(idx_folder, dataset="fashion-mnist", path="idx")
    assert_sound(dataset)
    raw = np.rint((dataset.train.x * dataset.std + dataset.mean) * 255).astype(np.int64)
    np.testing.assert_array_equal(raw.ravel(), np.arange(12 * 784) % 256)
    assert dataset.test.y.tolist() == list(range(10))
    assert dataset.train.y.tolist() == [*range(10), 0, 1]


@pytest.mark.parametrize("name", IDX_FILES)
def test_a_missing_idx_file_is_refused_with_the_remedy(idx_folder, name):
    next((idx_folder / "idx").glob(f"{name}*")).unlink()
    message = refusal(idx_folder, dataset="fashion-mnist", path="idx")
    assert f"{name}[.gz] not found" in message
    assert "dataset-fashion-mnist" in message
    assert "data.path" in message


@pytest.mark.parametrize("name", IDX_FILES)
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda content: content[:-1], "is damaged"),
        (lambda content: content + b"\0", "is damaged"),
        (lambda content: b"\0\0\x0d" + content[3:], "is not an IDX file"),
        (lambda content: content[:6], "is not an IDX file"),
        (lambda content: b"", "is not an IDX file"),
    ],
)
def test_a_damaged_idx_file_is_refused(idx_folder, name, change, expected):
    rewrite_idx(idx_folder, name, change)
    message = refusal(idx_folder, dataset="fashion-mnist", path="idx")
    assert expected in message
    assert name in message


def test_idx_files_of_another_set_are_refused(idx_folder):
    rewrite_idx(idx_folder, "t10k-labels-idx1-ubyte", lambda content: content[:-1] + b"\x0a")
    assert "labels up to 10" in refusal(idx_folder, dataset="fashion-mnist", path="idx")
    rewrite_idx(idx_folder, "t10k-labels-idx1-ubyte", lambda content: struct.pack(">II", 0x801, 9) + content[8:-1])
    assert "10 t10k images and 9 t10k labels" in refusal(idx_folder, dataset="fashion-mnist", path="idx")
    rewrite_idx(idx_folder, "train-images-idx3-ubyte", lambda content: struct.pack(">IIII", 0x803, 12, 14, 56) + content[16:])
    assert "(14, 56)" in refusal(idx_folder, dataset="fashion-mnist", path="idx")


@pytest.mark.parametrize(
    "change", [lambda packed: packed[:-9], lambda packed: b"no gzip", lambda packed: packed[:20] + b"\xff" * 50]
)
def test_a_damaged_gzip_file_is_refused(tmp_path, change):
    (tmp_path / "idx").mkdir()
    content = gzip.compress(struct.pack(">IIII", 0x803, 1, 28, 28) + np.random.default_rng(0).bytes(784))
    (tmp_path / "idx" / f"{IDX_FILES[0]}.gz").write_bytes(change(content))
    assert "cannot be read" in refusal(tmp_path, dataset="fashion-mnist", path="idx")


needs_seglearn = pytest.mark.skipif(importlib.util.find_spec("seglearn") is None, reason="seglearn is not installed")


@needs_seglearn
def test_smartwatch():
    dataset = load(dataset="smartwatch", test_fraction=0.2)
    assert_sound(dataset)
    assert dataset.train.x.shape[1:] == (6, 100)
    assert dataset.labels == ("PEN", "ABD", "FEL", "IR", "ER", "TRAP", "ROW")
    assert np.unique(dataset.groups).tolist() == list(range(10))
    assert len(dataset.mean) == len(dataset.std) == 6
    np.testing.assert_allclose(dataset.train.x.mean(axis=(0, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(dataset.train.x.std(axis=(0, 2)), 1, atol=1e-4)
    assert 0.15 < len(dataset.test) / (len(dataset.train) + len(dataset.test)) < 0.3


@needs_seglearn
@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5, 0.9])
def test_no_recording_of_the_watch_lies_in_both_parts(fraction):
    dataset = load(dataset="smartwatch", test_fraction=fraction, seed=5)
    shift, scale = (np.array(numbers, np.float32)[:, None] for numbers in (dataset.mean, dataset.std))
    train, test = (
        {window.tobytes(): label for window, label in zip(part.x, part.y, strict=True)} for part in (dataset.train, dataset.test)
    )
    recordings = _smartwatch_recordings()
    held_out = {person: [] for person in range(1, 11)}
    for steps, label, person in zip(recordings["X"], recordings["y"], recordings["subject"], strict=True):
        signals = (steps.T.astype(np.float32) - shift) / scale
        own = [signals[:, start : start + 100].tobytes() for start in range(0, len(steps) - 99, 50)]
        found_in_test = [window in test for window in own]
        assert all(found_in_test) or not any(found_in_test)
        if found_in_test[0]:
            held_out[person].append(label)
            assert not any(window in train for window in own)
            assert all(test[window] == label for window in own)
        else:
            assert all(train[window] == label for window in own)
    expected = min(max(1, round(14 * fraction)), 13)
    assert {len(labels) for labels in held_out.values()} == {expected}
    assert all(np.bincount(labels, minlength=7).max() == (expected + 6) // 7 for labels in held_out.values())


@pytest.mark.parametrize("seed", range(20))
def test_both_arms_of_an_exercise_are_held_out_only_after_all_others(seed):
    labels, people = np.tile(np.arange(7), 20), np.repeat(np.arange(10), 14)
    held_out = _test_recordings(labels, people, 0.3, np.random.default_rng(seed))
    assert {len({labels[index] for index in held_out if people[index] == person}) for person in range(10)} == {4}
    assert np.ptp(np.bincount(labels[held_out])) <= 2


def test_smartwatch_without_seglearn_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install seglearn" in refusal(dataset="smartwatch")


def write(folder: Path, text: str) -> Path:
    (folder / "mine.py").write_text("import numpy as np\nfrom fedcore.data import Dataset, Examples\n" + textwrap.dedent(text))
    return folder


def test_arrays_of_the_user(tmp_path):
    folder = write(
        tmp_path,
        """
        def load(n, shift):
            kinds = ["pear", "apple", "fig"]
            return np.arange(n * 2).reshape(n, 2) + shift, [kinds[i % 3] for i in range(n)]
        """,
    )
    dataset = load(folder, dataset="mine:load", params={"n": 30, "shift": 5}, test_fraction=0.3)
    assert_sound(dataset)
    assert (dataset.name, dataset.labels, dataset.groups) == ("mine:load", ("apple", "fig", "pear"), None)
    assert (dataset.mean, dataset.std) == (0.0, 1.0)
    assert (len(dataset.train), len(dataset.test)) == (21, 9)
    for part in (dataset.train, dataset.test):
        index = (part.x[:, 0] - 5) / 2
        assert [("pear", "apple", "fig")[int(i) % 3] for i in index] == [dataset.labels[label] for label in part.y]
    assert_equal(dataset, load(folder, dataset="mine:load", params={"n": 30, "shift": 5}, test_fraction=0.3))


def test_owners_of_the_user_keep_examples_on_both_sides(tmp_path):
    folder = write(
        tmp_path,
        """
        def load():
            owner = np.arange(60) % 6
            return np.stack([owner, np.arange(60)], axis=1), np.arange(60) // 7 % 2, [f"person {o}" for o in owner]
        """,
    )
    dataset = load(folder, dataset="mine:load", test_fraction=0.2)
    assert_sound(dataset)
    np.testing.assert_array_equal(dataset.train.x[:, 0], dataset.groups)
    assert np.bincount(dataset.groups).tolist() == [8] * 6
    assert np.bincount(dataset.test.x[:, 0].astype(int)).tolist() == [2] * 6


def write_dataset(folder: Path, changes: str) -> Path:
    """A function that returns a data set of its own, sound but for ``changes``."""
    return write(
        folder,
        f"""
        from dataclasses import replace
        def load():
            x, y = np.ones((20, 1, 4), np.float32), np.arange(20) % 2
            own = Dataset("own", ("no", "yes"), Examples(x, y), Examples(x[:3], y[:3]), None, 0.5, 2.0)
            return replace(own, {changes})
        """,
    )


def test_a_dataset_of_the_user_is_taken_as_it_is(tmp_path):
    changes = "train=Examples(x.astype(float), y.astype(np.uint8)), groups=np.arange(20) // 10 + 4"
    dataset = load(write_dataset(tmp_path, changes), dataset="mine:load")
    assert_sound(dataset)
    assert (dataset.name, dataset.labels, dataset.mean, dataset.std) == ("own", ("no", "yes"), 0.5, 2.0)
    assert (dataset.train.x == 1).all()
    assert dataset.groups.tolist() == [0] * 10 + [1] * 10


def test_mean_and_std_of_the_user_may_be_one_a_channel(tmp_path):
    changes = "train=Examples(x.reshape(20, 4, 1), y), test=Examples(x.reshape(20, 4, 1), y), mean=[1, 2, 3, 4], std=np.ones(4)"
    dataset = load(write_dataset(tmp_path, changes), dataset="mine:load")
    assert (dataset.mean, dataset.std) == ((1.0, 2.0, 3.0, 4.0), (1.0, 1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ("test=Examples(x[:3, :, :2], y[:3])", "(1, 4) and (1, 2)"),
        ("test=Examples(x[:0], y[:0])", "20 and 0"),
        ("train=Examples(x[:9], y[:9])", "at least 10 training examples"),
        ("train=Examples(x, y[1:])", "train.y must have one value for each of the 20 examples, got int64 of shape (19,)"),
        (
            "train=Examples(x, y * 2)",
            "train.y must be integers from 0 to 1, one for each label; got int64 of shape (20,) from 0 to 2",
        ),
        ("train=Examples(x, y - 1)", "from -1 to 0"),
        ("train=Examples(x, y * 0)", "at least 2 different labels"),
        ("train=Examples(x, y == 1)", "train.y must be integers"),
        ("groups=np.arange(3)", "groups must have one value for each of the 20 examples"),
        ("std=0.0", "std above 0"),
        ("mean=(0.1, 0.2)", "mean must be one number, or one for each of 1 channels"),
        ("mean=float('nan')", "mean is not finite"),
    ],
)
def test_a_wrong_dataset_of_the_user_is_refused(tmp_path, changes, expected):
    assert expected in refusal(write_dataset(tmp_path, changes), dataset="mine:load")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return None", "must return a Dataset, (x, y) or (x, y, groups), got NoneType"),
        ("return [1, 2, 3, 4]", "got list of 4"),
        ("return x, y[:-1]", "y must have one value for each of the 20 examples, got int64 of shape (19,)"),
        ("return x, y, y[1:]", "groups must have one value for each of the 20 examples"),
        ("return x[:, 0], y", "x must be an array of numbers [n, ...], got float64 of shape (20,)"),
        ("return x[:, :0], y", "got float64 of shape (20, 0)"),
        ("return x.astype(str), y", "x must be an array of numbers"),
        ("return x * 1j, y", "got complex128"),
        ("return [[1, 2], [3]] * 10, y", "x is no array: ValueError"),
        ("x[7, 1] = np.nan; return x, y", "x is not finite (NaN, infinite or beyond float32) at index 7"),
        ("x[3, 0] = 1e300; return x, y", "at index 3"),
        ("return x, y + 0.5", "y must be integers or strings, got float64 of shape (20,) such as 0.5"),
        ("return x, np.full(20, np.nan)", "y must be integers or strings"),
        ("return x, [None] * 20", "y must be integers or strings, got object of shape (20,) such as None"),
        ("return x, y * 0 + 4", "at least 2 different labels, got only 4"),
        ("return x[:9], y[:9]", "at least 10 examples, got 9"),
        ("return x, y, extra", "failed: NameError: name 'extra' is not defined"),
        ("raise ValueError('two\\nlines')", "failed: ValueError: two lines"),
    ],
)
def test_wrong_values_of_the_user_are_refused(tmp_path, body, expected):
    folder = write(tmp_path, f"def load():\n    x, y = np.ones((20, 3)), np.arange(20) % 2\n    {body}")
    assert expected in refusal(folder, dataset="mine:load")


def test_what_is_not_a_function_or_takes_other_arguments_is_refused(tmp_path):
    folder = write(tmp_path, "table = [1]\ndef load(): pass")
    assert "must be a function, is list of 1" in refusal(folder, dataset="mine:table")
    assert "unexpected keyword argument 'n'" in refusal(folder, dataset="mine:load", params={"n": 1})
    assert "has no lead (did you mean load?)" in refusal(folder, dataset="mine:lead")


def test_labels_as_whole_floats_and_booleans_count_as_labels(tmp_path):
    body = "def load(kind): return np.ones((20, 3), bool), (np.arange(20) % 2).astype(kind)"
    assert load(write(tmp_path, body), dataset="mine:load", params={"kind": "float64"}).labels == ("0", "1")
    assert load(tmp_path, dataset="mine:load", params={"kind": "bool"}).labels == ("False", "True")


class Image:
    """A feature of that name, as Hugging Face's library has it."""


@dataclasses.dataclass
class ClassLabel:
    names: list[str]


class Split(dict):
    features: dict[str, object]


def split_of(n: int, channels: int, **more: list[object]) -> Split:
    rng = np.random.default_rng(n)
    images = list(rng.integers(0, 256, (n, 5, 7, channels) if channels > 1 else (n, 5, 7)).astype(np.uint8))
    split = Split(img=images, label=[index % 3 for index in range(n)], **more)
    split.features = {"img": Image(), "label": ClassLabel(["a", "b", "c"])} | dict.fromkeys(more, object())
    return split


@pytest.fixture
def hub(monkeypatch):
    """Flower Datasets, with the splits that a test puts in."""
    splits: dict[str, Split] = {}

    class FederatedDataset:
        def __init__(self, *, dataset, subset, partitioners, shuffle):
            self.asked = dataset, subset

        def load_split(self, name):
            if self.asked[0] != "some/pictures":
                raise ConnectionError(f"Couldn't reach {self.asked[0]}\non the Hub")
            if name not in splits:
                raise ValueError(f"The given split: '{name}' is not present")
            return splits[name]

    module = types.ModuleType("flwr_datasets")
    module.FederatedDataset = FederatedDataset
    monkeypatch.setitem(sys.modules, "flwr_datasets", module)
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "0")
    return splits


def test_flower_with_its_own_test_part(hub):
    hub |= {"train": split_of(30, 3), "test": split_of(9, 3)}
    dataset = load(dataset="flower:some/pictures")
    assert_sound(dataset)
    assert (dataset.name, dataset.labels) == ("flower:some/pictures", ("a", "b", "c"))
    assert (dataset.train.x.shape, dataset.test.x.shape) == ((30, 3, 5, 7), (9, 3, 5, 7))
    raw = dataset.test.x * np.array(dataset.std).reshape(3, 1, 1) + np.array(dataset.mean).reshape(3, 1, 1)
    np.testing.assert_allclose(raw[4, 2] * 255, hub["test"]["img"][4][:, :, 2], atol=1e-3)


def test_flower_without_a_test_part_and_with_owners(hub):
    hub["train"] = split_of(60, 1, writer=[f"w{index % 4}" for index in range(60)])
    dataset = load(dataset="flower:some/pictures", params={"owner": "writer"}, test_fraction=0.2)
    assert_sound(dataset)
    assert (dataset.train.x.shape, len(dataset.test)) == ((48, 1, 5, 7), 12)
    assert np.bincount(dataset.groups).tolist() == [12] * 4


def test_flower_refusals(hub):
    assert refusal(dataset="flower:absent").endswith("could not be loaded: ConnectionError: Couldn't reach absent on the Hub")
    hub["train"] = split_of(30, 1)
    pictures = {"dataset": "flower:some/pictures"}
    assert "unknown data.params: colour" in refusal(**pictures, params={"colour": 1})
    assert "data.params.owner must be one of the columns img, label" in refusal(**pictures, params={"owner": "writer"})
    assert "data.params.label must name a column of type ClassLabel" in refusal(**pictures, params={"label": "img"})
    hub["train"].features["fine"] = ClassLabel(["x"])
    assert "of which there are: label, fine" in refusal(**pictures)
    hub["train"] = split_of(30, 1)
    hub["train"]["label"][3] = -1
    assert "must be integers from 0 to 2" in refusal(**pictures)
    hub["train"] = split_of(30, 1)
    hub["train"]["img"][3] = np.zeros((4, 4), np.uint8)
    assert "one shape" in refusal(**pictures)


def test_flower_without_the_package_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "flwr_datasets", None)
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "0")
    assert 'pip install "flwr-datasets[vision]"' in refusal(dataset="flower:some/pictures")


def test_bytes_stay_bytes_and_mean_what_numbers_would(tmp_path):
    rng = np.random.default_rng(0)
    raw, values = rng.integers(0, 256, (30, 3, 4), np.uint8), rng.standard_normal((3, 256)).astype(np.float32)
    for meaning in (values, values[:1]):
        data = Examples(raw, np.arange(30) % 2, meaning)
        plain = Examples(np.stack([meaning[c % len(meaning)][raw[:, c]] for c in range(3)], 1), data.y)
        assert (data.x == plain.x).all()
        assert data.x.dtype == np.float32
        taken = data.take(np.array([7, 2]))
        assert taken.raw.dtype == np.uint8
        assert (taken.x == plain.x[[7, 2]]).all()
        for found, expected in zip(data.moments(), plain.moments(), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-12)
        shift, scale = np.array([0.5, -1, 2]), np.array([1, 2, 3.0])
        np.testing.assert_allclose(data.scaled(shift, scale).x, plain.scaled(shift, scale).x, rtol=1e-6)
        assert (np.concatenate([part.x for part in data.pieces()]) == plain.x).all()


def test_a_mapped_file_of_the_user_stays_one(tmp_path):
    for kind, dtype in (("bytes", np.uint8), ("floats", np.float32)):
        mapped = np.memmap(tmp_path / kind, dtype, "w+", shape=(20, 1, 4, 4))
        mapped[:] = np.arange(16).reshape(4, 4)
        changes = (
            f'train=Examples(np.memmap("{tmp_path / kind}", np.{dtype.__name__}, "r", shape=(20, 1, 4, 4)), y), '
            "test=Examples(np.ones((3, 1, 4, 4), np.uint8), y[:3])"
        )
        dataset = load(write_dataset(tmp_path, changes), dataset="mine:load")
        sys.modules.pop("mine", None)
        assert isinstance(dataset.train.raw, np.memmap)
        assert (dataset.train.x[3] == np.arange(16).reshape(4, 4)).all()
        assert dataset.test.raw.dtype == np.uint8
        assert (dataset.test.x == 1).all()


def test_bytes_of_the_user_are_the_numbers_they_are(tmp_path):
    write(tmp_path, "def load():\n    x = np.arange(20 * 12, dtype=np.uint8).reshape(20, 3, 4)\n    return x, np.arange(20) % 2")
    dataset = load(tmp_path, dataset="mine:load")
    assert dataset.train.raw.dtype == np.uint8
    assert sorted(np.concatenate([dataset.train.x, dataset.test.x])[:, 0, 0].tolist()) == [float(i * 12) for i in range(20)]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ("train=Examples(np.ones((20, 2, 2), np.uint8), y, np.ones((3, 256)))", "train.values must be of shape (1, 256) or (2,"),
        ("train=Examples(np.ones((20, 2, 2), np.uint8), y, np.full((1, 256), np.nan))", "train.values is not finite"),
        ("train=Examples(x, y, np.ones((1, 256)))", "train.x.values says what bytes mean, got float32"),
    ],
)
def test_what_bytes_mean_is_checked(tmp_path, changes, told):
    assert told.replace("train.values", "train.x.values") in refusal(write_dataset(tmp_path, changes), dataset="mine:load")
