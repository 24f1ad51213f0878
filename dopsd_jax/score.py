"""Command: drawn pictures against prompts and references, by CLIP and models of preference.

    python -m dopsd_jax.score --pictures runs/a/drawn --references photos --pairing nearest \\
        --clip CLIP --dino DINO --lpips LPIPS --out runs/a/scores.csv

Also PickScore, HPS v2 and ImageReward: --pickscore, --hpsv2, --imagereward. Needs torch
(`pip install -e '.[score]'`), which training never does.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags

from dopsd_jax.compare import metric_weights, pairs
from dopsd_jax.compare.metric_weights import METRICS
from dopsd_jax.compare.scores import DINO_SIZES, Request, Score, measure
from dopsd_jax.compare.stats import interval
from dopsd_jax.compare.table import as_markdown
from dopsd_jax.core import cli
from dopsd_jax.core.checks import noted
from dopsd_jax.core.files import write_atomic


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
    with noted(problems, "pictures"):
        ours = pairs.read_folder(pictures)
        prompts = pairs.replace_words(pairs.read_prompts(ours), replacements)
    wanted, of_prompts = (
        [m for m in metrics if METRICS[m].against == kind] for kind in ("reference", "prompt")
    )
    if references is not None:
        with noted(problems, "references"):
            others = pairs.read_folder(references)
        with noted(problems):
            matched = pairs.pair_up(ours, others, pairing) if ours and others else []
    elif wanted:
        problems.append(f"{', '.join(wanted)}: compare with references; name --references, or "
                        "leave them out of --metrics")
    bare = [p.name for p, text in zip(ours, prompts, strict=False) if text is None]
    if of_prompts and bare:
        names = ", ".join(of_prompts)
        problems.append(
            f"{names}: {len(bare)} of {len(ours)} pictures have no prompt beside them (a .json "
            f"as sample writes it, or a caption in a .txt): {', '.join(bare[:5])}; add them, or "
            f"leave {names} out of --metrics"
        )
    if problems:
        raise ValueError("\n  ".join(problems))
    return Request(ours, prompts, others, matched, pairing)


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
    flags.DEFINE_multi_string("replace", [], "OLD=NEW in prompts before they are read, such as "
                              "[V]=dog for a trigger word; may be given several times.")
    metric_weights.define_flags()
    flags.DEFINE_enum("dino_size", "processor", DINO_SIZES, "How DINO sees a picture: as its "
                      "processor says, or as published: at the drawn size, the reference "
                      "stretched to it.")
    flags.DEFINE_string("out", "scores.csv", "CSV file, one line per picture.")


def main() -> None:
    out = Path(FLAGS.out)
    cli.check_directory(out.parent)
    if out.is_dir():
        raise ValueError(f"{out}: expected a file for --out, found a directory")
    weights = metric_weights.given_weights()
    metrics = metric_weights.chosen_metrics(
        FLAGS.metrics, weights, references=FLAGS.references is not None
    )
    request = read_request(
        FLAGS.pictures, FLAGS.references, FLAGS.pairing, metrics, FLAGS.replace
    )
    scores = measure(request, metrics, weights, dino_size=FLAGS.dino_size, device=FLAGS.device)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_csv(out, scores, request)
    print(as_table(scores, request))
    print(f"wrote {out}")


if __name__ == "__main__":
    define_flags()
    cli.run_command(main)
