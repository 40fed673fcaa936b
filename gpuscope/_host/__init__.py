"""What stalled the host: compilations, hidden synchronisations, memory. Each is an annex, and there if it is wanted."""
