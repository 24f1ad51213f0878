"""The story that exported weights carry: the model card, its code, and the header of the file."""

import hashlib
import json
import re
import shutil

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors import safe_open

from dopsd_jax import export as export_lib
from dopsd_jax.core import trees
from dopsd_jax.method import dora
from dopsd_jax.method import lora as lora_lib
from dopsd_jax.run import card, previews, story
from dopsd_jax.run import workdir as workdir_lib
from dopsd_jax.run.loras import Named
from dopsd_jax.weights import lora_files
from dopsd_jax.weights.families import FAMILIES
from tests.finished_run import PROMPTS, load_params, make_run, pictures

TOLD = story.Told("Tongyi-MAI/Z-Image-Turbo", "apache-2.0", "blueprint style")
PLACES = {"diffusers": "style.safetensors", "comfyui": "style.safetensors", "peft": "style"}


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("card") / "my-run-7", tiny.pipeline)


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """Folders of an export in each format."""
    folders = {}
    for fmt, name in PLACES.items():
        folders[fmt] = tmp_path_factory.mktemp(fmt)
        export_lib.export(str(run), fmt, str(folders[fmt] / name), told=TOLD)
    return folders


def place_of(exported, fmt):
    return exported[fmt] / PLACES[fmt] if fmt == "peft" else exported[fmt]


def test_the_hub_reads_what_it_shows(exported):
    for fmt in PLACES:
        read = ModelCard.load(place_of(exported, fmt) / "README.md")
        assert read.data.to_dict() == {
            "base_model": "Tongyi-MAI/Z-Image-Turbo", "base_model_relation": "adapter",
            "instance_prompt": "blueprint style", "library_name": "diffusers",
            "license": "apache-2.0", "pipeline_tag": "text-to-image",
            "tags": ["text-to-image", "diffusers", "lora", "template:diffusion-lora", "d-opsd"],
            "widget": [{"text": prompt, "output": {"url": f"images/prompt_{i}.png"}}
                       for i, prompt in enumerate(PROMPTS, 1)],
        }


def test_the_card_says_how_it_came_about(exported):
    text = (exported["diffusers"] / "README.md").read_text()
    for part in (
        "tuned with D-OPSD in 20 updates on 8 image-text pairs", "| rows of data | 8 |",
        "| `learning_rate` | `0.0003` |", "| `lora.rank` | `4` |", "| `recipe` | `vlm` |",
        "| `anchor` | `0.5` |", "| style | 30.5 | 10.5 |", "| drift | 0 | 2 |",
        "Trigger words: `blueprint style`",
    ):
        assert part in text, part
    assert "weight_decay" not in text  # a default that nobody asks for
    for picture in re.findall(r"\((images/.+?)\)", text):
        Image.open(exported["diffusers"] / picture).verify()


