"""Few-bit models: weights of 1 to 16 bits in training, on disk and deployed.

`quantizers`: values, codes, scales. `which`: which layers. `layers`: training with them. `activations`: binary inputs.
`packed`: files of packed weights. `centres`: learned quantization centres. `update`: learned binary updates.
"""

from fedq.lowbit.layers import deploy, deployed, deployed_state_dict, few_bit_layers, learned_scales, use_few_bits
from fedq.lowbit.quantizers import Binary, Quantizer, Ternary, Uniform, quantizer
from fedq.lowbit.which import choose_quantizers, inner_layers

__all__ = [
    "Binary",
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
    "quantizer",
    "use_few_bits",
]
