"""A deployment on this machine: the app on a SuperLink and SuperNodes, with TLS and node keys."""
