"""Kernels written by hand, one module per operation and kind of device.

The operations of `hippocampus.ops` choose them; where none fits, XLA's forms take over.
"""
