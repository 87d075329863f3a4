"""Benchmarks of flash_mla: named shapes, peers in their own processes, JSON lines, a table and plots.

Nothing in here imports flash_mla except the implementation under test: see README.md beside this file.
"""
