"""The nftables backend: one table ``inet fwc``, written as nft text and read back as nft's JSON."""

from fwcompiler_nftables.commands import Nftables

backend = Nftables()
