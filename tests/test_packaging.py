"""The frame: metadata, exact versions, what an import needs, and a .venv that is whole or made again."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import stm_kernels
import stm_model
from stm_model.commands.main import main, run

ROOT = Path(__file__).parents[1]


def _setup_arguments():
    tree = ast.parse((ROOT / "setup.py").read_text())
    call = next(
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setup"
    )
    found = {}
    for keyword in call.keywords:
        try:
            found[keyword.arg] = ast.literal_eval(keyword.value)
        except ValueError:  # computed: packages, long_description
            continue
    return found


def _pins(name, python):
    """Exact versions by package that a constraints file sets for a Python version."""
    pins = {}
    for line in (ROOT / "constraints" / name).read_text().splitlines():
        if line.startswith("-c "):
            pins |= _pins(line[3:], python)
        elif line and not line.startswith("#"):
            requirement = Requirement(line)
            marker = requirement.marker
            if marker is None or marker.evaluate({"python_version": python, "platform_system": "Linux"}):
                (specifier,) = requirement.specifier
                assert specifier.operator == "==", line
                assert requirement.name.lower() not in pins, f"two versions of {requirement.name} for {python}"
                pins[requirement.name.lower()] = specifier.version
    return pins


def test_the_version_and_the_command_are_those_of_the_package():
    arguments = _setup_arguments()
    assert arguments["version"] == stm_model.__version__ == stm_kernels.__version__
    assert f"## {arguments['version']}" in (ROOT / "CHANGELOG.md").read_text()
    assert arguments["entry_points"]["console_scripts"] == ["stm=stm_model.commands.main:run"] and callable(run)


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.13"])
@pytest.mark.parametrize("constraints", ["cpu.txt", "cuda.txt"])
def test_every_requirement_has_one_exact_version_within_its_bounds(constraints, python):
    arguments, pins = _setup_arguments(), _pins(constraints, python)
    for text in arguments["install_requires"] + arguments["extras_require"]["dev"]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[requirement.name.lower()]), text


def test_every_package_and_every_file_in_it_is_shipped():
    from setuptools import find_packages

    packages = find_packages(str(ROOT), include=["stm_kernels*", "stm_model*"])
    for file in [*ROOT.glob("stm_kernels/**/*.py"), *ROOT.glob("stm_model/**/*.py")]:
        assert ".".join(file.parent.relative_to(ROOT).parts) in packages, file
    patterns = _setup_arguments()["package_data"]
    shipped = {
        file for package in patterns for pattern in patterns[package] for file in ROOT.glob(f"{package}/{pattern}")
    }
    files = {
        file
        for package in patterns
        for file in (ROOT / package).rglob("[!.]*")
        if file.is_file() and file.suffix != ".py" and "__pycache__" not in file.parts
    }
    assert files == shipped


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("stm_kernels", "triton numpy scipy PIL av tyro tqdm safetensors matplotlib fastapi"),
        ("stm_model", "torch numpy triton scipy PIL av tyro tqdm safetensors matplotlib fastapi"),
        ("stm_model.network, stm_model.tracking.tracker", "triton scipy PIL av tyro tqdm matplotlib fastapi"),
        ("stm_model.io.video, stm_model.io.masks", "torch triton scipy tyro tqdm safetensors matplotlib fastapi"),
        ("stm_model.interactive.session", "scipy.stats tyro matplotlib fastapi"),
        ("stm_model.evaluation.metrics", "torch triton PIL av tyro tqdm safetensors matplotlib fastapi"),
    ],
)
def test_an_import_needs_no_more_than_it_says(module, absent):
    block = f"import sys; sys.modules |= dict.fromkeys({absent.split()!r}); import {module}"
    done = subprocess.run([sys.executable, "-c", block], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_readme_drop_in_snippet_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (snippet,) = [block for block in blocks if "SpaceTimeMemoryRead()" in block]
    exec(snippet, {})


def test_options_in_the_readme_exist(capsys):
    assert main(["track", "--help"]) == 0
    known = set(re.findall(r"(?<!-)--[a-z][a-z-]*", capsys.readouterr().out))
    section = (ROOT / "README.md").read_text().split("## Track your own video")[1].split("\n## ")[0]
    section = re.sub(r"torchrun .*? -m ", "", section)  # its options are not ours
    assert set(re.findall(r"(?<!-)--[a-z][a-z-]*", section)) - {"--help"} <= known


# .venv


@pytest.fixture
def checkout(tmp_path):
    """A copy of what the Makefile looks at."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    for name in ("Makefile", "setup.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "constraints", tmp_path / "constraints")
    return tmp_path


def _make(checkout, *arguments):
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "PYTHON"))}
    command = ["make", "KIND=cpu", *arguments]
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)


def test_a_missing_or_interrupted_venv_is_made_anew(checkout):
    assert "-m venv --clear .venv" in _make(checkout, "-n", "test").stdout
    (checkout / ".venv" / "bin").mkdir(parents=True)  # what an interrupted installation leaves
    planned = _make(checkout, "-n", "test").stdout
    assert "-m venv --clear .venv" in planned and "pip install -c" in planned


def test_a_whole_venv_is_used_until_the_requirements_change(checkout):
    (checkout / ".venv").mkdir()
    ready = checkout / ".venv" / ".ready-cpu"
    ready.touch()
    later = (checkout / "setup.py").stat().st_mtime + 100
    os.utime(ready, (later, later))
    assert "pip install" not in _make(checkout, "-n", "test").stdout
    os.utime(checkout / "constraints" / "common.txt", (later + 100, later + 100))
    assert "pip install" in _make(checkout, "-n", "test").stdout
    assert "pip install" in _make(checkout, "-n", "KIND=cuda", "test").stdout


def test_a_failed_installation_is_not_taken_for_whole(checkout):
    fake = checkout / "python"
    fake.write_text(
        '#!/bin/sh\ncase "$*" in *venv*) mkdir -p .venv/bin; cp "$0" .venv/bin/python;; *install*) exit 1;; esac\n'
    )
    fake.chmod(0o755)
    for _ in range(2):
        done = _make(checkout, "venv", f"PYTHON={fake}")
        assert done.returncode != 0 and (checkout / ".venv" / "bin" / "python").exists()
        assert not list((checkout / ".venv").glob(".ready-*"))
        (checkout / ".venv" / ".ready-cuda").touch()  # a whole one of the other kind does not stay when it is changed


def test_an_old_python_is_refused_in_one_line(checkout):
    old = checkout / "python3.9"
    spoofed = "import sys; sys.version_info = (3, 9, 1); exec(sys.argv[1])"
    old.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.1" && exit 0\nexec {sys.executable} -c "{spoofed}" "$2"\n'
    )
    old.chmod(0o755)
    done = _make(checkout, "test", f"PYTHON={old}")
    assert done.returncode != 0 and not (checkout / ".venv").exists()
    assert "is Python 3.9.1: Python 3.10 or newer is needed" in done.stderr
    missing = _make(checkout, "test", "PYTHON=no-such-python")
    assert missing.returncode != 0 and "Python 3.10 or newer is needed" in missing.stderr
