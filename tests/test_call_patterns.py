"""How engines call the library, each pattern as it stands in their code."""

import inspect
import math
from dataclasses import fields, replace

import pytest
import torch
from conftest import Target

import flash_mla
from flash_mla import (
    flash_mla_with_kvcache,
    get_mla_decoding_metadata,
    get_mla_metadata,
    merge_attention_states,
)
from flash_mla.flash_mla_interface import FlashMLASchedMeta
from flash_mla.testing import (
    SparseDecodeInputs,
    check_decode,
    check_dense_decode,
    check_dense_prefill,
    check_sparse_prefill,
    make_dense_decode_inputs,
    make_dense_prefill_inputs,
    make_schedule,
    make_sparse_decode_inputs,
    make_sparse_prefill_inputs,
)


def test_vllm_dense_decode(backend: Target) -> None:
    """Old-style metadata arguments, all by keyword, a cache without a head dimension, two layers with one schedule."""
    inputs = make_dense_decode_inputs(backend.lengths(70, 3, 400), s_q=2, h_q=16, device=backend.device, causal=True)
    cache = inputs.k_cache[:, :, 0]
    tile_scheduler_metadata, num_splits = get_mla_metadata(inputs.cache_seqlens, 2 * 16, 1)
    for _ in range(2):
        out, lse = flash_mla_with_kvcache(
            q=inputs.q,
            k_cache=cache.unsqueeze(-2),
            block_table=inputs.block_table,
            cache_seqlens=inputs.cache_seqlens,
            head_dim_v=512,
            tile_scheduler_metadata=tile_scheduler_metadata,
            num_splits=num_splits,
            softmax_scale=576**-0.5,
            causal=True,
        )
        check_dense_decode(inputs, result=(out, lse))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_second_gpu_while_the_first_is_current(cuda: Target) -> None:
    """What a kernel has to be granted is granted on every GPU of a process."""
    for device in ("cuda:0", "cuda:1"):
        check_decode(make_dense_decode_inputs([300, 5], h_q=16, device=device))
        for h_q in (16, 64, 128):
            check_decode(make_sparse_decode_inputs(2, h_q=h_q, topk=200, device=device))
            check_sparse_prefill(make_sparse_prefill_inputs(3, h_q=h_q, topk=200, device=device))
        check_dense_prefill(make_dense_prefill_inputs([(70, 90)], device=device))
    assert torch.cuda.current_device() == 0


