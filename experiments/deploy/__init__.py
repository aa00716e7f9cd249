"""The same app on a SuperLink and SuperNodes: TLS, keys of nodes, and every process ended by its id."""
