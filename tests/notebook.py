"""docs/quickstart.ipynb, executed as a user does."""

import sys

import nbformat
import pytest

from tests.commands import ROOT, environment

NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"


def executed(run, updates):
    """The notebook with its outputs; its run is in the folder `run`.

    In a fresh kernel, from the folder it lies in, and nothing is installed.
    """
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(
        notebook, timeout=1800, kernel_name="python3",
        resources={"metadata": {"path": str(NOTEBOOK.parent)}},
    )
    client.create_kernel_manager()
    client.km.kernel_spec.argv[0] = sys.executable
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(
            DOPSD_INSTALLED="1", DOPSD_UPDATES=str(updates), DOPSD_RUN=str(run)
        ).items():
            patch.setenv(name, value)
        client.execute()
    return notebook
