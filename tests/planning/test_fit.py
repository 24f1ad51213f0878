"""The search for what fits a card, with made-up bytes in place of the compilers."""

import importlib
from pathlib import Path

import pytest

from configs import z_image_turbo_lora
from dopsd_jax.planning import fit
from dopsd_jax.planning.chips import GIB
from dopsd_jax.planning.phases import Arrays, Phase
from dopsd_jax.run import remat
from dopsd_jax.run.config import check_values

ROOT = Path(__file__).parents[2]
TEMPORARIES = dict(zip(remat.ORDER, (50, 30, 20, 12, 6, 5), strict=True))
WEIGHTS = {"dtype": 12, "int8": 6, "nf4": 3, "fp8": 6}


class Search:
    """A search over a model of 12 GiB in bfloat16, and of encoders of 8."""

    def __init__(self, limit, **changes):
        self.config, self.compiled = z_image_turbo_lora.get_config(), []
        self.config.update({"batch_size": 1} | changes)

        def known(config):
            base, text = WEIGHTS[config.base_dtype], WEIGHTS[config.encoder_dtype] * 2 / 3
            return {"vlm": Arrays(int(text * GIB), GIB), "train": Arrays((base + 2) * GIB, GIB),
                    "draw": Arrays(base * GIB, 3 * GIB), "decode": Arrays(0, (base + 3) * GIB)}

        def needs(config, name, beside):
            self.compiled.append((name, config.base_dtype, config.remat))
            own = known(config)[name].own
            more = TEMPORARIES[config.remat] if name == "train" else 1
            return Phase(name, own + more * GIB, beside)

        self.found = fit.Search(self.config, known, needs, limit * GIB).run("4090")


def test_the_best_that_fits_is_taken_with_the_policy_that_computes_least_again():
    search = Search(28)
    assert search.found.changes == {
        "batch_size": 1, "encoder_dtype": "dtype", "base_dtype": "dtype", "remat": "matmuls"
    }
    assert {p.name: p.total / GIB for p in search.found.phases} == {
        "vlm": 10, "train": 27, "draw": 16, "decode": 16
    }


@pytest.mark.parametrize("limit,base,policy", [
    (100, "dtype", "activations"), (21, "dtype", "attention"), (20, "dtype", "full"),
    (19, "int8", "attention"), (12, "nf4", "attention"), (11, "nf4", "full"),
])
def test_fewer_bits_are_taken_where_more_do_not_fit(limit, base, policy):
    changes = Search(limit).found.changes
    assert (changes["base_dtype"], changes["remat"]) == (base, policy)


def test_what_cannot_fit_by_its_weights_is_not_compiled_and_policies_are_halved():
    search = Search(14)
    assert {dtype for name, dtype, _ in search.compiled if name != "vlm"} == {"int8"}
    assert len([c for c in search.compiled if c[0] == "train"]) <= 4
    skipped = [t for t in search.found.trials if t.least]
    assert [t.changes["base_dtype"] for t in skipped] == ["dtype"]
    assert skipped[0].least == 15 * GIB and not skipped[0].phases


def test_the_encoders_are_fitted_apart_from_the_transformer():
    changes = Search(8).found.changes
    assert changes is None  # 3 + 2 + 1 + 5 of training are too much
    trials = Search(8.5).found.trials
    assert [t.changes for t in trials if "encoder_dtype" in t.changes and t.fits] == [
        {"encoder_dtype": "int8"}
    ]


def test_a_search_goes_on_from_what_the_config_says():
    assert Search(100, base_dtype="int8", remat="full").found.changes["base_dtype"] == "int8"
    assert {c[2] for c in Search(100, remat="full").compiled} == {"full"}
    full = Search(14, trainable="full").found
    assert full.changes is None and {t.changes.get("base_dtype") for t in full.trials} <= {
        None, "dtype"
    }


def test_a_report_shows_what_was_tried_and_what_to_use():
    search = Search(19)
    text = fit.report(z_image_turbo_lora.get_config(), search.found, "configs/a_24gb.py")
    for part in ("4090: a run may need 19.00 GiB",
                 "FITS: 15.00 of 19.00 GiB, most where the run is to train",
                 "use: --config.batch_size=1 --config.base_dtype=int8\n",
                 "remat=auto then takes attention", "or:  --config configs/a_24gb.py"):
        assert part in text, part
    row = next(line for line in text.splitlines() if "int8 remat=attention" in line)
    assert row.split()[2:] == ["15.00", "10.00", "10.00", "fits"]
    assert "does not fit" in text


def test_where_nothing_fits_it_is_said_what_else_needs_less():
    search = Search(7)
    text = fit.report(search.config, search.found)
    assert "NOTHING FITS" in text and "weights and state alone" in text
    assert "--config.resolution=768" in text and "--config.lora.rank=16" in text
    search.config.trainable = "full"
    heavy = fit.Fit("4090", GIB, [fit.Trial({"remat": "full"}, least=90 * GIB)], None, [])
    text = fit.report(search.config, heavy)
    assert "--config.trainable=lora" in text and "on more chips" in text
    assert "resolution" not in text
    search.config.trainable = "lora"
    needs_pictures = fit.Fit("4090", GIB, [fit.Trial({}, [Phase("draw", 2 * GIB)])], None, [])
    assert "--config.sample_every=0 --config.preflight=off" in fit.report(
        search.config, needs_pictures
    )


@pytest.mark.parametrize("name,target", [
    ("24", "4090"), ("16GB", "4080"), ("12", "4070"), ("h100", "h100"), ("v5e:1x1", "v5e:1x1"),
])
def test_a_card_is_meant_by_its_memory_or_its_name(name, target):
    assert fit.target_of(name) == target


def test_another_word_is_refused():
    with pytest.raises(ValueError, match="--fit: expected 24, 16, 12 .* got '48'"):
        fit.target_of("48")


def test_the_configs_for_cards_are_possible_and_stand_beside_what_they_change():
    files = sorted((ROOT / "configs").glob("*gb.py"))
    assert len(files) == 6
    for file in files:
        whole, _, size = file.stem.rpartition("_")
        config, base = (importlib.import_module(f"configs.{name}").get_config()
                        for name in (file.stem, whole))
        check_values(config, besides=("model", "vlm", "data"))
        assert config.batch_size == 1 and config.published == base.published
        assert config.remat == base.remat and fit.target_of(size)
        name = str(ROOT / "configs" / f"{whole}.py")
        assert fit.shipped(name, fit.target_of(size)) == str(file)


def test_a_config_for_such_a_card_is_named_if_there_is_one(tmp_path):
    (tmp_path / "a_16gb.py").touch()
    file = str(tmp_path / "a.py")
    assert fit.shipped(file, "4080") == fit.shipped(file, "v5e:1x1") == str(tmp_path / "a_16gb.py")
    assert fit.shipped(file, "4090") == fit.shipped(file, "4070") == ""
    assert fit.shipped(file, "h100") == ""
