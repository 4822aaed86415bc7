"""What may import what, where import-linter's contracts in pyproject.toml cannot say it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent


def imported_names(path):
    """Every dotted name that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "recgpt" / "model").glob("*.py")), ids=lambda path: path.stem
)
def test_the_model_knows_no_ranks(path):
    assert [name for name in imported_names(path) if name.startswith("torch.distributed")] == []


def test_every_package_is_installed():
    folders = [*(REPOSITORY / "recgpt").rglob("__init__.py"), *(REPOSITORY / "ray_jobs").rglob("__init__.py")]
    packages = {".".join(file.parent.relative_to(REPOSITORY).parts) for file in folders}
    settings = (REPOSITORY / "pyproject.toml").read_text()
    listed = ast.literal_eval(settings.partition("packages = ")[2].partition("]")[0] + "]")
    assert set(listed) == packages | {"recgpt.configs", "recgpt.deepspeed_configs", "recgpt.serving"}


def test_help_needs_none_of_the_heavy_libraries():
    code = "import sys, ray_jobs.cli; print(*({'ray', 'torch', 'deepspeed', 'pandas'} & set(sys.modules)))"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert finished.stderr == ""
    assert finished.stdout.split() == []
