"""What an input may cost at most, for the tests of bad input: seconds, and memory where Linux tells
it."""

import re
import time
from contextlib import contextmanager
from pathlib import Path

LINUX = Path("/proc/self/clear_refs").exists()


def resident(field="VmRSS"):
    """KiB of this process that are in memory now (VmRSS), or were at most since the peak was reset
    (VmHWM)."""
    return int(
        re.search(rf"^{field}:\s+(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE)[1]
    )


@contextmanager
def within(seconds=10, kibibytes=2 * 2**20):
    "Fail if the block takes longer, or more memory at its peak than there was before."
    if LINUX:
        Path("/proc/self/clear_refs").write_text(
            "5"
        )  # resets the peak, which other tests may have raised
        before = resident()
    start = time.monotonic()
    try:
        yield
    finally:
        assert time.monotonic() - start < seconds
        assert not LINUX or resident("VmHWM") - before < kibibytes
