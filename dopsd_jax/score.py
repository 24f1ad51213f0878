"""Command: drawn pictures against references and prompts, in CLIP, DINO and LPIPS.

    python -m dopsd_jax.score --pictures runs/a/drawn --references photos --pairing nearest \\
        --clip CLIP --dino DINO --lpips LPIPS --out runs/a/scores.csv

Needs torch (`pip install -e '.[score]'`), which training never does. Nothing is downloaded.
"""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags

from dopsd_jax.compare import pairs
from dopsd_jax.compare.metric_weights import METRICS, check_weights
from dopsd_jax.compare.stats import interval
from dopsd_jax.compare.table import as_markdown
from dopsd_jax.core import cli
from dopsd_jax.core.checks import noted
from dopsd_jax.core.files import write_atomic
from dopsd_jax.core.log import log
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


def read_request(
    pictures: str, references: str | None, pairing: str | None, metrics: Sequence[str],
    replacements: Sequence[str] = (),
) -> Request:
    """Finds pictures, prompts and references, and checks that the metrics can be had of them.

    Args:
        pictures: Folder of drawn pictures, prompts beside them.
        references: Folder of references, or None.
        pairing: A key of `pairs.PAIRINGS`; needed with references.
        metrics: Keys of `METRICS`.
        replacements: "OLD=NEW" for the prompts.

    Raises:
        ValueError: Everything that is wrong, together.
    """
    problems: list[str] = []
    ours, others, matched = [], [], []
    prompts: list[str | None] = []
    unknown = [m for m in metrics if m not in METRICS]
    if unknown or not metrics:
        problems.append(f"metrics: expected some of {', '.join(METRICS)}, got {unknown}")
    with noted(problems, "pictures"):
        ours = pairs.read_folder(pictures)
        prompts = pairs.replace_words(pairs.read_prompts(ours), replacements)
    wanted = [m for m in metrics if m in METRICS and METRICS[m].against == "reference"]
    if references is not None:
        with noted(problems, "references"):
            others = pairs.read_folder(references)
        with noted(problems):
            matched = pairs.pair_up(ours, others, pairing) if ours and others else []
    elif wanted:
        problems.append(f"{', '.join(wanted)}: compare with references; name --references, or "
                        "leave them out of --metrics")
    bare = [p.name for p, text in zip(ours, prompts, strict=False) if text is None]
    if "clip_text" in metrics and bare:
        problems.append(
            f"clip_text: {len(bare)} of {len(ours)} pictures have no prompt beside them (a .json "
            f"as sample writes it, or a caption in a .txt): {', '.join(bare[:5])}; add them, or "
            "leave clip_text out of --metrics"
        )
    if problems:
        raise ValueError("\n  ".join(problems))
    return Request(ours, prompts, others, matched, pairing)


def measure(
    request: Request, metrics: Sequence[str], *, clip: str | None = None, dino: str | None = None,
    lpips: str | None = None, dino_size: str = "processor", device: str = "cpu",
) -> dict[str, Score]:
    """Metric -> figures of all pictures.

    Args:
        request: From `read_request`.
        metrics: Keys of `METRICS`.
        clip, dino, lpips: Directories of weights, of those that the metrics need.
        dino_size: "processor": every picture as the checkpoint's processor says; "drawn": as
            published, at the drawn picture's own size, the reference stretched to it.
        device: Torch's.

    Raises:
        ValueError: Weights that are missing or do not fit, torch missing, figures not finite.
    """
    check_weights(metrics, {"clip": clip, "dino": dino, "lpips": lpips})
    check_torch(device)
    from dopsd_jax.compare.features import Clip, Dino

    scores: dict[str, Score] = {}
    if "clip_text" in metrics or "clip_image" in metrics:
        log.info("reading %s", clip)
        net = Clip(clip, device)
        ours = net.images(request.pictures)
        if "clip_text" in metrics:
            if cut := net.too_long(request.prompts):
                log.info("%d of %d prompts are longer than the %d tokens that CLIP reads and were "
                         "cut off", cut, len(ours), net.longest)
            scores["clip_text"] = Score(
                np.sum(ours * net.texts(request.prompts), 1, dtype=np.float64), [""] * len(ours)
            )
        if "clip_image" in metrics:
            scores["clip_image"] = _reduced(
                "clip_image", _cosines(ours, net.images(request.references), request), request
            )
    if "dino" in metrics:
        log.info("reading %s", dino)
        net = Dino(dino, device, own_size=dino_size == "drawn")
        cosines = (_cosines_at_drawn_size(net, request) if dino_size == "drawn" else
                   _cosines(net.images(request.pictures), net.images(request.references), request))
        scores["dino"] = _reduced("dino", [1.0 - c for c in cosines], request)
    if "lpips" in metrics:
        log.info("reading %s", lpips)
        scores["lpips"] = _reduced("lpips", _lpips(lpips, device, request), request)
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


