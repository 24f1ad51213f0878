"""D-OPSD as a plain torch loop over diffusers' transformers, for the oracles.

The adapters are peft's, or of LoKr those of lycoris. Written from the published trainer: the
network sees a time t and gives out = dx/dt, t runs to `end`, the clean estimate is
x + (end - t) out, and a step is x + (t_next - t) out.
"""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from lycoris.modules.lokr import LokrModule
from peft import LoraConfig

from dopsd_jax.core import trees
from dopsd_jax.method import dora, train_step

RANK, ALPHA = 4, 8
FACTOR = 8  # of LoKr: with a side of 64 the second factor is whole, with 170 of low rank
UPDATES = 5
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
    anchor: float = 0.0
    kept: tuple[bool, ...] = ()  # of every row; empty: no row keeps
    kind: str = "lora"


class TorchRun:
    """D-OPSD in plain torch; a family says how its network is called.

    Attributes:
        end: The time at which the data lie.
    """

    end: float

    def __init__(self, model, targets, case):
        self.case = case
        self.model = model
        self.model.requires_grad_(False)
        torch.manual_seed(2)
        self.lokrs = {}
        if case.kind == "lokr":
            self.lokrs = {role: self.add_lokr(targets) for role in ("student", "teacher")}
            self.student, self.teacher = (
                {f"{module}.{name}.{role}.weight": p
                 for module, lokr in lokrs.items() for name, p in lokr.named_parameters()}
                for role, lokrs in self.lokrs.items()
            )
        else:
            for role in ("student", "teacher"):
                self.model.add_adapter(
                    LoraConfig(r=RANK, lora_alpha=ALPHA, init_lora_weights="gaussian",
                               target_modules=targets, use_dora=case.kind == "dora"),
                    adapter_name=role,
                )
            parameters = dict(self.model.named_parameters())
            self.student, self.teacher = (
                {n: p for n, p in parameters.items() if f".{role}." in n}
                for role in ("student", "teacher")
            )
        with torch.no_grad():
            for name, p in self.student.items():
                if "magnitude" in name:
                    p.mul_(1 + 0.2 * torch.randn_like(p))
                elif ("lora_B" in name or "lokr_w2" in name) and not case.zero_b:
                    p.normal_(0, 0.1)
                self.teacher[name.replace(".student.", ".teacher.")].copy_(p)
        # By the student's names, as its gradients and optimizer states are.
        self.teacher = {n.replace(".teacher.", ".student."): p for n, p in self.teacher.items()}
        self.optimizer = torch.optim.AdamW(
            self.student.values(), lr=case.learning_rate, betas=(0.9, 0.999), eps=case.eps,
            weight_decay=case.weight_decay,
        )
        self.updates = 0

    def times(self):
        """t of every step and of the end."""
        raise NotImplementedError

    def start(self, noise):
        """The noise [B, h, w, C] as the network's x."""
        raise NotImplementedError

    def out(self, x, t, context):
        """The network's own output for what one role sees."""
        raise NotImplementedError

    def add_lokr(self, targets):
        """One LoKr on every linear whose name ends in a target: {name: module}."""
        found = {n: m for n, m in self.model.named_modules() if n.endswith(tuple(targets))}
        made = {
            n: LokrModule(n, m, lora_dim=RANK, alpha=ALPHA, factor=FACTOR)
            for n, m in found.items()
        }
        for lokr in made.values():
            lokr.apply_to()
        return made

    def raw(self, role, x, t, context):
        if self.lokrs:
            self.set_lokr(role)
            return self.out(x, t, context)
        self.model.set_adapter(role)
        for p in self.student.values():
            p.requires_grad_(True)  # set_adapter freezes the adapter it leaves
        return self.out(x, t, context)

    def set_lokr(self, role):
        for name, lokrs in self.lokrs.items():
            for lokr in lokrs.values():
                lokr.multiplier = float(name == role)

    @torch.no_grad()
    def untuned(self, x, t, context):
        """What the model without any adapter gives out."""
        if self.lokrs:
            self.set_lokr(None)
            return self.out(x, t, context)
        self.model.disable_adapters()
        out = self.out(x, t, context)
        self.model.enable_adapters()
        return out

    def loss(self, x, t, u_student, others):
        """Squared distances of the student to others, a mean for every row: others, [B] each."""
        def clean(u):
            return x + (self.end - t) * u if self.case.loss == "x0" else u

        return [((clean(u_student) - clean(u)) ** 2).flatten(1).mean(1) for u in others]

    def update(self, noise, student, teacher):
        """One optimizer step; returns the losses of the rollout's steps."""
        case = self.case
        x = self.start(torch.from_numpy(noise))
        losses = []
        for t, t_next in itertools.pairwise(self.times()):
            x = x.detach()
            with torch.no_grad():
                if case.teacher == "untuned":
                    u_teacher = self.untuned(x, t, teacher)
                else:
                    role = "student" if case.teacher == "live" else "teacher"
                    u_teacher = self.raw(role, x, t, teacher)
            u_student = self.raw("student", x, t, student)
            to_teacher, to_untuned = self.loss(
                x, t, u_student, (u_teacher, self.untuned(x, t, student))
            )
            kept = case.kept or (False,) * len(x)
            rows = [
                to_untuned[i] if keeps else to_teacher[i] + case.anchor * to_untuned[i]
                for i, keeps in enumerate(kept)
            ]
            losses.append(sum(rows) / len(rows))
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


