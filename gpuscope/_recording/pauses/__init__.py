"""What stood still: garbage collections, as Python tells of them."""
