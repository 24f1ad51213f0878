"""Tensor names of the toy transformer."""

from __future__ import annotations

from dopsd_jax.weights.names import LINEAR, Modules, Rule, linear_modules, rule
from tests.toy_family.network import ToyConfig

TOY_TARGETS = {
    "published": (r"strata/(ask|give|shrink)/kernel",),
    "attention": (r"strata/(ask|seek|give|gather)/kernel",),
    "all": (r"strata/[^/]+/kernel",),
}


def toy_table(config: ToyConfig) -> list[Rule]:
    ends = "clock|enter|read|leave"
    return [
        rule("pegs.anchor", "anchor"),
        rule("ends.{p}.weight", "{p}/kernel", LINEAR, p=ends),
        rule("ends.{p}.bias", "{p}/bias", p=ends),
        rule("trunk.{layer}.mingle.{p}.weight", "strata/{p}/kernel", LINEAR,
             p="ask|seek|give|gather"),
        rule("trunk.{layer}.{p}.weight", "strata/{p}/kernel", LINEAR, p="grow|shrink|pulse"),
        rule("trunk.{layer}.{p}.scale", "strata/{p}/scale", p="calm|still"),
    ]


def toy_modules(config: ToyConfig) -> Modules:
    return linear_modules(toy_table(config), "toy_model.")
