"""Few-bit models: weights of 1 to 16 bits in training, on disk and deployed.

`quantizers`: values, codes, scales. `which`: which layers. `layers`: training with them. `activations`: binary inputs.
`packed`: codes and scales; `packed_file`: those on disk. `centres`: learned quantization centres. `update`: learned
binary updates.
"""

from fedq.lowbit.layers import deploy, deployed, deployed_state_dict, few_bit_layers, learned_scales, use_few_bits
from fedq.lowbit.packed import PackedModel, PackedWeight, pack, pack_state
from fedq.lowbit.packed_file import load_packed, save_packed
from fedq.lowbit.quantizers import Binary, Quantizer, Ternary, Uniform, quantizer
from fedq.lowbit.which import choose_quantizers, inner_layers

__all__ = [
    "Binary",
    "PackedModel",
    "PackedWeight",
    "Quantizer",
    "Ternary",
    "Uniform",
    "choose_quantizers",
    "deploy",
    "deployed",
    "deployed_state_dict",
    "few_bit_layers",
    "inner_layers",
    "learned_scales",
    "load_packed",
    "pack",
    "pack_state",
    "quantizer",
    "save_packed",
    "use_few_bits",
]
