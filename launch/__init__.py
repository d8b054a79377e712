"""Launching runs on one machine or many. Torch-free: login nodes have no GPU stack."""
