"""Other implementations of the same layer, measured beside ours: ``sonicmoe bench --peers``.

Each peer has one file here, its adapter, and runs in a process of its own (worker.py): one that crashes takes nothing along, its
memory is its own, and it may need packages that this process must not see; sonic-moe's package even has this one's name. All get
the same weights, inputs and routing (compare.py), ours as well. The adapters live here and not in ``testing``, because the command
that runs them is this package's, and a lookup of ``testing`` by name would be an import against the one way that they run.

An adapter is a module with a class ``Layer``, made from a `worker.Problem`::

    layer = Layer(problem)                # converts weights to the peer's layout, off the clock
    layer.leaves                          # name -> tensor that gets a gradient: x, score, and the weights as the peer holds them
    layer.forward(inference=False)        # o (T, H), from the leaves
    layer.restore(gradients)              # leaf name -> gradient becomes x, score, w_up, w_down, b_up, b_down in our layout

It imports nothing of this package at its top, and raises ValueError in one sentence for a problem that the peer does not take.
"""

from typing import NamedTuple


class Peer(NamedTuple):
    """One peer: what tables call it, its adapter here, the package that it needs beside torch, and where that comes from."""

    title: str
    adapter: str
    package: str
    source: str


OURS = Peer("this library", "ours", "", "")
PEERS = {
    "grouped_mm": Peer("torch grouped_mm", "grouped_mm", "", ""),
    "sonic-moe": Peer("sonic-moe", "sonic_moe", "sonicmoe.functional", "github.com/Dao-AILab/sonic-moe"),
    "scattermoe": Peer("ScatterMoE", "scattermoe", "scattermoe", "github.com/shawntan/scattermoe"),
    "megablocks": Peer("MegaBlocks", "megablocks", "megablocks", "github.com/databricks/megablocks"),
}
"""By the names that the command line takes."""
