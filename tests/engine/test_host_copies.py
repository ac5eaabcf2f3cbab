"""Copies of weights for a checkpoint: into the same memory again, and on a GPU beside the steps that go on."""

import threading

import pytest
import torch

from scalekd_ds.engine.host_copies import HostCopies, now


def test_a_copy_takes_the_memory_of_the_one_before_it():
    copies, weights = HostCopies(), torch.arange(6.0)
    first = copies("a", weights)
    weights += 1
    second = copies("a", weights)
    assert second.data_ptr() == first.data_ptr() != weights.data_ptr() and torch.equal(second, weights)
    # of another shape or type it cannot
    assert torch.equal(copies("a", weights.double()), weights.double()) and copies.keys() == {"a"}


def test_nothing_is_queued_on_a_cpu():
    copies, weights = HostCopies(), torch.arange(6.0)
    assert now(weights.device) is None
    with copies.beside(None):
        assert torch.equal(copies("a", weights.view(2, 3).t()), weights.view(2, 3).t())


@pytest.mark.gpu
def test_a_thread_copies_the_weights_of_their_step_beside_the_next_one():
    """As at a checkpoint: the thread copies during the forward and backward pass, and the update waits for it."""
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    with torch.cuda.device(device):
        weights = [torch.full((1 << 20,), float(i), device=device) for i in range(16)]
        weights.append(torch.randn(64, 64, 3, 3, device=device).to(memory_format=torch.channels_last))
        copies, found = HostCopies(), {}

        def copy(ready: torch.cuda.Event) -> None:
            with copies.beside(ready):
                for number, weight in enumerate(weights):
                    found[number] = copies(str(number), weight)

        def save(check) -> None:
            expected = [weight.clone() for weight in weights]
            torch.cuda.synchronize()
            # the last update is still queued when the checkpoint begins
            torch.cuda._sleep(200_000_000)
            for weight in weights:
                weight.mul_(1.5)
            thread = threading.Thread(target=copy, args=(now(device),))
            # the forward and backward pass
            torch.cuda._sleep(2_000_000_000)
            passed = torch.cuda.current_stream().record_event()
            thread.start()
            thread.join()
            check(passed)
            # the update waits for the copies
            for weight in weights:
                weight.add_(1.0)
            torch.cuda.synchronize()
            for number, before in enumerate(expected):
                assert torch.equal(found[number], (before * 1.5).cpu())
                assert torch.equal(weights[number], before * 1.5 + 1.0)

        # memory is pinned at the first one, which may wait for the device
        save(lambda passed: None)

        def beside(passed: torch.cuda.Event) -> None:
            assert not passed.query(), "the copies waited for the steps"

        save(beside)
        assert all(found[number].is_pinned() for number in found)
