"""
Runs notebooks and keeps of their outputs what a reader should see: printed text, results and pictures. Progress bars,
widgets, logs and warnings are left out of the files, and printed here.

    pip install nbclient ipykernel
    python examples/scripts/run_notebooks.py examples/notebooks/*.ipynb
"""

import argparse
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def is_kept(output) -> bool:
    """Progress is drawn as HTML or as a widget; logs, warnings and bars of text are on standard error."""
    if output.output_type == "stream":
        return output.name == "stdout"
    drawn = output.get("data", {})
    return "application/vnd.jupyter.widget-view+json" not in drawn and "<progress" not in drawn.get("text/html", "")


def run(path: Path) -> None:
    """Executes the notebook in its own folder and writes it back with the outputs that are kept."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=None, record_timing=False, resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            for output in cell.outputs:
                if output.output_type == "stream" and output.name == "stderr":
                    print(output.text)
            cell.outputs = [output for output in cell.outputs if is_kept(output)]
    notebook.metadata = nbformat.from_dict(METADATA)
    nbformat.write(notebook, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="+", type=Path)
    for path in parser.parse_args().notebooks:
        start = time.monotonic()
        run(path)
        print(f"{path}: {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
