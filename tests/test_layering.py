"""Dependencies run one way (design): parsed from the imports of the package's source."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "dopsd_jax"

# Every file belongs to the layer with the longest entry that fits it, and may import from its own
# layer and from those before it, in this order. An entry that ends with "/" is a folder.
LAYERS = [
    ("core", ["core/"]),
    ("maths, shared layers, data",
     ["method/flow.py", "method/__init__.py", "data/", "models/rope.py", "models/attention.py",
      "models/adapters.py", "models/layers.py", "models/quantization.py"]),
    ("networks, LoRA trees",
     ["models/z_image.py", "models/flux2.py", "models/vae.py", "models/vae_strips.py",
      "models/qwen3.py", "models/qwen3_vl.py", "models/__init__.py", "method/lora.py",
      "method/dora.py", "method/lokr.py"]),
    ("denoiser, weights", ["models/", "weights/"]),
    ("the method", ["method/"]),
    ("a run", ["run/"]),
    ("planning", ["planning/"]),
    ("the mini model, comparisons, benchmarks", ["mini/", "compare/", "bench/"]),
    ("commands", ["", "mini/gallery.py", "data/__main__.py"]),
]
# Files of the families, and what they share: an autoencoder, the registry, writers of random
# weights. The quickstart ends by printing a command for the users of one; bench/ renders the
# published loop of one in torch.
FAMILY_PLACES = (
    "models/z_image", "models/flux2", "models/vae.py", "weights/z_image", "weights/flux2",
    "weights/vae_names.py", "weights/families.py", "weights/random_flux2.py",
    "weights/random_pipeline.py", "quickstart.py", "bench/",
)
FAMILY_NAMES = r"z_?-?image|flux_?-?\.?2|klein"
TRAINING_WORDS = r"student|teacher|(\b|_)loss(es)?(\b|_)"
FOREIGN = {
    "torch", "tensorflow", "diffusers", "peft", "lycoris", "torchvision", "accelerate",
}
# Metrics of real models run in torch; scores.py is the only way to them, for two commands.
TORCH_FILES = {"compare/features.py", "compare/lpips.py", "compare/hpsv2.py",
               "compare/image_reward.py"}
TORCH_LOOP = "bench/torch_loop.py"  # what the package's speed is compared with
TORCH_WAY = "compare/scores.py"
TORCH_COMMANDS = {"score.py", "paired.py"}


def source_files():
    return sorted((ROOT / PACKAGE).rglob("*.py"))


def relative(path):
    return path.relative_to(ROOT / PACKAGE).as_posix()


def layer_of(name):
    return max(
        (len(e), index) for index, (_, entries) in enumerate(LAYERS) for e in entries
        if name == e or (e.endswith("/") and name.startswith(e)) or not e
    )[1]


def module_file(dotted):
    """The file of a module of the package inside it, or None where there is no such module."""
    path = ROOT.joinpath(*dotted.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return relative(candidate)
    return None


def imported_modules(path):
    """(line, dotted module) of every import anywhere in a file, functions included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write it in full"
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            own = node.module.split(".")[0] == PACKAGE
            found = [m for m in submodules if own and module_file(m)]
            yield from ((node.lineno, m) for m in found)
            if len(found) < len(submodules):
                yield node.lineno, node.module


def own_imports():
    """(importing file, line, imported file), the package's own only."""
    for path in source_files():
        for line, module in imported_modules(path):
            if module.split(".")[0] == PACKAGE:
                target = module_file(module)
                assert target, f"{relative(path)}:{line}: no module {module}"
                yield relative(path), line, target


def test_the_parser_sees_what_it_should():
    edges = {(a, b) for a, _, b in own_imports()}
    assert len(edges) > 30
    for edge in [
        ("method/rollout.py", "method/flow.py"), ("method/train_step.py", "method/rollout.py"),
        ("method/lora.py", "core/trees.py"),
        ("models/z_image_denoiser.py", "models/z_image.py"),
        ("weights/load.py", "weights/names.py"),
    ]:
        assert edge in edges


def test_dependencies_run_one_way():
    wrong = [
        f"{name}:{line} ({LAYERS[layer_of(name)][0]}) imports {target} "
        f"({LAYERS[layer_of(target)][0]})"
        for name, line, target in own_imports()
        if target != "__init__.py" and layer_of(target) > layer_of(name)
    ]
    assert not wrong, "\n".join(wrong)


def test_no_import_goes_in_a_circle():
    edges = {}
    for name, _, target in own_imports():
        edges.setdefault(name, set()).add(target)

    def visit(name, path):
        assert name not in path, " -> ".join([*path[path.index(name):], name])
        if name not in done:
            for target in sorted(edges.get(name, ())):
                visit(target, [*path, name])
            done.add(name)

    done = set()
    for name in sorted(edges):
        visit(name, [])


