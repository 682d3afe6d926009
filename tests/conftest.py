"""Shared fixtures: the folder of real weights and photographs."""

import gc
import os
import re
import signal
from pathlib import Path

import pytest
import torch

ASSETS = Path(os.environ.get("PHOSPHENE_ASSETS", Path(__file__).parents[2] / "shared"))

#: What is in the names of the tests that run umap-learn.
UMAP = re.compile("umap|activation_atlas")

torch.set_num_threads(1)

# Without optimizations umap-learn is compiled in two thirds of the time; into a cache of the tests alone, in
# "__pycache__", to which the kit lets methods write.
os.environ.setdefault("NUMBA_OPT", "0")
os.environ.setdefault("NUMBA_CACHE_DIR", str(Path(__file__).parent / "__pycache__" / "numba"))


# Started in the background of a script, a process ignores SIGINT, and so do the scripts that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real weights and photographs; tests that use it are skipped if it is absent."""
    if not (ASSETS / "weights").is_dir():
        pytest.skip(
            f"real weights and photographs are absent: no {ASSETS / 'weights'} (set PHOSPHENE_ASSETS)"
        )
    return ASSETS


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # umap-learn compiles for many seconds in each process that uses it: one process runs all of these tests.
    for item in items:
        module = item.getparent(pytest.Module)
        of_the_module = module.get_closest_marker("xdist_group") if module else None
        if of_the_module is None and UMAP.search(item.nodeid):
            item.own_markers = [mark for mark in item.own_markers if mark.name != "xdist_group"]
            item.add_marker(pytest.mark.xdist_group("umap"))
        elif item.get_closest_marker("xdist_group") is None and (group := shared_fixtures(item)):
            item.add_marker(pytest.mark.xdist_group(group))


def shared_fixtures(item: pytest.Item) -> str:
    """A name for the fixtures that a test shares with others of its module; empty where it shares none.

    These tests run in one process: in two, each would make the fixtures.
    """
    fixtures = getattr(item, "_fixtureinfo", None)
    of_modules = [
        name
        for name, definitions in (fixtures.name2fixturedefs.items() if fixtures else ())
        if any(definition.scope == "module" for definition in definitions)
    ]
    if not of_modules:
        return ""
    parameters = item.callspec.indices if hasattr(item, "callspec") else {}
    numbers = [f"{name} {parameters[name]}" for name in of_modules if name in parameters]
    return " ".join([item.nodeid.partition("::")[0], *numbers])


def pytest_collectstart() -> None:
    # What collection makes stays: scanning it for garbage again and again takes a quarter of the time.
    gc.disable()


def pytest_collection_finish() -> None:
    # Modules and tests stay until the end: garbage collection need not scan them again and again.
    gc.enable()
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
