"""What every test and every tested notebook shares: quick training, no network, comparable notebook
outputs."""

import hashlib
import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault(
    "IBLLM_QUICK", "1"
)  # shortened training; kernels of tested notebooks inherit it
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # the models are small: one thread is as fast, and repeatable
os.environ["HF_HUB_OFFLINE"] = "1"


def results():
    """Digest of every file that full runs of the notebooks make, and that shortened ones must leave
    alone."""
    files = (
        file
        for folder in ("data", "figures")
        for file in Path(__file__).with_name(folder).rglob("*")
    )
    return {
        str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()
    }


def pytest_sessionstart(session):
    if getattr(session.config.option, "nbval_lax", False):
        session.config.results_before = results()


def pytest_sessionfinish(session):
    before, after = getattr(session.config, "results_before", None), results()
    if before is None or before == after:
        return
    changed = sorted(
        name for name in before.keys() | after.keys() if before.get(name) != after.get(name)
    )
    session.config.get_terminal_writer().line(
        f"\nFAILED: the notebooks changed stored results: {changed}", red=True
    )
    session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_collection_modifyitems(items):
    """nbdev-clean blanks execution counts, and nbval takes a cell without one for never run: give
    it the count 1."""
    for item in items:
        cell = getattr(item, "cell", None)
        if cell is None:
            continue
        if cell.execution_count is None:
            cell.execution_count = 1
        item.add_marker(pytest.mark.timeout(0))  # nbval has its own timeout for each cell


@pytest.fixture(scope="session", autouse=True)
def nothing_is_kept(tmp_path_factory):
    "What tests build goes into a temporary folder, not into data/build."
    from ibllm.toyland import recipes

    recipes.build_in(tmp_path_factory.mktemp("build"))


HERE, REACHED = (None, "", "localhost", "127.0.0.1", "::1"), []


def watch_sockets(event, arguments):
    "Refuse and remember every attempt to look up, connect or send to another machine."
    if event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = arguments[0]
    elif event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        if not isinstance(arguments[1], tuple):
            return  # a Unix socket, or one that is connected already
        host = arguments[1][0]
    else:
        return
    if host in HERE:
        return
    REACHED.append(host)
    raise ConnectionError(f"a test tried to reach {host!r}")


sys.addaudithook(watch_sockets)  # Python calls it before the deed, in every thread


@pytest.fixture(autouse=True)
def no_network():
    "A test that looks up or connects to another machine fails, even if the error was swallowed."
    REACHED.clear()
    yield REACHED
    assert not REACHED, f"the test tried to reach {REACHED}"


@pytest.fixture
def clean_style():
    "The project's style of figures, and no other setting of matplotlib that an earlier test left."
    import matplotlib.pyplot as plt

    from ibllm.figures import style

    with plt.rc_context():
        style()
        yield


@pytest.fixture
def same_matplotlib():
    """Skip where matplotlib is another release than the one that drew the committed figures: it
    draws other pixels."""
    import matplotlib

    drawn_by = Path(__file__).with_name("figures").joinpath("eight_modalities.pdf").read_bytes()
    if f"v{matplotlib.__version__})".encode() not in drawn_by:
        pytest.skip(f"matplotlib {matplotlib.__version__} did not draw the committed figures")
