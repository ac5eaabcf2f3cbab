"""What a run needs before it is started: memory by part, bytes on the wire, hours; from shapes alone."""
