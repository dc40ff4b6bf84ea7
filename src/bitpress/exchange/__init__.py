"""Checkpoints of other tools and our own: read by name as tensors or compressed layers, layers written as tensors. One file an ecosystem."""
