"""MNIST in Flower, with updates that fedq packs."""
