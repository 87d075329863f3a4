"""The benchmark tool and `python -m flash_mla`: counting, records, tables. Nothing here depends on speed."""

import dataclasses
import json
import math
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

import flash_mla
from benchmarks import inputs, model, prefill_inputs, report, runner, shapes, sparse_inputs, sparse_prefill_inputs
from benchmarks.__main__ import main
from flash_mla.backends.capability import OPERATIONS
from flash_mla.testing import roofline, timing

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")

# Stands for a peer's wheel, whose module has the same name as ours: dense MLA decode by a plain loop, and sparse for
# 64 heads only.
FAKE_PEER = textwrap.dedent(
    """
    import torch

    def get_mla_metadata(cache_seqlens, num_q_tokens_per_head_k, num_heads_k, *, use_legacy=False):
        print("peers print to stdout")
        return use_legacy, None

    def flash_mla_with_kvcache(q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata, num_splits,
                               causal=False, is_fp8_kvcache=False, indices=None):
        assert tile_scheduler_metadata is True
        if indices is not None:
            return sparse(q, k_cache, head_dim_v, indices)
        out = torch.empty(*q.shape[:3], head_dim_v, dtype=q.dtype)
        lse = torch.empty(q.shape[0], q.shape[2], q.shape[1])
        for i, n in enumerate(cache_seqlens.tolist()):
            k = k_cache[block_table[i].long()].flatten(0, 1)[:n, 0].double()
            for j in range(q.shape[1]):
                seen = n - (q.shape[1] - 1 - j) if causal else n
                scores = q[i, j].double() @ k[:seen].T * q.shape[3] ** -0.5
                lse[i, :, j] = scores.logsumexp(-1)
                out[i, j] = (FACTOR * scores.softmax(-1) @ k[:seen, :head_dim_v]).to(q.dtype)
        return out, lse

    def sparse(q, k_cache, head_dim_v, indices):
        assert q.shape[2] == 64, "64 heads"
        slots = indices.long()
        rows = k_cache.view(torch.uint8)[slots // 64, slots % 64, 0]
        scales = rows[..., 512:528].contiguous().view(torch.float32).repeat_interleave(128, -1)
        values = rows[..., :512].contiguous().view(torch.float8_e4m3fn).float() * scales
        rope = rows[..., 528:].contiguous().view(torch.bfloat16)
        k = torch.cat([values.bfloat16(), rope], -1).double()
        scores = torch.einsum("bshd,bskd->bshk", q.double(), k) * 576**-0.5
        out = FACTOR * torch.einsum("bshk,bskd->bshd", scores.softmax(-1), k[..., :head_dim_v])
        return out.to(q.dtype), scores.logsumexp(-1).transpose(1, 2).float()
    """
)


def fake_record(name: str, gpu: str = "NVIDIA H100 80GB HBM3", time_us: float | None = 100.0, ratio: float = 1.25):
    shape = next(shape for shape in shapes.GROUPS["all"] if shape.name == name)
    peer_us = 100.0 * ratio
    peer = {"time_us": peer_us, "ratio": ratio if time_us else None, "error": None, "baseline": False}
    return {
        "kind": "shape",
        "gpu": gpu,
        "cuda": "13.0",
        "torch": "2.11.0",
        "date": "2026-05-01T12:00:00+00:00",
        "commit": "abc",
        "ceilings": {"gemm_tflops": 796.0, "read_gbps": 3100.0},
        "flop": 50_000_000_000,
        "shape": shape.to_json(),
        "time_us": time_us,
        "error": None if time_us else "RuntimeError: it | broke",
        "floor_us": 80.0,
        "bound": "memory",
        "tflops": 500.0,
        "gbps": 2480.0,
        "share_of_floor": 0.8,
        "peers": {"flashmla": peer, "fa3": {**peer, "ratio": 2 * ratio if time_us else None}},
    }


