"""Numeric passes that the codecs stand on: one set of names, served by device.

`reference` (plain torch) is the oracle and runs everywhere; faster twins with the same names and the same bytes
are chosen here and nowhere else.
"""

from fedq.kernels.reference import (
    absmax,
    bf16_bytes,
    bf16_from_bytes,
    derive_seed,
    elias_fano_decode,
    elias_fano_encode,
    elias_fano_nbytes,
    from_groups,
    hash32,
    hash_int,
    join_bytes,
    mix32,
    pack_bits,
    pack_trits,
    packed_nbytes,
    rotate,
    signs,
    span_seed,
    to_groups,
    tree_sum,
    uniform,
    unpack_bits,
    unpack_trits,
    unrotate,
)

__all__ = [
    "absmax",
    "bf16_bytes",
    "bf16_from_bytes",
    "derive_seed",
    "elias_fano_decode",
    "elias_fano_encode",
    "elias_fano_nbytes",
    "from_groups",
    "hash32",
    "hash_int",
    "join_bytes",
    "mix32",
    "pack_bits",
    "pack_trits",
    "packed_nbytes",
    "rotate",
    "signs",
    "span_seed",
    "to_groups",
    "tree_sum",
    "uniform",
    "unpack_bits",
    "unpack_trits",
    "unrotate",
]
