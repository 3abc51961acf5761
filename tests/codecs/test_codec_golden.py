"""Golden bytes of every codec, and a numpy twin that computes the same bytes for the codecs with scales.

The bytes are a promise between versions and between implementations. After a change that is meant to change them,
``python tests/codecs/test_codec_golden.py`` prints the new table; put it here by hand and say so in the changelog.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch

from fedq.codecs import codec, codec_names
from fedq.kernels import reference

SEED = 0x0123456789ABCDEF
SHAPE = (6, 50)


def fixed_tensor() -> torch.Tensor:
    """Return 300 values that integers make: multiples of 1/64 in -7.9 .. 7.9, in no order and with ties."""
    return torch.tensor([((i * i * 37 + i * 11) % 1013 - 506) / 64 for i in range(300)]).view(SHAPE)


def golden(spec: str) -> tuple[int, str, str]:
    """Return bytes, the first 16 of them, and a digest of all."""
    data = codec(spec).encode(fixed_tensor(), seed=SEED).data.numpy().tobytes()
    return len(data), data[:16].hex(), hashlib.blake2b(data, digest_size=8).hexdigest()


GOLDEN: dict[str, tuple[int, str, str]] = {
    "fp32": (1200, "0000fdc00000e5c00000a8c000000cc0", "c67914a5b8e96e5b"),
    "fp16": (600, "e8c728c740c560c01040684790bfcc45", "2a5c06d31c1ea46a"),
    "bf16": (600, "fdc0e5c0a8c00cc00240ed40f2bfba40", "31c31c7cc25fad96"),
    "int1": (42, "b00cd31c95470dacfc943be5a706d61c", "5c6015c1b28948e8"),
    "int2": (132, "6715a5a081bda60c6b6682ac5e66365a", "e3abae46e58117fb"),
    "int3": (196, "5d252d5b9b944b28975c09232ed77555", "db3c24930e136078"),
    "int4": (260, "6b5a663767a9448a4792d69b6899c142", "3d18bd36d58537e2"),
    "int5": (192, "4118463ddb6ee0d89462f18aa657978a", "1219ac8fb3c53a1c"),
    "int6": (229, "01b15c689fdd5b018b594565e23b64b4", "193e6e390d101df0"),
    "int7": (267, "8183e505ddc7dc3744b8284ba162436f", "20bb409ed6df4398"),
    "int8": (304, "010d2c5da1f762dd6d0fc38a64515062", "aee9817fa0a5a006"),
    "int4:rotate=false": (154, "2163fad6279c5665b8616d9e25ef1e74", "774ef9c262cee7b3"),
    "int4:scale=tensor": (258, "6c4c551767ba229b2790f59c589ae020", "79e622ec8f96e50f"),
    "int4:scale=channel": (162, "2163fad6279c5665b8616d9e25ef1e74", "8ef29253ae234e51"),
    "int4:rounding=stochastic": (260, "6b5b663667aa448a4792c69a689ab143", "52888cf4de94ecb6"),
    "int8:rounding=stochastic": (304, "010d2c5da1f761dd6d0fc38a64515062", "24956353099ef087"),
    "int2:block=64": (85, "95eeb6aa9abbf69766da7f79b656e999", "9488000dbaf591e1"),
    "ternary": (64, "6c322967324e66b11a220ebd1e84c5b1", "7df5306421412ff1"),
    "ternary:rounding=stochastic": (64, "5a2f5e5e7f4e5e780e7b0e757384c4b2", "a67353015c4bc4e4"),
    "ternary:rotate=true": (107, "176faa5584b299971dcb7945a75fc931", "35e69af1118e8da7"),
    "sign": (40, "4ff32ce36ab8f253036bc41a58f929e3", "941d818e48ffe7b1"),
    "sign:scale=unbiased": (40, "4ff32ce36ab8f253036bc41a58f929e3", "3532ed6bdd791cb7"),
    "sign:rotate=true": (66, "fa3317d2a816accad0d1953442e3375b", "1701bd18bcdd824a"),
    "sign:rounding=stochastic": (40, "07ef0f636a9edadf234bc700ccf8a962", "fd5f5324997cb906"),
    "sign:block=64": (48, "4ff32ce36ab8f253036bc41a58f929e3", "dc855bf157821b77"),
    "topk:density=0.1": (81, "4823f58b88184d39598fbf02572b02e6", "5eb8c9066df5cc40"),
    "topk:density=0.1,bits=4": (38, "4823f58b88184d39598fbf02572b02e6", "8de5415ace5aa746"),
    "topk:density=0.1,bits=32": (141, "4823f58b88184d39598fbf02572b02e6", "33772e3315292433"),
    "blocktopk": (14, "40c00f05fdc0f0c0f740f740ec40", "5848b38a366a497f"),
    "blocktopk:k=1,block=64,bits=2": (8, "40c00f050a007541", "edee3a784c1489cb"),
    "blocktopk:k=4,block=32,bits=8": (67, "a0487dd6f5c1d93e34ef28b99e5ae6c3", "15dabc34ef0d2821"),
    "randk:density=0.1": (60, "fdc08440f040c0bf3240a4c00540bcc0", "932ef1a229c296ee"),
    "randk:density=0.1,unbias=true": (60, "9ec22642964270c1de414ec2a6416bc2", "9e9cbf22cc647571"),
    "randk:density=0.1,bits=3": (14, "d718c7b8c10758531b4f0c02fc3f", "0cf2d424f621936e"),
    "threshold:value=6": (175, "4200000000000000549ad3eeb6b6e644", "c913d82c11bb77ad"),
    "threshold:value=6,bits=4": (78, "4200000000000000549ad3eeb6b6e644", "78da9bcfb3b9b339"),
}


@pytest.mark.parametrize("spec", GOLDEN)
def test_golden_bytes(spec: str) -> None:
    assert golden(spec) == GOLDEN[spec]


def test_every_codec_has_golden_bytes() -> None:
    assert {spec.partition(":")[0] for spec in GOLDEN} == set(codec_names())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("spec", GOLDEN)
def test_the_gpu_makes_and_reads_the_same_bytes(spec: str) -> None:
    for x in (fixed_tensor(), torch.randn(170_001, generator=torch.Generator().manual_seed(0))):
        here, there = codec(spec).encode(x, seed=SEED), codec(spec).encode(x.cuda(), seed=SEED)
        assert torch.equal(here.data, there.data.cpu())
        assert torch.equal(here.decode(), there.decode().cpu())


# ---- the numpy twin --------------------------------------------------------------------------------------------------

F = np.float32


def twin_signs(num: int, seed: int) -> np.ndarray:
    key = reference.shared_key(seed)  # checked word by word in test_kernels
    hashed = reference.hash32(torch.arange(num // 32), key).numpy()
    return (1 - 2 * ((hashed[:, None] >> np.arange(32)) & 1)).reshape(-1).astype(F)


def twin_rotate(x: np.ndarray, seed: int) -> np.ndarray:
    x = np.pad(x, (0, -x.size % 256))
    rows = (x * twin_signs(x.size, seed)).reshape(-1, 256)
    for level in range(8):
        stride, out = 1 << level, np.empty_like(rows)
        for i in range(256):
            low = i & ~stride
            out[:, i] = rows[:, low] - rows[:, low | stride] if i & stride else rows[:, low] + rows[:, low | stride]
        rows = out
    return (rows * F(1 / 16)).reshape(-1)


def twin_sum(rows: np.ndarray) -> np.ndarray:
    while rows.shape[1] > 1:
        rows = rows[:, : rows.shape[1] // 2] + rows[:, rows.shape[1] // 2 :]
    return rows[:, 0]


def twin_bf16(values: np.ndarray, up: bool = False) -> tuple[np.ndarray, bytes]:
    bits = values.astype(F).view(np.uint32).astype(np.uint64)
    half = (bits + np.uint64(0x7FFF) + (bits >> np.uint64(16) & np.uint64(1))) >> np.uint64(16)
    if up:
        half += (half << np.uint64(16)).astype(np.uint32).view(F) < values
    return (half << np.uint64(16)).astype(np.uint32).view(F), half.astype("<u2").tobytes()


def twin_pack(codes: np.ndarray, bits: int) -> bytes:
    wide = (codes.astype(np.int64)[:, None] >> np.arange(bits)) & 1
    return np.packbits(wide.astype(np.uint8).reshape(-1), bitorder="little").tobytes()


def blocks(x: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Return zero-padded rows and which elements are real."""
    real = np.pad(np.ones(x.size, bool), (0, -x.size % block)).reshape(-1, block)
    return np.pad(x, (0, -x.size % block)).reshape(-1, block).astype(F), real


