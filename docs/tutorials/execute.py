"""Make the notebooks from `source/*.py`: run every cell and store what it printed.

    python docs/tutorials/execute.py             # all
    python docs/tutorials/execute.py 3_loss_scale --output /tmp/somewhere

A cell that raises, or that writes a warning, fails.
"""

import argparse
import os
import pathlib
import sys

import jupytext
import nbclient
import nbformat

HERE = pathlib.Path(__file__).parent
# In each notebook's process, before its first cell; no part of the notebook.
BEFORE = "import warnings; warnings.simplefilter('error', UserWarning)"
QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "OMP_NUM_THREADS": "1"}


def executed(path: pathlib.Path) -> nbformat.NotebookNode:
    """Return a script in percent format as a notebook with outputs.

    Args:
        path: The script.
    """
    notebook = jupytext.read(path)
    notebook.metadata = {
        "kernelspec": {"name": "python3", "display_name": "Python 3"},
        "language_info": {"name": "python"},
    }
    notebook.cells.insert(0, nbformat.v4.new_code_cell(BEFORE))
    nbclient.NotebookClient(notebook, timeout=300).execute()
    del notebook.cells[0]
    for i, cell in enumerate(notebook.cells):
        # Ids and times change with every run, and nobody reads them.
        cell.id, cell.metadata = f"cell-{i}", {}
        if cell.cell_type == "code":
            cell.outputs = joined(
                [o for o in cell.outputs if o.get("name") != "stderr"]
            )
            cell.execution_count = None
            for output in cell.outputs:
                output.pop("execution_count", None)
                if output.output_type == "execute_result":
                    output.execution_count = None
    return notebook


def joined(outputs: list) -> list:
    """Return the outputs with what was printed in one go in one piece.

    Where it is cut is up to the kernel's timing.

    Args:
        outputs: A cell's outputs.
    """
    made = []
    for output in outputs:
        if output.output_type == "stream" and made and made[-1].get("name") == "stdout":
            made[-1].text += output.text
        else:
            made.append(output)
    return made


def main(arguments: list[str] | None = None) -> int:
    """Execute notebooks. Returns 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="without .py; all if none")
    parser.add_argument("--output", type=pathlib.Path, default=HERE)
    args = parser.parse_args(arguments)
    os.environ.update({k: os.environ.get(k, v) for k, v in QUIET.items()})
    paths = [HERE / "source" / f"{name}.py" for name in args.names]
    for path in paths or sorted((HERE / "source").glob("*.py")):
        print(path.stem, flush=True)
        nbformat.write(executed(path), args.output / f"{path.stem}.ipynb")
    return 0


if __name__ == "__main__":
    sys.exit(main())
