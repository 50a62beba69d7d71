"""The wrong versions of `mutations.py`: each still applies to the source as it is, and the tests notice every one."""

import subprocess
import sys
from pathlib import Path

import pytest
from mutations import MUTATIONS, ROOT


def test_each_applies_once():
    for number, (file, right, wrong, tests) in enumerate(MUTATIONS):
        found = (ROOT / file).read_text().count(right)
        assert found == 1, f"mutation {number} is there {found} times; if you changed {file}, write it anew: {right!r}"
        assert right != wrong and all((ROOT / test).is_file() for test in tests.split())


@pytest.mark.slow
def test_each_is_noticed():
    done = subprocess.run([sys.executable, str(Path(__file__).with_name("mutations.py"))], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
