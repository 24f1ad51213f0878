"""One builder of the train step: no other file makes a part of one."""

import ast
import inspect

from tests.commands import ROOT

# What a step is made of, and who may use it. The mini model's stages train other objectives.
PARTS = {"Method", "Batch", "method_of", "make_optimizer", "optimizer_of", "init_state", "dopsd",
         "sft", "make_train_step", "compiler_options", "parse_targets"}
OPTIONS = {"donate_argnums", "donate_argnames", "compiler_options"}
BUILDERS = ("run/step.py", "method/train_step.py", "mini/")
# That check LoRA targets and the method without a step; that takes arrays apart while loading.
ALLOWED = {"run/config.py": {"method_of", "parse_targets"}, "weights/load.py": {"donate_argnums"}}


def parts_in(tree):
    """(line, what) of every part of a step that a file's code makes."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "id", getattr(node.func, "attr", ""))
        arguments = [a.id for a in node.args if isinstance(a, ast.Name)]  # of partial, map, ..
        for found in (name, *arguments):
            if found in PARTS:
                yield node.lineno, found
        owner = getattr(getattr(node.func, "value", None), "id", "")
        if (owner, name) in (("lora", "init"), ("lokr", "init"), ("dora", "begun")):
            yield node.lineno, f"{owner}.{name}"
        yield from ((k.value.lineno, k.arg) for k in node.keywords if k.arg in OPTIONS)


def test_nothing_but_the_builder_makes_a_part_of_a_step():
    package = ROOT / "dopsd_jax"
    wrong = []
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        if not name.startswith(BUILDERS):
            wrong += [f"{name}:{line}: {what}" for line, what in parts_in(ast.parse(
                path.read_text())) if what not in ALLOWED.get(name, ())]
    assert not wrong, "\n".join(wrong)


def test_the_search_for_parts_finds_them():
    code = """
        step = jax.jit(make_train_step(method, train_step.optimizer_of(c), o), donate_argnums=0)
        student = lora.init(rng, params, targets, 4)
        make = functools.partial(init_state, rng=rng)
    """
    found = {what for _, what in parts_in(ast.parse(inspect.cleandoc(code)))}
    assert found == {"make_train_step", "optimizer_of", "donate_argnums", "lora.init", "init_state"}
