"""Methods over sequences of tasks: the arithmetic, what is asked of each trial, and a whole run."""

import json

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import mini_continual
from dopsd_jax import continual, tasks
from dopsd_jax.compare import continual as figures
from dopsd_jax.compare import jobs, sequences
from dopsd_jax.compare.continual import Results, mean_of
from dopsd_jax.compare.measures import OLD
from dopsd_jax.compare.sequences import Trials
from dopsd_jax.compare.stats import crossed_interval
from dopsd_jax.core import cli
from dopsd_jax.mini import judge
from dopsd_jax.weights import shipped

TRAININGS, TASKS, THINGS = 4, 3, 4


@pytest.fixture
def results():
    """Styles 0, 1, 2 learned in this order, and in 2, 0, 1, by turns; accuracies tell the place."""
    orders = [[0, 1, 2], [2, 0, 1]] * 2
    position = np.argsort(orders, axis=1)
    style = np.full((TRAININGS, TASKS, TASKS, THINGS), np.nan)
    for r, order in enumerate(orders):
        for i in range(TASKS):
            for j in order[: i + 1]:  # after task i: 1 - a tenth for each task since it was learned
                style[r, i, j] = 1 - 0.1 * (i - position[r][j])
    style += 0.01 * np.arange(TRAININGS)[:, None, None, None]
    old = np.zeros((TRAININGS, TASKS, 5)) + np.array([0.9, 0.8, 0.7])[:, None]
    old[:, :2, 2:] = np.nan  # drawn at the end alone
    return Results(position, style, style, old, old, old)


def test_what_was_learned_and_what_became_of_it(results):
    of_training = 0.01 * np.arange(TRAININGS)
    learned = results.learned(results.style)
    assert learned.shape == (TRAININGS, TASKS, THINGS)
    np.testing.assert_allclose(learned[:, 2, 3], 1 + of_training)
    # At the end styles are 2, 1, 0 and 1, 0, 2 tasks old.
    end = results.at_end(results.style).reshape(TRAININGS, TASKS, THINGS)
    np.testing.assert_allclose(end[:2, :, 0], [[0.8, 0.9, 1.0], [0.91, 1.01, 0.81]])
    np.testing.assert_allclose(results.at_end(results.old), 0.7)
    # The last style of an order has no transfer there.
    transfer = results.transfer(results.style).reshape(TRAININGS, TASKS, THINGS)
    np.testing.assert_allclose(transfer[:2, :, 0], [[-0.2, -0.1, np.nan], [-0.1, np.nan, -0.2]])
    found = mean_of(results.transfer(results.style))
    np.testing.assert_allclose(found.value, np.mean([-0.15, -0.1, -0.2]))
    assert found.low < found.value < found.high
    # Every training counts alike, not every style, of which some come last more often.
    lost = np.full((2, 3), np.nan)
    lost[0, :2], lost[1, 1:] = (-0.4, 0.0), (-0.1, -0.1)
    np.testing.assert_allclose(mean_of(lost).value, np.mean([-0.2, -0.1]))
    by_task = list(figures.by_task(results).values())
    np.testing.assert_allclose(by_task[0], np.tile([0.9, 0.8, 0.7], (TRAININGS, 1)))
    np.testing.assert_allclose(by_task[2][0], [1, 0.95, 0.9])


def test_the_order_learned_is_the_order_of_the_matrix(results):
    by_place = results.by_place(results.style)
    want = [[1, np.nan, np.nan], [0.9, 1, np.nan], [0.8, 0.9, 1]]
    for r in range(TRAININGS):
        np.testing.assert_allclose(by_place[r, ..., 0], np.array(want) + 0.01 * r)


def test_prompts_that_tell_a_difference():
    """As many as it takes by the parts that the values were made of."""
    rng = np.random.default_rng(0)
    R, N = 8, 4000
    seeds, prompts = rng.normal(0, 0.01, (R, 1)), rng.normal(0, 0.3, (1, N))
    values = seeds + prompts + rng.normal(0, 0.2, (R, N))
    seeds *= 0.01 / seeds.std(ddof=1)
    quantile = 2.3646  # Student's t, 7 degrees of freedom
    want = (0.3**2 + 0.2**2 / R) / ((0.03 / quantile) ** 2 - seeds.var(ddof=1) / R)
    assert abs(figures.prompts_needed(values, 0.03) / want - 1) < 0.1
    more = seeds * 10 + prompts + rng.normal(0, 0.2, (R, N))
    assert figures.prompts_needed(more, 0.03) == np.inf


