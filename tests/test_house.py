"""The house keeps its shape: which room imports which, how large each is, and what is loaded without torch."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPTS = {"prepare_dataset": 650, "train_svd": 620, "infer_svd": 600}  # lines
GROUND = {"actions", "action_encoder", "files", "console", "weights", "lora"}  # below svd_common
ROOMS = sorted(path.stem for path in (ROOT / "svd_parts").glob("[!_]*.py"))
MODULES = [*SCRIPTS, "svd_common", *ROOMS]


def path_of(module):
    return ROOT / (f"svd_parts/{module}.py" if module in ROOMS else f"{module}.py")


def tree_of(module):
    return ast.parse(path_of(module).read_text())


def imports_of(module, inside_too=True):
    """The project's own modules that a module imports, at its top or (`inside_too`) inside a function."""
    found = set()
    for node in ast.walk(tree_of(module)) if inside_too else tree_of(module).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "svd_parts":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.removeprefix("svd_parts."))
    return found & set(MODULES)


def test_the_top_level_holds_the_four_modules_of_the_description():
    assert {path.stem for path in ROOT.glob("*.py")} == {*SCRIPTS, "svd_common"}


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_only(module):
    below = imports_of(module) - {module}
    assert not below & set(SCRIPTS), "nothing imports a script"
    if module == "svd_common" or module in GROUND:
        assert below <= GROUND, "svd_common and the ground rooms lean on the ground alone"


def test_no_circle():
    order, left = [], {module: imports_of(module) - {module} for module in MODULES}
    while left:
        free = [module for module, below in left.items() if below <= set(order)]
        assert free, f"these import each other in a circle: {sorted(left)}"
        order += free
        left = {module: below for module, below in left.items() if module not in free}


@pytest.mark.parametrize("module", MODULES)
def test_sizes(module):
    most = {**SCRIPTS, "svd_common": 400}.get(module, 350)
    assert len(path_of(module).read_text().splitlines()) <= most
    for node in ast.walk(tree_of(module)):
        lines = getattr(node, "end_lineno", 0) - getattr(node, "lineno", 0) + 1
        if isinstance(node, ast.ClassDef):
            assert lines <= 160, node.name
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name != "build_parser":
            assert lines <= 70, node.name


@pytest.mark.parametrize("room", ["svd_common", *ROOMS])
def test_a_room_gets_what_it_needs_by_name_and_not_the_command_line(room):
    for node in ast.walk(tree_of(room)):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("__"):
            names = [argument.arg for argument in [*node.args.args, *node.args.kwonlyargs]]
            assert "args" not in names or room == "console" or node.name == "frozen", node.name


def test_no_script_loads_torch_before_it_has_read_its_command_line():
    code = "import sys, {}; assert not {{'torch', 'diffusers', 'transformers'}} & set(sys.modules)"
    for script in SCRIPTS:
        subprocess.run([sys.executable, "-c", code.format(script)], cwd=ROOT, check=True, timeout=120)


def test_nothing_that_preparing_enters_imports_torch():
    seen, todo = set(), {"prepare_dataset"}
    while todo:
        module = todo.pop()
        seen.add(module)
        tops = [node for node in tree_of(module).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        named = {alias.name for node in tops for alias in node.names} | {getattr(node, "module", "") for node in tops}
        assert not [name for name in named if name and name.split(".")[0] in ("torch", "diffusers", "transformers")]
        inside = module != "svd_common"  # whose functions for models import torch themselves
        todo |= imports_of(module, inside) - seen
    assert {"svd_common", "probe", "decode", "cuts", "records"} <= seen


def test_the_map_names_every_room_and_no_other():
    named = set(re.findall(r"`svd_parts/(\w+)\.py`", (ROOT / "docs" / "code.md").read_text()))
    assert named - {"__init__"} == set(ROOMS)


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
def test_the_readmes_name_options_that_exist(page):
    scripts = "".join(path_of(module).read_text() for module in MODULES)
    others = {"--num_processes", "--num_machines", "--multi_gpu", "--machine_rank", "--main_process_ip"}  # accelerate's
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]+", (ROOT / page).read_text()))
    ours = {flag for flag in flags if "_" in flag} - others
    assert not {flag for flag in ours if f'"{flag.replace("--no-", "--")}"' not in scripts}
