"""How an attempt is executed. ``process``: forked by a launcher on this machine."""
