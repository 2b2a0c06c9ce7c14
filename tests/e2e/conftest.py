from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from harness import Daemon

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    """One daemon for all tests of a module: each brings pipelines and data of its own."""
    with Daemon(slots=4) as daemon:
        yield daemon


@pytest.fixture
def own() -> Iterator[Daemon]:
    """A daemon for one test, which may kill it."""
    with Daemon(slots=4) as daemon:
        yield daemon
