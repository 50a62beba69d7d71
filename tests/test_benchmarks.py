"""The benchmarks still run against the package: the smallest shape, once."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_gpu_on_the_smallest_shape(tmp_path):
    command = [
        sys.executable,
        "tests/benchmarks/gpu.py",
        "--device",
        "cpu",
        "--models",
        "test",
        "--batch",
        "4",
        "--length",
        "16",
    ]
    done = subprocess.run(
        [*command, "--repeats", "1", "--output", str(tmp_path / "x.json")], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(json.loads((tmp_path / "x.json").read_text())) and "GradCache" in done.stdout
