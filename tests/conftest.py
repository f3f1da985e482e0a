import os
import signal

import pytest
import torch
from hypothesis import HealthCheck, settings

# One thread: the matrices are small, the workers of pytest-xdist are many, and sums keep their order.
torch.set_num_threads(1)

# As in a terminal: nohup, and a shell that puts the tests into the background, would have all children ignore them.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

settings.register_profile(
    "ci", derandomize=True, deadline=None, max_examples=25, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("thorough", parent=settings.get_profile("ci"), derandomize=False, max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def precision() -> list[str]:
    return [place.fp32_precision for place in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)]


@pytest.fixture(autouse=True)
def the_precision_of_the_process_stays():
    """A test that changed it would change what bfloat16 tests of the same worker compute, and not what they compare."""
    found = precision()
    yield
    assert precision() == found


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Under `-n`, a file is one worker's, so that what its tests share is made once; in the order of the collection."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


def pytest_collection_modifyitems(items):
    """Long files first: one that is left for the end keeps a single worker busy."""
    long = {item.path for item in items for mark in ("distributed", "slow") if item.get_closest_marker(mark)}
    items.sort(key=lambda item: item.path not in long)
