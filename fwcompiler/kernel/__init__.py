"""The only place that runs programs, opens sockets or changes namespaces."""
