"""What of a config to change so that its whole run fits one card or chip.

From the best to the most frugal: first the weights' own dtype, then fewer bits of the frozen ones;
and of the policies of rematerialisation the one that computes least again. What of this the
encoders need, which are gone before the transformer is there, is found apart from what training
needs. Settings that cannot fit, by the weights alone, are not compiled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dopsd_jax.core.log import log
from dopsd_jax.models.quantization import AS_DTYPE
from dopsd_jax.planning import phases
from dopsd_jax.planning.chips import chip_of, count_chips
from dopsd_jax.planning.gpus import GPUS
from dopsd_jax.planning.phases import DRAWING, ENCODING, TRAIN, Arrays, Phase
from dopsd_jax.planning.plans import checked, gib, measure, mesh_of, with_batch
from dopsd_jax.run import remat
from dopsd_jax.run.keys import AUTO

CLASSES = {"24": "4090", "16": "4080", "12": "4070"}  # GB of a card -> the one that is planned for
DTYPES = (AS_DTYPE, "int8", "nf4")  # of the frozen networks, from the best to the smallest

Known = Callable[[ConfigDict], dict[str, Arrays]]
Needs = Callable[[ConfigDict, str, int], Phase]  # phase, and bytes beside it


@dataclasses.dataclass
class Trial:
    """One setting, and what the phases that it decides need.

    Attributes:
        changes: Keys of the config, with the policy of rematerialisation.
        phases: Those that were compiled.
        least: Bytes that the weights and the state alone need; of a setting that was not compiled.
        fits: Whether all of it is below the bytes that it may need.
    """

    changes: dict[str, Any]
    phases: list[Phase] = dataclasses.field(default_factory=list)
    least: int = 0
    fits: bool = False


@dataclasses.dataclass(frozen=True)
class Fit:
    """What a search found.

    Attributes:
        target: Card or chip.
        limit: Bytes that a run may need of it.
        trials: In the order in which they were tried.
        changes: The keys to set; None if nothing fits.
        phases: Of the run with them.
    """

    target: str
    limit: float
    trials: list[Trial]
    changes: dict[str, Any] | None
    phases: list[Phase]


def target_of(name: str) -> str:
    """The card or topology of one chip that a user means.

    Args:
        name: "24", "16" or "12", GB of a card; a card by its name; or such as "v5e:1x1".

    Raises:
        ValueError: Anything else.
    """
    target = CLASSES.get(name.lower().removesuffix("gb"), name)
    if target not in GPUS and ":" not in target:
        raise ValueError(f"--fit: expected {', '.join(CLASSES)} for a card of so many GB, one of "
                         f"{', '.join(GPUS)}, or a TPU such as v5e:1x1, got {name!r}")
    if ":" in target and count_chips(target) != 1:
        raise ValueError(f"--fit: expected one chip, such as {target.partition(':')[0]}:1x1, got "
                         f"{name}; for several, --topology {name} says what a run needs")
    return target


def shipped(name: str, target: str) -> str:
    """The config for such a card or chip that stands beside another one, "" if there is none.

    Args:
        name: File of that one, such as configs/a.py, beside which configs/a_24gb.py may stand.
        target: See `target_of`.
    """
    memory = chip_of(target).memory
    for gb, card in CLASSES.items():  # the largest first
        if chip_of(card).memory <= 1.001 * memory:
            file = Path(name).with_name(f"{Path(name).stem}_{gb}gb.py")
            return str(file) if file.is_file() and memory < 1.5 * chip_of(card).memory else ""
    return ""


def find(config: ConfigDict, target: str, batch: int = 0) -> Fit:
    """Searches with the real compilers.

    Args:
        config: Of a run.
        target: See `target_of`.
        batch: Pictures per chip; 0: one.

    Raises:
        ValueError: See `plans.plan`.
    """
    chip = checked(config, target)
    chips = count_chips(target)
    config, _ = with_batch(config, chips, batch or config.accumulation)

    def known(config: ConfigDict) -> dict[str, Arrays]:
        return phases.arrays(config, mesh_of(config, chips))

    def needs(config: ConfigDict, name: str, beside: int) -> Phase:
        return measure(config, target, name, beside)

    return Search(config, known, needs, remat.SHARE * chip.memory).run(target)


class Search:
    """Goes through the settings; what compiles is handed in.

    Attributes:
        trials: What was tried so far.
    """

    def __init__(
        self, config: ConfigDict, known: Known, needs: Needs, limit: float
    ):
        """`known`: see `phases.arrays`; `needs`: see `plans.measure`; `limit`: bytes of a run."""
        self._config, self._known, self._needs, self._limit = config, known, needs, limit
        self.trials: list[Trial] = []

    def run(self, target: str) -> Fit:
        """All phases of the first setting that fits, or the trials that did not."""
        encoding = self._first("encoder_dtype", self._encoding)
        training = self._first("base_dtype", self._training)
        chosen = [t for t in (encoding, training) if t is not None]
        if len(chosen) < 2:
            return Fit(target, self._limit, self.trials, None, [])
        changes = {"batch_size": self._config.batch_size} | encoding.changes | training.changes
        return Fit(target, self._limit, self.trials, changes, encoding.phases + training.phases)

    def _first(self, key: str, attempt: Callable[[dict[str, Any]], Trial]) -> Trial | None:
        """Goes on from the config's own value, and not at all where the key may have no other."""
        given = self._config[key]
        size = DTYPES.index(given if given in DTYPES else "int8")  # fp8 and w8a8 take as much
        choices = (given, *DTYPES[size + 1 :])
        if key == "base_dtype" and self._config.trainable == "full":
            choices = (given,)
        return next((t for t in map(attempt, ({key: c} for c in choices)) if t.fits), None)

    def _encoding(self, changes: dict[str, Any]) -> Trial:
        config = changed(self._config, changes, remat.ORDER[-1])
        return self._compile(Trial(changes), config, ENCODING, self._known(config))

    def _training(self, changes: dict[str, Any]) -> Trial:
        """The frugal policy first, and what draws; then the policy that computes least again."""
        policies = remat.ORDER if self._config.remat == AUTO else (self._config.remat,)
        config = changed(self._config, changes, policies[-1])
        known = self._known(config)
        trial = self._compile(
            Trial(changes | {"remat": policies[-1]}), config, (TRAIN, *DRAWING), known
        )
        if not trial.fits:
            return trial
        drawing = [p for p in trial.phases if p.name in DRAWING]
        # The policies need the less the later they stand.
        first, last = 0, len(policies) - 1
        while first < last:
            middle = (first + last) // 2
            config = changed(self._config, changes, policies[middle])
            other = Trial(changes | {"remat": policies[middle]})
            self._compile(other, config, (TRAIN,), known)
            if other.fits:
                trial, last = other, middle
                other.phases += drawing
            else:
                first = middle + 1
        return trial

    def _compile(
        self, trial: Trial, config: ConfigDict, names: tuple[str, ...], known: dict[str, Arrays]
    ) -> Trial:
        """Compiles phases as long as they fit; none if one of them cannot."""
        self.trials.append(trial)
        names = tuple(name for name in names if name in known)
        least = max((known[name].least for name in names), default=0)
        if least > self._limit:
            trial.least = least
            log.info("%s: the weights alone need %s GiB", words(trial.changes), gib(least))
            return trial
        trial.fits = True
        for name in names:
            phase = self._needs(config, name, known[name].beside)
            trial.phases.append(phase)
            trial.fits = phase.total <= self._limit
            if not trial.fits:
                break
        return trial


