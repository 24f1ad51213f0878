"""Batches: a pure function of (seed, step, process) that sees every row equally often."""

import itertools
import random
import time
from collections import Counter

import numpy as np
import pytest

from dopsd_jax.data.batches import BatchPlan
from dopsd_jax.data.buckets import Bucket

SQUARE, WIDE, TALL = Bucket(64, 64), Bucket(80, 48), Bucket(48, 80)
ASSIGNMENT = {SQUARE: list(range(0, 12)), WIDE: list(range(12, 20)), TALL: list(range(20, 24))}
CYCLE = 3 + 2 + 1  # batches, since 12 : 8 : 4 = 3 : 2 : 1
CAPTIONS = [("short_en", "short_zh", "caption")] * 23 + [("caption",)]


def make_plan(assignment=ASSIGNMENT, captions=CAPTIONS, *, batch_size=4, seed=0):
    return BatchPlan(assignment, captions.__getitem__, batch_size=batch_size, seed=seed)


def rows_of(plan, steps, bucket=None):
    batches = [plan.at(step) for step in steps]
    return [row for b in batches if bucket in (None, b.bucket) for row in b.rows]


def test_batches_do_not_depend_on_the_order_they_are_asked_for():
    steps = list(range(100))
    forward = [make_plan().at(step) for step in steps]
    shuffled = random.Random(0).sample(steps, len(steps))
    plan = make_plan()
    anyhow = {step: plan.at(step) for step in shuffled}
    assert [anyhow[step] for step in steps] == forward


def test_batches_do_not_depend_on_global_random_state():
    np.random.seed(1)
    random.seed(1)
    first = [make_plan().at(step) for step in range(10)]
    np.random.seed(2)
    random.seed(2)
    assert [make_plan().at(step) for step in range(10)] == first


def test_order_is_the_one_runs_have_been_started_with():
    # If this changes, an interrupted run resumes with other data than it would have seen.
    assert [make_plan(seed=7).at(step).rows for step in range(3)] == [
        (13, 17, 16, 18),
        (12, 15, 19, 14),
        (9, 5, 11, 6),
    ]


def test_a_batch_holds_rows_and_captions_of_one_bucket():
    plan = make_plan()
    for step in range(3 * CYCLE):
        batch = plan.at(step)
        assert len(batch.rows) == len(batch.caption_keys) == 4
        assert set(batch.rows) <= set(ASSIGNMENT[batch.bucket])
        assert all(k in CAPTIONS[r] for r, k in zip(batch.rows, batch.caption_keys, strict=True))


