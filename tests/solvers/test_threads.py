from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from openreml_nn.covariance import ScalarMatrix
from openreml_nn.solvers import DenseSolver
from openreml_nn.solvers.threads import one_thread, threads_for


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("numbers", "multiplications", "threads"), [(10, 10, 1), (1e6, 10, 2), (10, 1e9, 2)])
def test_small_computations_take_one_thread(numbers, multiplications, threads):
    with threads_for(numbers, multiplications):
        assert torch.get_num_threads() == threads
    assert torch.get_num_threads() == 2


def test_the_number_of_threads_comes_back_after_an_error():
    with pytest.raises(ValueError, match="inside"), one_thread():
        raise ValueError("inside")
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(("n", "threads"), [(20, 1), (600, 2)])
def test_a_problem_says_how_many_threads_pay(n, threads):
    y = torch.linspace(0.0, 1.0, n, dtype=torch.float64)
    with DenseSolver().prepare(ScalarMatrix(n), y).threads():
        assert torch.get_num_threads() == threads


def test_blocks_within_blocks_and_in_other_threads():
    with one_thread():
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
        with ThreadPoolExecutor(2) as others:
            found = [*others.map(within, range(4))]
    assert found == [(1, 2)] * 4
    assert torch.get_num_threads() == 2


def within(_: int) -> tuple[int, int]:
    """Threads in a block and after it, of a thread of Python that began during the block of another one."""
    with one_thread():
        inside = torch.get_num_threads()
    return inside, torch.get_num_threads()
