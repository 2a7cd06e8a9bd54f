"""The repository keeps its own promises: package, notebooks, metadata and README agree with one
another."""

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

import ibllm

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(
    p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts
)
each_notebook = pytest.mark.parametrize(
    "path", NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT / "nbs"))
)
MACHINE_PATH = re.compile(r"(?<![\w.~])/(?:work|root|tmp|home/\w+|Users/\w+)/")


def settings():
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini")
    return config["DEFAULT"]


def run(*command, cwd=ROOT, **env):
    "Run a command of this environment; a failure shows what it said."
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tool(name):
    return str(Path(sys.executable).with_name(name))


def copy_project(folder, *names):
    "Copy these files and folders of the repository, so that a tool can write beside them."
    for name in names:
        source, target = ROOT / name, folder / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns(".*", "__pycache__"))
        else:
            shutil.copy(source, target)
    return folder


def code_cells(path):
    return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]


def outputs(path):
    return [o for cell in code_cells(path) for o in cell["outputs"]]


# The rooms of the package, from the ground up; a room imports only from rooms before it
ROOMS = """
files config bind
inputs.sources inputs.image inputs.video inputs.text inputs.audio inputs.point inputs.maps
inputs.imu inputs.processor inputs
llama
encoders shards cache
objectives training
saving model evaluation figures
checkpoints.weights checkpoints.imagebind checkpoints.adapter checkpoints.official checkpoints
explorer.show explorer.widgets explorer
toyland.world toyland.sensors toyland.recipes toyland.scoring toyland.pictures toyland
experiments.figures_cache experiments.figures_space experiments.figures_training
experiments.figures_paper experiments
""".split()
ABOVE_TOYLAND = ("toyland", "experiments")


def room_of(path):
    """The name of a file of the package as a room: `inputs.audio`, `cache`; a folder's `__init__`
    is the folder."""
    parts = path.relative_to(ROOT / "ibllm").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


FILES = {
    room_of(path): path
    for path in sorted((ROOT / "ibllm").rglob("*.py"))
    if path.name != "_modidx.py"
}


