"""The experts' operations on small cases against float64, for whatever device and launcher runs them (GPU or emulator).

Outputs are poisoned with NaN by the caller (`poison_new_tensors`), inputs are fresh normal data; what lies behind the last expert's
rows is NaN too.
"""

import itertools

import torch

from dispatch import DispatchPlan
from dispatch.kernels.sizes import TICKETS
from sonicmoe.activations import activate, activation_gradient, is_gated

NEIGHBOUR = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-23}
"""Half the distance between neighbouring values, relative to the larger one: what rounding once costs at most."""

TAIL = 37
"""Rows behind the last expert's."""


class Case:
    """One problem: H, I, T and the experts' rows, with tokens, slots and scores drawn at random."""

    def __init__(
        self, H, I, T, counts, *, dtype, activation="swiglu", layout="interleaved", bias=False, device="cuda", seed=0, transposed=False
    ):
        self.generator = torch.Generator(device).manual_seed(seed)
        self.H, self.I, self.T, self.counts, self.dtype, self.device = H, I, T, counts, dtype, device
        self.activation, self.layout = activation, layout
        self.width = 2 * I if is_gated(activation) else I
        self.rows = sum(counts)
        total = self.rows + TAIL
        offsets = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device=device)
        tokens = torch.randint(0, T, (total,), generator=self.generator, dtype=torch.int32, device=device)
        slots = torch.randperm(total, generator=self.generator, device=device).int()  # of the rows; the tail's are sentinels
        tokens[self.rows :] = -1
        slot_to_row = torch.full((total,), -1, dtype=torch.int32, device=device)
        slot_to_row[slots[: self.rows].long()] = torch.arange(self.rows, dtype=torch.int32, device=device)
        row_to_slot = slots.clone()
        row_to_slot[self.rows :] = -1
        tickets = torch.zeros(TICKETS, dtype=torch.int32, device=device)
        self.plan = DispatchPlan(offsets, tokens, row_to_slot, slot_to_row, None, None, T, len(counts), None, tickets)
        self.score = torch.rand(total, generator=self.generator, device=device)
        self.score[(slot_to_row < 0)] = float("nan")
        E = len(counts)
        self.x, self.dout = self.randn(T, H), self.randn(T, H)
        self.w_up, self.w_down = self.randn(E, self.width, H, scale=H**-0.5), self.randn(E, H, I, scale=I**-0.5)
        if transposed:
            self.w_up, self.w_down = (weight.mT.contiguous().mT for weight in (self.w_up, self.w_down))
        self.b_up, self.b_down = (self.randn(E, self.width), self.randn(E, H)) if bias else (None, None)
        self.z, self.dz, self.scaled_a = self.padded(self.width), self.padded(self.width), self.padded(I)

    def randn(self, *shape, scale=1.0):
        return (torch.randn(*shape, generator=self.generator, device=self.device) * scale).to(self.dtype)

    def padded(self, columns):
        """(R + tail, columns) whose tail is NaN."""
        values = self.randn(self.rows + TAIL, columns)
        values[self.rows :] = float("nan")
        return values

    def experts(self):
        """For each expert: its rows, their tokens and their scores in float64."""
        for expert, (begin, end) in enumerate(itertools.pairwise(self.plan.offsets.tolist())):
            own = slice(begin, end)
            yield expert, own, self.plan.row_to_token[own].long(), self.score[self.plan.row_to_slot[own].long()].double()


def poison_new_tensors(monkeypatch) -> None:
    """Every tensor that the host halves make is NaN, or an index far out of bounds, until written."""
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like

    def poison(tensor):
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 2**30)

    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: poison(new_empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: poison(empty_like(*args, **kwargs)))


def check_up_projection(case: Case, operation, *, store_z: bool = True) -> tuple:
    """Runs the operation, checks what it returns, and returns it."""
    a, z = operation(case.x, case.w_up, case.b_up, case.plan, activation=case.activation, gate_up_layout=case.layout, store_z=store_z)
    assert not case.plan.tickets.any()
    assert (z is not None) == store_z
    for expert, own, tokens, _ in case.experts():
        want = case.x[tokens].double() @ case.w_up[expert].double().mT
        if case.b_up is not None:
            want += case.b_up[expert].double()
        assert_near(a[own], activate(want, case.activation, case.layout), f"a of expert {expert}")
        if store_z:
            assert_near(z[own], want, f"z of expert {expert}")
    assert all(result is None or result[case.rows :].isnan().all() for result in (a, z)), "the tail was written"
    return a, z


def check_down_projection(case: Case, operation) -> torch.Tensor:
    """The operation's result on scaled_a, checked."""
    y = operation(case.scaled_a, case.w_down, case.b_down, case.plan)
    assert not case.plan.tickets.any()
    for expert, own, _, _ in case.experts():
        want = case.scaled_a[own].double() @ case.w_down[expert].double().mT
        assert_near(y[own], want if case.b_down is None else want + case.b_down[expert].double(), f"y of expert {expert}")
    assert y[case.rows :].isnan().all(), "the tail was written"
    return y


