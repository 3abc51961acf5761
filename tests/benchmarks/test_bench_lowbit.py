"""The benchmark of few-bit models: its arms compute what they say, and its words follow from its figures."""

from __future__ import annotations

import bench_lowbit
import pytest
import torch

from fedq.lowbit import pack


def test_weights_unpacked_in_every_pass_are_the_models() -> None:
    trained = bench_lowbit.few_bit("cnn62k", "int4")
    packed, x = pack(trained), torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(bench_lowbit.unpacking("cnn62k", packed)(x), trained(x))
        assert torch.equal(bench_lowbit.unpacked_at_load("cnn62k", packed)(x), trained(x))


@pytest.mark.parametrize(("ratio", "said"), [(0.5, "are faster"), (1.2, "are not faster")])
def test_the_table_says_whether_few_bit_weights_are_faster(ratio: float, said: str) -> None:
    rows = [
        bench_lowbit.Latency("net", arm, 1, 10 * to_float, 0.01, to_float, 2, 9)
        for arm, to_float in [(bench_lowbit.FLOAT, 1.0), ("binary weights, unpacked", ratio), ("torch int8", 0.3)]
    ]
    size = bench_lowbit.Size("net", "1 bit (binary)", 1000, 30.0, 0.001, 0.36)
    about = {"hardware": "a CPU", "torch": "2", "date": "today"}
    text = bench_lowbit.table([size], rows, about)
    assert f"net, batch 1: few-bit weights with float arithmetic {said} than float32 (at best {ratio:.2f}" in text
    assert text.splitlines()[-3].endswith("At most 0.9 of it: torch int8 (0.30).")
    assert "| net | 1 bit (binary) | 1,000 | 30.0 | 0.10 % | 0.36 |" in text
    assert "| net | torch int8 | 3.00 | 1 % | 0.30 |" in text
