"""Every notebook runs from top to bottom, and is committed executed."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
SECONDS, CODE_CELLS, BYTES = 600, 25, 400_000  # seconds of a cell, for the slowest machine


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_form(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run it from top to bottom and save"
    assert len(code) <= CODE_CELLS and path.stat().st_size < BYTES
    assert set(notebook.metadata) == {"kernelspec", "language_info"}, "no editor's metadata"
    outputs = [output for cell in code for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"], "no errors, warnings, bars"
    streams = [[o.get("name") for o in cell.outputs] for cell in code]
    assert not [s for s in streams if s.count("stdout") > 1], "one block of text a cell: coalesce_streams=True"
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert len(re.findall("<details>", prose)) == 3 and "**Exercise.**" in prose


def words_and_results(notebook) -> tuple[str, str]:
    """The prose, and all code and text output, of a notebook."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in code for output in cell.outputs]
    shown = [o.get("text") or o.get("data", {}).get("text/plain", "") for o in outputs]
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    return prose, "\n".join([cell.source for cell in code] + shown)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_numbers_in_the_prose_occur_in_code_or_output(path):
    """Decimals, percentages and whole numbers from 10 stand in the code or its output; years, arXiv ids, sizes of models and
    numbers of notebooks apart."""
    prose, shown = words_and_results(nbformat.read(path, as_version=4))
    prose = re.sub(r"\]\([^)]*\)", "]", prose)
    prose = re.sub(r"\d{4}\.\d{4,5}|\b(19|20)\d\d\b|\b\d+(\.\d+)?[BMK]\b|SmolLM2-135M|\b0\d\b", "", prose)
    shown = shown.replace(",", "").replace("_", "")
    for match in re.finditer(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?: ?%)?", prose):
        number = match.group().replace(",", "").rstrip("% ")
        if "." in number or "%" in match.group() or int(number) >= 10:
            assert re.search(rf"(?<![\d.]){re.escape(number)}(?!\.?\d)", shown), prose[
                max(0, match.start() - 60) : match.end() + 40
            ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_lead_to_files(path):
    prose, _ = words_and_results(nbformat.read(path, as_version=4))
    for target in re.findall(r"\]\(([^)#]+)", prose):
        assert target.startswith("http") or (path.parent / target).exists(), target


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path):
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": path.parent}}).execute()


def test_the_series_is_complete():
    assert [path.stem[:2] for path in NOTEBOOKS] == [f"{number:02}" for number in range(1, 12)]