def test_intervals_hold_what_seeds_and_prompts_make():
    """Of trainings and prompts that both differ, 95% intervals hold the truth about so often."""
    rng, held, narrow = np.random.default_rng(0), 0, 0
    for i in range(200):
        seeds, prompts = rng.normal(0, 0.1, (8, 1)), rng.normal(0, 0.3, (1, 40))
        values = 0.5 + seeds + prompts + rng.normal(0, 0.2, (8, 40))
        found = crossed_interval(lambda s, c, v=values: v[s][:, c].mean(), 8, 40, draws=300, seed=i)
        held += found.low <= 0.5 <= found.high
        means = values.mean(0)  # as if the trainings were no sample
        off = 1.96 * means.std(ddof=1) / 40**0.5
        narrow += abs(means.mean() - 0.5) <= off
    assert held >= 180 and narrow < held


def test_one_seed_has_no_interval():
    with pytest.raises(ValueError, match="at least 2 seeds and 2 cases, got 1 and 5"):
        crossed_interval(lambda s, c: 0.0, 1, 5)


@pytest.mark.parametrize("changes,message", [
    ({"orders": (("a", "b"), ("a", "c"))}, "orders: expected the same styles in each"),
    ({"orders": (("a", "a"),)}, "orders: expected the same styles in each, every one once"),
    ({"orders": ()}, "orders: expected"),
    ({"called": ConfigDict({"chalk": "sepia"})}, r"called: expected another word for every style"),
    ({"orders": (("chalk", "xyz"),)}, "orders: expected styles of noto, .*, got 'xyz'"),
    ({"carry": "foo"}, "carry: expected one of .*, got 'foo'"),
    ({"replay_share": 1}, r"replay_share: expected a share in \[0, 1\), got 1"),
    ({"learning_rates": (1e-3, -1)}, "learning_rates: expected numbers above 0, got -1"),
    ({"methods": ConfigDict({"x": {"carry": "on"}})}, "methods.x.carry: expected one of"),
    ({"training_seeds": 1}, "training_seeds: expected a whole number from 2 on, got 1"),
    ({"methods": ConfigDict({"x": {"rate": 1}})}, "methods.x: expected changes, carry, keep_e"),
    ({"methods": ConfigDict({"x": {"learning_rate": 0.0}})}, "x.learning_rate: expected a number"),
    ({"methods": ConfigDict({"x": {"rehearsal": 1.5}})}, r"methods.x.rehearsal: expected a share"),
    ({"methods": ConfigDict({"x": {"rehearsal": 0.5}})}, "expected one file of keep_prompts"),
])
def test_what_cannot_be_compared_is_refused(changes, message):
    config = mini_continual.get_config()
    for key, value in changes.items():
        config[key] = value
    with pytest.raises(ValueError, match=message):
        sequences.check(config)


def smallest(orders=(("blueprint", "sepia"), ("sepia", "blueprint"))):
    """As little as there can be."""
    c = mini_continual.get_config()
    chosen = ("dopsd, keeping", "sft, rehearsal", "sft on the undistilled")
    c.methods = ConfigDict({name: c.methods[name].to_dict() for name in chosen})
    for how in c.methods.values():
        del how["learning_rate"]
    c.methods["dopsd, keeping"].update({"keep_earlier": True, "replay_share": 0.25})
    c.orders, c.learning_rates, c.num_train_steps, c.training_seeds = orders, (1e-3,), 2, 2
    c.old_prompts, c.old_along, c.style_things, c.generation_seeds = 4, 2, 2, 2
    return c


def test_the_default_judge_knows_all_that_is_learned_and_all_that_the_model_draws():
    wide, known = (judge.read(str(f)) for f in (shipped.WIDE_JUDGE, shipped.JUDGE))
    styles = {s for order in mini_continual.get_config().orders for s in order}
    assert len(styles) == 5 and styles.isdisjoint(known.labels.trained_styles)
    assert {*styles, *known.labels.trained_styles} <= set(wide.labels.styles)
    assert set(known.labels.concepts) <= set(wide.labels.concepts)
    assert wide.report["style"] > 0.99 and wide.report["concept_of_one"] > 0.98


@pytest.fixture(scope="module")
def trials(tmp_path_factory):
    return Trials(smallest(), tmp_path_factory.mktemp("trials"))


def test_every_trial_is_a_sequence_that_tasks_takes(trials):
    rates = dict.fromkeys(trials.config.methods, (1e-3,))
    planned = trials.planned(rates, [1, 2])
    assert len({t.workdir for t in planned}) == len(planned) == 6
    assert [t.styles for t in planned[:2]] == list(map(tuple, trials.config.orders))
    assert trials.planned({"sft, rehearsal": (1e-3,)}, [0])[0].order == 0
    for trial in planned:
        config = ConfigDict(json.loads(json.dumps(trial.tasks)))
        runs = tasks.planned(config, trial.workdir)
        tasks.check(runs)
        assert [t.workdir for t in runs] == [trial.run(1), trial.run(2)]
        assert {t.config.seed for t in runs} == {30 + trial.seed}
        if trial.method == "dopsd, keeping":
            assert [t.config.retain for t in runs] == ["untuned", "start"]
            assert {t.config.teacher for t in runs} == {"untuned"}
            own = trial.tasks["changes"]["keep_prompts"]
            earlier = trial.workdir / f"keep_1_{trial.styles[0]}.txt"
            assert runs[1].config.keep_prompts == f"{own},{earlier}"
            assert [t.config.data_weights for t in runs] == ["", "0.75,0.25"]
        if trial.method == "sft, rehearsal":
            assert [t.config.data_weights for t in runs] == ["0.75,0.25", "0.375,0.25,0.375"]
            assert all(t.own.data.endswith("/untuned") for t in runs)
        if trial.method == "sft on the undistilled":
            assert all(t.config.base_lora.endswith("mini_undistilled.safetensors") for t in runs)
    assert len(list((trials.workdir / "pictures/untuned").glob("*.png"))) == 36


