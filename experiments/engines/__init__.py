"""The engines that run a federation: Flower's own simulation on Ray, long-lived Ray actors, or this process."""
