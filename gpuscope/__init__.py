"""See where the time of a GPU inference goes, stage by stage, in production, without slowing it down."""