def test_captions_and_prompts_call_a_style_by_its_word(trials):
    assert trials.config.called.to_dict() == {"chalk": "green", "sepia": "orange", "stitch": "pink"}
    for style, word in (("blueprint", "blueprint"), ("sepia", "orange")):
        texts = [f.read_text() for f in trials.pictures(style).glob("*.txt")]
        assert len(texts) == 8 and all(word in text for text in texts)
        assert all(c.endswith(f", {word} style") for c in trials.sets[style].rows.captions)
    # What is drawn and judged stays the style.
    assert {*trials.sets["sepia"].rows.styles} == {trials._judge.labels.styles.index("sepia")}


def test_pictures_are_measured_once_and_the_untuned_model_does_not_drift(trials, monkeypatch):
    first = trials.measured(None)
    assert set(first) == {"blueprint", "sepia", OLD}
    assert first[OLD]["drift"].max() == 0 and first["sepia"]["style"].shape == (4,)
    monkeypatch.setattr(trials, "draw", None)
    again = trials.measured(None)
    np.testing.assert_array_equal(again[OLD]["sharpness"], first[OLD]["sharpness"])


def test_what_was_begun_with_other_settings_is_not_taken_for_these(tmp_path):
    config = smallest((("blueprint",),))
    trials = Trials(config, tmp_path)
    (trial,) = trials.planned({"sft, rehearsal": (1e-3,)}, [1])
    trial.workdir.mkdir(parents=True)
    file = tmp_path / "sequences" / f"{trial.workdir.name}.json"
    file.parent.mkdir()
    file.write_text(json.dumps(trial.tasks | {"replay_share": 0.9}, indent=1))
    with pytest.raises(ValueError, match="was begun with other settings than the config's now"):
        trials.train([trial])
    config.pictures = 9
    with pytest.raises(ValueError, match="pictures: .* was begun with 8 of blueprint, now 9"):
        Trials(config, tmp_path)


def test_a_sequence_that_stopped_early_is_not_a_result(trials, monkeypatch):
    planned = trials.planned({"sft, rehearsal": (1e-3,)}, [1])
    monkeypatch.setattr(sequences, "run_all", lambda jobs, what: None)
    with pytest.raises(ValueError, match="stopped before the end; give the same command again"):
        trials.train(planned)


def test_all_tasks_of_all_trials_are_measured_each_once(trials, monkeypatch):
    planned = trials.planned({"dopsd, keeping": (1e-3,)}, [1, 2])
    asked = []
    monkeypatch.setattr(trials, "measured", lambda trial, number: asked.append((trial, number)))
    trials.measure(planned)
    assert sorted((t.seed, number) for t, number in asked) == [(1, 1), (1, 2), (2, 1), (2, 2)]

    def fails(trial, number):
        raise ValueError("no such picture")

    monkeypatch.setattr(trials, "measured", fails)
    with pytest.raises(ValueError, match="no such picture"):
        trials.measure(planned)


def test_a_judge_that_does_not_know_the_styles_is_refused(tmp_path):
    config = smallest((("chalk", "sepia"),))
    config.judge = str(shipped.JUDGE)
    with pytest.raises(ValueError, match="judge: expected one that knows chalk, got one of noto"):
        Trials(config, tmp_path)


@pytest.mark.slow
def test_a_whole_comparison_and_a_second_start_that_does_nothing(tmp_path, monkeypatch):
    config = smallest()
    config.methods["sft, rehearsal"].learning_rate = 0.002
    text = continual.continual(config, tmp_path)
    for method in config.methods:
        assert f"| {method} ({0.002 if method == 'sft, rehearsal' else 0.001:g}) | " in text
    assert "rates of sft, rehearsal: as the config" in text and (tmp_path / "grid.png").is_file()
    assert (tmp_path / "report.html").read_text().count("<table>") == 5
    assert not [f for f in (tmp_path / "trials").iterdir() if "sft_rehearsal-0.002-0-0" in f.name]
    monkeypatch.setattr(jobs.subprocess, "run", None)
    assert continual.continual(config, tmp_path) == text


def test_the_shipped_config_is_a_comparison():
    sequences.check(cli.load_config("configs/mini_continual.py", flag="config"))
