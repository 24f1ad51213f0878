"""The method beside a plain torch loop of it: diffusers' transformer, peft's adapters, AdamW.

The torch side is written from the published trainer: t = 1 - sigma runs from 0 to 1 and the raw
output u points from noise to data. The weights travel through save_pretrained and our loader.
"""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from diffusers import ZImageTransformer2DModel
from peft import LoraConfig

from dopsd_jax import lora, train_step
from dopsd_jax.core import trees
from dopsd_jax.flow import sigmas_shifted
from dopsd_jax.models.denoiser import Context, ZImageDenoiser
from dopsd_jax.models.z_image import ZImageConfig, ZImageTransformer
from dopsd_jax.weights.load import load_tree, weight_files
from dopsd_jax.weights.z_image_names import Z_IMAGE_TARGETS, z_image_table

TINY = dict(
    all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=64, n_layers=2,
    n_refiner_layers=1, n_heads=4, n_kv_heads=4, norm_eps=1e-5, qk_norm=True, cap_feat_dim=32,
    rope_theta=256.0, t_scale=1000.0, axes_dims=[4, 6, 6], axes_lens=[256, 64, 64],
)
PUBLISHED_TARGETS = [
    "feed_forward.w1", "feed_forward.w2", "feed_forward.w3",
    "attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0",
]
RANK, ALPHA = 4, 8
UPDATES = 5
STUDENT_LENGTHS, TEACHER_LENGTHS = (5, 37), (45, 70)
TOLERANCE = 1e-4  # of each tensor's largest element


@dataclasses.dataclass(frozen=True)
class Case:
    loss: str
    teacher: str
    num_steps: int
    max_grad_norm: float
    warmup_steps: int
    weight_decay: float
    zero_b: bool = False
    learning_rate: float = 1e-3
    ema_decay: float = 0.9
    eps: float = 1e-8


