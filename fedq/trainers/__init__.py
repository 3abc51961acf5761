"""Whole jobs: settings in, a run's folder out."""
