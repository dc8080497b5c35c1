import contextlib
import hashlib
import itertools
import tarfile

import pytest

from shike_fast.data.pack.format import Manifest, decode_json
from shike_fast.data.pack.shards import ShardWriter, _plain_jpeg


def test_an_archive_depends_on_its_members_alone(tmp_path):
    records = []
    for path, _ in itertools.product([tmp_path / "a.tar", tmp_path / "b.tar"], range(2)):
        with open(path, "wb") as file:
            writer = ShardWriter(file)
            offsets = [writer.add("00001/a.jpg", b"x" * 700), writer.add("00002/b.jpg", b"")]
            records.append(writer.close("x.tar"))
    content = path.read_bytes()
    assert len(set(map(repr, records))) == 1
    assert (records[0].bytes, records[0].sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert offsets == [512, 512 + 1024 + 512]
    with contextlib.closing(tarfile.open(path)) as archive:
        assert [(member.name, member.size) for member in archive] == [("00001/a.jpg", 700), ("00002/b.jpg", 0)]


def test_a_jpeg_that_pillow_does_not_understand_is_encoded_anew():
    assert not _plain_jpeg(b"\xff\xd8\xff")


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"version":' * 100_000, b"[" * 100_000 + b"]" * 100_000])
@pytest.mark.parametrize("kind", [dict, Manifest])
def test_json_that_is_nested_too_deeply(content, kind):
    with pytest.raises(ValueError, match="nested too deeply"):
        decode_json(content, kind)
