"""Models of the clients' own: quantized centrally (QuPeD's Algorithm 1) or personalised in federated rounds.

Methods turn what a client downloads, its images and its own model into the model that travels; how rounds, messages
and bytes work is not known here.
"""