def check_activation_backward(case: Case, operation, **needs) -> tuple:
    """Runs the operation, checks what it returns, and returns it."""
    wanted = {"need_dz": True, "need_dscore": True, "need_scaled_a": True} | needs
    z = case.z.clone()  # for overwrite_z
    results = operation(
        case.dout, z, case.w_down, case.b_down, case.score, case.plan, activation=case.activation, gate_up_layout=case.layout, **wanted
    )
    assert not case.plan.tickets.any()
    dz, dscore, scaled_a = results
    row_dscore = torch.zeros(case.rows, dtype=torch.float64, device=case.device)
    row_scale = torch.zeros_like(row_dscore)
    for expert, own, tokens, score in case.experts():
        z, dout = case.z[own].double(), case.dout[tokens].double()
        a, da = activate(z, case.activation, case.layout), dout @ case.w_down[expert].double()
        if dz is not None:
            assert_near(dz[own], activation_gradient(z, score[:, None] * da, case.activation, case.layout), f"dz of expert {expert}")
        if scaled_a is not None:
            assert_near(scaled_a[own], score[:, None] * a, f"scaled_a of expert {expert}")
        row_dscore[own] = (da * a).sum(1)
        row_scale[own] = (da * a).abs().sum(1)
        if case.b_down is not None:
            row_dscore[own] += dout @ case.b_down[expert].double()
            row_scale[own] += dout.abs() @ case.b_down[expert].double().abs()
    for name, result in {"dz": dz, "scaled_a": scaled_a}.items():
        assert (result is None) == (not wanted[f"need_{name}"]), name
        assert result is None or result[case.rows :].isnan().all(), f"{name}: the tail was written"
    assert (dscore is None) == (not wanted["need_dscore"])
    if dscore is not None:
        sentinels = case.plan.slot_to_row < 0
        assert (dscore[sentinels] == 0).all()
        slots = case.plan.row_to_slot[: case.rows].long()
        off = (dscore[slots].double() - row_dscore).abs() / row_scale.clamp(min=1e-30)
        assert not case.rows or off.max() < 2e-5, f"dscore: {off.max():.1e} of the sum of its terms' sizes"
    return results


def check_weight_grads(case: Case, down, up, *, bias: bool) -> tuple:
    """dw_down, db_down, dw_up and db_up of ``down`` and ``up``, checked; returned together."""
    results = (
        *down(case.dout, case.scaled_a, case.score, case.plan, need_weight=True, need_bias=bias),
        *up(case.x, case.dz, case.plan, need_weight=True, need_bias=bias),
    )
    assert not case.plan.tickets.any()
    dw_down, db_down, dw_up, db_up = results
    for expert, own, tokens, score in case.experts():
        dout, dz = case.dout[tokens].double(), case.dz[own].double()
        assert_near(dw_down[expert], dout.mT @ case.scaled_a[own].double(), f"dw_down of expert {expert}")
        assert_near(dw_up[expert], dz.mT @ case.x[tokens].double(), f"dw_up of expert {expert}")
        if bias:
            assert_near(db_down[expert], score @ dout, f"db_down of expert {expert}")
            assert_near(db_up[expert], dz.sum(0), f"db_up of expert {expert}")
    return results


def check_added_weight_grads(case: Case, down, up) -> tuple:
    """dw_down and dw_up added into float32 buffers that hold something already; returned together."""
    buffers = [torch.randn(*weight.shape, generator=case.generator, device=case.device) for weight in (case.w_down, case.w_up)]
    before = [buffer.double() for buffer in buffers]
    assert down(case.dout, case.scaled_a, case.score, case.plan, need_weight=True, need_bias=False, add_to=buffers[0]) == (None, None)
    assert up(case.x, case.dz, case.plan, need_weight=True, need_bias=False, add_to=buffers[1]) == (None, None)
    for expert, own, tokens, _ in case.experts():
        gradients = case.dout[tokens].double().mT @ case.scaled_a[own].double(), case.dz[own].double().mT @ case.x[tokens].double()
        for name, buffer, old, gradient in zip(("dw_down", "dw_up"), buffers, before, gradients, strict=True):
            assert_near(buffer[expert], old[expert] + gradient, f"{name} of expert {expert}")
    return tuple(buffers)


def check_dx_rows(case: Case, operation) -> torch.Tensor:
    """The operation's result, checked."""
    rows = operation(case.dz, case.w_up, case.plan)
    assert not case.plan.tickets.any()
    for expert, own, _, _ in case.experts():
        assert_near(rows[own], case.dz[own].double() @ case.w_up[expert].double(), f"dx rows of expert {expert}")
    assert rows[case.rows :].isnan().all(), "the tail was written"
    return rows


def assert_near(got: torch.Tensor, want: torch.Tensor, name: str) -> None:
    """No element further from float64 than one rounding and what float32 sums and approximated functions cost; NaN never passes."""
    if not want.numel():
        return
    off = (got.double() - want).abs()
    allowed = want.abs() * (NEIGHBOUR[got.dtype] * 1.01) + 2e-5 * want.abs().max() + 1e-7
    worst = (off / allowed).nan_to_num(nan=float("inf")).max().item()
    assert worst <= 1, f"{name}: {worst:.2f} times what rounding explains"
