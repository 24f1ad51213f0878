"""Rows that keep: which prompts they take, and what a file of prompts may hold."""

from collections import Counter

import pytest

from dopsd_jax.data.batches import BatchPlan
from dopsd_jax.data.buckets import Bucket
from dopsd_jax.data.files import DataError
from dopsd_jax.data.keeping import (
    PlanWithKept,
    all_prompts,
    fingerprint,
    kept_rows,
    read_kept,
    read_prompts,
)

PROMPTS = tuple(f"prompt {i}" for i in range(5))


def make_plan(count, batch_size=4, seed=0, kept=(PROMPTS,)):
    rows = BatchPlan(
        {Bucket(64, 64): range(7)}, lambda row: ("caption",), seed=seed,
        batch_size=max(batch_size - count, 1),
    )
    return PlanWithKept(rows, kept, batch_size=batch_size, count=count, seed=seed), rows


@pytest.mark.parametrize("count", [1, 3, 4])
def test_the_last_rows_keep_and_the_others_are_those_of_the_data(count):
    plan, data = make_plan(count)
    for step in range(6):
        batch, learned = plan.at(step), data.at(step)
        assert len(batch.rows) == len(batch.caption_keys) == len(batch.kept) == 4
        assert batch.rows[: 4 - count] == learned.rows[: 4 - count]
        assert [bool(p) for p in batch.kept] == [False] * (4 - count) + [True] * count
        assert set(batch.rows) <= set(learned.rows)  # no row of data is seen less often for it


def test_every_prompt_comes_equally_often_in_an_order_of_the_seed():
    def prompts(seed, steps):
        plan, _ = make_plan(3, seed=seed)
        return [p for step in steps for p in plan.at(step).kept if p]

    assert Counter(prompts(0, range(50))) == dict.fromkeys(PROMPTS, 30)
    assert sorted(prompts(0, range(5))[:5]) == sorted(PROMPTS)
    assert prompts(0, range(9, 20)) == prompts(0, range(20))[9 * 3 :] != prompts(1, range(9, 20))


def test_files_take_turns_however_many_prompts_they_hold():
    few = ("few 0", "few 1")
    plan, _ = make_plan(3, kept=(PROMPTS, few))
    alone, _ = make_plan(3)
    kept = [p for step in range(40) for p in plan.at(step).kept if p]
    assert Counter(kept[::2]) == dict.fromkeys(PROMPTS, 12)
    assert Counter(kept[1::2]) == dict.fromkeys(few, 30)
    # A second file changes nothing in the order of the first.
    assert kept[::2] == [p for step in range(20) for p in alone.at(step).kept if p]


def test_a_process_takes_its_rows_with_their_prompts():
    plan, _ = make_plan(2)
    batch = plan.at(3)
    part = batch.take([1, 3])
    assert part.kept == ("", batch.kept[3]) and part.rows == (batch.rows[1], batch.rows[3])


def test_epochs_count_the_rows_of_data_alone():
    plan, _ = make_plan(3)
    assert plan.epochs(7) == 1 and make_plan(4)[0].epochs(7) == 0


def test_a_share_is_a_whole_number_of_rows():
    assert [kept_rows(8, share) for share in (0, 0.125, 0.25, 1)] == [0, 1, 2, 8]
    assert kept_rows(10, 0.3) == 3 and kept_rows(3, 1 / 3) == 1
    with pytest.raises(ValueError, match="whole number of the batch's 4 rows, such as 0.25, got"):
        kept_rows(4, 0.2)
    with pytest.raises(ValueError, match="such as 1, got 0.25; a larger batch_size"):
        kept_rows(1, 0.25)


def test_a_file_holds_a_prompt_in_each_line(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa red fox\r\n\r\n  a lighthouse  \r\na red fox\r\n".encode())
    prompts = read_prompts(file)
    assert prompts == ("a red fox", "a lighthouse")
    assert fingerprint([prompts]) != fingerprint([prompts[::-1]])


def test_several_files_are_named_with_commas(tmp_path):
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text("a red fox\na lighthouse\n")
    two.write_text("a lighthouse\na tram\n")
    kept = read_kept(f"{one}, {two}")
    assert kept == (("a red fox", "a lighthouse"), ("a lighthouse", "a tram"))
    assert all_prompts(kept) == ("a red fox", "a lighthouse", "a tram")
    assert len({fingerprint(k) for k in (kept, kept[::-1], kept[:1], kept[1:])}) == 4
    with pytest.raises(DataError, match="every file once, got .*one.txt twice"):
        read_kept(f"{one},{two},{one}")
    with pytest.raises(DataError, match="expected paths between commas, got"):
        read_kept(f"{one},")
    with pytest.raises(DataError, match="found none at"):
        read_kept(f"{one},{tmp_path}/none.txt")


@pytest.mark.parametrize("content, message", [
    (None, "expected a text file with a prompt in each line, found none at"),
    (b" \n\n", "expected a prompt in each line, found none"),
    (b"caf\xe9\n", "expected UTF-8 text, byte 3 is not"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n", "git lfs pull"),
])
def test_other_files_are_refused_by_name(tmp_path, content, message):
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_prompts(file)