class TestShapes:
    def test_groups_hold_every_goal(self):
        goals = {shape.name: shape for shape in shapes.GROUPS["goals"]}
        assert len(goals) == len(shapes.GROUPS["goals"]) == 18
        assert all(set(shape.goals) == {"h100", "h200"} for shape in goals.values())
        assert set(goals) <= {shape.name for shape in shapes.GROUPS["all"]}
        assert goals["dense_h128_sq2_32k"].s_q == 2
        assert goals["dense_h128_b1_131072"].lengths() == [131072]

    def test_sparse_goals(self):
        goals = {shape.name: shape for shape in shapes.GROUPS["sparse"]}
        assert len(goals) == len(shapes.GROUPS["sparse"]) == 25
        assert all(set(shape.goals) == {"h100", "h200"} for shape in goals.values())
        assert {shape.name for shape in shapes.GROUPS["sparse_quick"]} < set(goals)
        assert len(shapes.GROUPS["sparse_quick"]) == 5
        assert set(goals) <= {shape.name for shape in shapes.GROUPS["all"]}
        assert all(shape.context >= shape.topk for shape in goals.values())
        assert all(shape.extra_context >= shape.extra_topk for shape in goals.values())

    def test_dense_prefill_goals(self):
        goals = shapes.GROUPS["dense_prefill"]
        assert len(goals) == 18
        assert all(set(shape.goals) == {"h100", "h200"} for shape in goals)
        varied = [shape for shape in goals if shape.varied]
        assert len(varied) == 2
        for shape in varied:
            assert shape.lengths() == shape.lengths()
            assert min(shape.lengths()) >= 100
            assert max(shape.lengths()) <= 8192
        assert sum(goals[0].lengths()) == 8192

    def test_dense_prefill_backward_shapes(self):
        group = shapes.GROUPS["dense_prefill_backward"]
        assert len({shape.name for shape in group}) == len(group) == 13
        assert all(shapes.from_json(shape.to_json()) == shape for shape in group)
        assert [shape.deterministic for shape in group if shape.length == 16384] == [False, True]

    def test_sparse_prefill_backward_shapes(self):
        group = shapes.GROUPS["sparse_prefill_backward"]
        assert len({shape.name for shape in group}) == len(group) == 7
        assert all(shapes.from_json(shape.to_json()) == shape for shape in group)
        assert sum(shape.deterministic for shape in group) == 1

    def test_sparse_prefill_goals(self):
        goals = shapes.GROUPS["sparse_prefill"]
        assert len(goals) == 13
        assert {shape.source for shape in goals} == {"BF16", "V32", "V32 copied"}
        assert all(bool(shape.goals) == (shape.source == "BF16") for shape in goals)
        assert (goals[0].keys(), goals[0].kv_bytes()) == (4096 * 2048, 4096 * 2048 * 1152)

    def test_sparse_counts(self):
        shape = shapes.SparseShape("x", 200, 2, 64, "MODEL1", 128, 512)
        assert shape.counts() == [(128, 512)] * 200
        assert shape.keys() == 200 * 2 * 640
        assert shape.kv_bytes() == 200 * 2 * 640 * 584
        varied = dataclasses.replace(shape, varied=True)
        counts = varied.counts()
        assert counts == varied.counts()
        assert all(1 <= first <= 128 and 1 <= second <= 512 for first, second in counts)
        assert len(set(counts)) > 150
        assert varied.keys() == 2 * sum(first + second for first, second in counts)

    def test_names_are_unique_across_different_shapes(self):
        seen: dict[str, dict] = {}
        for shape in (shape for group in shapes.GROUPS.values() for shape in group):
            fields = {name: value for name, value in shape.to_json().items() if name != "goals"}
            assert seen.setdefault(shape.name, fields) == fields

    def test_varied_lengths_are_the_same_every_time_and_around_the_mean(self):
        shape = shapes.Shape("x", 1000, 1, 16, 4096)
        lengths = shape.lengths()
        assert lengths == shape.lengths()
        assert len(set(lengths)) > 500
        assert min(lengths) >= 2048
        assert max(lengths) <= 6144
        assert abs(sum(lengths) / 1000 - 4096) < 150

    def test_json_round_trip(self):
        for shape in shapes.GROUPS["all"]:
            assert shapes.from_json(json.loads(json.dumps(shape.to_json()))) == shape

    def test_select(self):
        assert [shape.name for shape in shapes.select([], ["dense_h16_b1_*"])] == [
            "dense_h16_b1_1k",
            "dense_h16_b1_32k",
        ]
        assert len(shapes.select(["goals", "quick"], ["dense_h16_b1_1k"])) == 18
        with pytest.raises(KeyError, match=r"no group 'nonsense'; groups: .*goals"):
            shapes.select(["nonsense"], [])
        with pytest.raises(KeyError, match="no shape 'nonsense'"):
            shapes.select([], ["nonsense"])