def test_the_pictures_are_those_that_were_drawn_and_none_of_the_data(exported):
    drawn = pictures(0, 2) // 3
    folder = exported["diffusers"] / "images"
    for i in (1, 2):
        np.testing.assert_array_equal(Image.open(folder / f"prompt_{i}.png"), drawn[i - 1])
    learned = np.asarray(Image.open(folder / "learned.png"))
    want = previews.grid([("base", pictures(0, 2) // 2), ("student", drawn)])
    np.testing.assert_array_equal(learned, want)


def test_nothing_tells_where_things_lie_on_this_machine(run, exported, tiny):
    for fmt in PLACES:
        for file in (f for f in exported[fmt].rglob("*") if f.is_file()):
            for private in (run.parent, run.name, "secret photos", tiny.pipeline.name):
                assert str(private).encode() not in file.read_bytes(), (file, private)


def snippet(folder):
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    return code


def execute(code, pipeline, folder, monkeypatch):
    """Runs a card's code in its folder, where the base model lies under its name on the hub."""
    (folder / "Tongyi-MAI").mkdir(exist_ok=True)
    link = folder / "Tongyi-MAI" / "Z-Image-Turbo"
    link.symlink_to(pipeline)
    monkeypatch.chdir(folder)
    names = {}
    try:
        exec(code, names)
    finally:
        shutil.rmtree(folder / "Tongyi-MAI")
    assert Image.open(folder / "drawn.png").size == (48, 32)
    (folder / "drawn.png").unlink()
    return names["pipe"]


@pytest.mark.parametrize("fmt", PLACES)
def test_the_code_of_the_card_draws_with_it(run, exported, tiny, monkeypatch, fmt):
    folder = exported[fmt]
    pipe = execute(snippet(place_of(exported, fmt)), tiny.pipeline, folder, monkeypatch)
    layer = next(m for n, m in pipe.transformer.named_modules()
                 if n.endswith("layers.0.attention.to_q"))
    ((adapter, scale),) = layer.scaling.items()
    a, b = (x[adapter].weight.detach().float() for x in (layer.lora_A, layer.lora_B))
    tree, spec = workdir_lib.read_lora(run)
    pair = {k: x[0] for k, x in tree["layers"]["attention"]["to_q"].items()}
    np.testing.assert_allclose(scale * (b @ a).numpy().T, spec.scale * pair["a"] @ pair["b"],
                               atol=0.01)
    assert pipe.transformer.dtype == torch.bfloat16


@pytest.fixture(scope="module")
def adapter_runs(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return {kind: make_run(folder / kind, tiny.pipeline, kind) for kind in ("dora", "lokr")}


@pytest.mark.parametrize("kind, fmt", [
    ("dora", "diffusers"), ("dora", "peft"),
    ("lokr", "diffusers"), ("lokr", "peft"), ("lokr", "comfyui"),
])
def test_cards_of_dora_and_lokr_say_what_they_are_and_draw(
    adapter_runs, tiny, tmp_path, monkeypatch, kind, fmt
):
    out, run = tmp_path / PLACES[fmt], adapter_runs[kind]
    export_lib.export(str(run), fmt, str(out), told=TOLD)
    folder = out if fmt == "peft" else tmp_path
    text = (folder / "README.md").read_text()
    name = {"dora": "DoRA", "lokr": "LoKr"}[kind]
    for part in (f"A {name} ", f"| `lora.kind` | `{kind}` |", "| `lora.rank` | `4` |"):
        assert part in text, part
    assert ("| `lora.factor` | `4` |" in text) == (kind == "lokr")
    assert ("ComfyUI would draw something else" in text) == (kind == "dora")
    assert "A LoRA" not in text and ModelCard.load(folder / "README.md").data.tags[2] == kind
    file = out / lora_files.PEFT_WEIGHTS if fmt == "peft" else out
    with safe_open(file, "np") as handle:
        header = handle.metadata()
    assert header["modelspec.description"].startswith(f"A {name} ")
    # What stands in the tensors of a LoKr, and of diffusers' files, is no longer in alpha.
    plain = (kind, fmt) in (("dora", "peft"), ("lokr", "comfyui"))
    assert header["ss_network_alpha"] == ("8" if plain else "4")
    pipe = execute(snippet(folder), tiny.pipeline, tmp_path, monkeypatch)
    layer = next(m for n, m in pipe.transformer.named_modules()
                 if n.endswith("layers.0.attention.to_q"))
    before = layer.get_base_layer().weight.detach().float().numpy().T
    layer.merge()
    got = layer.get_base_layer().weight.detach().float().numpy().T
    params = load_params(tiny.pipeline)
    tree, spec = workdir_lib.read_lora(run)
    tree = dora.ready(lora_lib.scaled(tree, spec.scale), params)
    want = lora_lib.merge(params, tree, 1.0)["layers"]["attention"]["to_q"]["kernel"][0]
    assert np.abs(got - before).max() > 0.05
    np.testing.assert_allclose(got, want, atol=0.01)


def test_all_weights_have_a_card_too(tiny, tmp_path, monkeypatch):
    workdir = make_run(tmp_path / "full", tiny.pipeline, trainable="full", sample_prompts=())
    out = tmp_path / "out" / "transformer"
    for _ in range(2):  # the second replaces the first, card and all
        export_lib.export(str(workdir), "diffusers", str(out), told=TOLD)
    read = ModelCard.load(out / "README.md")
    assert read.data.base_model_relation == "finetune" and "lora" not in read.data.tags
    assert "All weights of the transformer" in read.text and "LoRA" not in read.text
    code = snippet(out).replace("height=1024", "height=32").replace("width=1024", "width=48")
    pipe = execute(code, tiny.pipeline, out.parent, monkeypatch)
    want = trees.flatten(workdir_lib.read_full(workdir))["layers/attention/to_q/kernel"][0]
    got = pipe.transformer.layers[0].attention.to_q.weight.detach().float().numpy().T
    np.testing.assert_allclose(got, want, atol=1e-2)


def test_the_other_family_says_which_tool_opens_which_file(tiny_flux2, tmp_path, monkeypatch):
    workdir = make_run(tmp_path / "run", tiny_flux2)
    for fmt in ("diffusers", "comfyui"):
        export_lib.export(str(workdir), fmt, str(tmp_path / fmt / "style.safetensors"), told=TOLD)
    text = (tmp_path / "comfyui" / "README.md").read_text()
    assert "diffusers does not open this file" in text and "```python" not in text
    pipe = execute(snippet(tmp_path / "diffusers"), tiny_flux2, tmp_path / "diffusers", monkeypatch)
    assert pipe.get_list_adapters() == {"transformer": ["default_0"]}


def header_of(file):
    with safe_open(file, framework="numpy") as f:
        return f.metadata()


@pytest.mark.parametrize("fmt, alpha", [("diffusers", "4"), ("comfyui", "8"), ("peft", "8")])
def test_the_header_says_what_is_true(run, exported, tmp_path, fmt, alpha):
    file = exported[fmt] / PLACES[fmt]
    file = file / "adapter_model.safetensors" if fmt == "peft" else file
    header, content = header_of(file), file.read_bytes()
    ours = json.loads(header.pop("dopsd_jax_lora"))
    assert (ours["rank"], ours["alpha"], ours["base_model"]) == (4, 8.0, TOLD.base_model)
    end = 8 + int.from_bytes(content[:8], "little")
    assert header == {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "ZImagePipeline/lora",  # of no published size
        "modelspec.implementation": "diffusers",
        "modelspec.title": "style",
        "modelspec.description": "A LoRA of rank 4 for Tongyi-MAI/Z-Image-Turbo, tuned with D-OPSD "
                                 "in 20 updates on 8 image-text pairs.",
        "modelspec.resolution": "1024x1024",
        "modelspec.trigger_phrase": "blueprint style",
        "modelspec.license": "apache-2.0",
        "modelspec.hash_sha256": f"0x{hashlib.sha256(content[end:]).hexdigest()}",
        "ss_output_name": "style",
        "ss_base_model_version": "ZImagePipeline",
        "ss_sd_model_name": "Tongyi-MAI/Z-Image-Turbo",
        "ss_network_dim": "4", "ss_network_alpha": alpha, "ss_steps": "20",
        "ss_num_train_images": "8", "ss_learning_rate": "0.0003", "ss_seed": "30",
    }
    again = tmp_path / PLACES[fmt]
    export_lib.export(str(run), fmt, str(again), told=TOLD)
    again = again / "adapter_model.safetensors" if fmt == "peft" else again
    assert again.read_bytes() == content


@pytest.mark.parametrize("fmt", PLACES)
def test_it_is_read_back_exactly(run, exported, fmt):
    got, spec = lora_files.read_lora(
        exported[fmt] / PLACES[fmt],
        FAMILIES["ZImagePipeline"].modules(next(iter(FAMILIES["ZImagePipeline"].published.values()))))
    want, _ = workdir_lib.read_lora(run)
    assert (spec.rank, spec.alpha) == (4, 8.0)
    for name, x in trees.flatten(want).items():
        np.testing.assert_array_equal(trees.flatten(got)[name], x)


def test_a_readme_that_is_not_ours_or_was_edited_stays(run, tiny, tmp_path, caplog):
    readme = tmp_path / "README.md"
    readme.write_text("# My project\n")
    export_lib.export(str(run), "diffusers", str(tmp_path / "a.safetensors"))
    assert readme.read_text() == "# My project\n" and "stays as it is" in caplog.text
    with pytest.raises(ValueError, match="expected none, or the card of a.safetensors"):
        card.check_place(tmp_path, "a.safetensors")
    readme.unlink()
    export_lib.export(str(run), "diffusers", str(tmp_path / "a.safetensors"))
    first = readme.read_text()
    assert "No license was stated" in first and f"known here; `{tiny.pipeline.name}`" in first
    export_lib.export(str(run), "diffusers", str(tmp_path / "a.safetensors"), told=TOLD)
    assert readme.read_text() != first  # our own is replaced
    readme.write_text(edited := readme.read_text().replace("# a", "# My style"))
    export_lib.export(str(run), "diffusers", str(tmp_path / "a.safetensors"))
    export_lib.export(str(run), "diffusers", str(tmp_path / "b.safetensors"))
    assert readme.read_text() == edited
    card.check_place(tmp_path, "a.safetensors")


def test_a_peft_directory_keeps_its_edited_card(run, tmp_path):
    out = tmp_path / "lora"
    export_lib.export(str(run), "peft", str(out))
    edited = (out / "README.md").read_text().replace("# lora", "# My style")
    (out / "README.md").write_text(edited)
    export_lib.export(str(run), "peft", str(out), role="teacher")
    assert (out / "README.md").read_text() == edited
    assert (out / "images" / "prompt_1.png").is_file()


def test_the_averaged_weights_show_no_pictures_of_others(run, tmp_path):
    export_lib.export(str(run), "comfyui", str(tmp_path / "t.safetensors"), role="teacher")
    text = (tmp_path / "README.md").read_text()
    assert "the averaged weights" in text and "images/" not in text
    assert not (tmp_path / "images").exists()


def test_words_of_users_do_not_act_as_markdown(tiny, tmp_path):
    prompts = ("one\n---\n# two ``` three", "a | b ](x) <script>")
    odd = make_run(tmp_path / "run", tiny.pipeline, sample_prompts=prompts)
    export_lib.export(str(odd), "diffusers", str(tmp_path / "a" / "x.safetensors"),
                      told=story.Told("", "", "`style` | x"))
    text = (tmp_path / "a" / "README.md").read_text()
    assert "Trigger words: `` `style` | x ``.\n" in text
    assert r": one --- \# two \`\`\` three; a \| b \](x) \<script\>." in text
    assert text.count("\n````\n") == 3 and text.count("\n````python\n") == 1
    read = ModelCard.load(tmp_path / "a" / "README.md").data
    assert [w["text"] for w in read.widget] == list(prompts)


def test_several_loras_are_named_without_their_folders(run, tiny, tmp_path):
    members = [Named(str(run), 0.5)]
    export_lib.export_loras(str(tiny.pipeline), members, "diffusers",
                            str(tmp_path / "x.safetensors"), told=TOLD)
    text = (tmp_path / "README.md").read_text()
    assert "which holds my-run-7 at 0.5." in text and str(run.parent) not in text
    assert header_of(tmp_path / "x.safetensors")["modelspec.description"] in text


def test_no_card_where_none_is_wanted(run, tmp_path):
    export_lib.export(str(run), "diffusers", str(tmp_path / "a.safetensors"), with_card=False)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("model, size, name", [
    ("some/model", 0, "some/model"), ("some/model@v2", 0, "some/model"), ("mini", 0, ""),
    ("/data/models/{published}", 1, "{hub}"), ("/data/models/{published}", 0, ""),
    ("/data/other", 1, ""),
    ("/c/hub/models--org--my-model/snapshots/0123", 0, "org/my-model"),
])
def test_which_name_a_model_has_on_the_hub(model, size, name):
    for family in FAMILIES.values():
        assert story.size_of(family, None) == ""
        for known, config in family.published.items():
            assert story.size_of(family, config) == known
            repo = family.elsewhere.hub[known]
            words = {"published": repo.partition("/")[2].lower(), "hub": repo}
            found = story.public_name(model.format(**words), family, known if size else "")
            assert found == name.format(**words)


@pytest.mark.parametrize("told, message", [
    ({"base_model": "/data/model"}, "--base_model: expected OWNER/NAME"),
    ({"license": "Apache 2.0"}, "--license: expected one of the hub's ids"),
])
def test_what_the_hub_would_not_take_is_refused(told, message):
    with pytest.raises(ValueError, match=message):
        story.check_told(story.Told(**told))
