"""Evaluation: metrics, benchmarks, samples."""
