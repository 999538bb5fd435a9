"""Golden files: committed bytes, read value by value; a change of the format must change them knowingly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors

from mpo_formats import MpoFile, reference
from mpo_formats.layout import file_tensors
from mpo_formats.spec import BITS, Dense, Mpo, Quantized
from tests.formats import tiny
from tests.golden import generate

FOLDER = Path(__file__).parent
FEATURES = generate.features()
# A few values by hand, so that no array file has to be trusted: file, layer, row, column, value.
SPOTS = [
    ("int8", tiny.QUERY, 3, 7, 80.859375),
    ("int8", generate.OUT, 31, 15, 13.140625),
    ("int6", tiny.QUERY, 3, 7, 11.953125),
    ("int5", tiny.QUERY, 3, 7, -4.21875),
    ("int4", tiny.QUERY, 3, 7, -4.453125),
    ("int4", generate.OUT, 0, 0, 2.1875),
    ("int3", tiny.QUERY, 3, 7, 0.1171875),
    ("int2", tiny.QUERY, 3, 7, -0.46875),
    ("dense-bf16", tiny.QUERY, 3, 7, 1.375),
    ("mpo-2-cores", tiny.QUERY, 3, 7, -3.40625),
    ("mpo-3-cores", tiny.QUERY, 15, 31, -1.09423828125),
    ("mpo-int8", tiny.QUERY, 0, 0, 817.767822265625),
    ("mpo-int4", tiny.GATE, 3, 7, -5.87274169921875),
    ("sum", tiny.QUERY, 15, 31, -0.67578125),
]


@pytest.fixture(scope="module")
def expected() -> dict[str, generate.Matrix]:
    """The matrices that were computed when the files were made."""
    with np.load(FOLDER / "expected.npz") as stored:
        return dict(stored)


@pytest.mark.parametrize("name", FEATURES)
def test_every_value_is_the_expected_one(name: str, expected: dict[str, generate.Matrix]) -> None:
    mine = {key.partition("/")[2]: value for key, value in expected.items() if key.startswith(f"{name}/")}
    assert "model.norm.weight" in mine
    with MpoFile(FOLDER / f"{name}.mpo", verify=True) as file:
        assert file.spec == FEATURES[name]
        layers = {linear.name: linear for linear in file.spec.linears}
        for key, value in mine.items():
            found = reference.matrix(file, layers[key]) if key in layers else reference.float_tensor(file, key)
            assert found.dtype == value.dtype == np.float64
            assert np.array_equal(found, value), key
        for key, content in generate.FILES.items():
            assert file.file(key) == (content if name == "files-certificate" else None)
        assert file.certificates() == generate.certificates(name)


@pytest.mark.parametrize(("name", "layer", "row", "column", "value"), SPOTS)
def test_values_by_hand(name: str, layer: str, row: int, column: int, value: float) -> None:
    with MpoFile(FOLDER / f"{name}.mpo") as file:
        assert reference.matrix(file, file.spec.linear(layer))[row, column] == value


def test_generating_again_gives_the_same_bytes(tmp_path: Path, expected: dict[str, generate.Matrix]) -> None:
    generate.main(tmp_path)
    for name in FEATURES:
        assert (tmp_path / f"{name}.mpo").read_bytes() == (FOLDER / f"{name}.mpo").read_bytes(), name
    with np.load(tmp_path / "expected.npz") as again:
        assert set(again) == set(expected)
        assert all(np.array_equal(again[key], value) for key, value in expected.items())


def test_there_is_a_small_file_for_every_feature_and_no_other() -> None:
    files = {path.stem: path.stat().st_size for path in FOLDER.glob("*.mpo")}
    assert set(files) == set(FEATURES)
    assert max(files.values()) < 40_000
    terms = {term for spec in FEATURES.values() for linear in spec.linears for term in linear.terms}
    assert {(term.bits, term.zeros) for term in terms if isinstance(term, Quantized)} >= {
        (bits, zeros) for bits in BITS for zeros in (False, True)
    }
    assert {term.dtype for term in terms if isinstance(term, Dense)} == {"f32", "f16", "bf16"}
    operators = [term for term in terms if isinstance(term, Mpo)]
    assert {len(term.out_dims) for term in operators} == {2, 3}
    assert {term.dtype for term in operators} == {"f32", "f16", "bf16", "int8", "int4"}


@pytest.mark.parametrize("name", FEATURES)
def test_stock_safetensors_reads_the_same_bytes(name: str) -> None:
    path = FOLDER / f"{name}.mpo"
    stock = dict(safetensors.deserialize(path.read_bytes()))
    with MpoFile(path) as file:
        assert set(stock) == {tensor.name for tensor in file_tensors(file.spec)}
        assert all(bytes(row["data"]) == file.array(key).tobytes() for key, row in stock.items())
