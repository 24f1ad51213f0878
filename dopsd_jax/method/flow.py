"""Rectified flow without networks: x = (1 - sigma) x0 + sigma noise, v = dx/dsigma = noise - x0.

sigma runs from 1 (noise) to 0 (data) and is float32 everywhere.
"""

from __future__ import annotations

import jax
import numpy as np

from dopsd_jax.core.checks import is_whole

SCHEDULES = ("shifted", "reference8", "reference")
MAX_STEPS = 1000  # as many as models of this kind are trained with; more is a mistake


def sigmas_shifted(num_steps: int, shift: float) -> np.ndarray:
    """sigma = s u / (1 + (s - 1) u) on u = 1, 1 - 1/S, .., 0.

    Args:
        num_steps: S, the number of denoiser calls, 1 to MAX_STEPS.
        shift: s > 0; 1 is linear, Z-Image-Turbo ships 3, see `Pipeline.shift_at`.

    Returns:
        float32 [S + 1], from exactly 1 down to exactly 0.

    Raises:
        ValueError: num_steps out of range or no whole number, or shift <= 0.

    Source: diffusers FlowMatchEulerDiscreteScheduler with sigmas = linspace(1, 1/S, S).
    """
    if not is_whole(num_steps):
        raise ValueError(f"num_steps: expected a whole number of denoiser calls, got {num_steps!r}")
    if num_steps < 1:
        raise ValueError(f"num_steps: expected at least 1 denoiser call, got {num_steps}")
    if num_steps > MAX_STEPS:
        raise ValueError(f"num_steps: expected at most {MAX_STEPS} denoiser calls, got {num_steps}")
    _check_shift(shift)
    u = np.append(np.linspace(1, 1 / num_steps, num_steps).astype(np.float32), np.float32(0))
    return (shift * u / (1 + (shift - 1) * u)).astype(np.float32)


def sigmas_reference8() -> np.ndarray:
    """The published 8-step training list of Z-Image: shift 6 applied twice to a 9-point grid.

    Differs from reference: there it is the default for 8 steps; here training uses the sampler's
    own shift 3 for every S and this only by name.

    Source: D-OPSD, z-image-turbo_self-distill-vlm; float32 [9].
    """
    def shifted(u):
        return 6 * u / (1 + 5 * u)

    grid = shifted(np.linspace(1.0, shifted(1e-3), 9))
    return np.append(grid[:8], 0).astype(np.float32)


def sigmas_reference(num_steps: int, shift: float) -> np.ndarray:
    """The published training list of FLUX.2-klein: the shift over u = 1, .., 0.001, then 0.

    The last real step thus begins next to the data, where the x0 loss weighs nothing.

    Differs from reference: there it is the default; here training uses the sampler's own grid,
    1, .., 1/S, for every model and this only by name.

    Args:
        num_steps: S, at least 2.
        shift: s > 0.

    Returns:
        float32 [S + 1], from exactly 1 down to exactly 0.

    Raises:
        ValueError: num_steps < 2 or shift <= 0.

    Source: D-OPSD, flux2-klein, FlowMatchEulerDiscreteScheduler.set_timesteps without sigmas.
    """
    if num_steps < 2:
        raise ValueError(f"schedule reference: expected at least 2 denoiser calls, got {num_steps}")
    _check_shift(shift)
    u = np.append(np.linspace(1, 0.001, num_steps), 0)
    return (shift * u / (1 + (shift - 1) * u)).astype(np.float32)


def _check_shift(shift: float) -> None:
    if shift <= 0:
        raise ValueError(f"shift: expected a positive number, got {shift}")


def make_sigmas(schedule: str, num_steps: int, shift: float) -> np.ndarray:
    """The schedule of a config: float32 [S + 1].

    Args:
        schedule: One of SCHEDULES: the sampler's own, or what a published trainer uses.
        num_steps: S.
        shift: Of the model, see `Pipeline.shift_at`; `reference8` has its own.

    Raises:
        ValueError: Unknown schedule, or a number of steps that it does not have.
    """
    if schedule == "shifted":
        return sigmas_shifted(num_steps, shift)
    if schedule == "reference":
        return sigmas_reference(num_steps, shift)
    if schedule == "reference8":
        if num_steps != 8:
            raise ValueError(f"schedule reference8 has 8 steps, got num_steps = {num_steps}")
        return sigmas_reference8()
    raise ValueError(f"schedule: expected one of {SCHEDULES}, got {schedule!r}")


def noised(x0: jax.Array, noise: jax.Array, sigma: jax.Array) -> jax.Array:
    """The state at sigma on the straight line from data to noise; sigma broadcasts against both."""
    return (1 - sigma) * x0 + sigma * noise


def x0_from_velocity(x: jax.Array, v: jax.Array, sigma: jax.Array) -> jax.Array:
    """Clean estimate x0 = x - sigma v."""
    return x - sigma * v


def euler_step(x: jax.Array, v: jax.Array, sigma: jax.Array, sigma_next: jax.Array) -> jax.Array:
    """One step of the sampler: x + (sigma_next - sigma) v."""
    return x + (sigma_next - sigma) * v
