"""docs/quickstart.ipynb: valid, without outputs, and it runs from the first cell to the last."""

import os
import re
import sys

import nbformat
import pytest

from tests.commands import ROOT, environment, wrong_flags

NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_is_valid_and_holds_no_outputs(notebook):
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.cell_type == "markdown" or (
            cell.outputs == [] and cell.execution_count is None
        )


def test_every_cell_is_python_and_every_command_has_its_flags(notebook):
    from IPython.core.inputtransformer2 import TransformerManager

    sources = [cell.source for cell in notebook.cells]
    assert wrong_flags("\n".join(sources)) == []
    assert len(re.findall(r"python -m dopsd_jax\.\w+", "\n".join(sources))) >= 7
    for cell in notebook.cells:
        if cell.cell_type == "code":
            compile(TransformerManager().transform_cell(cell.source), cell.id, "exec")


@pytest.mark.slow
def test_it_runs_from_the_first_cell_to_the_last(notebook, tmp_path, monkeypatch):
    """In a fresh kernel, as a user starts it from the folder it lies in; two updates in place of
    a hundred, and nothing is installed."""
    from nbclient import NotebookClient

    kernel = environment(DOPSD_INSTALLED="1", DOPSD_UPDATES="2", DOPSD_RUN=str(tmp_path / "run"))
    for name, value in kernel.items():
        monkeypatch.setenv(name, value)
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3",
        resources={"metadata": {"path": str(NOTEBOOK.parent)}},
    )
    client.create_kernel_manager()
    client.km.kernel_spec.argv[0] = sys.executable
    client.execute()
    for name in ("checkpoints/2", "samples/step_000002.png", "lora.safetensors", "report.html",
                 "drawn/0000-a-cat-blueprint-style.png"):
        assert os.path.exists(tmp_path / "run" / name), name
    shown = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs
             if "image/png" in o.get("data", {})]
    assert len(shown) == 8 + 4 + 2
    assert not [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs
                if o.output_type == "error"]