def test_networks_read_no_files_and_know_no_training_words():
    wrong = []
    for path in sorted((ROOT / PACKAGE / "models").glob("*.py")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if re.search(TRAINING_WORDS, line, re.IGNORECASE):
                wrong.append(f"{relative(path)}:{number}: {line.strip()}")
        for line, module in imported_modules(path):
            if module.split(".")[0] in {"optax", "orbax", "safetensors", "pathlib", "os", "io"}:
                wrong.append(f"{relative(path)}:{line}: imports {module}")
    assert not wrong, "\n".join(wrong)


def named_in_code(path):
    """(line, text) of names and texts in a file's code; comments and docstrings cite sources."""
    tree = ast.parse(path.read_text())
    docstrings = {
        id(node.body[0].value) for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and ast.get_docstring(node) is not None
    }
    for node in ast.walk(tree):
        text = node.value if isinstance(node, ast.Constant) else None
        if isinstance(text, str) and id(node) not in docstrings:
            yield node.lineno, re.sub(r"configs/\w+\.py", "", text)  # an example in a message
        for attribute in ("id", "attr", "name", "arg", "module"):
            value = getattr(node, attribute, None)
            if isinstance(value, str):
                yield getattr(node, "lineno", 0), value


def test_no_family_is_named_outside_its_own_files():
    wrong = [
        f"{relative(path)}:{line}: {text:.60}"
        for path in source_files() if not relative(path).startswith(FAMILY_PLACES)
        for line, text in named_in_code(path) if re.search(FAMILY_NAMES, text, re.IGNORECASE)
    ]
    assert not wrong, "\n".join(wrong)


def test_no_file_knows_the_family_that_only_tests_have():
    """What weights/test_families.py proves holds only as long as no file helps the toy family."""
    # Its layers are called strata, a word that nothing else here uses.
    names = r"toy_|toy[A-Z]|\bTOY|\bToy|strat(a|um)\b|\btests\b"
    wrong = [
        f"{relative(path)}:{line}: {text:.60}" for path in source_files()
        for line, text in named_in_code(path) if re.search(names, text)
    ]
    assert not wrong, "\n".join(wrong)


def test_data_imports_no_network():
    wrong = [
        f"{name}:{line} imports {target}" for name, line, target in own_imports()
        if name.startswith("data/") and not target.startswith(("data/", "core/"))
        and target != "__init__.py" and name != "data/__main__.py"  # a command
    ]
    wrong += [
        f"{relative(path)}:{line} imports {module}"
        for path in source_files() if relative(path).startswith("data/")
        for line, module in imported_modules(path) if module.split(".")[0] in {"flax", "optax"}
    ]
    assert not wrong, "\n".join(wrong)


def test_core_knows_nothing_of_the_rest():
    wrong = [f"{name}:{line} imports {target}" for name, line, target in own_imports()
             if name.startswith("core/") and not target.startswith("core/")]
    assert not wrong, "\n".join(wrong)


def test_the_loop_knows_no_objective():
    wrong = [f"{name}:{line} imports {target}" for name, line, target in own_imports()
             if name == "run/loop.py" and target != "__init__.py"
             and not target.startswith("core/")]
    assert not wrong, "\n".join(wrong)


def test_nothing_but_a_sequence_of_trainings_imports_the_training_command():
    importers = {name for name, _, target in own_imports() if target == "train.py"}
    assert importers == {"tasks.py"}


@pytest.mark.parametrize("path", source_files(), ids=relative)
def test_no_module_imports_other_frameworks(path):
    allowed = {"torch"} if relative(path) in {TORCH_WAY, *TORCH_FILES} else set()
    if relative(path) == TORCH_LOOP:
        allowed = {"torch", "diffusers", "peft"}
    wrong = [f"{line}: {m}" for line, m in imported_modules(path)
             if m.split(".")[0] in FOREIGN - allowed]
    assert not wrong


def test_only_the_scoring_commands_lead_to_torch():
    edges = {(a, b) for a, _, b in own_imports()}
    assert not [a for a, b in edges if b == TORCH_LOOP]  # a process of its own
    assert {a for a, b in edges if b in TORCH_FILES} - TORCH_FILES == {TORCH_WAY}
    assert {a for a, b in edges if b == TORCH_WAY} == TORCH_COMMANDS
    assert not [a for a, b in edges if b in TORCH_COMMANDS]
    # Nothing outside its functions needs torch: what is missing is then said in words.
    module = ast.parse((ROOT / PACKAGE / TORCH_WAY).read_text())
    top = {a.name for n in module.body if isinstance(n, ast.Import) for a in n.names}
    top |= {f"{n.module}{name}" for n in module.body if isinstance(n, ast.ImportFrom)
            for name in ("", *(f".{a.name}" for a in n.names))}
    assert not {m for m in top if m == "torch" or module_file(m) in TORCH_FILES}
