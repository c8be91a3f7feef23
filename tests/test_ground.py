"""Packages, imports, layers, make targets, the tree and CI. tests/test_docs.py checks README and docs/."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Container, Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import tccp

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]
CODE = [folder for name in ("tccp", "preprocessing", "ray_jobs") if (folder := ROOT / name).is_dir()]


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


# Packages


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    versions = {}
    for requirement in requirements:
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", f"{requirement} is not an exact pin"
        assert "+" not in specifier.version, f"{requirement} names one build: the index decides between CUDA and CPU"
        versions[canonicalize_name(requirement.name)] = specifier.version
    assert len(versions) == len(requirements), "a package is pinned twice"
    return versions


def installed_closure() -> Iterator[importlib.metadata.Distribution]:
    """The packages that `make` installs: tccp[preprocess,evaluate,dev] and all dependencies."""
    seen: set[tuple[str, str]] = set()
    installed = [text for extra in ("preprocess", "evaluate", "dev") for text in EXTRAS[extra]]
    queue = [Requirement(text) for text in [*PROJECT["dependencies"], *installed]]
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            distribution = importlib.metadata.distribution(name)
            if not extra:
                yield distribution
            for text in distribution.requires or []:
                inner = Requirement(text)
                if inner.marker is None or inner.marker.evaluate({"extra": extra}):
                    queue.append(inner)


@pytest.mark.parametrize("extra", ["", *EXTRAS])
def test_every_requirement_is_pinned_to_a_version_that_it_allows(extra: str) -> None:
    versions = pins()
    for text in EXTRAS[extra] if extra else PROJECT["dependencies"]:
        requirement = Requirement(text)
        pinned = versions[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pinned), f"{requirement} does not allow the pinned {pinned}"


def test_installed_packages_are_at_their_pinned_versions() -> None:
    versions = pins()
    cuda = re.compile("nvidia-|cuda-|triton$")  # pinned exactly by torch's own CUDA build
    for distribution in installed_closure():
        name = canonicalize_name(distribution.name)
        if not cuda.match(name):
            assert distribution.version.partition("+")[0] == versions[name], f"{name} is not at its pin"


def test_torchvision_is_not_installed() -> None:
    assert not {"torchvision", "torchaudio"} & set(pins())
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.distribution("torchvision")


def test_all_wheels_with_cv2_are_pinned_to_one_version() -> None:
    owners = {name: version for name, version in pins().items() if name.startswith("opencv-")}
    assert {"opencv-python", "opencv-contrib-python"} <= set(owners), "scenedetect and mediapipe need one each"
    assert len(set(owners.values())) == 1


def imported_packages(files: list[Path]) -> dict[str, Path]:
    packages = {}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            else:
                continue
            packages.update((name.partition(".")[0], file.relative_to(ROOT)) for name in names)
    ours = {folder.name for folder in (*CODE, ROOT / "tests", ROOT / "benchmarks")} | {file.stem for file in files}
    return {name: file for name, file in packages.items() if name not in sys.stdlib_module_names and name not in ours}


@pytest.mark.parametrize("part", ["code", "tests"])
def test_every_imported_package_is_a_declared_requirement(part: str) -> None:
    """An indirect dependency does not count. Only tests may import packages of `dev`."""
    extras = ["preprocess", "evaluate", "train", "serve"] if part == "code" else EXTRAS
    texts = [*PROJECT["dependencies"], *(text for extra in extras for text in EXTRAS[extra])]
    declared = {canonicalize_name(Requirement(text).name) for text in texts}
    folders = CODE if part == "code" else [ROOT / "tests"]
    providers = importlib.metadata.packages_distributions()
    for package, file in imported_packages([path for folder in folders for path in folder.rglob("*.py")]).items():
        names = {canonicalize_name(name) for name in providers.get(package, [package])}
        assert names & declared, f"{file} imports {package} ({', '.join(names)}), which pyproject.toml does not declare"


def test_version_is_defined_once() -> None:
    assert PROJECT["dynamic"] == ["version"]
    assert importlib.metadata.version("tccp") == tccp.__version__


# Layers


def contract(name: str) -> dict:
    (found,) = [contract for contract in PYPROJECT["tool"]["importlinter"]["contracts"] if contract["type"] == name]
    return found


def test_import_contracts_hold() -> None:
    result = run(str(Path(sys.executable).with_name("lint-imports")), "--no-cache", "--no-logo")
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_module_is_assigned_a_layer() -> None:
    listed = set(re.findall(r"[\w.]+", " ".join(contract("layers")["layers"])))
    modules = {
        f"tccp.{path.stem}"
        for path in (ROOT / "tccp").iterdir()
        if path.suffix == ".py" or (path.is_dir() and any(path.rglob("*.py")))
    } - {"tccp.__init__", "tccp.__main__"}
    assert modules <= listed, "name them in pyproject.toml, section importlinter"
    roots = set(PYPROJECT["tool"]["importlinter"]["root_packages"])
    assert {folder.name for folder in CODE} <= roots, "root_packages in pyproject.toml lacks a package"


def module_names() -> dict[str, Path]:
    """Every module of the code by its dotted name; a package's is that of its __init__.py."""
    names = {}
    for path in (path for folder in CODE for path in folder.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def test_module_names_are_unique() -> None:
    counted = Counter(name.rpartition(".")[2] for name in module_names())
    assert {name for name, count in counted.items() if count > 1} <= {"__main__"}


def imports_of(path: Path, modules: Container[str]) -> Iterator[str]:
    """The project's modules that a module imports when it runs, at its top or in a function."""
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node))]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (name if name in modules else node.module for name in inner)