class TestRoofline:
    @pytest.mark.parametrize(
        ("length", "s_q", "causal", "pairs"),
        [
            (10, 1, True, 10),
            (10, 1, False, 10),
            (10, 3, False, 30),
            (10, 3, True, 8 + 9 + 10),
            (2, 4, True, 1 + 2),
            (0, 4, True, 0),
        ],
    )
    def test_keys_seen(self, length, s_q, causal, pairs):
        assert roofline.keys_seen(length, s_q, causal) == pairs

    def test_keys_seen_counts_the_mask(self):
        for length in range(12):
            for s_q in range(1, 8):
                limits = [min(max(length - (s_q - 1 - j), 0), length) for j in range(s_q)]
                assert roofline.keys_seen(length, s_q, True) == sum(limits)

    def test_work_by_hand(self):
        # Two requests, 3 and 5 keys, 2 query tokens of 4 heads: pairs (2 + 3) + (4 + 5) = 14.
        work = roofline.dense_decode_work([3, 5], s_q=2, h_q=4, causal=True)
        assert work.flop == 2 * 4 * 14 * (576 + 512)
        assert work.bytes == 8 * 576 * 2 + 2 * 2 * 4 * 576 * 2 + 2 * 2 * 4 * 512 * 2

    def test_work_of_published_shapes(self):
        fixed = roofline.dense_decode_work([131072], s_q=1, h_q=128)
        assert fixed.flop == 36_507_222_016
        assert fixed.bytes == 150_994_944 + 128 * 1088 * 2
        assert fixed.tflops(100.0) == pytest.approx(365.07222016)
        assert fixed.gbps(100.0) == pytest.approx(1512.73472)

    def test_heads_of_kv_multiply_the_cache(self):
        one = roofline.dense_decode_work([100], s_q=1, h_q=8, h_kv=1)
        two = roofline.dense_decode_work([100], s_q=1, h_q=8, h_kv=2)
        assert two.flop == one.flop
        assert two.bytes - one.bytes == 100 * 576 * 2

    def test_floor(self):
        ceilings = roofline.Ceilings(gemm_tflops=800.0, read_gbps=3000.0)
        compute, memory = roofline.Work(8_000_000_000, 3_000_000), roofline.Work(8_000_000, 30_000_000)
        assert ceilings.floor_us(compute) == pytest.approx(10.0)
        assert ceilings.bound(compute) == "compute"
        assert ceilings.floor_us(memory) == pytest.approx(10.0)
        assert ceilings.bound(memory) == "memory"

    def test_sparse_work_by_hand(self):
        work = roofline.sparse_decode_work(10, h_q=4)
        assert (work.flop, work.bytes) == (2 * 4 * 10 * 1088, 10 * 656)
        # FlashMLA's 365 us for this shape are known as 400 TFLOPS.
        work = roofline.sparse_decode_work(128 * 2 * 2048, h_q=128)
        assert work.tflops(365.0) == pytest.approx(400.1, abs=0.1)

    def test_dense_prefill_work_by_hand(self):
        work = roofline.dense_prefill_work([3, 1], h_q=4, h_kv=2, d_qk=5, d_v=7, causal=True)
        assert work.flop == 2 * 4 * (1 + 2 + 3 + 1) * (5 + 7)
        assert work.bytes == 4 * (4 + 2) * (5 + 7) * 2
        full = roofline.dense_prefill_work([3], h_q=1, h_kv=1, causal=False)
        assert full.flop == 2 * 9 * 320

    def test_dense_prefill_backward_work_by_hand(self):
        forward = roofline.dense_prefill_work([3, 1], h_q=4, h_kv=2)
        backward = roofline.dense_prefill_backward_work([3, 1], h_q=4, h_kv=2)
        assert (backward.flop, backward.bytes) == (2.5 * forward.flop, 2 * forward.bytes)

    def test_sparse_prefill_work_by_hand(self):
        work = roofline.sparse_prefill_work(3, 100, 5, h_q=2, d_qk=6, d_v=4, bytes_per_token=12)
        assert work.flop == 2 * 2 * 3 * 5 * (6 + 4)
        assert work.bytes == 100 * 12 + 2 * 3 * 2 * (6 + 4)

    def test_sparse_prefill_backward_work_by_hand(self):
        work = roofline.sparse_prefill_backward_work(3, 100, 5, h_q=2, d_qk=6, d_v=4, bytes_per_token=12)
        assert work.flop == 2 * 2 * 3 * 5 * (3 * 6 + 2 * 4)
        assert work.bytes == 2 * (100 * 12 + 2 * 3 * 2 * (6 + 4))

    def test_rows_at_random_places_have_their_own_ceiling(self):
        ceilings = roofline.Ceilings(800.0, 3000.0, {656: 2000.0})
        scattered = roofline.Work(1000, 20_000_000, 656)
        assert ceilings.floor_us(scattered) == pytest.approx(10.0)
        assert ceilings.memory_gbps(roofline.Work(1, 1, 576)) == ceilings.memory_gbps(roofline.Work(1, 1)) == 3000.0

    def test_ceilings_of_a_cpu_are_measured(self):
        ceilings = roofline.measure_ceilings("cpu", quick=True, gather_rows=(576,))
        assert 1e-4 < ceilings.gemm_tflops < 1e3
        assert 1e-1 < ceilings.read_gbps < 1e5
        assert 1e-1 < ceilings.gather_gbps[576] < 1e5


