"""Codecs: stateless compressors of one tensor, named by spec strings such as ``int4:block=256``.

A new codec is one file and one line here.
"""

from fedq.codecs import dense, quantize, sign, sparse  # noqa: F401  (each registers its codecs)
from fedq.codecs.base import Codec, Payload, codec_names, packs_payloads, register
from fedq.codecs.spec import codec, codec_schedule

__all__ = ["Codec", "Payload", "codec", "codec_names", "codec_schedule", "packs_payloads", "register"]
