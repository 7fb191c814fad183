"""Kernels of PyTorch in place of the GPU's, for a layer on a CPU: they take the arguments of the real ones and compute with the reference
backend, so that the values tell whether the host half hands over the right tensors."""

import contextlib
import itertools

import torch
import tvm_ffi

import cute_runtime
import dispatch
from cute_runtime import checks
from cute_runtime.emulator import h100_properties
from cute_runtime.emulator.native import native
from dispatch import DispatchPlan, chunk_counts, count_hopper, gather_sum_hopper, plan_hopper
from dispatch.kernels.sizes import TICKETS
from routing import hopper as routing_hopper
from routing import router_logits_hopper, scores_hopper, top_k, top_k_hopper
from routing.kernels.logits_tiles import Tile
from sonicmoe import MoE, backends
from sonicmoe.backends import arguments, hopper, hopper_backward, hopper_layer, hopper_layer_backward, reference

T, H, I, E, K = 40, 32, 16, 8, 2
CACHES = (
    *(chunk_counts.multiprocessors, plan_hopper.uniform_launch, plan_hopper._load_plan_few, plan_hopper._load_place),
    *(plan_hopper._load_keys, plan_hopper._load_bounds, count_hopper._kernel),
    *(gather_sum_hopper.kernel, hopper._up_launch, hopper._down_launch, hopper._forward_launch, hopper_layer.forward),
    *(router_logits_hopper._kernel, router_logits_hopper.launch_of, top_k_hopper._kernel, top_k_hopper.launch_of),
    *(scores_hopper._grad_kernel, hopper_backward._kernel, hopper_layer_backward.backward, arguments.fast_memory),
)


