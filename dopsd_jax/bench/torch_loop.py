"""Child process: the published trainer's loop in torch on random weights made in place.

    python -m dopsd_jax.bench.torch_loop CASE    # as JSON; prints one line of JSON

diffusers' transformer, peft's adapters for student and teacher, bfloat16, gradient checkpointing,
torch's fused attention, AdamW: the rollout's losses are summed and go backward once.
"""

from __future__ import annotations

import itertools
import math
import sys
import time

import torch
from diffusers import ZImageTransformer2DModel
from peft import LoraConfig

from dopsd_jax.bench.case import (
    ALPHA,
    DTYPES,
    MODELS,
    RANK,
    STEPS,
    TARGETS,
    WARM_UPS,
    Case,
    Measured,
)
from dopsd_jax.method.flow import sigmas_shifted

EMA_DECAY = 0.9999


class Loop:
    """Model, two adapters and optimizer of a case."""

    def __init__(self, case: Case, device: torch.device):
        self._case, self._device = case, device
        self._dtype = dtype = getattr(torch, DTYPES[case.model])
        torch.manual_seed(0)
        with torch.device("meta"):
            model = ZImageTransformer2DModel(**MODELS[case.model])
        self._model = model.to(dtype).to_empty(device=device)
        with torch.no_grad():
            for name, p in self._model.named_parameters():
                p.normal_(0, p.shape[-1] ** -0.5 if p.ndim == 2 else 0.02)
                if "norm" in name:
                    p.add_(1)
        self._model.requires_grad_(False)
        for role in ("student", "teacher"):
            config = LoraConfig(r=RANK, lora_alpha=ALPHA, init_lora_weights="gaussian",
                                target_modules=list(TARGETS))
            self._model.add_adapter(config, adapter_name=role)
        parameters = dict(self._model.named_parameters())
        self._student = {n: p for n, p in parameters.items() if ".student." in n}
        self._teacher = [parameters[n.replace(".student.", ".teacher.")] for n in self._student]
        for p, t in zip(self._student.values(), self._teacher, strict=True):
            t.data.copy_(p.data)
        self._model.enable_gradient_checkpointing()
        self._model.train()
        if case.compiled:
            self._model.compile_repeated_blocks()
        self._optimizer = torch.optim.AdamW(
            self._student.values(), lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01,
            fused=device.type == "cuda",
        )
        width = MODELS[case.model]["cap_feat_dim"]
        self._captions = {
            role: [torch.randn(length, width, device=device, dtype=dtype)] * case.batch
            for role, length in (("student", case.student_tokens), ("teacher", case.teacher_tokens))
        }

    def _raw(self, role: str, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        self._model.set_adapter(role)
        if role == "student":
            for p in self._student.values():
                p.requires_grad_(True)  # set_adapter freezes the adapter it leaves
        out = self._model(
            list(x[:, :, None]), t.expand(len(x)), self._captions[role], return_dict=False
        )[0]
        return torch.stack(out)[:, :, 0]

    def update(self) -> float:
        """One optimizer step; returns the loss."""
        h, w, channels = self._case.latent_shape
        x = torch.randn(self._case.batch, channels, h, w, device=self._device,
                        dtype=self._dtype)
        ts = torch.from_numpy(1 - sigmas_shifted(STEPS, 3.0)).to(self._device, self._dtype)
        losses = []
        for t, t_next in itertools.pairwise(ts):
            x = x.detach()
            with torch.no_grad():
                theirs = x + (1 - t) * self._raw("teacher", x, t)
            u = self._raw("student", x, t)
            losses.append(((x + (1 - t) * u - theirs) ** 2).mean())
            x = x + u * (t_next - t)
        loss = sum(losses) / STEPS
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._student.values(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        torch._foreach_lerp_(self._teacher, list(self._student.values()), 1 - EMA_DECAY)
        return loss.item()  # waits for the device


def measure(case: Case) -> Measured:
    """Builds and runs the loop of a case."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    loop = Loop(case, device)

    def timed() -> tuple[float, float]:
        start = time.perf_counter()
        loss = loop.update()
        return loss, time.perf_counter() - start

    _, first = timed()
    times = [timed() for _ in range(1, WARM_UPS + case.updates)]
    loss = times[-1][0]
    if not math.isfinite(loss):
        raise ValueError(f"loss: expected a finite number, got {loss}")
    seconds = sorted(s for _, s in times[WARM_UPS - 1 :])
    return Measured(
        first, seconds[len(seconds) // 2], seconds[-1],
        torch.cuda.max_memory_allocated() if gpu else 0, loss,
        torch.cuda.get_device_name() if gpu else "cpu",
    )


if __name__ == "__main__":
    print(measure(Case.from_json(sys.argv[1])).to_json())