LEAVES = {"lora_A": "a", "lora_B": "b", "lora_magnitude_vector": "m", "lokr_w1": "w1",
          "lokr_w2": "w2", "lokr_w2_a": "w2_up", "lokr_w2_b": "w2_down"}


def to_tree(tensors):
    """peft's and lycoris' tensors by name -> our LoRA tree, layers stacked."""
    stacks = {}
    for name, tensor in tensors.items():
        stack, layer, module, side = re.fullmatch(
            r"(\w+)\.(\d+)\.(.+)\.(\w+)\.(?:student|teacher)\.weight", name
        ).groups()
        module = module.replace("to_out.0", "to_out").replace(".", "/")
        layers = stacks.setdefault(f"{stack}/{module}/{LEAVES[side]}", {})
        layers[int(layer)] = tensor.detach().numpy().T
    return trees.unflatten({
        name: np.stack([layers[i] for i in sorted(layers)]) for name, layers in stacks.items()
    })


class OurRun:
    """The same through make_train_step; a link before the optimizer keeps the gradients."""

    def __init__(self, velocity, base, case, student, sigmas, context):
        """`context`: (what one role sees, role) -> Context."""
        keep_grads = optax.GradientTransformation(
            lambda p: jax.tree.map(jnp.zeros_like, p), lambda g, state, p: (g, g)
        )
        optimizer = optax.chain(keep_grads, train_step.make_optimizer(
            learning_rate=case.learning_rate, warmup_steps=case.warmup_steps, b1=0.9, b2=0.999,
            eps=case.eps, weight_decay=case.weight_decay, max_grad_norm=case.max_grad_norm,
        ))
        method = train_step.Method(
            trainable="lora", lora_scale=ALPHA / RANK, teacher=case.teacher,
            ema_decay=case.ema_decay, loss=case.loss, anchor=case.anchor, keeps=bool(case.kept),
        )
        self.kept = jnp.asarray(case.kept) if case.kept else None
        self.state = train_step.init_state(
            jax.tree.map(jnp.asarray, student), optimizer, jax.random.key(0)
        )
        self.step = jax.jit(
            train_step.make_train_step(method, optimizer, train_step.dopsd(method, velocity)),
            donate_argnums=0,
            compiler_options={"xla_backend_optimization_level": 0},  # half the compile time
        )
        self.base, self.sigmas, self.context = {"params": base}, jnp.asarray(sigmas), context
        if case.kind == "dora":
            paths = {n.removesuffix("/m") for n in trees.flatten(student) if n.endswith("/m")}
            self.base["norms"] = dora.column_norms(base, paths)

    def update(self, noise, student, teacher):
        batch = train_step.Batch(
            jnp.asarray(noise), self.context(student, "student"),
            self.context(teacher, "teacher"), self.sigmas, kept=self.kept,
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


def compare(name, case, theirs, ours, start, updates, num_leaves):
    """Runs both on the same updates and asserts that they agree.

    Args:
        name, case: For the printed line, and what is asserted of the case.
        theirs, ours: A TorchRun and an OurRun that begin with the LoRA `start`.
        updates: Keyword arguments of `update`, one dict per update.
        num_leaves: Leaves of the LoRA tree.
    """
    log = []
    for data in updates:
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
    assert len(flat) == num_leaves
    assert all(np.abs(g).max() > 0 for n, g in flat.items() if n.endswith("/b") or not case.zero_b)

    def moved(tree):
        return max(jax.tree.leaves(jax.tree.map(lambda x, y: np.abs(x - y).max(), tree, start)))

    assert moved(ours.state.student) > 1e-3
    assert (moved(ours.state.teacher) > 0) == (case.teacher == "ema")