def test_there_are_no_import_cycles() -> None:
    modules = module_names()
    graph = {name: {one for one in imports_of(path, modules) if one in modules} for name, path in modules.items()}
    TopologicalSorter({name: uses - {name} for name, uses in graph.items()}).prepare()  # raises CycleError


# Make targets


def make_targets() -> set[str]:
    (phony,) = re.findall(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return set(phony.split())


def test_make_without_a_target_prints_help_for_every_target() -> None:
    environment = {"MAKEFLAGS": "", "MAKELEVEL": ""}
    shown = run("make", "help", **environment).stdout
    assert run("make", **environment).stdout == shown
    described = dict(re.findall(r"^make ([\w-]+) +(\S.*)$", shown, re.MULTILINE))
    assert set(described) == make_targets()
    assert {"demo", "test", "check", "clean", "help"} <= set(described)


def test_interrupted_setup_is_redone_and_finished_setup_is_kept(tmp_path: Path) -> None:
    """Everything is real but pip, which needs the network."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    python, pip_fails, left_over = tmp_path / "python", tmp_path / "pip_fails", tmp_path / ".venv" / "left_over"
    python.write_text(f'#!/bin/sh\n[ "$2" = pip ] && exec test ! -e "{pip_fails}"\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)

    def set_up() -> int:
        return run("make", "-C", str(tmp_path), "setup", f"PYTHON={python}", MAKEFLAGS="", MAKELEVEL="").returncode

    pip_fails.touch()
    assert set_up() != 0
    left_over.touch()
    pip_fails.unlink()
    assert set_up() == 0
    assert (tmp_path / ".venv" / "bin" / "python").exists()
    assert not left_over.exists(), "files of the interrupted setup were kept"

    left_over.touch()
    (tmp_path / "constraints.txt").touch()
    assert set_up() == 0
    pip_fails.touch()
    assert set_up() == 0, "a finished setup was redone"
    assert left_over.exists()


def test_demo_trains_only_on_request() -> None:
    assert "--train" not in run("make", "--dry-run", "demo").stdout
    assert "demo --out out --train" in run("make", "--dry-run", "demo", "TRAIN=1").stdout


# The tree


def tree() -> list[Path]:
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z")
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_there_are_no_machine_paths_in_the_tree() -> None:
    machine = re.compile(rb"(?<![\w.~$}<-])/(?:work|root|home|Users|opt|farm|tmp|mnt)/[\w.]")
    found = []
    for path in tree():
        content = path.read_bytes()
        if b"\0" not in content:  # text
            found += [
                f"{path.relative_to(ROOT)}:{number}: {line.decode(errors='replace').strip()[:100]}"
                for number, line in enumerate(content.splitlines(), 1)
                if machine.search(line)
            ]
    assert not found, "\n".join(found)


def test_ci_script_is_executable_and_valid_bash() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert run("bash", "-n", str(script)).returncode == 0


@pytest.mark.parametrize(
    ("environment", "status", "count"),
    [
        ({"TCCP_REQUIRE_CLIPS": ""}, 0, "2 passed, 0 failed, 1 skipped"),
        ({"TCCP_REQUIRE_CLIPS": "1"}, 1, "2 passed, 1 failed, 0 skipped"),
    ],
)
def test_skipped_clip_test_fails_if_clips_are_required(
    tmp_path: Path, environment: dict[str, str], status: int, count: str
) -> None:
    """Also checks that the shared fixtures set the marker and that the last line is the count."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "tests" / "test_clips.py").write_text(
        "import os\n"
        "def test_without(storage): assert os.environ['TCCP_STORAGE'] == str(storage)\n"
        "def test_folder(shared): assert shared.is_dir()\n"
        "def test_clips(shared_clips): pass\n"
    )
    (tmp_path / "shared").mkdir()
    pytest_here = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path)]
    result = run(
        *pytest_here, "-p", "no:cacheprovider", "-n", "1", str(tmp_path / "tests"),
        TCCP_SHARED=str(tmp_path / "shared"), **environment,
    )  # fmt: skip
    assert result.returncode == status, result.stdout + result.stderr
    assert result.stdout.splitlines()[-1] == count
    assert "the shared folder has no clips/" in result.stdout
