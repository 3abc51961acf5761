"""Federated rounds: who holds what, what a client does, what the server does with it."""
