"""The metrics of pictures, by networks in torch: CLIP, DINO, LPIPS and models of preference.

The only way to torch besides `bench`; it is imported inside functions, so that what is missing can
be said in words.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dopsd_jax.compare.metric_weights import METRICS, check_weights
from dopsd_jax.core.log import counted, log
from dopsd_jax.data.images import read_image

DINO_SIZES = ("processor", "drawn")


@dataclasses.dataclass(frozen=True)
class Request:
    """What is compared with what.

    Attributes:
        pictures: N files.
        prompts: One per picture, or None.
        references: M files, or ().
        pairs: For every picture the numbers of its references; () without references.
        pairing: A key of `pairs.PAIRINGS`.
    """

    pictures: Sequence[Path]
    prompts: Sequence[str | None]
    references: Sequence[Path]
    pairs: Sequence[Sequence[int]]
    pairing: str | None


@dataclasses.dataclass(frozen=True)
class Score:
    """One metric of all pictures.

    Attributes:
        values: float64 [N].
        partners: Name of the reference that each value belongs to; "" where it is a prompt's or
            the mean of several.
    """

    values: np.ndarray
    partners: Sequence[str]


def measure(
    request: Request, metrics: Sequence[str], weights: Mapping[str, str | Path | None], *,
    dino_size: str = "processor", device: str = "cpu",
) -> dict[str, Score]:
    """Metric -> figures of all pictures.

    Args:
        request: What is compared with what; a prompt for each picture where a metric reads it.
        metrics: Keys of `METRICS`.
        weights: As for `check_weights`.
        dino_size: "processor": every picture as the checkpoint's processor says; "drawn": as
            published, at the drawn picture's own size, the reference stretched to it.
        device: Torch's.

    Raises:
        ValueError: Weights that are missing or do not fit, torch missing, figures not finite.
    """
    places = check_weights(metrics, weights)
    check_torch(device)
    scores: dict[str, Score] = {}
    for kind, place in places.items():
        log.info("reading %s", place)
        wanted = [m for m in metrics if METRICS[m].weights == kind]
        if kind == "dino":
            scores |= _dino(place, device, request, dino_size)
        else:
            scores |= READERS[kind](place, device, request, wanted)
    for name, score in scores.items():
        if bad := [p.name for p, x in zip(request.pictures, score.values, strict=True)
                   if not np.isfinite(x)]:
            raise ValueError(f"{name}: NaN or infinity for {len(bad)} pictures, {bad[:5]}; the "
                             "weights are damaged, download them again")
    return {m: scores[m] for m in metrics}


def check_torch(device: str) -> None:
    """Raises ValueError where torch is missing or has no such device."""
    if importlib.util.find_spec("torch") is None:
        raise ValueError("score needs torch, which is not installed: pip install -e '.[score]'")
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: this torch finds no CUDA device; take --device=cpu")


def _clip(place: Path, device: str, request: Request, wanted: Sequence[str]) -> dict[str, Score]:
    from dopsd_jax.compare.features import Clip

    net, found = Clip(place, device), {}
    pairs = "clip_image" in wanted
    features = net.images([*request.pictures, *(request.references if pairs else ())])
    ours, others = np.split(features, [len(request.pictures)])
    if "clip_text" in wanted:
        _say_cut(net, request)
        texts = net.texts(request.prompts)
        found["clip_text"] = _of_prompts(np.sum(ours * texts, 1, dtype=np.float64))
    if pairs:
        found["clip_image"] = _reduced("clip_image", _cosines(ours, others, request), request)
    return found


def _pickscore(place: Path, device: str, request: Request, _) -> dict[str, Score]:
    """Source: the model card of yuvalkirstain/PickScore_v1."""
    from dopsd_jax.compare.features import Clip

    net = Clip(place, device)
    _say_cut(net, request)
    return {"pickscore": _of_prompts(net.scale * net.cosines(request.pictures, request.prompts))}


def _hpsv2(place: Path, device: str, request: Request, _) -> dict[str, Score]:
    from dopsd_jax.compare.hpsv2 import Hps

    net = Hps(place, device)
    _say_cut(net, request)
    return {"hpsv2": _of_prompts(net.cosines(request.pictures, request.prompts))}


def _imagereward(place: Path, device: str, request: Request, _) -> dict[str, Score]:
    from dopsd_jax.compare.image_reward import ImageReward

    net = ImageReward(place, device)
    _say_cut(net, request)
    return {"imagereward": _of_prompts(net.scores(request.pictures, request.prompts))}


def _dino(place: Path, device: str, request: Request, dino_size: str) -> dict[str, Score]:
    from dopsd_jax.compare.features import Dino

    net = Dino(place, device, own_size=dino_size == "drawn")
    if dino_size == "drawn":
        cosines = _cosines_at_drawn_size(net, request)
    else:
        features = net.images([*request.pictures, *request.references])
        cosines = _cosines(*np.split(features, [len(request.pictures)]), request)
    return {"dino": _reduced("dino", [1.0 - c for c in cosines], request)}


def _of_prompts(values: np.ndarray) -> Score:
    return Score(values, [""] * len(values))


def _say_cut(net, request: Request) -> None:
    """Says how many prompts a network does not read to the end."""
    prompts = list(dict.fromkeys(request.prompts))
    if cut := net.too_long(prompts):
        log.info("%d of %d prompts are longer than the %d tokens that it reads and were cut off",
                 cut, len(prompts), net.longest)


def _cosines(ours: np.ndarray, others: np.ndarray, request: Request) -> list[np.ndarray]:
    """Unit vectors [N, D] and [M, D] -> for every picture its cosines to its references."""
    return [ours[i] @ others[list(js)].T for i, js in enumerate(request.pairs)]


def _cosines_at_drawn_size(net, request: Request) -> list[np.ndarray]:
    """As `_cosines`, every reference stretched to the picture that it is compared with."""
    by_size: dict[tuple[int, int], list[int]] = {}
    for i, file in enumerate(request.pictures):
        by_size.setdefault(read_image(file).size, []).append(i)
    found: list[np.ndarray] = [np.empty(0)] * len(request.pictures)
    for size, rows in by_size.items():
        needed = sorted({j for i in rows for j in request.pairs[i]})
        ours = net.images([request.pictures[i] for i in rows], size)
        others = net.images([request.references[j] for j in needed], size)
        for mine, i in zip(ours, rows, strict=True):
            found[i] = others[[needed.index(j) for j in request.pairs[i]]] @ mine
    return found


def _lpips(place: Path, device: str, request: Request, _) -> dict[str, Score]:
    """For every picture its distances to its references, each stretched to its size."""
    from dopsd_jax.compare.features import stretch
    from dopsd_jax.compare.lpips import Lpips

    net = Lpips(place, device)
    found = []
    rows = list(zip(request.pictures, request.pairs, strict=True))
    for file, js in counted(rows, len(rows), "pictures"):
        image = read_image(file)
        others = (stretch(read_image(request.references[j]), image.size) for j in js)
        found.append(np.array(net.distances(image, others)))
    return {"lpips": _reduced("lpips", found, request)}


def _reduced(metric: str, values: Sequence[np.ndarray], request: Request) -> Score:
    """The figures of each picture's references -> one: the only one, the nearest, or the mean."""
    if request.pairing == "all":
        return Score(np.array([v.mean(dtype=np.float64) for v in values]), [""] * len(values))
    nearest = np.argmax if METRICS[metric].higher_is_better else np.argmin
    chosen = [int(nearest(v)) for v in values]
    return Score(
        np.array([v[k] for v, k in zip(values, chosen, strict=True)], np.float64),
        [request.references[js[k]].name for js, k in zip(request.pairs, chosen, strict=True)],
    )


READERS = {"clip": _clip, "lpips": _lpips, "pickscore": _pickscore, "hpsv2": _hpsv2,
           "imagereward": _imagereward}
