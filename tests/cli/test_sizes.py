"""Byte sizes as people write them."""

import pytest

from finebits import sizes


@pytest.mark.parametrize(
    ("text", "bytes"),
    [
        ("400MiB", 400 << 20),
        ("8GiB", 8 << 30),
        ("6 GB", 6 * 10**9),
        ("1.5gib", 3 << 29),
        (" 12 kB ", 12000),
        ("512", 512),
        (7, 7),
        (".5 KiB", 512),
    ],
)
def test_a_size_is_read_in_its_unit(text, bytes):
    assert sizes.parse(text) == bytes


@pytest.mark.parametrize("text", ["", "MiB", "4 potatoes", "-3MiB", "1e3MiB", "0", "0.1 B", 0, -5])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="is wanted"):
        sizes.parse(text)


def test_a_letter_alone_is_asked_which_unit_it_means():
    with pytest.raises(ValueError, match="write 8GiB .* or 8GB"):
        sizes.parse("8G")


@pytest.mark.parametrize("size", [1, 1023, 1024, 400 << 20, 3 << 29, 8 << 30, 5 << 40])
def test_what_is_shown_reads_back(size):
    assert sizes.parse(sizes.show(size)) == size


def test_sizes_are_shown_in_the_unit_that_fits():
    assert [sizes.show(n) for n in (0, 12, 400 << 20, 6e9, 419430401, -2048)] == [
        "0 B",
        "12 B",
        "400 MiB",
        "5.59 GiB",
        "400.0 MiB",
        "-2 KiB",
    ]


def test_a_share_is_a_percentage_or_a_size():
    assert sizes.share("5%", 1000) == 50
    assert sizes.share("1KiB", 4096) == 1024
    assert sizes.share("0", 10) == sizes.share("0%", 10) == 0


@pytest.mark.parametrize("text", ["100%", "-1%", "x%", "2KiB", "much"])
def test_a_share_leaves_something(text):
    with pytest.raises(ValueError):
        sizes.share(text, 2048)