def imports(path):
    "Every module that a file of the package imports anywhere in it; relative ones in full."
    package = ["ibllm", *path.relative_to(ROOT / "ibllm").parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join(filter(None, [*above, node.module]))
            names = [f"{module}.{alias.name}" for alias in node.names]
            inside = [name for name in names if name.removeprefix("ibllm.") in FILES]
            yield from inside or [module]


def arrows():
    "Every pair of rooms of which the first imports the second."
    for room, path in FILES.items():
        for module in imports(path):
            if module.startswith("ibllm.") and module != "ibllm.__version__":
                yield room, module.removeprefix("ibllm.")


# The package


def test_version_is_the_same_everywhere():
    assert settings()["version"] == ibllm.__version__ == importlib.metadata.version("ibllm")


def test_importing_the_package_imports_nothing_else():
    loaded = run(
        sys.executable,
        "-c",
        "import ibllm, sys; print('torch' in sys.modules, 'ibllm.model' in sys.modules)",
    )
    assert loaded.split() == ["False", "False"]


def test_top_level_names_resolve_when_asked_for():
    assert {"load", "ImageBindLLM", *(room for room in ROOMS if "." not in room)} <= set(dir(ibllm))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        getattr(ibllm, "nothing")
    from ibllm import cache

    assert ibllm.cache is cache


def test_every_file_of_the_package_is_a_room():
    assert set(FILES) - {""} == set(ROOMS)


def test_imports_point_downwards():
    "No arrow upwards, and so no circle."
    upwards = [
        arrow for arrow in arrows() if arrow[0] and ROOMS.index(arrow[1]) >= ROOMS.index(arrow[0])
    ]
    assert not upwards


def test_no_room_below_toyland_imports_toyland():
    assert any(to.startswith("toyland") for _, to in arrows()), "the experiments do"
    assert not [
        (room, to)
        for room, to in arrows()
        if to.startswith("toyland") and not room.startswith(ABOVE_TOYLAND)
    ]


@pytest.mark.parametrize("room", ["bind", "llama", "encoders", "cache", "training"])
def test_the_core_needs_no_decoders_of_files(room):
    decoders = "{'av', 'soundfile', 'trimesh'}"
    code = f"import ibllm.{room}, sys; print(*sorted({decoders} & sys.modules.keys()))"
    assert run(sys.executable, "-c", code).split() == []


def test_notebook_folders_mirror_package_folders():
    rooms = {}
    for path in NOTEBOOKS:
        if found := re.match(
            r"#\| default_exp (\S+)",
            "".join(code_cells(path)[0]["source"]) if code_cells(path) else "",
        ):
            rooms[path.relative_to(ROOT / "nbs").with_suffix("")] = found[1]
    assert {
        re.sub(r"(^|/)\d\d_", r"\1", str(path)).replace("/", "."): room
        for path, room in rooms.items()
    } == {room: room for room in rooms.values()}
    folders = {"inputs", "checkpoints", "explorer", "toyland", "experiments"}
    assert set(rooms.values()) == set(ROOMS) - folders


def packages_of(module, homes):
    "The packages that bring `module`, as requirements call them."
    return {home.lower().replace("_", "-") for home in homes.get(module, [module])}


def padded(release):
    "The first three numbers of a release."
    return (release.split(".") + ["0"])[:3]


def test_settings_name_every_requirement():
    lines = f"{settings()['requirements']} {settings()['exr_requirements']}".split()
    named = {re.split("[<>=]", line)[0].replace("_", "-") for line in lines}
    homes = importlib.metadata.packages_distributions()
    for path in FILES.values():
        used = (
            {module.split(".")[0] for module in imports(path)} - sys.stdlib_module_names - {"ibllm"}
        )
        unnamed = {name for name in used if named.isdisjoint(packages_of(name, homes))}
        assert not unnamed, f"{path.name} imports {unnamed}, which settings.ini does not require"


def test_package_is_what_the_notebooks_export(tmp_path):
    project = copy_project(tmp_path, "nbs", "pyproject.toml")
    shutil.copytree(
        ROOT / "ibllm",
        project / "ibllm",
        ignore=lambda folder, names: {
            name for name in names if name.endswith(".py") and name != "__init__.py"
        },
    )
    run(tool("nbdev-export"), cwd=project)
    exported, ours = (
        {
            p.relative_to(folder): p.read_text()
            for p in folder.rglob("*.py")
            if p.name != "_modidx.py"
        }
        for folder in (project / "ibllm", ROOT / "ibllm")
    )
    assert ours == exported, "run nbdev-export"


def test_wheel_holds_the_package_and_the_trained_weights(tmp_path):
    files = "settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE"
    project = copy_project(tmp_path, "ibllm", "data", *files)
    build = (
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        "wheels",
        ".",
    )
    run(*build, cwd=project)
    [wheel] = (project / "wheels").glob("*.whl")
    assert wheel.name == f"ibllm-{ibllm.__version__}-py3-none-any.whl"
    held = set(zipfile.ZipFile(wheel).namelist())
    assert {str(path.relative_to(ROOT)) for path in FILES.values()} <= held
    weights = {
        f"ibllm/{p.relative_to(ROOT)}" for p in (ROOT / "data/toyland").rglob("*") if p.is_file()
    }
    assert {name for name in held if name.startswith("ibllm/data/")} == weights
    assert any(name.endswith("/LICENSE") for name in held)


@pytest.mark.slow
def test_an_installed_wheel_works_from_another_folder(tmp_path):
    "Every room of it can be imported, and the shipped model answers."
    files = "settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE"
    project = copy_project(tmp_path, "ibllm", "data", *files)
    pip = sys.executable, "-m", "pip"
    run(*pip, "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", "wheels", ".", cwd=project)
    [wheel] = (project / "wheels").glob("*.whl")
    run(*pip, "install", "-q", "--no-deps", "--target", str(tmp_path / "home"), str(wheel))
    (tmp_path / "elsewhere").mkdir()
    code = f"""
import importlib, sys
sys.path.insert(0, {str(tmp_path / "home")!r})
for room in {ROOMS}:
    importlib.import_module("ibllm." + room)
import ibllm
assert ibllm.__file__.startswith({str(tmp_path / "home")!r}), ibllm.__file__
print(ibllm.load("toyland").generate({{}}, "what is a bell for ?"))
"""
    assert run(sys.executable, "-c", code, cwd=tmp_path / "elsewhere").startswith("['")


# The notebooks


def test_notebooks_are_clean(tmp_path):
    project = copy_project(tmp_path, "nbs", "pyproject.toml")
    run(tool("nbdev-clean"), cwd=project)
    untidy = [
        p.name for p in NOTEBOOKS if p.read_bytes() != (project / p.relative_to(ROOT)).read_bytes()
    ]
    assert not untidy, "run nbdev-clean"


@each_notebook
def test_notebook_is_a_small_file_without_widget_state(path):
    assert path.stat().st_size < 1_000_000
    assert "widgets" not in json.loads(path.read_text())["metadata"]


def longest_functions(path):
    "Name and lines of every function in a file, without its docstring."
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
            yield node.name, body[-1].end_lineno - body[0].lineno + 1


@pytest.mark.parametrize("room", FILES)
def test_functions_are_short(room):
    long = [f"{name}: {lines}" for name, lines in longest_functions(FILES[room]) if lines > 30]
    assert not long, "functions of more than 30 lines"


@each_notebook
def test_notebook_stores_its_outputs_and_no_errors(path):
    assert outputs(path) or not code_cells(path), "run the notebook and keep its outputs"
    assert not [
        o for o in outputs(path) if o["output_type"] == "error" or o.get("name") == "stderr"
    ]


@each_notebook
def test_notebook_outputs_name_no_machine_path(path):
    for output in outputs(path):
        texts = [
            output.get("text", ""),
            *(v for k, v in output.get("data", {}).items() if k.startswith("text/")),
        ]
        assert not [found for text in texts for found in MACHINE_PATH.findall("".join(text))]


# The rest


def test_code_passes_ruff():
    run(tool("ruff"), "check", "--no-cache", "--output-format=concise", ".")


def test_sources_name_no_machine_path():
    kinds = "*.py", "*.md", "*.ini", "*.toml", "*.txt", "*.json", "*.yaml", "Makefile"
    tracked = run("git", "ls-files", "-z", "--", *kinds)
    files = [ROOT / name for name in tracked.split("\0") if name and not name.startswith("tests/")]
    assert not [f.name for f in files if f.exists() and MACHINE_PATH.search(f.read_text())]


def test_readme_is_its_notebook(tmp_path):
    make = "make", "-s", "-o", ".venv/.done", f"BIN={Path(sys.executable).parent}"
    run(*make, f"README={tmp_path / 'README.md'}", "readme")
    assert (ROOT / "README.md").read_text() == (tmp_path / "README.md").read_text(), (
        "run make readme"
    )


def test_readme_commands_and_links_exist():
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    assert {"reproduce", "test"} <= set(re.findall(r"make (\w+)", readme))
    assert all(
        re.search(f"^{target}:", makefile, re.M)
        for target in re.findall(r"^make (\w+)", readme, re.M)
    )
    links = re.findall(r"\]\(([^)#:]+)\)", readme)
    assert not [link for link in links if not (ROOT / link).exists()]


@pytest.mark.slow
def test_readme_code_runs_as_written():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(blocks) == 2
    assert run(sys.executable, "-c", "".join(blocks)).startswith("['a bell']\n")


def test_licence_is_apache():
    assert settings()["license"] == "Apache-2.0"
    assert re.match(
        r"\s+Apache License\s+Version 2\.0, January 2004", (ROOT / "LICENSE").read_text()
    )


def test_every_requirement_is_pinned():
    wanted = " ".join(
        settings()[name] for name in ("requirements", "exr_requirements", "dev_requirements")
    ).split()
    pinned = {
        line.split("==")[0]
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    assert not {re.split("[<>=]", name)[0].replace("_", "-") for name in wanted} - pinned


def test_the_oldest_releases_are_the_lower_bounds():
    bounds = dict(line.split(">=") for line in settings()["requirements"].split())
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    oldest = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert {name: padded(release) for name, release in bounds.items()} == {
        name: padded(release) for name, release in oldest.items()
    }
