"""What an exchange would cost on a cluster, before anything is trained: measured links and codecs, and a model of both.

`cluster` describes links (``link.json``), `probe` measures them; `traffic` counts bytes, `network` and `timeline` turn
them into seconds, `step` and `rounds` into predictions, and `advice` into one recommendation with its reason.
"""
