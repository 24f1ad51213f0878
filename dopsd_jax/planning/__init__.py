"""What a step costs and whether it fits, from shapes alone, by the real compiler."""
