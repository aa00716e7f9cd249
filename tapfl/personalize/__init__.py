"""What a device learns for itself. One method a file, one interface: ``init / step / final / inference``."""
