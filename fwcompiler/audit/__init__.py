"""The audit of a host against its policy: facts in, findings out.

Everything here is pure but for `gather`, which asks the kernel layer for the facts. Nothing changes a host.
"""
