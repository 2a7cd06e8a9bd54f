"""Importing is quiet: no network, no GPU, no display, no home folder, nothing printed. And the
tests have no network."""

import os
import socket
import subprocess
import sys
import textwrap

import pytest

ROOMS = "files config bind inputs llama encoders shards cache objectives training saving model"
ROOMS = [*ROOMS.split(), "evaluation", "figures"]
MODULES = [
    *ROOMS,
    "checkpoints",
    "explorer.show",
    "explorer.widgets",
    "toyland.pictures",
    "experiments.figures_paper",
]

WATCHED = """
import os, sys
home, touched = os.environ["HOME"], []

def watch(event, arguments):
    if event.startswith("socket.") and event != "socket.__new__":
        touched.append((event, str(arguments[1:])))
    if event in ("open", "os.listdir", "os.scandir", "os.mkdir", "os.remove") and arguments:
        name = arguments[0]
        if isinstance(name, (str, bytes)) and os.fsdecode(name).startswith(home):
            touched.append((event, name))
    if event in ("subprocess.Popen", "os.system", "os.exec", "os.fork", "os.posix_spawn"):
        looks = "ldconfig", "lscpu"  # CUDA's torch does, and old NumPy
        if not any(name in str(arguments) for name in looks):
            touched.append((event, str(arguments)))

sys.addaudithook(watch)
"""


def watched(code, home, **env):
    """What a new Python touches and prints while it runs `code`, with `home` as its home folder and
    no display."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("DISPLAY", "WAYLAND_DISPLAY")
    }
    tell = "\nsys.stdout.write('\\n'.join(map(str, touched)))"
    done = subprocess.run(
        [sys.executable, "-c", WATCHED + textwrap.dedent(code) + tell],
        text=True,
        capture_output=True,
        env={**environment, "HOME": str(home), **env},
    )
    assert done.returncode == 0, done.stderr
    return (done.stdout + done.stderr).splitlines()


def test_importing_the_package_touches_nothing(tmp_path):
    assert watched("import ibllm", tmp_path / "absent") == []
    assert not (tmp_path / "absent").exists()


@pytest.fixture(scope="module")
def fonts(tmp_path_factory):
    "A folder with matplotlib's list of this machine's fonts, which it makes once and then keeps."
    folder = str(tmp_path_factory.mktemp("matplotlib"))
    watched("import matplotlib.font_manager", folder, MPLCONFIGDIR=folder)
    return dict(MPLCONFIGDIR=folder)


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_importing_a_module_touches_nothing(module, tmp_path, fonts):
    assert watched(f"import ibllm.{module}", tmp_path / "absent", **fonts) == []
    assert not (tmp_path / "absent").exists()


@pytest.mark.slow
def test_importing_initialises_no_gpu(tmp_path, fonts):
    code = f"""
        import torch
        {"; ".join(f"import ibllm.{module}" for module in MODULES)}
        assert not torch.cuda.is_initialized()
        import matplotlib
        screens = ("tkinter", "PyQt6", "PyQt5", "gi", "wx")
        touched += [name for name in screens if name in sys.modules]
    """
    assert watched(code, tmp_path / "absent", **fonts) == []


@pytest.mark.parametrize(
    "reach",
    [
        lambda _: socket.create_connection(("192.0.2.1", 80), timeout=1),
        lambda s: s.connect(("192.0.2.1", 80)),
        lambda s: s.connect_ex(("192.0.2.1", 80)),
        lambda s: s.sendto(b"x", ("192.0.2.1", 53)),
        lambda _: socket.getaddrinfo("example.org", 80),
        lambda _: socket.gethostbyname("example.org"),
    ],
)
def test_the_tests_have_no_network(reach, no_network):
    with (
        socket.socket(type=socket.SOCK_DGRAM) as ours,
        pytest.raises(ConnectionError, match="tried to reach"),
    ):
        reach(ours)
    assert len(no_network) == 1
    no_network.clear()


def test_this_machine_can_be_reached():
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()
