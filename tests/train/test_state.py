"""Random states go into a checkpoint and come back."""

import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from aimnet2mult.train.state import random_state, random_states, set_random_state, set_random_states


def draw():
    """Numbers of every generator; normal ones have a second half that is kept for the next call."""
    return (
        random.random(),
        random.gauss(0, 1),
        np.random.rand(3).tolist(),
        np.random.randn(),
        torch.rand(3).tolist(),
        torch.randn(()).item(),
    )


@pytest.mark.parametrize("seed", range(3))
def test_random_numbers_go_on_after_a_checkpoint(tmp_path, seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    draw()
    torch.save({"training": {"random": random_state()}}, tmp_path / "checkpoint.pt")
    expected = [draw() for _ in range(700)]  # more than a Mersenne twister makes at a time
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["training"]["random"]
    for _ in range(2):
        set_random_state(state, torch.device("cpu"))
        assert [draw() for _ in range(700)] == expected


def test_state_does_not_follow_the_generators():
    state = random_state()
    copy = {name: str(part) for name, part in state.items()}
    draw()
    assert {name: str(part) for name, part in state.items()} == copy


def test_states_of_another_number_of_processes(caplog):
    (state,) = random_states()
    expected = draw()
    set_random_states([state])
    assert draw() == expected
    assert caplog.records == []
    set_random_states([state, {}])
    assert draw() == expected
    assert "the random states are those of 2 processes, this run has 1" in caplog.text


def gather(rank, address, results):
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    torch.manual_seed(rank)
    random.seed(rank)
    states = random_states()
    expected = draw()
    set_random_states(states)
    assert draw() == expected
    if rank == 0:
        torch.save(states, results)
    dist.destroy_process_group()


def test_every_process_has_a_state_of_its_own(tmp_path):
    mp.get_context("forkserver").set_forkserver_preload([__name__])
    mp.start_processes(
        gather, (f"file://{tmp_path}/rendezvous", tmp_path / "states.pt"), nprocs=2, start_method="forkserver"
    )
    states = torch.load(tmp_path / "states.pt", weights_only=True)
    for rank, state in enumerate(states):
        torch.manual_seed(rank)
        assert torch.equal(state["torch"], torch.get_rng_state())
    assert not torch.equal(states[0]["torch"], states[1]["torch"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_generator_of_the_gpu_goes_on():
    device = torch.device("cuda", 0)
    torch.rand(1, device=device)
    state = random_state(device)
    expected = torch.rand(5, device=device)
    set_random_state(state, device)
    assert torch.equal(torch.rand(5, device=device), expected)
    set_random_state(random_state(), device)  # of a CPU run
