"""Runs the examples of README and docs as a reader would: page by page, from an empty folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_docs import PAGES, ROOT, blocks

WITH_EXAMPLES = [page for page in PAGES if any(block.runs for block in blocks(page))]


@pytest.mark.long
@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=lambda page: page.stem)
def test_examples_of_a_page_run_in_order(page, tmp_path):
    scripts = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{scripts}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    for block in blocks(page):
        if block.file:
            (tmp_path / block.file).write_text(block.text)
        elif block.runs:
            run = [sys.executable, "-"] if block.language == "python" else ["bash", "-euo", "pipefail"]
            done = subprocess.run(
                run, input=block.text, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1800
            )
            assert done.returncode == 0, f"{block.text}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