def twin_integer(x: np.ndarray, bits: int, block: int, seed: int, rotate: bool) -> bytes:
    step = {2: 0.9957, 3: 0.5860, 4: 0.3352, 8: 0.0308}.get(bits, 0.0)
    y = twin_rotate(x, seed) if rotate else x
    rows, real = blocks(y, block)
    half = 2 ** (bits - 1)
    if rotate:
        mean = twin_sum(np.abs(rows)) / real.sum(axis=1).astype(F)
        sigma_step = mean * F(step * math.sqrt(math.pi / 2))
        cell = np.clip(np.floor(rows * (F(1) / sigma_step)[:, None]), -half, half - 1).astype(F)
        levels = np.where(real, cell + F(0.5), F(0))
        _, scales = twin_bf16(twin_sum(rows * levels) / twin_sum(levels * levels))
    else:
        scale, scales = twin_bf16(np.abs(rows).max(axis=1) / F(half - 1))
        cell = np.clip(np.rint(rows * (F(1) / scale)[:, None]), 1 - half, half - 1)
    return twin_pack((cell + half).reshape(-1)[: y.size], bits) + scales


def twin_stochastic(x: np.ndarray, bits: int, block: int, seed: int) -> bytes:
    noise, _ = blocks(reference.uniform(x.size, seed).numpy(), block)
    rows, _ = blocks(x, block)
    half = 2 ** (bits - 1)
    scale, scales = twin_bf16(np.abs(rows).max(axis=1) / F(half - 1), up=True)
    cell = np.clip(np.floor(rows * (F(1) / scale)[:, None] + noise), 1 - half, half - 1)
    return twin_pack((cell + half).reshape(-1)[: x.size], bits) + scales


