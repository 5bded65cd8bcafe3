"""Every C++ kernel, in every instruction set that this machine has, against the torch reference."""

from __future__ import annotations

import os

import pytest
import torch
from tests.kernels.cpu_cases import CASES, INSTRUCTION_SETS, Source

from tandem_kernels.cpu import Context, pack_linear
from tandem_kernels.cpu import operations as ops
from tandem_kernels.cpu.library import load_library

pytestmark = pytest.mark.skipif(load_library() is None, reason="installed without a C++ compiler")


def make_context(kernels: str, threads: int) -> Context:
    try:
        return Context(threads, kernels)
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kernels", INSTRUCTION_SETS)
@pytest.mark.parametrize("case", CASES)
def test_random_calls_equal_the_reference(case: str, kernels: str, threads: int) -> None:
    context = make_context(kernels, threads)
    for seed in range(8):
        CASES[case](context, Source(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernels", INSTRUCTION_SETS)
def test_a_row_has_the_same_bits_however_many_rows_and_threads_there_are(
    kernels: str, dtype: torch.dtype
) -> None:
    source = Source(1)
    x, weight = source.tensor(100, 510, dtype=dtype), source.tensor(300, 510, dtype=dtype)
    expected = None
    for threads in (1, 2, 3):
        context = make_context(kernels, threads)
        packed = pack_linear(context, weight, None)
        for rows in (1, 2, 5, 13, 14, 31, 100):
            actual = ops.linear(context, packed, x[:rows].clone())
            if expected is None:
                expected = ops.linear(context, packed, x)
            assert torch.equal(actual, expected[:rows])


def test_threads_that_come_late_change_nothing() -> None:
    """With four threads per core most of them come when their work is done, or long after."""
    source = Source(2)
    context = Context(4 * (os.cpu_count() or 1))
    x, weight = source.tensor(3, 64), source.tensor(256, 64)
    logits = source.tensor(3, 5000)
    packed = pack_linear(context, weight, None)
    expected = ops.linear(Context(1), packed, x)
    for _ in range(500):
        assert torch.equal(ops.linear(context, packed, x), expected)
        assert torch.equal(ops.argmax(context, logits), logits.argmax(1))


def test_nothing_that_the_kernels_could_not_read_is_given_to_them() -> None:
    context = Context(1)
    packed = pack_linear(context, torch.zeros(4, 8), None)
    with pytest.raises(ValueError, match=r"takes torch.float32 \[rows, 8\]"):
        ops.linear(context, packed, torch.zeros(2, 6))
    with pytest.raises(ValueError, match="strides"):
        ops.linear(context, packed, torch.zeros(8, 2).T)
    with pytest.raises(ValueError, match="units of 32 bits"):
        pack_linear(context, torch.zeros(4, 7, dtype=torch.bfloat16), None)
    with pytest.raises(ValueError, match=r"torch.float16; allowed: torch.float32"):
        pack_linear(context, torch.zeros(4, 8, dtype=torch.float16), None)
    kv = torch.zeros(1, 2, 4, 2, 1, 8)
    with pytest.raises(IndexError, match="past the cache's 8"):
        ops.kv_pack(kv, 0, 1, torch.tensor([8]))
    with pytest.raises(ValueError, match="the slots imply"):
        ops.kv_unpack(kv, 0, 1, torch.tensor([0]), torch.zeros(1, 2, 2, 1, 8))


def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(RuntimeError, match="no kernels named 'C\\+\\+ \\(other\\)'"):
        Context(1, "C++ (other)")
