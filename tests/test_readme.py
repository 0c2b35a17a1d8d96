"""The README's code runs as it stands, and what it says of files and commands is there."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"<!-- run -->\n```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("code", BLOCKS, ids=range(len(BLOCKS)))
def test_code_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "readme.py").write_text(code, encoding="utf-8")
    runpy.run_path(str(tmp_path / "readme.py"), run_name="__main__")


def test_every_python_block_is_run() -> None:
    assert len(BLOCKS) == README.count("```python\n") >= 4


@pytest.mark.parametrize("path", sorted(set(re.findall(r"(?:scripts|configs|examples|tests)/[\w./]+\w", README))))
def test_files_that_are_named_exist(path: str) -> None:
    assert (ROOT / path).exists()
