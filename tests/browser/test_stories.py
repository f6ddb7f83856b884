"""The notebooks that no other test opens run in JupyterLab, without errors or foreign requests."""

import pytest

from tests.test_notebooks import NOTEBOOKS

pytestmark = pytest.mark.browser

OPENED_ELSEWHERE = "00_start_here.ipynb", "03_the_lab.ipynb"


@pytest.mark.parametrize("name", [name for name in NOTEBOOKS if name not in OPENED_ELSEWHERE])
def test_a_notebook_runs_in_jupyterlab_without_an_error(name, lab_page):
    lab_page.open_notebook(name)
    lab_page.run_all()
    kinds = {kind for output in lab_page.outputs() for kind in output.get("data", {})}
    assert {"application/vnd.plotly.v1+json"} & kinds
