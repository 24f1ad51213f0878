"""docs/quickstart.ipynb: valid and without outputs; tests/mini/test_shipped.py runs it."""

import re

import nbformat
import pytest

from tests.commands import wrong_flags
from tests.notebook import NOTEBOOK


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