def changed(config: ConfigDict, changes: dict[str, Any], policy: str) -> ConfigDict:
    """The config with other values."""
    config = config.copy_and_resolve_references()
    config.update({"remat": policy} | changes)
    return config


def words(changes: dict[str, Any]) -> str:
    """Keys and values in a few words."""
    return " ".join(f"{key}={value}" for key, value in changes.items()) or "as configured"


def flags_of(config: ConfigDict, changes: dict[str, Any]) -> list[str]:
    """What to add to a command; a policy that `auto` finds by itself is left to it."""
    return [f"--config.{key}={value}" for key, value in changes.items()
            if config[key] != value and (key, config[key]) != ("remat", AUTO)]


def report(config: ConfigDict, found: Fit, shipped: str = "") -> str:
    """What was tried and what to use, for a reader.

    Args:
        config: As the user gave it.
        found: By `find`.
        shipped: The config that comes with the package for such a card, if there is one.
    """
    order = phases.of_run(config)
    titles = [phases.SHORT[name] for name in order]
    lines = [f"{found.target}: a run may need {gib(found.limit)} GiB",
             f"{'GiB':44}" + "".join(f"{title:>10}" for title in titles)]
    for trial in found.trials:
        sizes = {p.name: gib(p.total) for p in trial.phases}
        line = f"{words(trial.changes):44}" + "".join(
            f"{sizes.get(name, ''):>10}" for name in order
        )
        told = "fits" if trial.fits else (
            f"not compiled: weights and state alone {gib(trial.least)}" if trial.least
            else "does not fit"
        )
        lines.append(f"{line}  {told}")
    if found.changes is None:
        return "\n".join([*lines, "NOTHING FITS", *advice(config, found)])
    peak = max(found.phases, key=lambda phase: phase.total)
    lines.append(f"FITS: {gib(peak.total)} of {gib(found.limit)} GiB, most where the run is to "
                 f"{phases.WORDS[peak.name]}")
    added = flags_of(config, found.changes)
    lines.append("use: " + (" ".join(added) if added else "the config as it is"))
    if found.changes["remat"] != config.remat:
        lines.append(f"     remat=auto then takes {found.changes['remat']}")
    if shipped:
        lines.append(f"or:  --config {shipped}, which is meant for such a card")
    return "\n".join(lines)


def advice(config: ConfigDict, found: Fit) -> list[str]:
    """What else needs less, where nothing that keeps the recipe fits."""
    failed = {t.phases[-1].name for t in found.trials if t.phases and not t.fits}
    lines = []
    if found.trials and all(t.least for t in found.trials):  # whatever is computed
        if config.trainable == "full":
            lines.append("with a LoRA: --config.trainable=lora; or with fewer bytes of state: "
                         "--config.moments_dtype=int8 --config.ema_dtype=bfloat16")
        return [*lines, "on more chips, over which weights and state are split: --topology "
                "v5e:2x2, or several GPUs"]
    if failed & set(ENCODING):
        lines.append("encode on another machine (python -m dopsd_jax.encode) and give its "
                     "--config.cache: no encoder is loaded then")
    if failed & set(DRAWING):
        lines.append("without pictures: --config.sample_every=0 --config.preflight=off")
    if config.resolution > 768:
        lines.append("at a lower resolution: --config.resolution=768")
    if config.trainable == "lora" and config.lora.rank > 16:
        lines.append("with a smaller LoRA: --config.lora.rank=16 --config.lora.alpha=32")
    return lines