@pytest.mark.parametrize("batch_size", [1, 3, 4, 5, 7, 30])
@pytest.mark.parametrize("counts", [(12, 8, 4), (5, 3, 1), (1, 1, 1), (10, 7, 7)])
def test_every_row_is_seen_equally_often_over_whole_cycles(batch_size, counts):
    edges = [0, *itertools.accumulate(counts)]
    assignment = {
        bucket: list(range(*edges[i : i + 2])) for i, bucket in enumerate((SQUARE, WIDE, TALL))
    }
    plan = make_plan(assignment, [("caption",)] * edges[-1], batch_size=batch_size)
    shared = np.gcd.reduce(counts)
    steps = sum(counts)  # `shared` cycles
    seen = Counter(rows_of(plan, range(steps)))
    assert seen == dict.fromkeys(range(edges[-1]), batch_size)
    assert plan.epochs(steps) == batch_size
    # A single cycle gives every row batch_size / shared visits, rounded down or up.
    seen = Counter(rows_of(plan, range(steps // shared)))
    visits = [seen[row] for row in range(edges[-1])]
    assert max(visits) - min(visits) <= 1


def test_a_cycle_holds_batches_in_proportion_to_rows():
    plan = make_plan()
    for cycle in range(5):
        steps = range(cycle * CYCLE, (cycle + 1) * CYCLE)
        counts = Counter(plan.at(step).bucket for step in steps)
        assert counts == {SQUARE: 3, WIDE: 2, TALL: 1}


def test_cycles_differ_in_order():
    plan = make_plan()
    orders = {tuple(plan.at(cycle * CYCLE + i).bucket for i in range(CYCLE)) for cycle in range(10)}
    assert len(orders) > 5


def test_every_epoch_of_a_bucket_is_another_permutation():
    stream = rows_of(make_plan(), range(10 * CYCLE), SQUARE)
    epochs = [tuple(stream[i : i + 12]) for i in range(0, len(stream), 12)]
    assert all(sorted(epoch) == ASSIGNMENT[SQUARE] for epoch in epochs)
    assert len(set(epochs)) == len(epochs) == 10


def test_buckets_of_equal_size_have_different_permutations():
    assignment = {SQUARE: list(range(50)), WIDE: list(range(50, 100))}
    plan = make_plan(assignment, [("caption",)] * 100, batch_size=50)
    square, wide = (rows_of(plan, range(2), bucket) for bucket in (SQUARE, WIDE))
    assert square != [row - 50 for row in wide]


def test_a_batch_may_span_epochs_and_drops_nothing():
    plan = make_plan({SQUARE: [5, 6, 7]}, [("caption",)] * 8, batch_size=4)
    stream = rows_of(plan, range(3))
    assert [sorted(stream[i : i + 3]) for i in range(0, 12, 3)] == [[5, 6, 7]] * 4


def test_a_bucket_smaller_than_a_batch_repeats_its_rows():
    plan = make_plan({SQUARE: [0, 1]}, CAPTIONS, batch_size=5)
    assert sorted(plan.at(0).rows + plan.at(1).rows) == [0] * 5 + [1] * 5


def test_other_seeds_differ():
    plans = [[make_plan(seed=seed).at(step) for step in range(CYCLE)] for seed in range(5)]
    assert all(a != b for a, b in itertools.combinations(plans, 2))


def test_large_seeds_differ_from_small_ones():
    assert make_plan(seed=2**32 + 1).at(0) != make_plan(seed=1).at(0)


def test_captions_are_drawn_uniformly_per_row():
    plan = make_plan({SQUARE: list(range(12))}, CAPTIONS, batch_size=12)
    batches = [plan.at(step) for step in range(500)]
    counts = Counter(key for batch in batches for key in batch.caption_keys)
    assert set(counts) == set(CAPTIONS[0])
    # 6,000 draws: 2,000 each with a standard deviation of 37.
    assert all(abs(count - 2000) < 150 for count in counts.values())
    assert sum(len(set(batch.caption_keys)) > 1 for batch in batches) > 490


def test_two_processes_share_the_global_batch():
    first, second, whole = make_plan(), make_plan(), make_plan()
    for step in range(3 * CYCLE):
        a, b, batch = first.local(step, 0, 2), second.local(step, 1, 2), whole.at(step)
        assert a.bucket == b.bucket == batch.bucket
        assert a.rows + b.rows == batch.rows
        assert a.caption_keys + b.caption_keys == batch.caption_keys


@pytest.mark.parametrize(("process", "processes"), [(0, 3), (2, 2), (-1, 2)])
def test_impossible_share_is_refused(process, processes):
    expected = f"multiple of the {processes} processes .* batch_size 4, process {process}"
    with pytest.raises(ValueError, match=expected):
        make_plan().local(0, process, processes)


def test_epochs_count_rows_seen():
    assert make_plan().epochs(0) == 0
    assert make_plan().epochs(CYCLE) == 1.0
    assert make_plan().epochs(1) == pytest.approx(4 / 24)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="expected batch_size >= 1 and seed >= 0, got 0 and 0"):
        make_plan(batch_size=0)
    with pytest.raises(ValueError, match="expected batch_size >= 1 and seed >= 0, got 4 and -1"):
        make_plan(seed=-1)
    with pytest.raises(ValueError, match="expected at least one bucket, and rows in each"):
        make_plan({SQUARE: []})
    with pytest.raises(ValueError, match="expected at least one bucket"):
        make_plan({})
    with pytest.raises(ValueError, match="expected step >= 0, got -1"):
        make_plan().at(-1)


def test_a_million_rows_are_planned_quickly():
    million = 10**6
    assignment = {SQUARE: range(0, 600_001), WIDE: range(600_001, million)}
    plan = make_plan(assignment, [("caption",)] * million, batch_size=256)
    start = time.monotonic()
    for step in (0, 10**9, 5):
        plan.at(step)
    for step in range(1000):
        plan.at(step)
    assert time.monotonic() - start < 10  # about 1 s; a slow machine may take longer


def test_buckets_that_differ_in_references_alone_have_orders_of_their_own():
    one, two = Bucket(64, 64, 1), Bucket(64, 64, 2)
    plan = make_plan({one: list(range(0, 12)), two: list(range(12, 24))})
    first, second = (
        rows_of(plan, range(6), bucket) for bucket in (one, two)
    )
    assert sorted(first) == list(range(12)) and sorted(second) == list(range(12, 24))
    assert first != [row - 12 for row in second]


def test_weights_set_each_data_sets_share_and_every_row_of_one_is_seen_equally_often():
    assignment = {SQUARE: [*range(0, 10), *range(20, 24)], WIDE: [*range(10, 20), 24, 25]}
    plan = BatchPlan(assignment, lambda row: ("caption",), batch_size=4, seed=0,
                     sizes=[20, 6], weights=[1, 3])
    seen = Counter(rows_of(plan, range(6000)))
    total = sum(seen.values())
    assert sum(seen[row] for row in range(20, 26)) / total == pytest.approx(0.75, abs=0.005)
    for rows in (range(20), range(20, 26)):
        counts = [seen[row] for row in rows]
        assert max(counts) / min(counts) < 1.02


def test_weighted_batches_are_a_function_of_the_step_and_mix_data_sets():
    def make():
        return BatchPlan({SQUARE: range(12)}, lambda row: ("caption",), batch_size=4, seed=0,
                         sizes=[8, 4], weights=[1, 1])

    forward = [make().at(step).rows for step in range(50)]
    plan = make()
    assert [plan.at(step).rows for step in reversed(range(50))] == forward[::-1]
    assert any({row < 8 for row in rows} == {True, False} for rows in forward)
    # Within a data set no row comes again before all others came.
    small = [row for rows in forward for row in rows if row >= 8]
    assert all(len(set(small[i : i + 4])) == 4 for i in range(0, len(small) - 3, 4))


def test_a_data_set_of_tiny_weight_is_still_seen():
    plan = BatchPlan({SQUARE: range(12)}, lambda row: ("caption",), batch_size=4, seed=0,
                     sizes=[8, 4], weights=[1, 1e-6])
    assert any(row >= 8 for row in rows_of(plan, range(1100)))
