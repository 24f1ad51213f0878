"""The toy family: its own transformer, text rules and shift, and the plain autoencoder."""

from dopsd_jax.models.family import Family, TextRules
from dopsd_jax.weights.vae_names import PLAIN_VAE
from tests.toy_family.names import TOY_TARGETS, toy_modules, toy_table
from tests.toy_family.network import NAMES, ToyConfig, ToyDenoiser, ToyTransformer

TOY = Family(
    pipeline="ToyPipeline",
    config=ToyConfig,
    network=ToyTransformer,
    denoiser=ToyDenoiser,
    names=NAMES,
    table=toy_table,
    modules=toy_modules,
    targets=TOY_TARGETS,
    text=lambda config: TextRules((1, 3), True, (64, 128), attends_pads=False),
    vae=PLAIN_VAE,
    published={"toy": ToyConfig()},
    shift=lambda num_steps, num_tokens: 1 + num_tokens / 64,
)