CASES = {
    "x0, EMA, clipped, warm-up": Case("x0", "ema", 4, 0.01, 3, 0.01),
    "velocity, frozen teacher": Case("velocity", "frozen", 3, 1e3, 0, 0.1),
    # Where b starts at zero, Adam's first update is a gradient's sign; the larger eps keeps the
    # rounding of gradients near zero out of it.
    "x0, live teacher, b from zero": Case("x0", "live", 2, 1e3, 0, 0.1, zero_b=True, eps=1e-3),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A directory with tiny random weights, no tensor of them trivial."""
    torch.manual_seed(0)
    model = ZImageTransformer2DModel(**TINY)
    for name, p in model.named_parameters():
        if p.ndim == 1 or "pad_token" in name:
            torch.nn.init.normal_(p, float("norm" in name), 0.3)
    directory = tmp_path_factory.mktemp("z_image")
    model.save_pretrained(directory)
    return directory


def make_data():
    """Noise and ragged captions of every update, channels last, padded for ours."""
    rng = np.random.default_rng(1)

    def captions(lengths):
        return [rng.standard_normal((n, 32), np.float32) for n in lengths]

    return [
        {
            "noise": rng.standard_normal((2, 8, 12, 4), np.float32),
            "student": captions(STUDENT_LENGTHS), "teacher": captions(TEACHER_LENGTHS),
        }
        for _ in range(UPDATES)
    ]


class TorchRun:
    """D-OPSD in plain torch."""

    def __init__(self, directory, case):
        self.case = case
        self.model = ZImageTransformer2DModel.from_pretrained(directory)
        self.model.requires_grad_(False)
        torch.manual_seed(2)
        for role in ("student", "teacher"):
            self.model.add_adapter(
                LoraConfig(r=RANK, lora_alpha=ALPHA, init_lora_weights="gaussian",
                           target_modules=PUBLISHED_TARGETS),
                adapter_name=role,
            )
        parameters = dict(self.model.named_parameters())
        self.student = {n: p for n, p in parameters.items() if ".student." in n}
        self.teacher = {
            n: parameters[n.replace(".student.", ".teacher.")] for n in self.student
        }
        with torch.no_grad():
            for name, p in self.student.items():
                if "lora_B" in name and not case.zero_b:
                    p.normal_(0, 0.1)
                self.teacher[name].copy_(p)
        self.optimizer = torch.optim.AdamW(
            self.student.values(), lr=case.learning_rate, betas=(0.9, 0.999), eps=case.eps,
            weight_decay=case.weight_decay,
        )
        self.updates = 0

    def raw(self, role, x, t, captions):
        self.model.set_adapter(role)
        for p in self.student.values():
            p.requires_grad_(True)  # set_adapter freezes the adapter it leaves
        out = self.model(
            list(x[:, :, None]), t.expand(len(x)), [torch.from_numpy(c) for c in captions],
            return_dict=False,
        )[0]
        return torch.stack(out)[:, :, 0]

    def update(self, noise, student, teacher):
        """One optimizer step; returns the losses of the rollout's steps."""
        case = self.case
        sigmas = torch.from_numpy(sigmas_shifted(case.num_steps, 3.0))
        ts = 1 - sigmas
        x = torch.from_numpy(noise).permute(0, 3, 1, 2)
        losses = []
        for t, t_next in itertools.pairwise(ts):
            x = x.detach()
            with torch.no_grad():
                role = "student" if case.teacher == "live" else "teacher"
                u_teacher = self.raw(role, x, t, teacher)
            u_student = self.raw("student", x, t, student)
            if case.loss == "x0":
                ours, theirs = x + (1 - t) * u_student, x + (1 - t) * u_teacher
            else:
                ours, theirs = u_student, u_teacher
            losses.append(((ours - theirs) ** 2).mean())
            x = x + u_student * (t_next - t)
        self.optimizer.zero_grad()
        (sum(losses) / case.num_steps).backward()
        grads = {n: p.grad.clone() for n, p in self.student.items()}
        norm = torch.nn.utils.clip_grad_norm_(self.student.values(), case.max_grad_norm)
        warmed = min(1.0, (self.updates + 1) / max(case.warmup_steps, 1))
        for group in self.optimizer.param_groups:
            group["lr"] = case.learning_rate * warmed
        self.optimizer.step()
        self.updates += 1
        if case.teacher == "ema":
            with torch.no_grad():
                for name, p in self.student.items():
                    d = case.ema_decay
                    self.teacher[name].copy_(d * self.teacher[name] + (1 - d) * p)
        return [loss.item() for loss in losses], grads, norm.item()


def to_tree(tensors):
    """peft's tensors by name -> our LoRA tree, layers stacked."""
    stacks = {}
    for name, tensor in tensors.items():
        stack, layer, module, side = re.fullmatch(
            r"(\w+)\.(\d+)\.(.+)\.lora_(A|B)\.(?:student|teacher)\.weight", name
        ).groups()
        module = module.replace("to_out.0", "to_out").replace(".", "/")
        layers = stacks.setdefault(f"{stack}/{module}/{side.lower()}", {})
        layers[int(layer)] = tensor.detach().numpy().T
    return trees.unflatten({
        name: np.stack([layers[i] for i in sorted(layers)]) for name, layers in stacks.items()
    })


def context(captions, length):
    """Captions padded to `length`, with garbage behind their ends."""
    text = np.full((len(captions), length, 32), 3.0, np.float32)
    mask = np.zeros((len(captions), length), bool)
    for row, c in enumerate(captions):
        text[row, : len(c)], mask[row, : len(c)] = c, True
    return Context(jnp.asarray(text), jnp.asarray(mask))


class OurRun:
    """The same through make_train_step; a link before the optimizer keeps the gradients."""

    def __init__(self, directory, case, student):
        config = ZImageConfig.from_json(ZImageTransformer2DModel.load_config(directory))
        denoiser = ZImageDenoiser(ZImageTransformer(config))
        shapes = jax.eval_shape(
            denoiser.network.init, jax.random.key(0), jnp.zeros((1, 8, 8, 4)), jnp.zeros(1),
            jnp.zeros((1, 32, 32)), jnp.ones((1, 32), bool),
        )["params"]
        self.base = load_tree(weight_files(directory), z_image_table(config), shapes)
        # The published list of names and our preset must select the same linear layers.
        paths = {n.rsplit("/", 1)[0] for n in trees.flatten(student)}
        matched = lora.match_targets(shapes, lora.parse_targets("published", Z_IMAGE_TARGETS))
        assert {n.removesuffix("/kernel") for n in matched} == paths
        keep_grads = optax.GradientTransformation(
            lambda p: jax.tree.map(jnp.zeros_like, p), lambda g, state, p: (g, g)
        )
        optimizer = optax.chain(keep_grads, train_step.make_optimizer(
            learning_rate=case.learning_rate, warmup_steps=case.warmup_steps, b1=0.9, b2=0.999,
            eps=case.eps, weight_decay=case.weight_decay, max_grad_norm=case.max_grad_norm,
        ))
        method = train_step.Method(
            trainable="lora", lora_scale=ALPHA / RANK, teacher=case.teacher,
            ema_decay=case.ema_decay, loss=case.loss,
        )
        self.state = train_step.init_state(
            jax.tree.map(jnp.asarray, student), optimizer, jax.random.key(0)
        )
        self.step = jax.jit(
            train_step.make_train_step(
                method, optimizer, train_step.dopsd(method, denoiser.velocity)
            ), donate_argnums=0,
            compiler_options={"xla_backend_optimization_level": 0},  # half the compile time
        )
        self.sigmas = jnp.asarray(sigmas_shifted(case.num_steps, 3.0))

    def update(self, noise, student, teacher):
        batch = train_step.Batch(
            jnp.asarray(noise), context(student, 64), context(teacher, 96), self.sigmas
        )
        self.state, metrics = self.step(self.state, self.base, batch)
        return metrics["step_loss"], self.state.opt_state[0], float(metrics["grad_norm"])


def error(got, want):
    """Largest difference of each tensor relative to its own scale; the worst and its name."""
    got, want = trees.flatten(got), trees.flatten(want)
    assert set(got) == set(want)
    worst = (0.0, "")
    for name, w in want.items():
        difference = np.abs(np.asarray(got[name]) - w).max()
        scale = np.abs(w).max()
        if scale == 0:
            assert difference == 0, name
        else:
            worst = max(worst, (float(difference / scale), name))
    return worst


@pytest.mark.parametrize("name", CASES)
def test_five_updates_equal_plain_torch(base, name):
    case = CASES[name]
    theirs = TorchRun(base, case)
    start = jax.tree.map(np.copy, to_tree(theirs.student))
    ours = OurRun(base, case, start)
    log = []
    for data in make_data():
        losses, grads, norm = theirs.update(**data)
        our_losses, our_grads, our_norm = ours.update(**data)
        grads = to_tree(grads)
        log.append({
            "losses": losses, "norm": norm, "grads": grads,
            "loss error": float(np.max(np.abs(np.asarray(our_losses) / losses - 1))),
            "norm error": abs(our_norm / norm - 1),
            "gradient error": error(our_grads, grads),
        })
    student = error(ours.state.student, to_tree(theirs.student))
    teacher = error(ours.state.teacher, to_tree(theirs.teacher))
    worst = {k: max(entry[k] for entry in log) for k in log[0] if k.endswith("error")}
    print(f"{name}: {worst}, student {student}, teacher {teacher}, norms "
          f"{[round(entry['norm'], 4) for entry in log]}, first losses {log[0]['losses']}")

    assert worst["loss error"] < TOLERANCE
    assert worst["norm error"] < TOLERANCE
    assert worst["gradient error"][0] < TOLERANCE, worst
    assert student[0] < TOLERANCE and teacher[0] < TOLERANCE, (student, teacher)

    # The case is what its name says, and compares more than zeros.
    norms = [entry["norm"] for entry in log]
    assert all(n > case.max_grad_norm for n in norms) == (case.max_grad_norm < 0.1)
    assert int(ours.state.step) == UPDATES
    flat = trees.flatten(log[0]["grads"])
    assert len(flat) == 2 * 7 * 3  # two leaves, seven linears, three stacks
    assert all(np.abs(g).max() > 0 for n, g in flat.items() if n.endswith("/b") or not case.zero_b)

    def moved(tree):
        return max(jax.tree.leaves(jax.tree.map(lambda x, y: np.abs(x - y).max(), tree, start)))

    assert moved(ours.state.student) > 1e-3
    assert (moved(ours.state.teacher) > 0) == (case.teacher == "ema")