def _lpips(directory: str, device: str, request: Request) -> list[np.ndarray]:
    """For every picture its distances to its references, each stretched to its size."""
    from dopsd_jax.compare.features import stretch
    from dopsd_jax.compare.lpips import Lpips

    net = Lpips(directory, device)
    found = []
    for file, js in zip(request.pictures, request.pairs, strict=True):
        image = read_image(file)
        others = (stretch(read_image(request.references[j]), image.size) for j in js)
        found.append(np.array(net.distances(image, others)))
    return found


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


def cases(prompts: Sequence[str | None]) -> np.ndarray:
    """Which case a picture belongs to, int [N]: its prompt, where there are several prompts."""
    if len(set(prompts)) < 2 or None in prompts:
        return np.arange(len(prompts))
    return np.unique(np.array(prompts), return_inverse=True)[1]


def summary(values: np.ndarray, case: np.ndarray) -> dict[str, str]:
    """Mean over pictures, with the 95% interval over cases (pictures of one prompt stay together).

    Args:
        values: float [N].
        case: int [N], as from `cases`.
    """
    count = int(case.max()) + 1
    sums = np.bincount(case, values, count)
    sizes = np.bincount(case, minlength=count)
    row = {"mean": f"{values.mean():.4f}", "95% interval": "none of 1 case"}
    if count > 1:
        found = interval(lambda index: sums[index].sum() / sizes[index].sum(), count)
        row["95% interval"] = f"[{found.low:.4f}, {found.high:.4f}]"
    return row | {"pictures": str(len(values)), "cases": str(count)}


def as_table(scores: dict[str, Score], request: Request) -> str:
    """Metric, mean, interval, as Markdown."""
    case = cases(request.prompts)
    return as_markdown({
        name: {"better": "higher" if METRICS[name].higher_is_better else "lower"}
        | summary(score.values, case) | {"what": METRICS[name].meaning}
        for name, score in scores.items()
    })


def write_csv(path: Path, scores: dict[str, Score], request: Request) -> None:
    """One line per picture: its name, its prompt, and each metric with the reference it is to."""
    out = io.StringIO()
    writer = csv.writer(out)
    columns = [(name, f"{name}_reference") if METRICS[name].against == "reference" else (name,)
               for name in scores]
    writer.writerow(["picture", "prompt", *(c for pair in columns for c in pair)])
    for i, file in enumerate(request.pictures):
        row = [file.name, request.prompts[i] or ""]
        for name, score in scores.items():
            row.append(f"{score.values[i]:.6f}")
            if METRICS[name].against == "reference":
                row.append(score.partners[i])
        writer.writerow(row)
    write_atomic(path, out.getvalue())


FLAGS = flags.FLAGS


def define_flags() -> None:
    """The command's flags; a function, so that importing this module defines none."""
    flags.DEFINE_string("pictures", None, "Folder of drawn pictures, with the .json files that "
                        "sample writes beside them, or captions in .txt.", required=True)
    flags.DEFINE_string("references", None, "Folder of pictures to compare with.")
    flags.DEFINE_enum("pairing", None, list(pairs.PAIRINGS), "Which reference a picture is "
                      "compared with: " + "; ".join(f"{k}: {v}" for k, v in pairs.PAIRINGS.items()))
    flags.DEFINE_list("metrics", list(METRICS), f"Some of {', '.join(METRICS)}.")
    flags.DEFINE_multi_string("replace", [], "OLD=NEW in prompts before CLIP reads them, such as "
                              "[V]=dog for a trigger word; may be given several times.")
    for name in ("clip", "dino", "lpips"):
        flags.DEFINE_string(name, None, f"Directory of {name.upper()} weights.")
    flags.DEFINE_enum("dino_size", "processor", DINO_SIZES, "How DINO sees a picture: as its "
                      "processor says, or as published: at the drawn size, the reference "
                      "stretched to it.")
    flags.DEFINE_enum("device", "cpu", ["cpu", "cuda"], "Where torch computes.")
    flags.DEFINE_string("out", "scores.csv", "CSV file, one line per picture.")


def main() -> None:
    out = Path(FLAGS.out)
    cli.check_directory(out.parent)
    if out.is_dir():
        raise ValueError(f"{out}: expected a file for --out, found a directory")
    request = read_request(
        FLAGS.pictures, FLAGS.references, FLAGS.pairing, FLAGS.metrics, FLAGS.replace
    )
    scores = measure(
        request, FLAGS.metrics, clip=FLAGS.clip, dino=FLAGS.dino, lpips=FLAGS.lpips,
        dino_size=FLAGS.dino_size, device=FLAGS.device,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_csv(out, scores, request)
    print(as_table(scores, request))
    print(f"wrote {out}")


if __name__ == "__main__":
    define_flags()
    cli.run_command(main)
