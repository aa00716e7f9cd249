"""Personalisation methods behind one interface: ``init / step / final / inference``."""
