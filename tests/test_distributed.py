"""Sums in a fixed order, gradients over micro-batches, and what processes refuse about each other."""

from __future__ import annotations

import time

import pytest
import torch

from forked_job import free_port
from lowbit.distributed import exchange, job
from lowbit.distributed.job import TIMEOUT, agree, joined, reports, seconds
from lowbit.distributed.tree import Node, Tree, divided, leaves, own_part, sequences_of
from lowbit.distributed.world import ONE, World, here, launched, within
from lowbit.errors import LowbitError
from lowbit.methods.gradients import gradients
from lowbit.methods.statistics import Statistics, over_leaves


def summed(values: torch.Tensor, size: int) -> float:
    """The sum of micro-batches by some processes, each of which tells its nodes."""
    parts, nodes = leaves(len(values)), []
    for rank in range(size):
        own: Tree[torch.Tensor] = Tree(torch.add)
        for number in own_part(len(parts), rank, size):
            chain = values[parts[number][0]]
            for at in parts[number][1:]:
                chain = chain + values[at]
            own.add(Node(number, 1, chain))
        nodes += own.nodes
    whole: Tree[torch.Tensor] = Tree(torch.add)
    for node in nodes:
        whole.add(node)
    total = whole.total()
    assert total is not None
    return float(total)


def test_any_division_of_the_leaves_gives_one_sum():
    chains = []
    for count in range(1, 41):
        values = torch.randn(count, generator=torch.Generator().manual_seed(count)) * 1e3
        assert len({summed(values, size) for size in range(1, 11)}) == 1, count
        chain = values[0]
        for value in values[1:]:
            chain = chain + value
        chains.append(float(chain) == summed(values, 1))
    assert all(chains[:3])  # up to three micro-batches the tree is the chain
    assert not all(chains)  # the order counts: the test would notice another one


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 100])
def test_leaves_are_all_micro_batches_in_order(count):
    assert [at for leaf in leaves(count) for at in leaf] == list(range(count))
    assert [at for part in divided(count, 3) for at in part] == list(range(count))
    assert len(leaves(count)) == min(count, 8)


def test_statistics_do_not_depend_on_which_process_takes_which_leaf(monkeypatch):
    rows = torch.randn(37, 5, 6, generator=torch.Generator().manual_seed(0))
    want = ("gram", "peak", "tokens")

    def of_leaf(part: slice) -> dict[str, Statistics]:
        seen = Statistics(want)
        for piece in rows[part].split(4):
            seen.add(piece)
        return {"x": seen}

    whole = over_leaves(len(rows), 4, of_leaf)["x"]
    assert whole.count == 37 * 5
    assert torch.equal(whole["tokens"], rows.flatten(0, 1))

    def nodes_of(rank: int, size: int) -> list[Node[dict[str, Statistics]]]:
        """What one of several processes sends, as the others get it."""
        sent = []

        def total(tree, pack, unpack):
            sent.extend(Node(node.start, node.length, unpack(*pack(node.value))) for node in tree.nodes)
            return {}

        with within(World(rank, size)), monkeypatch.context() as patch:
            patch.setattr("lowbit.methods.statistics.total", total)
            over_leaves(len(rows), 4, of_leaf)
        return sent

    for size in (2, 3, 8, 9):
        nodes = [node for rank in range(size) for node in nodes_of(rank, size)]
        tree: Tree[dict[str, Statistics]] = Tree(lambda left, right: left["x"].merge(right["x"]) or left)
        for node in nodes:
            tree.add(node)
        merged = tree.total()
        assert merged is not None
        assert all(torch.equal(merged["x"][name], whole[name]) for name in want)
        assert merged["x"].count == whole.count


def test_micro_batches_give_the_gradient_of_the_step():
    weight = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    unused = torch.zeros(1, requires_grad=True)
    x = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def loss(chosen: torch.Tensor) -> torch.Tensor:
        return (x[chosen] @ weight.T).square().sum(1).mean()

    indices = torch.tensor([6, 0, 3, 2, 5])
    whole = gradients([weight, unused], loss, [indices])
    expected = weight.grad.clone()
    parted = gradients([weight, unused], loss, indices.split(2))
    assert unused.grad is None
    # Sums of a dozen numbers of order one, in float64.
    assert torch.allclose(parted, whole, rtol=1e-13)
    assert torch.allclose(weight.grad, expected, rtol=1e-12)


def test_sequences_of_a_leaf():
    assert [sequences_of(leaf, 4) for leaf in leaves(3)] == [slice(0, 4), slice(4, 8), slice(8, 12)]


def test_within_a_world_and_back():
    with within(World(1, 3)) as world:
        assert here() == world
        assert not world.first
        with within(ONE):
            assert here().first
        assert here() == world
    assert here() == ONE


@pytest.mark.parametrize(("rank", "size"), [("2", "2"), ("-1", "2"), ("a", "2"), ("0", "0")])
def test_numbers_of_processes_that_cannot_be_are_refused(rank, size):
    environment = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    with pytest.raises(LowbitError, match=f"RANK={rank} and WORLD_SIZE={size} are set"):
        launched(environment)


@pytest.mark.parametrize("text", ["0", "-5", "soon", "nan"])
def test_a_timeout_that_cannot_be_is_refused(text, monkeypatch):
    monkeypatch.setenv(TIMEOUT, text)
    with pytest.raises(LowbitError, match=f"{TIMEOUT}={text} is set; give a number of seconds"):
        seconds()


def test_processes_that_differ_are_refused_by_the_first_difference(monkeypatch):
    others = [{"versions.torch": "2.9", "model": "a"}, {"versions.torch": "2.8", "model": "b"}]
    monkeypatch.setattr(exchange, "from_everyone", lambda value: others)
    agree(others[0])  # one process has nobody to differ from
    with (
        within(World(0, 2)),
        pytest.raises(LowbitError, match=r"process 1 has versions.torch 2.8, process 0 has 2.9"),
    ):
        agree(others[0])


def test_a_process_that_reaches_nobody_tells_its_error(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(job, "_store", None)
    assert not reports()  # such as a wrong option, which each of them has
    monkeypatch.setattr(job, "_unreached", True)
    assert reports()


@pytest.mark.parametrize("port", ["free", "no number"])
def test_a_process_whose_job_has_no_first_one_ends_in_time(port, monkeypatch):
    """Torch's own rendezvous takes more than twice its timeout."""
    at = str(free_port()) if port == "free" else port
    world = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": at, TIMEOUT: "2"}
    for name, value in world.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(job, "_unreached", False)
    began = time.monotonic()
    with pytest.raises(LowbitError, match=f"process 1 of 2 cannot reach the others at 127.0.0.1:{at} "), joined():
        pass
    assert time.monotonic() - began < 4
    assert here() == ONE
