"""Parts of training and evaluation on two processes (gloo, CPU). For whole runs, see `test_distributed.py`."""

import pytest
import two_process_checks
from forking import start_ranks


@pytest.fixture(scope="module")
def passed(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str]]:
    """The output and errors of each process."""
    ranks = start_ranks(two_process_checks.__file__, tmp_path_factory.mktemp("checks"))
    return [(result.stdout, result.stderr) for result in (rank.wait() for rank in ranks)]


@pytest.mark.parametrize("name", [check.__name__ for check in two_process_checks.CHECKS])
def test_both_processes_pass(name, passed):
    for output, errors in passed:
        assert name in output.splitlines(), errors[-5000:]