class StandIns:
    """Loads a kernel of PyTorch for each variant that the layer asks for, and lists the launches."""

    def __init__(self):
        self.launched = []
        self.work = True
        """Whether the kernels compute anything."""

    def load(self, variant):
        kernel = getattr(self, variant.kernel.rpartition(".")[2])
        params = dict(variant.params)

        def launch(*args):
            self.launched.append(variant.kernel.rpartition(".")[2])
            if self.work:
                kernel(params, *args)

        launch.native = native(launch) if self.work else tvm_ffi.get_global_func("testing.nop")
        return launch

    def router_logits(self, params, x, weight, logits, parts):
        assert parts in Tile(params["tokens"], params["experts"], params["columns"]).parts
        logits.copy_(x.float() @ weight.float().mT)

    def top_k(self, params, logits, bias, token_index, expert_index, score, k, groups, size, chosen, top2, divides, scale):
        assert groups == 1
        assert (params["by"] == "bias") is (bias is not None)
        options = {"scoring": params["scoring"], "renormalize": bool(divides), "scale": scale, "selection_bias": bias}
        routing = top_k(logits.double(), k, **options)
        for out, value in zip((token_index, expert_index, score), routing, strict=False):
            out.copy_(value)

    def plan_few(self, params, index, offsets, row_to_slot, row_to_token, slot_to_row, tickets, size, k):
        plan = dispatch.plan(None, index, num_tokens=len(index) // k, num_experts=size, slots_per_token=k, backend="reference")
        outs = (offsets, row_to_token, row_to_slot, slot_to_row)
        for out, value in zip(outs, plan, strict=False):
            out.copy_(value)
        tickets.zero_()

    def place(self, params, index, order, counts, token_key, order_out, *rows_and_numbers):
        *rows, length, size, _, _, k = rows_and_numbers
        assert params["output"] == "uniform"
        assert counts.shape[0] == -(-len(index) // length)
        assert counts.shape[1] >= size + 1
        self.plan_few(params, index, *rows, size, k)

    def up_projection(self, params, x, w_up, b_up, offsets, tickets, row_to_token, a, z, blocks):
        assert tickets.tolist() == [0] * TICKETS
        w_up = w_up.mT if params.get("transposed") else w_up
        plan = DispatchPlan(offsets, row_to_token, None, None, None, None, len(x), len(w_up), None)
        layout = "interleaved" if params["interleaved"] else "concatenated"
        got = reference.up_projection(
            x, w_up, b_up, plan, activation=params["activation"], gate_up_layout=layout, store_z=params["store_z"]
        )
        assert params["bias"] is (b_up is not None)
        assert blocks % 2 == 0
        for out, value in zip((a, z), got, strict=True):
            if out is not None:
                out.copy_(value)

    def down_projection(self, params, a, w_down, b_down, offsets, tickets, y, blocks, dependent):
        assert tickets.tolist() == [0] * TICKETS
        w_down = w_down.mT if params.get("transposed") else w_down
        y.copy_(reference.down_projection(a, w_down, b_down, DispatchPlan(offsets, *[None] * 5, 0, len(w_down), None)))

    def gather_sum(self, params, rows, score, slot_to_row, token_offsets, token_slots, out, k, dependent):
        terms = rows.float()[slot_to_row.clamp(min=0).long()].masked_fill_((slot_to_row < 0).unsqueeze(1), 0)
        if params["scored"]:
            terms *= score.unsqueeze(1)
        if params["form"] == "uniform":
            out.copy_(terms.unflatten(0, (-1, k)).sum(1))
        else:
            ends = token_offsets.tolist()
            for token in range(len(out)):
                out[token] = terms[token_slots[ends[token] : ends[token + 1]].long()].sum(0)

    def activation_backward(
        self, params, dout, w_down, z, score, offsets, tickets, row_to_token, row_to_slot, dz, scaled_a, partial, blocks
    ):
        assert tickets.tolist() == [0] * TICKETS
        rows = int(offsets[-1])
        slot_to_row = torch.full_like(row_to_slot, -1)
        slot_to_row[row_to_slot[:rows].long()] = torch.arange(rows, dtype=torch.int32)
        plan = DispatchPlan(offsets, row_to_token, row_to_slot, slot_to_row, None, None, len(dout), len(w_down), None)
        layout = "interleaved" if params["interleaved"] else "concatenated"
        wanted = {"need_dz": dz is not None, "need_dscore": partial is not None, "need_scaled_a": scaled_a is not None}
        results = reference.activation_backward(
            dout, z.clone(), w_down, None, score, plan, activation=params["activation"], gate_up_layout=layout, **wanted
        )
        partial.zero_()[0] = results[1][row_to_slot.long()]
        for out, value in ((dz, results[0]), (scaled_a, results[2])):
            if out is not None:
                out.copy_(value)

    def score_grad(self, params, partial, slot_to_row, dout, b_down, offsets, row_to_token, dscore):
        total = partial.sum(0)
        if params["bias"]:
            for bias, own in zip(b_down, own_rows(offsets), strict=True):
                total[own] += dout[row_to_token[own].long()].float() @ bias.float()
        dscore.copy_(total[slot_to_row.long()])

    def weight_grad(self, params, tokens, rows, offsets, tickets, row_to_token, out, blocks):
        for gradient, own in zip(out, own_rows(offsets), strict=True):
            product = tokens[row_to_token[own].long()].float().mT @ rows[own].float()
            gradient.copy_(product.mT if params["transposed"] else product)

    def bias_grad(self, params, rows, offsets, row_to_token, row_to_slot, score, out):
        assert params["gathered"] is (score is not None)
        for gradient, own in zip(out, own_rows(offsets), strict=True):
            if score is None:
                gradient.copy_(rows[own].float().sum(0))
            else:
                gradient.copy_(score[row_to_slot[own].long()] @ rows[row_to_token[own].long()].float())

    def dx_rows(self, params, dz, w_up, offsets, tickets, out, blocks):
        for weight, own in zip(w_up, own_rows(offsets), strict=True):
            out[own] = (dz[own].float() @ weight.float()).to(out.dtype)

    def slot_scores_grad(self, params, logits, expert_index, token_offsets, score_grad, logits_grad, k, divides, scale):
        assert token_offsets is None
        chosen, grad = expert_index.view(-1, k).long(), score_grad.view(-1, k) * scale  # by hand: operators are below autograd
        if params["scoring"] == "softmax_topk":
            score = logits.gather(1, chosen).softmax(1)
            logits_grad.zero_().scatter_(1, chosen, score * (grad - (grad * score).sum(1, keepdim=True)))
            return
        scores = logits.sigmoid() if params["scoring"] == "sigmoid" else logits.softmax(1)
        if divides:
            score = scores.gather(1, chosen)
            total = score.sum(1, keepdim=True)
            grad = (grad - (grad * score / total).sum(1, keepdim=True)) / total
        grad = torch.zeros_like(scores).scatter_(1, chosen, grad)
        logits_grad.copy_(scores * (grad * (1 - scores) if params["scoring"] == "sigmoid" else grad - (grad * scores).sum(1, keepdim=True)))

    def count(self, params, index, counts, count, cumsum, length):
        count.copy_(torch.bincount(index.long(), minlength=len(count)))
        cumsum.copy_(count.cumsum(0))


def own_rows(offsets):
    """The rows of each expert."""
    return list(itertools.starmap(slice, itertools.pairwise(offsets.tolist())))


def standing_in(monkeypatch):
    """For a fixture: CPU tensors pass for those of an sm_90 GPU while the StandIns that it yields load what is launched."""
    for cache in CACHES:
        cache.cache_clear()
    kernels = StandIns()
    for place, name in ((checks, "is_supported_device"), (cute_runtime, "is_supported_device"), (backends, "is_hopper")):
        monkeypatch.setattr(place, name, lambda device: True)
    monkeypatch.setattr(routing_hopper, "is_hopper", lambda device: True)
    monkeypatch.setattr(cute_runtime, "load", kernels.load)
    monkeypatch.setattr(cute_runtime, "on_device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: h100_properties())
    yield kernels
    for cache in CACHES:
        cache.cache_clear()


def make_layer(backend="auto", **options):
    torch.manual_seed(0)
    return MoE(H, I, E, K, dtype=torch.bfloat16, backend=backend, **options)


def draw(tokens=T, seed=1):
    return torch.randn(tokens, H, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


LAUNCHES = ["router_logits", "top_k", "plan_few", "up_projection", "down_projection", "gather_sum"]