class TestTiming:
    def test_rotation_is_larger_than_the_cache(self):
        cache = 50 << 20
        assert timing.rotation_sets(4 << 30, cache) == 1
        assert timing.rotation_sets(100 << 20, cache) == 10
        assert timing.rotation_sets(1 << 20, cache) * (1 << 20) > 4 * cache
        assert timing.rotation_sets(1 << 20, 0) == 1

    def test_cpu_timing_counts_calls(self):
        calls = []
        result = timing.time_cpu(lambda: calls.append(None), seconds=0.0, min_samples=5)
        assert result.samples == 5
        assert len(calls) == 6
        assert 0 < result.min_us <= result.median_us <= result.max_us
        assert result.method == "cpu"

    def test_host_timing_counts_calls(self):
        calls = []
        result = timing.time_host(lambda: calls.append(None), calls=100, batch=10)
        assert (result.samples, result.calls_per_sample) == (10, 10)
        assert len(calls) == 120


class TestInputs:
    def test_pages_belong_to_one_request_of_one_set(self):
        shape = shapes.Shape("x", 3, 2, 4, 100, page=16)
        made = inputs.paged_inputs(shape, CPU, 2)
        used = [
            int(block)
            for table in made.block_table
            for row, length in zip(table, made.lengths, strict=True)
            for block in row[: math.ceil(length / 16)]
        ]
        assert sorted(used) == list(range(made.k_cache.shape[0]))
        assert made.keys(1, 2).shape == (made.lengths[2], 1, 576)

    @pytest.mark.parametrize("layout", [inputs.paged_inputs, inputs.contiguous_inputs])
    def test_check_tells_right_from_wrong(self, layout):
        shape = shapes.Shape("x", 2, 3, 4, 90, h_kv=2, dtype="fp16")
        made = layout(shape, CPU, 1)
        out = torch.empty(2, 3, 4, 512, dtype=torch.float16)
        lse = torch.empty(2, 4, 3)
        for i in range(2):
            keys = made.keys(0, i).double()
            for h in range(4):
                for j in range(3):
                    seen = keys[: made.lengths[i] - 2 + j, h // 2]
                    scores = seen @ made.q[0, i, j, h].double() / 24
                    out[i, j, h] = (scores.softmax(0) @ seen[:, :512]).half()
                    lse[i, h, j] = scores.logsumexp(0)
        error, lse_error = inputs.check(made, 0, out, lse)
        assert error < 1e-3
        assert lse_error < 1e-5
        out[1, 0, 0, 0] = math.nan
        assert inputs.check(made, 0, out, None) == (math.inf, None)
        assert inputs.check(made, 0, torch.zeros_like(out), lse + 1)[0] == pytest.approx(1.0)
        assert inputs.check(made, 0, torch.zeros_like(out), lse + 1)[1] == pytest.approx(1.0, abs=1e-4)


def sparse_shape(kv_format: str, **options):
    options = {"extra_topk": 96, "extra_page": 2, "varied": True, "context": 200, "extra_context": 120, **options}
    return shapes.SparseShape("x", 3, 2, 4, kv_format, 64, **options)


class TestSparseInputs:
    def test_every_query_token_selects_different_rows_of_its_own_request(self):
        made = sparse_inputs.sparse_inputs(sparse_shape("V32", varied=False), CPU, 2)
        seen = set()
        for side, topk, context in ((made.primary, 64, 256), (made.extra, 96, 120)):
            assert side.indices.shape == (2, 3, 2, topk)
            owner = {}
            for where, row in zip(
                torch.cartesian_prod(*map(torch.arange, (2, 3, 2))).tolist(), side.indices.view(-1, topk), strict=True
            ):
                slots = row.tolist()
                assert len(set(slots)) == topk
                assert {owner.setdefault(slot // side.page, where[:2]) == where[:2] for slot in slots} == {True}
                seen.add(tuple(slots))
            assert side.cache.shape[0] * side.page == 2 * 3 * context
            assert int(side.indices.max()) < 2 * 3 * context
        assert len(seen) == 2 * 12

    @pytest.mark.parametrize("kv_format", ["V32", "MODEL1"])
    @pytest.mark.parametrize("page", [2, 64])
    def test_bytes_mean_what_our_formats_say(self, kv_format, page):
        made = sparse_inputs.sparse_inputs(sparse_shape(kv_format, extra_page=page), CPU, 1).extra
        assert made.cache.stride(1) == made.cache.shape[-1] == shapes.FORMATS[kv_format].bytes_per_token
        if kv_format == "MODEL1":
            assert made.cache.stride(0) % 576 == 0
        values = flash_mla.dequantize_kv_cache(made.cache, kv_format).flatten(0, 2)
        assert values.isfinite().all()
        assert 1.0 < float(values.float().std()) < 3.0
        for request, count in enumerate(made.counts):
            slots = made.indices[0, request, 1]
            assert (slots[count:] == -1).all()
            assert torch.equal(made.rows(0, request, 1), values[slots[:count].long()].float())

    @pytest.mark.parametrize(
        "shape",
        [
            sparse_shape("V32", extra_topk=0, varied=False),
            sparse_shape("V32"),
            sparse_shape("MODEL1", sink=True),
            sparse_shape("MODEL1", extra_page=64, varied=False),
        ],
        ids=["V32", "V32 varied", "MODEL1 varied", "MODEL1"],
    )
    def test_check_tells_right_from_wrong(self, shape):
        made = sparse_inputs.sparse_inputs(shape, CPU, 2)
        assert ("topk_length" in made.arguments(1)) == shape.varied
        schedule, _ = flash_mla.get_mla_metadata()
        out, lse = flash_mla.flash_mla_with_kvcache(tile_scheduler_metadata=schedule, **made.arguments(1))
        error, lse_error = inputs.check(made, 1, out, lse)
        assert error < 4e-3
        assert lse_error < 1e-5
        assert inputs.check(made, 0, out, None)[0] > 0.1
        out[2, 1, 3, 511] = math.nan
        assert inputs.check(made, 1, out, lse + 1) == (math.inf, pytest.approx(1.0, abs=1e-4))

    def test_contenders_get_the_same(self):
        first, second = (sparse_inputs.sparse_inputs(sparse_shape("MODEL1", sink=True), CPU, 1) for _ in range(2))
        for name, value in first.arguments(0).items():
            other = second.arguments(0)[name]
            if isinstance(value, torch.Tensor) and value.dtype is torch.float8_e4m3fn:
                assert torch.equal(value.view(torch.uint8), other.view(torch.uint8))
            elif isinstance(value, torch.Tensor):
                assert torch.equal(value, other)


class TestPrefillInputs:
    @pytest.mark.parametrize("causal", [True, False])
    def test_check_tells_right_from_wrong(self, causal):
        shape = shapes.PrefillShape("x", 4, 150, 2, causal, varied=True, shortest=1)
        made = prefill_inputs.prefill_inputs(shape, CPU, 2)
        longest, running = max(made.lengths), made.cu_seqlens
        tensors = (made.q[1], made.k[1], made.v[1], running, running, longest, longest)
        out, lse = flash_mla.flash_attn_varlen_func(*tensors, causal=causal)
        error, lse_error = inputs.check(made, 1, out, lse)
        assert error < 5e-3
        assert lse_error < 1e-3
        assert inputs.check(made, 1, out, None)[1] is None
        assert inputs.check(made, 0, out, lse)[0] > 0.5
        out[-1] = math.nan
        assert inputs.check(made, 1, out, lse + 1) == (math.inf, pytest.approx(1.0, abs=1e-3))


class TestPrefillBackwardInputs:
    @pytest.mark.parametrize("causal", [True, False])
    def test_check_tells_right_from_wrong(self, causal):
        shape = shapes.PrefillBackwardShape("x", 4, 50, 2, causal, varied=True, shortest=1)
        made = prefill_inputs.prefill_backward_inputs(shape, CPU, 2)
        longest, running = max(made.lengths), made.cu_seqlens
        leaves = [tensor[1].requires_grad_() for tensor in (made.q, made.k, made.v)]
        out, _ = flash_mla.flash_attn_varlen_func(*leaves, running, running, longest, longest, causal=causal)
        gradients = torch.autograd.grad(out, leaves, made.d_out[1])
        assert inputs.check(made, 1, gradients, None)[0] < 5e-3
        assert inputs.check(made, 0, gradients, None)[0] > 0.5
        for gradient in gradients:
            wrong = [torch.zeros_like(other) if other is gradient else other for other in gradients]
            assert inputs.check(made, 1, wrong, None)[0] > 0.1


class TestSparsePrefillInputs:
    @pytest.mark.parametrize("source", ["BF16", "V32", "V32 copied"])
    def test_check_tells_right_from_wrong(self, source):
        shape = shapes.SparsePrefillShape("x", 5, 3, 40, 130, source=source)
        made = sparse_prefill_inputs.sparse_prefill_inputs(shape, CPU, 2)
        kv = flash_mla.dequantize_kv_cache(made.kv, "V32") if source == "V32 copied" else made.kv
        out, _, lse = flash_mla.flash_mla_sparse_fwd(made.q[1], kv, made.indices[1], 576**-0.5, 512, made.sink)
        error, lse_error = inputs.check(made, 1, out, lse)
        assert error < 5e-3
        assert lse_error < 1e-3
        assert inputs.check(made, 0, out, lse)[0] > 0.1
        out[4, 2, 511] = math.nan
        assert inputs.check(made, 1, out, lse + 1) == (math.inf, pytest.approx(1.0, abs=1e-3))


class TestSparsePrefillBackwardInputs:
    @pytest.mark.parametrize("s_kv", [4, 130])
    def test_check_tells_right_from_wrong(self, s_kv):
        shape = shapes.SparsePrefillBackwardShape("x", 5, 3, min(40, s_kv), s_kv)
        made = sparse_prefill_inputs.sparse_prefill_backward_inputs(shape, CPU, 2)
        leaves = [tensor.clone().requires_grad_() for tensor in (made.q[1], made.kv)]
        out, _, _ = flash_mla.flash_mla_sparse_fwd(*leaves, made.indices[1], 576**-0.5, 512, made.sink)
        gradients = torch.autograd.grad(out, leaves, made.d_out[1])
        assert inputs.check(made, 1, gradients, None)[0] < 5e-3
        assert inputs.check(made, 0, gradients, None)[0] > 0.1
        for gradient in gradients:
            wrong = [torch.zeros_like(other) if other is gradient else other for other in gradients]
            assert inputs.check(made, 1, wrong, None)[0] > 0.1


class TestReport:
    def test_table(self):
        records = [
            fake_record("dense_h16_b64_8k"),
            fake_record("dense_h64_b128_4k", ratio=1.1),
            fake_record("dense_h16_b1_1k", time_us=None),
        ]
        lines = report.table(records).splitlines()
        assert len({len(line) for line in lines}) == 1
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        assert cells[0][:5] == ["shape", "time (us)", "TFLOPS", "GB/s", "of the floor"]
        assert cells[2] == [
            "dense_h16_b64_8k",
            "100",
            "500",
            "2480",
            "80 % (memory)",
            "125 (1.25x)",
            "125 (2.50x)",
            "1.20x met",
        ]
        assert cells[3][-1] == "1.20x missed (1.10x)"
        assert cells[4][1] == "failed: RuntimeError: it / broke"

    def test_what_no_kernel_serves_is_said(self):
        record = fake_record("sparse_v32_h128_sq2_b2", time_us=None)
        record.update(error="NotServed: no kernel", not_served=True)
        assert "| not served: no kernel |" in report.table([record])

    def test_caption_has_the_ceilings_of_the_newest_gather(self):
        records = [fake_record("sparse_v32_h128_sq2_b2"), fake_record("dense_h16_b1_1k")]
        records[0]["ceilings"]["gather_gbps"] = {"576": 2830.0, "656": 2660.0}
        assert report.caption(records).endswith(
            "streaming read 3.1 TB/s, gather of 576-byte rows 2.83 TB/s, gather of 656-byte rows 2.66 TB/s"
        )

    def test_latest_takes_the_newest_record_of_each_shape_per_gpu(self, tmp_path):
        old, new = fake_record("dense_h16_b64_8k"), fake_record("dense_h16_b64_8k", time_us=90.0)
        other = fake_record("dense_h128_sq2_4k")
        lines = [json.dumps(record) for record in (old, other, new)]
        (tmp_path / "h100.jsonl").write_text("\n".join(lines) + "\n")
        (tmp_path / "h200.jsonl").write_text(json.dumps(fake_record("dense_h16_b64_8k", "NVIDIA H200")) + "\n")
        records = report.latest(tmp_path)
        assert {gpu: [r["shape"]["name"] for r in made] for gpu, made in records.items()} == {
            "h100": ["dense_h128_sq2_4k", "dense_h16_b64_8k"],
            "h200": ["dense_h16_b64_8k"],
        }
        assert records["h100"][1]["time_us"] == 90.0
        assert "NVIDIA H200, CUDA 13.0" in report.tables(records)
        assert "NVIDIA H200" not in report.tables(records, gpu="h100")
        assert "GEMM 796 TFLOPS, streaming read 3.1 TB/s" in report.caption(records["h100"])

    def test_a_baseline_is_no_peer(self):
        record = fake_record("dense_h16_b64_8k")
        record["peers"]["baseline"] = {"time_us": 99.0, "ratio": 0.99, "error": None, "baseline": True}
        assert report.speedup(record) == 1.25

    def test_readme_is_filled_between_its_markers_and_only_once(self, tmp_path):
        readme = tmp_path / "README.md"
        readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
        assert report.fill_readme(readme, "new\n\ntext")
        first = readme.read_text()
        assert first == f"before\n{report.BEGIN}\nnew\n\ntext\n{report.END}\nafter\n"
        assert report.fill_readme(readme, "new\n\ntext")
        assert readme.read_text() == first

    def test_readme_without_markers_is_left_alone(self, tmp_path):
        readme = tmp_path / "README.md"
        for text in ("nothing", f"{report.BEGIN} no end", f"{report.END} {report.BEGIN}"):
            readme.write_text(text)
            assert not report.fill_readme(readme, "new")
            assert readme.read_text() == text
        assert not report.fill_readme(tmp_path / "none.md", "new")

    def test_plot(self, tmp_path, capsys):
        pytest.importorskip("matplotlib")
        results, plots, readme = tmp_path / "results", tmp_path / "plots", tmp_path / "README.md"
        results.mkdir()
        names = [shape.name for shape in (*shapes.GOALS, *shapes.HEADS, *shapes.SPARSE)]
        (results / "h100.jsonl").write_text("".join(json.dumps(fake_record(name)) + "\n" for name in names))
        readme.write_text(f"{report.BEGIN}\n{report.END}\n")
        arguments = ["plot", "--out", str(results), "--plots", str(plots), "--readme", str(readme)]
        assert main(arguments) == 0
        dense = {"time_vs_length.png", "share_of_roofline.png", "peers.png"}
        assert {path.name for path in plots.iterdir()} == dense | {"sparse_peers.png", "sparse_throughput.png"}
        text = readme.read_text()
        assert "](plots/peers.png)" in text
        assert "| dense_h16_b64_8k " in text
        assert "| sparse_v32_h64_sq1_b128 " in text
        assert "dense_h8_b128_4k" not in text
        assert main(arguments) == 0
        assert readme.read_text() == text


class TestRun:
    def test_gpu_slug(self):
        assert runner.gpu_slug("NVIDIA H100 80GB HBM3") == "h100"
        assert runner.gpu_slug("NVIDIA H200") == "h200"
        assert runner.gpu_slug("NVIDIA B200") == "b200"
        assert runner.gpu_slug("NVIDIA GeForce RTX 4090") == "nvidia-geforce-rtx-4090"
        assert runner.gpu_slug("CPU") == "cpu"

    def test_commit_may_be_given(self, monkeypatch):
        monkeypatch.setenv("FLASH_MLA_COMMIT", "0123abcd")
        assert runner.commit() == "0123abcd"

    def test_bad_options_end_with_a_text(self, tmp_path):
        for arguments, text in (
            (["run", "--group", "nonsense"], "no group 'nonsense'"),
            (["run", "--peers", "nonsense"], "no peer 'nonsense'"),
            (["run", "--peer-path", "flashmla"], "wanted NAME=PATH"),
            (["run", "--baseline", str(tmp_path / "none.so")], "no file"),
        ):
            with pytest.raises(SystemExit, match=text):
                main(arguments)

    def test_ours_and_peers_in_processes_of_their_own(self, tmp_path):
        """The whole way on a CPU: a right peer, one whose answer is wrong, one that is not there."""
        contenders = [runner.Contender("ours", "ours")]
        for label, factor in (("flashmla", 1.0), ("wrong", 1.5), ("absent", None)):
            folder = tmp_path / label
            if factor is not None:
                (folder / "flash_mla").mkdir(parents=True)
                (folder / "flash_mla" / "__init__.py").write_text(f"FACTOR = {factor}\n{FAKE_PEER}")
            contenders.append(runner.Contender(label, "flashmla", str(folder)))
        options = runner.Options(device="cpu", seconds=0.01, logs=tmp_path / "logs")
        shape = shapes.select([], ["smoke_h4_sq2_b2_200"])
        path, records = runner.run(shape, contenders, options, tmp_path, host_calls=2)

        assert [json.loads(line) for line in path.read_text().splitlines()] == records
        assert path.name == "cpu.jsonl"
        record, host = records
        assert (record["kind"], host["kind"]) == ("shape", "host")
        for key in ("date", "commit", "torch", "cuda", "driver", "clock", "library", "ceilings", "run"):
            assert key in record
        assert record["error"] is None
        assert record["rel_error"] < 1e-2
        assert record["flop"] == 2 * 4 * 2 * (199 + 200) * 1088
        assert record["tflops"] == pytest.approx(record["flop"] / record["time_us"] * 1e-6)
        assert record["gbps"] == pytest.approx(record["bytes"] / record["time_us"] * 1e-3)
        assert record["share_of_floor"] == pytest.approx(record["floor_us"] / record["time_us"])
        assert len(record["rounds_us"]) == runner.Options.rounds

        right, wrong, absent = (record["peers"][label] for label in ("flashmla", "wrong", "absent"))
        assert right["ratio"] == pytest.approx(right["time_us"] / record["time_us"])
        assert right["variant"] == "use_legacy"
        assert "wrong answer" in wrong["error"]
        assert (wrong["time_us"], wrong["ratio"]) == (None, None)
        assert re.search("flash_mla", absent["error"])
        assert host["peers"]["flashmla"]["time_us"] > 0
        assert "| smoke_h4_sq2_b2_200 " in report.table(records)
        assert "failed" in report.table(records)

    def test_sparse_decode(self, tmp_path):
        """Ours, a peer that takes 64 heads alone, one whose answer is wrong, one that declines, one for dense only."""
        declines = "def sparse(*arguments): raise RuntimeError('no such kernel\\nhere')"
        contenders = [runner.Contender("ours", "ours"), runner.Contender("fa3", "fa3", str(tmp_path / "fa3"))]
        (tmp_path / "fa3").mkdir()
        (tmp_path / "fa3" / "fa3_fwd_interface.py").touch()
        for label, factor, more in (("flashmla", 1.0, ""), ("wrong", 1.5, ""), ("declining", 1.0, declines)):
            folder = tmp_path / label / "flash_mla"
            folder.mkdir(parents=True)
            (folder / "__init__.py").write_text(f"FACTOR = {factor}\n{FAKE_PEER}\n{more}\n")
            contenders.append(runner.Contender(label, "flashmla", str(folder.parent)))
        options = runner.Options(device="cpu", seconds=0.01, logs=tmp_path / "logs", rounds=1)
        shape = shapes.select([], ["smoke_sparse_v32_h4_b2", "smoke_sparse_model1_h4_sq2_b2"])
        _, records = runner.run(shape, contenders, options, tmp_path, host_calls=2)

        v32, model1, host = records
        assert host["shape"]["name"] == "host_sparse_v32_h64_b1"
        assert host["peers"]["flashmla"]["time_us"] > 0
        assert host["peers"]["declining"]["not_served"] is True
        assert [record["error"] for record in records] == [None] * 3
        assert v32["rel_error"] < 1e-2
        assert v32["keys"] == 2 * 64
        assert (v32["flop"], v32["bytes"]) == (2 * 4 * 2 * 64 * 1088, 2 * 64 * 656)
        assert v32["floor_us"] >= v32["bytes"] / v32["ceilings"]["gather_gbps"]["656"] * 1e-3
        assert model1["bytes"] == model1["keys"] * 584
        right = v32["peers"]["flashmla"]
        assert right["ratio"] == pytest.approx(right["time_us"] / v32["time_us"])
        assert right["variant"] == "use_legacy, padded to 64 heads"
        assert right["left_out"] == {"variant 1": "NotServed: AssertionError: 64 heads"}
        assert "wrong answer" in v32["peers"]["wrong"]["error"]
        assert v32["peers"]["wrong"]["not_served"] is False
        assert "RuntimeError: no such kernel" in v32["peers"]["declining"]["error"]
        for record, label in ((v32, "declining"), (v32, "fa3"), (model1, "flashmla")):
            assert record["peers"][label]["not_served"] is True
        assert "not served" in report.table(records)


class TestDemo:
    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "flash_mla", "--quick", "--device", "cpu", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)

    def test_quick_run_on_a_cpu(self):
        done = self.run()
        assert done.returncode == 0, done.stderr
        for op in ("dense decode", "sparse decode", "sparse prefill", "dense prefill"):
            assert op.replace(" ", "_") in done.stdout
            assert f"{op}, arithmetic (TFLOPS)" in done.stdout
        assert done.stdout.count("check passed") == 4

    def test_json(self):
        done = self.run("--json")
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        assert set(result["runs"]) == {"dense_decode", "sparse_decode", "sparse_prefill", "dense_prefill"}
        for run in result["runs"].values():
            assert run["check"]["passed"] is True
            assert run["time_us"] > 0
            assert run["backend"] == "reference"
        operations = set(OPERATIONS)
        assert set(result["operations"]) == operations


# ---- The portable backend.


def portable_record(**changes: object) -> dict[str, Any]:
    record = {
        "kind": "shape",
        "gpu": "NVIDIA H100 80GB HBM3",
        "shape": {"name": "a shape"},
        "ceilings": {"gemm_tflops": 700.0, "read_gbps": 3000.0},
        "gbps": 1500.0,
        "share_of_read": 0.5,
        "flop": 7_000_000,
        "bytes": 3_000_000_000,
        "floor_us": 1000.0,
        "bound": "memory",
        "time_us": 1100.0,
        "peers": {"triton": {"time_us": 1250.0}},
    }
    return {**record, **changes}


def test_the_model_scales_the_floor_by_the_data_sheets() -> None:
    half = model.Card("half of it", 989.0, 1675.0)
    assert model.modelled_us(portable_record(), half) == pytest.approx(2500.0)
    compute = portable_record(flop=700_000_000_000, bytes=3, bound="compute")
    assert model.modelled_us(compute, half) == pytest.approx(1250.0)
    assert model.modelled_us(portable_record(peers={}), half) is None
    assert model.modelled_us(portable_record(gpu="NVIDIA L4"), half) is None


def test_the_table_says_what_is_a_model() -> None:
    head, rows = model.rows([portable_record(), portable_record(peers={}), portable_record(kind="host")])
    assert head[1:4] == ["CUDA (us)", "Triton (us)", "of the floor"]
    assert all(name.endswith("(model)") for name in head[4:])
    assert [row[:4] for row in rows] == [["a shape", "1100", "1250 (0.88x)", "80 % (memory)"]]
    assert len(rows[0]) == len(head)


def test_the_groups_of_the_portable_backend() -> None:
    assert {shape.op for shape in shapes.GROUPS["portable"]} == {
        "dense_decode",
        "sparse_decode",
        "sparse_prefill",
        "dense_prefill",
    }
    assert not set(shapes.GROUPS["cpu"]) & set(shapes.GROUPS["all"])