def twin_sign(x: np.ndarray, block: int) -> bytes:
    rows, real = blocks(x, block)
    _, scales = twin_bf16(twin_sum(np.abs(rows)) / real.sum(axis=1).astype(F))
    return twin_pack(x < 0, 1) + scales


def twin_ternary(x: np.ndarray, block: int) -> bytes:
    rows, real = blocks(x, block)
    size = np.abs(rows)
    keep = size > (F(0.75) * (twin_sum(size) / real.sum(axis=1).astype(F)))[:, None]
    _, scales = twin_bf16(twin_sum(np.where(keep, size, F(0))) / keep.sum(axis=1).astype(F))
    trits = np.where(keep, np.sign(rows), 0).reshape(-1)[: x.size] + 1
    trits = np.pad(trits.astype(np.int64), (0, -x.size % 5)).reshape(-1, 5)
    return (trits @ np.array([1, 3, 9, 27, 81])).astype(np.uint8).tobytes() + scales


# 163,840 elements are one chunk of the passes: 170,001 have a second one with a ragged end.
@pytest.mark.parametrize("num", [300, 2048, 170_001])
def test_twin_bytes(num: int) -> None:
    x = torch.randn(num, generator=torch.Generator().manual_seed(num))
    values = x.numpy()
    expected = {
        "int8": twin_integer(values, 8, 256, SEED, rotate=False),
        "int8:rotate=true": twin_integer(values, 8, 256, SEED, rotate=True),
        "int6:block=64": twin_integer(values, 6, 64, SEED, rotate=False),
        "int4": twin_integer(values, 4, 256, SEED, rotate=True),
        "int3:block=1024": twin_integer(values, 3, 1024, SEED, rotate=True),
        "int2": twin_integer(values, 2, 256, SEED, rotate=True),
        "int8:rounding=stochastic": twin_stochastic(values, 8, 256, SEED),
        "int5:rounding=stochastic": twin_stochastic(values, 5, 256, SEED),
        "sign": twin_sign(values, 1024),
        "ternary": twin_ternary(values, 256),
    }
    for spec, data in expected.items():
        assert codec(spec).encode(x, seed=SEED).data.numpy().tobytes() == data, spec


if __name__ == "__main__":
    for listed in GOLDEN:
        print(f"    {listed!r}: {golden(listed)!r},".replace("'", '"'))
