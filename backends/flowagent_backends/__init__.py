"""Drivers of storage types, one module each, found through the entry points ``flowagent.backends``."""