def test_vllm_context_parallel_merge(backend: Target) -> None:
    """Every rank holds every other page; a rank without keys takes part with lse +inf."""
    page, ranks = 16, 3
    lengths = [200, 7, 33]
    whole = make_dense_decode_inputs(lengths, h_q=16, page=page, device=backend.device)
    outs, lses = [], []
    for rank in range(ranks):
        own = whole.rows(slice(0, len(lengths)))
        own.block_table = whole.block_table[:, rank::ranks].contiguous()
        counts = []
        for length in lengths:
            pages = range(rank, -(-length // page), ranks)
            counts.append(sum(min(page, length - page * number) for number in pages))
        own.cache_seqlens = torch.tensor(counts, dtype=torch.int32, device=backend.device)
        meta, _ = get_mla_metadata()
        out, lse = flash_mla_with_kvcache(**own.call(), tile_scheduler_metadata=meta)
        outs.append(out.float())
        lses.append(lse)
    assert bool(torch.stack(lses).isinf().any())
    out, lse = merge_attention_states(outs, lses)
    check_dense_decode(whole, result=(out.to(whole.q.dtype), lse))


def test_sglang_graph_buffers(backend: Target) -> None:
    """The schedule is copied into fixed buffers of [num_sms, 8] and [max_batch + 1], and passed as slices of them."""
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count if backend.on_gpu else 132
    max_batch, h_q = 16, 16
    rows_buffer = torch.ones((num_sms, 8), dtype=torch.int32, device=backend.device)
    splits_buffer = torch.ones(max_batch + 1, dtype=torch.int32, device=backend.device)
    for lengths in ([70, 3, 400], [0, 0, 9000, 1], [64] * 16):
        inputs = make_dense_decode_inputs(lengths, h_q=h_q, device=backend.device)
        rows, num_splits = get_mla_decoding_metadata(inputs.cache_seqlens, h_q, 1)
        assert rows.shape[0] <= num_sms
        rows_buffer[: rows.shape[0]].copy_(rows)
        splits_buffer[: len(lengths) + 1].copy_(num_splits)
        out, lse = flash_mla_with_kvcache(
            inputs.q,
            inputs.k_cache,
            inputs.block_table[: len(lengths)],
            inputs.cache_seqlens,
            512,
            rows_buffer[: rows.shape[0]],
            splits_buffer[: len(lengths) + 1],
        )
        check_dense_decode(inputs, result=(out, lse))


@pytest.mark.parametrize("h_q", [8, 16, 64])
def test_sglang_sparse_graph_buffers(backend: Target, h_q: int) -> None:
    """The same buffers for sparse calls, also where a backend's own plan has two rows for each multiprocessor."""
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count if backend.on_gpu else 132
    b, topk = (300, 2048) if backend.on_gpu else (6, 200)
    seqlens = torch.full((b,), 5, dtype=torch.int32, device=backend.device)
    rows, num_splits = get_mla_decoding_metadata(seqlens, h_q, 1, topk=topk)
    assert rows.shape[0] <= num_sms
    check_decode(make_sparse_decode_inputs(b, h_q=h_q, topk=topk, device=backend.device), rows, num_splits)


@pytest.mark.gpu
def test_sglang_captured_step(gpu: Target) -> None:
    """The buffers are part of a graph; before each replay the host copies a new schedule into them."""
    h_q = 16
    inputs = make_dense_decode_inputs([5000, 5000, 5000], h_q=h_q, device="cuda")
    rows, num_splits = (part.clone() for part in get_mla_decoding_metadata(inputs.cache_seqlens, h_q, 1))
    arguments = (inputs.q, inputs.k_cache, inputs.block_table, inputs.cache_seqlens, 512, rows, num_splits)
    flash_mla_with_kvcache(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = flash_mla_with_kvcache(*arguments)
    for lengths in ([5000, 5000, 5000], [1, 0, 4999], [64, 640, 2]):
        inputs.cache_seqlens.copy_(torch.tensor(lengths, dtype=torch.int32))
        planned = get_mla_decoding_metadata(inputs.cache_seqlens, h_q, 1)
        rows.copy_(planned[0])
        num_splits.copy_(planned[1])
        graph.replay()
        check_dense_decode(inputs, result=result)


@pytest.mark.gpu
def test_a_graph_padded_with_empty_requests(gpu: Target) -> None:
    """A batch captured at its largest; shorter ones leave requests without keys behind, whose tables are garbage."""
    inputs = make_dense_decode_inputs([900, 800, 700, 600], h_q=128, device="cuda")
    meta, _ = get_mla_metadata()
    flash_mla_with_kvcache(**inputs.call(), tile_scheduler_metadata=FlashMLASchedMeta())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = flash_mla_with_kvcache(**inputs.call(), tile_scheduler_metadata=meta)
    inputs.cache_seqlens.copy_(torch.tensor([300, 800, 0, 0], dtype=torch.int32))
    inputs.block_table[2:] = -1
    graph.replay()
    check_dense_decode(inputs, result=result)


def test_lmdeploy_looks_for_a_tensor() -> None:
    """It takes the new form when the first result is not a tensor."""
    first, second = get_mla_metadata(torch.tensor([5], dtype=torch.int32), 16, 1, 16)
    assert not isinstance(first, torch.Tensor)
    assert isinstance(first, FlashMLASchedMeta)
    assert second is None


def test_rtp_llm_forces_a_new_plan(backend: Target) -> None:
    """One object for the lifetime of the engine, its tensors set to None before each step."""
    meta, none = get_mla_metadata()
    for lengths in ([70, 3, 400], [5, 0, 1000], [9]):
        meta.tile_scheduler_metadata = None
        meta.num_splits = None
        inputs = make_dense_decode_inputs(lengths, h_q=16, device=backend.device, causal=True)
        first = flash_mla_with_kvcache(**inputs.call(), tile_scheduler_metadata=meta, num_splits=none)
        planned = meta.tile_scheduler_metadata
        second = flash_mla_with_kvcache(**inputs.call(), tile_scheduler_metadata=meta, num_splits=none)
        assert meta.tile_scheduler_metadata is planned
        assert meta.num_splits.shape == (len(lengths) + 1,)
        check_dense_decode(inputs, result=first)
        assert torch.equal(first[0], second[0])


def test_lightllm_page_size_one_view(backend: Target) -> None:
    """A cache of single slots as a strided view of a wider buffer."""
    inputs = make_dense_decode_inputs(backend.lengths(70, 3), h_q=16, page=1, device=backend.device)
    slots = inputs.k_cache.shape[0]
    buffer = torch.full((slots, 2, 1, 640), float("nan"), dtype=inputs.q.dtype, device=backend.device)
    view = buffer[:, 1].as_strided((slots, 1, 1, 576), (2 * 640, 640, 640, 1), 640)
    view.copy_(inputs.k_cache)
    inputs.k_cache = view
    check_dense_decode(inputs)


# ---- Sparse decode.


def v4_step(backend: Target, tokens: int = 5, heads: int = 16, **options: object) -> SparseDecodeInputs:
    """The window cache as the primary, the compressed cache as the extra, heads padded to 64 with sinks of -inf."""
    backend.require("sparse_decode")
    inputs = make_sparse_decode_inputs(
        tokens,
        h_q=64,
        kv_format="MODEL1",
        topk=128,
        page=64,
        extra_topk=192,
        extra_page=2,
        extra_lengths="request",
        sink=True,
        device=backend.device,
        **{"lengths": "request", **options},
    )
    inputs.attn_sink[heads:] = -math.inf
    return inputs


def v4_call(inputs: SparseDecodeInputs, **options: object) -> dict[str, object]:
    """The keywords of vLLM and SGLang."""
    return {
        "q": inputs.q,
        "k_cache": inputs.primary.cache,
        "block_table": None,
        "cache_seqlens": None,
        "head_dim_v": 512,
        "softmax_scale": 512**-0.5,
        "is_fp8_kvcache": True,
        "indices": inputs.primary.indices,
        "topk_length": inputs.primary.lengths,
        "attn_sink": inputs.attn_sink,
        "extra_k_cache": inputs.extra.cache,
        "extra_indices_in_kvcache": inputs.extra.indices,
        "extra_topk_length": inputs.extra.lengths,
        **options,
    }


def test_vllm_v4_decode(backend: Target) -> None:
    """One metadata object per layer type, planned by the first layer of it."""
    with_extra = v4_step(backend)
    window_only = replace(with_extra, extra=None)
    metas = {name: get_mla_metadata()[0] for name in ("window", "compressed")}
    for _ in range(2):
        result = flash_mla_with_kvcache(**v4_call(with_extra), tile_scheduler_metadata=metas["compressed"])
        check_decode(with_extra, result=result)
        result = flash_mla_with_kvcache(
            with_extra.q,
            with_extra.primary.cache,
            None,
            None,
            512,
            metas["window"],
            is_fp8_kvcache=True,
            indices=with_extra.primary.indices,
            attn_sink=with_extra.attn_sink,
            topk_length=with_extra.primary.lengths,
        )
        check_decode(window_only, result=result)
    assert (metas["window"].config.extra_topk, metas["compressed"].config.extra_topk) == (None, 192)


def test_vllm_v32_mixed_batch(backend: Target) -> None:
    """Prefill and decode tokens of all requests in one call with b = 1."""
    backend.require("sparse_decode")
    s_q = 40 if backend.interpreted else 300
    inputs = make_sparse_decode_inputs(1, s_q, h_q=4, topk=64, lengths="token", device=backend.device)
    meta, none = get_mla_metadata(
        cache_seqlens=torch.tensor([64], dtype=torch.int32),
        num_q_tokens_per_head_k=s_q * 4,
        topk=64,
        num_heads_q=4,
        num_heads_k=1,
        is_fp8_kvcache=True,
    )
    out, lse = flash_mla_with_kvcache(
        q=inputs.q,
        k_cache=inputs.primary.cache.view(torch.uint8),
        block_table=torch.zeros((1, 0), dtype=torch.int32, device=backend.device),
        cache_seqlens=torch.tensor([64], dtype=torch.int32, device=backend.device),
        head_dim_v=512,
        tile_scheduler_metadata=meta,
        num_splits=none,
        is_fp8_kvcache=True,
        indices=inputs.primary.indices,
        softmax_scale=576**-0.5,
        topk_length=inputs.primary.lengths,
    )
    check_decode(inputs, result=(out, lse))


def test_sglang_v4_writes_the_rows(backend: Target) -> None:
    """Rows in a fixed buffer, written by the engine: blocks of the primary, then of the extra cache."""
    num_parts, buffer = 33, torch.full((132, 8), -9, dtype=torch.int32, device=backend.device)
    for seed in range(1 if backend.interpreted else 3):
        inputs = v4_step(backend, seed=seed)
        tokens = inputs.q.shape[0]
        blocks = [
            max(1, -(-primary // 64)) + -(-extra // 64)
            for primary, extra in zip(inputs.primary.lengths.tolist(), inputs.extra.lengths.tolist(), strict=True)
        ]
        total = sum(blocks)
        cuts = sorted({part * total // num_parts for part in range(1, num_parts)} - {0, total})
        written, num_splits = make_schedule([64 * count for count in blocks], cuts, device=backend.device)
        idle = torch.tensor([[tokens, 0, 0, 0, 0, 0, 0, 0]], dtype=torch.int32, device=backend.device)
        rows = torch.cat((written, idle.expand(num_parts - len(written), 8)))
        buffer[:num_parts].copy_(rows)
        meta = FlashMLASchedMeta()
        meta.tile_scheduler_metadata, meta.num_splits = buffer[:num_parts], num_splits
        meta.have_initialized = True
        for _ in range(2):
            result = flash_mla_with_kvcache(**v4_call(inputs), tile_scheduler_metadata=meta, num_splits=None)
            check_decode(inputs, result=result)
        pair = flash_mla_with_kvcache(
            **v4_call(inputs), tile_scheduler_metadata=buffer[:num_parts], num_splits=num_splits
        )
        check_decode(inputs, result=pair)


def test_sglang_v32_copies_a_sparse_plan(backend: Target) -> None:
    backend.require("sparse_decode")
    inputs = make_sparse_decode_inputs(3, h_q=16, topk=128, device=backend.device)
    seqlens = torch.tensor([5, 900, 70], dtype=torch.int32, device=backend.device)
    rows, num_splits = get_mla_decoding_metadata(seqlens, 16, 1, 16, True, 128)
    fixed_rows, fixed_splits = torch.ones_like(rows), torch.ones(17, dtype=torch.int32, device=backend.device)
    fixed_rows.copy_(rows)
    fixed_splits[:4].copy_(num_splits)
    check_decode(inputs, fixed_rows, fixed_splits[:4])


def test_lmdeploy_zero_length_primary(backend: Target) -> None:
    """The compressed cache is the primary and holds nothing yet; the window is the extra one."""
    inputs = v4_step(backend, lengths=[0, 0, 7, 0, 128])
    inputs = replace(inputs, primary=replace(inputs.primary), extra=inputs.extra)
    meta, _ = get_mla_metadata()
    result = flash_mla_with_kvcache(**v4_call(inputs), tile_scheduler_metadata=meta)
    check_decode(inputs, result=result)
    assert not isinstance(meta, torch.Tensor)


def test_rtp_llm_forces_a_new_sparse_plan(backend: Target) -> None:
    meta, none = get_mla_metadata()
    for tokens in (5, 2):
        meta.tile_scheduler_metadata = None
        meta.num_splits = None
        inputs = v4_step(backend, tokens)
        result = flash_mla_with_kvcache(**v4_call(inputs), tile_scheduler_metadata=meta, num_splits=none)
        check_decode(inputs, result=result)
        assert meta.num_splits.shape == (tokens + 1,)


def test_lightllm_v32_page_size_one_view(backend: Target) -> None:
    """The V3.2 cache of a layer as single slots, a strided view of the buffer of all layers."""
    backend.require("sparse_decode")
    inputs = make_sparse_decode_inputs(2, h_q=16, page=1, num_blocks=90, device=backend.device)
    slots = inputs.primary.cache.shape[0]
    buffer = torch.full((slots, 3, 1, 656), 0xFF, dtype=torch.uint8, device=backend.device)
    view = buffer[:, 1].as_strided((slots, 1, 1, 656), (3 * 656, 656, 656, 1), 656)
    view.copy_(inputs.primary.cache)
    inputs.primary = replace(inputs.primary, cache=view.view(torch.float8_e4m3fn))
    check_decode(inputs)


# ---- Signatures: the order and the defaults that engines rely on.


def test_the_signature_of_decode() -> None:
    parameters = inspect.signature(flash_mla_with_kvcache).parameters
    positional = [name for name, parameter in parameters.items() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    assert positional == [
        "q",
        "k_cache",
        "block_table",
        "cache_seqlens",
        "head_dim_v",
        "tile_scheduler_metadata",
        "num_splits",
        "softmax_scale",
        "causal",
        "is_fp8_kvcache",
        "indices",
        "attn_sink",
        "extra_k_cache",
        "extra_indices_in_kvcache",
        "topk_length",
        "extra_topk_length",
    ]
    ours = {"kv_format", "enable_batch_invariant", "descale_q", "descale_k", "out", "lse"}
    assert {name for name, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY} == ours
    defaults = {name: parameter.default for name, parameter in parameters.items() if name not in positional[:6]}
    assert {name for name, default in defaults.items() if default is False} == {
        "causal",
        "is_fp8_kvcache",
        "enable_batch_invariant",
    }
    assert all(default is None or default is False for default in defaults.values())


SIGNATURES = {
    "get_mla_decoding_metadata": "seqlens_k num_q_tokens_per_head_k h_k h_q is_fp8_kvcache topk",
    "flash_mla_sparse_fwd": (
        "q kv indices sm_scale d_v attn_sink topk_length out return_lse_base kv_format "
        "extra_k_cache extra_indices_in_kvcache extra_topk_length deterministic"
    ),
    "flash_attn_varlen_func": (
        "q k v cu_seqlens_qo cu_seqlens_kv max_seqlen_qo max_seqlen_kv dropout_p softmax_scale causal "
        "deterministic is_varlen"
    ),
    "merge_attention_states": "outs lses",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_other_signatures(name: str) -> None:
    assert list(inspect.signature(getattr(flash_mla, name)).parameters) == SIGNATURES[name].split()


def test_the_fields_of_the_metadata_object() -> None:
    assert [field.name for field in fields(FlashMLASchedMeta)] == [
        "have_initialized",
        "config",
        "tile_scheduler_metadata",
        "num_splits",
    ]
    assert [field.name for field in fields(FlashMLASchedMeta.Config)] == [
        "b",
        "s_q",
        "h_q",
        "page_block_size",
        "h_k",
        "causal",
        "is_fp8_kvcache",
        "topk",
        "extra_page_block_size",
        "extra_topk",
    ]
