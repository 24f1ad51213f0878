"""Buckets: the published list, the nearest one, and buckets too small for a batch."""

from pathlib import Path

import pytest

from dopsd_jax.data import buckets
from dopsd_jax.data.buckets import (
    Bucket,
    assign_buckets,
    check_fillable,
    make_buckets,
    nearest_bucket,
    parse_buckets,
)
from dopsd_jax.data.files import DataError
from dopsd_jax.data.rows import Row

PUBLISHED = (
    "1024x1024,1152x896,896x1152,1152x864,864x1152,1248x832,832x1248,"
    "1280x720,720x1280,1344x576,576x1344"
)


def text(buckets):
    return ",".join(map(str, buckets))


def assigned(rows, buckets):
    found = assign_buckets(((r.size, len(r.references)) for r in rows), buckets)
    return {bucket: list(members) for bucket, members in found.items()}


def row(width, height):
    return Row("row", (Path("a.jpg"),), {"caption": "a cat"}, (width, height), None)


def test_published_buckets():
    assert text(buckets.PUBLISHED) == PUBLISHED


def test_buckets_at_1024_are_the_published_ones():
    assert make_buckets(1024) == buckets.PUBLISHED


def test_buckets_at_512_are_half_the_published_ones_rounded_to_16():
    assert text(make_buckets(512)) == (
        "512x512,576x448,448x576,576x432,432x576,624x416,416x624,640x368,368x640,672x288,288x672"
    )


@pytest.mark.parametrize("resolution", [64, 128, 256, 512, 768, 1024, 1536])
@pytest.mark.parametrize("multiple", [16, 32])
def test_made_buckets_are_distinct_multiples_near_the_published_shapes(resolution, multiple):
    made = make_buckets(resolution, multiple)
    assert made[0] == Bucket(resolution, resolution)
    assert len(set(made)) == len(made)
    for bucket in made:
        assert bucket.width % multiple == bucket.height % multiple == 0
        assert min(bucket.width, bucket.height) >= multiple


def test_small_resolutions_drop_duplicates():
    assert text(make_buckets(64)) == "64x64,80x64,64x80,80x48,48x80,80x32,32x80"


@pytest.mark.parametrize(("resolution", "multiple"), [(8, 16), (0, 16), (64, 0)])
def test_impossible_resolution_is_refused(resolution, multiple):
    with pytest.raises(ValueError, match="expected resolution >= multiple >= 1, got resolution"):
        make_buckets(resolution, multiple)


def test_buckets_are_parsed_width_first():
    assert parse_buckets("512x512, 768x512") == (Bucket(512, 512), Bucket(768, 512))


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("", "'': expected WIDTHxHEIGHT"),
        ("512", "'512': expected WIDTHxHEIGHT"),
        ("512x512,", "'': expected WIDTHxHEIGHT"),
        ("-16x16", "'-16x16': expected WIDTHxHEIGHT"),
        ("0x512", "0x512: expected sides that are multiples of 16"),
        ("512x520", "512x520: expected sides that are multiples of 16"),
        ("512x512,512x512", "512x512: has the shape of 512x512, which comes first"),
        ("512x256,64x64,1024x512", "1024x512: has the shape of 512x256, which comes first"),
        ("5x5,6", "5x5: expected sides that are multiples of 16; '6': expected WIDTHxHEIGHT"),
    ],
)
def test_bad_bucket_list_is_refused(written, expected):
    with pytest.raises(ValueError) as caught:
        parse_buckets(written)
    assert expected in str(caught.value)
    assert 'expected a list like "512x512,768x512"' in str(caught.value)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((500, 500), "1024x1024"),
        ((1264, 832), "1248x832"),
        ((832, 1264), "832x1248"),
        ((1773, 2364), "864x1152"),
        ((4000, 3000), "1152x864"),
        ((1920, 1080), "1280x720"),
        ((10000, 10), "1344x576"),
        ((10, 10000), "576x1344"),
        ((128, 96), "1152x864"),
    ],
)
def test_nearest_bucket_by_log_aspect(size, expected):
    assert str(nearest_bucket(size, buckets.PUBLISHED)) == expected


def test_first_bucket_wins_a_tie():
    wide, tall = Bucket(64, 32), Bucket(32, 64)
    assert nearest_bucket((100, 100), (wide, tall)) == wide
    assert nearest_bucket((100, 100), (tall, wide)) == tall


def test_distance_is_that_of_logarithms():
    # 1.45 lies nearer to 1 by difference, but nearer to 2 by ratio.
    assert nearest_bucket((145, 100), (Bucket(64, 64), Bucket(128, 64))) == Bucket(128, 64)


def test_rows_are_assigned_in_bucket_order_without_empty_buckets():
    rows = [row(90, 160), row(10, 10), row(160, 90), row(20, 20)]
    assignment = assigned(rows, buckets.PUBLISHED)
    assert {str(b): i for b, i in assignment.items()} == {
        "1024x1024": [1, 3], "1280x720": [2], "720x1280": [0]
    }  # fmt: skip
    assert list(assignment) == [b for b in buckets.PUBLISHED if b in assignment]


def test_small_buckets_are_refused_with_their_counts_and_the_choices():
    assignment = {Bucket(64, 64): [0, 1, 2, 3], Bucket(80, 48): [4], Bucket(48, 80): [5, 6]}
    with pytest.raises(DataError) as caught:
        check_fillable(assignment, 4, "error")
    assert str(caught.value) == (
        "expected at least batch_size = 4 rows in every bucket, got 1 in 80x48, 2 in 48x80; choose "
        'batch_size <= 1, another list of buckets, or small_buckets="repeat" to repeat rows '
        "within a batch"
    )
    check_fillable(assignment, 1, "error")
    check_fillable(assignment, 4, "repeat")


def test_unknown_policy_is_refused():
    with pytest.raises(ValueError, match='expected "error" or "repeat", got \'drop\''):
        check_fillable({Bucket(64, 64): [0]}, 1, "drop")


def test_the_number_of_references_splits_what_the_targets_size_chose():
    def edit(width, height, references):
        images = tuple(Path(f"{i}.jpg") for i in range(references + 1))
        return Row("row", images, {"caption": "x"}, (width, height), None)

    rows = [edit(512, 512, 2), edit(768, 512, 1), edit(500, 520, 1), edit(511, 512, 2)]
    assignment = assigned(rows, parse_buckets("768x512,512x512"))
    assert list(assignment.items()) == [
        (Bucket(768, 512, 1), [1]), (Bucket(512, 512, 1), [2]), (Bucket(512, 512, 2), [0, 3]),
    ]
    with pytest.raises(DataError, match=r"got 1 in 768x512 with 1 reference\(s\), 1 in 512x512 w"):
        check_fillable(assignment, 2, "error")
