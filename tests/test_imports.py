"""The house: imports run one way, from the front door down, and a room needs nothing of the rooms beside it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Who stands on whom: a file may import what is on a lower floor than its own, and on its own floor what is named after it.
FLOORS = [
    {"files", "pooling", "fast"},
    {"config", "device"},
    {"model", "tokenizer", "hub", "cli"},
    {"lora", "data"},
    {"weights"},
    {"encoder"},
    {"evaluation", "training", "interop"},
    {"train", "embed"},
]
RUN_TIME = {"torch", "numpy", "tokenizers", "safetensors", "tqdm"}
IF_INSTALLED = {
    "huggingface_hub",
    "pyarrow",
    "mteb",
    "matplotlib",
    "sentence_transformers",
    "transformers",
}  # inside a function


def place(module: str) -> str:
    """`llm2vec_min.training.loop` -> `training`, `llm2vec_min.encoder` -> `encoder`, `train` -> `train`."""
    parts = module.split(".")
    return parts[0] if parts[0] != "llm2vec_min" else parts[1] if len(parts) > 1 else "llm2vec_min"


def imports(source: str, module: str) -> list[tuple[str, bool]]:
    """(imported module, whether inside a function) of a module's source; relative names made absolute."""
    found = []
    tree = ast.parse(source)
    top = {id(node) for node in tree.body}
    package = module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) not in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base += node.module.split(".") if node.module else []
            names = [[*base, alias.name] if node.module is None and node.level else base for alias in node.names]
            found += [(".".join(name), id(node) not in top) for name in names]
    return found


def upward(source: str, module: str) -> list[str]:
    """The imports of a module's source that run up, or across to another room."""
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    mine = place(module)
    wrong = []
    for name, _ in imports(source, module):
        other = place(name)
        if other == "llm2vec_min":  # the package's front: what it hands on is the encoder
            other = "encoder"
        if other in floor and other != mine and floor[other] >= floor[mine]:
            wrong.append(f"{module} imports {name}")
    return wrong


FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in [ROOT / "train.py", ROOT / "embed.py", *sorted((ROOT / "llm2vec_min").rglob("*.py"))]
}
MODULES = {name: path for name, path in FILES.items() if place(name) != "__init__"}


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_down(module):
    assert upward(MODULES[module].read_text(), module) == []


@pytest.mark.parametrize("module", MODULES)
def test_run_time_packages_only(module):
    for name, inside in imports(MODULES[module].read_text(), module):
        package = name.split(".")[0]
        if package in IF_INSTALLED:
            assert inside, f"{module} imports {name} at its top: it must run without"
        elif package not in RUN_TIME | {"llm2vec_min"}:
            assert package in __import__("sys").stdlib_module_names, f"{module} imports {name}"


def test_nothing_newer_than_python_3_10():
    """The oldest that torch 2.9 runs on; no linter of the project sees a function of a newer standard library."""
    command = [
        str(Path(sys.executable).with_name("vermin")),
        "--target=3.10-",
        "--no-tips",
        "--violations",
        *map(str, FILES.values()),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_package_is_quick_to_start():
    """torch's compiler takes seconds to import, and only some need it: not those who load a model and encode."""
    code = (
        "import sys, torch; before = set(sys.modules); import llm2vec_min; "
        "llm2vec_min.LLM2Vec.from_pretrained('tiny', device='cpu').encode(['a text']); "
        "print([name for name in set(sys.modules) - before if name.startswith(('torch._dynamo', 'torch._inductor'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_embed_needs_nothing_of_training():
    assert not [name for name, _ in imports(FILES["embed"].read_text(), "embed") if place(name) == "training"]


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("llm2vec_min.encoder", "from .interop import export"),
        ("llm2vec_min.encoder", "def save():\n    from .interop.export import export_model"),
        ("llm2vec_min.encoder", "from . import training"),
        ("llm2vec_min.evaluation.sentences", "from ..training.settings import Settings"),
        ("llm2vec_min.model", "from .lora import LoRALinear"),
        ("llm2vec_min.model", "from llm2vec_min import LLM2Vec"),
    ],
)
def test_an_arrow_that_runs_up_is_found(module, line):
    assert module in MODULES and upward(f"{line}\n", module)
