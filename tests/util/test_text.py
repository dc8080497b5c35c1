from shike_fast._util.text import printable, quoted


def test_what_a_message_shows_of_a_file():
    assert quoted(b"caf\xc3\xa9") == "'café'"
    assert quoted(b"caf\xe9") == r"'caf\xe9'"
    assert quoted(b"a\nb\xc2\xa0c") == r"'a\nb\xa0c'"
    assert printable(b"a b\xff\n") == r"a b\xff\n"
    assert len(quoted(b"x" * 10_000)) == 102
