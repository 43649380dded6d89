"""Evaluation on benchmarks: questions about videos, prompts, extraction of answers, scores."""
