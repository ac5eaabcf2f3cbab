"""When a checkpoint is published: once every rank has written its files."""

from forking import forked_ranks
from launching import WORKERS, result_of


def test_a_second_run_in_the_same_ranks_waits_for_the_slowest_one_too(tmp_path):
    """The first run's answers, which stay in the job's store, are not taken for the second's."""
    whole = ["rank0", "rank1"]
    assert result_of(forked_ranks(WORKERS / "saver_worker.py", tmp_path)) == {"first": whole, "second": whole}
