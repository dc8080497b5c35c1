import datetime
import os
import pickle

import numpy as np
import pytest

from shike_fast.data.datasets.pickles import load_dictionary


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("dtype", ["u1", "?", "<i8", ">i4", "<f4", "f8"])
def test_arrays_and_containers_come_back_at_every_protocol(protocol, dtype):
    array = np.arange(24).reshape(4, 6).astype(dtype)
    content = {"data": array, "turned": np.asfortranarray(array), "labels": [1, 2], "nested": {"a": (1.5, None, "x")}}
    loaded = load_dictionary(pickle.dumps(content, protocol=protocol), "file")
    for name in ("data", "turned"):
        np.testing.assert_array_equal(loaded[name], array)
        assert loaded[name].dtype == array.dtype
    assert loaded["labels"] == [1, 2]
    assert loaded["nested"]["a"][:2] == (1.5, None)


def test_the_names_that_numpy_1_wrote():
    content = pickle.dumps({"data": np.arange(3, dtype=np.uint8)}, protocol=2)
    assert b"numpy._core.multiarray" in content
    loaded = load_dictionary(content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"), "file")
    assert loaded["data"].tolist() == [0, 1, 2]


def test_what_python_2_wrote():
    """Byte strings for keys, type codes and pixels, as in the published archives."""
    content = (
        b"\x80\x02}U\x04data"
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x02K\x03\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89U\x06\x00\x01\x02\x03\x04\xfftb"
        b"s."
    )
    loaded = load_dictionary(content, "file")
    assert loaded["data"].tolist() == [[0, 1, 2], [3, 4, 255]]


class Command:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_nothing_is_executed(tmp_path, monkeypatch, protocol, data_error):
    monkeypatch.chdir(tmp_path)
    with data_error("batch_1", "system", "do not trust this file"):
        load_dictionary(pickle.dumps({"data": Command()}, protocol=protocol), "batch_1")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"c__builtin__\ngetattr\n.",
        b"cnumpy\nload\n(S'x'\ntR.",
        b"cnumpy.core.multiarray\nscalar\n.",
        b"\x80\x02cos\nsystem\nU\x04true\x85R.",
        pickle.dumps({"when": datetime.date(2024, 1, 1)}),
        pickle.dumps({"many": {1, 2}}, protocol=2),  # sets take a name below protocol 4
        pickle.dumps({"n": np.float64(1.5)}),
    ],
)
def test_other_names_are_refused(content, data_error):
    with data_error("file", "UnpicklingError: it names"):
        load_dictionary(content, "file")


@pytest.mark.parametrize(
    "array",
    [
        np.array([None, []], dtype=object),
        np.array(["text"]),
        np.zeros(2, dtype=[("a", "u1")]),
        np.array(["2024"], "M8[s]"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 5])
def test_only_arrays_of_numbers(array, protocol, data_error):
    with data_error("file", "not a pickled dictionary of arrays"):
        load_dictionary(pickle.dumps({"data": array}, protocol=protocol), "file")


@pytest.mark.parametrize(
    "state",
    [
        "(K\x01J\x00\x00\x00\x40\x85cnumpy\ndtype\nU\x02u1\x85R\x89U\x01xtb",  # claims 2**30 elements
        "(K\x01K\x01\x85U\x01x\x89U\x01xtb",  # a string for a type
        "(K\x01K\x01\x85tb",  # too short
    ],
)
def test_array_states_that_do_not_fit(state, data_error):
    content = b"\x80\x02}U\x04datacnumpy.core.multiarray\n_reconstruct\n)R" + state.encode("latin1") + b"s."
    with data_error("file", "not a pickled dictionary of arrays"):
        load_dictionary(content, "file")


def test_the_stand_ins_cannot_be_altered(data_error):
    """BUILD on one of the callables would set attributes if it had any."""
    content = b"\x80\x02cnumpy\ndtype\nN}U\x08__call__K\x01s\x86b."
    with data_error("file"):
        load_dictionary(content, "file")
    assert load_dictionary(pickle.dumps({"data": np.zeros(1)}), "file")["data"].tolist() == [0]


def test_bytes_in_a_code_other_than_latin_1(data_error):
    content = b"\x80\x02}U\x04datac_codecs\nencode\nX\x01\x00\x00\x00aU\x03zip\x86Rs."
    with data_error("file", "bytes encoded as b'zip'"):
        load_dictionary(content, "file")


@pytest.mark.parametrize("content", [b"", b"not a pickle", pickle.dumps({"data": np.arange(99)})[:-20], b"\x80\x7f."])
def test_damaged_pickles(content, data_error):
    with data_error("file", "not a pickled dictionary of arrays", "obtain it again"):
        load_dictionary(content, "file")


def test_anything_but_a_dictionary(data_error):
    with data_error("file", "it holds a list, not a dictionary"):
        load_dictionary(pickle.dumps([1, 2]), "file")
