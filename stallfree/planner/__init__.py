"""Which deployment serves a load best: searched by simulation, and said in words."""
