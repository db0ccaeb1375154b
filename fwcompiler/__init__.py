"""fwc: compiles one dialer policy into nftables or iptables, and proves what it loads."""

__version__ = "0.1.0"
